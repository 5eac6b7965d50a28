"""Convolutions with channels last: weights of a copy in another layout, and a watch over the layouts that they run in."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanlab.techniques.around import Around

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Axes of a weight -> its layout with channels last."""

CONVOLUTIONS = (
    "convolution",
    "_convolution",
    "convolution_overrideable",
    "mkldnn_convolution",
    "cudnn_convolution",
)

WATCHED_CALLS = 2
"""Calls of a half of the VAE whose layouts are read in every generation: the first chunk of a clip, and one after it. The
others run without anything around them."""


def layout(weight: torch.Tensor) -> str:
    """`"last"`, `"first"`, or `"both"` where the two are the same in memory, as of kernels of one point."""
    last = weight.is_contiguous(memory_format=LAST[weight.ndim])
    return ("both" if weight.is_contiguous() else "last") if last else "first"


def convolutions(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The convolutions of a network over planes and volumes."""
    return [module for module in network.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)]


def to_channels_last(network: torch.nn.Module) -> int:
    """Give the convolutions of a network weights of their own with channels last; the bytes of those weights."""
    size_bytes = 0
    for module in convolutions(network):
        weight = module.weight.detach().contiguous(memory_format=LAST[module.weight.ndim])
        if weight.data_ptr() != module.weight.data_ptr():
            size_bytes += weight.nbytes
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return size_bytes


class Watched(Around):
    """A half of a VAE with a watch over its convolutions; attributes are those of the half.

    Attributes:
        calls: calls of the last generation.
        seen: layout of the weight that a convolution ran with -> how many did, in the calls that were watched.
        eager: calls of the last generation in which the half itself ran without the compiler.
    """

    def __init__(self, inner: torch.nn.Module, compiled: bool) -> None:
        super().__init__(inner)
        self.compiled = compiled
        if compiled:
            inner.register_forward_pre_hook(self._tell)
            inner.compile()
        self.forget()

    def _tell(self, module: torch.nn.Module, inputs: tuple) -> None:
        if not torch.compiler.is_compiling():  # in a graph this line is left out
            self.eager += 1

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls = self.eager = 0
        self.seen = dict.fromkeys(("last", "first", "both"), 0)

    def forward(self, *positional: Any, **named: Any) -> Any:
        self.calls += 1
        if self.compiled or self.calls > WATCHED_CALLS:
            return self.inner(*positional, **named)
        with _Layouts(self.seen):
            return self.inner(*positional, **named)


class _Layouts(TorchDispatchMode):
    """Counts the layouts of the weights that reach PyTorch's convolutions."""

    def __init__(self, seen: dict[str, int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in CONVOLUTIONS and args[1].ndim in LAST:
            self.seen[layout(args[1])] += 1
        return func(*args, **(kwargs or {}))
