"""Units of work of a sensitivity measurement with their calls, and finished parts."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import atomic_path
from wanlab.models.blocks import blocks_of, linears, split_path
from wanlab.precision.assignment import choose_layers
from wanlab.precision.formats import QuantFormat, check_blocks, get_format
from wanlab.precision.recording import RecordedCall, Recording
from wanlab.precision.sensitivity.forward import SamplerWeights, WeightErrors, layers_by_block

VERSION = 1
DEFAULT_FORMATS = ("int8", "fp8", "int8-weight", "int4-weight")


@dataclass(frozen=True, eq=False)
class Target:
    """One expert to measure.

    Attributes:
        network: network in eager PyTorch, its weights as loaded.
        layers: linear layers in blocks. amax: layer -> range of its input, for formats that round it.
        key: hash of weights, recording, layers, ranges and formats.
    """

    component: str
    network: torch.nn.Module
    layers: tuple[str, ...]
    amax: dict[str, float]
    key: str


@dataclass(eq=False)
class Setting:
    """What all units of a measurement share.

    Attributes:
        targets: component -> expert that is measured. networks: component -> network of each loaded expert.
        guidance_kind: how guidance is computed, as `Family.guidance`.
        probes: number of directions on the final latents. follow: whether errors are propagated through later steps.
    """

    recording: Recording
    targets: Mapping[str, Target]
    networks: Mapping[str, torch.nn.Module]
    guidance_kind: str
    formats: list[QuantFormat]
    sampler: SamplerWeights
    guidance_scale: float
    probes: int
    follow: bool
    seed: int
    weights: WeightErrors = field(default_factory=WeightErrors)

    def arguments(self, call: RecordedCall) -> dict[str, Any]:
        """Arguments of the network in a call, in its order, on its device."""
        return self.recording.arguments(call, self.networks[call.component])

    def tensors(self, call: RecordedCall) -> list[torch.Tensor]:
        """The same without their names, of a network that takes tensors alone."""
        return list(self.arguments(call).values())

    def guidance(self, call: RecordedCall, unit: Unit) -> float:
        """Weight of a branch's velocity in the step's: classifier-free guidance where both branches ran."""
        if not any(each.branch == "uncond" and each.step == call.step for each in unit.calls):
            return 1.0
        return self.guidance_scale if call.branch == "cond" else 1.0 - self.guidance_scale

    def products(self, target: Target) -> float:
        """Number of products for the errors of one call's layers, over that of the linear layers in one forward."""
        inputs = {each.activation for each in self.formats if each.activation is not None}
        chosen = sum(target.network.get_submodule(name).weight.numel() for name in target.layers)
        inside = linears(target.network, inside=True) or linears(target.network)
        share = chosen / sum(module.weight.numel() for module in inside.values())
        return share * (1 + len(self.formats) + len(inputs))


@dataclass(frozen=True)
class Unit:
    """Calls that are measured together, last step first: `"e0"`, an example, or `"e0-s3"`, one step of it."""

    name: str
    example: int
    calls: tuple[RecordedCall, ...]


def make_formats(names: Sequence[str | QuantFormat]) -> list[QuantFormat]:
    """Formats from their names, each once."""
    known = [get_format(name) for name in ([names] if isinstance(names, str | QuantFormat) else names)]
    if not known:
        raise WanlabError("no format to measure; give formats=('int8', ...)")
    return list({each.name: each for each in known}.values())


