"""Names for the parts of a model in a profile, put there by hooks; the model itself is not changed.

A range is called by its component and module path, e.g. `expert_low.blocks.3.attn1.to_q`. Modules are hooked when the
first component is called under a profiler, so that an unprofiled generation pays for one question per component call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wanlab.measure.entry_points import entry_points, standing_in

if TYPE_CHECKING:
    import torch

    from wanlab.models.generate import Model

DEEPEST = 3
"""Module levels below a block that get a range: `blocks.0.ffn.net.0` is the third."""

_VAE_HALVES = {
    "encoder": "vae_encoder",
    "quant_conv": "vae_encoder.quant_conv",
    "decoder": "vae_decoder",
    "post_quant_conv": "vae_decoder.post_quant_conv",
}
_BLOCK = re.compile(r"^\w*blocks\.\d+")


@contextmanager
def ranges(model: Model, *, projections: bool = True) -> Iterator[list[str]]:
    """Name the parts of a model in every profile that is taken inside the block.

    Components get a range whatever runs them; modules inside get one where a component is a PyTorch module.

    Args:
        model: from `wanlab.models.load`.
        projections: also name what is inside the blocks: attentions, linear layers, norms.

    Yields:
        The names that were given.
    """
    hooks = _Hooks(_named_modules(model.pipeline, projections))
    points = entry_points(model.pipeline)
    wrapped = {
        attribute: {method: _ranged(component, hooks) for method, component in methods.items()}
        for attribute, methods in points.items()
    }
    components = [component for methods in points.values() for component in methods.values()]
    try:
        with standing_in(model.pipeline, wrapped):
            yield [*components, *hooks.modules]
    finally:
        hooks.remove()


def _named_modules(pipeline, projections: bool) -> dict[str, torch.nn.Module]:
    """Range -> module, inside the components that are PyTorch modules."""
    import torch

    found = {}
    for attribute, methods in entry_points(pipeline).items():
        network = vars(pipeline)[attribute]
        if isinstance(network, torch.nn.Module):
            for path, module in _reachable(network):
                name = _name(methods.get("__call__"), path)
                if name and _wanted(path, projections):
                    found[name] = module
    return found


def _reachable(network: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules by path, except compiled ones and what is in them: a hook there would be compiled in."""
    if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
        return
    yield path, network
    for name, module in network.named_children():
        yield from _reachable(module, f"{path}.{name}" if path else name)


def _name(component: str | None, path: str) -> str | None:
    """Range of a module inside a component; None for the component itself, whose entry point is the range."""
    if not path:
        return None
    if component is not None:
        return f"{component}.{path}"
    head, _, rest = path.partition(".")
    half = _VAE_HALVES.get(head)
    return f"{half}.{rest}" if half and rest else half if half and "." in half else None


def _wanted(path: str, projections: bool) -> bool:
    path = path.removeprefix("encoder.").removeprefix("decoder.")
    block = _BLOCK.match(path)
    if block is None:
        return "." not in path
    inside = path[block.end() :].count(".")
    return inside == 0 or (projections and inside <= DEEPEST)


class _Hooks:
    """Hooks of many modules, there or not."""

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        self.modules = modules
        self._handles: list = []

    def put(self) -> None:
        if not self._handles:
            self._handles = [
                handle for name, module in self.modules.items() for handle in _hook(module, name)
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _ranged(component: str, hooks: _Hooks) -> Callable:
    def wrap(call: Callable) -> Callable:
        import torch

        profiled = torch.autograd._profiler_enabled

        def ranged(*args, **kwargs):
            if not profiled():
                hooks.remove()
                return call(*args, **kwargs)
            hooks.put()
            with torch.profiler.record_function(component):
                return call(*args, **kwargs)

        return ranged

    return wrap


def _hook(module: torch.nn.Module, name: str) -> list:
    """A range around a module's forward."""
    import torch

    opened: list = []

    def enter(*_) -> None:
        opened.append(torch.profiler.record_function(name).__enter__())

    def leave(*_) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    # always_call: a forward that raises still closes its range.
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
