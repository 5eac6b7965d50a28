"""Engines that compute a plan: one per expert, which changes its graph with the step of the generation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pandas as pd
import torch

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_text
from wanlab.core.formats import CODES, FLOATS
from wanlab.engine_report.from_tensorrt import read_inspector
from wanlab.engine_report.layers import PRODUCTS, Layer, precision_of
from wanlab.engines.base import Engine, TensorType
from wanlab.engines.onnxruntime import PROVIDERS as ORT_PROVIDERS
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.engines.registry import ENGINES, engine_kind
from wanlab.engines.tensorrt.build import EngineBuilds, build_engines, layers_path
from wanlab.engines.tensorrt.profile import read_source
from wanlab.models.clocks import with_clock
from wanlab.precision.check_torch import Fault, raise_first
from wanlab.precision.formats import get_format
from wanlab.precision.linear_nodes import OPERATORS
from wanlab.precision.plan import is_float
from wanlab.precision.plan_graphs import PlanGraphs, files_of, read_plan_graphs
from wanlab.precision.steps import StepClock

COLUMNS = ["layer", "asked", "built", "as_asked", "engine_layers"]


def built_formats(
    engine: str | os.PathLike, graph: str | os.PathLike, formats: Mapping[str, str]
) -> pd.DataFrame:
    """Formats in which a built engine computes each layer, from the layer information beside it; no GPU is needed.

    A layer is in the requested format where the kernels that hold its product multiply codes (formats that round inputs),
    keep its weight as codes (weight-only formats: decoded at use, not when it was built), or multiply in its float. Where
    several GPUs were built for, the builder describes the last of them.

    Args:
        engine: engine from `build_tensorrt`. graph: graph that it was built from.
        formats: layer -> format, floats included, e.g. of `PlanGraphs.formats`.

    Returns:
        A row per layer: layer, asked (format of the plan), built (number format of the product; with `" x "` and that of
        the weight, where that is another), as_asked (whether these agree), engine_layers (number of kernels of its product).

    Raises:
        WanlabError: no layer information, or a layer that the graph does not have.
    """
    if not layers_path(engine).is_file():
        raise WanlabError(
            f"{Path(engine).name} has no {layers_path(engine).name} beside it; build it with wanlab.engines.build_tensorrt"
        )
    layers = read_inspector(layers_path(engine)).layers
    products: dict[str, list[str]] = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        layer = node.name.partition("/")[0]
        if node.op_type in OPERATORS and layer in formats:
            products.setdefault(layer, []).append(node.name)
    missing = [layer for layer in formats if layer not in products]
    if missing:
        raise WanlabError(f"{Path(graph).name} has no layer {missing[0]!r}; give the formats of this graph")
    return pd.DataFrame(
        [_row(layer, requested, products[layer], layers) for layer, requested in formats.items()],
        columns=COLUMNS,
    )


def _row(layer: str, requested: str, products: Iterable[str], layers: Iterable[Layer]) -> dict[str, object]:
    layers, products = list(layers), set(products)
    holding = [each for each in layers if products & set(each.nodes)]
    # A product of few rows may be written as a sum, and the layer after one may have its name.
    kernels = [each for each in holding if each.kind in PRODUCTS] or holding
    computed = sorted({_computed(each) for each in kernels} - {""})
    of_layer = [each for each in layers if any(node.partition("/")[0] == layer for node in each.nodes)]
    constants = {tensor.dtype for each in (*kernels, *of_layer) for tensor in each.inputs if tensor.constant}
    codes = sorted(constants & set(CODES))
    if is_float(requested):
        weight, right = "", requested in computed
        # A small product may be in one kernel with others of several dtypes: then its weight decides.
        right = right or (not any(each.kind in PRODUCTS for each in kernels) and requested in constants)
    else:
        format = get_format(requested)
        weight = format.weight.kind if format.weight.kind in codes else ""
        right = bool(weight) and (format.activation is None or format.activation.kind in computed)
    product = "+".join(computed) or "not found"
    return {
        "layer": layer,
        "asked": requested,
        "built": product if weight in ("", *computed) else f"{product} x {weight}",
        "as_asked": bool(holding) and right,
        "engine_layers": len(kernels),
    }


def _computed(layer: Layer) -> str:
    if layer.kind in PRODUCTS:
        return layer.precision
    precision = precision_of("matmul", layer.inputs, layer.outputs)
    return precision if precision in FLOATS or precision in CODES else ""


REMEDY = "build it again from its own graph with precision.build_plan, for GPUs that multiply these codes"


def engine_effect_check(
    graphs: PlanGraphs, graph: str, engine: str | os.PathLike | None = None
) -> pd.DataFrame:
    """Fail where an engine computes in floats what a plan has in codes; no GPU is needed.

    The builder's own description of its layers is read (`built_formats`). Layers that it does not name, and floats in
    another float, are rows of the table and no error: a builder may compute a small layer in the float of its neighbours.

    Args:
        graphs: graphs from `export_plan`. graph: name of one of them, e.g. of `graphs.graphs_of(component)`.
        engine: engine that was built from it; None takes the one that `build_plan` wrote beside it.

    Returns:
        As `built_formats`.

    Raises:
        WanlabError: a layer in 8 bits or fewer that falls back to a float, or whose codes became floats when the
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


