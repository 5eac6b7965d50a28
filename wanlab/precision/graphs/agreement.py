"""One plan, applied in PyTorch, ONNX Runtime and TensorRT: how far the three are apart, against the plan's own error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from wanlab.convert.components import recipe
from wanlab.convert.tensorrt.runtime import installed
from wanlab.errors import WanlabError
from wanlab.precision.applied.apply import Applied, apply_plan
from wanlab.precision.graphs.build import TARGETS, build_plan
from wanlab.precision.graphs.compare import (
    Inputs,
    Key,
    Outputs,
    chosen_inputs,
    distance,
    planned_outputs,
    reference_outputs,
)
from wanlab.precision.graphs.engines import load_plan_engines
from wanlab.precision.graphs.export import export_plan
from wanlab.precision.graphs.layers import AGREES_BELOW, ROUNDING, layer_distances
from wanlab.precision.graphs.record import PlanGraphs
from wanlab.precision.plans.plan import Plan, check_steps, is_float, make_plan

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from wanlab.precision.calibrations.calibration import Calibration
    from wanlab.precision.calibrations.recording import Recording

COLUMNS = [
    "component", "first_step", "last_step", "application", "executed", "calls", "relative_l2", "to_pytorch",
    "format_error", "floor", "agrees", "layers", "layers_as_asked", "layer_share_percent", "note",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Compared:
    """What every application is held against."""

    inputs: Inputs
    reference: Outputs
    pytorch: Outputs
    model: Any
    planned: Applied
    floor: dict[Key, float]


def agreement(
    model,
    plan: Plan | str | os.PathLike,
    folder: str | os.PathLike,
    recording: Recording,
    calibrations: Mapping[str, Calibration] | None = None,
    *,
    calls: int = 4,
    nudges: int = 4,
    provider: str = "auto",
    kernels: str = "auto",
    targets: Sequence[str] | None = TARGETS,
    level: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Apply a plan three ways and compare the outputs of every expert on recorded inputs, range of steps by range.

    The reference is the network in float32, unquantised. The error of the plan is that of its PyTorch application.

    Rounding to codes is no smooth function: a value between two codes falls to either side by the last bit of a sum, and a
    network carries the step on. So two applications that mean the same drift apart end to end. How far, is the floor:
    PyTorch's application against itself, every layer's input off by as much as another kernel's rounding (3e-7 of it in
    float32, half a unit in the last place in coarser dtypes), call by call the two runs that are farthest apart; at least
    twice what the unquantised network in the plan's default dtype is off by. One layer on one input does not drift
    (`layer_distances`). Therefore:

    - ONNX Runtime agrees when every layer compared is within a quarter of its format's error of PyTorch's on the same
      input, and the whole network's error is that of PyTorch's application to within a quarter.
    - TensorRT, run where a GPU can run what was built, agrees when the network is within a quarter of the plan's error of
      PyTorch's, or within the floor, and its error is that of PyTorch's to within a quarter. Elsewhere its row says that
      it was not executed, and holds the builder's own account of its layers against the plan instead; `agrees` stays
      empty, as nothing was compared.

    Args:
        model: from `wanlab.models.load`, the experts eager.
        plan: or a preset's name, or a file.
        folder: for the graphs and engines; reused while true.
        recording: of the same model, and of generations with the plan's number of steps where it names steps.
        calibrations: component -> `Calibration`; the same ranges for all three.
        calls: of every range of steps, evenly spread over those recorded.
        nudges: disturbances per call, for the floor.
        provider: of ONNX Runtime. kernels: of PyTorch, as in `apply_plan`.
        targets: compute capabilities to build for; None leaves TensorRT out.
        level: builder optimisation level, as in `build_tensorrt`.
        progress: show bars.
        settings: of `export_plan`; sizes that are not given are those of the recording.

    Returns:
        One row per component, range of steps and application (`"pytorch"`, `"onnxruntime-cpu"`, `"tensorrt-rtx"`):
        component, first_step, last_step, application, executed, calls, relative_l2 (||a - r|| / ||r|| over all calls, r
        the reference), to_pytorch (||a - p|| / ||r||, p of PyTorch), format_error (relative_l2 of PyTorch), floor, agrees
        (None where nothing was compared), layers and layers_as_asked (ONNX Runtime: compared one by one, and those that
        agree; TensorRT: of the engine, and those built in the plan's format), layer_share_percent (of a layer's own error
        that it is away from PyTorch, the largest of quantised layers), note.

    Raises:
        WanlabError: as `export_plan` and `apply_plan`; nothing recorded of an expert in one of its ranges of steps.
    """
    clip = {name: recording.settings.get(name) for name in ("height", "width", "frames")}
    graphs = export_plan(model, plan, folder, calibrations, progress=progress, **clip | settings)
    if graphs.changes_with_step:
        check_steps(graphs.plan, recording.settings["steps"])
    inputs = chosen_inputs(graphs, recording, calls)
    reference = reference_outputs(model, inputs)
    unquantised = make_plan("unquantised", graphs.facts["settings"]["default"])
    rounded = planned_outputs(apply_plan(model, unquantised), inputs)
    planned = apply_plan(model, graphs.plan, calibrations, kernels=kernels)
    pytorch = planned_outputs(planned, inputs)
    again = [planned_outputs(planned, inputs, nudged=seed) for seed in range(nudges)]
    floor = {
        key: max(
            ROUNDING,
            2 * distance(rounded[key], reference[key], reference[key]),
            _spread([pytorch[key], *(made[key] for made in again)], reference[key]),
        )
        for key in inputs
    }
    compared = _Compared(inputs, reference, pytorch, model, planned, floor)
    rows = [row | {"agrees": None, "note": planned.kernels} for row in _rows("pytorch", pytorch, compared)]
    del again, rounded
    rows += _engines(graphs, "onnxruntime", provider, compared)
    if targets is not None:
        rows += _tensorrt(graphs, targets, level, progress, compared)
    return _frame(rows, graphs)


