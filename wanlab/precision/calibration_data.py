"""Inputs of a model's experts and the ranges of their layers, recorded once and reused by later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from wanlab import __version__
from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError
from wanlab.models.inputs import first_frame
from wanlab.models.pipeline import Model
from wanlab.precision.apply import experts_of
from wanlab.precision.assignment import assign
from wanlab.precision.calibration import Calibration, calibrate
from wanlab.precision.formats import get_format
from wanlab.precision.plan import Plan, is_float
from wanlab.precision.recording import (
    Example,
    Recording,
    as_examples,
    nano_examples,
    read_recording,
    record_inputs,
)
from wanlab.precision.sensitivity.work import check_known

SIZES = ("height", "width", "frames", "steps", "guidance_scale")


@dataclass(frozen=True)
class CalibrationData:
    """Inputs of experts and the ranges of their layers, in a folder of their own.

    Attributes:
        folder: folder of this model with these weights, examples and settings alone.
        recording: inputs of all experts. ranges: component -> its calibration. files: component -> file of its calibration.
        reused: whether an earlier run made the recording.
    """

    folder: Path
    recording: Recording
    ranges: dict[str, Calibration]
    files: dict[str, Path]
    reused: bool

    @property
    def parts(self) -> Path:
        """Folder in which `sensitivity` keeps its parts, beside the ranges."""
        return self.folder / "sensitivity"


def keep_inputs(
    model,
    cases: str | os.PathLike | Sequence,
    folder: str | os.PathLike,
    *,
    components: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> CalibrationData:
    """Record the experts' inputs and calibrate on them, or read both where an earlier run made them.

    A lock lets several runs start together: one records, the others wait and read its files.

    Args:
        model: model from `wanlab.models.load`.
        cases: cases as `record_inputs` takes them.
        folder: folder of all models and settings; each has a folder in it, named by a hash of what the inputs depend on.
        components: experts to calibrate; None takes all. All are recorded, as an error is followed through the steps of the
            experts that come later.
        layers: layers as `calibrate` takes them; runs that share a folder calibrate the same layers.
        progress: show bars.
        settings: height, width, frames, steps, guidance_scale; None takes the model's default.

    Raises:
        WanlabError: as `record_inputs` and `calibrate`.
    """
    examples = as_examples(cases)
    recorded = [name for name in model.components if name.startswith("expert")]
    chosen = [components] if isinstance(components, str) else list(components or recorded)
    check_known(chosen, recorded, "expert")
    defaults = model.spec.defaults
    settings.pop("image", None)  # of a notebook's `ask`: each example has its own
    conditions = settings.pop("conditions", None)
    sizes = {name: settings.pop(name, None) for name in SIZES}
    sizes = {name: getattr(defaults, name) if value is None else value for name, value in sizes.items()}
    name = f"{model.spec.name.rpartition('/')[2]}-{_key(model, examples, sizes | settings, conditions)[:12]}"
    place = Path(folder).resolve() / name
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):
        try:
            recording, reused = read_recording(place / "recording"), True
        except WanlabError:  # none, or one that was cut off
            given = sizes | settings | ({} if conditions is None else {"conditions": conditions})
            recording = record_inputs(model, examples, place / "recording", progress=progress, **given)
            reused = False
        files = {name: place / "sensitivity" / f"{name}.json" for name in chosen}
        ranges = {
            name: calibrate(model, name, recording, layers=layers, cache=path, progress=progress)
            for name, path in files.items()
        }
    return CalibrationData(place, recording, ranges, files, reused)


def _key(
    model, examples: Sequence[Example], settings: dict[str, Any], conditions: Mapping[str, Any] | None
) -> str:
    """Hash of everything that the inputs depend on."""

    def picture(image) -> Any:
        if image is None:
            return None
        if isinstance(image, list | tuple) or getattr(image, "ndim", 3) == 4:  # the frames of a clip
            return [picture(each) for each in image]
        frame = first_frame(image, settings["height"], settings["width"])
        return hashlib.sha256(frame.tobytes()).hexdigest()

    def pictures(example: Example) -> list[Any]:
        given = example.inputs(model, settings["frames"], conditions)
        own = {name: picture(value) for name, value in given.get("conditions", {}).items()}
        return [picture(given["image"]), *([own] if own else [])]

    networks = {
        id(network): network for network in model.components.values()
    }  # both halves of the VAE are one
    facts = [
        __version__,
        model.spec.name,
        [weights_key(network) for network in networks.values()],
        [[e.name, e.prompt, e.negative_prompt, e.seed, *pictures(e)] for e in examples],
        settings,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def plan_ranges(
    model: Model,
    plan: Plan | None,
    folder: str | os.PathLike,
    *,
    examples: str | os.PathLike | Sequence | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, tuple[Path, Calibration]]:
    """Ranges of the layers whose inputs a plan rounds.

    Args:
        folder, settings: as `keep_inputs` takes them.
        examples: generations to record, as `record_inputs` takes its cases; None takes two of `nano_examples`.

    Returns:
        Component -> file and calibration; empty where the plan rounds no inputs.
    """
    if plan is None:
        return {}
    layers = assign(plan, experts_of(model)).frame
    rounds = [not is_float(name) and get_format(name).activation is not None for name in layers["format"]]
    components = list(dict.fromkeys(layers.loc[rounds, "component"]))
    if not components:
        return {}
    data = keep_inputs(
        model,
        nano_examples(2) if examples is None else examples,
        folder,
        components=components,
        layers="*",
        progress=progress,
        **settings,
    )
    return {name: (data.files[name], calibration) for name, calibration in data.ranges.items()}
