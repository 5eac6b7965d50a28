"""Layers from TensorRT's inspector JSON, and times from trtexec."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.core.formats import ITEM_BYTES, element_in
from wanlab.engine_report.layers import (
    EngineLayers,
    Layer,
    Tensor,
    join,
    onnx_nodes,
    precision_of,
    tensorrt_kind,
)
from wanlab.engine_report.schema import (
    Inspector,
    InspectorLayer,
    InspectorTensor,
    LayerTime,
    RunTime,
    Time,
    read_json,
    typed,
)


def with_times(layers: EngineLayers, profile: str | os.PathLike | list) -> EngineLayers:
    """The layers with the times of `trtexec --exportProfile`, matched by the layers' names.

    Args:
        profile: a file or its content: `[{"count": n}, {"name", "timeMs", "averageMs", "medianMs", ...}, ...]`. The
            median is used; without one the average, or the total time divided by the number of runs.

    Raises:
        WanlabError: another kind of file, or none of its layers is in the engine.
    """
    data = profile if isinstance(profile, list) else read_json(profile)
    if not isinstance(data, list) or not all(isinstance(row, Mapping) for row in data):
        raise WanlabError("a profile is a list of objects, as trtexec --exportProfile writes it")
    where = "the profile" if isinstance(profile, list) else str(profile)
    rows = typed(data, list[LayerTime], where)
    runs = next((row.count for row in rows if row.count is not None), 0)
    times = {row.name: _time(row, runs) for row in rows if row.name is not None}
    names = {layer.name for layer in layers.layers}
    matched = names & set(times)
    if not matched:
        raise WanlabError(
            f"no layer of {layers.name} is in the profile; give the profile of the same engine"
            " (trtexec --exportLayerInfo and --exportProfile of one run)"
        )
    notes = list(layers.notes)
    if len(names) > len(matched):
        notes.append(f"{len(names) - len(matched)} of {len(names)} layers have no time")
    unmatched = [name for name in times if name not in names]
    if unmatched:
        unmatched_ms = sum(times[name] for name in unmatched)
        notes.append(f"{len(unmatched)} timed layers, {unmatched_ms:.3f} ms, are not in the engine")
    return replace(
        layers,
        layers=tuple(replace(layer, time_ms=times.get(layer.name, math.nan)) for layer in layers.layers),
        facts=layers.facts | ({"runs": runs} if runs else {}),
        notes=tuple(notes),
    )


def read_latency(path: str | os.PathLike) -> float:
    """Median time of a whole run in ms, without transfers, from a file.

    Args:
        path: JSON of `trtexec --exportTimes` or of `wanlab bench`.

    Raises:
        WanlabError: another kind of file.
    """
    return latency_of(read_json(path), str(path))


def latency_of(data: Any, name: str) -> float:
    """`read_latency` for the content of a file; `name` is for the error message."""
    values: Any = None
    if (
        isinstance(data, list)
        and data
        and all(isinstance(row, Mapping) and "computeMs" in row for row in data)
    ):
        values = [row.computeMs for row in typed(data, list[RunTime], name)]
    elif isinstance(data, Mapping) and isinstance(data.get("samples"), Mapping):
        samples = data["samples"].get("device") or data["samples"].get("latency")
        values = samples.get("values_ms") if isinstance(samples, Mapping) else samples
        values = typed(values or [], list[Time], name)
    if not values or not statistics.median(values) > 0:
        raise WanlabError(
            f"{name} has no times of runs above 0; give a file of trtexec --exportTimes or wanlab bench"
        )
    return float(statistics.median(values))


def _time(row: LayerTime, runs: int) -> float:
    for value in (row.medianMs, row.averageMs):
        if value is not None:
            return value
    return row.timeMs / runs if row.timeMs is not None and runs else math.nan


REBUILD = (
    "build the engine again with config.profiling_verbosity = ProfilingVerbosity.DETAILED"
    " (trtexec --profilingVerbosity=detailed) and inspect the new one"
)
_PROFILE = re.compile(r" \[profile (\d{1,6})\]$")


def read_inspector(
    source: str | os.PathLike | Mapping[str, Any], *, name: str = "", profile: int = 0
) -> EngineLayers:
    """Layers of a TensorRT engine from the JSON of its inspector.

    Args:
        source: a file (`.json` or `.json.gz`) or its content, from `get_engine_information(LayerInformationFormat.JSON)`,
            `trtexec --exportLayerInfo`, or the `.layers.json` that wanlab writes beside an engine. TensorRT 10 names the
            engine's inputs and outputs under `Bindings`; 11 describes them under `I/O Tensors` and has two fields instead
            of `Format/Datatype`.
        name: name for headings; the file name by default.
        profile: number of the optimisation profile, if an engine has several.

    Raises:
        WanlabError: another kind of file, or an engine that was built without detailed layer information.
    """
    data = source if isinstance(source, Mapping) else read_json(source)
    name = name or ("engine" if isinstance(source, Mapping) else os.path.basename(source))
    if not isinstance(data, Mapping) or not isinstance(data.get("Layers"), list):
        raise WanlabError(
            f"{name} is no inspector JSON: it has no list of Layers; write it with"
            " engine.create_engine_inspector().get_engine_information(LayerInformationFormat.JSON)"
        )
    inspector = typed(data, Inspector, name)
    raw = [layer for layer in inspector.layers if not isinstance(layer, str)]
    if not inspector.layers:
        raise WanlabError(f"{name} has no layers: its profiling verbosity was NONE; {REBUILD}")
    if len(raw) < len(inspector.layers) or any(layer.outputs is None for layer in raw):
        raise WanlabError(f"{name} has names of layers only; {REBUILD}")
    selected = [layer for layer in raw if _profile_of(layer.name) in (None, profile)]
    if not selected or (profile and all(_profile_of(layer.name) is None for layer in raw)):
        raise WanlabError(f"{name} has no optimisation profile {profile}; profile 0 is the first")
    seen: set[str] = set()
    layers = [_layer(index, layer, seen) for index, layer in enumerate(selected)]
    inputs, outputs = _bindings(inspector, layers)
    notes = []
    if len(selected) < len(raw):
        notes.append(f"{len(raw) - len(selected)} layers of other optimisation profiles are left out")
    if all(layer.constants is None for layer in selected):
        notes.append("the inspector does not give the weights of every layer: weight bytes are a lower bound")
    if any(layer.kind != "shape" and not layer.activation_bytes for layer in layers):
        notes.append("sizes of free axes are not in an engine: activation bytes are unknown or a lower bound")
    return EngineLayers(
        name,
        "tensorrt",
        join(layers),
        inputs=inputs,
        outputs=outputs,
        notes=tuple(notes),
        metadata=_metadata(inspector.metadata),
    )


def dtype_in(text: str) -> str:
    """Number format in a text of the inspector: `"fp16"` for `"Row major linear FP16 format"`, `"Half"`; empty if none."""
    return element_in(text)


def _layer(index: int, raw: InspectorLayer, seen: set[str]) -> Layer:
    tactic = raw.tactic if raw.tactic is not None else str(raw.tactic_value or "")
    kind = tensorrt_kind(raw.kind, raw.name, tactic)
    inputs = tuple(_tensor(tensor) for tensor in raw.inputs)
    outputs = tuple(_tensor(tensor) for tensor in raw.outputs or ())
    if kind == "reformat" and inputs and outputs and inputs[0].dtype != outputs[0].dtype:
        kind = "cast"
    constants = tuple(replace(_tensor(tensor), constant=True) for tensor in raw.constants or ())
    weight_dtype, weight_bytes = _weights(raw, constants, seen)
    stream = str(raw.stream) if raw.stream is not None else ""
    return Layer(
        index=index,
        name=raw.name,
        type=raw.kind,
        kind=kind,
        subtype=raw.parameter_kind,
        tactic=tactic,
        stream=int(stream) if stream.isdecimal() and len(stream) < 9 else None,
        nodes=onnx_nodes(raw.metadata or ""),
        inputs=inputs + constants,
        outputs=outputs,
        precision=precision_of(kind, inputs, outputs),
        weight_dtype=weight_dtype if kind in ("matmul", "conv") else "",
        weight_bytes=weight_bytes,
    )


def _weights(raw: InspectorLayer, constants: tuple[Tensor, ...], seen: set[str]) -> tuple[str, int]:
    """Dtype of the largest weight, and bytes of the weights that no earlier layer has, from the fields that give them."""
    if constants:
        fresh = [tensor for tensor in constants if tensor.name not in seen]
        seen.update(tensor.name for tensor in constants)
        return max(constants, key=lambda tensor: tensor.size_bytes).dtype, sum(
            tensor.size_bytes for tensor in fresh
        )
    described = [weights for weights in (raw.weights, raw.bias) if weights is not None]
    dtypes = [dtype_in(weights.dtype) for weights in described]
    sizes = [ITEM_BYTES.get(d, 0.0) * w.count for d, w in zip(dtypes, described, strict=True)]
    return next(iter(dtypes), ""), math.ceil(sum(sizes))


def _tensor(raw: InspectorTensor | str) -> Tensor:
    if isinstance(raw, str):
        return Tensor(raw)
    dtype = next((text for text in (raw.dtype, raw.dtype_11) if text is not None), raw.both)
    form = raw.both if raw.form is None else raw.form
    shape = None if raw.sizes is None else tuple(size if size >= 0 else "?" for size in raw.sizes)
    return Tensor(raw.name, dtype_in(dtype) or dtype_in(form), shape, form)


def _bindings(data: Inspector, layers: list[Layer]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if data.tensors is not None:
        sides: dict[str, list[Tensor]] = {"input": [], "output": []}
        for raw in data.tensors:
            sides.setdefault(raw.mode.lower().removeprefix("k"), []).append(_tensor(raw))
        return tuple(sides["input"]), tuple(sides["output"])
    # TensorRT 10 has only names; direction and type are known from the layers that read or write the tensors.
    names = [_PROFILE.sub("", name) for name in data.bindings]
    read = {_PROFILE.sub("", t.name): t for layer in layers for t in layer.inputs}
    written = {_PROFILE.sub("", t.name): t for layer in layers for t in layer.outputs}
    unique = list(dict.fromkeys(names))
    outputs = tuple(written[name] for name in unique if name in written)
    return tuple(read.get(name, Tensor(name)) for name in unique if name not in written), outputs


def _metadata(metadata: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, Mapping) else {}


def _profile_of(name: str) -> int | None:
    match = _PROFILE.search(name)
    return int(match[1]) if match else None