def _spread(runs: Sequence[Sequence[torch.Tensor]], reference: Sequence[torch.Tensor]) -> float:
    """Distance over all calls between the two runs that are farthest apart, call by call."""
    pairs = [
        max(combinations(outputs, 2), key=lambda pair: float((pair[0] - pair[1]).norm()))
        for outputs in zip(*runs, strict=True)
        if len(outputs) > 1
    ]
    return distance(*zip(*pairs, strict=True), reference) if pairs else 0.0


def _engines(
    graphs: PlanGraphs, application: str, provider: str, compared: _Compared
) -> list[dict[str, Any]]:
    """Rows of engines, one graph in memory at a time; an engine that cannot be had here is a row that says why."""
    rows: list[dict[str, Any]] = []
    for component in graphs.components:
        mine = {key: given for key, given in compared.inputs.items() if key[0] == component}
        try:
            engine = load_plan_engines(graphs, provider, components=(component,), resident=False)[component]
            made = {key: [_ran(engine, feeds, step) for step, feeds in given] for key, given in mine.items()}
        except WanlabError as error:
            rows += [_row(key, application, False) | {"note": f"not executed: {error}"} for key in mine]
            continue
        name = engine.name
        del engine
        for row in _rows(name, made, compared):
            rows.append(
                row if application == "tensorrt" else row | _layerwise(graphs, row, provider, compared)
            )
    return rows


def _layerwise(graphs: PlanGraphs, row: dict[str, Any], provider: str, compared: _Compared) -> dict[str, Any]:
    """The layers of a graph one by one, on the first call of its range of steps."""
    key: Key = row["component"], (row["first_step"], row["last_step"])
    graph = next(graph for first, last, graph in graphs.bands[key[0]] if (first, last) == key[1])
    step, feeds = compared.inputs[key][0]
    try:
        with compared.planned.at(step or 0):
            layers = layer_distances(
                graphs.folder / graph,
                recipe(compared.planned.model, key[0]).network,
                recipe(compared.model, key[0]).network,
                feeds,
                graphs.formats[graph],
                provider,
            )
    except WanlabError as error:  # with layers' outputs among its own, a graph is fused otherwise
        return {"note": f"layers not compared one by one: {error}"}
    near = layers["to_pytorch"] <= layers["allowed"]
    codes = layers[~layers["format"].map(is_float)]
    found: dict[str, Any] = {"layers": len(layers), "layers_as_asked": int(near.sum())}
    found["agrees"] = bool(near.all()) and row["same_error"]
    if len(codes):
        found["layer_share_percent"] = float(100 * (codes["to_pytorch"] / codes["format_error"]).max())
    if not near.all():
        one = layers[~near].iloc[0]
        found["note"] = (
            f"{one['layer']} ({one['format']}) is {one['to_pytorch']:.1e} from PyTorch on the same input, allowed is"
            f" {one['allowed']:.1e}"
        )
    return found


