"""Before and after: what the same work costs on each engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanlab.runs.comparison.compare import Comparisons
from wanlab.runs.comparison.metrics import ratio

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.measure import PlatformRecord

NAMES = {
    "eager": "PyTorch, eager",
    "compiled": "PyTorch, compiled",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "tvm": "TVM",
}
FIGURES = ("time_per_frame_ms", "time_per_video_ms", "peak_memory_gib", "load_ms", "weights_gib")
MEASURED, BUILT = "measured", "built, not executed"


def engine_table(
    found: Comparisons, built: Sequence[PlatformRecord] = (), *, axis: str = "engine"
) -> pd.DataFrame:
    """One row per engine, everything else as in the baseline; engines that were built only are rows without figures.

    Args:
        found: from `compare`, with the original as its baseline.
        built: records of engines that no machine here could run, as `measure.read_platforms` reads them.
        axis: the parameter that names the engine.

    Returns:
        engine, state, then each figure with `<figure>_ratio` to the baseline (above 1 is better), note.
    """
    import pandas as pd

    base = found.baseline
    rows = []
    for row in found.rows:
        moved = [name for name in found.axes if row.parameters.get(name) != base.parameters.get(name)]
        if moved not in ([], [axis]):
            continue
        engine = str(row.parameters.get(axis, row.label))
        made: dict[str, Any] = {"engine": NAMES.get(engine, engine), "state": MEASURED}
        for name in FIGURES:
            value = row.results.get(name)
            made[name] = math.nan if value is None else value
            made[f"{name}_ratio"] = ratio(name, made[name], base.results.get(name))
        verdict = found.frame.loc[found.frame["configuration"] == row.label, "verdict"].iloc[0]
        rows.append(made | {"note": verdict})
    rows += _built(built)
    columns = [column for name in FIGURES for column in (name, f"{name}_ratio")]
    frame = pd.DataFrame(rows, columns=["engine", "state", *columns, "note"])
    empty = [name for name in FIGURES if frame[name].isna().all()]
    return frame.drop(columns=[column for name in empty for column in (name, f"{name}_ratio")])


def _built(records: Sequence[PlatformRecord]) -> list[dict[str, Any]]:
    """One row per engine, whatever it was built for."""
    groups: dict[str, list[PlatformRecord]] = {}
    for record in records:
        if record.state == "built only":
            groups.setdefault(record.engine, []).append(record)
    rows = []
    for engine, found in groups.items():
        parts = ", ".join(dict.fromkeys(record.component for record in found if record.component))
        where = ", ".join(dict.fromkeys(record.machine for record in found))
        took = sum({record.source: record.build_ms or 0.0 for record in found}.values())
        note = f"{parts or 'a network'} for {where}; built in {took / 1e3:,.0f} s, no such GPU here"
        rows.append({"engine": NAMES.get(engine, engine), "state": BUILT, "note": note})
    return rows
