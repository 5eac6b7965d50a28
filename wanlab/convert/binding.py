"""Whether memory that is given to an engine is what the engine takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wanlab.convert.engine import TensorType
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch


def check_bound(
    engine: str,
    kinds: Mapping[str, TensorType],
    given: Mapping[str, torch.Tensor],
    device: str,
    *,
    dtypes: bool = True,
) -> None:
    """Refuse memory that does not fit.

    Args:
        engine: how messages name it.
        kinds: tensor name -> dtype and shape; a free axis is its name.
        given: tensor name -> memory for it.
        device: `"cpu"` or `"cuda"`.
        dtypes: False where the engine finds out when it runs.

    Raises:
        WanlabError: a tensor that is missing, of another dtype, device or size, or not contiguous.
    """
    for name, (dtype, _) in kinds.items():
        if name not in given:
            raise WanlabError(f"{engine} needs memory for {name!r}; {', '.join(given) or 'none'} was given")
        tensor = given[name]
        same = not dtypes or str(tensor.dtype) == f"torch.{dtype}"
        if not same or tensor.device.type != device:
            raise WanlabError(
                f"{name!r} of {engine} is {dtype} on {device}; {tensor.dtype} on {tensor.device} was given"
            )
        if not tensor.is_contiguous():
            raise WanlabError(f"{name!r} is not contiguous; give tensor.contiguous()")


def fits(wanted: tuple[int | str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a shape is one of a graph's, whose free axes are names."""
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or want == size for want, size in zip(wanted, shape, strict=True)
    )
