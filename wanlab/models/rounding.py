"""What a number format costs in quality, seen before there is a kernel for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    from wanlab.models.generate import Model

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def round_weights(model: Model, format: str) -> dict[str, float]:
    """Round every weight matrix of a model to a format, in place; sums are computed as before.

    Biases, scales and other vectors stay as they are. There is no scaling per tensor or channel, so an
    8-bit format does worse here than where it is used with scales.

    Args:
        model: from `wanlab.models.load`, all components eager.
        format: one of `FORMATS`.

    Returns:
        Component -> percent of its weights that the format changed; 0 means no effect.

    Raises:
        WanlabError: unknown format, or a component that runs on an engine.
    """
    import torch

    if format not in FORMATS:
        raise WanlabError(f"no format {format!r}{did_you_mean(format, FORMATS)}; use {', '.join(FORMATS)}")
    for name, engine in model.engines.items():
        if engine != "eager":
            raise WanlabError(
                f"{name} runs on {engine}, whose weights are in its file; round it before it is exported"
            )
    kind, moved = getattr(torch, format), {}
    for name, module in {
        model.spec.part_of(name): module for name, module in model.components.items()
    }.items():
        changed = total = 0
        for weight in module.parameters():
            if weight.ndim > 1:
                largest = torch.finfo(kind).max  # formats without infinity turn what is larger into NaN
                rounded = weight.detach().clamp(-largest, largest).to(kind).to(weight.dtype)
                changed += int((rounded != weight).sum())
                total += weight.numel()
                weight.data.copy_(rounded)
        moved[name] = 100.0 * changed / max(total, 1)
    return moved
