"""Outputs of a model's experts on recorded inputs: in float32, by a plan, and by a plan that is nudged."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wanlab.convert.components import recipe
from wanlab.errors import WanlabError
from wanlab.precision.graphs.record import PlanGraphs

if TYPE_CHECKING:
    import torch

    from wanlab.precision.applied.apply import Applied
    from wanlab.precision.calibrations.recording import RecordedCall, Recording

Key = tuple[str, tuple[int | None, int | None]]
"""Component, and first and last step."""

Inputs = dict[Key, list[tuple[int | None, dict[str, "torch.Tensor"]]]]
"""The calls of a range of steps: step, and inputs by name."""

Outputs = dict[Key, list["torch.Tensor"]]
"""One output per call, float32 on the CPU."""

NUDGE = 3e-7
"""Relative size of what float32 sums in another order leave; coarser dtypes have their own rounding."""


def chosen_inputs(graphs: PlanGraphs, recording: Recording, calls: int) -> Inputs:
    """Calls of every component and range of steps, evenly spread over those recorded.

    Raises:
        WanlabError: nothing recorded of one.
    """
    if calls < 1:
        raise WanlabError(f"calls is {calls}; give 1 or more")
    found: Inputs = {}
    for component, bands in graphs.bands.items():
        for first, last, _ in bands:
            there = [
                call for call in recording.of(component) if first is None or first <= (call.step or 0) <= last
            ]
            if not there:
                raise WanlabError(
                    f"no call of {component} at steps {first} to {last} is recorded in {recording.folder};"
                    f" record generations of {graphs.plan.num_steps} steps"
                )
            found[component, (first, last)] = [
                (call.step, recording.inputs(call)) for call in _spread(there, calls)
            ]
    return found


def reference_outputs(model, inputs: Inputs) -> Outputs:
    """By the networks in float32, unquantised; one expert is copied at a time."""
    import torch

    made: Outputs = {}
    for component in dict.fromkeys(key[0] for key in inputs):
        network = recipe(model, component).network
        # A copy takes what it finds under an object's id: parameters in float32, buffers as they are.
        twins: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
        for parameter in network.parameters():
            wide = parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            twins[id(parameter)] = torch.nn.Parameter(wide.detach(), requires_grad=False)
        wide = copy.deepcopy(network, twins)
        for key, given in inputs.items():
            if key[0] == component:
                made[key] = [_forward(model, component, wide, feeds) for _, feeds in given]
        del wide, twins
    return made


def planned_outputs(applied: Applied, inputs: Inputs, nudged: int | None = None) -> Outputs:
    """By a model that a plan was applied to.

    Args:
        nudged: seed of a disturbance of every layer's input by as much as another kernel's rounding; None leaves them as
            they are.
    """
    made: Outputs = {}
    for key, given in inputs.items():
        network = recipe(applied.model, key[0]).network
        outputs = []
        for step, feeds in given:
            if nudged is not None:
                feeds = _nudged(feeds, nudged)
            with applied.at(step or 0), _nudging(applied, key[0], network, nudged):
                outputs.append(_forward(applied.model, key[0], network, feeds))
        made[key] = outputs
    return made


def distance(
    made: Sequence[torch.Tensor], other: Sequence[torch.Tensor], size: Sequence[torch.Tensor]
) -> float:
    """`||a - b|| / ||r||` over all tensors together."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(made, other, strict=True))
    return math.sqrt(apart / sum(float(r.double().square().sum()) for r in size))


def _spread(there: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    if len(there) <= count:
        return list(there)
    places = [round(i * (len(there) - 1) / max(count - 1, 1)) for i in range(count)]
    return [there[place] for place in dict.fromkeys(places)]


def _nudged(feeds: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The timestep off by the rounding of its frequencies, whose sine is taken of hundreds of radians."""
    import torch

    timestep = feeds["timestep"].float()
    noise = torch.randn(timestep.shape, generator=torch.Generator().manual_seed(seed)).to(timestep.device)
    return {**feeds, "timestep": timestep * (1 + torch.finfo(torch.float32).eps * noise)}


@contextmanager
def _nudging(applied: Applied, component: str, network, seed: int | None) -> Iterator[None]:
    import torch

    rows = applied.frame[applied.frame["component"] == component]
    layers = dict.fromkeys(rows["layer"]) if seed is not None else ()
    generator = torch.Generator(network.device).manual_seed(seed or 0)

    def nudge(module, args):
        values = args[0]
        size = max(NUDGE, torch.finfo(values.dtype).eps / 2) if values.dtype != torch.float32 else NUDGE
        noise = torch.randn(values.shape, generator=generator, device=values.device)
        return ((values.float() * noise.mul_(size).add_(1)).to(values.dtype), *args[1:])

    handles = [network.get_submodule(layer).register_forward_pre_hook(nudge) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model, component: str, network, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    plan = recipe(model, component, network=network)
    given = []
    for name in plan.inputs:
        tensor = feeds[name].to(network.device)
        given.append(
            tensor.to(network.dtype) if name != "timestep" and tensor.is_floating_point() else tensor
        )
    with torch.no_grad():
        return plan.reference(*given).float().cpu()
