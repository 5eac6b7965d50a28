"""Modules that are imported when something of them is first used."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module that a reader of configurations does without, such as torch.

    Other than `importlib.util.LazyLoader` it leaves `sys.modules` alone until then, so that what was loaded can be tested.

    Args:
        name: full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
