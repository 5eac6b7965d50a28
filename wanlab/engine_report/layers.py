"""One table of an engine's layers, whatever it was read from: roles, module names, sizes."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from wanlab.core.formats import CODES, FLOATS, ITEM_BYTES

KINDS = (
    "attention", "matmul", "conv", "norm", "softmax", "pointwise", "reduce", "layout", "gather",
    "cast", "quantize", "reformat", "copy", "shape", "sync", "other",
)  # fmt: skip
CONVERSIONS = ("cast", "quantize", "reformat", "copy")
PRODUCTS = ("attention", "matmul", "conv")

_ONNX = {
    "attention": "Attention MultiHeadAttention GroupQueryAttention PackedAttention PackedMultiHeadAttention QAttention "
    "DecoderMaskedMultiHeadAttention",
    "matmul": "MatMul Gemm FusedMatMul FusedGemm FusedMatMulActivation TransposeMatMul MatMulNBits MatMulInteger "
    "QLinearMatMul QGemm GemmFloat8 DynamicQuantizeMatMul MatMulIntegerToFloat",
    "conv": "Conv FusedConv NhwcConv NhwcFusedConv QLinearConv ConvInteger ConvTranspose",
    "norm": "LayerNormalization SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "RMSNormalization GroupNormalization GroupNorm SkipGroupNorm InstanceNormalization BatchNormalization "
    "LpNormalization",
    "softmax": "Softmax BiasSoftmax LogSoftmax",
    "cast": "Cast CastLike",
    "quantize": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "copy": "MemcpyToHost MemcpyFromHost Identity",
    "reformat": "ReorderInput ReorderOutput",
    "layout": "Reshape Transpose Squeeze Unsqueeze Flatten Slice Concat Split Expand Tile Pad DepthToSpace SpaceToDepth",
    "gather": "Gather GatherND GatherElements Scatter ScatterND ScatterElements OneHot",
    "shape": "Shape Size Range ConstantOfShape Constant",
}
_TENSORRT = {
    "attention": "attention mha fmha",
    "matmul": "matrixmultiply fullyconnected gemm caskgemmmatrixmultiply caskmatrixmultiply cublasltmatrixmultiply fc",
    "conv": "convolution caskconvolution caskgemmconvolution deconvolution caskdeconvolution deconvolutionv2 conv "
    "correlation",
    "norm": "normalization batchnormalization instancenormalization layernormalization",
    "softmax": "softmax softmaxv2 caskflattenconvolution_softmax raggedsoftmax",
    "pointwise": "pointwise pointwisev2 elementwise unary activation scale parametricrelu select",
    "reduce": "reduce topk cumulative",
    "layout": "shuffle slice concatenation padding resize noop squeeze unsqueeze",
    "gather": "gather scatter onehot nonzero fill",
    "cast": "cast",
    "quantize": "quantize dequantize dynamicquantize",
    "reformat": "reformat",
    "copy": "identity copy",
    "shape": "shape shape_call constant assertion",
    "sync": "signal wait trainstation fence",
}
_BY_OPERATOR = {name: kind for kind, names in _ONNX.items() for name in names.split()}
_BY_LAYER = {name: kind for kind, names in _TENSORRT.items() for name in names.split()}
_POINTWISE_NAMES = (
    "Add Sub Mul Div Pow Sqrt Exp Log Neg Abs Sin Cos Tanh Sigmoid Erf Relu Gelu QuickGelu FastGelu BiasGelu Silu Swish "
    "Clip Where Min Max Mod Floor Ceil Reciprocal Equal Less Greater And Or Not Sign Round RotaryEmbedding BiasAdd "
    "BiasSplitGelu IsNaN LeakyRelu Elu Softplus HardSigmoid Mish"
)
_POINTWISE = frozenset(_POINTWISE_NAMES.split())
_FUSED_ATTENTION = re.compile(r"f?mha|flash_?att|fused_?att", re.IGNORECASE)
_MYELIN = re.compile(r"__myl?e?_?n?_?([A-Z][A-Za-z0-9]*?)(?:_myl\d+\w*|_\d+|$)")
_ROUNDING = {"Mul", "Div", "Min", "Max", "Roun", "Cast"}
_MOVES = {"Tran", "Resh", "Move", "Repl", "Slic", "Conc", "Copy", "Shuf", "Pad"}


def onnx_kind(operator: str) -> str:
    """Kind of an ONNX operator, contributed ones of ONNX Runtime included."""
    if operator in _BY_OPERATOR:
        return _BY_OPERATOR[operator]
    if operator.startswith(("Reduce", "Arg", "CumSum", "TopK")):
        return "reduce"
    return "pointwise" if operator in _POINTWISE else "other"


def tensorrt_kind(layer_type: str, name: str = "", tactic: str = "") -> str:
    """Kind of a layer of an engine.

    Kernels that TensorRT's compiler made (`kgen`, `fusion`, `Myelin`) tell what they do only by their names, which are
    made of their operations: `__myl_MulMaxSubExpSum_myl0_12` is a softmax.
    """
    if _FUSED_ATTENTION.search(f"{layer_type} {name} {tactic}"):
        return "attention"
    kind = _BY_LAYER.get(layer_type.replace(" ", "").lower())
    if kind is not None:
        return kind
    found = _MYELIN.search(name)
    operations = set(re.findall(r"[A-Z][a-z0-9]*", found[1])) if found else set()
    if operations & {"Fc", "Gemm", "Matm", "Bmm", "Dot"} or re.search(
        r"gemm|matmul", f"{name} {tactic}", re.I
    ):
        return "matmul"
    if re.search(r"fprop|dgrad|convolution", tactic, re.IGNORECASE):
        return "conv"
    if {"Exp", "Sum"} <= operations:
        return "softmax"
    if "Mean" in operations or {"Sqrt", "Div"} <= operations:  # a norm is often two kernels
        return "norm"
    if "Roun" in operations and operations <= _ROUNDING | _MOVES:
        return "quantize"
    if operations and operations <= {"Cast"}:
        return "cast"
    if operations and operations <= _MOVES | {"Cast"}:
        return "layout"
    return "pointwise" if operations else "other"


ROLES = ("attn1", "attn2", "ffn", "norm", "embeddings", "convolution", "reformat_cast", "other", "several")
"""What a layer serves: self-attention, cross-attention, feed-forward, norms and modulation, embeddings and output
projection, convolutions, conversions of dtype or format, nothing that is known, more than one of these."""

_PATTERNS = (
    ("attn2", r"(^|\.)(attn2|cross_attn|EncDecAttention)(\.|$)"),
    ("attn1", r"(^|\.)(attn1?|self_attn|SelfAttention|attention|attentions\.\d+)(\.|$)"),
    ("ffn", r"(^|\.)(ffn?|mlp|DenseReluDense|feed_forward)(\.|$)"),
    ("embeddings", r"(^|\.)(\w*embed\w*|shared|rope|time_proj|proj_out)(\.|$)"),
    ("norm", r"(^|\.)(\w*norm\w*)(\.|$)|^blocks\.\d+$"),
    (
        "convolution",
        r"(^|\.)(conv\w*|resnets\.\d+|(up|down)samplers?(\.\d+)?|(post_)?quant_conv|resample)(\.|$)",
    ),
)
_PARTS = re.compile(r"[^\s+,()\[\]{}\x1e\x1f]+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_WEIGHT = re.compile(r"([A-Za-z_]\w*(\.\w+)*)\.(weight|bias|scale_shift_table)(_\w+)?")
_NODE = re.compile(r"\[([^\[\]]+)\]")


def module_of(node: str) -> str:
    """Module path of an ONNX node's name; empty where it has none.

    `"blocks.0.attn1.to_q/node_linear"` is how wanlab names nodes, and `"/blocks.0/attn1/to_q/MatMul"` how the older
    exporter of PyTorch does. What an engine appends (`.../MatMulAddFusion`) is ignored.
    """
    if node.startswith("/"):
        return ".".join(part for part in node.strip("/").split("/")[:-1] if part)
    head, slash, _ = node.partition("/")
    if not slash:
        found = _WEIGHT.fullmatch(head)
        return found[1] if found else ""
    # `node_view_9/GatherSliceToSplitFusion`, `Transpose_12/...`: a node of no module, extended by the engine
    named = (
        _MODULE.fullmatch(head)
        and not head.startswith("node_")
        and not ("." not in head and head[0].isupper())
    )
    return head if named else ""


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes in the metadata of a TensorRT layer: `"[ONNX Layer: a]\\x1e[ONNX Layer: b]"`."""
    return tuple(
        dict.fromkeys(found.partition("ONNX Layer:")[2].strip() or found for found in _NODE.findall(metadata))
    )


