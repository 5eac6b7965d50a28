"""From the histogram of a layer's input to the range that its codes cover."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from wanlab.precision.calibrations.observers import Histogram

METHODS = ("max", "percentile", "entropy")


@dataclass(frozen=True)
class Method:
    """How a range is chosen.

    Attributes:
        name: `"max"` (the largest magnitude seen), `"percentile"`, or `"entropy"` (the range whose codes lose least
            information, by the Kullback-Leibler divergence: S. Migacz, 8-bit Inference with TensorRT, GTC 2017).
        percentile: of the magnitudes that the range covers, with `"percentile"`.
        levels: codes of one sign, with `"entropy"`: 128 for INT8.
    """

    name: str = "max"
    percentile: float = 99.99
    levels: int = 128

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise WanlabError(
                f"no calibration method {self.name!r}{did_you_mean(self.name, METHODS)};"
                f" give {', '.join(METHODS)}"
            )
        if not 0 < self.percentile <= 100:
            raise WanlabError(f"percentile is {self.percentile}; give more than 0 and at most 100")

    def to_dict(self) -> dict[str, Any]:
        """Name and what it depends on, without what it does not."""
        uses = {"max": (), "percentile": ("percentile",), "entropy": ("levels",)}[self.name]
        return {key: value for key, value in asdict(self).items() if key == "name" or key in uses}

    def amax(self, histogram: Histogram) -> float:
        """The largest magnitude that the codes reach."""
        counts = histogram.counts.numpy()
        if self.name == "max" or not counts.sum():
            return histogram.amax
        if self.name == "percentile":
            found = _percentile(counts, self.percentile) * histogram.bin_width
        else:
            pairs = counts.reshape(-1, 2).sum(axis=1)  # half the bins, a quarter of the time
            found = _entropy(pairs, self.levels) * 2 * histogram.bin_width
        return min(found, histogram.amax)


def _percentile(counts: np.ndarray, percentile: float) -> float:
    """Bins below which `percentile` of the counts lie, spread evenly inside a bin."""
    import numpy as np

    total = np.cumsum(counts)
    wanted = total[-1] * percentile / 100
    index = int(np.searchsorted(total, wanted))
    below = total[index - 1] if index else 0
    return index + float(wanted - below) / max(int(counts[index]), 1)


def _entropy(counts: np.ndarray, levels: int) -> float:
    """Bins up to which the range goes.

    For every range P is the histogram with all that lies outside put on its last bin, and Q what is left of P's
    inside when it is said in `levels` codes: each code's counts spread over those of its bins that are not empty.
    The range with the smallest KL(P || Q) is taken.
    """
    import numpy as np

    last = int(np.flatnonzero(counts)[-1]) + 1
    if last <= levels:
        return float(last)
    sums = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    best, best_loss = last, np.inf
    for bins in range(levels, last + 1):
        inside = counts[:bins].astype(np.float64)
        target = inside.copy()
        target[-1] += sums[-1] - sums[bins]
        edges = np.arange(levels + 1) * bins // levels
        per_code = np.diff(sums[edges]) / np.maximum(np.diff(filled[edges]), 1)
        spread = np.repeat(per_code, np.diff(edges)) * (inside > 0)
        loss = _divergence(target, spread)
        if loss < best_loss:
            best, best_loss = bins, loss
    return float(best)


def _divergence(target: np.ndarray, other: np.ndarray) -> float:
    """KL(P || Q) of two histograms; where only Q is empty it counts as one in a million."""
    import numpy as np

    p, q = target / target.sum(), other / max(other.sum(), 1e-30)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], 1e-6 / len(p)))))
