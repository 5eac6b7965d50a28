"""One unit of work with random directions: each is carried back to every layer at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from wanlab.models.device import synchronise
from wanlab.precision.sensitivities.latents import draw, final_norm_sq, free_latents
from wanlab.precision.sensitivities.layer_errors import Projected, project
from wanlab.precision.sensitivities.parts import Cost, Part, Row, make_parts
from wanlab.precision.sensitivities.passage import Passage, frozen
from wanlab.precision.sensitivities.work import Setting, Target, Unit

if TYPE_CHECKING:
    import torch


def probe_unit(unit: Unit, setting: Setting, tick: Callable[[], None]) -> dict[str, Part]:
    """Measure a unit, from its last step to its first; one part per component.

    Directions r ~ N(0, I) on the final latents are carried back through the sampler and the networks: for step k and
    a layer, g = (d final / d output of the layer)^T r, so that g . error is what the layer's error changes along r,
    and its square is in expectation the squared norm of the change of the final latents (Hutchinson 1989,
    doi:10.1080/03610918908812806; used to choose precisions in HAWQ-V2, Dong et al. 2020, arXiv:1911.03852). First
    order in the error, as AdaRound (Nagel et al. 2020, arXiv:2004.10568) begins. Other directions, on the velocity of
    a call alone, give the error of that velocity.
    """
    rows: dict[str, list[Row]] = {}
    pulled: dict[int, list[torch.Tensor]] = {}  # step -> gradient by the latents that the step is given
    ends: list[torch.Tensor] = []
    norm_sq, cost, forward_ms = 1.0, Cost(), []
    for call in unit.calls:
        begin = time.perf_counter()
        target, network = setting.targets.get(call.component), setting.networks[call.component]
        given = setting.tensors(call)
        with frozen(network):
            passage = Passage(network, given)
            velocity = passage.velocity.float()
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
            found: dict[str, list[Projected]] = {}
            visit = _visitor(setting, target, found) if target else _nothing
            grads = passage.backward([*seeds, *single], target.layers if target else (), visit)
        if setting.follow:
            mine = [free * each[:, : velocity.shape[1]].float() for each in grads[: len(seeds)]]
            before = pulled.get(call.step)
            pulled[call.step] = (
                [a + b for a, b in zip(before, mine, strict=True)] if before is not None else mine
            )
        del passage, grads
        synchronise(velocity.device)
        products = setting.products(target) if target else 0.0
        cost += Cost(2.0, float(len(seeds) + len(single)), products, (time.perf_counter() - begin) * 1e3)
        if target:
            size = float((velocity**2).sum().double())
            rows.setdefault(call.component, []).append(_row(call, target, found, len(seeds), size, norm_sq))
        tick()
    cost += Cost(forward_ms=statistics.median(forward_ms) * len(forward_ms))
    return make_parts(setting, unit, rows, coherent=True, cost=cost)


def _visitor(setting: Setting, target: Target, found: dict[str, list[Projected]]) -> Callable:
    def visit(name: str, given: torch.Tensor, slopes: list[torch.Tensor]) -> None:
        module, amax = target.network.get_submodule(name), target.amax.get(name)
        found[name] = project(module, given, slopes, setting.formats, amax, setting.weights)

    return visit


def _nothing(*_) -> None:
    """A component that is only passed through."""


def _pull(step: int, ends: list, pulled: Mapping[int, list], setting: Setting) -> list[torch.Tensor]:
    """Gradient by a step's velocity: by the sampler's weights, directly and through the latents of later steps."""
    weights = setting.sampler.weights
    seeds = [weights[-1, step] * each for each in ends]
    for later, grads in pulled.items():
        if later > step:
            seeds = [a + weights[later, step] * b for a, b in zip(seeds, grads, strict=True)]
    return seeds


def _row(
    call, target: Target, found: dict[str, list[Projected]], paths: int, size: float, norm_sq: float
) -> Row:
    import numpy as np

    layers = [found[name] for name in target.layers]
    dots = np.array([[each.dots.numpy() for each in layer] for layer in layers])
    return Row(
        {"example": call.example, "step": call.step, "branch": call.branch, "velocity_sq": size},
        np.array([[each.relative_sq for each in layer] for layer in layers]),
        (dots[..., paths:] ** 2).mean(axis=-1) / (size or 1.0),
        dots[..., :paths] / norm_sq**0.5,
    )
