"""What tests make once and all test processes of a session share: a folder on disk, one lock per thing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def session_folder(base: Path) -> Path:
    """The folder that the processes of a session share; each has its own base folder inside of the session's."""
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, filled by the first process that asks for it; the others wait until it is whole.

    Args:
        folder: what is made; it exists only when `make` came to its end.
        make: fills the empty folder that it is given. What it raises is raised here, and the next to ask tries again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            draft = folder.with_name(f".{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(folder)
    return folder


def copied(source: Path, target: Path) -> Path:
    """A copy of a shared folder for a test that writes into it or changes its files."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