def _ran(engine, feeds: Mapping[str, torch.Tensor], step: int | None) -> torch.Tensor:
    with engine.at(step) if hasattr(engine, "at") else nullcontext():
        return next(iter(engine.run(feeds).values())).detach().float().cpu()


def _tensorrt(
    graphs: PlanGraphs, targets, level, progress: bool, compared: _Compared
) -> list[dict[str, Any]]:
    import torch

    if not (installed("tensorrt") or installed("tensorrt-rtx")):
        note = 'not built: there is no TensorRT here; add it with pip install "wanlab[rtx]"'
        return [_row(key, "tensorrt", False) | {"note": note} for key in compared.inputs]
    built = build_plan(graphs, targets, level=level, progress=progress)
    ran: dict[Key, dict[str, Any]] = {}
    if torch.cuda.is_available():
        found = _engines(graphs, "tensorrt", "tensorrt", compared)
        ran = {(row["component"], (row["first_step"], row["last_step"])): row for row in found}
    return [_built_row(key, group, ran.get(key)) for key, group in _by_band(built)]


def _by_band(built: pd.DataFrame):
    import pandas as pd

    names = ["component", "first_step", "last_step"]
    for (component, first, last), group in built.groupby(names, sort=False, dropna=False):
        yield (component, (None, None) if pd.isna(first) else (int(first), int(last))), group


def _built_row(key: Key, group: pd.DataFrame, ran: dict[str, Any] | None) -> dict[str, Any]:
    """What was built, and what came of it where a GPU could run it."""
    made, refused = group[group["built"]], group[~group["built"]]
    row = dict(ran) if ran is not None else _row(key, "tensorrt", False)
    said = [row.pop("note")] if row.get("note") else []
    if len(made):
        one = made.iloc[0]
        row |= {"layers": one["layers"], "layers_as_asked": one["layers_as_asked"]}
        where = f"built for SM {', '.join(made['capability'])}"
        said = [where if row["executed"] else f"{where}, not executed", *said, one["differing"]]
    said += [
        f"SM {one.capability} refused: {one.node} ({one.operator}): {one.reason}"
        for one in refused.itertuples()
    ]
    return row | {"note": "; ".join(text.removeprefix("not executed: ") for text in said if text)}


def _rows(application: str, made: Outputs, compared: _Compared) -> list[dict[str, Any]]:
    rows = []
    for key, outputs in made.items():
        reference, pytorch, floor = compared.reference[key], compared.pytorch[key], compared.floor[key]
        own, error = distance(outputs, reference, reference), distance(pytorch, reference, reference)
        apart = distance(outputs, pytorch, reference)
        same_error = abs(own - error) <= max(AGREES_BELOW * error, ROUNDING)
        # Without a format's error two roundings are compared, not a plan's.
        same_error = same_error or max(own, error) <= floor
        rows.append(
            _row(key, application, True)
            | {
                "calls": len(outputs),
                "relative_l2": own,
                "to_pytorch": apart,
                "format_error": error,
                "floor": floor,
                "same_error": same_error,
                "agrees": apart <= max(AGREES_BELOW * error, floor) and same_error,
            }
        )
    return rows


def _row(key: Key, application: str, executed: bool) -> dict[str, Any]:
    component, (first, last) = key
    return {
        "component": component, "first_step": first, "last_step": last, "application": application,
        "executed": executed,
    }  # fmt: skip


def _frame(rows: list[dict[str, Any]], graphs: PlanGraphs) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=COLUMNS)
    whole = ("first_step", "last_step", "calls", "layers", "layers_as_asked")
    frame = frame.astype(dict.fromkeys(whole, "Int64") | {"agrees": "boolean"})
    frame["note"] = frame["note"].astype(object).where(frame["note"].notna(), "")
    order = {name: place for place, name in enumerate(graphs.components)}
    frame = frame.sort_values(
        ["component", "first_step"],
        kind="stable",
        key=lambda column: column.map(order) if column.name == "component" else column,
    )
    return frame.reset_index(drop=True)
