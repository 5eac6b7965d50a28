"""Notebooks executed the way a user does it: `wanlab run` in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from bs4 import BeautifulSoup


@dataclass(frozen=True)
class Executed:
    """A finished run: its run.json, the last value recorded under each name, and its report."""

    record: dict
    values: dict
    page: BeautifulSoup


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """One folder of runs per module: converted networks lie in it, and only the first notebook makes them."""
    return tmp_path_factory.mktemp("runs") / "outputs"


@pytest.fixture(scope="module")
def run_notebook(root, outputs):
    """Execute a notebook of the project, with its default parameters unless more is given."""

    def go(name: str, *more: str, force: bool = True) -> Executed:
        notebook = root / "notebooks" / f"{name}.ipynb"
        done = subprocess.run(
            [sys.executable, "-m", "wanlab.cli", "run", notebook, "--output", outputs, *more]
            + ["--force"] * force,
            cwd=outputs.parent,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report = outputs.parent / done.stdout.splitlines()[-1]
        folder = report.parent
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Executed(
            json.loads((folder / "run.json").read_text()),
            {line["name"]: line["value"] for line in lines},
            BeautifulSoup(report.read_text(), "html.parser"),
        )

    return go
