"""Number formats of a layer's weight and input, as plain data."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.formats import ELEMENT_TYPES

if TYPE_CHECKING:
    import torch  # plans and configurations are read before a run starts, where loading torch would be felt

BLOCK_SIZES = (32, 64, 128)
GRANULARITIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class CodeKind:
    """Codes of one kind: their range, their dtypes, and the product that multiplies them.

    Attributes:
        name: element type of `wanlab.core.formats`.
        smallest, largest: range of codes; values outside saturate.
        encoded: dtype in PyTorch of what `NumericType.encode` returns.
        held: dtype in PyTorch of the tensor that stores them in a layer; 4-bit codes lie two to a byte.
        usual: granularity and block of a weight by default.
        operator: PyTorch's product of two tensors of codes; empty where it has none.
        capability: least compute capability of GPUs that have this product. multiple: divisor that sizes need there.
        rate: rate of that product over the product of 16-bit floats, as data sheets of such GPUs say.
    """

    name: str
    smallest: float
    largest: float
    encoded: str
    held: str
    usual: tuple[str, int | None]
    operator: str = ""
    capability: tuple[int, int] = (0, 0)
    multiple: int = 1
    rate: float = 1.0

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return ELEMENT_TYPES[self.name].bits

    @property
    def encoded_dtype(self) -> torch.dtype:
        """`encoded` as a dtype of PyTorch."""
        import torch

        return getattr(torch, self.encoded)

    @property
    def onnx(self) -> str:
        """Its name in `onnx.TensorProto.DataType` and `onnx_ir.DataType`."""
        return ELEMENT_TYPES[self.name].onnx[0]


# fmt: off
CODE_KINDS: dict[str, CodeKind] = {
    kind.name: kind
    for kind in (
        CodeKind("int8", -128.0, 127.0, "int8", "int8", ("channel", None), "_int_mm", (8, 0), 8, 2.0),
        CodeKind("fp8", -448.0, 448.0, "float8_e4m3fn", "float8_e4m3fn", ("tensor", None), "_scaled_mm", (8, 9), 16, 2.0),
        CodeKind("int4", -8.0, 7.0, "int8", "uint8", ("block", 64)),
    )
}
# fmt: on
CODES_OF_ONNX = {kind.onnx: name for name, kind in CODE_KINDS.items()}
"""Name in ONNX -> kind, for the codes that wanlab writes."""


@dataclass(frozen=True)
class NumericType:
    """One tensor as codes times a scale, without a zero point.

    Attributes:
        kind: `"int8"`, `"int4"` or `"fp8"` (E4M3 without infinities, Micikevicius et al. 2022, arXiv:2209.05433).
        bits: number of bits of one code.
        granularity: part of the tensor that shares a scale: `"tensor"`, `"channel"` (one output), or `"block"` (`block`
            neighbouring inputs of one output).
        smallest, largest: range of codes; values outside saturate.
        block: inputs per scale with `"block"`, else None.
    """

    kind: str
    bits: int
    granularity: str
    smallest: float
    largest: float
    block: int | None = None

    @property
    def codes(self) -> CodeKind:
        """The kind of its codes."""
        return CODE_KINDS[self.kind]

    def scale(self, amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The scale by which `amax` becomes the largest code, rounded to `dtype`; 1 where `amax` is 0."""
        import torch

        # A scale that is subnormal in the graph's dtype is coarse, and engines may flush it to zero.
        smallest = torch.finfo(dtype).smallest_normal
        scale = torch.where(amax > 0, amax.float() / self.largest, 1.0)
        return scale.clamp(min=smallest).to(dtype)

    def encode(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes of `values`: int8 (int4 too, one to a byte) or float8_e4m3fn, to the nearest, ties to even.

        The definition of ONNX QuantizeLinear, saturation included.

        Args:
            scale: tensor that broadcasts against `values`.
        """
        codes, dtype = values.float() / scale.float(), self.codes.encoded_dtype
        codes = codes if dtype.is_floating_point else codes.round()
        return codes.clamp(self.smallest, self.largest).to(dtype)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values of codes, as ONNX DequantizeLinear gives them."""
        return (codes.float() * scale.float()).to(dtype)


@dataclass(frozen=True)
class QuantFormat:
    """Format of a layer: of its weight, and of its input; `activation` None leaves the input as it is.

    Attributes:
        name: one of `FORMATS`, or one with another block size.
        opset: first ONNX opset that has it for a float32 graph.
    """

    name: str
    weight: NumericType
    activation: NumericType | None
    opset: int

    @property
    def bits(self) -> str:
        """`"W8A8"`, `"W4A16"`: bits of weight and input; 16 stands for the graph's own dtype."""
        return f"W{self.weight.bits}A{self.activation.bits if self.activation else 16}"

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON and YAML can hold."""
        return asdict(self)


def _numbers(kind: str, granularity: str, block: int | None = None) -> NumericType:
    codes = CODE_KINDS[kind]
    return NumericType(kind, codes.bits, granularity, codes.smallest, codes.largest, block)


FORMATS: dict[str, QuantFormat] = {
    format.name: format
    for format in (
        QuantFormat("int8", _numbers("int8", "channel"), _numbers("int8", "tensor"), 13),
        QuantFormat("fp8", _numbers("fp8", "tensor"), _numbers("fp8", "tensor"), 19),
        QuantFormat("fp8-channel", _numbers("fp8", "channel"), _numbers("fp8", "tensor"), 19),
        QuantFormat("int8-weight", _numbers("int8", "channel"), None, 13),
        QuantFormat("int4-weight", _numbers("int4", "block", 64), None, 21),
    )
}
"""The formats by name; `"int4-weight-32"` and `"int4-weight-128"` are `"int4-weight"` with another block."""


def get_format(name: str | QuantFormat) -> QuantFormat:
    """The format of this name.

    Raises:
        WanlabError: unknown name or block size.
    """
    if isinstance(name, QuantFormat):
        return name
    if name in FORMATS:
        return FORMATS[name]
    sized = re.fullmatch(r"int4-weight-(\d+)", str(name))
    if sized and int(sized[1]) in BLOCK_SIZES:
        base = FORMATS["int4-weight"]
        return replace(base, name=name, weight=replace(base.weight, block=int(sized[1])))
    known = [*FORMATS, *(f"int4-weight-{size}" for size in BLOCK_SIZES)]
    raise WanlabError(f"no format {name!r}{did_you_mean(str(name), known)}; give {', '.join(known)}")


def encode_weight(
    weight: torch.Tensor, numbers: NumericType, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as codes and scales.

    The scale follows the largest value (of the tensor, output channel or block), so nothing saturates.

    Args:
        weight: `[outputs, inputs, ...]`.
        dtype: dtype of the scales.

    Returns:
        Codes in the shape of `weight`, and scales: `[]`, `[outputs]`, or `[outputs, inputs / block]`.

    Raises:
        WanlabError: blocks that the inputs do not fill.
    """
    if numbers.granularity == "tensor":
        scale = numbers.scale(weight.abs().amax(), dtype)
        return numbers.encode(weight, scale), scale
    if numbers.granularity == "channel":
        scale = numbers.scale(weight.flatten(1).abs().amax(dim=1), dtype)
        return numbers.encode(weight, scale.view(-1, *[1] * (weight.ndim - 1))), scale
    check_blocks(tuple(weight.shape), numbers)
    blocks = weight.unflatten(1, (-1, numbers.block))
    scale = numbers.scale(blocks.abs().amax(dim=-1), dtype)
    return numbers.encode(blocks, scale[..., None]).flatten(1), scale


def decode_weight(
    codes: torch.Tensor, scale: torch.Tensor, numbers: NumericType, dtype: torch.dtype
) -> torch.Tensor:
    """The weight that the codes of `encode_weight` represent, `[outputs, inputs, ...]`."""
    if numbers.granularity == "channel":
        scale = scale.view(-1, *[1] * (codes.ndim - 1))
    if numbers.granularity == "block":
        return numbers.decode(codes.unflatten(1, (-1, numbers.block)), scale[..., None], dtype).flatten(1)
    return numbers.decode(codes, scale, dtype)


def check_blocks(shape: tuple[int, ...], numbers: NumericType, layer: str = "the weight") -> None:
    """Raise a `WanlabError` unless blocks fill the inputs of a `[outputs, inputs]` weight."""
    if numbers.granularity != "block":
        return
    if len(shape) != 2:
        raise WanlabError(f"{layer} is a convolution; blocks of {numbers.block} inputs are for linear layers")
    if shape[1] % numbers.block:
        fits = [str(size) for size in BLOCK_SIZES if shape[1] % size == 0]
        raise WanlabError(
            f"{layer} has {shape[1]} inputs, which blocks of {numbers.block} do not fill;"
            f" {'use blocks of ' + ' or '.join(fits) if fits else 'leave it out'}"
        )
