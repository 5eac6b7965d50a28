"""A model whose experts' repeated blocks are compiled."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    from wanlab.models.generate import Model

VERSIONS = 64
"""Of a block's code that the compiler keeps before it gives up: a plan makes a version of every kind of block."""


def compile_blocks(model: Model) -> Model:
    """The experts' blocks by torch.compile, each kind of block compiled once, at its first call.

    Regional compilation, as in https://docs.pytorch.org/tutorials/recipes/regional_compilation.html. The given model stays
    eager; both share every weight.

    Raises:
        WanlabError: no expert that is loaded has repeated blocks.
    """
    import torch

    twin = copy.copy(model)
    twin.pipeline = copy.copy(model.pipeline)
    twin.pipeline.scheduler = copy.deepcopy(model.pipeline.scheduler)
    found = False
    for name, network in model.components.items():
        if not name.startswith("expert") or not hasattr(network, "blocks"):
            continue
        # Compiling marks a module, so it is done on a copy that shares every tensor.
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        other = copy.deepcopy(network, shared)
        for block in other.blocks:
            block.compile()
        setattr(twin.pipeline, model.spec.part_of(name), other)
        found = True
    if not found:
        raise WanlabError(f"{model.spec.name} has no repeated blocks to compile")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    return twin
