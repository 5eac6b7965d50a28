"""Notebooks executed the way a user does it, by `wanlab run`; each started from a process that has its imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from support.contract import unreadable
from support.pages import faults
from support.shared import copied, once

from benchmarks.browser import chromium


@dataclass(frozen=True)
class Executed:
    """A finished run in its folder `outputs/<notebook>/<run id>`."""

    folder: Path

    @cached_property
    def record(self) -> dict:
        """Its run.json."""
        return json.loads((self.folder / "run.json").read_text())

    @property
    def answer(self) -> str:
        """Its headline and the details below it, a line each."""
        return "\n".join([self.record["verdict"], *self.record["details"]])

    @cached_property
    def values(self) -> dict:
        """The last value recorded under each name."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {line["name"]: line["value"] for line in lines}

    @cached_property
    def page(self) -> BeautifulSoup:
        """Its report."""
        return BeautifulSoup((self.folder / "report.html").read_text(), "html.parser")

    @property
    def outputs(self) -> Path:
        """The folder of runs that it lies in, with what the notebook keeps beside them."""
        return self.folder.parents[1]

    def copied_to(self, outputs: Path) -> Executed:
        """The same run in another folder of runs."""
        return Executed(copied(self.folder, outputs / self.folder.parent.name / self.folder.name))


@pytest.fixture(scope="session")
def cold(root):
    """Starts `wanlab` commands as a shell does, in a process that has imported nothing."""

    def go(arguments, *, cwd: Path, env: dict[str, str], timeout_s: float = 900):
        return subprocess.run(
            [sys.executable, "-m", "wanlab.cli", *arguments],
            cwd=cwd,
            env=env | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return go


@pytest.fixture(scope="session")
def faults_of(request):
    """What is wrong with a report as people see it."""

    def go(executed: Executed) -> list[str]:
        if chromium() is None:
            name = executed.folder.parent.name
            warnings.warn(f"no Chromium, so the report of {name} is not looked at", stacklevel=2)
            return []
        return faults(request.getfixturevalue("browser"), executed.folder / "report.html")

    return go


@pytest.fixture(scope="session")
def run_in(root, commands, faults_of):
    """Execute a notebook of the project into a folder of runs, and look at its report."""

    def go(outputs: Path, name: str, *more: str, force: bool = True) -> Executed:
        notebook = root / "notebooks" / f"{name}.ipynb"
        outputs.mkdir(parents=True, exist_ok=True)
        order = ["run", notebook, "--output", outputs, *more] + ["--force"] * force
        done = commands.run(order, cwd=outputs.parent)
        assert done.returncode == 0, done.stderr[-3000:]
        executed = Executed((outputs.parent / done.stdout.splitlines()[-1]).parent)
        assert json.loads((executed.folder / "status.json").read_text())["state"] == "finished"
        wrong = [*faults_of(executed), *unreadable(executed.record, executed.page)]
        assert not wrong, "\n".join(wrong)
        return executed

    return go


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """One folder of runs per module: converted networks lie in it, and only the first notebook makes them."""
    return tmp_path_factory.mktemp("runs") / "outputs"


@pytest.fixture(scope="module")
def run_notebook(run_in, outputs):
    """Execute a notebook into the module's own folder, with its default parameters unless more is given."""

    def go(name: str, *more: str, force: bool = True) -> Executed:
        return run_in(outputs, name, *more, force=force)

    return go


@pytest.fixture(scope="session")
def shared_run(run_in, session_folder):
    """A run that several modules read: executed by the first that asks, in a folder of runs of its own."""

    def go(name: str, *more: str) -> Executed:
        key = hashlib.sha256(json.dumps(more).encode()).hexdigest()[:8]
        place = once(
            session_folder / "runs" / f"{name}-{key}", lambda folder: run_in(folder / "outputs", name, *more)
        )
        (record,) = place.glob(f"outputs/{name}/*/run.json")
        return Executed(record.parent)

    return go
