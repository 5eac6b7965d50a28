"""One plan applied in PyTorch, ONNX Runtime and TensorRT: how far the three are apart, against the plan's own error."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import onnx
import pandas as pd
import torch

from wanlab.core.errors import WanlabError
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.engines.tensorrt.runtime import installed
from wanlab.export.components import component_spec
from wanlab.precision.apply import Applied, apply_plan
from wanlab.precision.assignment import natural
from wanlab.precision.calibration import Calibration
from wanlab.precision.linear_nodes import OPERATORS
from wanlab.precision.plan import FLOATS, Plan, check_steps, is_float, make_plan
from wanlab.precision.plan_engines import TARGETS, build_plan, load_plan_engines
from wanlab.precision.plan_graphs import PlanGraphs, export_plan
from wanlab.precision.recording import RecordedCall, Recording

AGREES_BELOW = 0.25
"""Of the format's error. Two differences that have nothing to do with each other add as squares: one of a quarter makes the
error of an application 3 % larger or smaller than that of another."""

ROUNDING = 1e-5
"""Distance that float32 sums in another order may have; exported float32 networks are at 1e-6."""

AT_ONCE = 16  # layers whose inputs and outputs are held
MOST_BLOCKS = 6
_ROUNDED = ("/input_quantize", "/input_dequantize", "/input_cast")


def layer_distances(
    graph: Path,
    network: torch.nn.Module,
    original: torch.nn.Module,
    feeds: Mapping[str, torch.Tensor],
    formats: Mapping[str, str],
    provider: str = "auto",
) -> pd.DataFrame:
    """Every layer's output in ONNX Runtime against the planned network's, on the input that it has in ONNX Runtime.

    Args:
        graph: that the network was planned as. network: its plan applied, at the step that the graph is for.
        original: the same network without a plan, whose layers in float32 are the reference.
        feeds: inputs of the graph.
        formats: layer -> format, floats included. All layers are compared in up to 6 blocks, else those outside the
            blocks and in the first, middle and last.

    Returns:
        A row per layer: layer, format, to_pytorch (||a - p|| / ||r||), format_error (||p - r|| / ||r||), allowed: a
        quarter of the format's error, or the rounding of the dtype where that is more.
    """
    rows: list[dict] = []
    chosen = _sample(list(formats))
    for start in range(0, len(chosen), AT_ONCE):
        with _step_tracking(graph, chosen[start : start + AT_ONCE]) as (path, places):
            engine = OrtEngine(path, provider=provider)
            made = engine.run(feeds)
            kinds = {name: getattr(torch, kind) for name, (kind, _) in engine.inputs.items()}
            del engine
        for layer, (source, result) in places.items():
            given = made[source] if source in made else feeds[source].to(kinds[source])
            row = _compared(layer, network, original, given, made[result])
            rows.append({"layer": layer, "format": formats[layer]} | row)
            island = FLOATS.get(formats[layer], "float32")
            rounding = max(_rounding(made[result].dtype), _rounding(getattr(torch, island)))
            rows[-1]["allowed"] = max(AGREES_BELOW * row["format_error"], rounding)
        del made
    columns = ["layer", "format", "to_pytorch", "format_error", "allowed"]
    return pd.DataFrame(rows, columns=columns)


def _rounding(kind: torch.dtype) -> float:
    return ROUNDING if kind == torch.float32 else torch.finfo(kind).eps / 2


def _sample(layers: Sequence[str]) -> list[str]:
    ordered = sorted(layers, key=natural)
    blocks = sorted({int(name.split(".")[1]) for name in ordered if name.startswith("blocks.")})
    if len(blocks) <= MOST_BLOCKS:
        return ordered
    few = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    return [name for name in ordered if not name.startswith("blocks.") or int(name.split(".")[1]) in few]


@contextmanager
def _step_tracking(graph: Path, layers: Sequence[str]) -> Iterator[tuple[Path, dict[str, tuple[str, str]]]]:
    """The graph with inputs and outputs of layers as outputs, and their names; beside the graph, as its weights are."""
    model = onnx.load(graph, load_external_data=False)
    places = _places(model.graph, layers)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in dict.fromkeys(name for pair in places.values() for name in pair):
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    path = graph.with_name(f".{graph.stem}.{os.getpid()}.layers.onnx")
    try:
        onnx.save(model, path)
        yield path, places
    finally:
        path.unlink(missing_ok=True)


def _places(graph: onnx.GraphProto, layers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer -> name of its input before rounding and casting, and of its output after them; of its first product."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    places: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        layer = node.name.partition("/")[0]
        if layer not in layers or layer in places or node.op_type not in OPERATORS:
            continue
        source = node.input[0]
        while (maker := makers.get(source)) is not None and any(word in maker.name for word in _ROUNDED):
            source = maker.input[0]
        result = node.output[0]
        while len(after := readers.get(result, [])) == 1 and _belongs(after[0], layer):
            result = after[0].output[0]
        places[layer] = source, result
    return places


def _belongs(node: onnx.NodeProto, layer: str) -> bool:
    """Whether a node adds the layer's bias, or casts its output back."""
    owner, _, name = node.name.partition("/")
    return owner == layer and (node.op_type == "Add" or name.startswith("output_cast"))


