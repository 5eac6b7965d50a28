"""What a format does to one layer's output, and what that is worth along given directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.precision.fake import fake_quantize
from wanlab.precision.formats import Format, decode_weight, encode_weight

if TYPE_CHECKING:
    import torch

ROWS = 8192
"""Tokens at a time, so that the float32 copies of a long clip's activations stay small."""


@dataclass(frozen=True, eq=False)
class Projected:
    """A layer's error in one format.

    Attributes:
        relative_sq: squared norm of the output's error over that of the output.
        dots: sum of gradient times error for each gradient, `[directions]`, float64 on the CPU.
    """

    relative_sq: float
    dots: torch.Tensor


class WeightErrors:
    """Rounded weight less weight, of layers in formats, kept while they fit into a budget of bytes."""

    def __init__(self, budget_bytes: int = 2**30) -> None:
        self._kept: dict[tuple[int, str], torch.Tensor] = {}
        self._left = budget_bytes

    def of(self, module: torch.nn.Module, format: Format) -> torch.Tensor:
        """`[outputs, inputs]` in the weight's dtype."""
        key = (id(module), format.name)
        if key in self._kept:
            return self._kept[key]
        weight = module.weight.data
        codes, scale = encode_weight(weight, format.weight, weight.dtype)
        error = decode_weight(codes, scale, format.weight, weight.dtype) - weight
        if error.nbytes <= self._left:
            self._kept[key] = error
            self._left -= error.nbytes
        return error


def project(
    module: torch.nn.Module,
    given: torch.Tensor,
    gradients: list[torch.Tensor],
    formats: list[Format],
    amax: float | None,
    errors: WeightErrors,
) -> list[Projected]:
    """The error of a linear layer's output in each format, and its inner products with gradients.

    The error is taken as `(q(x) - x) W + q(x) (q(W) - W)`, which is `q(x) q(W) - x W` without the rounding of two
    large outputs to the layer's dtype.

    Args:
        module: linear.
        given: its input `[..., inputs]`.
        gradients: of its output, each `[..., outputs]`.
        amax: largest magnitude of the input's codes; for formats that round the input.
    """
    import torch
    from torch.nn.functional import linear

    weight = module.weight.data
    rows = given.reshape(-1, given.shape[-1])
    slopes = [each.reshape(-1, each.shape[-1]) for each in gradients]
    totals = [[torch.zeros((), dtype=torch.float64, device=rows.device)] * (1 + len(slopes)) for _ in formats]
    output_sq = torch.zeros((), dtype=torch.float64, device=rows.device)
    rounded_weights = [errors.of(module, each) for each in formats]
    with torch.no_grad():
        for start in range(0, len(rows), ROWS):
            x = rows[start : start + ROWS]
            output_sq = output_sq + _dot(out := linear(x, weight, module.bias), out)
            rounded = {
                each.activation: fake_quantize(x, scale_of(each, amax, weight), each.activation)
                for each in formats
                if each.activation is not None
            }
            # The part of the input's rounding is the same for all formats that round it alike.
            moved = {numbers: linear(q - x, weight) for numbers, q in rounded.items()}
            for place, format in enumerate(formats):
                numbers = format.activation
                error = linear(x if numbers is None else rounded[numbers], rounded_weights[place])
                if numbers is not None:
                    error = error + moved[numbers]
                parts = [_dot(error, error)]
                parts += [_dot(slope[start : start + ROWS], error) for slope in slopes]
                totals[place] = [a + b for a, b in zip(totals[place], parts, strict=True)]
        table = torch.stack([torch.stack(each) for each in totals]).cpu()
    size = float(output_sq)
    return [Projected(float(row[0]) / size if size else 0.0, row[1:]) for row in table]


def scale_of(format: Format, amax: float, weight: torch.Tensor) -> torch.Tensor:
    """The scale of a layer's input, as `fake_quantized` takes it."""
    import torch

    return format.activation.scale(torch.tensor(amax, device=weight.device), weight.dtype)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() * b.float()).sum().double()
