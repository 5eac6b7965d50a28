"""Ranges of the inputs that a plan rounds, kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.plans.plan import Plan

if TYPE_CHECKING:
    from wanlab.models import Model
    from wanlab.precision.calibrations.calibration import Calibration


def plan_ranges(
    model: Model, plan: Plan | None, place: Path, settings: dict[str, Any], progress: bool
) -> dict[str, tuple[Path, Calibration]]:
    """Component -> file and ranges, for the experts whose inputs the plan rounds; none where it rounds none."""
    from wanlab.convert.components import recipe
    from wanlab.convert.onnx.identity import weights_key
    from wanlab.precision.applied.apply import experts_of
    from wanlab.precision.calibrations.calibration import calibrate
    from wanlab.precision.calibrations.examples import nano_examples
    from wanlab.precision.calibrations.recording import read_recording, record_inputs
    from wanlab.precision.formats import get_format
    from wanlab.precision.plans.assignment import assign
    from wanlab.precision.plans.plan import is_float

    if plan is None:
        return {}
    used = assign(plan, experts_of(model)).frame
    rounds = [not is_float(name) and get_format(name).activation is not None for name in used["format"]]
    components = list(dict.fromkeys(used.loc[rounds, "component"]))
    if not components:
        return {}
    keys = [weights_key(recipe(model, name).network) for name in components]
    what = json.dumps([keys, settings], sort_keys=True)
    folder = place / f"calibration-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    try:
        recording = read_recording(folder / "recording")
    except WanlabError:
        recording = record_inputs(
            model, nano_examples(2), folder / "recording", progress=progress, **settings
        )
    paths = {name: folder / f"{name}.json" for name in components}
    return {
        name: (path, calibrate(model, name, recording, layers="*", cache=path, progress=progress))
        for name, path in paths.items()
    }
