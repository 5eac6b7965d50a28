"""Variants of a model: another exact attention kernel, compiled blocks, rounded weights."""

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
    """Inside the block PyTorch's scaled dot product attention uses a kernel that is not its first choice.

    On a GPU that is the memory-efficient kernel (flash attention is the first choice), on a CPU the unfused
    computation: product, softmax, product. Engines outside PyTorch are not affected.

    Yields:
        Name of the kernel.
    """
    # The unfused form holds tokens x tokens numbers per head: tens of GiB for a real clip on a GPU. There it is only the
    # fallback for calls that the other kernel refuses: a text encoder's bias, whose rows may not be aligned.
    backends = [SDPBackend.EFFICIENT_ATTENTION] * (device.type == "cuda") + [SDPBackend.MATH]
    with sdpa_kernel(backends):
        yield backends[0].name.lower()


RECOMPILE_LIMIT = 64
"""Versions of one block's code that torch.compile keeps before it falls back to eager. A precision plan needs one for every
kind of block, and a VAE one for every kind of chunk; PyTorch's limit of 8 would leave later blocks eager."""


def shared_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy with modules of its own that shares the parameters and buffers of `network`."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def compiled_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A compiled copy of `network` that shares every weight with it; torch.compile runs at its first call.

    Regional compilation, as in https://docs.pytorch.org/tutorials/recipes/regional_compilation.html: of a transformer
    its blocks, each kind compiled once; of a VAE its encoder and decoder; of anything else the whole. `network` itself
    stays eager, because compilation changes a module.
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
    """A model whose experts' blocks are compiled, see `compiled_copy`. The given model stays eager; they share weights.

    Args:
        components: experts to compile; None means all.

    Raises:
        WanlabError: no loaded expert has repeated blocks.
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
    """Round every weight matrix of a model to a format, in place; the products are computed as before.

    Biases, scales and other vectors are not changed. There is no scale per tensor or channel, so an
    8-bit format loses more here than in a quantized model with scales.

    Args:
        model: from `wanlab.models.load`; all components must be eager.
        format: one of `FORMATS`.

    Returns:
        Component -> percent of its weights that changed; 0 means no effect.

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
                largest = torch.finfo(kind).max  # formats without infinity turn larger values into NaN
                rounded = weight.detach().clamp(-largest, largest).to(kind).to(weight.dtype)
                changed += int((rounded != weight).sum())
                total += weight.numel()
                weight.data.copy_(rounded)
        moved[name] = 100.0 * changed / max(total, 1)
    return moved
