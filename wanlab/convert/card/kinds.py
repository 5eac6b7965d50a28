"""What a layer does, in one vocabulary for ONNX operators and TensorRT's layer types."""

from __future__ import annotations

import re

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
