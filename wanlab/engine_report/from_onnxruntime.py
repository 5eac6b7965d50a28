"""Layers with times from ONNX Runtime's profile and optimised graph; fusions between two graphs."""

from __future__ import annotations

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.core.formats import element_name
from wanlab.engine_report.from_onnx import read_onnx
from wanlab.engine_report.layers import EngineLayers, Layer, Tensor, join, onnx_kind, precision_of
from wanlab.engine_report.schema import NodeEvent, read_json, typed
from wanlab.engines.onnxruntime import LEVELS, PROVIDERS, choose_provider

_SUFFIX = "_kernel_time"
MARK = "wanlab"
"""Category of an event with the settings of a profile."""
LONGEST_US = 86_400e6
"""A longer event of a profile, of more than a day, is a mistake of the profiler; so is one of negative duration."""
WITH_BODIES = ("Loop", "If", "Scan")
LAUNCHES = (
    "times of CUDA nodes are times of launches on the host, not of kernels: profile with CUDA_LAUNCH_BLOCKING=1 in the"
    " environment to time kernels"
)


def read_ort_profile(
    profile: str | os.PathLike | list,
    onnx_path: str | os.PathLike | None = None,
    *,
    name: str = "",
    warmup: int = 1,
    blocking: bool = False,
) -> EngineLayers:
    """Layers of an ONNX Runtime session with their times.

    Args:
        profile: the JSON that a session with `SessionOptions.enable_profiling` writes (`OrtEngine.profile`), plain or
            as `.gz`, or its content.
        onnx_path: the graph that ran, preferably as the session optimised it (`optimised_graph`). It has the weights and
            neighbours, from which modules of nodes of ONNX Runtime are found. The graph before optimisation has them only
            for nodes that were not changed.
        name: name for headings; the file name by default.
        warmup: number of first runs to leave out, if there are more.
        blocking: whether the profile was taken with `CUDA_LAUNCH_BLOCKING=1`, so that times of CUDA nodes are times of
            kernels; profiles of `profile_engine` contain this.

    Returns:
        A layer per node in the order of the first run, with the median time of the runs. `facts`: runs, run_ms (median
        time of a whole run under the profiler), load_ms, peak_arena_bytes.

    Raises:
        WanlabError: no such profile, one with fields of another type, or one without nodes.
    """
    content = profile if isinstance(profile, list) else read_json(profile)
    name = name or ("onnxruntime" if isinstance(profile, list) else Path(profile).name)
    if not isinstance(content, list) or not all(isinstance(event, Mapping) for event in content):
        raise WanlabError(f"{name} is no profile of ONNX Runtime; write one with OrtEngine.profile")
    read: list[NodeEvent] = typed(content, list[NodeEvent], name)
    events = [event for event in read if 0 <= event.dur <= LONGEST_US]
    nodes = [e for e in events if e.cat == "Node" and e.name.endswith(_SUFFIX)]
    if not nodes and len(events) < len(read):
        raise WanlabError(
            f"{name}: {len(read) - len(events)} of {len(read)} events have an impossible duration"
        )
    if not nodes:
        raise WanlabError(f"{name} has no node events: the session did not run while its profile was enabled")
    nodes.sort(key=lambda event: (event.ts, -event.dur))
    nodes, bodies = _outside_bodies(nodes)
    grouped: dict[tuple[str, str], list[NodeEvent]] = defaultdict(list)
    for event in nodes:
        grouped[event.name.removesuffix(_SUFFIX), str(event.args.node_index)].append(event)
    kernels = _kernel_ms(events)
    layers = [_layer(index, *item, warmup, kernels) for index, item in enumerate(grouped.items())]
    wholes = [e.dur / 1e3 for e in events if e.cat == "Session" and e.name == "model_run"]
    counts = {len(node_events) for node_events in grouped.values()}
    facts = {"runs": float(len(wholes[warmup:] or wholes) or min(counts))}
    if wholes:
        facts["run_ms"] = statistics.median(wholes[warmup:] or wholes)
    starts = [e.dur / 1e3 for e in events if e.name in ("model_loading_uri", "session_initialization")]
    if starts:
        facts["load_ms"] = sum(starts)
    if arena := max((e.args.mem_in_use_peak for e in nodes), default=0):
        facts["peak_arena_bytes"] = float(arena)
    blocking = blocking or any(e.args.launch_blocking == "1" for e in events if e.cat == MARK)
    on_gpu = any(layer.provider not in ("", "CPUExecutionProvider") for layer in layers)
    launches = on_gpu and not kernels and not blocking
    notes = [LAUNCHES] if launches else []
    if len(events) < len(read):
        notes.append(
            f"{len(read) - len(events)} of {len(read)} events have an impossible duration and are left out"
        )
    if bodies:
        notes.append(f"{bodies} nodes of bodies of Loop, If and Scan are part of the times of those")
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    metadata: dict[str, str] = {}
    if onnx_path is not None:
        graph = read_onnx(onnx_path, source="onnxruntime", sizes={})
        layers, missing = _with_graph(layers, graph)
        inputs, outputs, metadata = graph.inputs, graph.outputs, graph.metadata
        if missing:
            notes.append(
                f"{missing} of {len(layers)} nodes are not in {Path(onnx_path).name}, which is the graph before"
                " optimisation: their weights are unknown"
            )
    else:
        notes.append(
            "weights that ONNX Runtime packed are not in its profile: give the graph for weight bytes"
        )
    return EngineLayers(
        name,
        "onnxruntime",
        join(layers),
        inputs=inputs,
        outputs=outputs,
        metadata=metadata,
        facts=facts,
        times_of="launches" if launches else "layers",
        notes=tuple(notes),
    )


