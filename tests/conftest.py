"""Shared by all tests: one thread per test process, no machine-dependent deadlines."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from support import exports, shared
from support.commands import Commands

from benchmarks.browser import chromium, launched

settings.register_profile("wanlab", deadline=None)
settings.load_profile("wanlab")

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# Modules whose tests take longest, the longest first: they start first, so that no process ends long after the other.
FIRST = (
    "notebooks/test_notebooks_20_21.py",
    "notebooks/test_notebooks_00_10.py",
    "notebooks/test_notebooks_40.py",
    "notebooks/test_notebooks_41.py",
    "notebooks/test_notebooks_31.py",
    "notebooks/test_notebooks_22.py",
    "browser/test_lab.py",
)
LONG = ("notebook", "browser", "slow")
SLOW_FIXTURES = {"captured", "exported"}  # a generation under the profiler, an export of a model


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Raw bytes give no names: those of an archive hold the time, and test processes must collect the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which test processes take modules, each of which stays in one process (`--dist loadscope`)."""
    turns: dict[str, int] = {}
    for item in items:
        module = item.path.relative_to(TESTS).as_posix()
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        turns[module] = min(turns.get(module, len(FIRST) + len(LONG)), _turn(module, item))
    items.sort(key=lambda item: turns[item.path.relative_to(TESTS).as_posix()])


def pytest_collection_finish() -> None:
    """Modules, tests and their libraries stay: collections need not visit them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _turn(module: str, item: pytest.Item) -> int:
    """Lower goes first."""
    if module in FIRST:
        return FIRST.index(module)
    marked = [index for index, name in enumerate(LONG) if item.get_closest_marker(name)]
    return len(FIRST) + min(marked, default=len(LONG))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """The folder that all test processes of this session share; see `support.shared.once`."""
    return shared.session_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def cache(session_folder) -> Path:
    """wanlab's cache, empty at the start of a session and shared by its processes; never the user's."""
    os.environ["WANLAB_CACHE"] = str(session_folder / "cache")
    return session_folder / "cache"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of PyTorch: networks as small as those of tests only wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(session_folder):
    """`support.exports.exported` with the cache of this session."""
    return functools.partial(exports.exported, session_folder / "exports")


@pytest.fixture(scope="session")
def commands(root, tmp_path_factory) -> Iterator[Commands]:
    """Starts `wanlab` commands warm."""
    started = Commands(root, tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of a process."""
    path = chromium()
    if path is None:
        pytest.fail("no Chromium: `make chromium` installs Debian's, or set CHROMIUM to the path of one")
    with launched(path) as running:
        yield running


@pytest.fixture(scope="session")
def fixture_notebooks(root: Path) -> Path:
    """Notebooks that fail in one known way each."""
    return root / "tests" / "fixtures" / "notebooks"
