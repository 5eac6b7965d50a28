"""What a denoiser is called with: drawn at random from what its family says, as named tensors, and as arguments again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from wanlab.models.families.base import Tensor

TIMES = (900.0, 100.0)
"""Timesteps of random inputs: of the first clip of a batch and of the last; those of one clip lie in the middle."""


def described(inputs: Mapping[str, Any], make: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """Inputs of a call as a family describes them, with what `make(name, tensor)` answers for each `Tensor`, also in tuples;
    other values stay as they are."""

    def made(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(made(name, each) for each in value)
        return make(name, value) if isinstance(value, Tensor) else value

    return {name: made(name, value) for name, value in inputs.items()}


def dtype_of(tensor: Tensor, floats: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a call of a network that computes in `floats`."""
    return {"float": floats, "int": torch.long, "bool": torch.bool}[tensor.dtype]


def shared_by_batch(inputs: Mapping[str, Any]) -> set[str]:
    """Names of the inputs that all clips of a batch share: tables of positions, scales of blocks, and what CogVideoX 1.5
    calls `ofs`, one number for all."""
    return {
        name
        for name, value in inputs.items()
        if isinstance(value, tuple) or name.endswith("_scale") or name == "ofs"
    }


def drawn(
    inputs: Mapping[str, Any], generator: torch.Generator, network: torch.nn.Module, *, batch: int = 1
) -> dict[str, Any]:
    """Random arguments of a call of a denoiser, on its device and in its dtype.

    Args:
        inputs: inputs for one clip, as `Family.denoiser_inputs`.
        generator: source of the normal numbers, on the CPU. Masks and scales are ones, so that everything counts, and
            timesteps are those of `times`.
        batch: number of clips.
    """
    shared = shared_by_batch(inputs)

    def draw(name: str, tensor: Tensor) -> torch.Tensor:
        size = tensor.shape if name in shared else (batch * tensor.shape[0], *tensor.shape[1:])
        if name == "timestep":
            return times(size).to(network.device)
        dtype = dtype_of(tensor, network.dtype)
        if tensor.dtype != "float" or name.endswith(("_mask", "_scale")):
            return torch.ones(size, dtype=dtype, device=network.device)
        return torch.randn(size, generator=generator).to(network.device, dtype)

    return described(inputs, draw)


def times(size: Iterable[int]) -> torch.Tensor:
    """Timesteps of this size, one value per clip along the first axis: evenly from the first of `TIMES` to the last."""
    batch, *rest = size
    steps = torch.linspace(*TIMES, batch) if batch > 1 else torch.tensor([sum(TIMES) / 2])
    return steps.view(-1, *[1] * len(rest)).expand(batch, *rest).contiguous()


def largest_timestep(value: Any) -> float:
    """The timestep of a call, which waits for the device that holds it; of timesteps per token the largest."""
    if hasattr(value, "cpu"):
        value = value.detach().cpu()  # before the maximum, which would otherwise launch a kernel
    return float(value.max()) if hasattr(value, "max") else float(value)


def flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a call by name, with tensors in a tuple or list as inputs of their own: `rope` -> `rope_0`, `rope_1`."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        parts = isinstance(value, tuple | list) and len(value) > 0
        if parts and all(isinstance(part, Tensor | torch.Tensor) for part in value):
            found |= {f"{name}_{index}": part for index, part in enumerate(value)}
        else:
            found[name] = value
    return found


def gathered(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Arguments again of what `flat` named, in the order of `names`, the parameters of the network.

    A value whose name is no parameter is part of a tuple: `rope_0` and `rope_1` of `rope`.
    """
    names = list(names)
    found: dict[str, Any] = {}
    for name, value in values.items():
        whole, _, index = name.rpartition("_")
        if name not in names and whole in names and index.isdecimal():
            found[whole] = (*found.get(whole, ()), value)
        else:
            found[name] = value
    return {name: found[name] for name in sorted(found, key=names.index)}
