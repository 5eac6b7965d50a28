"""Attention calls of a denoiser as they happen: their step, branch, layer and kind, their query and key."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from wanlab.core.errors import WanlabError
from wanlab.measure.stages import BRANCHES
from wanlab.models.blocks import Block, blocks_of
from wanlab.models.families.base import Family
from wanlab.models.pipeline import Model
from wanlab.models.taps import component_calls, intercept_calls

DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"
_LISTENS = "_wanlab_listens"
"""Mark of a function that a recording has put in place."""
SELF, CROSS, IMAGE, FORWARD = "self", "cross", "image", "forward"
BOTH = "both"
"""Branch of a call that computes both branches of guidance as one batch."""
BATCH = ("uncond", "cond")
"""Branches of the elements of such a batch: diffusers' pipelines put the negative prompt first."""
LEFT_OUT = -1e3
"""What a mask adds to the products of a key that is left out is this or less: exp(-1000) is zero in float32."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Position of an attention call in a generation.

    Attributes:
        component: name of the expert.
        step: denoising step, from 0.
        branch: "cond" or "uncond", by order within the step; "both" where one call computes both.
        layer: number of the block, from 0, see `wanlab.models.blocks.blocks_of`; None for the whole forward.
        kind: "self", "cross" (on the text), "image" (on image tokens, Wan2.1 only), "forward" (the whole expert). Joint
            attention of video and text is one kernel, and counts as "self".
        branches: branch of each element of the batch of query and key.
        text: text input of the expert, `[B, S, C]`. text_mask: which of its rows are no padding, `[B, S]`, where the expert
            is given that.
        scale: factor of the products of query and key; None for 1 / sqrt(dim).
        joint: whether it is joint attention.
        text_tokens: of joint attention, tokens of the text among those of query and key; else 0.
        text_first: whether these stand before the tokens of the video.
        mask, causal: mask of the call, and whether it is masked causally; see `kept`.
        path: of the attention module.
    """

    component: str
    step: int
    branch: str
    layer: int | None
    kind: str
    branches: tuple[str, ...] = ()
    text: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    scale: float | None = None
    joint: bool = False
    text_tokens: int = 0
    text_first: bool = False
    mask: torch.Tensor | None = None
    causal: bool = False
    path: str = ""

    def prompt_tokens(self, element: int = 0) -> int | None:
        """Number of text tokens that are not padding, by the text's mask, or where it ends in zeros, as the pipelines of Wan
        pad it; None if neither tells."""
        if self.text_mask is not None:
            return int((self.text_mask[element] != 0).sum())
        if self.text is None:
            return None
        filled = (self.text[element] != 0).any(-1)
        return int(filled.sum()) if not filled.all() else None

    def kept(self, batch: int, keys: int) -> torch.Tensor | None:
        """Keys that the mask keeps, `[B, keys]`, where these are the same for every query and head; None without a mask.

        Raises:
            WanlabError: they are not the same, or the mask weighs keys.
        """
        mask = self.mask
        refusal = WanlabError(
            f"{self.path}: attention that is masked differently for each query, or by degrees, is not understood here; take"
            " a model that attends to everything"
        )
        if self.causal:
            raise refusal
        if mask is None:
            return None
        if mask.shape == (batch, keys) and batch > 1:
            mask = mask[:, None, None]
        while mask.ndim < 4:
            mask = mask[None]
        row = mask[:, :1, :1]
        if not (mask == row).all():
            raise refusal
        row = row[:, 0, 0].expand(batch, keys)
        if row.dtype == torch.bool:
            return row
        # A softmax does not change if all its products grow alike.
        row = row - row.amax(-1, keepdim=True)
        kept = row > LEFT_OUT
        if (row[kept] != 0).any():
            raise refusal
        return kept

    def without_tensors(self) -> AttentionCall:
        """The same call, which keeps nothing in memory."""
        return replace(self, text=None, text_mask=None, mask=None)


Around = Callable[..., Any]
"""Called as `around(call, run, query, key)`, or `around(call, run)` for a forward; returns the result of `run()`."""


