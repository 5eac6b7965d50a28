"""Notebooks that end in every way there is, executed for real through the command line."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from bs4 import BeautifulSoup

import wanlab

PR_SET_CHILD_SUBREAPER = 36

pytestmark = pytest.mark.notebook


def command(notebook: Path, folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "wanlab.cli",
        "run",
        str(notebook),
        "--output",
        str(folder / "outputs"),
        *more,
    ]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(root, fixture_notebooks, tmp_path):
    """Run a fixture notebook; gives exit code, texts, and what the run folder says."""

    def go(name: str, *more: str):
        done = subprocess.run(
            command(fixture_notebooks / f"{name}.ipynb", tmp_path, *more),
            cwd=tmp_path,
            env=environment(root),
            capture_output=True,
            text=True,
            timeout=120,
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, **read(tmp_path, name))

    return go


def read(tmp_path: Path, name: str) -> dict:
    folders = [p for p in (tmp_path / "outputs" / name).glob("*") if p.is_dir()]
    if not folders:
        return {"folder": None}
    (folder,) = folders
    return {
        "folder": folder,
        "status": json.loads((folder / "status.json").read_text()),
        "record": json.loads((folder / "run.json").read_text()),
        "cells": json.loads((folder / "executed.ipynb").read_text())["cells"],
        "page": BeautifulSoup((folder / "report.html").read_text(), "html.parser"),
    }


def cell_states(done) -> list[str]:
    return [c["metadata"]["papermill"]["status"] for c in done.cells if c["cell_type"] == "code"]


def assert_failed(done, state: str, code: int, said: str):
    assert done.code == code
    assert done.status["state"] == state
    assert done.status["exit"] == code
    assert said in done.status["reason"]
    assert f"wanlab: {state}: " in done.err
    assert "Traceback" not in done.err
    assert said in done.page.select_one(".failure").text
    assert Path(done.out.splitlines()[-1]).name == "report.html"
    assert not psutil.pid_exists(done.status["kernel"]["pid"])


def test_finished_run_is_complete_and_not_run_twice(run, tmp_path):
    done = run("ok", "-p", "steps=7", "-p", "prompt=a=b", "-p", "sizes=4,5")
    assert done.code == 0, done.err
    assert done.status["state"] == "finished"
    assert set(cell_states(done)) == {"completed"}
    assert (
        done.record["parameters"] | {"steps": 7, "prompt": "a=b", "sizes": [4, 5]}
        == done.record["parameters"]
    )
    assert done.record["environment"]["packages"]["torch"]
    assert done.record["verdict"] == "ONNX Runtime needs 40.25 ms for 7 steps."
    assert done.page.select_one(".verdict").text == done.record["verdict"]
    assert len(done.page.select("[data-figure]")) == 1
    assert "steps 7 'a=b' (4, 5)" in (done.folder / "console.log").read_text()
    assert (done.folder / "artifacts" / "before_after.csv").is_file()
    assert (done.folder / "artifacts" / "bars.plotly.json").is_file()
    assert Path(tmp_path / done.out.splitlines()[-1]) == done.folder / "report.html"
    assert "[1/7]" in done.err

    row = wanlab.load_runs(tmp_path / "outputs").iloc[0]
    assert (row["state"], row["p.steps"], row["m.time_ms"]) == ("finished", 7, 40.25)

    again = run("ok", "-p", "steps=7", "-p", "prompt=a=b", "-p", "sizes=4,5")
    assert again.code == 0
    assert "finished earlier" in again.out
    assert again.status == done.status


def test_force_keeps_the_earlier_attempt(run):
    first = run("unfinished")
    assert_failed(first, "failed", 1, "without run.finish()")
    # A run that failed is run again without asking.
    second = run("unfinished")
    assert second.status["started"] >= first.status["ended"]
    earlier = second.folder / "attempts" / "1"
    assert json.loads((earlier / "status.json").read_text()) == first.status
    assert (earlier / "report.html").is_file()


def test_failing_cell(run):
    done = run("error")
    assert_failed(done, "failed", 1, "KeyError: 'expert_low'")
    assert cell_states(done) == ["completed", "completed", "failed", "pending", "pending"]
    assert done.status["title"] == "The cell that fails"
    assert 'weights["expert_low"]' in done.page.select_one(".failure .traceback").text


def test_dying_kernel_is_not_called_completed(run, tmp_path):
    done = run("dies")
    assert_failed(done, "died", 3, "killed by signal 9 (SIGKILL)")
    assert cell_states(done) == ["completed", "completed", "completed", "failed", "pending", "pending"]
    assert wanlab.load_runs(tmp_path / "outputs")["state"].tolist() == ["died"]


def test_misspelt_parameter_starts_nothing(run, tmp_path):
    begun = time.monotonic()
    done = run("bad_param", "-p", "step=4")
    assert done.code == 2
    assert "did you mean 'steps'?" in done.err
    assert done.folder is None
    assert not list(tmp_path.rglob("kernel-was-started"))
    assert time.monotonic() - begun < 20


def test_deadline(run):
    begun = time.monotonic()
    done = run("hangs", "--timeout", "15")
    assert_failed(done, "timeout", 4, "not done after 15 s")
    assert time.monotonic() - begun < 60
    assert "waiting" in (done.folder / "console.log").read_text()


def test_flood_is_kept_in_full_beside_a_small_report(run):
    done = run("floods")
    assert done.code == 0
    assert (done.folder / "console.log").read_text().count("\n") == 40_001
    executed = done.folder / "executed.ipynb"
    assert executed.stat().st_size < 2**19
    assert executed.read_text().count("output continues in console.log") == 1
    assert (done.folder / "report.html").stat().st_size < 2**18


def test_changed_parameter_is_refused(run):
    assert_failed(
        run("changed"), "failed", 1, "parameter 'steps' was changed after the parameters cell, from 3 to 99"
    )


def test_hostile_strings_run_nothing(run):
    done = run("hostile")
    assert_failed(done, "failed", 1, "RuntimeError: </script><script>alert(1)</script>")
    assert done.page.h1.text == "Is <script>alert(0)</script> shown as text?"
    assert not [s for s in done.page.find_all("script") if s.get("id") is None and "alert" in s.text]
    assert not done.page.find_all(["iframe", "link"])
    assert not [t for t in done.page.find_all(src=True) if not t["src"].startswith("data:")]
    assert done.page.select_one("figcaption").text == "</script><script>alert(1)</script>"


@pytest.fixture
def adopting():
    """Orphans come to this process instead of process 1, as under a session manager or in a container."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def drain(terminal: int, into: bytearray) -> None:
    """Read a terminal until its last writer goes: one that is never read blocks who writes to it."""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65_536):
            into += piece


