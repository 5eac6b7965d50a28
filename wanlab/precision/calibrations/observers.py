"""What layers are given, summed up while it passes: largest magnitudes and histograms."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch

BINS = 4096
SMALLEST_EXPONENT = -126
_CHUNK = 2**24  # elements in float32 at a time


@dataclass(eq=False)
class Histogram:
    """Counts of magnitudes in equal bins from 0 to `2**exponent`.

    The range is always a power of two, and grows by adding neighbouring bins, so that counts are exact and do not
    depend on the order in which tensors came.

    Attributes:
        counts: int64 `[BINS]`, on the CPU.
        exponent: the smallest for which all magnitudes lie below `2**exponent`.
        amax: largest magnitude.
    """

    counts: torch.Tensor
    exponent: int
    amax: float

    @classmethod
    def empty(cls) -> Histogram:
        import torch

        return cls(torch.zeros(BINS, dtype=torch.int64), SMALLEST_EXPONENT, 0.0)

    @property
    def bin_width(self) -> float:
        return 2.0**self.exponent / BINS

    def add(self, other: Histogram) -> None:
        """Count what the other counted."""
        exponent = max(self.exponent, other.exponent)
        self.counts = _widened(self, exponent) + _widened(other, exponent)
        self.exponent, self.amax = exponent, max(self.amax, other.amax)


def histogram_of(tensor: torch.Tensor, elements: int = 2**22) -> Histogram:
    """Histogram of the magnitudes of a tensor, on its device.

    Args:
        elements: count at most about this many, evenly spread; the largest magnitude is of all.

    Raises:
        ValueError: a value is not finite.
    """
    import torch

    flat = tensor.detach().flatten()
    if not flat.numel():
        return Histogram.empty()
    low, high = torch.aminmax(flat)
    amax = max(-float(low), float(high))
    if not math.isfinite(amax):
        raise ValueError("values are not finite")
    exponent = max(math.frexp(amax)[1], SMALLEST_EXPONENT) if amax else SMALLEST_EXPONENT
    step = max(1, flat.numel() // elements)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:
        step += 1  # or the same channels would be seen again and again
    counts = torch.zeros(BINS, dtype=torch.int64)
    for piece in flat[::step].split(_CHUNK):
        magnitudes = piece.float().abs()
        # histc counts in float32 and is exact up to 2**24, which is the size of a piece.
        counts += torch.histc(magnitudes, BINS, min=0.0, max=2.0**exponent).to(torch.int64).cpu()
    return Histogram(counts, exponent, amax)


class Observer:
    """Histograms of the inputs of layers, and the largest magnitude of every call.

    Attributes:
        histograms: layer -> histogram of its input over all calls so far.
        call_amax: layer -> largest magnitude of its input in each call.
    """

    def __init__(self, network: torch.nn.Module, layers: Sequence[str], *, elements: int = 2**22) -> None:
        self.histograms = {layer: Histogram.empty() for layer in layers}
        self.call_amax: dict[str, list[float]] = {layer: [] for layer in layers}
        self._network = network
        self._elements = elements
        self._seen: dict[int, tuple[weakref.ref, int, Histogram]] = {}
        self._now: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Inside the block each forward of the network counts as one call, to be ended by `end_call`."""
        handles = [
            self._network.get_submodule(layer).register_forward_pre_hook(self._hook(layer))
            for layer in self.histograms
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def end_call(self) -> None:
        """One call of the network is over.

        Raises:
            WanlabError: a layer was not run.
        """
        idle = [layer for layer in self.histograms if layer not in self._now]
        if idle:
            raise WanlabError(f"{idle[0]} is not run by this component; leave it out of the layers")
        for layer, amax in self._now.items():
            self.call_amax[layer].append(amax)
        self._now, self._seen = {}, {}

    def _hook(self, layer: str):
        def look(module, args) -> None:
            try:
                histogram = self._of(args[0])
            except ValueError as error:
                raise WanlabError(
                    f"the input of {layer} is not finite; nothing can be calibrated on it"
                ) from error
            self.histograms[layer].add(histogram)
            self._now[layer] = max(self._now.get(layer, 0.0), histogram.amax)

        return look

    def _of(self, tensor: torch.Tensor) -> Histogram:
        """The histogram of a tensor; queries, keys and values read the same one, which is counted once."""
        found = self._seen.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == _version(tensor):
            return found[2]
        histogram = histogram_of(tensor, self._elements)
        self._seen[id(tensor)] = (weakref.ref(tensor), _version(tensor), histogram)
        return histogram


def _version(tensor: torch.Tensor) -> int:
    """Changes when a tensor is written to; of inference tensors nothing is known."""
    return -1 if tensor.is_inference() else tensor._version


def _widened(histogram: Histogram, exponent: int) -> torch.Tensor:
    """The counts over a range of `2**exponent`."""
    import torch

    doublings = min(exponent - histogram.exponent, int(math.log2(BINS)))
    if not doublings:
        return histogram.counts
    sums = histogram.counts.view(-1, 2**doublings).sum(dim=1)
    return torch.cat([sums, torch.zeros(BINS - len(sums), dtype=torch.int64)])
