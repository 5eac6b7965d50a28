"""One unit of work measured directly: one layer rounded at a time, and the rest of the network run with it."""

from __future__ import annotations

import time
from collections.abc import Callable

from wanlab.models.device import synchronise
from wanlab.precision.fake import fake_quantized
from wanlab.precision.sensitivities.latents import final_norm_sq
from wanlab.precision.sensitivities.layer_errors import project
from wanlab.precision.sensitivities.parts import Cost, Part, Row, make_parts
from wanlab.precision.sensitivities.passage import Passage, blocks_of
from wanlab.precision.sensitivities.work import Setting, Target, Unit


def direct_unit(unit: Unit, setting: Setting, tick: Callable[[], None]) -> dict[str, Part]:
    """Measure the velocity's error exactly: every layer and format alone, from the saved input of its block on.

    Needs no gradients, so it fits where a forward fits. A layer and format cost (blocks - block) / blocks forwards.
    Later steps are taken not to react. In a 16-bit dtype the rounding of the network's own outputs is part of the
    error.
    """
    import numpy as np
    import torch

    rows: dict[str, list[Row]] = {}
    cost, norm_sq = Cost(), 0.0
    for call in unit.calls:
        target = setting.targets.get(call.component)
        if target is None:
            tick()
            continue
        begin, given = time.perf_counter(), setting.tensors(call)
        with torch.no_grad():
            passage = Passage(target.network, given)
        velocity = passage.velocity.float()
        synchronise(velocity.device)
        forward_ms = (time.perf_counter() - begin) * 1e3
        norm_sq = norm_sq or final_norm_sq(given, velocity, call.sigma)
        local, moved_sq, forwards = _layers(passage, target, setting)
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


def _layers(passage: Passage, target: Target, setting: Setting):
    """Relative squared error of every layer's output, squared norm of the velocity's, and forwards spent."""
    import numpy as np

    shape = (len(target.layers), len(setting.formats))
    local, moved_sq, forwards = np.zeros(shape), np.zeros(shape), 0.0
    places = {name: place for place, name in enumerate(target.layers)}
    network, reference = target.network, passage.velocity.float()
    blocks = len(network.blocks)
    for index, names in blocks_of(target.layers).items():
        inputs = passage.layer_inputs(index, names)
        forwards += 1 / blocks
        for name in names:
            module, amax = network.get_submodule(name), target.amax.get(name)
            errors = project(module, inputs[name], [], setting.formats, amax, setting.weights)
            local[places[name]] = [each.relative_sq for each in errors]
            for column, each in enumerate(setting.formats):
                with fake_quantized(network, {name: each}, target.amax):
                    moved = passage.resume(index).float() - reference
                moved_sq[places[name], column] = float((moved**2).sum().double())
                forwards += (blocks - index) / blocks
    return local, moved_sq, forwards
