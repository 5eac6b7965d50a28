"""Commands killed at random moments: nothing is lost, nothing is left running, and the same command then finishes.

One moment each; `make kills` takes six (WANLAB_KILLS).
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx
import psutil
import pytest

import wanlab
from wanlab.core.files import write_text

pytestmark = pytest.mark.notebook

MOMENTS = range(int(os.environ.get("WANLAB_KILLS", "1")))
RUNS = 3
HOW = {"local": ()} | ({"ray": ("--ray",)} if "WANLAB_KILLS" in os.environ else {})
"""Options of a sweep. Where a driver is killed while Ray starts, Ray's agents end a minute later: `make kills` waits."""

EXPORT = """
import sys
from dataclasses import replace
from support import convert_tiny as tiny
from wanlab.export import export_all

model = tiny.bare(tiny.pipeline())
model.spec = replace(model.spec, name="wan-nano")
export_all(model, sys.argv[1], ("expert_high", "vae_decoder"), dynamic=False, height=32, width=48, frames=5)
"""


@pytest.fixture
def work(root, tmp_path, monkeypatch) -> Path:
    """A folder with the notebook, its grid, and three finished runs."""
    shutil.copy(root / "tests/fixtures/notebooks/journal.ipynb", tmp_path)
    grid = f"name: journal\nnotebook: journal.ipynb\naxes: {{number: [{', '.join(map(str, range(RUNS)))}]}}\n"
    write_text(tmp_path / "grid.yaml", grid)
    write_text(tmp_path / "export.py", EXPORT)
    monkeypatch.setenv("WANLAB_TEST_JOURNAL", str(tmp_path / "journal.jsonl"))
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def start(root: Path, work: Path, *arguments: str) -> subprocess.Popen:
    paths = os.pathsep.join((str(root), str(root / "tests")))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=work,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(root: Path, work: Path, *arguments: str) -> None:
    process = start(root, work, *arguments)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]


def kill_within(seconds: float, root: Path, work: Path, *arguments: str, seed: int) -> None:
    """Kill a command at a random moment; then nothing of it may run on."""
    process = start(root, work, *arguments)
    time.sleep(random.Random(f"{arguments[:3]} {seed}").uniform(0.05, seconds))
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=150 if "--ray" in arguments else 30)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def no_drafts(folder: Path) -> bool:
    return not [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".onnx", ".data"))]


def finished_runs(work: Path) -> list[int]:
    """The parameter `number` of every finished run; every line of their files can be read."""
    runs = wanlab.load_runs(work / "outputs")
    numbers = []
    for folder in map(Path, runs.loc[runs["state"] == "finished", "folder"]):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        numbers.append(json.loads((folder / "run.json").read_text())["parameters"]["number"])
    return sorted(numbers)


RUN = ("-m", "wanlab.cli", "run", "journal.ipynb", "--output", "outputs", "-p")
SWEEP = ("-m", "wanlab.cli", "sweep", "grid.yaml", "--output", "outputs", "--slots", "2")
PUBLISH = ("-m", "wanlab.cli", "publish", "outputs", "--notebooks", "--to")


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_run(root, work, seed):
    finish(root, work, *RUN, "number=0")
    kill_within(5, root, work, *RUN, "number=1", seed=seed)
    assert 0 in finished_runs(work)
    finish(root, work, *RUN, "number=1")
    assert finished_runs(work) == [0, 1]
    assert no_drafts(work)


@pytest.mark.parametrize("seed", MOMENTS)
@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
def test_a_sweep(root, work, seed, how):
    kill_within(12 if how else 7, root, work, *SWEEP, *how, seed=seed)
    kept = finished_runs(work) if (work / "outputs").is_dir() else []
    begun = (work / "journal.jsonl").read_text().count('"end"') if (work / "journal.jsonl").is_file() else 0
    assert len(kept) <= begun
    finish(root, work, *SWEEP, *how)
    assert finished_runs(work) == list(range(RUNS))
    ends = [
        json.loads(line)["number"]
        for line in (work / "journal.jsonl").read_text().splitlines()
        if "end" in line
    ]
    assert all(ends.count(number) == 1 for number in kept), "a finished run was run again"


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_publication(root, work, seed):
    finish(root, work, *SWEEP)
    kill_within(3, root, work, *PUBLISH, "site", seed=seed)
    finish(root, work, *PUBLISH, "site")
    finish(root, work, *PUBLISH, "fresh")
    same = filecmp.dircmp(work / "site", work / "fresh")
    assert same.left_list == same.right_list
    assert no_drafts(work / "site")


@pytest.mark.parametrize("seed", MOMENTS)
def test_an_export(root, work, seed):
    kill_within(14, root, work, "export.py", "graphs", seed=seed)
    finish(root, work, "export.py", "graphs")
    for path in (work / "graphs").glob("*.onnx"):
        onnx.checker.check_model(path)
    assert sorted(path.stem for path in (work / "graphs").glob("*.onnx")) == ["expert_high", "vae_decoder"]
    assert no_drafts(work / "graphs")
