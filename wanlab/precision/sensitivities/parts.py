"""One finished piece of a sensitivity measurement, and its file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np

    from wanlab.precision.sensitivities.work import Setting, Unit

ARRAYS = ("local", "velocity", "paths")


@dataclass(frozen=True)
class Cost:
    """What a piece took.

    Attributes:
        forwards: passes of the whole expert, as block-forwards over blocks; running a block again for its gradients
            counts.
        backwards: gradients of one scalar through the whole expert, as block-backwards over blocks.
        products: products of a layer's size for the errors of formats, over those of one forward.
        time_ms: of all of it. forward_ms: of one plain forward of the same call, summed over the calls.
    """

    forwards: float = 0.0
    backwards: float = 0.0
    products: float = 0.0
    time_ms: float = 0.0
    forward_ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True, eq=False)
class Part:
    """Errors of the layers of one component in one unit of work: an example, or a step of it.

    Attributes:
        component, unit: what it is of; unit is like `"e0"` or `"e0-s3"`.
        key: hash of what is measured: the component's weights, its recording, layers, ranges and formats.
        layers, formats: names. parameters, amax: of every layer.
        calls: example, step, branch, velocity_sq (squared norm of the velocity) of every call.
        local: squared error of a layer's output over its squared norm, `[calls, layers, formats]`.
        velocity: the same of the velocity, caused by this layer alone, `[calls, layers, formats]`.
        paths: change of the final latents along random directions, over the latents' norm, `[calls, layers, formats,
            directions]`: signed, and the same directions for all calls of an example, so that what belongs together
            can be added before it is squared. Or, where `coherent` is false, its root mean square, `[..., 1]`.
        coherent: see `paths`.
        cost: of the unit; of several components in one unit it stands with the first, as does
        passes: calls that were passed, those of components that are not measured included.
    """

    component: str
    unit: str
    key: str
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    parameters: tuple[int, ...]
    amax: tuple[float | None, ...]
    calls: tuple[dict[str, Any], ...]
    local: np.ndarray
    velocity: np.ndarray
    paths: np.ndarray
    coherent: bool
    cost: Cost
    passes: int


@dataclass(frozen=True, eq=False)
class Row:
    """What one call showed: its facts, and the arrays of a `Part` without the axis of calls."""

    call: dict[str, Any]
    local: np.ndarray
    velocity: np.ndarray
    paths: np.ndarray


def make_parts(
    setting: Setting, unit: Unit, rows: dict[str, list[Row]], *, coherent: bool, cost: Cost
) -> dict[str, Part]:
    """The parts of a unit, one per component that was measured in it."""
    import numpy as np

    parts: dict[str, Part] = {}
    passes = len(unit.calls)
    for component, calls in rows.items():
        target = setting.targets[component]
        modules = [target.network.get_submodule(name) for name in target.layers]
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
            **{name: np.stack([getattr(row, name) for row in calls]) for name in ARRAYS},
        )
        cost, passes = Cost(), 0
    return parts


def write_part(path: Path, part: Part) -> None:
    """Keep a part; the file appears whole or not at all."""
    import numpy as np

    facts = {name: value for name, value in vars(part).items() if name not in ARRAYS}
    facts["cost"] = asdict(part.cost)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(temporary, facts=json.dumps(facts), **{name: getattr(part, name) for name in ARRAYS})
    os.replace(temporary, path)


def read_part(path: Path) -> Part:
    """A part from its file.

    Raises:
        WanlabError: it is missing or broken.
    """
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as data:
            facts = json.loads(str(data["facts"]))
            arrays = {name: data[name] for name in ARRAYS}
        listed = ("layers", "formats", "parameters", "amax", "calls")
        facts |= {name: tuple(facts[name]) for name in listed}
        return Part(**facts | {"cost": Cost(**facts["cost"])} | arrays)
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise WanlabError(f"{path} is missing or broken ({error}); delete it and measure again") from error
