"""Sensitivity of a model to the rounding of each layer."""

from __future__ import annotations

import os
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.core.manifest import Manifest
from wanlab.models.device import synchronise
from wanlab.models.families.base import BATCHED
from wanlab.precision.denoiser import eager_network, output_of
from wanlab.precision.formats import QuantFormat
from wanlab.precision.quant_linear import fake_quantized
from wanlab.precision.recording import Recording
from wanlab.precision.sensitivity.forward import (
    CheckpointedForward,
    Projected,
    by_blocks,
    even_weights,
    frozen,
    layers_by_block,
    project,
    sampler_weights,
)
from wanlab.precision.sensitivity.result import Sensitivity, make_bands
from wanlab.precision.sensitivity.work import (
    DEFAULT_FORMATS,
    Cost,
    Part,
    Row,
    Setting,
    Target,
    Unit,
    check_known,
    check_shard,
    digest,
    make_formats,
    make_parts,
    make_target,
    make_units,
    read_part,
    write_part,
)


def free_latents(given: Sequence[torch.Tensor], velocity: torch.Tensor) -> torch.Tensor:
    """Mask of 1, and of 0 in the first frame where that is given (timestep 0) and restored after the last step."""
    timestep = given[1]
    mask = torch.ones(1, 1, velocity.shape[2], 1, 1, device=velocity.device)
    if timestep.ndim == 2 and bool((timestep == 0).any()):
        mask[:, :, 0] = 0.0
    return mask


def final_norm_sq(given: Sequence[torch.Tensor], velocity: torch.Tensor, sigma: float | None) -> float:
    """Squared norm of the final latents as predicted by one call: x - sigma v, exact in the last step."""
    latents = given[0][:, : velocity.shape[1]].float()
    ended = latents - free_latents(given, velocity) * (sigma or 0.0) * velocity
    return float((ended**2).sum().double()) or 1.0