def _compared(layer: str, network, original, given: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    module, plain = network.get_submodule(layer), copy.deepcopy(original.get_submodule(layer)).float()
    device = next(plain.parameters()).device
    given = given.to(device)
    with torch.no_grad():
        wanted = module(given).double()
        reference = plain(given.float()).double()
    size = reference.norm()
    apart = made.to(device).double().reshape(wanted.shape) - wanted
    return {
        "to_pytorch": float(apart.norm() / size),
        "format_error": float((wanted - reference).norm() / size),
    }


Key = tuple[str, tuple[int | None, int | None]]
"""Component, and first and last step."""

Inputs = dict[Key, list[tuple[int | None, dict[str, "torch.Tensor"]]]]
"""The calls of a range of steps: step, and inputs by name."""

Outputs = dict[Key, list["torch.Tensor"]]
"""One output per call, float32 on the CPU."""

NUDGE = 3e-7
"""Relative size of what float32 sums in another order leave; coarser dtypes have their own rounding."""


def chosen_inputs(graphs: PlanGraphs, recording: Recording, calls: int) -> Inputs:
    """Calls of every component and range of steps, evenly spread over those recorded.

    Raises:
        WanlabError: nothing recorded of one.
    """
    if calls < 1:
        raise WanlabError(f"calls is {calls}; give 1 or more")
    found: Inputs = {}
    for component, bands in graphs.bands.items():
        for first, last, _ in bands:
            there = [
                call for call in recording.of(component) if first is None or first <= (call.step or 0) <= last
            ]
            if not there:
                raise WanlabError(
                    f"no call of {component} at steps {first} to {last} is recorded in {recording.folder};"
                    f" record generations of {graphs.plan.num_steps} steps"
                )
            found[component, (first, last)] = [
                (call.step, recording.inputs(call)) for call in _spread(there, calls)
            ]
    return found


def reference_outputs(model, inputs: Inputs) -> Outputs:
    """By the networks in float32, unquantised; one expert is copied at a time."""
    made: Outputs = {}
    for component in dict.fromkeys(key[0] for key in inputs):
        network = component_spec(model, component).network
        # A copy takes what it finds under an object's id: parameters in float32, buffers as they are.
        twins: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
        for parameter in network.parameters():
            wide = parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            twins[id(parameter)] = torch.nn.Parameter(wide.detach(), requires_grad=False)
        wide = copy.deepcopy(network, twins)
        for key, given in inputs.items():
            if key[0] == component:
                made[key] = [_forward(model, component, wide, feeds) for _, feeds in given]
        del wide, twins
    return made


def planned_outputs(applied: Applied, inputs: Inputs, nudged: int | None = None) -> Outputs:
    """By a model that a plan was applied to.

    Args:
        nudged: seed of a disturbance of every layer's input by as much as another kernel's rounding; None leaves them as
            they are.
    """
    made: Outputs = {}
    for key, given in inputs.items():
        network = component_spec(applied.model, key[0]).network
        outputs = []
        for step, feeds in given:
            if nudged is not None:
                feeds = _nudged(feeds, nudged)
            with applied.at(step or 0), _nudging(applied, key[0], network, nudged):
                outputs.append(_forward(applied.model, key[0], network, feeds))
        made[key] = outputs
    return made


def distance(
    made: Sequence[torch.Tensor], other: Sequence[torch.Tensor], size: Sequence[torch.Tensor]
) -> float:
    """`||a - b|| / ||r||` over all tensors together."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(made, other, strict=True))
    return math.sqrt(apart / sum(float(r.double().square().sum()) for r in size))


def _spread(there: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    if len(there) <= count:
        return list(there)
    places = [round(i * (len(there) - 1) / max(count - 1, 1)) for i in range(count)]
    return [there[place] for place in dict.fromkeys(places)]


def _nudged(feeds: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The timestep off by the rounding of its frequencies, whose sine is taken of hundreds of radians."""
    timestep = feeds["timestep"].float()
    noise = torch.randn(timestep.shape, generator=torch.Generator().manual_seed(seed)).to(timestep.device)
    return {**feeds, "timestep": timestep * (1 + torch.finfo(torch.float32).eps * noise)}


@contextmanager
def _nudging(applied: Applied, component: str, network, seed: int | None) -> Iterator[None]:
    rows = applied.frame[applied.frame["component"] == component]
    layers = dict.fromkeys(rows["layer"]) if seed is not None else ()
    generator = torch.Generator(network.device).manual_seed(seed or 0)

    def nudge(module, args):
        values = args[0]
        size = max(NUDGE, torch.finfo(values.dtype).eps / 2) if values.dtype != torch.float32 else NUDGE
        noise = torch.randn(values.shape, generator=generator, device=values.device)
        return ((values.float() * noise.mul_(size).add_(1)).to(values.dtype), *args[1:])

    handles = [network.get_submodule(layer).register_forward_pre_hook(nudge) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model, component: str, network, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    plan = component_spec(model, component, network=network)
    given = []
    for name in plan.inputs:
        tensor = feeds[name].to(network.device)
        given.append(
            tensor.to(network.dtype) if name != "timestep" and tensor.is_floating_point() else tensor
        )
    with torch.no_grad():
        return plan.reference(*given).float().cpu()


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
            _spread_agreement([pytorch[key], *(made[key] for made in again)], reference[key]),
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


def _spread_agreement(runs: Sequence[Sequence[torch.Tensor]], reference: Sequence[torch.Tensor]) -> float:
    """Distance over all calls between the two runs that are farthest apart, call by call."""
    pairs = [
        max(combinations(outputs, 2), key=lambda pair: float((pair[0] - pair[1]).norm()))
        for outputs in zip(*runs, strict=True)
        if len(outputs) > 1
    ]
    if not pairs:
        return 0.0
    first, second = zip(*pairs, strict=True)
    return distance(first, second, reference)


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
                component_spec(compared.planned.model, key[0]).network,
                component_spec(compared.model, key[0]).network,
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
