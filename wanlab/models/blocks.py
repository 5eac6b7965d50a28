"""The blocks of a denoiser, numbered over all of its lists of blocks in order of use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

ENDING = "blocks"
"""Ending of the names of a network's lists of blocks: `blocks`, `transformer_blocks`, `single_transformer_blocks`."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        path: its path in the network, such as `single_transformer_blocks.3`.
        number: its number over all lists, from 0.
        module: the block itself.
    """

    path: str
    number: int
    module: torch.nn.Module


def blocks_of(network: torch.nn.Module) -> list[Block]:
    """The blocks of a network in order of use: the items of its top-level module lists whose names end in `blocks`.

    Lists count in the order in which the network's class makes them. Lists of blocks inside other modules, such as those
    of a refiner of text, do not count.
    """
    lists = [
        (name, module)
        for name, module in network.named_children()
        if isinstance(module, torch.nn.ModuleList) and name.endswith(ENDING)
    ]
    found = [(f"{name}.{index}", block) for name, blocks in lists for index, block in enumerate(blocks)]
    return [Block(path, number, block) for number, (path, block) in enumerate(found)]


def split_path(layer: str, blocks: Iterable[Block]) -> tuple[Block | None, str]:
    """The block of a layer and the layer's name inside it; None and the whole name outside the blocks."""
    start = ".".join(layer.split(".")[:2])
    block = next((each for each in blocks if each.path == start), None)
    return (None, layer) if block is None else (block, layer[len(start) + 1 :])


def numbered_path(layer: str, blocks: Sequence[Block]) -> str:
    """A layer's name with the number of its block over all lists: `blocks.21.proj_mlp` for the layer
    `single_transformer_blocks.1.proj_mlp` after twenty other blocks. A layer of a network that has a list called `blocks`
    keeps its own name, and so do layers outside the blocks."""
    block, name = split_path(layer, blocks)
    if block is None or any(each.path.startswith(f"{ENDING}.") for each in blocks):
        return layer
    return f"{ENDING}.{block.number}.{name}"


def linears(network: torch.nn.Module, *, inside: bool = False) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of a network, in the order of its modules; `inside` takes those in the blocks alone."""
    starts = {block.path for block in blocks_of(network)}
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not (inside and ".".join(name.split(".")[:2]) not in starts)
    }
