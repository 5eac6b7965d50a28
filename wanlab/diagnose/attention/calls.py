"""Listening at the attention of a Wan transformer: query, key and value as the kernel gets them, and where it is.

Nothing of the model is changed. The processors of diffusers hand query and key, after their norms and the rotary
embedding, to `dispatch_attention_fn`, which is stood in for; hooks say which layer is calling, stand-ins of the pipeline's
attributes which expert, step and branch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.entry_points import entry_points, standing_in
from wanlab.measure.stages import BRANCHES

if TYPE_CHECKING:
    import torch

    from wanlab.models.generate import Model

DISPATCH = "dispatch_attention_fn"
SELF, CROSS, IMAGE, FORWARD = "self", "cross", "image", "forward"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Where a call happens.

    Attributes:
        component: the expert.
        step: denoising step, from 0.
        branch: "cond" or "uncond", by order within the step.
        layer: number of the block, from 0; None for the whole forward.
        kind: "self", "cross" (on the text), "image" (on image tokens, Wan2.1 only), "forward" (the whole expert).
        text: the expert's text input `[B, S, C]`, zeros behind the prompt.
        scale: factor of the products of query and key; None for 1 / sqrt(dim).
    """

    component: str
    step: int
    branch: str
    layer: int | None
    kind: str
    text: torch.Tensor | None = None
    scale: float | None = None

    def prompt_tokens(self) -> int:
        """Tokens of the text that are not padding: the pipeline fills up with zeros before the expert."""
        return int((self.text[0] != 0).any(-1).sum())


Around = Callable[..., Any]
"""Called as `around(call, run, query, key)`, or `around(call, run)` for a forward; gives back what `run()` gave."""


@contextmanager
def attention_calls(
    model: Model, around: Around, *, after_step: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Inside the block every attention of every expert, and every forward of one, goes through `around`.

    Args:
        model: from `wanlab.models.load`, eager.
        around: see `Around`; query and key are `[B, tokens, heads, dim]`.
        after_step: called with the number of a denoising step behind it.

    Raises:
        WanlabError: the transformer is no Wan one, is compiled or on an engine, or is being listened to already.
    """
    blocks = wan_blocks(model)
    listener = _Listener(around, after_step)
    points = entry_points(model.pipeline)
    calls: dict[str, dict[str, Callable]] = {
        attribute: {"__call__": listener.expert(component)}
        for attribute, component in ((name, methods.get("__call__")) for name, methods in points.items())
        if component in blocks
    }
    if vars(model.pipeline).get("scheduler") is not None:
        calls["scheduler"] = {"set_timesteps": listener.begin, "step": listener.end_step}
    modules = {}
    with ExitStack() as stack:
        for parts in blocks.values():
            for layer, block in enumerate(parts):
                for kind, attention in ((SELF, block.attn1), (CROSS, block.attn2)):
                    for handle in listener.hook(layer, kind, attention):
                        stack.callback(handle.remove)
                    module = sys.modules[type(attention.processor).__module__]
                    modules[module.__name__] = module
        for module in modules.values():
            original = getattr(module, DISPATCH)
            stack.callback(setattr, module, DISPATCH, original)
            setattr(module, DISPATCH, listener.dispatch(original))
        with standing_in(model.pipeline, calls):
            yield


def wan_blocks(model: Model) -> dict[str, Any]:
    """Expert -> its blocks, each with the self-attention `attn1` and the cross-attention `attn2`.

    Raises:
        WanlabError: as `attention_calls`.
    """
    import torch

    found = {}
    for name, network in model.components.items():
        if not name.startswith("expert"):
            continue
        if not isinstance(network, torch.nn.Module):
            raise WanlabError(
                f"{name} runs on {model.engines.get(name, 'an engine')}, whose attention cannot be seen; load it eager"
            )
        blocks = getattr(network, "blocks", None)
        if not blocks or not all(_is_wan(block) for block in blocks):
            raise WanlabError(
                f"{name} is a {type(network).__name__}, not a Wan transformer (blocks with attn1 and attn2);"
                " take a Wan model"
            )
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules()):
            raise WanlabError(
                f"{name} is compiled, so its attention cannot be seen; load it anew, uncompiled"
            )
        for block in blocks:
            for attention in (block.attn1, block.attn2):
                module = sys.modules[type(attention.processor).__module__]
                dispatch = getattr(module, DISPATCH, None)
                if dispatch is None:
                    raise WanlabError(
                        f"{name}: {type(attention.processor).__name__} does not go through diffusers' {DISPATCH};"
                        " set the default attention processor"
                    )
                if hasattr(dispatch, "_wanlab_listens"):
                    raise WanlabError("attention is being listened to already; leave the outer block first")
        found[name] = blocks
    if not found:
        raise WanlabError(f"{model.spec.name} has no expert loaded; name one in load(..., components=...)")
    return found


def _is_wan(block: Any) -> bool:
    return all(
        hasattr(getattr(block, name, None), part)
        for name in ("attn1", "attn2")
        for part in ("to_q", "processor")
    )


class _Listener:
    """Knows where the pipeline is."""

    def __init__(self, around: Around, after_step: Callable[[int], None] | None) -> None:
        self.around, self.after_step = around, after_step
        self.step = self.calls_in_step = 0
        self.forward: AttentionCall | None = None
        self.inside: tuple[int, str, bool] | None = None  # layer, kind, whether image tokens come first
        self.heard = 0

    def begin(self, call: Callable) -> Callable:
        def begun(*args, **kwargs):
            self.step = self.calls_in_step = 0
            return call(*args, **kwargs)

        return begun

    def end_step(self, call: Callable) -> Callable:
        def stepped(*args, **kwargs):
            result = call(*args, **kwargs)
            done, self.step, self.calls_in_step = self.step, self.step + 1, 0
            if self.after_step is not None:
                self.after_step(done)
            return result

        return stepped

    def expert(self, component: str) -> Callable:
        def wrap(call: Callable) -> Callable:
            def heard(*args, **kwargs):
                order = self.calls_in_step
                branch = BRANCHES[order] if order < len(BRANCHES) else f"branch_{order}"
                text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
                self.forward = AttentionCall(component, self.step, branch, None, FORWARD, text)
                self.calls_in_step += 1
                try:
                    return self.around(self.forward, partial(call, *args, **kwargs))
                finally:
                    self.forward = None

            return heard

        return wrap

    def hook(self, layer: int, kind: str, attention: torch.nn.Module) -> list:
        image_first = getattr(attention, "add_k_proj", None) is not None

        def enter(*_) -> None:
            self.inside, self.heard = (layer, kind, image_first), 0

        def leave(*_) -> None:
            self.inside = None

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave, always_call=True),
        ]

    def dispatch(self, original: Callable) -> Callable:
        def listening(query, key, value, *args, **kwargs):
            run = partial(original, query, key, value, *args, **kwargs)
            if self.inside is None or self.forward is None:
                return run()  # another model of this process
            if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
                raise WanlabError(
                    "masked attention is not understood here; take a model that attends to everything"
                )
            layer, kind, image_first = self.inside
            if image_first and self.heard == 0:
                kind = IMAGE
            self.heard += 1
            call = replace(self.forward, layer=layer, kind=kind, scale=kwargs.get("scale"))
            return self.around(call, run, query, key)

        listening._wanlab_listens = True
        return listening
