"""The same model computed another way: another exact attention kernel, compiled blocks, rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.models.pipeline import Model


@contextmanager
def alternate_sdpa(device: torch.device) -> Iterator[str]:
    """Inside the block PyTorch's scaled dot product attention takes a kernel that is not its first choice.

    On a GPU that is the memory-efficient kernel (flash attention is the first choice), on a CPU the plain
    product, softmax, product. Engines outside PyTorch are not touched.

    Yields:
        Name of the kernel.
    """
    # The plain form would hold tokens x tokens numbers per head: tens of GiB for a real clip on a GPU. There it only
    # stands in where the other cannot: for a text encoder's bias, whose rows may not be aligned.
    backends = [SDPBackend.EFFICIENT_ATTENTION] * (device.type == "cuda") + [SDPBackend.MATH]
    with sdpa_kernel(backends):
        yield backends[0].name.lower()


RECOMPILE_LIMIT = 64
"""Versions of a block's code that the compiler keeps before it gives up. A plan makes one of every kind of block, and the
chunks of a VAE differ in what they remember: at PyTorch's own limit of 8 later blocks would stay eager."""


def shared_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are those of `network`."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def compiled_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A network that shares every weight with `network`, its large parts by torch.compile at their first call.

    Regional compilation, as in https://docs.pytorch.org/tutorials/recipes/regional_compilation.html: the transformer
    blocks, each kind compiled once; of a VAE its encoder and decoder; of anything else the whole. `network` stays
    eager, as compiling marks a module.
    """
    compiled = shared_copy(network)
    halves = [getattr(compiled, name, None) for name in ("encoder", "decoder")]
    parts = [
        *getattr(compiled, "blocks", []),
        *(half for half in halves if isinstance(half, torch.nn.Module)),
    ]
    for part in parts or [compiled]:
        part.compile()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return compiled


def compile_blocks(model: Model, components: Collection[str] | None = None) -> Model:
    """The experts' blocks by torch.compile, see `compiled_copy`. The given model stays eager; both share every weight.

    Args:
        components: which experts; None takes all.

    Raises:
        WanlabError: no expert that is loaded has repeated blocks.
    """
    compiled = copy.copy(model)
    compiled.pipeline = copy.copy(model.pipeline)
    compiled.pipeline.scheduler = copy.deepcopy(model.pipeline.scheduler)
    experts = {
        name: network
        for name, network in model.components.items()
        if name.startswith("expert")
        and hasattr(network, "blocks")
        and (components is None or name in components)
    }
    if not experts:
        raise WanlabError(f"{model.spec.name} has no repeated blocks to compile")
    for name, network in experts.items():
        setattr(compiled.pipeline, model.spec.part_of(name), compiled_copy(network))
    return compiled


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
