"""Attention maps: statistics of what every head of every layer attends to, by step, expert and guidance branch."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.packed import read_unpacked
from wanlab.core.paths import locate
from wanlab.diagnose.attention.statistics import (
    BLOCK_KEYS,
    LEVELS_PERCENT,
    MOST_BYTES,
    cross_statistics,
    error_name,
    near_window,
    sample_queries,
    self_statistics,
    statistic_names,
    summarise,
)
from wanlab.measure.stages import BRANCHES
from wanlab.models.pipeline import Model
from wanlab.models.shapes import latent_shape
from wanlab.models.taps import component_calls, intercept_calls

DISPATCH = "dispatch_attention_fn"
_LISTENS = "_wanlab_listens"
"""Mark of a dispatch that a recording has put in place."""
SELF, CROSS, IMAGE, FORWARD = "self", "cross", "image", "forward"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Position of an attention call in a generation.

    Attributes:
        component: name of the expert.
        step: denoising step, from 0.
        branch: "cond" or "uncond", by order within the step.
        layer: number of the block, from 0; None for the whole forward.
        kind: "self", "cross" (on the text), "image" (on image tokens, Wan2.1 only), "forward" (the whole expert).
        text: text input of the expert, `[B, S, C]`, with zeros after the prompt.
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
        """Number of text tokens that are not padding: the pipeline pads with zeros before it calls the expert."""
        return int((self.text[0] != 0).any(-1).sum())


Around = Callable[..., Any]
"""Called as `around(call, run, query, key)`, or `around(call, run)` for a forward; returns the result of `run()`."""


@contextmanager
def attention_calls(
    model: Model, around: Around, *, after_step: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Inside the block every attention call and every forward of every expert goes through `around`.

    Args:
        model: from `wanlab.models.load`, eager.
        around: see `Around`; query and key are `[B, tokens, heads, dim]`.
        after_step: called after every denoising step, with its number.

    Raises:
        WanlabError: the transformer is not a Wan transformer, is compiled or on an engine, or is already being recorded.
    """
    blocks = wan_blocks(model)
    listener = _Listener(around, after_step)
    points = component_calls(model.pipeline)
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
        with intercept_calls(model.pipeline, calls):
            yield


def wan_blocks(model: Model) -> dict[str, Any]:
    """Expert -> its blocks, each with the self-attention `attn1` and the cross-attention `attn2`.

    Raises:
        WanlabError: as for `attention_calls`.
    """
    blocks_of = {}
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
                if hasattr(dispatch, _LISTENS):
                    raise WanlabError("attention is already being recorded; leave the outer block first")
        blocks_of[name] = blocks
    if not blocks_of:
        raise WanlabError(f"{model.spec.name} has no expert loaded; name one in load(..., components=...)")
    return blocks_of


def _is_wan(block: Any) -> bool:
    return all(
        hasattr(getattr(block, name, None), part)
        for name in ("attn1", "attn2")
        for part in ("to_q", "processor")
    )


class _Listener:
    """Follows a generation, so that each attention call knows its step, branch and layer."""

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
                return run()  # a call of another model in this process
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

        setattr(listening, _LISTENS, True)
        return listening


