"""Exports components to ONNX files, each with a report beside it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from filelock import FileLock
from msgspec.structs import replace
from tqdm.auto import tqdm

from wanlab import __version__
from wanlab.core.digests import graph_sha256, trace_facts, weights_key
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.manifest import Manifest, NoManifest, key_of
from wanlab.export import graph as graphs
from wanlab.export.components import (
    ClipShape,
    check_components,
    component_spec,
    components_of,
    default_shape,
    latent_size,
    usual_batch,
)
from wanlab.export.trace import FORMS, Trace, chosen_dtype, chosen_opset, kept_trace, trace
from wanlab.export.weights import WeightsFile

TRACED_BATCH = 2
"""Batch that graphs with a free batch are traced with; an axis of size 1 would be taken for a fixed one."""


class ExportReport(Manifest, frozen=True, kw_only=True):
    """Sources, settings and result of one export.

    Attributes:
        path: path of the ONNX file; this report is beside it with the suffix `.json`.
        facts: network, weights, settings and versions; the file is used again while they stay the same.
        component: name of the component.
        graph_sha256: hash of the graph and of its weights, also of those in another file.
        opset: ONNX opset.
        nodes_before: number of nodes as traced, before constant folding.
        nodes_after: number of nodes in the file.
        operators: operator -> number of its nodes in the file.
        dtype: dtype of the computation.
        stored_dtype: dtype of large weights in the file.
        forms: `"friendly"`, or `"original"` if the network was traced without rewriting.
        dynamic_axes: input -> {axis: name} of the axes that may vary.
        fixed_axes: input -> {axis: size} of the axes that were to vary but are fixed.
        ranges: axis name -> traced range of sizes, e.g. `"4*k + 1, k = 1 to 256"`.
        shape: clip of the example inputs.
        size_bytes: size of the graph and its weights.
        weights_file: name of the file of weights; empty when they are in the graph. Other graphs may use the file too.
        weights_written_bytes: bytes that this export added to the file of weights.
        time_ms: time of the export, or of the check of the existing file when `cached`.
        simplified: whether onnxsim simplified the graph.
        trace_reused: whether a kept trace of a network of the same architecture was used.
        notes: remarks for the reader, each one line.
    """

    KIND: ClassVar[str] = "export report"
    FORMAT: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "export it again with wanlab.export.export"

    component: str
    graph_sha256: str
    opset: int
    nodes_before: int
    nodes_after: int
    operators: dict[str, int]
    dtype: str
    stored_dtype: str
    forms: str
    dynamic_axes: dict[str, dict[int, str]]
    fixed_axes: dict[str, dict[int, int]]
    ranges: dict[str, str]
    shape: ClipShape
    size_bytes: int
    time_ms: float
    weights_file: str
    weights_written_bytes: int
    simplified: bool
    trace_reused: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """Path of the report of an ONNX file."""
        return Path(path).with_suffix(".json")

    def damage(self) -> str:
        path = Path(self.path)
        same = graphs.file_bytes(path) == self.size_bytes and graph_sha256(path) == self.graph_sha256
        return "" if same else f"{path.name} or its weights were changed"

    @property
    def external_data(self) -> bool:
        """Whether the weights are in a separate file."""
        return bool(self.weights_file)

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        axes = sorted({name for axes in self.dynamic_axes.values() for name in axes.values()})
        fixed = sorted(
            {
                f"{name}[{axis}]={size}"
                for name, axes in self.fixed_axes.items()
                for axis, size in axes.items()
            }
        )
        return {
            "component": self.component,
            "opset": self.opset,
            "dtype": self.dtype,
            "stored_dtype": self.stored_dtype,
            "forms": self.forms,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "dynamic_axes": ", ".join(axes),
            "fixed_axes": ", ".join(fixed),
            "size_bytes": self.size_bytes,
            "time_ms": self.time_ms,
            "simplified": self.simplified,
            "external_data": self.external_data,
            "cached": self.cached,
            "trace_reused": self.trace_reused,
            "notes": "; ".join(self.notes),
        }


def report_frame(reports: list[ExportReport]) -> pd.DataFrame:
    """One row per export, the columns of `ExportReport.row`."""
    return pd.DataFrame([report.row() for report in reports])


def axes_table(reports: list[ExportReport]) -> pd.DataFrame:
    """Sizes that each graph accepts: component, dynamic_axes, fixed_axes, notes, sizes (the range of every free axis)."""
    sizes = ["; ".join(f"{axis}: {text}" for axis, text in report.ranges.items()) for report in reports]
    return report_frame(reports)[["component", "dynamic_axes", "fixed_axes", "notes"]].assign(sizes=sizes)


def export(
    model,
    component: str,
    path: str | os.PathLike,
    *,
    opset: int | None = None,
    dtype: str | None = None,
    stored_dtype: str | None = None,
    simplify: bool = True,
    dynamic: bool = True,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    external_data: bool | None = None,
    forms: str = "friendly",
    reuse: bool = True,
) -> ExportReport:
    """Write one component as an ONNX file and a report beside it.

    torch.export traces the network without its weights, the dynamo exporter of torch.onnx converts it, constants are
    folded, onnxsim simplifies the graph, the weights are written one at a time, and onnx.checker checks the file. Besides
    the network this needs memory for the graph and the largest weight. Node names begin with the module path; the file's
    metadata names model, component and wanlab version. The network is not changed.

    Args:
        model: a model from `wanlab.models.load` whose components are eager.
        component: `"text_encoder"`, `"vae_encoder"`, `"expert_high"`, `"expert_low"` (`"expert"` if there is only one),
            or `"vae_decoder"`.
        path: path of the `.onnx` file; its folder is created.
        opset: 17 to 24; None is 20, or 23 in bfloat16. From 23 on attention, rotary embedding and root-mean-square norms
            are single operators.
        dtype: dtype of the computation, `"float32"`, `"bfloat16"` or `"float16"`; None is the network's. Modules that
            the library keeps in float32 stay in float32.
        stored_dtype: dtype of large weights in the file, with a Cast after each; None is `dtype`. Graphs with one
            `stored_dtype` in one folder share a file of weights.
        simplify: whether onnxsim simplifies the graph.
        dynamic: whether batch, frames, height, width and text tokens may vary; False fixes all of them.
        height, width, frames, text_tokens, batch: size of the clip that the graph is checked with and, where nothing may
            vary, fixed to, height and width in pixels; None is the model's default, and batch 2 (tracing with 1 would
            fix it), or 1 when nothing may vary.
        external_data: whether weights are in a separate file; None decides by size: above 1.5 GiB, because the limit of
            protobuf is 2 GiB.
        forms: `"friendly"`, or `"original"` to trace the network without rewriting, for a comparison.
        reuse: whether to keep a file that was made from the same weights, settings and versions.

    Raises:
        WanlabError: unknown component, dtype or form, a component that is not convertible, an illegal size or
            opset.
    """
    begin = time.perf_counter()
    if forms not in FORMS:
        raise WanlabError(f"unknown forms {forms!r}{did_you_mean(forms, FORMS)}; give {' or '.join(FORMS)}")
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise WanlabError(
            f"{path} does not end in .onnx; give the file to write, e.g. {path / (component + '.onnx')}"
        )
    plan = component_spec(model, component)
    batch = batch or (
        TRACED_BATCH if dynamic and any(plan.inputs.values()) else usual_batch(model, component)
    )
    shape = default_shape(
        model, batch=batch, height=height, width=width, frames=frames, text_tokens=text_tokens
    )
    latent_size(model, shape)  # refuses a size that the model cannot have
    kind = chosen_dtype(dtype, plan.network.dtype)
    stored = chosen_dtype(stored_dtype, kind)
    opset = chosen_opset(opset, str(kind))
    settings = {
        "opset": opset,
        "dynamic": dynamic,
        "shape": asdict(shape),
        "dtype": str(kind),
        "forms": forms,
    }
    if not plan.sized:  # pipelines of a family call one network in several ways
        settings["pipeline"] = model.spec.pipeline_class
    trace_sources = trace_facts(plan, settings)
    weights = weights_key(plan.network)
    finishing = {"simplify": simplify, "external_data": external_data, "stored_dtype": str(stored)}
    facts = {"component": component, "weights": weights, "finishing": finishing} | trace_sources
    if reuse and (known := ExportReport.current(path, facts)[0]) is not None:
        return replace(known, time_ms=(time.perf_counter() - begin) * 1e3)

    # A graph whose sizes are free does not depend on the clip that it was traced with: one trace serves all sizes.
    example, free = shape, dynamic and plan.sized
    if free and model.spec.sizes_stated:
        example = default_shape(model, batch=batch)
    elif (
        free
    ):  # no sizes of its own: the clip that was asked for, with the three latent frames that tracing takes
        frames = max(shape.frames, 2 * model.spec.temporal_factor + 1)
        example = default_shape(model, **asdict(shape) | {"frames": frames})
    trace_settings = {"opset": opset, "dynamic": dynamic, "dtype": kind, "forms": forms}

    def traced_with(clip: ClipShape) -> tuple[Trace, bool]:
        key = key_of(trace_sources | {"settings": settings | {"shape": asdict(clip)}})
        return kept_trace(plan.network, key, lambda: trace(model, component, clip, **trace_settings))

    traced, reused = traced_with(example)
    if traced.notes and example != shape:  # the network ties sizes down, to those of the clip
        traced, reused = traced_with(shape)
    before = ExportReport.find(path)
    file = path.parent / f"{component}.{str(stored).removeprefix('torch.')}.{weights[:8]}.weights"
    finished = graphs.finish(
        traced.model,
        plan.network,
        path,
        axis_names=plan.inputs if dynamic else {},
        simplify=simplify,
        weights=WeightsFile(file, weights),
        external_data=external_data,
        stored=stored,
        metadata=_metadata(model, component, shape),
    )
    report = write_report(
        path,
        facts,
        traced,
        finished,
        plan.inputs if dynamic else {},
        component=component,
        opset=opset,
        dtype=str(kind).removeprefix("torch."),
        stored_dtype=str(stored).removeprefix("torch."),
        forms=forms,
        shape=shape,
        time_ms=(time.perf_counter() - begin) * 1e3,
        trace_reused=reused,
    )
    if before is not None and before.weights_file not in ("", report.weights_file):
        _drop_unused(path.parent / before.weights_file)
    return report


def write_report(
    path: Path,
    facts: dict[str, Any],
    traced: Trace,
    finished: graphs.Finished,
    free_axes: Mapping[str, Mapping[int, str]],
    **details: Any,
) -> ExportReport:
    """Write the report of a finished graph beside it.

    Args:
        path: path of the graph.
        facts: what it was made from.
        free_axes: input -> {axis: name} of the axes that were asked to vary.
        details: the other fields of `ExportReport`.
    """
    dynamic, fixed = {}, {}
    for name, axes in free_axes.items():
        free, sizes = finished.free_axes[name], finished.sizes[name]
        dynamic[name] = {axis: title for axis, title in axes.items() if axis in free}
        if tied := {axis: int(sizes[axis]) for axis in axes if axis not in free}:
            fixed[name] = tied
    report = ExportReport(
        path=str(path),
        facts=facts,
        graph_sha256=graph_sha256(path),
        nodes_before=finished.nodes_before,
        nodes_after=finished.nodes_after,
        operators=finished.operators,
        dynamic_axes=dynamic,
        fixed_axes=fixed,
        ranges=traced.ranges,
        size_bytes=finished.size_bytes,
        weights_file=finished.weights_file,
        weights_written_bytes=finished.weights_written_bytes,
        simplified=finished.simplified,
        notes=(*traced.notes, *finished.notes),
        **details,
    )
    report.write()
    return report


def check_graph(path: str | os.PathLike, component: str | None = None) -> None:
    """Refuse an exported graph that was changed, or is of another component; a graph without a report passes.

    Args:
        component: component that it is to run; None is any.

    Raises:
        WanlabError: the graph or its weights differ from what was exported, or it is of another component.
    """
    try:
        report = ExportReport.read(path)
    except NoManifest:
        return
    if damage := report.damage():
        raise WanlabError(f"{path} is not what was exported ({damage}); {report.AGAIN}")
    if component is not None and report.component.partition(".")[0] != component:
        raise WanlabError(f"{path} was exported from {report.component}; it cannot run {component}")


def export_all(
    model,
    folder: str | os.PathLike,
    components: tuple[str, ...] | None = None,
    *,
    dynamic: bool | Collection[str] = True,
    progress: bool = True,
    **settings,
) -> list[ExportReport]:
    """Export components to `folder/<component>.onnx`, in the order of a generation.

    Networks of one architecture (the two experts) share one trace: for the second only the weights are written. Several
    processes may export to one folder: with a lock beside it only one of them writes the files.

    Args:
        model: a model from `wanlab.models.load` whose components are eager.
        folder: folder of the files.
        components: components to export; None takes all of the model.
        dynamic: whether sizes may vary, for all components or for those that are named. Fixed sizes export several times
            faster.
        progress: whether to show a progress bar.
        settings: as in `export`.

    Raises:
        WanlabError: as `export`; unknown names are refused before any work is done.
    """
    names = components_of(model) if components is None else tuple(components)
    check_components(model, names)
    free = names if dynamic is True else () if dynamic is False else tuple(dynamic)
    check_components(model, free)
    folder, reports = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(names, desc="export", unit="component", leave=False, disable=not progress)
    place = folder.resolve()
    with FileLock(place.with_name(f".{place.name}.lock")):
        for name in bar:
            bar.set_postfix_str(name)
            file = folder / f"{name}.onnx"
            reports.append(export(model, name, file, dynamic=name in free, **settings))
    return reports


def _metadata(model, component: str, shape: ClipShape) -> dict[str, str]:
    lora = model.spec.lora_identity(component)
    return {
        "wanlab_version": __version__,
        "model": model.spec.name,
        "component": component,
        "shape": json.dumps(asdict(shape)),
    } | ({"lora": lora} if lora else {})


def _drop_unused(weights: Path) -> None:
    """Remove a file of weights that no graph of the folder uses any more."""
    others = [ExportReport.find(file.with_suffix(".onnx")) for file in weights.parent.glob("*.json")]
    if not any(report is not None and report.weights_file == weights.name for report in others):
        for file in (weights, weights.with_name(f"{weights.name}.json")):
            file.unlink(missing_ok=True)