def modules_in(texts: Iterable[str]) -> tuple[str, ...]:
    """Every module named in the names of layers or nodes, in order, each once.

    Takes apart what engines join: `"a/x + b/y"`, `"PWN(a/x, b/y)"`, `"{ForeignNode[a/x...b/y]}"`,
    `"Reformatting CopyNode for Input Tensor 0 to a/x"`.
    """
    found: dict[str, None] = {}
    for text in texts:
        for part in _PARTS.findall(text.replace("...", " ")):
            if module := module_of(part):
                found[module] = None
    # Codes that several layers read are made by nodes of the list that holds them: `blocks` of `blocks.3.attn2.to_k`.
    lists = {
        module for module in found if any(re.match(rf"{re.escape(module)}\.\d", other) for other in found)
    }
    return tuple(module for module in found if module not in lists)


def role_of(modules: Iterable[str], kind: str) -> str:
    """One of `ROLES` for a layer of these modules; conversions are that wherever they stand."""
    if kind in ("cast", "quantize", "reformat", "copy"):
        return "reformat_cast"
    roles = {_role(module) for module in modules}
    if kind == "norm" and "norm" in roles:
        return "norm"  # with the sum before it, and the rounding after it
    if len(roles) > 1:
        # A norm or nothing in particular that was pulled into the work beside it.
        roles = roles - {"norm", "other"} or {"norm"}
    if len(roles) > 1:
        return "several"
    role = next(iter(roles), "other")
    return "convolution" if role == "other" and kind == "conv" else role


