"""An object that passes for another while some of its entry points are measured."""

from __future__ import annotations

from collections.abc import Callable


class StandIn:
    """Passes for the object it stands for, except that some entry points are measured.

    `isinstance` sees the original's class, attributes are read from and written to the original.
    """

    def __init__(self, original, calls: dict[str, Callable]) -> None:
        measured = {name: wrap(getattr(original, name)) for name, wrap in calls.items()}
        object.__setattr__(self, "_wanlab_original", original)
        object.__setattr__(self, "_wanlab_measured", measured)

    def __getattribute__(self, name: str):
        if name in ("_wanlab_original", "_wanlab_measured"):
            return object.__getattribute__(self, name)
        measured = object.__getattribute__(self, "_wanlab_measured")
        if name in measured:
            return measured[name]
        return getattr(object.__getattribute__(self, "_wanlab_original"), name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._wanlab_original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._wanlab_original, name)

    def __call__(self, *args, **kwargs):
        return self._wanlab_measured.get("__call__", self._wanlab_original)(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._wanlab_original)
