"""One forward of an expert block by block, layer errors along directions, and the sampler's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from wanlab.core.errors import WanlabError, first_line
from wanlab.models.blocks import blocks_of
from wanlab.models.pipeline import set_timesteps
from wanlab.models.taps import BlockTap
from wanlab.precision.denoiser import output_of
from wanlab.precision.formats import QuantFormat, decode_weight, encode_weight
from wanlab.precision.quant_linear import fake_quantize

ROWS = 8192
"""Number of tokens at a time, so that float32 copies of a long clip's activations stay small."""


@dataclass(frozen=True, eq=False)
class Projected:
    """A layer's error in one format.

    Attributes:
        relative_sq: squared norm of the output's error over that of the output.
        dots: sum of gradient times error for each gradient, `[directions]`, float64 on the CPU.
    """

    relative_sq: float
    dots: torch.Tensor


class WeightErrors:
    """Errors of rounded weights by layer and format, kept in memory up to a budget of bytes."""

    def __init__(self, budget_bytes: int = 2**30) -> None:
        self._kept: dict[tuple[int, str], torch.Tensor] = {}
        self._left = budget_bytes

    def of(self, module: torch.nn.Module, format: QuantFormat) -> torch.Tensor:
        """Rounded weight minus weight, `[outputs, inputs]` in the weight's dtype."""
        key = (id(module), format.name)
        if key in self._kept:
            return self._kept[key]
        weight = module.weight.data
        codes, scale = encode_weight(weight, format.weight, weight.dtype)
        error = decode_weight(codes, scale, format.weight, weight.dtype) - weight
        if error.nbytes <= self._left:
            self._kept[key] = error
            self._left -= error.nbytes
        return error


def project(
    module: torch.nn.Module,
    given: torch.Tensor,
    gradients: list[torch.Tensor],
    formats: list[QuantFormat],
    amax: float | None,
    errors: WeightErrors,
) -> list[Projected]:
    """The error of a linear layer's output in each format, and its inner products with gradients.

    The error is taken as `(q(x) - x) W + q(x) (q(W) - W)`, which is `q(x) q(W) - x W` without the rounding of two
    large outputs to the layer's dtype.

    Args:
        module: linear layer.
        given: its input `[..., inputs]`.
        gradients: gradients of its output, each `[..., outputs]`.
        amax: largest magnitude of the input's codes; needed by formats that round the input.
    """
    weight = module.weight.data
    rows = given.reshape(-1, given.shape[-1])
    slopes = [each.reshape(-1, each.shape[-1]) for each in gradients]
    totals = [[torch.zeros((), dtype=torch.float64, device=rows.device)] * (1 + len(slopes)) for _ in formats]
    output_sq = torch.zeros((), dtype=torch.float64, device=rows.device)
    rounded_weights = [errors.of(module, each) for each in formats]
    with torch.no_grad():
        for start in range(0, len(rows), ROWS):
            x = rows[start : start + ROWS]
            output_sq = output_sq + _dot(out := linear(x, weight, module.bias), out)
            rounded = {
                each.activation: fake_quantize(x, scale_of(each, amax, weight), each.activation)
                for each in formats
                if each.activation is not None
            }
            # Formats that round the input in the same way share this part of the error.
            moved = {numbers: linear(q - x, weight) for numbers, q in rounded.items()}
            for place, format in enumerate(formats):
                numbers = format.activation
                error = linear(x if numbers is None else rounded[numbers], rounded_weights[place])
                if numbers is not None:
                    error = error + moved[numbers]
                parts = [_dot(error, error)]
                parts += [_dot(slope[start : start + ROWS], error) for slope in slopes]
                totals[place] = [a + b for a, b in zip(totals[place], parts, strict=True)]
        table = torch.stack([torch.stack(each) for each in totals]).cpu()
    size = float(output_sq)
    return [Projected(float(row[0]) / size if size else 0.0, row[1:]) for row in table]


def scale_of(format: QuantFormat, amax: float, weight: torch.Tensor) -> torch.Tensor:
    """The scale of a layer's input, as `fake_quantized` takes it."""
    return format.activation.scale(torch.tensor(amax, device=weight.device), weight.dtype)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() * b.float()).sum().double()


