"""What trtexec measured: times per layer and times of whole runs."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wanlab.convert.card.files import read_json
from wanlab.convert.card.layers import EngineLayers
from wanlab.errors import WanlabError


def with_times(layers: EngineLayers, profile: str | os.PathLike | list) -> EngineLayers:
    """The layers with the times that `trtexec --exportProfile` wrote, joined by the layers' names.

    Args:
        profile: a file or its content: `[{"count": n}, {"name", "timeMs", "averageMs", "medianMs", ...}, ...]`. The
            median is taken; without one the average, or the total over all runs divided by their number.

    Raises:
        WanlabError: no such JSON, or no layer of it is in the engine.
    """
    data = profile if isinstance(profile, list) else read_json(profile)
    if not isinstance(data, list) or not all(isinstance(row, Mapping) for row in data):
        raise WanlabError("a profile is a list of objects, as trtexec --exportProfile writes it")
    runs = next((int(row["count"]) for row in data if "count" in row), 0)
    times = {str(row["name"]): _time(row, runs) for row in data if "name" in row}
    there = {layer.name for layer in layers.layers}
    matched = there & set(times)
    if not matched:
        raise WanlabError(
            f"no layer of {layers.name} is in the profile; give the profile of the same engine"
            " (trtexec --exportLayerInfo and --exportProfile of one run)"
        )
    notes = list(layers.notes)
    if len(there) > len(matched):
        notes.append(f"{len(there) - len(matched)} of {len(there)} layers have no time")
    lost = [name for name in times if name not in there]
    if lost:
        lost_ms = sum(times[name] for name in lost)
        notes.append(f"{len(lost)} timed layers, {lost_ms:.3f} ms, are not in the engine")
    return replace(
        layers,
        layers=tuple(replace(layer, time_ms=times.get(layer.name, math.nan)) for layer in layers.layers),
        facts=layers.facts | ({"runs": runs} if runs else {}),
        notes=tuple(notes),
    )


def read_latency(path: str | os.PathLike) -> float:
    """Median time of a whole run in ms, without transfers, from a file.

    Args:
        path: JSON of `trtexec --exportTimes` or of `wanlab bench`.

    Raises:
        WanlabError: neither of the two.
    """
    return latency_of(read_json(path), str(path))


def latency_of(data: Any, name: str) -> float:
    """`read_latency` of a file's content."""
    if (
        isinstance(data, list)
        and data
        and all(isinstance(row, Mapping) and "computeMs" in row for row in data)
    ):
        return float(statistics.median(float(row["computeMs"]) for row in data))
    if isinstance(data, Mapping) and isinstance(data.get("samples"), Mapping):
        samples = data["samples"].get("device") or data["samples"].get("latency")
        values = samples.get("values_ms") if isinstance(samples, Mapping) else samples
        if values:
            return float(statistics.median(values))
    raise WanlabError(f"{name} has no times of runs; give what trtexec --exportTimes or wanlab bench wrote")


def _time(row: Mapping, runs: int) -> float:
    for key in ("medianMs", "averageMs"):
        if key in row:
            return float(row[key])
    return float(row["timeMs"]) / runs if "timeMs" in row and runs else math.nan