def _fault(requested: str, built: str) -> tuple[str, str]:
    if get_format(requested).activation is None:
        return (
            "dequantised",
            f"keeps its weight in {built} in the engine, where the plan asks for {requested}",
        )
    fallback = ": FP32 fallback" if built == "fp32" else ""
    return (
        "fp32" if fallback else "wrong",
        f"computes in {built} in the engine, where the plan asks for {requested}{fallback}",
    )


RECORD = "engines.json"
TARGETS = ("8.9", "12.0")
COLUMNS_BUILD = [
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
    """Build every graph of a plan for every GPU that can run it; a refusal is a row, not an error.

    Each engine lies beside its graph; ranges of steps with one graph share one engine. The builder's own description of
    its layers is compared with the plan (`built_formats`). The table is written as `engines.json` in the folder.

    Args:
        folder: folder that `export_plan` wrote.
        targets: compute capabilities. TensorRT for RTX builds for them on any machine; TensorRT builds for the GPU of
            this machine and ignores them. FP8 needs 8.9 or more.
        progress: show bars.
        settings: settings of `wanlab.engines.build_tensorrt`: profile (for graphs with free sizes), level, workspace_gib.

    Returns:
        One row per component, range of steps and GPU: component, first_step, last_step, graph, numbers, capability, built,
        engine (relative to the folder), size_bytes, build_ms (both of the engine for all its GPUs), layers, layers_as_asked
        (number of layers in the format of the plan), differing (the first in another, and in which one), node,
        operator and reason of a refusal.

    Raises:
        WanlabError: no graphs, or graphs that were changed; TensorRT is not installed; as `build_tensorrt`, but for a
            builder that refuses.
    """
    graphs = folder if isinstance(folder, PlanGraphs) else read_plan_graphs(folder)
    outcomes = {}
    for component in graphs.components:
        for graph in graphs.graphs_of(component):
            builds = build_engines(
                [graphs.folder / graph], compute_capabilities=targets, progress=progress, **settings
            )
            outcomes[graph] = _outcome(graphs, graph, builds)
    rows = [
        {"component": component, "first_step": first, "last_step": last, "graph": graph} | row
        for component, bands in graphs.bands.items()
        for first, last, graph in bands
        for row in outcomes[graph]
    ]
    write_text(graphs.folder / RECORD, json.dumps(rows, indent=1))
    return _frame(pd.DataFrame(rows, columns=COLUMNS_BUILD))


def read_plan_builds(folder: str | os.PathLike) -> pd.DataFrame:
    """The table that `build_plan` wrote in a folder.

    Raises:
        WanlabError: nothing was built there.
    """
    path = Path(folder) / RECORD
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanlabError(
            f"no engines of a plan in {folder}; build them with wanlab.precision.build_plan"
        ) from error
    return _frame(pd.DataFrame(rows, columns=COLUMNS_BUILD))


def _outcome(graphs: PlanGraphs, graph: str, builds: EngineBuilds) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for info in builds.built:
        layers = built_formats(info.path, graphs.folder / graph, graphs.formats[graph])
        off = layers[~layers["as_asked"]]
        first = next(off.itertuples(), None)
        rows += [
            {
                "numbers": info.numbers,
                "capability": capability,
                "built": True,
                "engine": Path(info.path).relative_to(graphs.folder).as_posix(),
                "size_bytes": info.size_bytes,
                "build_ms": info.time_ms,
                "layers": len(layers),
                "layers_as_asked": int(layers["as_asked"].sum()),
                "differing": ""
                if first is None
                else f"{first.layer} has format {first.asked} in the plan, computes in {first.built}",
            }
            for capability in info.compute_capabilities
        ]
    for refused in builds.refused.to_dict("records"):
        rows.append({key: refused[key] for key in ("numbers", "capability", "node", "operator", "reason")})
        rows[-1] |= {"built": False}
    return rows


def _frame(rows: pd.DataFrame) -> pd.DataFrame:
    whole = ("first_step", "last_step", "size_bytes", "layers", "layers_as_asked")
    frame = rows.astype(dict.fromkeys(whole, "Int64"))
    words = ["engine", "differing", "node", "operator", "reason"]
    frame[words] = frame[words].astype(object).where(frame[words].notna(), "")
    return frame


BUILT = tuple(kind.name for kind in ENGINES.values() if kind.plans == "graph" and kind.build is not None)
"""Engines that are built from the graphs of a plan before they run."""
PROVIDERS = ("auto", *ORT_PROVIDERS, *BUILT)


class SteppedEngine(Engine):
    """One expert whose graph changes with the step; `wanlab.engines.use` takes it as any engine.

    The scheduler of its pipeline counts the steps: a generation with another number of steps than the
    plan's is refused at its start, before anything is computed.

    Attributes:
        name, inputs, outputs, metadata, device: as of `wanlab.engines.base.Engine`.
        path: folder of the graphs. bands: first step, last step (inclusive), graph.
        size_bytes: size of its graphs; weights that they share count once. load_ms: load time of the engines opened so far.
    """

    def __init__(
        self,
        component: str,
        bands: tuple[tuple[int, int, str], ...],
        graphs: PlanGraphs,
        clock: StepClock,
        opener: Callable[[Path], Engine],
        resident: bool = True,
    ) -> None:
        self.path, self.bands, self.clock = graphs.folder, bands, clock
        self._component, self._plan = component, graphs.plan.name
        self._opener, self._resident = opener, resident
        self._open: dict[str, Engine] = {}
        self.load_ms = 0.0
        source = read_source(graphs.folder / bands[0][2])
        self.inputs: Mapping[str, TensorType] = source.inputs
        self.outputs: Mapping[str, TensorType] = source.outputs
        self.metadata: Mapping[str, str] = source.metadata
        self.size_bytes = sum(
            graphs.files[name][1] for name in files_of(graphs.folder, [b[2] for b in bands])
        )
        for _, _, graph in bands if resident else bands[:1]:
            self._engine(graph)
        first = next(iter(self._open.values()))
        self.name, self._device = first.name, first.device

    def __repr__(self) -> str:
        return f"SteppedEngine({self._component!r}, {len(self.bands)} ranges of steps, {self.name})"

    @property
    def device(self) -> torch.device:
        return self._device

    def band(self, step: int) -> Engine:
        """The engine of a step.

        Raises:
            WanlabError: the expert has no graph for it.
        """
        for first, last, graph in self.bands:
            if first <= step <= last:
                return self._engine(graph)
        ranges = ", ".join(f"{first}-{last}" for first, last, _ in self.bands)
        raise WanlabError(
            f"plan {self._plan} has no graph of {self._component} for step {step}, only for {ranges}: it does not run"
            " there with the boundary that the graphs were made for; make them again with wanlab.precision.export_plan"
        )

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Inside the block the engine computes as in this step; a generation counts its steps itself.

        Raises:
            WanlabError: the plan has no such step.
        """
        with self.clock.at(step):
            yield

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph of the current step.

        Raises:
            WanlabError: no generation is running; as `band` and the engine's own `run`.
        """
        if self.clock.step is None:
            raise WanlabError(
                f"plan {self._plan} changes with the step, and no generation is running; call inside"
                " `with engine.at(step)`"
            )
        return super().run(feeds)

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.band(self.clock.step).run(tensors)

    def _check_capture(self, cuda_graph: bool) -> None:
        """Refuse: there is more than one graph."""
        raise WanlabError(f"{self._component} has a graph for every range of steps; bind engine.band(step)")

    def _bind(self, *_: Any) -> Callable[[], None]:
        raise NotImplementedError  # `_check_capture` refuses before this is called

    def follow(self, pipeline) -> None:
        """Count the steps by the scheduler of a pipeline, which is replaced by a copy.

        Raises:
            WanlabError: it counts them for another plan already.
        """
        clocks = getattr(pipeline.scheduler, "wanlab_clocks", ())
        clock = next((each for each in clocks if isinstance(each, StepClock)), None)
        if clock is None:
            pipeline.scheduler = with_clock(pipeline.scheduler, self.clock)
        elif clock is not self.clock:
            raise WanlabError(
                f"this model's steps are counted for plan {clock.plan.name} already; use the engines of one"
                " load_plan_engines together, on the model as it was loaded"
            )

    def _engine(self, graph: str) -> Engine:
        if graph not in self._open:
            if not self._resident:
                self._open.clear()
            self._open[graph] = self._opener(self.path / graph)
            self.load_ms += self._open[graph].load_ms
        return self._open[graph]


def load_plan_engines(
    folder: str | os.PathLike | PlanGraphs,
    provider: str = "auto",
    *,
    components: tuple[str, ...] | None = None,
    resident: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Engines for the graphs of a plan, as `wanlab.engines.use` takes them.

    Args:
        folder: folder that `export_plan` wrote.
        provider: `"cpu"`, `"cuda"` or `"auto"` for ONNX Runtime; `"tensorrt"` for the engines of `build_plan`; or another
            engine that takes graphs of plans.
        components: components to open; None takes all.
        resident: whether the graphs of all steps stay open; False keeps one of each expert, and opens the next in its step.
        options: options of `wanlab.engines.OrtEngine`, or `TensorRTEngine`.

    Returns:
        Component -> engine of one graph where nothing changes with the step, else a `SteppedEngine`.

    Raises:
        WanlabError: no graphs, or graphs that were changed; an unknown provider or component; a TensorRT engine that
            computes in floats what the plan has in codes (`engine_effect_check`); as the engines.
    """
    graphs = folder if isinstance(folder, PlanGraphs) else read_plan_graphs(folder)
    known = dict.fromkeys((*PROVIDERS, *(kind.name for kind in ENGINES.values() if kind.plans == "graph")))
    if provider not in known:
        raise WanlabError(
            f"unknown provider {provider!r}{did_you_mean(provider, known)}; give {', '.join(known)}"
        )
    for name in components or ():
        if name not in graphs.bands:
            raise WanlabError(
                f"no graph of {name!r} in {graphs.folder}{did_you_mean(name, graphs.bands)};"
                f" there is {', '.join(graphs.bands)}"
            )

    def opener(path: Path) -> Engine:
        if provider in BUILT:
            kind = engine_kind(provider)
            engine_effect_check(graphs, path.relative_to(graphs.folder).as_posix())
            return kind.open(None, None, path.with_suffix(kind.suffixes[0]), **options)
        if provider in ENGINES:
            return engine_kind(provider).open(None, None, path, **options)
        return OrtEngine(path, provider=provider, **options)

    clock = None
    if graphs.changes_with_step:
        clock = StepClock(graphs.plan, [(0, graphs.plan.num_steps - 1)])
    engines: dict[str, Any] = {}
    for name in components or graphs.components:
        bands = graphs.bands[name]
        if bands[0][0] is None:
            engines[name] = opener(graphs.folder / bands[0][2])
        else:
            engines[name] = SteppedEngine(name, bands, graphs, clock, opener, resident)
    return engines