@dataclass(frozen=True, eq=False)
class SamplerWeights:
    """Latents of a generation as `start[k] * first latents + sum over j of weights[k, j] * velocity j`.

    Attributes:
        start: `[steps + 1]`.
        weights: `[steps + 1, steps]`; row k is for the latents before step k, the last row for the final latents: the
            sampler's step sizes, with the terms of a multistep method.
    """

    start: np.ndarray
    weights: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """Weight of each step's velocity in the final latents, `[steps]`."""
        return self.weights[-1]


def sampler_weights(model, steps: int, **size: int | None) -> SamplerWeights:
    """The weights of every step's velocity in the latents, without a forward of the network.

    Samplers of flow matching (Euler, UniPC, DPM-Solver++ without thresholding) are linear in the latents and the
    velocities, so one run over unit vectors gives all weights, for any order of the method. The scheduler is a
    copy.

    Args:
        model: the model. steps: number of steps.
        size: height, width and frames of the video, on which the steps of some families depend.

    Raises:
        WanlabError: a scheduler that is not linear or draws noise, or a schedule that is not known.
    """

    name = type(model.pipeline.scheduler).__name__

    def run(scale: float) -> torch.Tensor:
        scheduler = model.pipeline.scheduler.__class__.from_config(model.pipeline.scheduler.config)
        set_timesteps(scheduler, model.spec, steps, size)
        if len(scheduler.timesteps) != steps:
            raise WanlabError(
                f"the schedule of {model.spec.name} is not known: {name} has {len(scheduler.timesteps)} timesteps for"
                f" {steps} steps; state `schedule` in the model's family (CONTRIBUTING.md)"
            )
        # One channel per unknown: the first latents, then the velocity of each step.
        latents = torch.zeros(1, steps + 1, 1, 1, 1, dtype=torch.float64)
        latents[0, 0] = scale
        seen = [latents.flatten().clone()]
        for step, timestep in enumerate(scheduler.timesteps):
            velocity = torch.zeros_like(latents)
            velocity[0, step + 1] = scale
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            seen.append(latents.flatten().double().clone())
        return torch.stack(seen)

    try:
        once, twice = run(1.0), run(2.0)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise WanlabError(
            f"{name} does not step from a velocity and latents alone ({first_line(error)}); take UniPC or Euler"
        ) from error
    if not torch.allclose(2 * once, twice, rtol=1e-6, atol=1e-9):
        raise WanlabError(f"{name} is not linear in its velocities; take UniPC or Euler without thresholding")
    table = once.numpy()
    return SamplerWeights(np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:]))


def even_weights(steps: int) -> SamplerWeights:
    """Weights of a sampler that is not known: every step's velocity counts alike."""
    return SamplerWeights(np.ones(steps + 1), np.tri(steps + 1, steps, -1) / steps)


