"""A plan as ONNX graphs: one per expert and range of steps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir
import pandas as pd
from msgspec import structs

import wanlab
from wanlab.core.contents import content_digest
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.manifest import Manifest, file_damage
from wanlab.export.components import component_spec, components_of
from wanlab.export.export import ExportReport, export_all
from wanlab.export.graph import file_bytes
from wanlab.export.trace import BFLOAT16_OPSET, chosen_opset
from wanlab.export.weights import WeightsFile
from wanlab.precision.apply import AS_LOADED, requested_formats
from wanlab.precision.assignment import EXPERTS, Assignment, assign
from wanlab.precision.calibration import Calibration
from wanlab.precision.formats import get_format
from wanlab.precision.linear_nodes import find_linear_nodes
from wanlab.precision.plan import FLOATS, Plan, is_float, load_plan
from wanlab.precision.qdq import quantize

RECORD = "plan.json"


class PlanGraphs(Manifest, frozen=True, kw_only=True):
    """The graphs of a plan on one model.

    Attributes:
        path: path of their folder, which also holds this record as `plan.json`.
        plan: plan that they compute. model: name of the model.
        facts: facts that they were made from: hashes of plan, weights and calibrations by component, settings, version.
        bands: component -> first step, last step (inclusive; None where nothing changes with the step), graph.
        formats: graph -> layer -> format that it computes in, floats included.
        files: every file, weights too, relative to the folder -> SHA-256 and size in bytes.
        reason: why they were made again; empty where there were none. Not written.
        time_ms: time of exporting, rounding, writing and checking, or of reading the record.
    """

    KIND: ClassVar[str] = "record"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "make it with wanlab.precision.export_plan"
    NONE: ClassVar[str] = "no graphs of a plan in {path}; {again}"
    NOT_KEPT: ClassVar[tuple[str, ...]] = ("cached", "reason")

    plan: Plan
    model: str
    bands: dict[str, tuple[tuple[int | None, int | None, str], ...]]
    formats: dict[str, dict[str, str]]
    files: dict[str, tuple[str, int]]
    reason: str = ""
    time_ms: float = 0.0

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """Path of the record in a folder."""
        return Path(path) / RECORD

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @property
    def reused(self) -> bool:
        """Whether the graphs were made before, and are current."""
        return self.cached

    def damage(self) -> str:
        wrong = (file_damage(self.folder / name, *facts) for name, facts in self.files.items())
        return next(filter(None, wrong), "")

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.bands)

    @property
    def changes_with_step(self) -> bool:
        return any(first is not None for bands in self.bands.values() for first, _, _ in bands)

    def graphs_of(self, component: str) -> tuple[str, ...]:
        """Graphs of a component, each once, relative to the folder."""
        return tuple(dict.fromkeys(graph for _, _, graph in self.bands[component]))

    def frame(self) -> pd.DataFrame:
        """One row per component and range of steps: component, first_step, last_step, graph, formats (number of layers of
        each), size_bytes (of the graph with its weights)."""
        sizes = {graph: file_bytes(self.folder / graph) for graph in self.formats}
        rows = [
            {
                "component": component,
                "first_step": first,
                "last_step": last,
                "graph": graph,
                "formats": counted(self.formats[graph]),
                "size_bytes": sizes[graph],
            }
            for component, bands in self.bands.items()
            for first, last, graph in bands
        ]
        return pd.DataFrame(rows).astype({"first_step": "Int64", "last_step": "Int64"})

    @property
    def size_bytes(self) -> int:
        """Size of all files; weights that several graphs use count once."""
        return sum(size for _, size in self.files.values())


def counted(formats: Mapping[str, str]) -> str:
    """`"60 int8, 7 bf16"`."""
    counts: dict[str, int] = {}
    for name in formats.values():
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def read_plan_graphs(folder: str | os.PathLike, *, check: bool = True) -> PlanGraphs:
    """The graphs in a folder, by their record.

    Args:
        check: whether every file is hashed.

    Raises:
        WanlabError: there is no record, it cannot be read, or a file differs from it.
    """
    graphs = structs.replace(PlanGraphs.read(folder), cached=True)
    if check and (wrong := graphs.damage()):
        raise WanlabError(f"the graphs in {folder} differ from their record: {wrong}; {PlanGraphs.AGAIN}")
    return graphs


def files_of(folder: Path, graphs: Iterable[str]) -> tuple[str, ...]:
    """The graphs and the files of weights that they name, relative to the folder, each once."""
    names: dict[str, None] = {}
    for graph in graphs:
        names[graph] = None
        for tensor in onnx.load(folder / graph, load_external_data=False).graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    names[(Path(graph).parent / entry.value).as_posix()] = None
    return tuple(names)


SOURCE = "source"  # folder of the graphs as exported
Band = tuple[int | None, int | None]


def export_plan(
    model,
    plan: Plan | str | os.PathLike,
    folder: str | os.PathLike,
    calibrations: Mapping[str, Calibration] | None = None,
    *,
    opset: int | None = None,
    dynamic: bool = False,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    progress: bool = True,
) -> PlanGraphs:
    """Write graphs of the experts of a model that compute a plan.

    Every expert is exported in the plan's default dtype. Then, for every range of steps in which nothing changes, the
    layers get the formats of the plan: quantised by QuantizeLinear and DequantizeLinear, in another float between two
    Casts, or unchanged. The graphs are typed: an engine computes in the types that they name. Ranges with the same
    formats share a graph, graphs of one expert share a file of weights, and ranges in which an expert never runs get
    none. An expert that the plan does not change has the exported graph itself.

    Beside them `plan.json` records what they were made from and a hash of every file: while both are current, the graphs
    are reused; otherwise they are made again, and `reason` tells why.

    Args:
        model: model from `wanlab.models.load`, the experts eager.
        plan: plan, name of a preset, or file.
        folder: folder of the graphs; it is made.
        calibrations: component -> ranges of its layers' inputs; needed by formats that round inputs.
        opset: 17 to 24; None takes the oldest that suits, of 20, 21 (4-bit weights) and 23 (bfloat16).
        dynamic: whether batch and sizes may vary; fixed sizes export several times faster, at batch 1.
        height, width, frames: size of the clip, in pixels; None takes the model's defaults.
        progress: show bars.

    Raises:
        WanlabError: a plan that does not fit the model; no calibration, or one without a layer; as `export` and
            `quantize`.
    """
    begin = time.perf_counter()
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    folder, calibrations = Path(folder), dict(calibrations or {})
    experts = {name: component_spec(model, name).network for name in components_of(model) if name in EXPERTS}
    assignment = assign(plan, experts)
    _check_calibrations(assignment, calibrations)
    settings: dict[str, Any] = {
        "opset": opset or _opset(assignment),
        "dynamic": dynamic,
        "height": height,
        "width": width,
        "frames": frames,
    }
    sources = export_all(
        model,
        folder / SOURCE,
        assignment.components,
        dtype=FLOATS[assignment.default],
        progress=progress,
        **settings,
    )
    facts = {
        "plan": plan.hash,
        "sources": {report.component: report.key for report in sources},
        "calibrations": {name: calibrations[name].key for name in sorted(calibrations)},
        "settings": settings | {"default": assignment.default},
        "steps": {name: sorted(steps) for name, steps in _steps(model, plan).items()},
        "wanlab": {"version": wanlab.__version__},
    }
    kept, reason = _kept(folder, facts)
    if kept is not None:
        return structs.replace(kept, time_ms=(time.perf_counter() - begin) * 1e3)
    steps = _steps(model, plan)
    bands: dict[str, tuple[tuple[int | None, int | None, str], ...]] = {}
    formats: dict[str, dict[str, str]] = {}
    for report in sources:
        name = report.component
        component_graphs = _component(
            assignment, folder, report, calibrations.get(name), steps.get(name), progress
        )
        bands[name] = component_graphs[0]
        formats |= component_graphs[1]
    graphs = PlanGraphs(
        path=str(folder),
        facts=facts,
        plan=plan,
        model=getattr(model.spec, "name", ""),
        bands=bands,
        formats=formats,
        files=_files(folder, formats),
        reason=reason,
        time_ms=(time.perf_counter() - begin) * 1e3,
    )
    graphs.write()
    return graphs


def _component(
    assignment: Assignment,
    folder: Path,
    report: ExportReport,
    calibration: Calibration | None,
    running: set[int] | None,
    progress: bool,
) -> tuple[tuple[tuple[int | None, int | None, str], ...], dict[str, dict[str, str]]]:
    """Graphs of one component: (first step, last step, graph) of each range, and graph -> layer -> format."""
    name = report.component
    own = {
        layer: _short(linears[0])
        for layer, linears in find_linear_nodes(onnx_ir.load(report.path).graph).items()
    }
    by_band = {
        band: _formats_at(assignment, name, band[0], own)
        for band in assignment.bands(name)
        if running is None or band[0] is None or running & set(range(band[0], band[1] + 1))
    }
    distinct = list({tuple(formats.items()): formats for formats in by_band.values()}.values())
    shared = WeightsFile(folder / f"{name}.weights", report.key) if len(distinct) > 1 else None
    names: dict[tuple, str] = {}
    for formats in distinct:
        first = next(band for band, other in by_band.items() if other == formats)
        changed = {layer: format for layer, format in formats.items() if format != own.get(layer)}
        if not changed:
            names[tuple(formats.items())] = f"{SOURCE}/{Path(report.path).name}"
            continue
        graph = f"{name}.onnx" if len(distinct) == 1 else f"{name}.{first[0]}-{first[1]}.onnx"
        quantize(
            report.path,
            folder / graph,
            layers=changed,
            calibration=calibration,
            external_data=True if shared else None,
            weights=shared,
            progress=progress,
        )
        names[tuple(formats.items())] = graph
    bands = tuple((*band, names[tuple(formats.items())]) for band, formats in by_band.items())
    return bands, {names[tuple(formats.items())]: formats for formats in distinct}


def _formats_at(
    assignment: Assignment, component: str, step: int | None, own: dict[str, str]
) -> dict[str, str]:
    """Layer -> format at a step; a layer that no rule names computes as it was exported."""
    rows = requested_formats(assignment, component)
    if step is not None:
        rows = rows[rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))]
    formats = dict(zip(rows["layer"], rows["requested"], strict=True))
    for layer in formats:
        if layer not in own:
            raise WanlabError(
                f"the exported {component} does not compute {layer} as one product; leave it out of the plan"
            )
    return {layer: own[layer] if format == AS_LOADED else format for layer, format in formats.items()}


def _short(linear) -> str:
    """Short name of the dtype that a node computes in, such as `"bf16"`."""
    name = str(linear.dtype).removeprefix("torch.")
    return next((short for short, long in FLOATS.items() if long == name), name)


def _check_calibrations(assignment: Assignment, calibrations: Mapping[str, Calibration]) -> None:
    for name, given in calibrations.items():
        if name not in assignment.components:
            raise WanlabError(
                f"a calibration is given for {name!r}{did_you_mean(name, assignment.components)};"
                f" planned are {', '.join(assignment.components)}"
            )
        if not hasattr(given, "key"):
            raise WanlabError(
                f"the calibration of {name} does not come from wanlab.precision.calibrate; give one that does"
            )
    for row in assignment.frame.itertuples():
        rounds = not is_float(row.format) and get_format(row.format).activation is not None
        if rounds and row.layer not in getattr(calibrations.get(row.component), "amax", ()):
            raise WanlabError(
                f"{row.layer} of {row.component} is {row.format}, which needs the range of its input; give"
                f" calibrations={{{row.component!r}: ...}} from wanlab.precision.calibrate(..., layers='*')"
            )


def _opset(assignment: Assignment) -> int:
    used = set(assignment.frame["format"])
    oldest = chosen_opset(None, f"torch.{FLOATS[assignment.default]}")
    needed = [get_format(name).opset for name in used if not is_float(name)]
    convolution = (assignment.frame["kind"] != "Linear") & (assignment.frame["format"] == "bf16")
    return max([oldest, *needed, BFLOAT16_OPSET if convolution.any() else 0])


def _steps(model, plan: Plan) -> dict[str, set[int]]:
    """Component -> steps that it runs in a generation of the plan's number of steps; empty where the plan has none."""
    if plan.num_steps is None or not hasattr(model, "schedule"):
        return {}
    table = model.schedule(plan.num_steps)
    return {name: set(rows["step"].astype(int)) for name, rows in table.groupby("component")}


def _kept(folder: Path, facts: dict[str, Any]) -> tuple[PlanGraphs | None, str]:
    """The graphs in the folder where they are current; else None and why they are not."""
    graphs, reason = PlanGraphs.current(folder, facts)
    if graphs is None and (old := PlanGraphs.find(folder)) is not None:
        for name in old.files:  # of an older plan; the exported graphs below `source` belong to the export
            if not name.startswith(f"{SOURCE}/"):
                (folder / name).unlink(missing_ok=True)
    return graphs, reason


def _files(folder: Path, graphs: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Every file that the graphs need -> hash and size."""
    names = files_of(folder, list(graphs))
    return {name: (content_digest(folder / name), (folder / name).stat().st_size) for name in names}
