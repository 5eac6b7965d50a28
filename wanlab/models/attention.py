"""Another exact attention kernel: the same mathematics with other rounding, the floor of every divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def other_attention(device: torch.device) -> Iterator[str]:
    """Inside the block PyTorch's scaled dot product attention takes a kernel that is not its first choice.

    On a GPU that is the memory-efficient kernel (flash attention is the first choice), on a CPU the plain
    product, softmax, product. Engines outside PyTorch are not touched.

    Yields:
        Name of the kernel.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The plain form would hold tokens x tokens numbers per head: tens of GiB for a real clip on a GPU. There it only
    # stands in where the other cannot: for a text encoder's bias, whose rows may not be aligned.
    backends = [SDPBackend.EFFICIENT_ATTENTION] * (device.type == "cuda") + [SDPBackend.MATH]
    with sdpa_kernel(backends):
        yield backends[0].name.lower()
