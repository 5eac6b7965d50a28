"""Sweeps as people run them: `wanlab sweep` in its own process, killed, interrupted, resumed, and on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import wanlab

pytestmark = pytest.mark.notebook

GRID = """
name: journal
notebook: {notebook}
axes:
  number: [{numbers}]
parameters: {{gated: {gated}}}
"""


class Sweep:
    """A grid in a folder of its own, and what its notebooks did."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.root = folder, root
        self.journal, self.gate = folder / "journal.jsonl", folder / "gate"
        self.results = folder / "outputs" / "journal"
        self.notebook = folder / "journal.ipynb"
        self.notebook.write_text((root / "tests/fixtures/notebooks/journal.ipynb").read_text())

    def grid(self, numbers: str, gated: bool = False, more: str = "") -> None:
        text = GRID.format(notebook=self.notebook.name, numbers=numbers, gated=str(gated).lower())
        (self.folder / "grid.yaml").write_text(text + more)

    def start(self, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "wanlab.cli", "sweep", "grid.yaml", "--output", "outputs", *more],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(self.root),
                "OMP_NUM_THREADS": "1",
                "WANLAB_TEST_JOURNAL": str(self.journal),
                "WANLAB_TEST_GATE": str(self.gate),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str) -> tuple[int, str, str]:
        process = self.start(*more)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def begun(self) -> list[int]:
        return [entry["number"] for entry in self._entries() if "end" not in entry]

    def spans(self) -> dict[int, tuple[float, float]]:
        return {e["number"]: (e["begin"], e["end"]) for e in self._entries() if "end" in e}

    def pids(self) -> list[int]:
        return [entry["pid"] for entry in self._entries() if "pid" in entry]

    def wait_for(self, count: int, process: subprocess.Popen) -> None:
        """Until so many notebooks have begun."""
        deadline = time.monotonic() + 240
        while len(self.begun()) < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    @property
    def record(self) -> dict:
        return json.loads((self.results / "sweep.json").read_text())

    @property
    def states(self) -> dict[int, str]:
        return {run["parameters"]["number"]: run["state"] for run in self.record["runs"]}

    def attempts(self) -> dict[int, int]:
        """Earlier attempts that were kept."""
        return {
            run["parameters"]["number"]: len(list((self.results / run["run_id"] / "attempts").glob("*")))
            for run in self.record["runs"]
        }

    def _entries(self) -> list[dict]:
        return (
            [json.loads(line) for line in self.journal.read_text().splitlines()]
            if self.journal.is_file()
            else []
        )


@pytest.fixture
def sweep(root, tmp_path) -> Sweep:
    return Sweep(root, tmp_path)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    alive = pids
    while alive and time.monotonic() < deadline:
        alive = [
            p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
        ]
        time.sleep(0.1)
    assert not alive


