"""Ranges of the inputs that a plan rounds, kept by what they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.precision.plans.plan import Plan

if TYPE_CHECKING:
    from wanlab.models import Model
    from wanlab.precision.calibrations.calibration import Calibration


def plan_ranges(
    model: Model, plan: Plan | None, place: Path, settings: dict[str, Any], progress: bool
) -> dict[str, tuple[Path, Calibration]]:
    """Component -> file and ranges, for the experts whose inputs the plan rounds; none where it rounds none."""
    from wanlab.precision.applied.apply import experts_of
    from wanlab.precision.calibrations.examples import nano_examples
    from wanlab.precision.calibrations.kept import keep_inputs
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
    kept = keep_inputs(
        model, nano_examples(2), place, components=components, layers="*", progress=progress, **settings
    )
    return {name: (kept.files[name], found) for name, found in kept.ranges.items()}
