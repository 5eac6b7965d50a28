"""Files of other programs as records: what wanlab reads of ONNX Runtime's profiles, TensorRT's inspector, and trtexec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from wanlab.core import limits
from wanlab.core.errors import WanlabError
from wanlab.core.packed import as_utf8, read_unpacked
from wanlab.core.text import convert, parse_json

Time = Annotated[float, Meta(ge=0, le=1e12)]
"""A duration in the unit of its file; NaN and what is longer than years is a mistake."""
Bytes = Annotated[int, Meta(ge=0, le=2**44)]
Size = Annotated[int, Meta(ge=-1, le=2**40)]
"""Size of an axis; -1 where it is free."""


class NodeArgs(Struct):
    """Arguments of an event of ONNX Runtime's profile."""

    op_name: str = ""
    node_index: str | int = ""
    provider: str = ""
    input_type_shape: list[dict[str, list[Size]]] | None = None
    output_type_shape: list[dict[str, list[Size]]] | None = None
    parameter_size: Bytes = 0
    mem_in_use_peak: Bytes = 0
    parent_name: str = ""
    launch_blocking: str = ""


class NodeEvent(Struct):
    """An event of ONNX Runtime's profile; times in microseconds, of which some profilers write impossible ones."""

    cat: str = ""
    name: str = ""
    tid: int | float | str | None = 0
    ts: float = 0.0
    dur: float = 0.0
    args: NodeArgs = msgspec.field(default_factory=NodeArgs)


class InspectorTensor(
    Struct,
    rename={
        "name": "Name", "sizes": "Dimensions", "both": "Format/Datatype", "dtype": "DataType", "dtype_11": "Datatype",
        "form": "Format", "mode": "IOMode",
    },
):  # fmt: skip
    """A tensor in the inspector's JSON. TensorRT 10 has one field for format and type; 11 has two, one in two spellings."""

    name: str = ""
    sizes: list[Size] | None = None
    both: str = ""
    dtype: str | None = None
    dtype_11: str | None = None
    form: str | None = None
    mode: str = ""


class InspectorWeights(Struct, rename={"dtype": "Type", "count": "Count"}):
    """Weights of a layer in the inspector's JSON."""

    dtype: str = ""
    count: Bytes = 0


class InspectorLayer(
    Struct,
    rename={
        "name": "Name", "kind": "LayerType", "parameter_kind": "ParameterType", "tactic": "TacticName",
        "tactic_value": "TacticValue", "stream": "StreamId", "metadata": "Metadata", "inputs": "Inputs",
        "outputs": "Outputs", "constants": "Constants", "weights": "Weights", "bias": "Bias",
    },
):  # fmt: skip
    """A layer in the inspector's JSON; `outputs` is None where the engine was built without detailed information."""

    name: str = ""
    kind: str = ""
    parameter_kind: str = ""
    tactic: str | None = None
    tactic_value: str | int | None = None
    stream: str | int | None = None
    metadata: str | None = ""
    inputs: list[InspectorTensor | str] = []
    outputs: list[InspectorTensor | str] | None = None
    constants: list[InspectorTensor | str] | None = None
    weights: InspectorWeights | None = None
    bias: InspectorWeights | None = None


class Inspector(
    Struct,
    rename={
        "layers": "Layers", "bindings": "Bindings", "tensors": "I/O Tensors", "metadata": "Engine Metadata",
    },
):  # fmt: skip
    """The inspector's JSON."""

    layers: list[InspectorLayer | str]
    bindings: list[str] = []
    tensors: list[InspectorTensor] | None = None
    metadata: Any = None


class LayerTime(Struct):
    """A row of `trtexec --exportProfile`; the first has only the number of runs."""

    count: Annotated[int, Meta(ge=0, le=2**40)] | None = None
    name: str | None = None
    timeMs: Time | None = None
    averageMs: Time | None = None
    medianMs: Time | None = None


class PlannedLayer(Struct):
    """A layer in the report beside a graph that wanlab quantised."""

    layer: str
    format: str


class RunTime(Struct):
    """A row of `trtexec --exportTimes`."""

    computeMs: Time


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file, plain, as gzip or in a zip.

    Raises:
        WanlabError: no such file, one that is too large, damaged or too deep, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise WanlabError(f"no file at {path}")
    text = as_utf8(read_unpacked(path))
    limits.check("json_objects", text.count(b"{"), f"{path}: objects of JSON")
    return parse_json(text.decode(), str(path))


def typed(value: Any, kind: Any, where: str) -> Any:
    """A value from JSON as a record; numbers may be text.

    Raises:
        WanlabError: a field is missing or of another type; the message names it.
    """
    return convert(dict(value) if isinstance(value, Mapping) else value, kind, where, strict=False)
