"""One table of an engine's layers, whatever it was read from."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wanlab.convert.card.kinds import PRODUCTS
from wanlab.convert.card.names import block_of, role_of, site_of

if TYPE_CHECKING:
    import pandas as pd

ITEM_BYTES = {
    "fp64": 8.0, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5, "int64": 8.0, "int32": 4.0, "int16": 2.0,
    "int8": 1.0, "uint8": 1.0, "int4": 0.5, "uint4": 0.5, "bool": 1.0,
}  # fmt: skip
FLOATS = ("fp64", "fp32", "bf16", "fp16")
CODES = ("fp8", "int8", "uint8", "fp4", "int4", "uint4")
"""Number formats of quantised tensors."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a layer.

    Attributes:
        dtype: `"fp32"`, `"bf16"`, `"int8"`, ...; empty where unknown.
        shape: None where unknown; a size that is not fixed is a string.
        format: layout in memory, as the engine says it.
        constant: a weight or another constant.
    """

    name: str
    dtype: str = ""
    shape: tuple[int | str, ...] | None = None
    format: str = ""
    constant: bool = False

    @property
    def size_bytes(self) -> int:
        """0 where dtype or shape is not known."""
        if self.shape is None or not all(isinstance(size, int) for size in self.shape):
            return 0
        return math.ceil(math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 0.0))


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, or one node of a graph.

    Attributes:
        index: place in the order of execution.
        type, subtype, tactic: as the engine says them. kind: one of `kinds.KINDS`.
        modules: of the network that it computes, several where layers were fused.
        joined_by: how they were found: `"name"`, `"weight"`, `"graph"` (of a neighbour), `"order"`, or empty.
        nodes: of the ONNX graph that it was made from, as far as it says.
        provider: of ONNX Runtime. stream: of TensorRT.
        precision: that it computes in, from its tensors; see `precision_of`. weight_dtype: that its weights are kept in.
        weight_bytes: of constants that no layer before it has.
        time_ms: median; NaN where it was not measured. samples_ms: one per run, where they are known.
    """

    index: int
    name: str
    type: str
    kind: str
    modules: tuple[str, ...] = ()
    joined_by: str = ""
    subtype: str = ""
    tactic: str = ""
    provider: str = ""
    stream: int | None = None
    nodes: tuple[str, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    precision: str = ""
    weight_dtype: str = ""
    weight_bytes: int = 0
    time_ms: float = math.nan
    samples_ms: tuple[float, ...] = ()

    @property
    def role(self) -> str:
        return role_of(self.modules, self.kind)

    @property
    def site(self) -> str:
        """`"blocks.*.attn1.to_q"`: its modules without the numbers of their blocks."""
        return site_of(self.modules)

    @property
    def block(self) -> int | None:
        return block_of(self.modules)

    @property
    def halves_ms(self) -> float:
        """Median of the first half of the runs less that of the second: what the same layer differs by.

        NaN with under 4 samples.
        """
        if len(self.samples_ms) < 4:
            return math.nan
        middle = len(self.samples_ms) // 2
        return statistics.median(self.samples_ms[:middle]) - statistics.median(self.samples_ms[middle:])

    @property
    def activation_bytes(self) -> int:
        """Of its outputs."""
        return sum(tensor.size_bytes for tensor in self.outputs)


@dataclass(frozen=True, eq=False)
class EngineLayers:
    """The layers of one engine in the order they run.

    Attributes:
        name: of the engine, for headings.
        source: `"tensorrt"`, `"onnxruntime"` or `"onnx"` (a graph that no engine has seen).
        inputs, outputs: of the whole engine.
        latency_ms: of the whole engine as measured apart from its layers; NaN where it was not.
        metadata: model and component where the source says them.
        facts: numbers about the whole that only some sources have (`peak_arena_bytes`, `runs`).
        times_of: `"layers"`, or `"launches"` where only what the host spent on each is known.
        notes: what a reader should know, one line each.
    """

    name: str
    source: str
    layers: tuple[Layer, ...]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    latency_ms: float = math.nan
    metadata: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    times_of: str = "layers"
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"EngineLayers({self.name!r}, {self.source}, {len(self.layers)} layers, {self.total_ms:.3f} ms)"
        )

    @property
    def timed(self) -> bool:
        """Whether any layer has a time."""
        return any(not math.isnan(layer.time_ms) for layer in self.layers)

    @property
    def total_ms(self) -> float:
        """Sum of all layers; NaN without times."""
        if not self.timed:
            return math.nan
        return math.fsum(layer.time_ms for layer in self.layers if not math.isnan(layer.time_ms))

    def with_latency(self, latency_ms: float) -> EngineLayers:
        """The same with the time of the whole engine."""
        return replace(self, latency_ms=latency_ms)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """A row per layer: the attributes of `Layer`, and site, role, block, activation_bytes, share_percent.

        `inputs` and `outputs` are text: `name fp16[1, 480, 192]`.
        """
        import pandas as pd

        total = self.total_ms
        rows = [
            {
                "index": layer.index,
                "name": layer.name,
                "modules": ", ".join(layer.modules),
                "site": layer.site,
                "role": layer.role,
                "block": layer.block,
                "kind": layer.kind,
                "type": layer.type,
                "subtype": layer.subtype,
                "precision": layer.precision,
                "weight_dtype": layer.weight_dtype,
                "time_ms": layer.time_ms,
                "share_percent": 100 * layer.time_ms / total if total else math.nan,
                "runs": len(layer.samples_ms),
                "weight_bytes": layer.weight_bytes,
                "activation_bytes": layer.activation_bytes,
                "provider": layer.provider,
                "stream": layer.stream,
                "tactic": layer.tactic,
                "inputs": "; ".join(f"{tensor.name} {described(tensor)}".strip() for tensor in layer.inputs),
                "outputs": "; ".join(
                    f"{tensor.name} {described(tensor)}".strip() for tensor in layer.outputs
                ),
                "nodes": ", ".join(layer.nodes),
                "joined_by": layer.joined_by,
            }
            for layer in self.layers
        ]
        frame = pd.DataFrame(rows)
        for column in ("block", "stream"):
            frame[column] = frame[column].astype("Int64") if rows else None
        return frame

    @functools.cached_property
    def edges(self) -> Edges:
        """Which layer reads what which other layer wrote."""
        return Edges(self.layers)


