"""Opset and dtype of a graph: what was asked for, checked, or what suits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.convert.components import FUSED_OPSET
from wanlab.errors import WanlabError, did_you_mean
from wanlab.models.loading import DTYPES

if TYPE_CHECKING:
    import torch

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 17, 24, 20
BFLOAT16_OPSET = 22  # the first whose Conv takes it


def chosen_opset(opset: int | None, dtype: str) -> int:
    """The opset that was asked for, or the one that suits the dtype.

    Raises:
        WanlabError: none that the exporter has, or none with convolutions in bfloat16.
    """
    narrow = dtype == "torch.bfloat16"
    if opset is None:
        return FUSED_OPSET if narrow else DEFAULT_OPSET
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise WanlabError(f"opset is {opset}; give {MIN_OPSET} to {MAX_OPSET}")
    if narrow and opset < BFLOAT16_OPSET:
        raise WanlabError(
            f"opset {opset} has no convolution in bfloat16; give {BFLOAT16_OPSET} or more, or another dtype"
        )
    return opset


def chosen_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """The dtype of a name, or the default.

    Raises:
        WanlabError: no graphs can be had in it.
    """
    import torch

    if name is None:
        return default
    if name not in DTYPES:
        raise WanlabError(f"no graphs in {name!r}{did_you_mean(name, DTYPES)}; give {', '.join(DTYPES)}")
    return getattr(torch, name)