def wait_for_cell(title: str, runs: Path, process: subprocess.Popen, bar: bytearray):
    """The kernel, and the path of status.json, once the cell under this heading is running."""
    deadline = time.monotonic() + 180
    status = {}
    while status.get("progress", {}).get("title") != title:
        assert time.monotonic() < deadline, f"{status} {bar[-2000:].decode()}"
        assert process.poll() is None, bar[-2000:].decode()
        time.sleep(0.2)
        for path in runs.glob("*/status.json"):
            status = json.loads(path.read_text())
    return psutil.Process(status["kernel"]["pid"]), path


@pytest.mark.usefixtures("adopting")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_kernel_is_left_behind(root, fixture_notebooks, tmp_path, number):
    # A terminal on stderr, so that the bar is drawn.
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        command(fixture_notebooks / "hangs.ipynb", tmp_path),
        cwd=tmp_path,
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    shown = threading.Thread(target=drain, args=(leader, bar := bytearray()))
    shown.start()
    try:
        kernel, status_path = wait_for_cell("Waiting", tmp_path / "outputs" / "hangs", process, bar)
        process.send_signal(number)
        code = process.wait(30)
    finally:
        process.kill()
        process.wait()
        shown.join(10)
        os.close(leader)
    assert b"2/4" in bar
    assert b"hangs: Waiting" in bar
    psutil.wait_procs([kernel], timeout=10)
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    if number == signal.SIGKILL:
        # Nobody could write the end; the reader sees it.
        assert json.loads(status_path.read_text())["state"] == "running"
        assert wanlab.load_runs(tmp_path)["state"].tolist() == ["died"]
    else:
        assert code == 130
        status = json.loads(status_path.read_text())
        assert status["state"] == "aborted"
        assert status["reason"] == (
            "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C"
        )
        assert status_path.with_name("report.html").is_file()