PLACE = ("component", "step", "branch", "kind", "layer", "head")
HEAD_TYPES = ("spatial", "temporal", "global")
_MAGIC = "wanlab attention map 1"


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Statistics of attention heads.

    Attributes:
        frame: one row per component, step, branch, kind ("self", "cross"), layer and head: type of the head and the
            statistics of `self_statistics` and `cross_statistics`, averaged over queries, each with its standard error
            (density95_percent, density95_se_percent). A statistic that a kind does not have is NaN.
        facts: model, weights, dtype, grid (tokens along frames, height, width), heads, layers, queries_per_frame, text_keys,
            prompt_tokens by branch, near_window, settings, notes.
        times_ms: times from `attention_times` per component, see `with_times`; empty without them.
    """

    frame: pd.DataFrame
    facts: dict[str, Any]
    times_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, kind: str = SELF, branch: str | None = None) -> pd.DataFrame:
        """Rows of one kind of attention, and of one branch if given."""
        table = self.frame[self.frame["kind"] == kind]
        return table if branch is None else table[table["branch"] == branch]

    def types(self) -> pd.DataFrame:
        """Share of each type among the self-attention heads: component, step, branch, spatial_percent, temporal_percent,
        global_percent."""
        table = self.of()
        where = ["component", "step", "branch"]
        shares = table[where].assign(
            **{f"{name}_percent": 100.0 * (table["type"] == name) for name in HEAD_TYPES}
        )
        means = shares.groupby(where, sort=False).mean()
        return means.reset_index().sort_values(["step", "branch"], ignore_index=True)

    def about(self) -> pd.DataFrame:
        """The facts as a table of names and values."""
        facts = {name: value for name, value in self.facts.items() if name != "settings" and value != []}
        facts |= self.facts.get("settings", {})
        return pd.DataFrame({"fact": list(facts), "value": [_as_text(value) for value in facts.values()]})

    def row(self) -> dict[str, float]:
        """Medians over all heads, steps and branches as a flat record; for the prompt, of the branch that has it."""
        own, text = self.of(SELF), self.of(CROSS, "cond")
        names = ("entropy_nats", "own_frame_percent", "first_frame_percent", "same_position_percent")
        record = {_median(name): float(own[name].median()) for name in names}
        return record | {"prompt_median_percent": float(text["prompt_percent"].median())}

    @property
    def caveat(self) -> str:
        """A warning about the weights as a sentence; empty if there is none."""
        random = self.facts.get("weights") == "random"
        return "With random weights only the times mean something." if random else ""

    def summary(self, kind: str = SELF) -> pd.DataFrame:
        """Medians over layers, heads and steps: statistic, one column per expert and branch, uniform (value for equal
        attention to all keys; for a prompt in the branch "cond"), se (median standard error of one head)."""
        table = self.of(kind)
        names = [name for name in statistic_names(kind) if table[name].notna().any()]
        grouped = table.groupby(["component", "branch"], sort=False)[names].median()
        medians = grouped.T.set_axis(
            [" ".join(where).removeprefix("expert_") for where in grouped.index], axis=1
        )
        even = self.uniform(kind)
        medians["uniform"] = [even.get(name) for name in names]
        medians["se"] = [table[error_name(name)].median() for name in names]
        return medians.rename_axis("statistic").reset_index()

    def uniform(self, kind: str = SELF) -> dict[str, float]:
        """Every statistic for equal attention to all keys, averaged over all tokens."""
        grid, text = self.facts["grid"], self.facts.get("text_keys", 1)
        keys = math.prod(grid) if kind == SELF else text
        blocks = math.ceil(keys / BLOCK_KEYS)
        prompt = 100 * self.facts["prompt_tokens"].get("cond", math.nan) / text
        near = [_covered(n, size) for n, size in zip(grid[1:], self.facts["near_window"], strict=True)]
        return {
            "entropy_nats": math.log(keys),
            **{
                f"density{level}_percent": 100 * math.ceil(level * keys / 100) / keys
                for level in LEVELS_PERCENT
            },
            "block_density95_percent": 100 * math.ceil(0.95 * keys / BLOCK_KEYS) / blocks,
            "own_frame_percent": 100 / grid[0],
            "other_frames_percent": 100 - 100 / grid[0],
            "first_frame_percent": 100 / grid[0],
            "same_position_percent": 100 * (grid[0] - 1) / math.prod(grid),
            "near_position_percent": 100 * math.prod(near),
            "prompt_percent": prompt,
            "padding_percent": 100 - prompt,
        }

    def with_times(self, times: pd.DataFrame) -> AttentionMap:
        """The same map with the times of `attention_times`, per component: forwards of a generation, forward_ms and its
        parts self_ms and cross_ms, medians of one forward."""
        whole = times[times["kind"] == FORWARD].groupby("component", sort=False).size()
        repeats = times["repeat"].nunique()
        times_ms: dict[str, dict[str, float]] = {
            str(name): {"forwards": n / repeats} for name, n in whole.items()
        }
        one = ["repeat", "component", "step", "branch", "kind"]
        per_forward = times.groupby(one, sort=False)["time_ms"].sum().reset_index()
        for (component, kind), values in per_forward.groupby(["component", "kind"], sort=False)["time_ms"]:
            times_ms[str(component)][f"{kind}_ms"] = float(values.median())
        return replace(self, times_ms=times_ms)

    def save(self, path: str | os.PathLike) -> Path:
        """Write a `.csv.gz` file: one line of JSON with the facts, then the table, rounded to five digits (errors to two).

        Raises:
            WanlabError: another suffix.
        """
        path = Path(path)
        if not path.name.endswith(".csv.gz"):
            raise WanlabError(f"{path.name}: an attention map is kept as .csv.gz; give that ending")
        table = self.frame.copy()
        for name in table.columns.difference([*PLACE, "type"]):
            digits = 2 if "_se_" in name else 5
            table[name] = [float(f"{value:.{digits}g}") for value in table[name]]
        head = json.dumps({"format": _MAGIC, "facts": self.facts, "times_ms": self.times_ms})
        # Without a time stamp, so that the same map gives the same file.
        with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as file:
            file.write(f"{head}\n{table.to_csv(index=False)}".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttentionMap:
        """Read a file written by `save`.

        Raises:
            WanlabError: the file is missing or is not an attention map.
        """
        path = locate(path)
        try:
            line, _, rest = read_unpacked(path).partition(b"\n")
            head = json.loads(line)
            table = pd.read_csv(io.BytesIO(rest))
            table["type"] = table["type"].fillna("")
            known = head["format"] == _MAGIC and set(PLACE) <= set(table.columns)
            known = known and isinstance(head["facts"], dict) and isinstance(head["times_ms"], dict)
        except (WanlabError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WanlabError(
                f"{path} holds no attention map ({first_line(error)}); write one with AttentionMap.save"
            ) from error
        if not known:
            raise WanlabError(
                f"{path} holds no attention map of this version; write one with AttentionMap.save"
            )
        return cls(table, head["facts"], head["times_ms"])


def _median(name: str) -> str:
    stem, _, unit = name.rpartition("_")
    return f"{stem}_median_{unit}"


def _covered(length: int, size: int) -> float:
    """Share of an axis that a window of odd size covers, clipped at the ends; mean over the axis."""
    reach = size // 2
    return sum(min(n + reach, length - 1) - max(n - reach, 0) + 1 for n in range(length)) / length**2


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {n:.4g}" if isinstance(n, float) else f"{name} {n}" for name, n in value.items()
        )
    if isinstance(value, list):
        return "; ".join(value) if value and isinstance(value[0], str) else " x ".join(map(str, value))
    return str(value)


TYPE_PERCENT = 50.0
"""Mass that the mask of a type must contain; with less in both masks a head is global."""


def attention_map(
    model: Model,
    image: Any,
    prompt: str,
    *,
    queries: int = 16,
    at_steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    branches: Sequence[str] | None = None,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
    progress: bool = True,
    **settings,
) -> AttentionMap:
    """Generate once and compute statistics of the attention of every head.

    Query and key are those of the kernel. A sample of queries, the same for all heads, attends in float32 to all
    keys; the kernel then runs unchanged, so the generation does not change. It is stopped after the last requested step.

    A head is spatial when its own frame contains at least half of its mass, and temporal when a window around its
    position, over all frames and with the same number of keys, does; of both the larger decides, and with neither a head is
    global. These are the two kinds of Sparse VideoGen (Xi et al. 2025, arXiv:2502.01776), which selects between two masks
    of equal size by the error of the output on sampled queries; here the mass in each mask decides, and neither is possible.

    Args:
        model: from `wanlab.models.load`, a Wan transformer, eager.
        image, prompt, settings: arguments of `Model.generate`; the decoder does not run.
        queries: number of sampled queries per latent frame.
        at_steps: denoising steps to record, from 0; all if None.
        layers: blocks to record, from 0; all if None.
        branches: "cond", "uncond"; both if None.
        seed: seed of the initial noise and of the sample.
        most_bytes: approximate limit of extra memory on the device.
        progress: show a bar over the layers.

    Raises:
        WanlabError: as for `attention_calls` and `Model.generate`, a step or layer that does not exist, or no queries.
    """
    blocks = wan_blocks(model)
    defaults = model.spec.defaults
    settings = settings | {"output": "latent", "seed": seed}
    size = [settings.get(n) or getattr(defaults, n) for n in ("height", "width", "frames")]
    shape = latent_shape(model.spec, *size)
    of_frames, of_rows, of_columns = model.spec.patch
    grid = (shape.frames // of_frames, shape.height // of_rows, shape.width // of_columns)
    if not isinstance(queries, int) or queries < 1:
        raise WanlabError(f"queries is {queries!r}; take at least 1 from every latent frame")
    total = len(model.schedule(settings.get("steps")))
    wanted_steps = _chosen("at_steps", at_steps, total)
    wanted_layers = _chosen("layers", layers, min(len(parts) for parts in blocks.values()), layers is None)
    sampled = sample_queries(grid, queries, seed)
    rows: list[dict[str, Any]] = []
    prompt_tokens: dict[str, int] = {}
    facts: dict[str, Any] = {}
    scale = settings.get("guidance_scale")
    both = 2 if (defaults.guidance_scale if scale is None else scale) > 1 else 1
    both = both if branches is None else min(both, len(branches))
    deepest = max(len(parts) for parts in blocks.values())
    calls = len(wanted_steps) * both * len(wanted_layers or range(deepest))
    tick, close = _bar(calls, progress)

    def look(call: AttentionCall, run: Callable, query: Any = None, key: Any = None) -> Any:
        requested = call.step in wanted_steps and (branches is None or call.branch in branches)
        if call.kind == FORWARD:
            if requested and call.branch not in prompt_tokens and call.text is not None:
                prompt_tokens[call.branch] = call.prompt_tokens()
            return run()
        if requested and (wanted_layers is None or call.layer in wanted_layers):
            rows.append(_rows(call, query, key, grid, sampled, prompt_tokens, most_bytes))
            if call.kind == SELF:
                facts["heads"] = query.shape[2]
                tick()
            elif call.kind == CROSS:
                facts["text_keys"] = key.shape[1]
        return run()

    def enough(step: int) -> None:
        if step >= max(wanted_steps):
            raise _Enough

    try:
        with torch.no_grad(), attention_calls(model, look, after_step=enough):
            model.generate(image, prompt, **settings)
    except _Enough:
        pass
    finally:
        close()
    known = {
        "model": model.spec.name,
        "weights": model.load.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "grid": list(grid),
        "layers": deepest,
        **facts,
        "prompt_tokens": prompt_tokens,
        "queries_per_frame": sampled.shape[1],
        "near_window": list(near_window(grid)),
        "settings": {
            **dict(zip(("height", "width", "frames"), size, strict=True)),
            "steps": total,
            "guidance_scale": defaults.guidance_scale if scale is None else scale,
            "seed": seed,
        },
        "notes": list(model.notes),
    }
    return AttentionMap(_table(rows, model, grid), known)


class _Enough(Exception):
    """All requested steps were recorded."""


def _rows(call, query, key, grid, sampled, prompt_tokens, most_bytes) -> dict[str, Any]:
    """Columns of one call: scalars for its position, arrays over the heads."""
    q, k = query[0], key[0]  # one video is generated at a time
    if q.shape[0] != grid[0] * grid[1] * grid[2]:
        raise WanlabError(
            f"{call.component} attends from {q.shape[0]} tokens, not {grid[0]} frames of {grid[1]}x{grid[2]};"
            " its token order is not known, take a Wan image-to-video or text-to-video model"
        )
    if call.kind == SELF:
        statistics = self_statistics(q, k, grid, sampled, scale=call.scale, most_bytes=most_bytes)
    else:
        tokens = prompt_tokens.get(call.branch) if call.kind == CROSS else None
        statistics = cross_statistics(q, k, tokens, sampled, scale=call.scale, most_bytes=most_bytes)
    columns: dict[str, Any] = {name: getattr(call, name) for name in PLACE[:-1]}
    columns["head"] = range(q.shape[1])
    for name, values in statistics.items():
        mean, error = summarise(values, grid[1] * grid[2])
        columns[name], columns[error_name(name)] = mean.cpu().numpy(), error.cpu().numpy()
    return columns


def _table(rows: list[dict[str, Any]], model: Model, grid: tuple[int, ...]) -> pd.DataFrame:
    if not rows:
        raise WanlabError(
            f"{model.spec.name}: no attention was seen at these steps, layers and branches; ask for others"
        )
    table = pd.concat([pd.DataFrame(columns) for columns in rows], ignore_index=True)
    for name in dict.fromkeys((*statistic_names(SELF), *statistic_names(CROSS))):
        for column in (name, error_name(name)):
            if column not in table:
                table[column] = np.nan
    spatial, temporal = table["own_frame_percent"], table["near_position_percent"]
    kind = np.where(temporal > spatial, "temporal", "spatial")
    kind = np.where(np.fmax(spatial, temporal) >= TYPE_PERCENT, kind, "global")
    # With a single frame no head is temporal.
    kind = np.where(grid[0] > 1, kind, "global")
    table.insert(len(PLACE), "type", np.where(table["kind"] == SELF, kind, ""))
    return table


def _chosen(name: str, asked: Sequence[int] | None, count: int, everything: bool = False) -> set[int] | None:
    """The requested numbers, all below `count`; without a request all of them, or None if `everything`."""
    if asked is None:
        return None if everything else set(range(count))
    wrong = [n for n in asked if not hasattr(n, "__index__") or isinstance(n, bool) or not 0 <= n < count]
    if wrong or not len(asked):
        shown = repr(wrong[0]) if wrong else "empty"
        raise WanlabError(f"{name} has {shown}; give whole numbers from 0 to {count - 1}")
    return {int(n) for n in asked}


def _bar(total: int, progress: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    if not progress:
        return (lambda: None), (lambda: None)
    bar = tqdm(total=total, desc="attention", unit="layer", leave=False)
    return bar.update, bar.close
