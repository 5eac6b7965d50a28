"""Shared by all tests: one thread per test process, no machine-dependent deadlines."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from support import shared

settings.register_profile("wanlab", deadline=None)
settings.load_profile("wanlab")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """The folder that all test processes of this session share; see `support.shared.once`."""
    return shared.session_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def fixture_notebooks(root: Path) -> Path:
    """Notebooks that fail in one known way each."""
    return root / "tests" / "fixtures" / "notebooks"
