"""Which model a trace is of, as far as it says so: its name, the number of an expert's layers, their width and heads."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from wanlab import models
from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import COMPONENTS, EXPERTS, attribute
from wanlab.diagnose.operators import product_sizes
from wanlab.diagnose.trace import Trace
from wanlab.diagnose.trace_tables import layer_numbers
from wanlab.models.spec import ModelSpec

FLASH_HEADS = re.compile(r"Flash_(?:fwd|bwd)_kernel_traits<(\d{1,4})\b")
FLASH_SIZES = (32, 64, 96, 128)
"""Sizes of heads that every FlashAttention 2 has kernels for; a head between two takes the larger."""


@dataclass(frozen=True)
class ModelFacts:
    """What tells one model from another; None where it is not known.

    Attributes:
        name: as the capture wrote it, or of the registry.
        experts: number of experts that ran, or that the model has.
        layers, width: blocks of an expert, and their hidden size.
        head_size: channels of a head, rounded up as FlashAttention's kernels round it.
    """

    name: str | None = None
    experts: int | None = None
    layers: int | None = None
    width: int | None = None
    head_size: int | None = None

    def __str__(self) -> str:
        layers = f"{self.layers} layers" if self.layers else ""
        width = f"width {self.width:,}" if self.width else ""
        sizes = " of ".join(filter(None, (layers, width)))
        name = self.name or "an unnamed model"
        return f"{name} ({sizes})" if sizes else name


def traced_model(trace: Trace) -> ModelFacts:
    """Facts from the named ranges of a trace, the shapes of its products and the names of its kernels; None where it has
    none."""
    host, placed = trace.host, attribute(trace)
    names = host["name"].cat.categories
    layers = [number + 1 for name, number in layer_numbers(names).items() if name.startswith(EXPERTS)]
    experts = sum(name in EXPERTS for name in names)
    width = None
    if placed.has_ranges:
        inside = np.isin(placed.component, [COMPONENTS.index(name) for name in EXPERTS])
        products = host.loc[inside & (placed.flop > 0), ["name", "inputs"]].value_counts()
        square: Counter[int] = Counter()
        for (name, inputs), count in products[products > 0].items():
            if (sizes := product_sizes(name, inputs)) and sizes[0] == sizes[1]:
                square[sizes[0]] += count
        # Queries, keys, values and outputs of both attentions are square products of the hidden size.
        width = square.most_common(1)[0][0] if square else None
    heads = {
        int(match[1]) for name in trace.kernels["name"].unique() if (match := FLASH_HEADS.search(str(name)))
    }
    head_size = heads.pop() if len(heads) == 1 else None
    return ModelFacts(
        trace.generation.get("model"), experts or None, max(layers, default=None), width, head_size
    )


def model_facts(spec: ModelSpec) -> ModelFacts:
    """The same facts of a model of the registry, from its configuration."""
    experts = [name for name in spec.components if name.startswith("expert")]
    config = spec.part(spec.part_of(experts[0])).config if experts else {}
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = heads * size if heads and size else None
    head_size = next((each for each in FLASH_SIZES if size and size <= each), None)
    layers = config.get("num_layers")
    if isinstance(
        layers, int
    ):  # and the blocks of its other lists: HunyuanVideo's of one stream, those that control Wan VACE
        layers += (config.get("num_single_layers") or 0) + len(config.get("vace_layers") or ())
    return ModelFacts(spec.name, len(experts) or None, layers, width, head_size)


def trace_caveat(trace: Trace, model: str | ModelSpec | None = None) -> str:
    """What a reader of a trace has to know first: `other_model` and the trace's cautions, as sentences; "" without any."""
    cautions = "".join(f"{text[:1].upper()}{text[1:]}. " for text in trace.cautions)
    return other_model(trace, model) + cautions


def other_model(trace: Trace, model: str | ModelSpec | None) -> str:
    """A sentence, with a space at its end, that a trace is not of the named model; "" if nothing speaks for that.

    Name, number of layers, width and size of heads are compared, as far as both are known.
    """
    if model is None:
        return ""
    found = traced_model(trace)
    try:
        named = model_facts(model if isinstance(model, ModelSpec) else models.get(model))
    except WanlabError:  # a model that is not on this machine: its name is all that is known
        named = ModelFacts(str(model))
    pairs = [(getattr(found, name), getattr(named, name)) for name in ("name", "layers", "width")]
    differ = [pair for pair in pairs if None not in pair and pair[0] != pair[1]]
    more_experts = (found.experts or 0) > (named.experts or 2)
    if not differ and not more_experts:
        if None not in (found.head_size, named.head_size) and found.head_size != named.head_size:
            return (
                f"The trace's attention kernels are for heads of up to {found.head_size} channels, those of {named} for"
                f" {named.head_size}: it is of another model. "
            )
        return ""
    if found.name == named.name:
        return f"The trace names {named}, but what ran in it is {replace(found, name='a model')}. "
    return f"The trace is of {found}, not of {named}. "