def make_target(
    component: str,
    networks: Mapping[str, torch.nn.Module],
    recording: Recording,
    ranges: Any,
    chosen: tuple[Any, Any],
    formats: Sequence[QuantFormat],
    follow: bool,
    by_blocks: bool = True,
) -> Target:
    """An expert with its layers and ranges, checked.

    Args:
        networks: component -> network of each loaded expert. chosen: layers and those to leave out, as `choose_layers` takes
            them.
        follow: whether errors are propagated through the steps of other experts, whose weights then are in the key.
        by_blocks: whether the forward goes block by block, so that layers must lie in blocks.

    Raises:
        WanlabError: ranges of another component, other weights or without a layer; layers that are no linear layers
            of blocks.
    """
    network = networks[component]
    names = choose_layers(network, *chosen)
    if by_blocks:
        layers_by_block(names)
    weights = {name: _weights_key(other) for name, other in networks.items() if follow or name == component}
    if getattr(ranges, "component", component) != component:
        raise WanlabError(f"the ranges for {component} are of {ranges.component}; calibrate {component}")
    identity = getattr(ranges, "identity", None)
    if identity is not None and identity.weights != weights[component]:
        raise WanlabError(f"the ranges for {component} were measured on other weights; calibrate it again")
    known = dict(getattr(ranges, "amax", ranges) or {})
    rounding = [each.name for each in formats if each.activation is not None]
    for name in names:
        module = network.get_submodule(name)
        if not isinstance(module, torch.nn.Linear):
            raise WanlabError(f"{name} of {component} is {type(module).__name__}; give linear layers")
        if rounding and name not in known:
            raise WanlabError(
                f"no range for the input of {name} of {component}, which {rounding[0]} rounds; give its calibration"
                " with this layer, or formats of weights alone"
            )
        for each in formats:
            check_blocks(tuple(module.weight.shape), each.weight, f"{component}'s {name}")
    amax = {name: float(known[name]) for name in names if name in known}
    inputs = [recording.inputs_key(name) for name in recording.components if name in weights]
    facts = [component, weights, inputs, names, amax, [each.to_dict() for each in formats]]
    return Target(component, network, names, amax, digest(facts))


def make_units(
    recording: Recording, components: Sequence[str], calls: int | None, schedule: Sequence[str]
) -> list[Unit]:
    """Units of work.

    Args:
        components: components that are measured.
        calls: number of steps per expert and example, evenly spread; None takes whole examples from their last step to
            the first that one of the components runs.
        schedule: component of every step of the generation.

    Raises:
        WanlabError: a recording without every step of the generation, and no number of calls.
    """
    units = []
    for component in components:
        recording.of(component)  # refuses what was not recorded
    for example in sorted({call.example for call in recording.calls}):
        recorded = [call for call in recording.calls if call.example == example and call.step is not None]
        if calls is None:
            first = min((c.step for c in recorded if c.component in components), default=None)
            if first is None:
                continue
            recorded_steps = {call.step for call in recorded}
            missing = [step for step in range(first, len(schedule)) if step not in recorded_steps]
            if missing:
                expert = schedule[missing[0]]
                mend = (
                    "record all steps"
                    if expert in recording.components
                    else "record it too (components=None)"
                )
                raise WanlabError(
                    f"step {missing[0]} of example {example}, which {expert} runs, is not in the recording, so errors cannot"
                    f" be followed to the final latents; {mend}, or give calls= to measure some without following them"
                )
            followed = [call for call in recorded if call.step >= first]
            units.append(Unit(f"e{example}", example, _backwards(followed)))
            continue
        for component in components:
            own = sorted({c.step for c in recorded if c.component == component})
            for step in spread(own, calls):
                at = [c for c in recorded if c.component == component and c.step == step]
                units.append(Unit(f"e{example}-s{step}", example, _backwards(at)))
    return units


def spread(steps: Sequence[int], count: int) -> list[int]:
    """A number of the steps, evenly spread, each in the middle of its share."""
    if count < 1:
        raise WanlabError(f"calls must be at least 1, not {count}")
    if count >= len(steps):
        return list(steps)
    return [steps[int((i + 0.5) * len(steps) / count)] for i in range(count)]


