"""The number formats that were planned, from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.engine_report.from_onnx import read_onnx
from wanlab.engine_report.from_onnxruntime import read_ort_profile
from wanlab.engine_report.from_tensorrt import latency_of, read_inspector, read_json, with_times
from wanlab.engine_report.layers import EngineLayers


def read_planned(path: str | os.PathLike | None) -> dict[str, str]:
    """Pattern of module names -> number format, from a file; nothing from None.

    Args:
        path: YAML or JSON of a flat mapping, or the report that wanlab keeps beside a graph that it quantised (the
            graph's name with `.json`).

    Raises:
        WanlabError: no such file, or another content.
    """
    if path is None:
        return {}
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        yaml = require("yaml", "pyyaml")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise WanlabError(f"{path} cannot be read: {first_line(error)}") from error
    else:
        data = read_json(path)
    if isinstance(data, Mapping) and isinstance(data.get("layers"), list):
        data = {layer["layer"]: layer["format"] for layer in data["layers"] if isinstance(layer, Mapping)}
    if not isinstance(data, Mapping) or not all(isinstance(value, str) for value in data.values()):
        shown = json.dumps({"blocks.*.attn1.to_q": "int8"})
        raise WanlabError(f"{path} is no mapping of module patterns to formats; write {shown}")
    return {str(pattern): value for pattern, value in data.items()}


def read_layers(
    path: str | os.PathLike, beside: Sequence[str | os.PathLike] | None = None, *, blocking: bool = False
) -> EngineLayers:
    """The layers of an engine from whatever was saved of it; what a file is, is told by its content.

    Args:
        path: inspector JSON of TensorRT, profile of ONNX Runtime (both plain or `.gz`), or an ONNX graph.
        beside: files that go with it: the ONNX graph of a profile; layer times of `trtexec --exportProfile`; times of
            whole runs of `trtexec --exportTimes` or `wanlab bench`.
        blocking: the profile of ONNX Runtime was taken with `CUDA_LAUNCH_BLOCKING=1`.

    Raises:
        WanlabError: a file that is none of these, or one that does not go with `path`.
    """
    path, extra = Path(path), [Path(file) for file in beside or ()]
    graphs = [file for file in extra if file.suffix == ".onnx"]
    if path.suffix == ".onnx":
        layers = read_onnx(path)
    else:
        data = read_json(path)
        if isinstance(data, Mapping):
            layers = read_inspector(data, name=path.name)
        elif isinstance(data, list) and any(isinstance(event, Mapping) and "cat" in event for event in data):
            graph = graphs[0] if graphs else None
            layers = read_ort_profile(data, graph, name=path.name, blocking=blocking)
        else:
            raise WanlabError(
                f"{path} is neither inspector JSON of TensorRT nor a profile of ONNX Runtime; times of trtexec go beside"
                " the inspector JSON of their engine"
            )
    if graphs and layers.source != "onnxruntime":
        raise WanlabError(f"{graphs[0]} does not go with {path}: a graph goes with a profile of ONNX Runtime")
    for file in extra:
        if file in graphs:
            continue
        data = read_json(file)
        if isinstance(data, list) and any(isinstance(row, Mapping) and "timeMs" in row for row in data):
            if layers.source != "tensorrt":
                raise WanlabError(f"{file} does not go with {path}: times of layers go with inspector JSON")
            layers = with_times(layers, data)
        else:
            layers = layers.with_latency(latency_of(data, str(file)))
    return layers
