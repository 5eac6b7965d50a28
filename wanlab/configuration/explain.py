"""A configuration resolved on a model: engines and files by component, layers and bytes by format; reads no weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache

from wanlab import models
from wanlab.configuration.configuration import Configuration, load_configuration
from wanlab.configuration.configure import (
    COMPILED,
    files_folder,
    graphs_folder,
    missing,
    plan_folder,
    planned_in_graphs,
)
from wanlab.core.errors import WanlabError
from wanlab.engines.registry import EAGER, EngineKind, engine_kind
from wanlab.models.loading import resolve
from wanlab.models.networks import needed_bytes, skeleton
from wanlab.models.shapes import latent_shape
from wanlab.models.spec import EXPERTS, ModelSpec
from wanlab.models.weights import check_room, check_size, open_checkpoint
from wanlab.precision.assignment import assign_architecture
from wanlab.precision.formats import get_format
from wanlab.precision.plan import is_float
from wanlab.techniques.registry import made
from wanlab.techniques.switch_on import lacks, shares_by_operations
from wanlab.techniques.technique import Technique


@dataclass(frozen=True, eq=False)
class Explanation:
    """A configuration resolved on a model.

    Attributes:
        components: a row each: component, engine, title, plan (`"in PyTorch"`, `"in the graph"` or `""`), file (that the
            engine opens once it is made; `""` where it needs none).
        formats: a row per component and format: component, format, layers, weights, size_bytes, bits_per_weight,
            weights_percent, flop_percent; None without a plan.
        techniques: a row per technique, in the order in which they are applied: technique, does, tier, order_reason, bound.
        missing: a line for each thing that this machine lacks. checks: a sentence for each check of `configure`.
        size: size of the videos that files and operations are for: height and width in pixels, frames.
    """

    configuration: Configuration
    model: str
    components: pd.DataFrame
    formats: pd.DataFrame | None
    techniques: pd.DataFrame
    missing: tuple[str, ...]
    checks: tuple[str, ...]
    size: dict[str, int]


def explain(
    configuration: str | os.PathLike | Configuration,
    model: str = "wan-nano",
    folder: str | os.PathLike = "outputs/configured",
    *,
    device: str = "auto",
    **size: int | None,
) -> Explanation:
    """Resolve a configuration on a model.

    Args:
        configuration: configuration, its name, or its file.
        model: registry name, local folder or hub id. folder: folder as `configure` takes it.
        device: `"auto"`, `"cpu"`, `"cuda"`.
        size: height, width, frames; the model's defaults where not given.

    Raises:
        WanlabError: as `load_configuration` and `wanlab.models.get`; a plan that does not fit the model.
    """
    configuration, spec = load_configuration(configuration), models.get(model)
    place, dtype = resolve(device, "auto")
    names = ("height", "width", "frames")
    size = {name: getattr(spec.defaults, name) if size.get(name) is None else size[name] for name in names}
    tokens = latent_shape(spec, size["height"], size["width"], size["frames"]).tokens
    files = files_folder(folder, spec, "pretrained", str(dtype).removeprefix("torch."), size)
    in_graphs = planned_in_graphs(configuration, spec.components)
    rows = [_row(configuration, name, files, name in in_graphs) for name in spec.components]
    formats, idle = None, []
    if configuration.plan is not None:
        short = {"float32": "fp32", "float16": "fp16"}.get(str(dtype).removeprefix("torch."), "bf16")
        default = short if configuration.plan.default == "model" else None
        assignment = assign_architecture(configuration.plan, spec, default)
        formats = assignment.cost(tokens, spec.defaults.text_tokens)
        idle = assignment.without_effect()
    techniques = made(configuration.techniques)
    engines = {name: configuration.engine_of(name) for name in spec.components}
    lacking = [(each.name, lacks(each, spec, place, engines)) for each in techniques]
    return Explanation(
        configuration,
        spec.name,
        pd.DataFrame(rows),
        formats,
        _techniques(techniques, spec, size),
        (
            *missing(configuration, spec.components, place),
            *(f"for {name}: {reason}" for name, reason in lacking if reason),
            *_without_gain(techniques, spec, place),
            *_simulated(formats, in_graphs, place),
            *_not_here(spec, size, place, dtype),
        ),
        (*_checks(configuration, spec, in_graphs), *idle),
        size,
    )


def _without_gain(techniques: list[Technique], spec: ModelSpec, device: torch.device) -> list[str]:
    """A line for each technique that is only simulated on a device."""
    reasons = {each.name: each.simulated(spec, device) for each in techniques}
    return [
        f"for {name} to save time: {reason}; it is simulated until then, with the same quality"
        for name, reason in reasons.items()
        if reason
    ]


def _techniques(techniques: list[Technique], spec: ModelSpec, size: dict[str, int]) -> pd.DataFrame:
    shares = shares_by_operations(spec, **size) if techniques else None
    rows = [
        {
            "technique": each.name,
            "does": each.does,
            "tier": each.tier,
            "order_reason": each.order_reason,
            "bound": str(each.bound(shares)),
        }
        for each in techniques
    ]
    return pd.DataFrame(rows, columns=["technique", "does", "tier", "order_reason", "bound"])


def _not_here(spec: ModelSpec, size: dict[str, int], device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for weights that are not on this machine, and for memory that is too small for them or for the videos."""
    lines = []

    def tried(check: Callable[[], Any]) -> None:
        try:
            check()
        except WanlabError as error:
            lines.append(str(error))

    if spec.is_local:
        for part in spec.parts:
            tried(partial(open_checkpoint, Path(spec.source) / part.name, network=part.class_name))
    elif not isinstance(try_to_load_from_cache(spec.source, "model_index.json"), str):
        lines.append(
            f"the weights of {spec.name} ({spec.source}); they are fetched from the hub when they are loaded"
        )
    sizes = {part.name: needed_bytes(skeleton(part, dtype), dtype) for part in spec.parts}
    tried(lambda: check_room(spec.name, sizes, device, str(dtype).removeprefix("torch.")))
    tried(lambda: check_size(spec, size, device, dtype.itemsize))
    return lines