def check_known(names: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise a `WanlabError` for the first name that is not known."""
    for name in names:
        if name not in known:
            raise WanlabError(f"no {what} {name!r}{did_you_mean(name, known)}; there is {', '.join(known)}")


def check_shard(shard: tuple[int, int]) -> None:
    """Raise a `WanlabError` unless it is (index, count)."""
    index, count = shard
    if not 0 <= index < count:
        raise WanlabError(f"shard is (index, count) with 0 <= index < count, not {shard}")


def digest(facts: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps([VERSION, facts], sort_keys=True).encode()).hexdigest()


def _weights_key(network: torch.nn.Module) -> str:
    return weights_key(network)


def _backwards(calls: Sequence[RecordedCall]) -> tuple[RecordedCall, ...]:
    return tuple(sorted(calls, key=lambda call: (-call.step, call.branch != "cond")))


ARRAYS = ("local", "velocity", "paths")


@dataclass(frozen=True)
class Cost:
    """Cost of a unit of work.

    Attributes:
        forwards: number of passes of the whole expert: block-forwards over blocks, those for gradients included.
        backwards: number of gradients of one scalar through the whole expert: block-backwards over blocks.
        products: number of products for the errors of formats, over that of one forward.
        time_ms: time of the unit. forward_ms: time of one plain forward of the same call, summed over the calls.
    """

    forwards: float = 0.0
    backwards: float = 0.0
    products: float = 0.0
    time_ms: float = 0.0
    forward_ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True, eq=False)
class PartFacts:
    """Facts of a part.

    Attributes:
        component, unit: component and unit that were measured; a unit is called `"e0"` or `"e0-s3"`.
        key: hash of what is measured: the component's weights, its recording, layers, ranges and formats.
        layers, formats: names. parameters, amax: number of parameters and range of the input of every layer.
        calls: example, step, branch, velocity_sq (squared norm of the velocity) of every call.
        coherent: see `Part`.
        cost: cost of the unit; of several components in one unit the first has all of it.
        passes: number of calls that were computed, also of components that are not measured; again in the first alone.
        blocks: number of every layer's block over all lists of blocks; None outside them.
    """

    component: str
    unit: str
    key: str
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    parameters: tuple[int, ...]
    amax: tuple[float | None, ...]
    calls: tuple[dict[str, Any], ...]
    coherent: bool
    cost: Cost
    passes: int
    blocks: tuple[int | None, ...] = field(default=(), kw_only=True)

    def place(self, index: int) -> tuple[int | None, str]:
        """Number of a layer's block and its name inside; parts of earlier versions hold layers of one list of blocks."""
        layer = self.layers[index]
        inside = not self.blocks or self.blocks[index] is not None
        number = self.blocks[index] if self.blocks else int(layer.split(".")[1])
        return number, layer.split(".", 2)[2] if inside else layer


@dataclass(frozen=True, eq=False)
class Part(PartFacts):
    """Errors of the layers of one component in one unit of work: an example, or a step of it.

    Attributes:
        local: squared error of a layer's output over its squared norm, `[calls, layers, formats]`.
        velocity: the same of the velocity, caused by this layer alone, `[calls, layers, formats]`.
        paths: change of the final latents along random directions, over the latents' norm, `[calls, layers, formats,
            directions]`: signed, and the same directions for all calls of an example, so that what belongs together
            can be added before it is squared. Or, where `coherent` is false, its root mean square, `[..., 1]`.
    """

    local: np.ndarray
    velocity: np.ndarray
    paths: np.ndarray


@dataclass(frozen=True, eq=False)
class Row:
    """Result of one call: its facts, and the arrays of a `Part` without the axis of calls."""

    call: dict[str, Any]
    local: np.ndarray
    velocity: np.ndarray
    paths: np.ndarray


def make_parts(
    setting: Setting, unit: Unit, rows: dict[str, list[Row]], *, coherent: bool, cost: Cost
) -> dict[str, Part]:
    """The parts of a unit, one per component that was measured in it."""
    parts: dict[str, Part] = {}
    passes = len(unit.calls)
    for component, calls in rows.items():
        target = setting.targets[component]
        modules = [target.network.get_submodule(name) for name in target.layers]
        places = blocks_of(target.network)
        blocks = [split_path(name, places)[0] for name in target.layers]
        parts[component] = Part(
            component=component,
            unit=unit.name,
            key=target.key,
            layers=target.layers,
            formats=tuple(each.name for each in setting.formats),
            parameters=tuple(sum(p.numel() for p in module.parameters()) for module in modules),
            amax=tuple(target.amax.get(name) for name in target.layers),
            calls=tuple(row.call for row in calls),
            coherent=coherent,
            cost=cost,
            passes=passes,
            blocks=tuple(None if block is None else block.number for block in blocks),
            **{name: np.stack([getattr(row, name) for row in calls]) for name in ARRAYS},
        )
        cost, passes = Cost(), 0
    return parts


def write_part(path: Path, part: Part) -> None:
    """Write a part; the file appears when it is complete."""
    facts = {each.name: getattr(part, each.name) for each in fields(PartFacts)}
    with atomic_path(path, ".npz") as draft:
        np.savez(
            draft,
            facts=json.dumps(msgspec.to_builtins(facts)),
            **{name: getattr(part, name) for name in ARRAYS},
        )


def read_part(path: Path) -> Part:
    """A part from its file.

    Raises:
        WanlabError: it is missing or broken.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            facts = msgspec.convert(json.loads(str(data["facts"])), PartFacts)
            arrays = {name: data[name] for name in ARRAYS}
        return Part(**vars(facts), **arrays)
    except (OSError, ValueError, KeyError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
        raise WanlabError(f"{path} is missing or broken ({error}); delete it and measure again") from error