def merged(first: EngineLayers, second: EngineLayers) -> EngineLayers:
    """Two profiles of one engine as one; the samples of the first come before those of the second.

    Raises:
        WanlabError: their layers differ.
    """
    if [(layer.name, layer.type) for layer in first.layers] != [
        (layer.name, layer.type) for layer in second.layers
    ]:
        raise WanlabError(f"{first.name} and {second.name} are profiles of different engines")
    layers = []
    for one, other in zip(first.layers, second.layers, strict=True):
        samples = one.samples_ms + other.samples_ms
        time_ms = statistics.median(samples) if samples else (one.time_ms + other.time_ms) / 2
        layers.append(replace(one, samples_ms=samples, time_ms=time_ms))
    facts = {name: (value + second.facts.get(name, value)) / 2 for name, value in first.facts.items()}
    facts["runs"] = first.facts["runs"] + second.facts["runs"]
    latency_ms = (first.latency_ms + second.latency_ms) / 2
    return replace(first, layers=tuple(layers), facts=facts, latency_ms=latency_ms)


def _layer(
    index: int, key: tuple[str, str], node_events: list[NodeEvent], warmup: int, kernels: Mapping[str, float]
) -> Layer:
    name, _ = key
    arguments = node_events[0].args
    operator = arguments.op_name
    kind = onnx_kind(operator)
    inputs, outputs = (_tensors(side) for side in (arguments.input_type_shape, arguments.output_type_shape))
    samples = tuple(event.dur / 1e3 for event in node_events[warmup:] or node_events)
    time_ms = statistics.median(samples)
    if name in kernels:
        time_ms, samples = kernels[name] / len(node_events), ()
    return Layer(
        index=index,
        name=name,
        type=operator,
        kind=kind,
        provider=arguments.provider,
        inputs=inputs,
        outputs=outputs,
        precision=precision_of(kind, inputs, outputs),
        weight_bytes=arguments.parameter_size,
        time_ms=time_ms,
        samples_ms=samples,
    )


def _tensors(described: list[dict[str, list[int]]] | None) -> tuple[Tensor, ...]:
    """Tensors from `[{"float": [1, 24]}]`; they have no names in a profile."""
    return tuple(
        Tensor("", element_name(kind) or kind, tuple(shape))
        for one in described or ()
        for kind, shape in one.items()
    )


def _outside_bodies(nodes: list[NodeEvent]) -> tuple[list[NodeEvent], int]:
    """The events in order of time without those of nodes in a body, whose time its Loop, If or Scan has already; and the
    number of those nodes."""
    outside: list[NodeEvent] = []
    bodies: set[tuple[str, str]] = set()
    ends: dict[str, float] = defaultdict(lambda: -1.0)
    for event in nodes:
        thread = str(event.tid)
        if event.ts < ends[thread]:
            bodies.add((event.name, str(event.args.node_index)))
            continue
        outside.append(event)
        if event.args.op_name in WITH_BODIES:
            ends[thread] = event.ts + event.dur
    return outside, len(bodies)


def _kernel_ms(events: list[NodeEvent]) -> dict[str, float]:
    """Node -> time of its GPU kernels in all runs, if this build of ONNX Runtime records kernels."""
    total: dict[str, float] = defaultdict(float)
    for event in events:
        if event.cat == "Kernel" and event.args.parent_name:
            total[event.args.parent_name.removesuffix(_SUFFIX)] += event.dur / 1e3
    return dict(total)


