"""Finds out why a Wan2.2 image-to-video model is slow, changes it, and proves what that bought and cost.

Importing it is cheap: torch, diffusers, onnx and plotly load when something first uses them.
"""

from __future__ import annotations

import importlib
from typing import Any

from wanlab.errors import WanlabError

__version__ = "0.1.0"

_MODULES = ("convert", "doctor", "evaluate", "measure", "models", "nano", "plots", "runs")
_NAMES = {"start": "wanlab.runs.run", "Run": "wanlab.runs.run", "load_runs": "wanlab.runs.store"}

__all__ = ["WanlabError", "__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"wanlab.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'wanlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
