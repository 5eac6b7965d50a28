"""Quantized linear layers for PyTorch, and fake quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.precision.formats import (
    NumericType,
    QuantFormat,
    check_blocks,
    decode_weight,
    encode_weight,
    get_format,
)


def fake_quantize(values: torch.Tensor, scale: torch.Tensor, numbers: NumericType) -> torch.Tensor:
    """`values` rounded to codes and back, in their own dtype; `scale` broadcasts against them."""
    return numbers.decode(numbers.encode(values, scale), scale, values.dtype)


@contextmanager
def fake_quantized(
    network: torch.nn.Module,
    formats: Mapping[str, str | QuantFormat],
    amax: Mapping[str, float] | None = None,
) -> Iterator[torch.nn.Module]:
    """Inside the block layers of a network compute with rounded weights and inputs, as graphs of `quantize` do.

    The originals of the weights stay in memory and come back at the end.

    Args:
        network: network in eager PyTorch; scales have its dtype.
        formats: layer -> format.
        amax: layer -> largest magnitude of its input's codes, e.g. `Calibration.amax`.

    Raises:
        WanlabError: an unknown layer or format, a missing range, or blocks that do not fill a layer.
    """
    modules = dict(network.named_modules())
    plan = {layer: get_format(name) for layer, name in formats.items()}
    for layer, format in plan.items():
        if getattr(modules.get(layer), "_parameters", {}).get("weight") is None:
            raise WanlabError(f"the network has no layer {layer!r}{did_you_mean(layer, modules)}")
        if format.activation is not None and layer not in (amax or {}):
            raise WanlabError(
                f"no range for the input of {layer}; give amax= from a calibration of this layer"
            )
        check_blocks(tuple(modules[layer].weight.shape), format.weight, layer)
    originals, handles = {}, []
    try:
        for layer, format in plan.items():
            module = modules[layer]
            originals[layer] = module.weight.data
            codes, scale = encode_weight(module.weight.data, format.weight, module.weight.dtype)
            module.weight.data = decode_weight(codes, scale, format.weight, module.weight.dtype)
            if format.activation is not None:
                range_ = torch.tensor(amax[layer], device=module.weight.device)
                step = format.activation.scale(range_, module.weight.dtype)
                handles.append(module.register_forward_pre_hook(_rounding(step, format.activation)))
        yield network
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in originals.items():
            modules[layer].weight.data = weight


def _rounding(scale: torch.Tensor, numbers: NumericType):
    def rounded(module, args):
        return (fake_quantize(args[0], scale, numbers), *args[1:])

    return rounded


SCALED, INTEGER, DECODED, SIMULATED, CAST = "scaled_mm", "int_mm", "decoded", "simulated", "cast"
"""How a layer computes: `torch._scaled_mm`, `torch._int_mm`, weight decoded at use and a float product, the same with the
input rounded to its codes and back, or another float between two casts."""

# Hopper then sums 8-bit floats in fewer than float32's bits, in less time: what inference commonly takes.
FAST_ACCUMULATION = True
FEWEST_ROWS = 17  # that torch._int_mm takes on a GPU


class QuantLinear(torch.nn.Module):
    """A linear layer in one of the formats of `wanlab.precision.formats`.

    Stores only the quantized weight and its scale. The bias is the original's own tensor.

    Attributes:
        format: name of the format. kernel: `SCALED`, `INTEGER`, `DECODED` or `SIMULATED`.
        dtype: dtype of the layer it stands for: of its output, its scales, and of the product where nothing multiplies
            codes.
        codes: buffer `[outputs, inputs]`, float8_e4m3fn or int8; uint8 `[outputs, inputs / 2]` of two 4-bit codes each.
        scale: buffer, `[]`, `[outputs]` or `[outputs, inputs / block]`.
        input_scale: buffer `[]` from a calibration. None scales every input by its own largest magnitude: per tensor, or per
            token (a row of the input) in fp8-channel.
    """

    def __init__(
        self, layer: torch.nn.Module, format: QuantFormat, *, kernel: str, amax: float | None = None
    ) -> None:
        super().__init__()
        weight = layer.weight.detach()
        check_blocks(tuple(weight.shape), format.weight)
        codes, scale = encode_weight(weight, format.weight, weight.dtype)
        self.format, self.kernel, self.dtype = format.name, kernel, weight.dtype
        self.numbers, self.activation = format.weight, format.activation
        self.per_token = format.name == "fp8-channel" and amax is None and weight.ndim == 2
        self.shape = tuple(weight.shape)
        self.register_buffer("codes", pack(codes) if format.weight.bits == 4 else codes)
        self.register_buffer("scale", scale)
        given = format.activation is not None and amax is not None
        self.register_buffer(
            "input_scale",
            format.activation.scale(torch.tensor(amax, device=weight.device), weight.dtype)
            if given
            else None,
        )
        self.bias = layer.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        rows = values.reshape(-1, self.shape[1])
        if self.kernel == SCALED:
            product = self._scaled(rows)
        elif self.kernel == INTEGER and rows.shape[0] >= FEWEST_ROWS:
            product = self._integer(rows)
        else:
            product = F.linear(self._rounded(rows), self.decoded(), self.bias)
        return product.reshape(*values.shape[:-1], self.shape[0])

    def decoded(self) -> torch.Tensor:
        """The weight that the codes represent, in the layer's dtype."""
        codes = unpack(self.codes) if self.numbers.bits == 4 else self.codes
        return decode_weight(codes, self.scale, self.numbers, self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The same, for networks that look at the weight of a layer: some take the dtype of times from it."""
        return self.decoded()

    def extra_repr(self) -> str:
        input_text = "" if self.activation is None else f", input {self.scaling}"
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}, {self.kernel}{input_text}"

    @property
    def scaling(self) -> str:
        """How inputs are scaled: `"static"`, `"per token"`, `"per tensor"`, or `""` where they are not rounded."""
        if self.activation is None:
            return ""
        return "static" if self.input_scale is not None else "per token" if self.per_token else "per tensor"

    def _step(self, values: torch.Tensor) -> torch.Tensor:
        """Scale of the input, `[]` or `[rows, 1]`."""
        if self.input_scale is not None:
            return self.input_scale
        size = values.abs()
        amax = size.amax(dim=-1, keepdim=True) if self.per_token else size.amax()
        return self.activation.scale(amax, self.dtype)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return values
        return fake_quantize(values, self._step(values), self.activation)

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        step = self._step(rows)
        return scaled_mm(
            self.activation.encode(rows, step), step, self.codes, self.scale, self.bias, self.dtype
        )

    def _integer(self, rows: torch.Tensor) -> torch.Tensor:
        step = self._step(rows)
        sums = torch._int_mm(self.activation.encode(rows, step), self.codes.t())
        product = sums.float() * (step.float() * self.scale.float())
        return (product if self.bias is None else product + self.bias.float()).to(self.dtype)


class PlannedConv(QuantLinear):
    """A convolution in a format: decoded at use, its input rounded; no kernel multiplies codes here."""

    def __init__(
        self, layer: torch.nn.Module, format: QuantFormat, *, kernel: str, amax: float | None = None
    ) -> None:
        if layer.padding_mode != "zeros":
            raise WanlabError(
                f"a convolution with {layer.padding_mode} padding has no format; leave it out of the plan"
            )
        super().__init__(layer, format, kernel=kernel, amax=amax)
        self.convolve, self.settings = _convolution(layer)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`[B, C, ...]` to `[B, outputs, ...]`."""
        return self.convolve(self._rounded(values), self.decoded(), self.bias, **self.settings)


class CastLinear(torch.nn.Module):
    """A layer that computes in another float than the network, between two casts.

    Attributes:
        format: `"fp32"`, `"fp16"` or `"bf16"`. weight: buffer, so that the network's dtype, which is read from its
            parameters, stays the same.
    """

    kernel, scaling = CAST, ""

    def __init__(self, layer: torch.nn.Module, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.dtype = format, layer.weight.dtype
        self.shape = tuple(layer.weight.shape)
        self.register_buffer("weight", layer.weight.detach().to(dtype))
        self.bias = layer.bias
        self.product, self.settings = (F.linear, {}) if layer.weight.ndim == 2 else _convolution(layer)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        kind = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        return self.product(values.to(kind), self.weight, bias, **self.settings).to(values.dtype)

    def decoded(self) -> torch.Tensor:
        """The weight, in its own float."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{' x '.join(map(str, self.shape))}, {self.format}"


def scaled_mm(
    codes: torch.Tensor,
    step: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(codes * step) @ (weight * scale).T + bias` by `torch._scaled_mm`, summed in float32.

    Args:
        codes: float8_e4m3fn `[rows, inputs]`, with `step` `[]` or `[rows, 1]`.
        weight: float8_e4m3fn `[outputs, inputs]`, with `scale` `[]` or `[outputs]`.
        dtype: dtype of the result.
    """
    step, scale = step.float(), scale.float()
    inside = bias is not None and dtype != torch.float32 and bias.dtype == dtype
    if step.ndim or scale.ndim:
        # Scales by row and column: the kernel needs both, and writes bfloat16 only.
        step = step.expand(codes.shape[0], 1).contiguous()
        scale = scale.expand(weight.shape[0]).reshape(1, -1).contiguous()
        if dtype != torch.bfloat16:
            one = torch.ones((), device=codes.device)
            product = torch._scaled_mm(codes, weight.t(), one, one, out_dtype=torch.float32)
            product = product * step * scale
            return (product if bias is None else product + bias.float()).to(dtype)
    product = torch._scaled_mm(
        codes,
        weight.t(),
        step,
        scale,
        bias=bias if inside else None,
        out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return product if bias is None or inside else product + bias.to(dtype)


def kernel_for(format: QuantFormat, shape: tuple[int, ...], device: torch.device, native: bool) -> str:
    """How a layer of this weight computes in a format, as one of this module's constants.

    Weight-only formats decode at use on every device: with tens of thousands of rows a product is bound by arithmetic, and
    PyTorch's own weight-only kernels are for a few rows.

    Args:
        native: whether products of codes may be used.
    """
    if format.activation is None:
        return DECODED
    if not native or len(shape) != 2 or not format.weight.codes.operator:
        return SIMULATED
    codes = format.weight.codes
    if device.type != "cpu":
        fits = all(size % codes.multiple == 0 for size in shape)
        if not fits or capability(device) < codes.capability:
            return SIMULATED
    return codes.operator.removeprefix("_")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of other devices than NVIDIA GPUs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes in int8 `[outputs, inputs]` to uint8 `[outputs, inputs / 2]`, the first in the low half."""
    return (codes[:, 0::2] & 15).view(torch.uint8) | (codes[:, 1::2] << 4).view(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes that `pack` packed, int8 `[outputs, inputs]`."""
    pairs = (
        torch.stack((packed << 4, packed), dim=-1).view(torch.int8) >> 4
    )  # arithmetic shift: it extends the sign
    return pairs.flatten(1)


def planned(
    layer: torch.nn.Module, format: QuantFormat, *, native: bool, amax: float | None = None
) -> QuantLinear:
    """The layer in a format, its weight encoded on its own device."""
    kernel = kernel_for(format, tuple(layer.weight.shape), layer.weight.device, native)
    kind = QuantLinear if isinstance(layer, torch.nn.Linear) else PlannedConv
    return kind(layer, format, kernel=kernel, amax=amax)


def _convolution(layer: torch.nn.Module):
    settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return getattr(F, f"conv{layer.weight.ndim - 2}d"), settings
