"""A copy of a network's weights on the host, from which they can be brought back into their place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.models.device import synchronise
from wanlab.models.room import GIB, free_bytes

if TYPE_CHECKING:
    import torch

CHUNK_BYTES, ALIGNMENT_BYTES = 1 << 30, 512
RESERVE_BYTES = 2 << 30
"""Of host memory, left to other work beside a copy of an expert."""


@dataclass(frozen=True, eq=False)
class HostWeights:
    """Weights of a network on the host, beside the parameters that they belong to.

    Attributes:
        pairs: (parameter, its copy), one per parameter.
        lock_ms, fill_ms: to allocate the memory, and to copy the weights there.
    """

    pairs: list[tuple[torch.nn.Parameter, torch.Tensor]]
    lock_ms: float
    fill_ms: float

    def refill(self) -> None:
        """Copy the weights back into their place, on the current stream; from pinned memory without waiting."""
        for parameter, copy in self.pairs:
            parameter.data.copy_(copy, non_blocking=True)


@contextmanager
def host_weights(module: torch.nn.Module, *, pinned: bool) -> Iterator[HostWeights]:
    """A copy of a network's weights on the host, page-locked if wanted; its memory is given back with the block.

    Raises:
        WanlabError: the network has no weights of its own, or the memory cannot be had.
    """
    import torch

    parameters = list(module.parameters())
    if not parameters:
        raise WanlabError(
            f"{type(module).__name__} has no weights of its own; an engine keeps them to itself"
        )
    places, sizes = _places([parameter.nbytes for parameter in parameters])
    begin = time.perf_counter()
    try:
        chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:120]
        raise WanlabError(f"host memory cannot be had ({reason}); free some, or raise ulimit -l") from error
    locked = time.perf_counter()
    pairs = []
    for parameter, (chunk, start) in zip(parameters, places, strict=True):
        copy = chunks[chunk][start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        pairs.append((parameter, copy.copy_(parameter.data)))
    device = parameters[0].device
    synchronise(device)
    try:
        yield HostWeights(pairs, (locked - begin) * 1e3, (time.perf_counter() - locked) * 1e3)
    finally:
        synchronise(device)  # a copy may be under way
        pairs.clear()
        chunks.clear()
        del copy
        if pinned and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def _places(sizes: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Where arrays lie, as (chunk, start), and the bytes of each chunk.

    The allocator of pinned memory rounds every request up to a power of two: full chunks of one lose little.
    """
    most = max([CHUNK_BYTES, *sizes])
    places, chunks = [], [0]
    for size in sizes:
        room = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if chunks[-1] and chunks[-1] + room > most:
            chunks.append(0)
        places.append((len(chunks) - 1, chunks[-1]))
        chunks[-1] += room
    return places, chunks


def check_host_room(name: str, size_bytes: int) -> None:
    """Refuse a copy of weights that the host cannot hold.

    Raises:
        WanlabError: gives both figures.
    """
    import torch

    free = free_bytes(torch.device("cpu"))
    if size_bytes + RESERVE_BYTES > free:
        raise WanlabError(
            f"{name}: a copy of one expert on the host needs {(size_bytes + RESERVE_BYTES) / GIB:.1f} GiB with a reserve"
            f" of {RESERVE_BYTES / GIB:.0f}, {free / GIB:.1f} GiB are free; stop other work or take a larger host"
        )
