"""One table of an engine's layers, in the same form for every source: roles, module names, sizes."""

from __future__ import annotations

import functools
import itertools
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
    """Kind of an ONNX operator or of a contributed operator of ONNX Runtime."""
    if operator in _BY_OPERATOR:
        return _BY_OPERATOR[operator]
    if operator.startswith(("Reduce", "Arg", "CumSum", "TopK")):
        return "reduce"
    return "pointwise" if operator in _POINTWISE else "other"


def tensorrt_kind(layer_type: str, name: str = "", tactic: str = "") -> str:
    """Kind of a layer of an engine.

    Kernels that TensorRT's compiler generated (`kgen`, `fusion`, `Myelin`) are known only by their names, which list
    their operations: `__myl_MulMaxSubExpSum_myl0_12` is a softmax.
    """
    layer_type, name, tactic = (text[:LONGEST_NAME] for text in (layer_type, name, tactic))
    if _FUSED_ATTENTION.search(f"{layer_type} {name} {tactic}"):
        return "attention"
    kind = _BY_LAYER.get(layer_type.replace(" ", "").lower())
    if kind is not None:
        return kind
    match = _MYELIN.search(name)
    operations = set(re.findall(r"[A-Z][a-z0-9]*", match[1])) if match else set()
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
"""Roles of layers: self-attention, cross-attention, feed-forward, norms and modulation, embeddings and output projection,
convolutions, conversions of dtype or format, an unknown role, more than one of these."""

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
LONGEST_NAME = 20_000
"""What is read of a name; those of engines list all that was fused."""
_PARTS = re.compile(r"[^\s+,()\[\]{}\x1e\x1f]+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_WEIGHT = re.compile(r"([A-Za-z_]\w*(\.\w+)*)\.(weight|bias|scale_shift_table)(_\w+)?")
_NODE = re.compile(r"\[([^\[\]]+)\]")


def module_of(node: str) -> str:
    """Module path in the name of an ONNX node; empty if the name has none.

    wanlab's names are like `"blocks.0.attn1.to_q/node_linear"`, those of PyTorch's older exporter like
    `"/blocks.0/attn1/to_q/MatMul"`. Suffixes of engines (`.../MatMulAddFusion`) are ignored.
    """
    if node.startswith("/"):
        return ".".join(part for part in node.strip("/").split("/")[:-1] if part)
    head, slash, _ = node.partition("/")
    if not slash:
        match = _WEIGHT.fullmatch(head)
        return match[1] if match else ""
    # `node_view_9/GatherSliceToSplitFusion`, `Transpose_12/...`: a node without a module, with a suffix of the engine
    named = (
        _MODULE.fullmatch(head)
        and not head.startswith("node_")
        and not ("." not in head and head[0].isupper())
    )
    return head if named else ""


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes in the metadata of a TensorRT layer: `"[ONNX Layer: a]\\x1e[ONNX Layer: b]"`."""
    return tuple(
        dict.fromkeys(text.partition("ONNX Layer:")[2].strip() or text for text in _NODE.findall(metadata))
    )


def modules_in(texts: Iterable[str]) -> tuple[str, ...]:
    """Distinct modules in the names of layers or nodes, in order.

    Names that engines joined are split: `"a/x + b/y"`, `"PWN(a/x, b/y)"`, `"{ForeignNode[a/x...b/y]}"`,
    `"Reformatting CopyNode for Input Tensor 0 to a/x"`.
    """
    modules: dict[str, None] = {}
    for text in texts:
        for part in _PARTS.findall(text[:LONGEST_NAME].replace("...", " ")):
            if module := module_of(part):
                modules[module] = None
    # Quantised values that several layers read come from nodes of their list: `blocks` of `blocks.3.attn2.to_k`.
    lists = {
        other[: number.start()]
        for other in modules
        for number in itertools.islice(re.finditer(r"\.\d", other), 16)
    }
    return tuple(module for module in modules if module not in lists)


def role_of(modules: Iterable[str], kind: str) -> str:
    """One of `ROLES` for a layer of these modules; conversions have one role in all modules."""
    if kind in ("cast", "quantize", "reformat", "copy"):
        return "reformat_cast"
    roles = {_role(module) for module in modules}
    if kind == "norm" and "norm" in roles:
        return "norm"  # with the sum before it and the rounding after it
    if len(roles) > 1:
        # A norm or an unknown role that was fused into another layer does not count.
        roles = roles - {"norm", "other"} or {"norm"}
    if len(roles) > 1:
        return "several"
    role = next(iter(roles), "other")
    return "convolution" if role == "other" and kind == "conv" else role


def block_of(modules: Iterable[str]) -> int | None:
    """Number of the block that contains all modules; None if there is none."""
    numbers = {
        int(match[1])
        for module in modules
        if (match := re.match(r"(?:\w+\.)*?blocks?\.(\d{1,9})(\.|$)", module))
    }
    return numbers.pop() if len(numbers) == 1 else None


def site_of(modules: Iterable[str]) -> str:
    """The modules with `*` instead of the numbers of blocks, so that layers of all blocks have the same site."""
    return ", ".join(dict.fromkeys(re.sub(r"((?:^|\.)blocks?\.)\d+", r"\1*", module) for module in modules))


def _role(module: str) -> str:
    return next((role for role, pattern in _PATTERNS if re.search(pattern, module)), "other")


MOST_ELEMENTS = 2**44


@dataclass(frozen=True)
class Tensor:
    """One input or output of a layer.

    Attributes:
        dtype: `"fp32"`, `"bf16"`, `"int8"`, ...; empty if unknown.
        shape: sizes; a free axis is a string; None if unknown.
        format: memory layout in the engine's terms.
        constant: whether it is a weight or another constant.
    """

    name: str
    dtype: str = ""
    shape: tuple[int | str, ...] | None = None
    format: str = ""
    constant: bool = False

    @property
    def size_bytes(self) -> int:
        """Size in bytes; 0 if dtype or shape is unknown, or is larger than any tensor can be."""
        sizes = [size for size in self.shape or () if isinstance(size, int)]
        if self.shape is None or len(sizes) < len(self.shape) or not 0 <= math.prod(sizes) < MOST_ELEMENTS:
            return 0
        return math.ceil(math.prod(sizes) * ITEM_BYTES.get(self.dtype, 0.0))


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, or one node of a graph.

    Attributes:
        index: position in the order of execution.
        name: name in the engine.
        type, subtype, tactic: type and kernel in the engine's terms.
        kind: one of `KINDS`.
        modules: modules of the network that it computes; several if layers were fused.
        joined_by: source of `modules`: `"name"`, `"weight"`, `"graph"` (a neighbour), `"order"`, or empty.
        nodes: nodes of the ONNX graph that it computes, as far as the engine states them.
        provider: execution provider of ONNX Runtime.
        stream: stream of TensorRT.
        precision: number format of its computation, see `precision_of`.
        weight_dtype: number format of its stored weights.
        weight_bytes: bytes of constants that no earlier layer has.
        time_ms: median time; NaN if it was not measured.
        samples_ms: time of each run, if they are known.
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
        """Its modules without numbers of blocks, such as `"blocks.*.attn1.to_q"`."""
        return site_of(self.modules)

    @property
    def block(self) -> int | None:
        return block_of(self.modules)

    @property
    def halves_ms(self) -> float:
        """Median of the first half of the runs minus median of the second half, as a measure of noise.

        NaN with fewer than 4 samples.
        """
        if len(self.samples_ms) < 4:
            return math.nan
        middle = len(self.samples_ms) // 2
        return statistics.median(self.samples_ms[:middle]) - statistics.median(self.samples_ms[middle:])

    @property
    def activation_bytes(self) -> int:
        """Size of its outputs in bytes."""
        return sum(tensor.size_bytes for tensor in self.outputs)


@dataclass(frozen=True, eq=False)
class EngineLayers:
    """The layers of one engine in the order of execution.

    Attributes:
        name: name of the engine, for headings.
        source: `"tensorrt"`, `"onnxruntime"` or `"onnx"` (a graph before any engine).
        layers: the layers.
        inputs, outputs: tensors of the whole engine.
        latency_ms: time of the whole engine, measured separately from its layers; NaN if it was not measured.
        metadata: model and component, if the source states them.
        facts: numbers about the whole engine that only some sources have (`peak_arena_bytes`, `runs`).
        times_of: `"layers"`, or `"launches"` if only the time of the host per layer is known.
        notes: remarks for the reader, one line each.
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
        """Whether any layer has a time above 0."""
        return any(layer.time_ms > 0 for layer in self.layers)

    @property
    def total_ms(self) -> float:
        """Sum of the times of all layers; NaN without times."""
        if not self.timed:
            return math.nan
        return math.fsum(layer.time_ms for layer in self.layers if not math.isnan(layer.time_ms))

    def with_latency(self, latency_ms: float) -> EngineLayers:
        """A copy with the time of the whole engine."""
        return replace(self, latency_ms=latency_ms)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """A row per layer: the attributes of `Layer`, and site, role, block, activation_bytes, share_percent.

        `inputs` and `outputs` are text, such as `name fp16[1, 480, 192]`.
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
        """Neighbours of the layers in the graph."""
        return Edges(self.layers)


class Edges:
    """Neighbours of layers by the names of their tensors, as positions in the tuple (not `Layer.index`).

    TensorRT reuses names of temporary tensors: the writer of an input is the last layer before that wrote the name.

    Attributes:
        before: for each layer the positions of the layers whose outputs it reads.
        after: for each layer the positions of the layers that read its outputs.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.before: list[list[int]] = [[] for _ in layers]
        self.after: list[list[int]] = [[] for _ in layers]
        writers: dict[str, int] = {}
        for place, layer in enumerate(layers):
            read = (writers.get(tensor.name) for tensor in layer.inputs if tensor.name)
            self.before[place] = list(dict.fromkeys(writer for writer in read if writer is not None))
            for writer in self.before[place]:
                self.after[writer].append(place)
            for tensor in layer.outputs:
                writers[tensor.name] = place


def precision_of(kind: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> str:
    """Number format of the computation of a layer, from the dtypes of its tensors.

    A product computes in the narrowest format of its activations (an INT8 product has INT8 inputs and may write FP16);
    other layers compute in the widest float of their tensors; conversions have the format of their output.
    """
    inputs, outputs = list(inputs), list(outputs)
    written = [tensor.dtype for tensor in outputs if tensor.dtype]
    read = [tensor.dtype for tensor in inputs if tensor.dtype and not tensor.constant]
    if kind in ("cast", "quantize", "reformat", "copy"):
        return next(iter(written), "")
    known = [name for name in read if name in FLOATS or name in CODES] or [
        tensor.dtype for tensor in inputs if tensor.dtype in FLOATS or tensor.dtype in CODES
    ]
    if kind in PRODUCTS and known:
        return min(known, key=ITEM_BYTES.__getitem__)
    floats = [name for name in (*known, *written) if name in FLOATS]
    if floats:
        return max(floats, key=ITEM_BYTES.__getitem__)
    return next(iter(written or read), "")


def described(tensor: Tensor) -> str:
    """A tensor as text, such as `fp16[1, 480, 192]`."""
    shape = "[?]" if tensor.shape is None else f"[{', '.join(map(str, tensor.shape))}]"
    return f"{tensor.dtype}{shape}"


_NEXT = ("cast", "quantize", "reformat", "copy")
_ROUNDS = 8  # chains of layers without names are seldom longer


def join(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with their modules, as far as these can be determined.

    The sources are, in this order: the layer's name and its ONNX nodes; its weights; a neighbour in the graph (for a
    conversion the layer that reads its output, for other layers the one that wrote their input); a neighbour in the order
    of execution, if the graph is not known.
    """
    joined = [layer if layer.modules else _by_name(layer) for layer in layers]
    edges = Edges(joined)
    for _ in range(_ROUNDS):
        changed = False
        for place, layer in enumerate(joined):
            if not layer.modules and (modules := _by_graph(joined, edges, place)):
                joined[place] = replace(layer, modules=modules, joined_by="graph")
                changed = True
        if not changed:
            break
    if not any(edges.before):
        joined = _by_order(joined)
    return tuple(joined)


def _by_name(layer: Layer) -> Layer:
    modules = modules_in((*layer.nodes, layer.name))
    if modules:
        return replace(layer, modules=modules, joined_by="name")
    # `blocks.0.attn1.to_q.weight`; a constant from constant folding (`velocity/shape`) is named after a tensor.
    modules = modules_in(tensor.name for tensor in layer.inputs if tensor.constant and "/" not in tensor.name)
    return replace(layer, modules=modules, joined_by="weight" if modules else "")


def _by_graph(layers: list[Layer], edges: Edges, place: int) -> tuple[str, ...]:
    layer = layers[place]
    before = [layers[i].modules for i in edges.before[place] if layers[i].modules]
    after = {layers[i].modules for i in edges.after[place]}
    only = next(iter(after)) if len(after) == 1 else ()
    if layer.kind in _NEXT or layer.name.startswith("gemm_input"):
        return only or next(iter(before), ())
    return next(iter(before), ()) or only


def _by_order(layers: list[Layer]) -> list[Layer]:
    """Without a graph: modules of a layer shortly before with an output of the shape of an input, else of the next one."""
    joined = list(layers)
    for place, layer in enumerate(layers):
        if layer.modules:
            continue
        follows = next((other.modules for other in layers[place + 1 : place + 3] if other.modules), ())
        shapes = {tensor.shape for tensor in layer.inputs if not tensor.constant}
        leads = next(
            (
                other.modules
                for other in reversed(joined[max(place - 4, 0) : place])
                if other.modules and shapes & {tensor.shape for tensor in other.outputs}
            ),
            (),
        )
        modules = follows if layer.name.startswith("gemm_input") or layer.kind in _NEXT else leads or follows
        if modules := modules or leads:
            joined[place] = replace(layer, modules=modules, joined_by="order")
    return joined
