"""Any source of layers, told by what is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wanlab.convert.card.files import read_json
from wanlab.convert.card.graph import read_onnx
from wanlab.convert.card.inspector import read_inspector
from wanlab.convert.card.layers import EngineLayers
from wanlab.convert.card.profile import read_ort_profile
from wanlab.convert.card.times import latency_of, with_times
from wanlab.errors import WanlabError


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
