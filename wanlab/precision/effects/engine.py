"""Whether an engine that TensorRT built computes an expert by its plan, or fell back to floats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.card.layers import FLOATS
from wanlab.precision.effects.faults import Fault, raise_first
from wanlab.precision.formats import get_format
from wanlab.precision.graphs.built import built_formats
from wanlab.precision.plans.plan import is_float

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.graphs.record import PlanGraphs

REMEDY = "build it again from its own graph with precision.build_plan, for GPUs that multiply these codes"


def engine_effect_check(
    graphs: PlanGraphs, graph: str, engine: str | os.PathLike | None = None
) -> pd.DataFrame:
    """Fail where a builder computes in floats what a plan asked for in codes; no GPU is needed.

    Read is the builder's own account of its layers (`built_formats`). Layers that it does not name, and floats in another
    float, stand in the table and are no error: a builder may compute a small layer in the float of its neighbours.

    Args:
        graphs: from `export_plan`. graph: name of one of them, e.g. of `graphs.graphs_of(component)`.
        engine: built from it; None takes the one that `build_plan` put beside it.

    Returns:
        As `built_formats`.

    Raises:
        WanlabError: a layer in 8 bits or fewer that falls back to a float, or whose codes were folded to floats when the
            engine was built; as `built_formats`.
    """
    path = graphs.folder / graph
    engine = path.with_suffix(".engine") if engine is None else Path(engine)
    component = next(
        name for name, bands in graphs.bands.items() if any(each == graph for _, _, each in bands)
    )
    frame = built_formats(engine, path, graphs.formats[graph])
    faults = [
        Fault(component, row.layer, *_fault(row.asked, row.built))
        for row in frame[~frame["as_asked"]].itertuples()
        if not is_float(row.asked) and set(row.built.split("+")) <= set(FLOATS)
    ]
    raise_first(graphs.plan.name, faults, REMEDY)
    return frame


def _fault(asked: str, built: str) -> tuple[str, str]:
    if get_format(asked).activation is None:
        return "dequantised", f"keeps its weight in {built} in the engine, where the plan asks for {asked}"
    fallback = ": FP32 fallback" if built == "fp32" else ""
    return (
        "fp32" if fallback else "wrong",
        f"computes in {built} in the engine, where the plan asks for {asked}{fallback}",
    )
