"""Notebooks that end in every way there is, executed for real through the command line."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
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
from wanlab.launch import guard as memory
from wanlab.launch.execute import execute
from wanlab.launch.guard import reap
from wanlab.runs import run_measurements

PR_SET_CHILD_SUBREAPER = 36

pytestmark = pytest.mark.notebook


def command(notebook: Path, folder: Path, *more: str) -> list[str]:
    return ["run", str(notebook), "--output", str(folder / "outputs"), *more]


def shell(notebook: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "wanlab.cli", *command(notebook, folder)]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(root, fixture_notebooks, tmp_path, commands, cold):
    """Run a fixture notebook; gives exit code, texts, and what the run folder says.

    With `from_shell=True` runner and kernel are processes that have imported nothing, else forks of one that has.
    """

    def go(name: str, *more: str, from_shell: bool = False):
        start = cold if from_shell else commands.run
        arguments = command(fixture_notebooks / f"{name}.ipynb", tmp_path, *more)
        done = start(arguments, cwd=tmp_path, env=environment(root), timeout_s=120)
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
    done = run("ok", "-p", "steps=7", "-p", "prompt=a=b", "-p", "sizes=4,5", from_shell=True)
    assert done.code == 0, done.err
    assert done.status["state"] == "finished"
    assert 0.05 < done.status["peak_memory_gib"] < 8
    assert not list(done.folder.glob(".*"))
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


@pytest.mark.parametrize("from_shell", [False, True])
def test_dying_kernel_is_not_called_completed(run, tmp_path, from_shell):
    done = run("dies", from_shell=from_shell)
    assert_failed(done, "died", 3, "the kernel was killed by signal 9 (SIGKILL)")
    assert cell_states(done) == ["completed", "completed", "completed", "failed", "pending", "pending"]
    assert wanlab.load_runs(tmp_path / "outputs")["state"].tolist() == ["died"]


def test_kernel_killed_for_want_of_memory(fixture_notebooks, tmp_path, monkeypatch):
    # Only the count is not the system's own: running a machine out of memory is no test.
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom_kill 0\n")
    monkeypatch.setattr(memory, "counter", lambda pid: counter)
    parameters = {"counter": str(counter)}
    outcome = execute(fixture_notebooks / "dies.ipynb", parameters, output=tmp_path / "o", progress=False)
    assert (outcome.state, outcome.exit_code) == ("memory", 5)
    assert re.fullmatch(r"memory ran out at 0\.\d GiB: the system killed the kernel", outcome.error)


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("onnxruntime", "Fail: Failed to allocate memory for requested buffer of size 281474976710656"),
        ("numpy", "ValueError: the clip is too large"),
    ],
)
def test_failed_allocation_is_out_of_memory(run, tmp_path, library, said):
    done = run("allocates", "-p", f"with_library={library}")
    assert_failed(done, "memory", 5, said)
    assert done.status["title"] == "The cell that asks for too much"
    assert done.page.select_one(".failure .traceback")


@pytest.mark.parametrize("in_child", [False, True])
def test_memory_limit(run, tmp_path, in_child):
    grows = ("grows", "--memory-limit", "1.2", "-p", f"in_child={str(in_child).lower()}")
    done = run(*grows, from_shell=in_child)
    assert_failed(done, "memory", 5, "GiB in cell 6, over its limit of 1.2 GiB")
    assert float(done.status["reason"].split()[1]) > 1.2
    assert 1.2 <= done.status["peak_memory_gib"] < 2.5  # rounded to thousandths
    assert done.status["title"] == "Growing"
    assert cell_states(done)[-3:] == ["completed", "failed", "pending"]
    saved = run_measurements(
        wanlab.load_runs(tmp_path / "outputs").assign(**{"notebook": "10_baseline", "p.model": "wan-nano"})
    )
    assert saved.measured["runs.out_of_memory"].value == 1


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


def test_deadline_of_a_kernel_that_hears_no_signal(run):
    done = run("deaf", "--timeout", "8", from_shell=True)
    assert_failed(done, "timeout", 4, "not done after 8 s")
    assert done.status["title"] == "Deaf"
    assert 8 < done.status["seconds"] < 14


def test_flood_is_kept_in_full_beside_a_small_report(run):
    done = run("floods")
    assert done.code == 0
    assert done.status["output_cut_cells"] == [5]
    assert (done.folder / "console.log").read_text().count("\n") == 40_001
    executed = done.folder / "executed.ipynb"
    assert executed.stat().st_size < 2**19
    assert executed.read_text().count("output continues in console.log") == 1
    assert (done.folder / "report.html").stat().st_size < 2**18


@pytest.mark.parametrize(
    ("limit", "lines", "figures", "kept"), [(4, 100_000, 0, 2**19), (20, 0, 100, 18 * 2**20)]
)
def test_flood_over_the_limit_ends_the_run(run, limit, lines, figures, kept):
    done = run("floods", "--output-limit", str(limit), "-p", f"lines={lines}", "-p", f"figures={figures}")
    assert_failed(done, "flooded", 6, f"MiB of output by cell 6, over its limit of {limit} MiB")
    assert float(done.status["reason"].split()[1]) > limit
    assert done.status["output_cut_cells"] == [6]
    written = sum(path.stat().st_size for path in done.folder.glob("console.log"))
    assert written < (limit + 1) * 2**20
    assert (done.folder / "executed.ipynb").stat().st_size < kept
    assert (done.folder / "report.html").stat().st_size < kept + 2**18


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
def small_disk(tmp_path):
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("then", ["record", "print"])
def test_full_disk_stops_a_run_with_its_records_intact(run, small_disk, then):
    done = run("fills", "-p", f"then={then}", "--output", str(small_disk / "outputs"))
    folder = next((small_disk / "outputs" / "fills").iterdir())
    status = json.loads((folder / "status.json").read_text())
    said = f"no space left on device: {folder}/"
    assert (done.code, status["state"], status["title"]) == (1, "failed", "Full")
    assert status["reason"].startswith(said)
    assert f"wanlab: failed: {said}" in done.err
    assert "Traceback" not in done.err
    assert json.loads((folder / "run.json").read_text())["parameters"] == {"then": then}
    assert json.loads((folder / "executed.ipynb").read_text())["cells"]
    lines = (folder / "metrics.jsonl").read_text()
    assert lines.endswith("\n")
    assert json.loads(lines.splitlines()[0])["name"] == "before"
    assert all(json.loads(line) for line in lines.splitlines())
    assert not psutil.pid_exists(status["kernel"]["pid"])
    assert status["processes"] == []


def test_folder_that_cannot_be_written_starts_nothing(run, small_disk):
    outputs = small_disk / "outputs"
    (small_disk / "filler").write_bytes(b"x" * (6 * 2**20 - 2**16))
    full = run("ok", "--output", str(outputs))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    read_only = run("ok", "--output", str(outputs))
    for done, said in ((full, "no space left on device"), (read_only, "read-only file system")):
        assert done.code == 2
        assert done.err.startswith(f"wanlab: error: cannot write runs in {outputs}: {said}: ")
        assert done.err.count("\n") == 1
    assert not list(outputs.rglob("*.json"))


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
        shell(fixture_notebooks / "hangs.ipynb", tmp_path),
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


def gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_nothing_that_a_notebook_started_stays(run):
    done = run("leaves", "-p", "fail=true")
    assert_failed(done, "failed", 1, "RuntimeError: at once")
    started = json.loads((done.folder / "metrics.jsonl").read_text())["value"]
    assert len(started) == 2
    for pid in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # the number can be another's by now
            assert psutil.Process(pid).cmdline()[:1] != ["sleep"]


@pytest.mark.usefixtures("adopting")
def test_what_a_killed_runner_left_is_reaped(root, fixture_notebooks, tmp_path):
    process = subprocess.Popen(
        shell(fixture_notebooks / "leaves.ipynb", tmp_path),
        cwd=tmp_path,
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    bystander = subprocess.Popen(["sleep", "603"], start_new_session=True)
    try:
        kernel, status_path = wait_for_cell("Waiting", tmp_path / "outputs" / "leaves", process, bytearray())
        folder = status_path.parent
        started = json.loads((folder / "metrics.jsonl").read_text())["value"]
        left = [psutil.Process(pid) for pid in started]
        assert reap(tmp_path) == []  # it is running
        wanted = {p.pid for p in left}
        while not wanted <= {who["pid"] for who in json.loads(status_path.read_text()).get("processes", [])}:
            time.sleep(0.1)
        process.kill()
        process.wait()
        psutil.Process.wait(kernel, 10)
        assert not gone(left)
        status = json.loads(status_path.read_text())
        status["processes"].append({"pid": bystander.pid, "started": left[0].create_time() - 100})
        status_path.write_text(json.dumps(status))
        assert reap(tmp_path) == [folder]
        assert gone(left)
        assert bystander.poll() is None  # its number was recorded, its start time was another's
    finally:
        process.kill()
        bystander.kill()
        bystander.wait()
    status = json.loads(status_path.read_text())
    assert (status["state"], status["exit"], status["title"]) == ("died", 3, "Waiting")
    assert status["reason"] == "the process that ran it is gone"
    assert "the process that ran it is gone" in (folder / "report.html").read_text()
    assert not list(folder.glob(".*"))
    assert reap(tmp_path) == []


def write_notebook(
    path: Path, *sources: str, tags: dict[int, str] | None = None, encoding: str = "utf-8"
) -> Path:
    """A notebook of code cells between `wanlab.start()` and nothing; `tags` by the place of a cell in `sources`."""
    cells = [
        {
            "cell_type": "code",
            "metadata": {"tags": [(tags or {}).get(index, "plain")]},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for index, source in enumerate(("import wanlab\nrun = wanlab.start()", *sources), -1)
    ]
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})
    path.write_text(text, encoding=encoding)
    return path


def test_a_notebook_of_any_name_runs_on_any_terminal(root, commands, tmp_path):
    """A name in other scripts, a byte order mark, an expected error, `sys.exit(0)` at the end, ASCII, no HOME."""
    notebook = write_notebook(
        tmp_path / "été हिन्दी 日本 (2).ipynb",
        "1 / 0",
        "print('\x1b[2J\x1b[31mred')\nrun.verdict('fünf → \x1b]0;title\x07ok')\nrun.finish()",
        "import sys\nsys.exit(0)",
        "print('never')",
        tags={0: "raises-exception"},
        encoding="utf-8-sig",
    )
    bare = {
        name: value
        for name, value in environment(root).items()
        if not name.startswith(("HOME", "LC_", "XDG_"))
    }
    bare |= {"LANG": "C", "PYTHONIOENCODING": "ascii"}
    done = commands.run(command(notebook, tmp_path), cwd=tmp_path, env=bare, timeout_s=120)
    assert done.returncode == 0, done.stderr
    said = read(tmp_path, "été-हिन्दी-日本-2")
    assert said["status"]["state"] == "finished"
    assert said["record"]["verdict"] == "fünf → ok"
    log = (said["folder"] / "console.log").read_text()
    assert log.startswith("red\n")
    for text in (log, done.stdout, (said["folder"] / "report.html").read_text(), json.dumps(said["record"])):
        assert "\x1b" not in text
        assert "\\u001b" not in text
    assert "ZeroDivisionError" in said["page"].text  # it is shown, as its cell expects it


ENDS = {
    "raise ExceptionGroup('two', [ValueError('first'), KeyError('second')])": (
        "ExceptionGroup: two (2 sub-exceptions): ValueError: first; KeyError: 'second'"
    ),
    "%nosuch 3": "UsageError: Line magic function `%nosuch` not found.",
    "import sys\nsys.exit(0)": "sys.exit(0) before run.finish()",
    "raise ValueError('\\n\\n  \\x1b[1mwords\\x1b[0m after empty lines')": "ValueError: words after empty lines",
}


@pytest.mark.parametrize(("source", "reason"), ENDS.items(), ids=range(len(ENDS)))
def test_the_status_has_the_words_of_what_ended_the_run(root, commands, tmp_path, source, reason):
    notebook = write_notebook(tmp_path / "ends.ipynb", source, "run.finish()")
    done = commands.run(command(notebook, tmp_path), cwd=tmp_path, env=environment(root), timeout_s=120)
    said = read(tmp_path, "ends")
    assert done.returncode == 1
    assert (said["status"]["state"], said["status"]["cell"], said["status"]["reason"]) == (
        "failed",
        2,
        reason,
    )
    assert reason in done.stderr
