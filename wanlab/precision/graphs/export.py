"""A plan as ONNX graphs: one per expert and range of steps, quantised and cast as the plan says."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.components import components_of, recipe
from wanlab.convert.onnx.export import export_all
from wanlab.convert.onnx.identity import file_sha256
from wanlab.convert.onnx.report import ExportReport
from wanlab.convert.onnx.settings import BFLOAT16_OPSET, chosen_opset
from wanlab.convert.onnx.weights_file import WeightsFile
from wanlab.errors import WanlabError, did_you_mean
from wanlab.precision.formats import get_format
from wanlab.precision.graphs.qdq import quantize
from wanlab.precision.graphs.record import (
    PlanGraphs,
    damage,
    files_of,
    read_plan_graphs,
    staleness,
    write_record,
)
from wanlab.precision.graphs.sites import find_sites
from wanlab.precision.plans.assignment import EXPERTS, Assignment, assign
from wanlab.precision.plans.file import load_plan
from wanlab.precision.plans.plan import FLOATS, Plan, is_float

if TYPE_CHECKING:
    from wanlab.precision.calibrations.calibration import Calibration

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
    """Write the graphs by which the experts of a model compute a plan.

    Every expert is exported in the plan's default dtype. Then, for every range of steps in which nothing changes, the
    layers become what the plan says: quantised by QuantizeLinear and DequantizeLinear, in another float between two
    Casts, or left as they are. The graphs are typed: an engine computes in the types that they name. Ranges with the same
    formats share a graph, graphs of one expert share a file of weights, and ranges in which an expert never runs get
    none. What a plan leaves alone altogether is the exported graph itself.

    Beside them `plan.json` says what they were made from and holds a hash of every file: while both are true, they are
    reused; otherwise they are made anew, and `reason` says why.

    Args:
        model: from `wanlab.models.load`, the experts eager.
        plan: or a preset's name, or a file.
        folder: is made.
        calibrations: component -> ranges of its layers' inputs, which formats that round inputs need.
        opset: 17 to 24; None takes the oldest that suits, of 20, 21 (4-bit weights) and 23 (bfloat16).
        dynamic: let batch and sizes vary; fixed sizes export several times faster, at batch 1.
        height, width, frames: of the clip, in pixels; None takes the model's defaults.
        progress: show bars.

    Raises:
        WanlabError: a plan that does not fit the model; no calibration, or one without a layer; as `export` and
            `quantize`.
    """
    begin = time.perf_counter()
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    folder, calibrations = Path(folder), dict(calibrations or {})
    experts = {name: recipe(model, name).network for name in components_of(model) if name in EXPERTS}
    assignment = assign(plan, experts)
    _check_calibrations(assignment, calibrations)
    settings = {
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
        "wanlab": {"version": _version()},
    }
    kept, reason = _kept(folder, facts)
    if kept is not None:
        return _timed(kept, begin, reused=True)
    steps = _steps(model, plan)
    bands: dict[str, tuple[tuple[int | None, int | None, str], ...]] = {}
    formats: dict[str, dict[str, str]] = {}
    for report in sources:
        name = report.component
        made = _component(assignment, folder, report, calibrations.get(name), steps.get(name), progress)
        bands[name] = made[0]
        formats |= made[1]
    graphs = PlanGraphs(
        folder,
        plan,
        getattr(model.spec, "name", ""),
        facts,
        bands,
        formats,
        _files(folder, formats),
        reason=reason,
    )
    graphs = _timed(graphs, begin, reused=False)
    write_record(graphs)
    return graphs


def _component(
    assignment: Assignment,
    folder: Path,
    report: ExportReport,
    calibration: Calibration | None,
    running: set[int] | None,
    progress: bool,
) -> tuple[tuple[tuple[int | None, int | None, str], ...], dict[str, dict[str, str]]]:
    """Graphs of one component: by range of steps, and what each computes in."""
    import onnx_ir

    name = report.component
    own = {layer: _short(sites[0]) for layer, sites in find_sites(onnx_ir.load(report.path).graph).items()}
    wanted = {
        band: _wanted(assignment, name, band[0], own)
        for band in assignment.bands(name)
        if running is None or band[0] is None or running & set(range(band[0], band[1] + 1))
    }
    distinct = list({tuple(formats.items()): formats for formats in wanted.values()}.values())
    shared = WeightsFile(folder / f"{name}.weights", report.key) if len(distinct) > 1 else None
    names: dict[tuple, str] = {}
    for formats in distinct:
        first = next(band for band, found in wanted.items() if found == formats)
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
    bands = tuple((*band, names[tuple(formats.items())]) for band, formats in wanted.items())
    return bands, {names[tuple(formats.items())]: formats for formats in distinct}


def _wanted(assignment: Assignment, component: str, step: int | None, own: dict[str, str]) -> dict[str, str]:
    """Layer -> format at a step; a layer that no rule names computes as it was exported."""
    from wanlab.precision.applied.layers import AS_LOADED, asked

    rows = asked(assignment, component)
    if step is not None:
        rows = rows[rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))]
    wanted = dict(zip(rows["layer"], rows["wanted"], strict=True))
    for layer in wanted:
        if layer not in own:
            raise WanlabError(
                f"the exported {component} does not compute {layer} as one product; leave it out of the plan"
            )
    return {layer: own[layer] if format == AS_LOADED else format for layer, format in wanted.items()}


def _short(site) -> str:
    """`"bf16"` for what a site computes in."""
    name = str(site.dtype).removeprefix("torch.")
    return next((short for short, long in FLOATS.items() if long == name), name)


def _check_calibrations(assignment: Assignment, calibrations: Mapping[str, Calibration]) -> None:
    for name, given in calibrations.items():
        if name not in assignment.components:
            raise WanlabError(
                f"a calibration is given for {name!r}{did_you_mean(name, assignment.components)};"
                f" planned are {', '.join(assignment.components)}"
            )
        if not hasattr(given, "key"):
            raise WanlabError(f"the calibration of {name} is none of wanlab.precision.calibrate; give that")
    for row in assignment.frame.itertuples():
        rounds = not is_float(row.format) and get_format(row.format).activation is not None
        if rounds and row.layer not in getattr(calibrations.get(row.component), "amax", ()):
            raise WanlabError(
                f"{row.layer} of {row.component} is {row.format}, which needs the range of its input; give"
                f" calibrations={{{row.component!r}: ...}} from wanlab.precision.calibrate(..., layers='*')"
            )


def _opset(assignment: Assignment) -> int:
    used = set(assignment.frame["format"])
    found = chosen_opset(None, f"torch.{FLOATS[assignment.default]}")
    needed = [get_format(name).opset for name in used if not is_float(name)]
    convolution = (assignment.frame["kind"] != "Linear") & (assignment.frame["format"] == "bf16")
    return max([found, *needed, BFLOAT16_OPSET if convolution.any() else 0])


def _steps(model, plan: Plan) -> dict[str, set[int]]:
    """Component -> the steps that it runs in a generation of the plan's; empty where steps do not matter."""
    if plan.num_steps is None or not hasattr(model, "schedule"):
        return {}
    table = model.schedule(plan.num_steps)
    return {name: set(rows["step"].astype(int)) for name, rows in table.groupby("component")}


def _kept(folder: Path, facts: dict[str, Any]) -> tuple[PlanGraphs | None, str]:
    """The graphs that are there, if still true; else what is not."""
    try:
        there = read_plan_graphs(folder, check=False)
    except WanlabError as error:
        return None, "" if "no graphs of a plan" in str(error) else "the record cannot be read"
    reason = staleness(there.facts, facts) or damage(there)
    if not reason:
        return there, ""
    for name in there.files:  # of an older plan; what was exported is looked after by the export
        if not name.startswith(f"{SOURCE}/"):
            (folder / name).unlink(missing_ok=True)
    return None, reason


def _files(folder: Path, graphs: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Every file that the graphs need -> hash and size."""
    names = files_of(folder, list(graphs))
    return {name: (file_sha256(folder / name), (folder / name).stat().st_size) for name in names}


def _timed(graphs: PlanGraphs, begin: float, *, reused: bool) -> PlanGraphs:
    from dataclasses import replace

    return replace(graphs, reused=reused, time_ms=(time.perf_counter() - begin) * 1e3)


def _version() -> str:
    from wanlab import __version__

    return __version__