def block_of(modules: Iterable[str]) -> int | None:
    """Number of the one block that all modules lie in; None where there is no such block."""
    numbers = {
        int(found[1]) for module in modules if (found := re.match(r"(?:\w+\.)*?blocks?\.(\d+)(\.|$)", module))
    }
    return numbers.pop() if len(numbers) == 1 else None


def site_of(modules: Iterable[str]) -> str:
    """The modules with `*` for their numbers of blocks, which is what layers of all blocks have in common."""
    return ", ".join(dict.fromkeys(re.sub(r"((?:^|\.)blocks?\.)\d+", r"\1*", module) for module in modules))


def _role(module: str) -> str:
    return next((role for role, pattern in _PATTERNS if re.search(pattern, module)), "other")


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
        sizes = [size for size in self.shape or () if isinstance(size, int)]
        if self.shape is None or len(sizes) < len(self.shape):
            return 0
        return math.ceil(math.prod(sizes) * ITEM_BYTES.get(self.dtype, 0.0))


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


_NEXT = ("cast", "quantize", "reformat", "copy")
_ROUNDS = 8  # a chain of nameless layers is seldom longer


def join(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with modules, where they can be known.

    In this order: the layer's own name and the ONNX nodes it says it was made from; its weights; a neighbour in the
    graph (a conversion belongs to what reads it, anything else to what wrote its input); a neighbour in the order of
    execution, where the graph is not known.
    """
    joined = [layer if layer.modules else _by_itself(layer) for layer in layers]
    edges = Edges(joined)
    for _ in range(_ROUNDS):
        changed = False
        for place, layer in enumerate(joined):
            if not layer.modules and (found := _by_graph(joined, edges, place)):
                joined[place] = replace(layer, modules=found, joined_by="graph")
                changed = True
        if not changed:
            break
    if not any(edges.before):
        joined = _by_order(joined)
    return tuple(joined)


def _by_itself(layer: Layer) -> Layer:
    found = modules_in((*layer.nodes, layer.name))
    if found:
        return replace(layer, modules=found, joined_by="name")
    # `blocks.0.attn1.to_q.weight`; a constant that folding made (`velocity/shape`) is named after a tensor.
    found = modules_in(tensor.name for tensor in layer.inputs if tensor.constant and "/" not in tensor.name)
    return replace(layer, modules=found, joined_by="weight" if found else "")


def _by_graph(layers: list[Layer], edges: Edges, place: int) -> tuple[str, ...]:
    layer = layers[place]
    before = [layers[i].modules for i in edges.before[place] if layers[i].modules]
    after = {layers[i].modules for i in edges.after[place]}
    only = next(iter(after)) if len(after) == 1 else ()
    if layer.kind in _NEXT or layer.name.startswith("gemm_input"):
        return only or next(iter(before), ())
    return next(iter(before), ()) or only


def _by_order(layers: list[Layer]) -> list[Layer]:
    """Without a graph: the layer just before that wrote a tensor of a shape that this one reads, else the next one."""
    made = list(layers)
    for place, layer in enumerate(layers):
        if layer.modules:
            continue
        follows = next((other.modules for other in layers[place + 1 : place + 3] if other.modules), ())
        shapes = {tensor.shape for tensor in layer.inputs if not tensor.constant}
        leads = next(
            (
                other.modules
                for other in reversed(made[max(place - 4, 0) : place])
                if other.modules and shapes & {tensor.shape for tensor in other.outputs}
            ),
            (),
        )
        found = follows if layer.name.startswith("gemm_input") or layer.kind in _NEXT else leads or follows
        if found := found or leads:
            made[place] = replace(layer, modules=found, joined_by="order")
    return made
