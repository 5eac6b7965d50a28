"""What is wrong with layers, told as one error in one line."""

from __future__ import annotations

from dataclasses import dataclass

from wanlab.errors import WanlabError
from wanlab.precision.applied.layers import AS_LOADED
from wanlab.precision.plans.assignment import Assignment
from wanlab.precision.plans.plan import FLOATS


@dataclass(frozen=True)
class Fault:
    """Something wrong with one layer: `kind` as in `Held.fault`, `said` without the layer's name."""

    component: str
    layer: str
    kind: str
    said: str


def raise_weights(
    assignment: Assignment, rows: list[dict], faults: list[Fault], remedy: str | None = None
) -> None:
    """The faults that only show over many layers, then the first of the others; `remedy` for layers left as they were."""
    name, default = assignment.plan.name, f"torch.{FLOATS[assignment.default]}"
    changes = [row for row in rows if row["format"] != AS_LOADED]
    recast = any(row["weight_before_bytes"] not in (None, row["weight_bytes"]) for row in rows)
    if not changes and not recast:
        raise WanlabError(
            f"plan {name} changed nothing: every layer is in {default} as it was loaded; give it rules that name a format"
        )
    left = {(fault.component, fault.layer) for fault in faults if fault.kind == "unquantised"}
    by_component: dict[str, list[bool]] = {}
    for row in changes:
        by_component.setdefault(row["component"], []).append((row["component"], row["layer"]) in left)
    untouched = [component for component, missing in by_component.items() if all(missing)]
    if untouched and len(untouched) == len(by_component):
        raise WanlabError(
            f"plan {name} changed nothing: none of its {len(changes)} layers in {', '.join(untouched)} is held as asked;"
            f" {remedy or _REMEDIES['unquantised']}"
        )
    if untouched:
        done = [component for component in by_component if component not in untouched]
        raise WanlabError(
            f"plan {name}: only {', '.join(done)} was quantised; none of {len(by_component[untouched[0]])} layers of"
            f" {', '.join(untouched)} is held as asked; apply the plan to every expert it names"
        )
    raise_first(name, faults, remedy)


def raise_first(name: str, faults: list[Fault], remedy: str | None = None) -> None:
    """The first fault as an error, with how many there are like it; nothing without one."""
    if not faults:
        return
    first = faults[0]
    alike = sum(fault.kind == first.kind for fault in faults) - 1
    raise WanlabError(
        f"plan {name}: {first.layer} of {first.component} {first.said}"
        f"{f' ({alike} more like it)' if alike else ''}; {remedy or _REMEDIES[first.kind]}"
    )


_REMEDIES = {
    "unquantised": "apply the plan with precision.apply_plan and use the model that it returns",
    "dequantised": "keep the codes in memory and decode them at use",
    "fp32": "load the model in the plan's dtype, and look for a cast that was left in",
    "no-op": "the quantiser does nothing: give it the format's scale and rounding",
    "wrong": "apply the plan again to the model as it was loaded",
    "product": "look at applied.frame for the kernel that was meant",
}
