"""The ONNX graph that an engine is built from: what can be said of it without its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wanlab.convert.engine import TensorType
from wanlab.convert.onnx.graph import file_bytes
from wanlab.convert.onnx.identity import file_sha256, graph_sha256
from wanlab.convert.onnx.report import read_report, sidecar
from wanlab.convert.tensorrt.profile import traced_range
from wanlab.errors import WanlabError


@dataclass(frozen=True, eq=False)
class Source:
    """An ONNX file.

    Attributes:
        inputs, outputs: tensor -> dtype as torch names it, and shape; a free axis is its name.
        metadata: what the exporter wrote into it: model, component, shape; and what quantising wrote.
        traced: axis -> smallest and largest size that it was traced for, as far as a report beside it says.
        size_bytes: of the graph and the weights that it uses.
    """

    path: Path
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    metadata: dict[str, str]
    traced: dict[str, tuple[int, int]]
    size_bytes: int

    @property
    def numbers(self) -> str:
        """What the graph computes in, e.g. `"float16"` or `"float32, 42 x int8"`."""
        kinds = (dtype for dtype, _ in (*self.inputs.values(), *self.outputs.values()))
        first = next((kind for kind in kinds if "float" in kind), "")
        quantised = json.loads(self.metadata.get("wanlab_format", "{}"))
        return ", ".join([first, *(f"{count} x {name}" for name, count in quantised.items())])

    @cached_property
    def operators(self) -> dict[str, str]:
        """Node -> its operator."""
        import onnx

        return {node.name: node.op_type for node in onnx.load(self.path, load_external_data=False).graph.node}

    @cached_property
    def graph_sha256(self) -> str:
        """Hash of the graph and of every file of weights that it names."""
        return graph_sha256(self.path)

    @cached_property
    def file_sha256(self) -> str:
        """Hash of the `.onnx` file alone, which names its weights by their hash."""
        return file_sha256(self.path)


def read_source(path: str | os.PathLike[str]) -> Source:
    """Look at an ONNX file.

    Raises:
        WanlabError: no such file, or none that onnx can read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise WanlabError(f"no ONNX file at {path}; make it with wanlab.convert.export")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise WanlabError(f"{path} is no ONNX file ({error}); make it with wanlab.convert.export") from None
    weights = {tensor.name for tensor in model.graph.initializer}
    return Source(
        path,
        {value.name: _type_of(value) for value in model.graph.input if value.name not in weights},
        {value.name: _type_of(value) for value in model.graph.output},
        {entry.key: entry.value for entry in model.metadata_props},
        _traced(path),
        file_bytes(path),
    )


def _type_of(value: Any) -> TensorType:
    import onnx

    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}[{axis}]"
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
    )
    return {"float": "float32", "double": "float64"}.get(name, name), shape


def _traced(path: Path) -> dict[str, tuple[int, int]]:
    report = read_report(path)
    if report is None:  # a quantised graph names the one it came from
        try:
            report = read_report(json.loads(sidecar(path).read_text(encoding="utf-8"))["source"])
        except (OSError, ValueError, TypeError, KeyError):
            report = None
    ranges = {} if report is None else {axis: traced_range(text) for axis, text in report.ranges.items()}
    return {axis: found for axis, found in ranges.items() if found is not None}
