"""What every engine is: one component of the model, named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from wanlab.core.errors import WanlabError

TensorType = tuple[str, tuple[int | str, ...]]
"""dtype as torch names it, and shape; a free axis is its name."""


class Engine(Protocol):
    """One component, ready to run.

    Attributes:
        name: kind and place, e.g. `"eager"`, `"compiled"`, `"onnxruntime-cuda"`, `"tensorrt"`, `"tvm-llvm"`.
        device: where its inputs and outputs live.
        inputs, outputs: tensor name -> type.
        metadata: at least `component` and `model` where they are known.
        size_bytes: of its files, or of its weights where there is no file.
        load_ms: from the files to an engine that can run.
    """

    name: str
    device: torch.device
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    metadata: Mapping[str, str]
    size_bytes: int
    load_ms: float

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once; inputs are cast and moved where they differ, outputs are new tensors on `device`."""
        ...

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        *,
        stream: int | None = None,
        cuda_graph: bool = False,
    ) -> Callable[[], None]:
        """A call that runs the engine once over memory that stays where it is.

        On a GPU it puts the work on `stream` (a `CUstream` handle) and returns at once; on the CPU it returns
        when the outputs are written. Nothing is copied between host and device.

        Args:
            inputs, outputs: every tensor by name, on `device`, contiguous, of the engine's dtypes.
            stream: None takes the current stream of PyTorch.
            cuda_graph: capture once and replay.

        Raises:
            WanlabError: a tensor that does not fit, or an engine that cannot be captured.
        """
        ...


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