@contextmanager
def attention_calls(
    model: Model, around: Around, *, after_step: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Inside the block every attention call of a denoiser's blocks and every forward of every expert goes through `around`.

    Heard are calls of diffusers' `dispatch_attention_fn`, and of PyTorch's `scaled_dot_product_attention` where a processor
    calls that itself.

    Args:
        model: from `wanlab.models.load`, eager.
        around: see `Around`; query and key are `[B, tokens, heads, dim]`.
        after_step: called after every denoising step, with its number.

    Raises:
        WanlabError: the denoiser has no blocks with attention, is compiled or on an engine, or is already being recorded;
            in the block: an attention that is computed in another way, or joint with text that stands at a place that is not
            known.
    """
    blocks = attended_blocks(model)
    listener = _Listener(around, after_step, model.family)
    points = component_calls(model.pipeline)
    calls: dict[str, dict[str, Callable]] = {
        attribute: {"__call__": listener.expert(component, model.components[component])}
        for attribute, component in ((name, methods.get("__call__")) for name, methods in points.items())
        if component in blocks
    }
    if vars(model.pipeline).get("scheduler") is not None:
        calls["scheduler"] = {"set_timesteps": listener.begin, "step": listener.end_step}
    with ExitStack() as stack:
        modules = {}
        for name, parts in blocks.items():
            for block in parts:
                for inside, attention in _attentions(block.module):
                    for handle in listener.hook(block.number, f"{name}.{block.path}.{inside}", attention):
                        stack.callback(handle.remove)
                    module = _module(attention)
                    modules[module.__name__] = module
        for module in modules.values():
            if hasattr(module, DISPATCH):
                stack.callback(setattr, module, DISPATCH, original := getattr(module, DISPATCH))
                setattr(module, DISPATCH, listener.listen(original))
        if not all(hasattr(module, DISPATCH) for module in modules.values()):
            stack.callback(setattr, functional, SDPA, original := getattr(functional, SDPA))
            setattr(functional, SDPA, listener.listen(original, heads_first=True))
        with intercept_calls(model.pipeline, calls):
            yield


def attended_blocks(model: Model) -> dict[str, list[Block]]:
    """Expert -> its blocks, see `wanlab.models.blocks.blocks_of`.

    Raises:
        WanlabError: as for `attention_calls`.
    """
    attended = {}
    for name, network in model.components.items():
        if not name.startswith("expert"):
            continue
        if not isinstance(network, torch.nn.Module):
            raise WanlabError(
                f"{name} runs on {model.engines.get(name, 'an engine')}, whose attention cannot be seen; load it eager"
            )
        blocks = blocks_of(network)
        attentions = [attention for block in blocks for _, attention in _attentions(block.module)]
        if not attentions:
            raise WanlabError(
                f"{name} is a {type(network).__name__}, which has no blocks with attention (to_q and a processor);"
                " take a video transformer of diffusers"
            )
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules()):
            raise WanlabError(
                f"{name} is compiled, so its attention cannot be seen; load it anew, uncompiled"
            )
        heard = [getattr(_module(attention), DISPATCH, None) for attention in attentions]
        if any(hasattr(function, _LISTENS) for function in (*heard, getattr(functional, SDPA))):
            raise WanlabError("attention is already being recorded; leave the outer block first")
        attended[name] = blocks
    if not attended:
        raise WanlabError(f"{model.spec.name} has no expert loaded; name one in load(..., components=...)")
    return attended


def attention_outside(network: torch.nn.Module) -> list[str]:
    """Names of the parts of a denoiser that have attention besides its blocks, which is not recorded."""
    inside = {id(attention) for block in blocks_of(network) for _, attention in _attentions(block.module)}
    others = [path for path, attention in _attentions(network) if id(attention) not in inside]
    return list(dict.fromkeys(path.partition(".")[0] for path in others))


def attention_heads(model: Model) -> tuple[int, int] | None:
    """Number of heads and their size, from the attention of the first expert; None where it cannot be seen."""
    for name, network in model.components.items():
        if name.startswith("expert") and isinstance(network, torch.nn.Module):
            for block in blocks_of(network):
                for _, attention in _attentions(block.module):
                    heads, width = getattr(attention, "heads", 0), getattr(attention.to_q, "out_features", 0)
                    if heads and width % heads == 0:
                        return heads, width // heads
    return None


def _attentions(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [
        (path, part)
        for path, part in module.named_modules()
        if hasattr(part, "to_q") and hasattr(part, "processor")
    ]


def _module(attention: Any) -> Any:
    """The Python module whose functions a processor calls."""
    return sys.modules[type(attention.processor).__module__]


@dataclass(frozen=True, eq=False)
class _Inside:
    """The attention module that is running: its layer and path, tokens of its input, whether it has another input, and
    whether it joins both."""

    layer: int
    path: str
    processor: str
    tokens: int
    second: bool
    joint: bool
    image_first: bool


class _Listener:
    """Follows a generation, so that each attention call knows its step, branch and layer."""

    def __init__(self, around: Around, after_step: Callable[[int], None] | None, family: Family) -> None:
        self.around, self.after_step, self.family = around, after_step, family
        self.step = self.calls_in_step = 0
        self.forward: AttentionCall | None = None
        self.inside: _Inside | None = None
        self.heard = 0
        self.within = False  # a call that was heard runs: what it calls is part of it

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

    def expert(self, component: str, network: torch.nn.Module) -> Callable:
        names = list(inspect.signature(network.forward).parameters)

        def wrap(call: Callable) -> Callable:
            def heard(*args, **kwargs):
                given = dict(zip(names, args, strict=False)) | kwargs
                branch, branches = self._branches(given.get("hidden_states"))
                self.forward = AttentionCall(
                    component,
                    self.step,
                    branch,
                    None,
                    FORWARD,
                    branches,
                    given.get("encoder_hidden_states"),
                    given.get("encoder_attention_mask"),
                )
                self.calls_in_step += 1
                try:
                    return self.around(self.forward, partial(call, *args, **kwargs))
                finally:
                    self.forward = self.inside = None

            return heard

        return wrap

    def _branches(self, states: Any) -> tuple[str, tuple[str, ...]]:
        """Branch of a forward, and of each element of its batch."""
        order, size = self.calls_in_step, 1 if states is None else len(states)
        if size == 1:
            branch = BRANCHES[order] if order < len(BRANCHES) else f"branch_{order}"
            return branch, (branch,)
        return BOTH, tuple(BATCH[n] if n < len(BATCH) else f"branch_{n}" for n in range(size))

    def hook(self, layer: int, path: str, attention: torch.nn.Module) -> list:
        joint = self.family.role(path.partition(".")[2]) == "joint attention"  # without the expert
        image_first = getattr(attention, "add_k_proj", None) is not None

        def enter(module, args, kwargs) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            other = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            processor = type(module.processor).__name__
            second = other is not None
            self.inside = _Inside(layer, path, processor, states.shape[1], second, joint, image_first)
            self.heard = 0

        def leave(*_) -> None:
            inside, self.inside = self.inside, None
            if inside is not None and self.heard == 0 and self.forward is not None:
                raise WanlabError(
                    f"{inside.path}: {inside.processor} goes neither through diffusers' {DISPATCH} nor through"
                    f" PyTorch's {SDPA}, so its attention cannot be seen; set the default attention processor"
                )

        return [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(leave),
        ]

    def listen(self, original: Callable, heads_first: bool = False) -> Callable:
        """The same function, heard; of `heads_first` tokens and heads of query, key and value stand the other way round."""

        def listening(query, key, value, *args, **kwargs):
            run = partial(original, query, key, value, *args, **kwargs)
            if self.inside is None or self.forward is None or self.within:
                return run()  # a call of another model in this process, or part of one that was heard
            options = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale"), args, strict=False)) | kwargs
            if heads_first:
                query, key = query.transpose(1, 2), key.transpose(1, 2)
            call = self._placed(self.forward, self.inside, query, options)
            self.heard += 1
            self.within = True
            try:
                return self.around(call, run, query, key)
            finally:
                self.within = False

        setattr(listening, _LISTENS, True)
        return listening

    def _placed(
        self, forward: AttentionCall, inside: _Inside, query: torch.Tensor, options: dict[str, Any]
    ) -> AttentionCall:
        """The call with its layer and kind, by what the module was given: text beside the tokens of the video (cross), text
        among them (joint), or nothing (self)."""
        batch, tokens = query.shape[:2]
        branches = forward.branches
        if batch == 1 and len(branches) > 1:  # one kernel for each element, as in Mochi
            branches = branches[self.heard % len(branches) :][:1]
        elif batch != len(branches):
            raise WanlabError(
                f"{inside.path} attends inside {batch} parts of a batch of {len(branches)}, which is not understood here;"
                " take a model that attends to the whole video at once"
            )
        text = max(tokens - inside.tokens, 0) if inside.second else 0
        joint = inside.joint or text > 0
        if text > 0 and self.family.text_first is None:
            raise WanlabError(
                f"{inside.path} attends from {inside.tokens} tokens of the video and {text} of the text together, and where"
                " the text stands is not known; state `text_first` in the model's family (CONTRIBUTING.md)"
            )
        kind = CROSS if inside.second and not joint else SELF
        if kind == CROSS and inside.image_first and self.heard == 0:
            kind = IMAGE
        return replace(
            forward,
            layer=inside.layer,
            kind=kind,
            branches=branches,
            scale=options.get("scale"),
            joint=joint,
            text_tokens=text,
            text_first=bool(self.family.text_first),
            mask=options.get("attn_mask"),
            causal=bool(options.get("is_causal")),
            path=inside.path,
        )
