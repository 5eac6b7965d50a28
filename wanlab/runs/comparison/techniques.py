"""What each technique bought alone and combined, beside the product of what they bought alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.runs.comparison.compare import Comparisons
from wanlab.runs.comparison.configurations import Configuration, shown
from wanlab.runs.comparison.frontier import NO_EFFECT
from wanlab.runs.comparison.metrics import TIMED

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

COLUMNS = (
    "techniques", "moved", "speedup", "low", "high", "product", "product_low", "product_high", "of_product", "of_low",
    "of_high", "noise_percent", "verdict",
)  # fmt: skip
MULTIPLY = "gains multiply"
RESAMPLES = 4_000


def technique_matrix(found: Comparisons, *, seed: int = 0) -> pd.DataFrame:
    """Techniques alone and combined.

    A technique is a parameter moved off its value in the baseline, e.g. `engine=onnxruntime`; one that had no effect is left
    out. Intervals are percentile bootstraps (95 %) over all samples of all configurations involved at once, so that the
    baseline, which stands in every ratio, is drawn once.

    Args:
        found: from `compare`, by a time with samples.

    Returns:
        One row per configuration but the baseline, fewest techniques first: techniques (joined by " + "), moved (how many),
        speedup, low, high; and where each of its techniques was measured alone too: product of their speed-ups, with
        product_low and product_high; of_product (measured over product, 1 where gains multiply), with of_low and of_high;
        noise_percent (of all of them); verdict, which says what became of the product.

    Raises:
        WanlabError: compared by something without samples, or nothing was moved.
    """
    import numpy as np
    import pandas as pd

    if found.by.rpartition(".")[2] not in TIMED:
        raise WanlabError(f"a technique matrix is of times; compare by {TIMED[0]}, not by {found.by}")
    base, moved = found.baseline, {}
    for row in found.rows[1:]:
        applied = row.samples is not None and row.results.get("effect") != NO_EFFECT
        if applied and (names := _moved(row, base, found.axes)):
            moved.setdefault(names, row)
    if not moved or base.samples is None:
        raise WanlabError(
            f"no technique beside the baseline {base.label}: no other configuration with samples"
        )
    generator = np.random.default_rng(seed)
    drawn = {id(row): _medians(row, generator) for row in (base, *moved.values())}
    rows = []
    for names, row in sorted(moved.items(), key=lambda item: (len(item[0]), item[1].results[found.by])):
        gain = _Ratio(base.samples.median / row.samples.median, drawn[id(base)] / drawn[id(row)])
        alone = [moved.get((name,)) for name in names]
        made = {"techniques": " + ".join(names), "moved": len(names), **gain.named("speedup", "low", "high")}
        if len(names) > 1 and all(alone):
            gains = [
                _Ratio(base.samples.median / one.samples.median, drawn[id(base)] / drawn[id(one)])
                for one in alone
            ]
            product = math.prod(gains[1:], start=gains[0])
            part = gain / product
            noise = found.noise_percent(row, *alone)
            made |= product.named("product", "product_low", "product_high")
            made |= part.named("of_product", "of_low", "of_high")
            made |= {"noise_percent": noise, "verdict": _verdict(part, noise) + _simulated(names, alone)}
        rows.append(made)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.assign(verdict=frame["verdict"].astype(object).where(frame["verdict"].notna(), ""))


def told(matrix: pd.DataFrame) -> str:
    """The matrix in two sentences: the best technique alone, and the best combination beside its product."""
    said = []
    for moved, word in ((matrix["moved"] == 1, "alone"), (matrix["moved"] > 1, "combined")):
        if not moved.any():
            continue
        best = matrix[moved].sort_values("speedup", ascending=False).iloc[0]
        span = f"{best['speedup']:.2f}x ({best['low']:.2f} to {best['high']:.2f})"
        said.append(f"Best {word}: {best['techniques']}, {span}")
        if best["product"] == best["product"]:
            said[-1] += f", beside a product of {best['product']:.2f}x: {best['verdict']}"
        said[-1] += "."
    return " ".join(said)


class _Ratio:
    """A ratio with its bootstrap distribution."""

    def __init__(self, value: float, drawn: np.ndarray) -> None:
        self.value, self.drawn = value, drawn

    def __mul__(self, other: _Ratio) -> _Ratio:
        return _Ratio(self.value * other.value, self.drawn * other.drawn)

    def __truediv__(self, other: _Ratio) -> _Ratio:
        return _Ratio(self.value / other.value, self.drawn / other.drawn)

    def ends(self) -> tuple[float, float]:
        import numpy as np

        low, high = np.percentile(self.drawn, [2.5, 97.5])
        return min(float(low), self.value), max(float(high), self.value)

    def named(self, *names: str) -> dict[str, float]:
        return dict(zip(names, (self.value, *self.ends()), strict=True))


def _moved(row: Configuration, base: Configuration, axes) -> tuple[str, ...]:
    return tuple(
        f"{axis}={shown(row.parameters.get(axis))}"
        for axis in axes
        if row.parameters.get(axis) != base.parameters.get(axis)
    )


def _medians(row: Configuration, generator: np.random.Generator) -> np.ndarray:
    import numpy as np

    values = np.asarray(row.samples.values_ms)
    return np.median(values[generator.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)


def _simulated(names: tuple[str, ...], alone) -> str:
    """Of a technique that was only simulated alone the gain is not known, nor is the product."""
    only = [
        name for name, one in zip(names, alone, strict=True) if "simulated" in str(one.results.get("kernels"))
    ]
    return f" ({', '.join(only)} alone is simulated, so its own gain is not known)" if only else ""


def _verdict(part: _Ratio, noise_percent: float) -> str:
    low, high = part.ends()
    off = 100 * (part.value - 1)
    if low <= 1 <= high or max(part.value, 1 / part.value) - 1 <= noise_percent / 100:
        return f"{MULTIPLY} within noise"
    if off < 0:
        return f"gains do not multiply: {-off:.0f} % less than their product"
    return f"more than multiply: {off:.0f} % over their product"
