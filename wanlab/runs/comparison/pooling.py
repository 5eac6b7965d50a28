"""Repeats of one configuration as one: values, samples, and what they say about noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.runs.comparison.metrics import TIMED, known

if TYPE_CHECKING:
    from wanlab.measure import Samples
    from wanlab.runs.store import RunRecord


def middle(values: Sequence[Any]) -> Any:
    """One value for those of several repeats."""
    if len(values) == 1 or all(value == values[0] for value in values):
        return values[0]
    if all(known(value) for value in values):
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return ", ".join(dict.fromkeys(str(value) for value in values))


def pooled_samples(label: str, group: Sequence[RunRecord]) -> Samples | None:
    """All repeats' samples as one timing; what cannot be read as samples is none."""
    from wanlab.measure import Samples

    values: list[float] = []
    device = ""
    for run in group:
        found = run.metrics.get("samples")
        if isinstance(found, Mapping) and isinstance(found.get("values_ms"), list):
            values += found["values_ms"]
            device = device or str(found.get("device") or "")
    try:
        return Samples(label, tuple(values), device) if values else None
    except (WanlabError, TypeError, ValueError):
        return None


def noise_percent(each: Iterable[Mapping[str, Any]]) -> float | None:
    """A/A noise of one run; of several at least how far their times are apart, which no control within a run shows."""
    each = list(each)
    controls = [v["noise_percent"] for v in each if known(v.get("noise_percent"))]
    times = [v[TIMED[0]] for v in each if known(v.get(TIMED[0])) and v[TIMED[0]] > 0]
    noise = sorted(controls)[len(controls) // 2] if controls else None
    if len(times) < 2:
        return noise
    return max(noise or 0.0, 100 * (max(times) / min(times) - 1))
