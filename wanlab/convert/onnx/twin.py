"""A network without its weights: what is traced, in any dtype, at any size."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weightless(network: torch.nn.Module, dtype: torch.dtype):
    """A twin of `network` in `dtype` whose parameters and buffers have sizes but no memory.

    The twin lies on the CPU as far as tracing is concerned, wherever the network is. Modules that the library
    keeps in float32 stay in float32 (`wanlab.models.networks.stored_dtype`), so the twin is what loading in
    `dtype` would give.

    Returns:
        The twin, and the `FakeTensorMode` that its tensors belong to: inputs must be of the same mode.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from wanlab.models.networks import stored_dtype

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, object] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        weight = isinstance(tensor, torch.nn.Parameter)
        kind = stored_dtype(network, name, dtype) if weight and tensor.is_floating_point() else tensor.dtype
        with mode:
            empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
        twins[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if weight else empty
    # A copy takes what it finds under an object's id: every tensor is replaced, none is copied.
    return copy.deepcopy(network, twins), mode
