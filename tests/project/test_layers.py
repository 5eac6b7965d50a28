"""Packages import from the layers below them only, and never in a circle: the contracts of pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_contract_is_kept(root):
    done = lint(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("core/errors.py", "from wanlab.models import shapes", "wanlab.core is not allowed to import wanlab.models"),
        ("runs/folder.py", "from wanlab.cli import doctor", "wanlab.runs is not allowed to import wanlab.cli"),
        ("models/shapes.py", "from wanlab.models import loading", "Modules import one another in no circle BROKEN"),
    ],
)  # fmt: skip
def test_an_import_that_runs_up_or_in_a_circle_is_found(root, tmp_path, module, line, broken):
    shutil.copytree(root / "wanlab", tmp_path / "wanlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    with (tmp_path / "wanlab" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert broken in done.stdout
