"""One call of an expert, block by block and back again, holding one block's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch

HOST_SHARE = 0.4
"""The blocks' inputs wait on the host when they would take more than this share of the GPU's free memory."""


class Passage:
    """A forward that keeps what every block was given, so that blocks can be run again one at a time.

    Memory is that of the blocks' inputs and one block's graph: gradient checkpointing at block boundaries (Chen et
    al. 2016, arXiv:1604.06174), without a change to the network. Where gradients are off, there is no way back, only
    `resume`.

    Attributes:
        velocity: what the network returns for these inputs, detached.
    """

    def __init__(self, network: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        import torch

        self.network, self._inputs = network, [each.detach() for each in inputs]
        grads = torch.is_grad_enabled()
        self._source = self._inputs[0].clone().requires_grad_(grads)
        with _door(network) as door:
            network(self._source, *self._inputs[1:], return_dict=False)
            self._entry, *others = door.given
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
        """Carry directions on the velocity back to the layers' outputs and to the latents.

        Args:
            seeds: each of the shape of `velocity`.
            layers: inside blocks.
            visit: is called with the name of each layer, its input, and for each seed the gradient of
                `(seed * velocity).sum()` by its output. Last block first.

        Returns:
            For each seed the gradient by the network's first input.
        """
        import torch

        by_block = blocks_of(layers)
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
            found: list[list[torch.Tensor]] = []
            for position, grad in enumerate(grads):
                more = position + 1 < len(grads)
                state_grad, *rest = torch.autograd.grad(out, [state, *outputs], grad, retain_graph=more)
                grads[position] = state_grad
                found.append(rest)
            inputs = {name: seen[name][0] for name in names}
            del out, outputs, seen, state
            for place, name in enumerate(names):
                visit(name, inputs[name], [each[place] for each in found])
        return [torch.autograd.grad(self._entry, self._source, g, retain_graph=True)[0] for g in grads]

    def resume(self, index: int) -> torch.Tensor:
        """The velocity from this block on, as the network is now; what came before is as it was."""
        import torch

        with torch.no_grad():
            state = self._states[index].to(self._entry.device)
            for block in list(self.network.blocks)[index:]:
                state = block(state, *self.others)
            return self._tail(state)

    def layer_inputs(self, index: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What these layers of a block are given."""
        import torch

        with _watched(self.network, names) as seen, torch.no_grad():
            self.network.blocks[index](self._states[index].to(self._entry.device), *self.others)
        return {name: seen[name][0] for name in names}

    def _tail(self, state: torch.Tensor) -> torch.Tensor:
        with _door(self.network, state):
            return self.network(*self._inputs, return_dict=False)[0]


def blocks_of(layers: Sequence[str]) -> dict[int, list[str]]:
    """Block -> its layers.

    Raises:
        WanlabError: a layer outside the blocks.
    """
    found: dict[int, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        if parts[0] != "blocks" or not parts[1].isdigit():
            raise WanlabError(f"{name} lies outside the blocks; sensitivity is measured of layers in blocks")
        found.setdefault(int(parts[1]), []).append(name)
    return found


@contextmanager
def frozen(network: torch.nn.Module) -> Iterator[None]:
    """Inside the block no weight asks for a gradient, so that no graph keeps what only weights need."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def _door(network: torch.nn.Module, answer: torch.Tensor | None = None) -> Iterator[torch.nn.Module]:
    """Inside the block one module stands for all blocks: notes what they are given, and hands on `answer`."""
    import torch

    class Door(torch.nn.Module):
        given: tuple = ()

        def forward(self, state, *others):
            self.given = (state, *others)
            return state if answer is None else answer

    blocks, door = network.blocks, Door()
    network.blocks = torch.nn.ModuleList([door])
    try:
        yield door
    finally:
        network.blocks = blocks


@contextmanager
def _watched(network: torch.nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple]]:
    """Inside the block the inputs and outputs of layers are noted; every output can be asked for its gradient."""
    import torch

    seen: dict[str, tuple] = {}

    def note(name: str):
        def hook(module, args, output):
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()  # of the text, which no gradient reaches otherwise
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
    import torch

    if state.device.type != "cuda":
        return False
    return state.nbytes * blocks > HOST_SHARE * torch.cuda.mem_get_info(state.device)[0]
