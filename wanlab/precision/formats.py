"""Number formats: what a layer's weight and input are rounded to, as plain data."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from wanlab.core.errors import WanlabError, did_you_mean

BLOCK_SIZES = (32, 64, 128)
GRANULARITIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class NumericType:
    """One tensor as codes times a scale, without a zero point.

    Attributes:
        kind: `"int8"`, `"int4"` or `"fp8"` (E4M3 without infinities, Micikevicius et al. 2022, arXiv:2209.05433).
        bits: of one code.
        granularity: what shares a scale: `"tensor"`, `"channel"` (one output), or `"block"` (`block` neighbouring
            inputs of one output).
        smallest, largest: codes; what lies outside saturates.
        block: inputs per scale with `"block"`, else None.
    """

    kind: str
    bits: int
    granularity: str
    smallest: float
    largest: float
    block: int | None = None

    def scale(self, amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The scale that puts `amax` on the largest code, as `dtype` can hold it; of zeros 1."""
        # A scale that is subnormal in the graph's dtype is coarse, and engines may flush it to zero.
        smallest = torch.finfo(dtype).smallest_normal
        scale = torch.where(amax > 0, amax.float() / self.largest, 1.0)
        return scale.clamp(min=smallest).to(dtype)

    def encode(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes of `values`: int8 (int4 too, one to a byte) or float8_e4m3fn, to the nearest, ties to even.

        The definition of ONNX QuantizeLinear, saturation included.

        Args:
            scale: broadcasts against `values`.
        """
        codes = values.float() / scale.float()
        if self.kind == "fp8":
            return codes.clamp(self.smallest, self.largest).to(torch.float8_e4m3fn)
        return codes.round().clamp(self.smallest, self.largest).to(torch.int8)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values of codes, as ONNX DequantizeLinear gives them."""
        return (codes.float() * scale.float()).to(dtype)


@dataclass(frozen=True)
class QuantFormat:
    """How a layer computes: its weight's numbers and its input's; `activation` None leaves the input as it is.

    Attributes:
        name: one of `FORMATS`, or one with another block size.
        opset: the first ONNX opset that can say it for a float32 graph.
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


_INT8 = NumericType("int8", 8, "tensor", -128.0, 127.0)
_INT4 = NumericType("int4", 4, "block", -8.0, 7.0, 64)
_FP8 = NumericType("fp8", 8, "tensor", -448.0, 448.0)
_PER_CHANNEL = {"granularity": "channel"}

FORMATS: dict[str, QuantFormat] = {
    made.name: made
    for made in (
        QuantFormat("int8", replace(_INT8, **_PER_CHANNEL), _INT8, 13),
        QuantFormat("fp8", _FP8, _FP8, 19),
        QuantFormat("fp8-channel", replace(_FP8, **_PER_CHANNEL), _FP8, 19),
        QuantFormat("int8-weight", replace(_INT8, **_PER_CHANNEL), None, 13),
        QuantFormat("int4-weight", _INT4, None, 21),
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
        dtype: that the scales are stored in.

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
    """The weight that the codes of `encode_weight` stand for, `[outputs, inputs, ...]`."""
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
