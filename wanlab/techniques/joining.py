"""Linear layers of one input joined into one, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_scaled_mm", "_int_mm")


def joined(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The rows of some parameters in one tensor, of which they become views: afterwards they take no memory of their own.

    Their values stay bit for bit. Parameters that are views of one tensor already are not copied again.
    """
    whole = _one_after_another(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])
        start = 0
        for part in parts:
            part.data = whole[start : start + len(part)]
            start += len(part)
    return whole


def _one_after_another(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over parts that lie one after another in one storage; None where they do not."""
    first = parts[0].detach()
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != storage
            or part.storage_offset() != place
            or not part.is_contiguous()
            or part.dtype != first.dtype
        ):
            return None
        place += part.numel()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def joined_linear(layers: Sequence[torch.nn.Linear]) -> torch.nn.Linear:
    """One linear layer whose outputs are those of some, one after another; their parameters become views of its own."""
    weight = joined([layer.weight for layer in layers])
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(joined([layer.bias for layer in layers]), requires_grad=False)
    return linear.train(layers[0].training)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_products() -> Iterator[_Products]:
    """Inside the block `count` goes up with every product of matrices that PyTorch computes."""
    with torch.no_grad(), _Products() as mode:
        yield mode
