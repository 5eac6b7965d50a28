"""TensorRT engines for the graphs of a plan, and what was refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.many import EngineBuilds, build_engines
from wanlab.errors import WanlabError
from wanlab.precision.graphs.built import built_formats
from wanlab.precision.graphs.record import PlanGraphs, read_plan_graphs

if TYPE_CHECKING:
    import pandas as pd

RECORD = "engines.json"
TARGETS = ("8.9", "12.0")
COLUMNS = [
    "component", "first_step", "last_step", "graph", "numbers", "capability", "built", "engine", "size_bytes",
    "build_ms", "layers", "layers_as_asked", "differing", "node", "operator", "reason",
]  # fmt: skip


def build_plan(
    folder: str | os.PathLike | PlanGraphs,
    targets: Sequence[str] = TARGETS,
    *,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Build every graph of a plan for every GPU that takes it; what is refused is a row, not an error.

    Each engine lies beside its graph; ranges of steps with one graph share one engine. The builder's own account of its
    layers is held against the plan (`built_formats`). The table is kept as `engines.json` in the folder.

    Args:
        folder: that `export_plan` wrote.
        targets: compute capabilities. TensorRT for RTX builds for them on any machine; TensorRT builds for the GPU of
            this one, whatever is given. FP8 needs 8.9 or more.
        progress: show bars.
        settings: as in `wanlab.convert.build_tensorrt`: profile (for graphs with free sizes), level, workspace_gib.

    Returns:
        One row per component, range of steps and GPU: component, first_step, last_step, graph, numbers, capability, built,
        engine (relative to the folder), size_bytes, build_ms (both of the engine for all its GPUs), layers, layers_as_asked
        (how many compute in the format of the plan), differing (the first that does not, and what it computes in), node,
        operator and reason of a refusal.

    Raises:
        WanlabError: no graphs, or such as were changed; TensorRT is not installed; as `build_tensorrt`, but for a
            builder that refuses.
    """
    import pandas as pd

    graphs = folder if isinstance(folder, PlanGraphs) else read_plan_graphs(folder)
    outcomes = {}
    for component in graphs.components:
        for graph in graphs.graphs_of(component):
            made = build_engines(
                [graphs.folder / graph], compute_capabilities=targets, progress=progress, **settings
            )
            outcomes[graph] = _outcome(graphs, graph, made)
    rows = [
        {"component": component, "first_step": first, "last_step": last, "graph": graph} | row
        for component, bands in graphs.bands.items()
        for first, last, graph in bands
        for row in outcomes[graph]
    ]
    (graphs.folder / f".{RECORD}.{os.getpid()}").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    os.replace(graphs.folder / f".{RECORD}.{os.getpid()}", graphs.folder / RECORD)
    return _frame(pd.DataFrame(rows, columns=COLUMNS))


def read_plan_builds(folder: str | os.PathLike) -> pd.DataFrame:
    """What `build_plan` kept in a folder.

    Raises:
        WanlabError: nothing was built there.
    """
    import pandas as pd

    path = Path(folder) / RECORD
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanlabError(
            f"no engines of a plan in {folder}; build them with wanlab.precision.build_plan"
        ) from error
    return _frame(pd.DataFrame(rows, columns=COLUMNS))


def _outcome(graphs: PlanGraphs, graph: str, made: EngineBuilds) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for receipt in made.receipts:
        layers = built_formats(receipt.path, graphs.folder / graph, graphs.formats[graph])
        off = layers[~layers["as_asked"]]
        first = next(off.itertuples(), None)
        rows += [
            {
                "numbers": receipt.numbers,
                "capability": capability,
                "built": True,
                "engine": Path(receipt.path).relative_to(graphs.folder).as_posix(),
                "size_bytes": receipt.size_bytes,
                "build_ms": receipt.time_ms,
                "layers": len(layers),
                "layers_as_asked": int(layers["as_asked"].sum()),
                "differing": ""
                if first is None
                else f"{first.layer} was asked in {first.asked}, computes in {first.built}",
            }
            for capability in receipt.compute_capabilities
        ]
    for refused in made.refused.to_dict("records"):
        rows.append({key: refused[key] for key in ("numbers", "capability", "node", "operator", "reason")})
        rows[-1] |= {"built": False}
    return rows


def _frame(rows: pd.DataFrame) -> pd.DataFrame:
    whole = ("first_step", "last_step", "size_bytes", "layers", "layers_as_asked")
    frame = rows.astype(dict.fromkeys(whole, "Int64"))
    words = ["engine", "differing", "node", "operator", "reason"]
    frame[words] = frame[words].astype(object).where(frame[words].notna(), "")
    return frame
