"""How sensitive a model is to the rounding of each layer: `sensitivity`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.precision.calibrations.recording import Recording
from wanlab.precision.formats import Format
from wanlab.precision.sensitivities.parts import Part, read_part, write_part
from wanlab.precision.sensitivities.result import Sensitivity, make_bands
from wanlab.precision.sensitivities.storage import part_file, write_manifest
from wanlab.precision.sensitivities.work import (
    DEFAULT_FORMATS,
    Setting,
    Unit,
    check_known,
    check_shard,
    make_formats,
    make_target,
    make_units,
)

METHODS = ("probes", "direct")


def sensitivity(
    model,
    recording: Recording,
    calibrations: Mapping[str, Any] | None = None,
    *,
    components: str | Sequence[str] | None = None,
    formats: Sequence[str | Format] = DEFAULT_FORMATS,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    bands: int | Sequence[tuple[int, int]] = 2,
    calls: int | None = None,
    probes: int = 4,
    method: str = "probes",
    shard: tuple[int, int] = (0, 1),
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """What rounding each layer alone does to velocities and final latents, in every format, from few forwards.

    Teacher-forced: every recorded call is computed once on the inputs it had in a real generation. A layer's own
    error q(W) q(x) - W x is taken where the layer runs; random directions on the output, carried back once for all
    layers, tell what of it arrives (see `probes.probe_unit` for the method and its sources). Directions on the final
    latents are carried on through the sampler's weights and through all later steps, so that effects of early and
    late steps compare. Both branches of guidance count with their weights.

    Memory: of the experts that are needed, the inputs of one expert's blocks, and one block's graph.

    Args:
        model: from `wanlab.models.load`, eager.
        recording: from `record_inputs`; of this model, with both branches.
        calibrations: component -> `Calibration`, or layer -> largest magnitude of its input; needed by formats that
            round it.
        components: experts to measure; None takes all that were recorded and are loaded.
        formats: names as in `FORMATS`.
        layers, exclude: patterns as in `choose_layers`; linear layers of blocks.
        bands: ranges of steps that the table keeps apart: how many per expert, or `[(first, last), ...]`, inclusive.
            `Sensitivity.with_bands` cuts again without measuring.
        calls: None measures all steps of every example and follows errors to the end; needs the later experts loaded.
            A number takes so many steps per expert and example, evenly spread, and supposes that later steps do not
            react (amplification 1): for experts that are loaded alone, and for long clips.
        probes: random directions per example at the final latents, and half as many per call on its velocity.
        method: `"probes"`, or `"direct"`: every layer and format alone, with `calls`; exact, needs no gradients, and
            costs about half a forward for each.
        shard: (index, count): every count-th unit of work, from index on. A unit is an example, or with `calls` a
            step of it.
        folder: finished units are kept there and not measured again for the same weights, recording, ranges and
            settings.
        seed: of the directions.

    Raises:
        WanlabError: a recording of another model or without needed steps, a missing or foreign calibration, an
            unknown component, format or layer, an expert that is not loaded, a shard without work.
    """
    from tqdm.auto import tqdm

    from wanlab.precision.sensitivities.direct import direct_unit
    from wanlab.precision.sensitivities.probes import probe_unit

    check_known([method], METHODS, "method")
    check_shard(shard)
    if probes < 1:
        raise WanlabError(f"probes must be at least 1, not {probes}")
    if method == "direct" and calls is None:
        raise WanlabError("the direct method does not follow errors through later steps; give calls=")
    made = make_formats(formats)
    setting = _setting(
        model, recording, calibrations or {}, components, (layers, exclude), made, calls is None, probes, seed
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
    mine = units[shard[0] :: shard[1]]
    if not mine:
        raise WanlabError(
            f"nothing is left for shard {shard[0]} of {shard[1]}: there are {len(units)} units of work"
            f" ({'an example each' if calls is None else 'a step of an example each'}); take as many shards at most"
        )
    folder = Path(folder) if folder is not None else None
    if folder is not None:
        write_manifest(folder, settings, ranges, [unit.name for unit in units], keys)
    parts: list[Part] = []
    reused = 0
    measure = direct_unit if method == "direct" else probe_unit
    with tqdm(
        total=sum(len(unit.calls) for unit in mine),
        desc="sensitivity",
        unit="call",
        leave=False,
        disable=not progress,
    ) as bar:
        for unit in mine:
            found = _finished(folder, settings, unit, setting)
            if found is not None:
                reused += 1
                bar.update(len(unit.calls))
            else:
                found = measure(unit, setting, bar.update)
                if folder is not None:
                    for name, part in found.items():
                        write_part(part_file(folder, settings, name, unit.name, part.key), part)
            parts += found.values()
    names = tuple(unit.name for unit in units)
    return Sensitivity(settings, tuple(parts), ranges, names, reused)


def _setting(
    model,
    recording: Recording,
    calibrations,
    components,
    chosen,
    formats,
    follow: bool,
    probes: int,
    seed: int,
) -> Setting:
    from wanlab.convert.components import recipe
    from wanlab.precision.sensitivities.sampler import sampler_weights

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
    networks = {name: recipe(model, name).network for name in loaded}
    return Setting(
        recording=recording,
        targets={
            name: make_target(name, networks, recording, calibrations.get(name), chosen, formats, follow)
            for name in names
        },
        networks=networks,
        inputs={name: tuple(recipe(model, name).inputs) for name in loaded},
        formats=formats,
        sampler=sampler_weights(model, recording.settings["steps"]),
        guidance_scale=recording.settings["guidance_scale"],
        probes=probes,
        follow=follow,
        seed=seed,
    )


def _settings(
    model, recording: Recording, setting: Setting, calls: int | None, method: str
) -> dict[str, Any]:
    """What a measurement is true for, besides weights, ranges and layers, which every part names."""
    kept = ("height", "width", "frames", "steps", "guidance_scale")
    return {
        "model": model.spec.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "generation": {name: recording.settings[name] for name in kept},
        "schedule": model.schedule(recording.settings["steps"])["component"].tolist(),
        "weights": setting.sampler.final.tolist(),
        "formats": [each.name for each in setting.formats],
        "probes": setting.probes,
        "calls": calls,
        "method": method,
        "seed": setting.seed,
    }


def _finished(
    folder: Path | None, settings: dict[str, Any], unit: Unit, setting: Setting
) -> dict[str, Part] | None:
    """The parts of a unit, where all are there."""
    if folder is None:
        return None
    needed = {call.component for call in unit.calls} & set(setting.targets)
    found = {}
    for name in sorted(needed):
        path = part_file(folder, settings, name, unit.name, setting.targets[name].key)
        if not path.exists():
            return None
        found[name] = read_part(path)
    return found
