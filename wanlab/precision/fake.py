"""Quantisation in PyTorch arithmetic: what a Q/DQ graph computes, without the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean
from wanlab.precision.formats import Format, Numbers, check_blocks, decode_weight, encode_weight, get_format

if TYPE_CHECKING:
    import torch


def fake_quantize(values: torch.Tensor, scale: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """`values` rounded to codes and back, in their own dtype; `scale` broadcasts against them."""
    return numbers.decode(numbers.encode(values, scale), scale, values.dtype)


@contextmanager
def fake_quantized(
    network: torch.nn.Module,
    formats: Mapping[str, str | Format],
    amax: Mapping[str, float] | None = None,
) -> Iterator[torch.nn.Module]:
    """Inside the block layers of a network compute with rounded weights and inputs, as `quantize` would have it.

    The originals of the weights stay in memory and come back at the end.

    Args:
        network: eager; its own dtype is that of the scales.
        formats: layer -> format.
        amax: layer -> largest magnitude of its input's codes, e.g. `Calibration.amax`.

    Raises:
        WanlabError: an unknown layer or format, a missing range, or blocks that do not fill a layer.
    """
    import torch

    modules = dict(network.named_modules())
    plan = {layer: get_format(name) for layer, name in formats.items()}
    for layer, wanted in plan.items():
        if not hasattr(modules.get(layer), "weight"):
            raise WanlabError(f"the network has no layer {layer!r}{did_you_mean(layer, modules)}")
        if wanted.activation is not None and layer not in (amax or {}):
            raise WanlabError(
                f"no range for the input of {layer}; give amax= from a calibration of this layer"
            )
        check_blocks(tuple(modules[layer].weight.shape), wanted.weight, layer)
    originals, handles = {}, []
    try:
        for layer, wanted in plan.items():
            module = modules[layer]
            originals[layer] = module.weight.data
            codes, scale = encode_weight(module.weight.data, wanted.weight, module.weight.dtype)
            module.weight.data = decode_weight(codes, scale, wanted.weight, module.weight.dtype)
            if wanted.activation is not None:
                range_ = torch.tensor(amax[layer], device=module.weight.device)
                step = wanted.activation.scale(range_, module.weight.dtype)
                handles.append(module.register_forward_pre_hook(_rounding(step, wanted.activation)))
        yield network
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in originals.items():
            modules[layer].weight.data = weight


def _rounding(scale: torch.Tensor, numbers: Numbers):
    def rounded(module, args):
        return (fake_quantize(args[0], scale, numbers), *args[1:])

    return rounded
