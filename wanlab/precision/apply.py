"""Plans in PyTorch: linear layers replaced by layers in the formats of the plan."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.engines.registry import EAGER
from wanlab.models.clocks import with_clock
from wanlab.models.networks import stored_dtype
from wanlab.models.pipeline import Model
from wanlab.models.variants import shared_copy
from wanlab.precision.assignment import EXPERTS, Assignment, assign
from wanlab.precision.calibration import Calibration
from wanlab.precision.denoiser import eager_network
from wanlab.precision.formats import get_format
from wanlab.precision.plan import FLOATS, KEEP, Plan, is_float, load_plan
from wanlab.precision.quant_linear import FEWEST_ROWS, INTEGER, CastLinear, QuantLinear, planned
from wanlab.precision.steps import StepClock, SteppedLayer, all_bands, step_range_name

AS_LOADED = "as-loaded"


def requested_formats(assignment: Assignment, component: str) -> pd.DataFrame:
    """Rows of the assignment, with `requested`: the format, or `"as-loaded"` where no rule gives another than the
    network's.

    Layers that a network keeps in float32 (the timestep's) stay so unless a rule names them.
    """
    rows = assignment.frame[assignment.frame["component"] == component]

    def requested(row) -> str:
        kept = pd.isna(row.rule) or assignment.plan.rules[int(row.rule)].format == KEEP
        return AS_LOADED if kept else row.format

    return rows.assign(requested=[requested(row) for row in rows.itertuples()])


def replace_layers(
    network, component: str, assignment: Assignment, ranges, native: bool, clock
) -> list[dict]:
    """Put planned layers into a network. Returns a record of every layer."""
    records = []
    for layer, rows in requested_formats(assignment, component).groupby("layer", sort=False):
        original = network.get_submodule(layer)
        variants = {}
        for row in rows.itertuples():
            if row.requested not in variants:
                variants[row.requested] = _variant(original, row.requested, layer, ranges, native)
            amax = None if ranges is None else ranges.get(layer)
            records.append(_record(row, original, variants[row.requested], amax))
        if rows["first_step"].notna().any():
            by_band = {
                step_range_name(band): next(
                    r.requested for r in rows.itertuples() if r.first_step <= band[0] <= r.last_step
                )
                for band in clock.bands
            }
            replacement = SteppedLayer(variants, by_band, clock)
        else:
            replacement = next(iter(variants.values()))
        if replacement is not original:
            parent, _, name = layer.rpartition(".")
            # Kept where numbers are names, as in a Sequential.
            setattr(network.get_submodule(parent), name, replacement)
    return records


def _variant(original, format_name: str, layer: str, ranges, native: bool):
    if format_name == AS_LOADED:
        return original
    if is_float(format_name):
        dtype = getattr(torch, FLOATS[format_name])
        return original if original.weight.dtype == dtype else CastLinear(original, format_name, dtype)
    format = get_format(format_name)
    amax = ranges[layer] if ranges is not None and format.activation is not None else None
    return planned(original, format, native=native, amax=amax)


def _record(row, original, replacement, amax: float | None) -> dict[str, Any]:
    before = original.weight
    same = replacement is original
    scaling = "" if same else replacement.scaling
    return {
        "component": row.component,
        "layer": row.layer,
        "kind": row.kind,
        "format": row.format,
        "first_step": row.first_step,
        "last_step": row.last_step,
        "kernel": "as loaded" if same else replacement.kernel,
        "input": scaling,
        "input_amax": amax if scaling == "static" else None,
        "note": f"decoded for fewer than {FEWEST_ROWS} rows"
        if not same and replacement.kernel == INTEGER
        else "",
        "weight_before_bytes": before.nbytes,  # replaced where the network was cast
        "weight_bytes": before.nbytes if same else held_bytes(replacement),
        "weight_error_percent": 0.0 if same else _distance(before, replacement.decoded()),
    }


def held_bytes(layer) -> int:
    """Bytes of a layer's weight as it is held: codes and scales, or a float; without bias and input scale."""
    named = {**layer._parameters, **layer._buffers}
    return sum(t.nbytes for name, t in named.items() if t is not None and name not in ("bias", "input_scale"))


def _distance(before, after) -> float:
    before = before.detach().float()
    size = before.norm()
    return float(100 * (after.float() - before).norm() / size) if size > 0 else 0.0


KERNELS = ("auto", "native", "simulated")


@dataclass(frozen=True, eq=False)
class Applied:
    """A model that computes by a plan.

    Attributes:
        model: generates as any other; the original is as it was, unless the plan was applied in place.
        assignment: the plan resolved to one format per layer of this model.
        kernels: name of what multiplies, in a sentence.
        frame: one row per layer and format: component, layer, kind, format, first_step, last_step (None where nothing
            changes with the step), kernel (`"scaled_mm"`, `"int_mm"`, `"decoded"`, `"simulated"`, `"cast"`, or
            `"as loaded"`), input (how it is scaled: `"static"`, `"per tensor"`, `"per token"`, or `""`), input_amax (of
            the calibration), note (where the kernel is not always the one named), weight_before_bytes, weight_bytes
            (codes and scales), weight_error_percent (distance of the weight from the original's, relative L2).
        in_place: whether the original's layers were replaced and freed.
        clock: steps of a plan that changes with the step; None where nothing does.
    """

    model: Model
    assignment: Assignment
    kernels: str
    frame: pd.DataFrame
    in_place: bool = False
    clock: StepClock | None = field(default=None, repr=False)

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Inside the block the networks compute as in this step; a generation counts its steps itself.

        Raises:
            WanlabError: the plan has no such step.
        """
        if self.clock is None:
            yield
            return
        with self.clock.at(step):
            yield

    def bytes(self) -> pd.DataFrame:
        """Weights by component and format: component, format, layers, weight_before_bytes, weight_bytes."""
        groups = self.frame.groupby(["component", "format"], as_index=False, sort=False)
        return groups.agg(
            layers=("layer", "nunique"),
            weight_before_bytes=("weight_before_bytes", "sum"),
            weight_bytes=("weight_bytes", "sum"),
        )


def apply_plan(
    model: Model,
    plan: Plan | str | os.PathLike,
    calibrations: Mapping[str, Calibration | Mapping[str, float]] | None = None,
    *,
    kernels: str = "auto",
    in_place: bool = False,
) -> Applied:
    """Make a model whose experts compute by a plan.

    Weights become the codes and scales of `wanlab.precision.formats`, one layer at a time on their device, and are held
    as such; layers that the plan does not change are shared with the original. Formats of 8 bits with rounded inputs
    multiply codes where the GPU can: `torch._scaled_mm` for fp8 and, with a scale per row and output, fp8-channel, from
    compute capability 8.9 on, `torch._int_mm` for int8. Weight-only formats decode at use. Elsewhere the arithmetic is
    simulated: weight and input rounded, the product in the layer's own dtype. Blocks may be compiled afterwards
    (`block.compile()`), with no graph break; every kind of block is a version of its own, and so is every range of steps,
    so that plans with many need a higher `torch._dynamo.config.recompile_limit`.

    Args:
        model: model from `wanlab.models.load`, the experts eager. Experts that are not loaded are not planned, and a rule
            for them alone fits nothing.
        plan: plan, name of a preset, or file.
        calibrations: component -> `Calibration`, or layer -> largest magnitude of its input, for static scales. A component
            without one scales every input by itself: per tensor (int8, fp8) or per token (fp8-channel).
        kernels: `"auto"`; `"native"` to multiply codes on the CPU too, as PyTorch can; `"simulated"`.
        in_place: replace the layers of `model` itself and free their weights, so that no expert is held twice. The model
            returned is then `model`, and there is no way back but to load it again.

    Raises:
        WanlabError: a plan that does not fit the model, a calibration of another component or without a layer, a
            component that has a plan or runs on an engine.
    """
    if kernels not in KERNELS:
        raise WanlabError(
            f"no kernels {kernels!r}{did_you_mean(kernels, KERNELS)}; give {', '.join(KERNELS)}"
        )
    if not isinstance(plan, Plan):
        plan = load_plan(plan)
    networks = experts_of(model)
    loaded = {getattr(torch, name): short for short, name in FLOATS.items()}[
        next(iter(networks.values())).dtype
    ]
    assignment = assign(plan, networks, default=plan.default if plan.default in FLOATS else loaded)
    ranges = _ranges(assignment, calibrations or {})
    bands = all_bands(assignment)
    clock = StepClock(plan, bands) if bands else None
    native = kernels == "native" or (kernels == "auto" and model.device.type == "cuda")
    default = getattr(torch, FLOATS[assignment.default])

    rows: list[dict[str, Any]] = []
    casts = False
    for component, network in networks.items():
        target = network if in_place else shared_copy(network)
        sizes = {name: network.get_submodule(name).weight.nbytes for name in _layers(assignment, component)}
        cast = plan.default in FLOATS and _cast(target, default)
        records = replace_layers(target, component, assignment, ranges.get(component), native, clock)
        rows += [row | {"weight_before_bytes": sizes[row["layer"]]} for row in records]
        casts |= cast
        networks[component] = target
    frame = pd.DataFrame(rows).astype({"first_step": "Int64", "last_step": "Int64"})
    changed = model if in_place else copy.copy(model)
    pipeline = model.pipeline if in_place else copy.copy(model.pipeline)
    pipeline.scheduler = with_clock(model.pipeline.scheduler, clock)
    for component, network in networks.items():
        setattr(pipeline, model.spec.part_of(component), network)
    changed.pipeline = pipeline
    changed.engines = dict(model.engines) | dict.fromkeys(networks, f"{EAGER}, plan {plan.name}")
    return Applied(
        changed,
        assignment,
        _sentence(frame, model.device, default if casts else None),
        frame,
        in_place,
        clock,
    )


def experts_of(model: Model) -> dict[str, torch.nn.Module]:
    """The experts that are loaded, by component.

    Raises:
        WanlabError: there is none, or one has a plan already or runs on an engine.
    """
    networks = {name: eager_network(model, name) for name in model.components if name in EXPERTS}
    if not networks:
        raise WanlabError(
            f"{model.spec.name} has no expert loaded to plan; name one in load(..., components=...)"
        )
    for name, network in networks.items():
        if any(isinstance(module, QuantLinear | CastLinear | SteppedLayer) for module in network.modules()):
            raise WanlabError(
                f"{name} computes by a plan already; merge the plans (precision.merge_plans) or load it again"
            )
    return networks


def _ranges(assignment: Assignment, calibrations: Mapping) -> dict[str, Mapping[str, float]]:
    """Component -> layer -> largest magnitude of its input, checked against the assignment."""
    ranges: dict[str, Mapping[str, float]] = {}
    for component, given in calibrations.items():
        if component not in assignment.components:
            raise WanlabError(
                f"a calibration is given for {component!r}{did_you_mean(component, assignment.components)};"
                f" planned are {', '.join(assignment.components)}"
            )
        amax = getattr(given, "amax", given)
        if getattr(given, "component", component) != component:
            raise WanlabError(
                f"the calibration for {component} is one of {given.component}; calibrate {component}"
            )
        for row in requested_formats(assignment, component).itertuples():
            rounds = not is_float(row.format) and get_format(row.format).activation is not None
            if rounds and row.layer not in amax:
                raise WanlabError(
                    f"no range for the input of {row.layer} in the calibration of {component}; calibrate with this"
                    " layer, or give none to scale every input by itself"
                )
        ranges[component] = amax
    return ranges


def _layers(assignment: Assignment, component: str) -> list[str]:
    frame = assignment.frame
    return list(dict.fromkeys(frame.loc[frame["component"] == component, "layer"]))


def _cast(network, dtype: torch.dtype) -> bool:
    """The network's parameters in another dtype, as it would have been loaded in it; whether that changed any."""
    changed = False
    for module_name, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = stored_dtype(network, f"{module_name}.{name}".lstrip("."), dtype)
            if parameter.dtype != kind:
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(kind), requires_grad=False))
                changed = True
    return changed


def _sentence(frame: pd.DataFrame, device, cast: torch.dtype | None) -> str:
    names = dict.fromkeys(frame["kernel"])
    operators = [f"torch._{name}" for name in names if name in ("scaled_mm", "int_mm")]
    where = "the CPU"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    parts = [f"{' and '.join(operators)} on {where}"] if operators else []
    if "simulated" in names:
        parts.append(f"simulated on {where}: weights and inputs rounded, products in the layer's float")
    if "decoded" in names:
        parts.append(f"weights decoded at use on {where}")
    if "cast" in names:
        parts.append("float layers between two casts")
    if cast is not None:
        parts.append(f"everything else cast to {str(cast).removeprefix('torch.')}")
    return "; ".join(parts) or "nothing planned: every layer as loaded"
