from __future__ import annotations

import os
import re
import subprocess
import tomllib

import nbformat
import pytest
import yaml

import wanlab

LIMIT_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tracked(root):
    """Files under version control; in an unpacked archive, all files but caches."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    skipped = {".venv", "outputs", "__pycache__", ".git", "build", "dist"}
    return [p for p in root.rglob("*") if p.is_file() and not skipped & set(p.relative_to(root).parts)]


def test_conda_and_pip_ask_for_the_same(root, project):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip[-1] == "--editable ."
    assert sorted(pip[:-1]) == sorted(project["dependencies"])
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert project["requires-python"] == ">=" + python.removeprefix("python=")


def test_every_dependency_has_a_range(project):
    for requirement in project["dependencies"]:
        assert re.search(r"[<>=]=?\d", requirement), requirement


def test_version_is_said_once(project):
    assert project["version"] == wanlab.__version__


def test_default_environment_holds_the_stated_stack(project):
    names = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in project["dependencies"]}
    stack = "jupyterlab papermill torch onnx onnxsim onnxruntime-gpu lpips plotly torch-tb-profiler"
    assert set(stack.split()) <= names
    gpu = {re.split(r"[<>=;\[ ]", r)[0] for r in project["optional-dependencies"]["gpu"]}
    assert {"tensorrt", "pycuda"} <= gpu


def test_readme_gives_the_two_commands(root):
    readme = (root / "README.md").read_text()
    for command in ("make demo", "make test"):
        assert re.search(rf"^\s*(\$ )?{command}\b", readme, re.MULTILINE), command


def test_ci_runs_the_readmes_test_command(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def test_make_help_is_the_default_and_lists_every_target(root):
    makefile = (root / "Makefile").read_text()
    said = subprocess.run(["make", "-s"], cwd=root, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split()
    for target in targets:
        assert re.search(rf"make {target}\s+\S", said), target


def test_the_quick_lane_leaves_out_every_marked_kind_of_test(root):
    """`make check` runs style, then what has none of the markers; `make test` leaves nothing out and says what is slow."""
    markers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    lanes = {
        lane: subprocess.run(
            ["make", "-n", "-o", ".venv/.installed", lane],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for lane in ("check", "test")
    }
    assert "ruff check ." in lanes["check"]
    assert "ruff format --check ." in lanes["check"]
    left_out = re.search(r'-m "(.+)"', lanes["check"]).group(1)
    assert sorted(left_out.split(" and ")) == sorted(f"not {line.partition(':')[0]}" for line in markers)
    assert " -m " not in lanes["test"].split("pytest")[1]
    assert "--durations=10" in lanes["test"]


def test_licence_is_the_stated_one(root, project):
    text = (root / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_nothing_tracked_is_large(tracked):
    assert not [(p.name, p.stat().st_size) for p in tracked if p.stat().st_size > LIMIT_BYTES]


def test_tracked_notebooks_carry_no_outputs(root, tracked):
    notebooks = [p for p in tracked if p.suffix == ".ipynb"]
    assert notebooks
    for path in notebooks:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs, path
                assert cell.execution_count is None, path


def test_modules_stay_small(root):
    long = {
        p.name: n for p in (root / "wanlab").rglob("*.py") if (n := len(p.read_text().splitlines())) > 700
    }
    assert not long