def family(process: subprocess.Popen) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def test_every_run_once_and_alone_means_alone(sweep):
    sweep.grid(
        "1, 2, 3, 4",
        more="notebooks:\n  - notebook: journal.ipynb\n    parameters: {seconds: 0.5}\n"
        "  - {notebook: journal.ipynb, machine: alone, axes: {number: [5, 6]}}\n",
    )
    text = (sweep.folder / "grid.yaml").read_text().replace("notebook: journal.ipynb\naxes", "axes")
    (sweep.folder / "grid.yaml").write_text(text)
    code, out, err = sweep.run("--slots", "2")
    assert code == 0, err
    assert sorted(sweep.begun()) == [1, 2, 3, 4, 5, 6]
    assert set(sweep.states.values()) == {"finished"}
    assert sweep.record["state"] == "finished"
    assert "finished: 6 finished" in out
    assert (sweep.folder / out.splitlines()[-1]).samefile(sweep.results / "index.html")
    assert "[6/6] finished" in err
    spans = sweep.spans()
    for alone in (5, 6):
        others = [spans[n] for n in spans if n != alone]
        assert all(end <= spans[alone][0] or begin >= spans[alone][1] for begin, end in others)
    assert any(spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1] for a, b in ((1, 2), (2, 3), (3, 4)))

    # Again: nothing is run. One value more: that one is.
    code, out, err = sweep.run()
    assert (code, len(sweep.begun())) == (0, 6)
    assert "6 finished before" in err
    (sweep.folder / "grid.yaml").write_text(text.replace("[5, 6]", "[5, 6, 7]"))
    code, out, err = sweep.run("--dry-run")
    assert "7 runs, 1 to run" in out
    code, out, err = sweep.run()
    assert (code, sweep.begun()[6:]) == (0, [7])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_sweep_leaves_no_process_and_goes_on(sweep, number):
    sweep.grid("1, 2, 3", gated=True)
    process = sweep.start("--slots", "2")
    sweep.wait_for(2, process)
    running = family(process)
    assert set(sweep.pids()) <= set(running)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert_gone(running)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert sweep.record["state"] == "aborted"
        assert sorted(sweep.states.values()) == ["aborted", "aborted", "pending"]
    else:
        assert sweep.record["state"] == "running"  # nobody was left to say otherwise
        assert set(wanlab.load_runs(sweep.results)["state"]) <= {"aborted", "died"}
    sweep.gate.touch()
    code, _, err = sweep.run("--slots", "2")
    assert code == 0, err
    assert sorted(sweep.begun()) == [1, 1, 2, 2, 3]  # the interrupted again, the missing once
    assert set(sweep.states.values()) == {"finished"}
    assert sweep.attempts() == {1: 1, 2: 1, 3: 0}


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_killed_worker_loses_nothing(sweep, executor):
    sweep.grid("1, 2, 3, 4", gated=True)
    process = sweep.start("--slots", "2", *(["--ray"] if executor == "ray" else []))
    sweep.wait_for(2, process)
    victim = psutil.Process(sweep.pids()[0])
    lost = sweep.begun()[0]
    chain = [p for p in victim.parents() if p.pid != process.pid]
    # The kernel's own parent is the worker; on Ray the worker that is killed is Ray's, one further up.
    worker = chain[1] if executor == "ray" else chain[0]
    assert "ray::" in " ".join(worker.cmdline()) or executor == "local"
    worker.kill()
    assert_gone([victim.pid])
    sweep.gate.touch()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "started again" in err
    assert set(sweep.states.values()) == {"finished"}
    assert sorted(sweep.begun()) == sorted([1, 2, 3, 4, lost])
    assert sweep.attempts() == {n: int(n == lost) for n in (1, 2, 3, 4)}


def test_a_second_driver_is_refused(sweep):
    sweep.grid("1", gated=True)
    process = sweep.start()
    sweep.wait_for(1, process)
    code, _, err = sweep.run()
    assert code == 2
    assert f"is being run by process {process.pid}" in err
    sweep.gate.touch()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert sweep.begun() == [1]


def test_every_fault_is_told_as_what_it_is(sweep, root):
    folder = root / "tests" / "fixtures" / "notebooks"
    parts = {"error": "failed", "dies": "died", "hangs": "timeout", "ok": "finished", "unfinished": "failed"}
    lines = [
        f"  - {{notebook: {folder / name}.ipynb, limit_s: {12 if name == 'hangs' else 100}}}"
        for name in parts
    ]
    (sweep.folder / "grid.yaml").write_text("name: journal\nnotebooks:\n" + "\n".join(lines))
    code, out, err = sweep.run("--slots", "2")
    assert code == 1
    assert {run["label"]: run["state"] for run in sweep.record["runs"]} == parts
    assert sweep.record["state"] == "incomplete"
    assert "1 finished, 1 died, 2 failed, 1 timeout" in out
    assert "died in" in err
    assert "killed by signal 9" in err
    assert all(run["attempts"] == 1 for run in sweep.record["runs"])
