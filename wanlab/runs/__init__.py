"""Runs: one executed notebook is one folder with its inputs, status, numbers, figures and report."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Run": "wanlab.runs.run",
    "start": "wanlab.runs.run",
    "RunFolder": "wanlab.runs.folder",
    "Outcome": "wanlab.runs.execute",
    "execute": "wanlab.runs.execute",
    "load_runs": "wanlab.runs.store",
    "read_schema": "wanlab.runs.parameters",
    "render": "wanlab.runs.report",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'wanlab.runs' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    # The function `execute` has its module's name: keep the function, which is what callers mean.
    globals()[name] = value
    return value
