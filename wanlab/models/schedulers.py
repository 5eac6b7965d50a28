"""What several parts ask of diffusers' schedulers, and how a class is made that diffusers takes for its own."""

from __future__ import annotations

from typing import Any


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a scheduler goes from noise to a video along straight lines: x = (1 - sigma) x0 + sigma noise."""
    return bool(scheduler.config.get("use_flow_sigmas")) or "FlowMatch" in type(scheduler).__name__


def named_as(kind: type, base: type) -> type:
    """A class that was derived from another under the names of that one, by which diffusers finds classes."""
    kind.__name__, kind.__qualname__, kind.__module__ = base.__name__, base.__qualname__, base.__module__
    return kind