class Edges:
    """Neighbours of layers by the names of their tensors; places in the tuple, not `Layer.index`.

    TensorRT uses names of scratch tensors again: a reader belongs to the last writer before it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.before: list[list[int]] = [[] for _ in layers]
        self.after: list[list[int]] = [[] for _ in layers]
        writers: dict[str, int] = {}
        for place, layer in enumerate(layers):
            for tensor in layer.inputs:
                writer = writers.get(tensor.name) if tensor.name else None
                if writer is not None and writer not in self.before[place]:
                    self.before[place].append(writer)
                    self.after[writer].append(place)
            for tensor in layer.outputs:
                writers[tensor.name] = place


def precision_of(kind: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> str:
    """Number format that a layer computes in, from the dtypes of its tensors.

    A product computes in the narrowest format of its activations (an INT8 product has INT8 inputs and may write FP16);
    anything else in the widest float it touches; conversions are named by what they make.
    """
    inputs, outputs = list(inputs), list(outputs)
    made = [tensor.dtype for tensor in outputs if tensor.dtype]
    read = [tensor.dtype for tensor in inputs if tensor.dtype and not tensor.constant]
    if kind in ("cast", "quantize", "reformat", "copy"):
        return next(iter(made), "")
    known = [name for name in read if name in FLOATS or name in CODES] or [
        tensor.dtype for tensor in inputs if tensor.dtype in FLOATS or tensor.dtype in CODES
    ]
    if kind in PRODUCTS and known:
        return min(known, key=ITEM_BYTES.__getitem__)
    floats = [name for name in (*known, *made) if name in FLOATS]
    if floats:
        return max(floats, key=ITEM_BYTES.__getitem__)
    return next(iter(made or read), "")


def described(tensor: Tensor) -> str:
    """`fp16[1, 480, 192]`."""
    shape = "[?]" if tensor.shape is None else f"[{', '.join(map(str, tensor.shape))}]"
    return f"{tensor.dtype}{shape}"