def _row(configuration: Configuration, component: str, files: Path, in_graph: bool) -> dict[str, str]:
    kind = engine_kind(configuration.engine_of(component))
    planned = configuration.plan is not None and component in EXPERTS
    return {
        "component": component,
        "engine": kind.name,
        "title": kind.title,
        "plan": ("in the graph" if in_graph else "in PyTorch") if planned and kind.plans else "",
        "file": _file(
            kind, component, plan_folder(files, configuration.plan) if in_graph else graphs_folder(files)
        ),
    }


def _file(kind: EngineKind, component: str, folder: Path) -> str:
    if kind.prepare is None:
        return ""
    return str(folder / f"{component}{kind.suffixes[0] if kind.suffixes else '.*'}")


def _simulated(formats: pd.DataFrame | None, in_graphs: list[str], device: torch.device) -> list[str]:
    """A line for each format whose products PyTorch has to simulate on this device."""
    if formats is None:
        return []
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    lines = []
    for name, rows in formats[~formats["component"].isin(in_graphs)].groupby("format", sort=False):
        if is_float(name) or get_format(name).activation is None:
            continue
        codes = get_format(name).weight.codes
        if capability < codes.capability:
            lines.append(
                f"products in {name} ({' and '.join(dict.fromkeys(rows['component']))}): simulated here, so they are not"
                f" faster; GPUs of compute capability {'.'.join(map(str, codes.capability))} have them"
            )
    return lines


def _checks(configuration: Configuration, spec: ModelSpec, in_graphs: list[str]) -> list[str]:
    by_engine: dict[str, list[str]] = {}
    for name in spec.components:
        by_engine.setdefault(configuration.engine_of(name), []).append(name)
    plan, experts = configuration.plan, [name for name in spec.components if name in EXPERTS]
    checks = []
    in_pytorch = [name for name in experts if plan is not None and name not in in_graphs]
    if in_pytorch:
        checks.append(
            f"plan {plan.name} on {' and '.join(in_pytorch)}: weights, operators and, on a GPU, kernels, layer by layer"
        )
    if in_graphs:
        checks.append(
            f"plan {plan.name} on {' and '.join(in_graphs)}: the types of every layer's nodes in the graph"
        )
    for name, components in by_engine.items():
        compiled = [component for component in components if name == COMPILED and component in EXPERTS]
        if compiled:
            checks.append(f"torch.compile makes graphs of the blocks of {' and '.join(compiled)}")
        elif name != EAGER:
            checks.append(
                f"{len(components)} of {len(spec.components)} networks run in {engine_kind(name).title}"
            )
    if configuration.techniques:
        checks.append(f"what each of {', '.join(configuration.techniques)} did in one generation")
    return checks or ["nothing: this is the model as it was loaded"]
