"""Observes a pipeline's calls of its components, through proxies in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from wanlab.models.spec import ENCODERS


class CallProxy:
    """Stands in for an object, and wraps some of its methods.

    `isinstance` sees the original's class; attributes are read from and written to the original.
    """

    def __init__(self, original, calls: dict[str, Callable]) -> None:
        # With the signature of the original, which diffusers looks at before it gives a scheduler `sigmas`.
        measured = {
            name: wraps(method)(wrap(method))
            for name, wrap in calls.items()
            if (method := getattr(original, name))
        }
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


class BlockTap(torch.nn.Module):
    """Takes the place of a network's blocks: records what they are called with, and returns a fixed output.

    Attributes:
        inputs: of the last call.
        answer: what a call returns; None returns the first input.
    """

    def __init__(self, answer: torch.Tensor | None = None) -> None:
        super().__init__()
        self.inputs: tuple[Any, ...] = ()
        self.answer = answer

    def forward(self, state: torch.Tensor, *others: Any) -> torch.Tensor:
        self.inputs = (state, *others)
        return state if self.answer is None else self.answer


def component_calls(pipeline) -> dict[str, dict[str, str]]:
    """Pipeline attribute -> {method: component}, for the components that the pipeline has.

    A single transformer is `expert`; of two, `transformer` is `expert_high` and `transformer_2` is `expert_low`. Encoders of
    texts and pictures have the names of their attributes.
    """
    has = {name for name, value in getattr(pipeline, "__dict__", {}).items() if value is not None}
    two = {"transformer", "transformer_2"} <= has
    high, low = ("expert_high", "expert_low") if two else ("expert", "expert")
    points = {name: {"__call__": name} for name in ENCODERS}
    points |= {
        "transformer": {"__call__": high},
        "transformer_2": {"__call__": low},
        "unet": {"__call__": "expert"},
        "vae": {"encode": "vae_encoder", "decode": "vae_decoder"},
    }
    return {name: methods for name, methods in points.items() if name in has}


@contextmanager
def intercept_calls(pipeline, calls: dict[str, dict[str, Callable]]) -> Iterator[None]:
    """Inside the block the pipeline's attributes are proxies whose methods are wrapped.

    The components themselves are not changed (compiled modules stay compiled).

    Args:
        calls: attribute -> {method: function that wraps it}, as for `CallProxy`.
    """
    attributes = vars(pipeline)
    with ExitStack() as stack:
        for name, wrappers in calls.items():
            original = attributes[name]
            stack.callback(attributes.__setitem__, name, original)
            # Bypasses the pipeline's own __setattr__, which would write the proxy to its config.
            attributes[name] = CallProxy(original, wrappers)
        yield