def by_blocks(network: torch.nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the network's forward can be computed block by block: blocks in one list that hand on one tensor.

    Of Wan's transformer it is known; of others it is tried on a call, and the outcomes must be equal bit by bit.
    """
    if type(network).__name__ == "WanTransformer3DModel":
        return True
    lists = {block.path.partition(".")[0] for block in blocks_of(network)}
    if lists != {"blocks"} or not all(isinstance(value, torch.Tensor) for value in arguments.values()):
        return False
    try:
        with torch.no_grad():
            velocity = CheckpointedForward(network, list(arguments.values())).velocity
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    with torch.no_grad():
        return torch.equal(velocity, output_of(network, arguments))


HOST_SHARE = 0.4
"""The blocks' inputs are kept on the host where they would take more than this share of the GPU's free memory."""


class CheckpointedForward:
    """A forward that keeps the input of every block, so that blocks can be run again one at a time.

    Memory is that of the blocks' inputs and one block's graph: gradient checkpointing at block boundaries (Chen et
    al. 2016, arXiv:1604.06174), without a change to the network. Where gradients are off, `backward` cannot be called, only
    `resume`.

    Attributes:
        velocity: output of the network for these inputs, detached.
    """

    def __init__(self, network: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self.network, self._inputs = network, [each.detach() for each in inputs]
        grads = torch.is_grad_enabled()
        self._source = self._inputs[0].clone().requires_grad_(grads)
        with _tapped(network) as tap:
            network(self._source, *self._inputs[1:], return_dict=False)
            self._entry, *others = tap.inputs
        self.others = [_detached(each) for each in others]
        self._states, state = [], self._entry.detach()
        keep_on_host = _too_large(state, len(network.blocks))
        with torch.no_grad():
            for block in network.blocks:
                self._states.append(state.cpu() if keep_on_host else state)
                state = block(state, *self.others)
        self._last = state.detach().requires_grad_(grads)
        self._output = self._tail(self._last)
        self.velocity = self._output.detach()

    def backward(
        self,
        seeds: Sequence[torch.Tensor],
        layers: Sequence[str],
        visit: Callable[[str, torch.Tensor, list[torch.Tensor]], None],
    ) -> list[torch.Tensor]:
        """Propagate directions on the velocity back to the layers' outputs and to the latents.

        Args:
            seeds: each of the shape of `velocity`.
            layers: layers inside blocks.
            visit: function that is called with the name of each layer, its input, and for each seed the gradient of
                `(seed * velocity).sum()` by its output; the last block comes first.

        Returns:
            For each seed the gradient by the network's first input.
        """
        by_block = layers_by_block(layers)
        grads = [
            torch.autograd.grad(self._output, self._last, seed.to(self._output.dtype), retain_graph=True)[0]
            for seed in seeds
        ]
        for index in reversed(range(len(self.network.blocks))):
            names, block = by_block.get(index, ()), self.network.blocks[index]
            state = self._states[index].to(self._entry.device).detach().requires_grad_()
            with _watched(self.network, names) as seen, torch.enable_grad():
                out = block(state, *self.others)
            outputs = [seen[name][1] for name in names]
            slopes: list[list[torch.Tensor]] = []
            for position, grad in enumerate(grads):
                more = position + 1 < len(grads)
                state_grad, *layer_grads = torch.autograd.grad(
                    out, [state, *outputs], grad, retain_graph=more
                )
                grads[position] = state_grad
                slopes.append(layer_grads)
            inputs = {name: seen[name][0] for name in names}
            del out, outputs, seen, state
            for place, name in enumerate(names):
                visit(name, inputs[name], [each[place] for each in slopes])
        return [torch.autograd.grad(self._entry, self._source, g, retain_graph=True)[0] for g in grads]

    def resume(self, index: int) -> torch.Tensor:
        """The velocity of the network as it is now, computed from the recorded input of this block on."""
        with torch.no_grad():
            state = self._states[index].to(self._entry.device)
            for block in list(self.network.blocks)[index:]:
                state = block(state, *self.others)
            return self._tail(state)

    def layer_inputs(self, index: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Inputs of these layers of a block."""
        with _watched(self.network, names) as seen, torch.no_grad():
            self.network.blocks[index](self._states[index].to(self._entry.device), *self.others)
        return {name: seen[name][0] for name in names}

    def _tail(self, state: torch.Tensor) -> torch.Tensor:
        with _tapped(self.network, state):
            return self.network(*self._inputs, return_dict=False)[0]


def layers_by_block(layers: Sequence[str]) -> dict[int, list[str]]:
    """Block -> its layers.

    Raises:
        WanlabError: a layer outside the blocks.
    """
    by_block: dict[int, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        if parts[0] != "blocks" or not parts[1].isdigit():
            raise WanlabError(f"{name} lies outside the blocks; sensitivity is measured of layers in blocks")
        by_block.setdefault(int(parts[1]), []).append(name)
    return by_block


@contextmanager
def frozen(network: torch.nn.Module) -> Iterator[None]:
    """Inside the block no weight requires a gradient, so that graphs keep no tensors that only weights need."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _tapped(network: torch.nn.Module, answer: torch.Tensor | None = None) -> Iterator[BlockTap]:
    """Inside the context one module takes the place of all blocks; see `BlockTap`."""
    blocks, tap = network.blocks, BlockTap(answer)
    network.blocks = torch.nn.ModuleList([tap])
    try:
        yield tap
    finally:
        network.blocks = blocks


@contextmanager
def _watched(network: torch.nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple]]:
    """Inside the block inputs and outputs of layers are recorded; every output has a gradient."""
    seen: dict[str, tuple] = {}

    def note(name: str):
        def hook(module, args, output):
            if torch.is_grad_enabled() and not output.requires_grad:
                output = (
                    output.detach().requires_grad_()
                )  # layers of the text, which no gradient reaches otherwise
            seen[name] = (args[0].detach(), output)
            return output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _detached(value):
    if isinstance(value, tuple | list):
        return type(value)(_detached(each) for each in value)
    return value.detach() if hasattr(value, "detach") else value


def _too_large(state: torch.Tensor, blocks: int) -> bool:
    if state.device.type != "cuda":
        return False
    return state.nbytes * blocks > HOST_SHARE * torch.cuda.mem_get_info(state.device)[0]