def draw(like: torch.Tensor, count: int, *seeds: object) -> list[torch.Tensor]:
    """Standard normal directions, the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
    return [torch.randn(like.shape, generator=generator).to(like.device) for _ in range(count)]


def probe_unit(unit: Unit, setting: Setting, tick: Callable[[], None]) -> dict[str, Part]:
    """Measure a unit, from its last step to its first; one part per component.

    Directions r ~ N(0, I) on the final latents are propagated back through the sampler and the networks: for step k and
    a layer, g = (d final / d output of the layer)^T r, so that g . error is the change along r by the layer's error,
    and its square is in expectation the squared norm of the change of the final latents (Hutchinson 1989,
    doi:10.1080/03610918908812806; used to choose precisions in HAWQ-V2, Dong et al. 2020, arXiv:1911.03852). It is
    first order in the error, as the start of AdaRound (Nagel et al. 2020, arXiv:2004.10568). Other directions, on the
    velocity of a call alone, give the error of that velocity.
    """
    rows: dict[str, list[Row]] = {}
    pulled: dict[int, list[torch.Tensor]] = {}  # step -> gradient by the latents before the step
    ends: list[torch.Tensor] = []
    norm_sq, cost, forward_ms = 1.0, Cost(), []
    for call in unit.calls:
        begin = time.perf_counter()
        target, network = setting.targets.get(call.component), setting.networks[call.component]
        given = setting.tensors(call)
        with frozen(network):
            forward = CheckpointedForward(network, given)
            velocity = forward.velocity.float()
            synchronise(velocity.device)
            forward_ms.append((time.perf_counter() - begin) * 1e3)
            free = free_latents(given, velocity)
            if not ends:
                norm_sq = final_norm_sq(given, velocity, call.sigma)
                ends = [free * each for each in draw(velocity, setting.probes, setting.seed, unit.example)]
            scale = setting.guidance(call, unit)
            seeds = [scale * each for each in _pull(call.step, ends, pulled, setting)]
            place = (setting.seed, unit.example, call.step, call.branch)
            single = draw(velocity, max(1, setting.probes // 2), *place) if target else []
            projected: dict[str, list[Projected]] = {}
            visit = _visitor(setting, target, projected) if target else _nothing
            grads = forward.backward([*seeds, *single], target.layers if target else (), visit)
        if setting.follow:
            own = [free * each[:, : velocity.shape[1]].float() for each in grads[: len(seeds)]]
            before = pulled.get(call.step)
            pulled[call.step] = (
                [a + b for a, b in zip(before, own, strict=True)] if before is not None else own
            )
        del forward, grads
        synchronise(velocity.device)
        products = setting.products(target) if target else 0.0
        cost += Cost(2.0, float(len(seeds) + len(single)), products, (time.perf_counter() - begin) * 1e3)
        if target:
            size = float((velocity**2).sum().double())
            rows.setdefault(call.component, []).append(
                _row(call, target, projected, len(seeds), size, norm_sq)
            )
        tick()
    cost += Cost(forward_ms=statistics.median(forward_ms) * len(forward_ms))
    return make_parts(setting, unit, rows, coherent=True, cost=cost)


def _visitor(setting: Setting, target: Target, projected: dict[str, list[Projected]]) -> Callable:
    def visit(name: str, given: torch.Tensor, slopes: list[torch.Tensor]) -> None:
        module, amax = target.network.get_submodule(name), target.amax.get(name)
        projected[name] = project(module, given, slopes, setting.formats, amax, setting.weights)

    return visit


def _nothing(*_) -> None:
    """Visit nothing: errors only pass through this component."""


def _pull(step: int, ends: list, pulled: Mapping[int, list], setting: Setting) -> list[torch.Tensor]:
    """Gradient by a step's velocity, by the sampler's weights: directly and through the latents of later steps."""
    weights = setting.sampler.weights
    seeds = [weights[-1, step] * each for each in ends]
    for later, grads in pulled.items():
        if later > step:
            seeds = [a + weights[later, step] * b for a, b in zip(seeds, grads, strict=True)]
    return seeds


def _row(
    call, target: Target, projected: dict[str, list[Projected]], paths: int, size: float, norm_sq: float
) -> Row:
    layers = [projected[name] for name in target.layers]
    dots = np.array([[each.dots.numpy() for each in layer] for layer in layers])
    return Row(
        {"example": call.example, "step": call.step, "branch": call.branch, "velocity_sq": size},
        np.array([[each.relative_sq for each in layer] for layer in layers]),
        (dots[..., paths:] ** 2).mean(axis=-1) / (size or 1.0),
        dots[..., :paths] / norm_sq**0.5,
    )


def direct_unit(unit: Unit, setting: Setting, tick: Callable[[], None]) -> dict[str, Part]:
    """Measure the velocity's error exactly: every layer and format alone, from the saved input of its block on.

    It needs no gradients, so its memory is that of a forward. A layer and format take (blocks - block) / blocks forwards.
    Later steps are supposed not to react. In a 16-bit dtype the rounding of the network's own outputs is part of the
    error.
    """
    rows: dict[str, list[Row]] = {}
    cost, norm_sq = Cost(), 0.0
    for call in unit.calls:
        target = setting.targets.get(call.component)
        if target is None:
            tick()
            continue
        begin, given = time.perf_counter(), setting.tensors(call)
        with torch.no_grad():
            forward = CheckpointedForward(target.network, given)
        velocity = forward.velocity.float()
        synchronise(velocity.device)
        forward_ms = (time.perf_counter() - begin) * 1e3
        norm_sq = norm_sq or final_norm_sq(given, velocity, call.sigma)
        local, moved_sq, forwards = _layers(forward, target, setting)
        synchronise(velocity.device)
        spent = (time.perf_counter() - begin) * 1e3
        cost += Cost(forwards + 1.0, 0.0, setting.products(target), spent, forward_ms)
        size = float((velocity**2).sum().double())
        weight = abs(setting.sampler.final[call.step] * setting.guidance(call, unit))
        facts = {"example": call.example, "step": call.step, "branch": call.branch, "velocity_sq": size}
        path = weight * np.sqrt(moved_sq / norm_sq)[..., None]
        rows.setdefault(call.component, []).append(Row(facts, local, moved_sq / (size or 1.0), path))
        tick()
    return make_parts(setting, unit, rows, coherent=False, cost=cost)


def _layers(forward: CheckpointedForward, target: Target, setting: Setting):
    """Relative squared error of every layer's output, squared norm of the velocity's, and number of forwards."""
    shape = (len(target.layers), len(setting.formats))
    local, moved_sq, forwards = np.zeros(shape), np.zeros(shape), 0.0
    places = {name: place for place, name in enumerate(target.layers)}
    network, reference = target.network, forward.velocity.float()
    blocks = len(network.blocks)
    for index, names in layers_by_block(target.layers).items():
        inputs = forward.layer_inputs(index, names)
        forwards += 1 / blocks
        for name in names:
            module, amax = network.get_submodule(name), target.amax.get(name)
            errors = project(module, inputs[name], [], setting.formats, amax, setting.weights)
            local[places[name]] = [each.relative_sq for each in errors]
            for column, each in enumerate(setting.formats):
                with fake_quantized(network, {name: each}, target.amax):
                    moved = forward.resume(index).float() - reference
                moved_sq[places[name], column] = float((moved**2).sum().double())
                forwards += (blocks - index) / blocks
    return local, moved_sq, forwards


def plain_unit(unit: Unit, setting: Setting, tick: Callable[[], None]) -> dict[str, Part]:
    """Measure the velocity's error exactly, whatever the network: every layer and format alone in a whole forward.

    It needs no gradients, so its memory is that of a forward; a layer and format take a forward. Later steps are supposed
    not to react. Where guidance is one call of a batch of two, its weights join both velocities.
    """
    rows: dict[str, list[Row]] = {}
    cost = Cost()
    sizes = setting.recording.settings.get("latents_sq", [])
    for call in unit.calls:
        target = setting.targets.get(call.component)
        if target is None:
            tick()
            continue
        begin, arguments = time.perf_counter(), setting.arguments(call)
        with torch.no_grad():
            reference = output_of(target.network, arguments).float()
            synchronise(reference.device)
            forward_ms = (time.perf_counter() - begin) * 1e3
            local = _local(target, setting, arguments)
            shape = (len(target.layers), len(setting.formats))
            moved_sq, joined_sq = np.zeros(shape), np.zeros(shape)
            for place, name in enumerate(target.layers):
                for column, each in enumerate(setting.formats):
                    with fake_quantized(target.network, {name: each}, target.amax):
                        moved = output_of(target.network, arguments).float() - reference
                    moved_sq[place, column] = float((moved**2).sum().double())
                    joined_sq[place, column] = float((_guided(moved, setting) ** 2).sum().double())
        synchronise(reference.device)
        size = float((reference**2).sum().double())
        ended = sizes[call.example] if call.example < len(sizes) else size
        spent = (time.perf_counter() - begin) * 1e3
        cost += Cost(2.0 + moved_sq.size, 0.0, setting.products(target), spent, forward_ms)
        weight = abs(setting.sampler.final[call.step] * setting.guidance(call, unit))
        facts = {"example": call.example, "step": call.step, "branch": call.branch, "velocity_sq": size}
        path = weight * np.sqrt(joined_sq / (ended or 1.0))[..., None]
        rows.setdefault(call.component, []).append(Row(facts, local, moved_sq / (size or 1.0), path))
        tick()
    return make_parts(setting, unit, rows, coherent=False, cost=cost)


def _local(target: Target, setting: Setting, arguments: Mapping[str, Any]) -> np.ndarray:
    """Relative squared error of every layer's own output, measured where it runs; 0 of layers that do not run."""
    local = np.zeros((len(target.layers), len(setting.formats)))

    def look(place: int, name: str):
        def hook(module, args) -> None:
            errors = project(module, args[0], [], setting.formats, target.amax.get(name), setting.weights)
            local[place] = [each.relative_sq for each in errors]

        return hook

    handles = [
        target.network.get_submodule(name).register_forward_pre_hook(look(place, name))
        for place, name in enumerate(target.layers)
    ]
    try:
        output_of(target.network, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return local


def _guided(moved: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Change of a step's velocity by that of a call: of a batch of both branches, the unconditional first."""
    if setting.guidance_kind != BATCHED or setting.guidance_scale <= 1 or moved.shape[0] != 2:
        return moved
    plain, prompted = moved.chunk(2)
    return plain + setting.guidance_scale * (prompted - plain)


SUFFIX = ".sensitivity.json"


class _Record(Manifest, frozen=True, kw_only=True):
    """The measurement to which the parts in a folder belong.

    Attributes:
        facts: settings. bands, wanted: as of `Sensitivity`.
        keys: component -> key of its parts.
    """

    KIND: ClassVar[str] = "record of a sensitivity measurement"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "delete it and measure again"

    bands: dict[str, list[tuple[int, int]]]
    wanted: tuple[str, ...]
    keys: dict[str, str]

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        return Path(f"{os.fspath(path)}{SUFFIX}")


def save_sensitivity(sensitivity: Sensitivity, folder: str | os.PathLike) -> Path:
    """Write a measurement into a folder, beside others, for `read_sensitivity`. Returns the folder."""
    folder = Path(folder)
    for part in sensitivity.parts:
        write_part(part_file(folder, sensitivity.settings, part.component, part.unit, part.key), part)
    keys = {part.component: part.key for part in sensitivity.parts}
    write_manifest(folder, sensitivity.settings, sensitivity.bands, sensitivity.wanted, keys)
    return folder


def read_sensitivity(folder: str | os.PathLike, *, key: str | None = None) -> Sensitivity:
    """A measurement from its folder, with all finished shards and components.

    Args:
        key: key of the settings; needed where the folder holds measurements with several.

    Raises:
        WanlabError: no measurement, several and no key, or a broken file.
    """
    folder = Path(folder)
    records = sorted(folder.glob(f"{key or '*'}{SUFFIX}"))
    if not records:
        raise WanlabError(
            f"no sensitivity in {folder}; measure it with wanlab.precision.sensitivity(..., folder=...)"
        )
    if len(records) > 1:
        keys = ", ".join(path.name.removesuffix(SUFFIX) for path in records)
        raise WanlabError(f"{folder} holds measurements with different settings; give key= one of {keys}")
    record = _Record.read(str(records[0]).removesuffix(SUFFIX))
    settings, part_keys, units, bands = record.facts, record.keys, record.wanted, record.bands
    parts = []
    for component, part_key in part_keys.items():
        pattern = part_file(folder, settings, component, "*", part_key).name
        parts += [read_part(path) for path in sorted(folder.glob(pattern))]
    return Sensitivity(settings, tuple(parts), bands, units, reused=len({part.unit for part in parts}))


def merge_sensitivity(shards: Sequence[Sensitivity | str | os.PathLike]) -> Sensitivity:
    """Shards of one measurement as one: other components, other shards, or other examples of the same recording.

    Args:
        shards: measurements or their folders.

    Raises:
        WanlabError: no shard, other settings, or one component with different weights, ranges or recordings.
    """
    loaded = [each if isinstance(each, Sensitivity) else read_sensitivity(each) for each in shards]
    if not loaded:
        raise WanlabError("no shard to merge; give at least one")
    first = loaded[0]
    parts: dict[tuple[str, str], Part] = {}
    for shard in loaded:
        for name, value in shard.settings.items():
            if value != first.settings.get(name):
                raise WanlabError(
                    f"these shards differ in {name}: {first.settings.get(name)} and {value}; merge shards of one measurement"
                )
        for part in shard.parts:
            parts.setdefault((part.component, part.unit), part)
    keys: dict[str, str] = {}
    for part in (part for shard in loaded for part in shard.parts):
        if keys.setdefault(part.component, part.key) != part.key:
            raise WanlabError(
                f"these shards of {part.component} have other weights, ranges, layers or recordings; measure one again"
            )
    units = tuple(dict.fromkeys(name for shard in loaded for name in shard.wanted))
    return replace(first, parts=tuple(parts.values()), wanted=units, reused=0)


def settings_key(settings: dict[str, Any]) -> str:
    """Short hash of settings, with which the names of all files begin."""
    return digest(settings)[:12]


def part_file(folder: Path, settings: dict[str, Any], component: str, unit: str, key: str) -> Path:
    """Path of a part."""
    return folder / f"{settings_key(settings)}-{component}-{unit}-{key[:12]}.npz"


def write_manifest(
    folder: Path, settings: dict[str, Any], bands: dict, units: Sequence[str], keys: dict[str, str]
) -> None:
    """Record to which measurement the parts belong; keys of components that another shard measures stay."""
    path = folder / settings_key(settings)
    before = _Record.find(path)
    if before is not None:
        units = list(dict.fromkeys([*before.wanted, *units]))
        keys = before.keys | keys
    _Record(path=str(path), facts=settings, bands=bands, wanted=tuple(units), keys=keys).write()


METHODS = ("auto", "probes", "direct", "plain")
UNITS = {"probes": probe_unit, "direct": direct_unit, "plain": plain_unit}


def sensitivity(
    model,
    recording: Recording,
    calibrations: Mapping[str, Any] | None = None,
    *,
    components: str | Sequence[str] | None = None,
    formats: Sequence[str | QuantFormat] = DEFAULT_FORMATS,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    bands: int | Sequence[tuple[int, int]] = 2,
    calls: int | None = None,
    probes: int = 4,
    method: str = "auto",
    shard: tuple[int, int] = (0, 1),
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """Effect of rounding each layer alone on velocities and final latents, in every format, from few forwards.

    Every recorded call is computed once on the inputs that it had in a real generation (teacher forcing). A layer's own
    error q(W) q(x) - W x is computed where the layer runs; random directions on the output, propagated back once for all
    layers, give the part of it that reaches the output (see `probe_unit` for the method and its sources). Directions on
    the final latents are also propagated through the sampler's weights and all later steps, so that effects of early and
    late steps can be compared. Both branches of guidance count with their weights.

    Memory is needed for the experts that are used, the inputs of one expert's blocks, and one block's graph.

    Args:
        model: model from `wanlab.models.load`, eager.
        recording: recording of this model from `record_inputs`, with both branches.
        calibrations: component -> `Calibration`, or layer -> largest magnitude of its input; needed by formats that
            round it.
        components: experts to measure; None takes all that were recorded and are loaded.
        formats: names of `FORMATS`.
        layers, exclude: patterns as `choose_layers` takes them, for linear layers; of blocks, unless the method is plain.
        bands: ranges of steps with rows of their own in the table: their number per expert, or `[(first, last), ...]`,
            inclusive. `Sensitivity.with_bands` changes them without measuring.
        calls: None measures all steps of every example and follows errors to the end; needs the later experts loaded.
            A number takes that many steps per expert and example, evenly spread, and supposes that later steps do
            not react (amplification 1); for experts that are loaded alone, and for long clips.
        probes: number of random directions per example on the final latents, and half as many per call on its velocity.
        method: `"probes"`; `"direct"`: every layer and format alone, with `calls`; exact, without gradients, and about
            half a forward for each; `"plain"`: the same by whole forwards, a whole one for each, for networks whose blocks
            cannot be run one by one (several streams) and for layers outside the blocks, without `calls` of all steps;
            `"auto"`: probes where blocks can be run one by one, else plain. `Sensitivity.way` says which it was.
        shard: (index, count): every count-th unit of work, from index on. A unit is an example, or with `calls` a
            step of it.
        folder: folder for finished units, which are not measured again with the same weights, recording, ranges and
            settings.
        seed: seed of the directions.

    Raises:
        WanlabError: a recording of another model or without needed steps, a missing calibration or one of another
            component or other weights, an unknown component, format or layer, an expert that is not loaded, a shard
            without work.
    """
    check_known([method], METHODS, "method")
    check_shard(shard)
    if probes < 1:
        raise WanlabError(f"probes must be at least 1, not {probes}")
    if method == "direct" and calls is None:
        raise WanlabError("the direct method does not follow errors through later steps; give calls=")
    chosen_formats = make_formats(formats)
    names, networks = _measured(model, recording, calibrations or {}, components)
    one_by_one = {
        name: by_blocks(networks[name], recording.arguments(recording.of(name)[0], networks[name]))
        for name in names
    }
    if method == "auto":
        method = "probes" if all(one_by_one.values()) else "plain"
    if method != "plain" and not all(one_by_one.values()):
        other = next(name for name, fits in one_by_one.items() if not fits)
        raise WanlabError(
            f"the blocks of {other} cannot be run one by one, as the method {method} does; give method='plain'"
        )
    if method == "plain":
        probes, calls = 1, recording.settings["steps"] if calls is None else calls
    setting = _setting(
        model,
        recording,
        calibrations or {},
        (names, networks),
        (layers, exclude),
        chosen_formats,
        method,
        calls is None,
        probes,
        seed,
    )
    settings = _settings(model, recording, setting, calls, method)
    units = make_units(recording, tuple(setting.targets), calls, settings["schedule"])
    for call in (call for unit in units for call in unit.calls):
        if call.component not in setting.networks:
            raise WanlabError(
                f"{call.component} is not loaded, and errors are followed through its steps; load it, or give calls="
            )
    keys = {name: target.key for name, target in setting.targets.items()}
    ranges = make_bands(settings["schedule"], bands)
    own_units = units[shard[0] :: shard[1]]
    if not own_units:
        raise WanlabError(
            f"nothing is left for shard {shard[0]} of {shard[1]}: there are {len(units)} units of work"
            f" ({'an example each' if calls is None else 'a step of an example each'}); take as many shards at most"
        )
    folder = Path(folder) if folder is not None else None
    if folder is not None:
        write_manifest(folder, settings, ranges, [unit.name for unit in units], keys)
    parts: list[Part] = []
    reused = 0
    measure = UNITS[method]
    with tqdm(
        total=sum(len(unit.calls) for unit in own_units),
        desc="sensitivity",
        unit="call",
        leave=False,
        disable=not progress,
    ) as bar:
        for unit in own_units:
            unit_parts = _finished(folder, settings, unit, setting)
            if unit_parts is not None:
                reused += 1
                bar.update(len(unit.calls))
            else:
                unit_parts = measure(unit, setting, bar.update)
                if folder is not None:
                    for name, part in unit_parts.items():
                        write_part(part_file(folder, settings, name, unit.name, part.key), part)
            parts += unit_parts.values()
    wanted = tuple(unit.name for unit in units)
    return Sensitivity(settings, tuple(parts), ranges, wanted, reused)


def _measured(
    model, recording: Recording, calibrations, components
) -> tuple[list[str], dict[str, torch.nn.Module]]:
    """The experts to measure, and the network of each that was recorded and is loaded."""
    if recording.model != model.spec.name:
        raise WanlabError(
            f"{recording.folder} was recorded with {recording.model}, this model is {model.spec.name};"
            " record its own inputs"
        )
    recorded = [name for name in recording.components if name.startswith("expert")]
    loaded = [name for name in recorded if name in model.components]
    names = [components] if isinstance(components, str) else list(components or loaded)
    check_known(names, recorded, "recorded expert")
    check_known(names, loaded, "loaded expert")
    check_known(list(calibrations), recorded, "recorded expert to calibrate")
    return names, {name: eager_network(model, name) for name in loaded}


def _setting(
    model,
    recording: Recording,
    calibrations,
    measured: tuple[list[str], dict[str, torch.nn.Module]],
    chosen,
    formats,
    method: str,
    follow: bool,
    probes: int,
    seed: int,
) -> Setting:
    names, networks = measured
    size = {name: recording.settings[name] for name in ("height", "width", "frames")}
    steps = recording.settings["steps"]
    try:
        sampler = sampler_weights(model, steps, **size)
    except WanlabError:
        if method != "plain":
            raise
        sampler = even_weights(steps)
    return Setting(
        recording=recording,
        targets={
            name: make_target(
                name,
                networks,
                recording,
                calibrations.get(name),
                chosen,
                formats,
                follow,
                by_blocks=method != "plain",
            )
            for name in names
        },
        networks=networks,
        guidance_kind=model.family.guidance,
        formats=formats,
        sampler=sampler,
        guidance_scale=recording.settings["guidance_scale"],
        probes=probes,
        follow=follow,
        seed=seed,
    )


def _settings(
    model, recording: Recording, setting: Setting, calls: int | None, method: str
) -> dict[str, Any]:
    """Settings of a measurement; weights, ranges and layers are in the key of every part."""
    kept = ("height", "width", "frames", "steps", "guidance_scale")
    steps = recording.settings["steps"]
    size = {name: recording.settings[name] for name in kept[:3]}
    even = np.array_equal(setting.sampler.weights, even_weights(steps).weights)
    return {
        "model": model.spec.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "generation": {name: recording.settings[name] for name in kept},
        "schedule": model.schedule(steps, **size)["component"].tolist(),
        "weights": setting.sampler.final.tolist(),
        "formats": [each.name for each in setting.formats],
        "probes": setting.probes,
        "calls": calls,
        "method": method,
        "seed": setting.seed,
    } | ({"even_steps": True} if even and method == "plain" else {})


def _finished(
    folder: Path | None, settings: dict[str, Any], unit: Unit, setting: Setting
) -> dict[str, Part] | None:
    """The parts of a unit, where all are finished; else None."""
    if folder is None:
        return None
    needed = {call.component for call in unit.calls} & set(setting.targets)
    parts = {}
    for name in sorted(needed):
        path = part_file(folder, settings, name, unit.name, setting.targets[name].key)
        if not path.exists():
            return None
        parts[name] = read_part(path)
    return parts