def _with_graph(layers: list[Layer], graph: EngineLayers) -> tuple[list[Layer], int]:
    """Layers with tensors and weights of the graph and sizes of the run; and the number of nodes that the graph lacks."""
    by_name = {layer.name: layer for layer in graph.layers}
    sizes: dict[str, Tensor] = {}
    for layer in layers:
        if (node := by_name.get(layer.name)) is not None and node.type == layer.type:
            for named, sized in zip(node.outputs, layer.outputs, strict=False):
                sizes[named.name] = replace(named, dtype=sized.dtype, shape=sized.shape)
    completed: list[Layer] = []
    missing, seen = 0, set[str]()
    for layer in layers:
        node = by_name.get(layer.name)
        if node is None or node.type != layer.type:
            missing += 1
            completed.append(layer)
            continue
        inputs = tuple(sizes.get(tensor.name, tensor) for tensor in node.inputs)
        outputs = tuple(sizes.get(tensor.name, tensor) for tensor in node.outputs)
        fresh = [tensor for tensor in inputs if tensor.constant and tensor.name not in seen]
        seen.update(tensor.name for tensor in fresh)
        completed.append(
            replace(
                layer,
                subtype=node.subtype,
                modules=node.modules,
                joined_by=node.joined_by,
                inputs=inputs,
                outputs=outputs,
                precision=precision_of(layer.kind, inputs, outputs),
                weight_dtype=node.weight_dtype,
                weight_bytes=sum(tensor.size_bytes for tensor in fresh),
            )
        )
    return completed, missing


EXTERNAL_ABOVE_BYTES = 1024  # larger weights are stored in a separate file


def optimised_graph(
    path: str | os.PathLike, out: str | os.PathLike, *, provider: str = "cpu", optimization: str = "all"
) -> Path:
    """Write the graph that ONNX Runtime optimised for a provider; weights are written to `<out>.data`.

    This opens a session, which needs memory for the weights, and writes all of them.

    Args:
        path: ONNX file.
        out: `.onnx` file to write.
        provider: `"cpu"` or `"cuda"`, which have different fusions.
        optimization: level of optimisation as in `OrtEngine`.

    Raises:
        WanlabError: as `OrtEngine`.
    """
    ort = require("onnxruntime", "onnxruntime-gpu")
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    provider = choose_provider(provider)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{out.name}.data"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_ABOVE_BYTES)
    )
    if provider == "cuda":
        ort.preload_dlls()
    (out.parent / f"{out.name}.data").unlink(missing_ok=True)  # ONNX Runtime appends to it
    try:
        ort.InferenceSession(
            str(path), options, providers=list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
        )
    except Exception as error:  # onnxruntime has one exception class per failure, without a common base
        raise WanlabError(f"ONNX Runtime cannot optimise {Path(path).name}: {first_line(error)}") from error
    return out


def fusions(before: EngineLayers | None, after: EngineLayers | None) -> pd.DataFrame:
    """Numbers of operators in a graph and in the engine; no rows if one of the two is unknown.

    Returns:
        type, layers_before, layers_after, change, roles (with the largest changes first); rows with the largest change
        first.
    """
    sides = (before, after) if before is not None and after is not None else ()
    counts = [Counter((layer.type, layer.role) for layer in side.layers) for side in sides]
    rows = []
    for kind in dict.fromkeys(kind for side in counts for kind, _ in side):
        roles = {role for side in counts for name, role in side if name == kind}
        changes = {role: counts[1][kind, role] - counts[0][kind, role] for role in roles}
        count_before, count_after = (sum(side[kind, role] for role in roles) for side in counts)
        changed = [
            role for _, role in sorted((-abs(change), role) for role, change in changes.items() if change)
        ]
        rows.append(
            (
                kind,
                count_before,
                count_after,
                count_after - count_before,
                ", ".join(f"{role} {changes[role]:+d}" for role in changed),
            )
        )
    frame = pd.DataFrame(rows, columns=["type", "layers_before", "layers_after", "change", "roles"])
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def fused_layers(before: EngineLayers, after: EngineLayers) -> pd.DataFrame:
    """Fused layers of an engine and their modules.

    Returns:
        name, type, modules, nodes_before (number of nodes of the same modules in the graph that the engine does not
        have). Only layers of a type that the graph does not have, or with several modules.
    """
    kinds = {layer.type for layer in before.layers}
    names = {layer.name for layer in after.layers}
    replaced = Counter(layer.modules for layer in before.layers if layer.name not in names)
    rows = [
        {
            "name": layer.name,
            "type": layer.type,
            "modules": ", ".join(layer.modules),
            "nodes_before": replaced[layer.modules] if len(layer.modules) == 1 else len(layer.nodes),
        }
        for layer in after.layers
        if layer.modules and (layer.type not in kinds or len(layer.modules) > 1)
    ]
    return pd.DataFrame(rows, columns=["name", "type", "modules", "nodes_before"])
