"""What tests make once and all test processes of a session share: folders on disk, each with a lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def session_folder(base: Path) -> Path:
    """The folder that the processes of a session share; `base` is this process's own, inside of the session's."""
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, filled by the first process that asks for it; the others wait until it is whole.

    Args:
        folder: what is made. Files in it may name it: it is filled where it stays.
        make: fills the empty folder that it is given. What it raises is raised here, and the next to ask tries again.
    """
    whole = folder.with_name(f"{folder.name}.whole")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def copied(source: Path, target: Path) -> Path:
    """A copy of a shared folder for a test that writes into it or changes its files."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
