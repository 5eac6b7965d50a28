"""Attention maps: statistics of what every head of every layer attends to, by step, expert and guidance branch."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.packed import read_unpacked
from wanlab.core.paths import locate
from wanlab.diagnose.attention.calls import (
    BATCH,
    CROSS,
    FORWARD,
    SELF,
    AttentionCall,
    attended_blocks,
    attention_calls,
    attention_outside,
)
from wanlab.diagnose.attention.statistics import (
    BLOCK_KEYS,
    LEVELS_PERCENT,
    MOST_BYTES,
    REACHES_FRAMES,
    TEXT_PERCENT,
    cross_statistics,
    error_name,
    near_window,
    sample_queries,
    self_statistics,
    statistic_names,
    summarise,
    within_name,
)
from wanlab.models.blocks import Block
from wanlab.models.families.base import EMBEDDED
from wanlab.models.pipeline import Model
from wanlab.models.shapes import latent_shape

PLACE = ("component", "step", "branch", "kind", "layer", "head")
HEAD_TYPES = ("spatial", "temporal", "global")
_MAGIC = "wanlab attention map 1"


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Statistics of attention heads.

    Attributes:
        frame: one row per component, step, branch, kind ("self", "cross"), layer and head: type of the head and the
            statistics of `self_statistics` and `cross_statistics`, averaged over queries, each with its standard error
            (density95_percent, density95_se_percent). A statistic that a kind does not have is NaN. Of joint attention the
            queries are those of the video; "self" are its keys of the video, "cross" those of the text, each as if it had a
            softmax of its own, and text_percent is the part of the whole mass that lies on the text.
        facts: model, weights, dtype, grid (tokens along frames, height, width), heads, layers, queries_per_frame, attention
            (kinds of it), blocks (lists of the layers, in order), text_keys (of the branch "cond", without those that a mask
            leaves out), joint_text_tokens (text in the kernel of joint attention), prompt_tokens by branch, near_window,
            settings, notes.
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
        if TEXT_PERCENT in own:
            record[_median(TEXT_PERCENT)] = float(own[TEXT_PERCENT].median())
        return record | {"prompt_median_percent": float(text["prompt_percent"].median())}

    def error_percent(self, level: int = 95) -> float:
        """Standard error, from the sample of queries, of the share of keys that one head needs: the median over heads."""
        return float(self.of(SELF)[error_name(f"density{level}_percent")].median())

    @property
    def caveat(self) -> str:
        """A warning about the weights as a sentence; empty if there is none."""
        random = self.facts.get("weights") == "random"
        return "With random weights only the times mean something." if random else ""

    @property
    def skippable_pairs(self) -> float:
        """Share of the pairs of query and key of which both belong to the video; 1 but for joint attention."""
        text = self.facts.get("joint_text_tokens", 0)
        video = math.prod(self.facts["grid"]) if text else 1
        return (video / (video + text)) ** 2

    def summary(self, kind: str = SELF) -> pd.DataFrame:
        """Medians over layers, heads and steps: statistic, one column per expert and branch, uniform (value for equal
        attention to all keys; for a prompt in the branch "cond"), se (median standard error of one head)."""
        table = self.of(kind)
        names = [name for name in statistic_names(kind) if name in table and table[name].notna().any()]
        grouped = table.groupby(["component", "branch"], sort=False)[names].median()
        # The branch with the prompt first, whatever the order of the calls.
        experts = list(table["component"].unique())
        order = sorted(
            grouped.index, key=lambda where: (experts.index(where[0]), where[1] in BATCH[:1], where[1])
        )
        grouped = grouped.loc[order]
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
            **{within_name(n): 100 * _covered(grid[0], 2 * n + 1) for n in REACHES_FRAMES},
            "prompt_percent": prompt,
            "padding_percent": 100 - prompt,
            TEXT_PERCENT: 100 * text / (math.prod(grid) + text),
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
        model: from `wanlab.models.load`, eager.
        image, prompt, settings: arguments of `Model.generate`; the decoder does not run.
        queries: number of sampled queries per latent frame.
        at_steps: denoising steps to record, from 0; all if None.
        layers: blocks to record, from 0; all if None.
        branches: "cond", "uncond"; both if None.
        seed: seed of the initial noise and of the sample.
        most_bytes: approximate limit of extra memory on the device.
        progress: show a bar over the layers.

    Raises:
        WanlabError: as for `attention_calls` and `Model.generate`, a step or layer that does not exist, no queries, an
            attention that is masked differently for each query, or tokens that are not whole frames of the video.
    """
    blocks = attended_blocks(model)
    defaults = model.spec.defaults
    settings = settings | {"output": "latent", "seed": seed}
    size = [settings.get(n) or getattr(defaults, n) for n in ("height", "width", "frames")]
    if not isinstance(queries, int) or queries < 1:
        raise WanlabError(f"queries is {queries!r}; take at least 1 from every latent frame")
    total = len(model.schedule(settings.get("steps")))
    wanted_steps = _chosen("at_steps", at_steps, total)
    wanted_layers = _chosen("layers", layers, min(len(parts) for parts in blocks.values()), layers is None)
    scale = settings.get("guidance_scale")
    guided = (defaults.guidance_scale if scale is None else scale) > 1 and model.family.guidance != EMBEDDED
    both = 2 if guided else 1
    both = both if branches is None else min(both, len(branches))
    deepest = max(len(parts) for parts in blocks.values())
    calls = len(wanted_steps) * both * len(wanted_layers or range(deepest))
    tick, close = _bar(calls, progress)
    recording = _Recording(model, size, queries, seed, branches, most_bytes, tick)
    texts = {"cond": prompt, "uncond": settings.get("negative_prompt") or ""}

    def look(call: AttentionCall, run: Callable, query: Any = None, key: Any = None) -> Any:
        if call.step in wanted_steps:
            if call.kind == FORWARD:
                recording.text(call, texts)
            elif wanted_layers is None or call.layer in wanted_layers:
                recording.add(call, query, key)
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
    table = recording.table()
    known = {
        "model": model.spec.name,
        "weights": model.load.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "grid": list(recording.grid),
        "layers": deepest,
        **recording.facts(),
        "blocks": _lists(next(iter(blocks.values()))),
        "prompt_tokens": recording.prompt_tokens,
        "queries_per_frame": recording.sampled.shape[1],
        "near_window": list(near_window(recording.grid)),
        "settings": {
            **dict(zip(("height", "width", "frames"), size, strict=True)),
            "steps": total,
            "guidance_scale": defaults.guidance_scale if scale is None else scale,
            "seed": seed,
        },
        "notes": [*model.notes, *recording.notes()],
    }
    return AttentionMap(table, known)


class _Enough(Exception):
    """All requested steps were recorded."""


class _Recording:
    """Statistics of the calls of one generation, and what they tell about the model."""

    def __init__(
        self,
        model: Model,
        size: Sequence[int],
        queries: int,
        seed: int,
        branches: Sequence[str] | None,
        most_bytes: int,
        tick: Callable[[], Any],
    ) -> None:
        latent, (of_frames, of_rows, of_columns) = latent_shape(model.spec, *size), model.spec.patch
        self.model, self.branches, self.most_bytes, self.tick = model, branches, most_bytes, tick
        self.expected = -(-latent.frames // of_frames)
        self.picture = (latent.height // of_rows, latent.width // of_columns)
        self.grid = (self.expected, *self.picture)
        self.queries, self.seed = queries, seed
        self.sampled = sample_queries(self.grid, queries, seed)
        self.rows: list[dict[str, Any]] = []
        self.prompt_tokens: dict[str, int] = {}
        self.kinds: dict[str, None] = {}
        self.text_keys: dict[str, int] = {}
        self.heads = self.joint_text = 0

    def text(self, call: AttentionCall, texts: dict[str, str]) -> None:
        """Notes how many tokens of the text of each branch are no padding, where that can be told."""
        for element, branch in self._elements(call):
            if branch in self.prompt_tokens or call.text is None:
                continue
            count, most = call.prompt_tokens(element), call.text.shape[1]
            tokenizer = getattr(self.model.pipeline, "tokenizer", None)
            if count is None and self.model.family.title and tokenizer is not None and branch in texts:
                # Padding that neither a mask nor zeros mark, as in CogVideoX.
                count = len(
                    tokenizer(texts[branch], truncation=False, padding=False, verbose=False)["input_ids"]
                )
            if count is not None:
                self.prompt_tokens[branch] = min(count, most)

    def add(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> None:
        """Add the statistics of a call, of each branch that is wanted.

        Args:
            query, key: `[B, tokens, heads, dim]`.
        """
        kept = call.kept(*key.shape[:2])
        for element, branch in self._elements(call):
            q, k = query[element], key[element]
            if q.shape[1] != k.shape[1]:  # groups of heads that share their keys
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            left = None if kept is None or kept[element].all() else kept[element]
            if call.kind != SELF:
                self._fit(call, len(q))
                self._cross(call, branch, q, k if left is None else k[left])
                continue
            if len(q) != len(k):
                raise WanlabError(
                    f"{call.path} attends to {len(k)} keys from {len(q)} tokens, which is not understood here; take a model"
                    " that attends to all tokens"
                )
            video, text = _halves(len(q), call.text_tokens, call.text_first)
            if left is not None and not left[video].all():
                raise WanlabError(
                    f"{call.path}: a mask leaves out tokens of the video, which is not understood here; take a model that"
                    " attends to everything"
                )
            texts = k[text] if left is None else k[text][left[text]]
            self._fit(call, video.stop - video.start)
            self._self(call, branch, q[video], k[video], texts)
            if len(texts):
                self._cross(call, branch, q[video], texts)

    def table(self) -> pd.DataFrame:
        """All rows, with the type of each head."""
        return _table(self.rows, self.model, self.grid)

    def facts(self) -> dict[str, Any]:
        """Heads, kinds of attention, and keys of the text, as far as they were seen."""
        facts: dict[str, Any] = {"heads": self.heads} if self.heads else {}
        facts["attention"] = list(self.kinds)
        if self.text_keys:
            facts["text_keys"] = self.text_keys.get("cond", next(iter(self.text_keys.values())))
        return facts | ({"joint_text_tokens": self.joint_text} if self.joint_text else {})

    def notes(self) -> list[str]:
        """What a reader of the map should know about this model."""
        notes = []
        if not self.model.family.title:
            notes.append(
                "a family that wanlab does not know: tokens are taken in the order frame, height, width, and branches in the"
                " order of diffusers' pipelines (the prompt first, or last in a batch of two)"
            )
        if self.text_keys.keys() - self.prompt_tokens.keys():
            notes.append("which tokens of the text are padding could not be told")
        if self.grid[0] != self.expected:
            notes.append(
                f"the expert sees {self.grid[0]} latent frames and the video has {self.expected}: the others hold what it is"
                " given besides, such as the picture in front of the frames of Wan Animate"
            )
        outside = {
            part: None
            for name, network in self.model.components.items()
            if name.startswith("expert")
            for part in attention_outside(network)
        }
        return notes + (
            [f"attention outside the blocks is not in the map: {', '.join(outside)}"] if outside else []
        )

    def _elements(self, call: AttentionCall) -> list[tuple[int, str]]:
        """Place in the batch and branch of what is wanted of a call, the branch with the prompt first."""
        wanted = [
            (element, branch)
            for element, branch in enumerate(call.branches)
            if self.branches is None or branch in self.branches
        ]
        return wanted[::-1] if call.branches == BATCH else wanted

    def _fit(self, call: AttentionCall, tokens: int) -> None:
        """Take the number of frames from the first call: some models put frames of their own to those of the video."""
        height, width = self.picture
        grid = (tokens // (height * width), height, width)
        if math.prod(grid) != tokens or (self.rows and grid != self.grid):
            raise WanlabError(
                f"{call.component} attends from {tokens} tokens of the video, not {self.grid[0]} frames of {height}x{width};"
                " its token order is not known, take a model of a known family (`wanlab models`)"
            )
        if grid != self.grid:
            self.grid = grid
            self.sampled = sample_queries(grid, self.queries, self.seed)

    def _self(self, call: AttentionCall, branch: str, q, k, texts) -> None:
        options: dict[str, Any] = {"scale": call.scale, "most_bytes": self.most_bytes}
        beside = texts if call.joint else None
        self._put(
            call, branch, SELF, q, self_statistics(q, k, self.grid, self.sampled, text=beside, **options)
        )
        self.heads = q.shape[1]
        self.joint_text = max(self.joint_text, call.text_tokens)
        place = "first" if call.text_first else "last"
        self.kinds[
            f"joint attention of video and text, the text {place}" if call.joint else "self-attention"
        ] = None
        self.tick()

    def _cross(self, call: AttentionCall, branch: str, q, k) -> None:
        options: dict[str, Any] = {"scale": call.scale, "most_bytes": self.most_bytes}
        kind, tokens = (CROSS if call.kind == SELF else call.kind), None
        if kind == CROSS:
            tokens = self.prompt_tokens.get(branch)
            self.text_keys[branch] = len(k)
        if call.kind != SELF:
            self.kinds[f"{kind}-attention"] = None
        self._put(call, branch, kind, q, cross_statistics(q, k, tokens, self.sampled, **options))

    def _put(
        self, call: AttentionCall, branch: str, kind: str, q, statistics: dict[str, torch.Tensor]
    ) -> None:
        """Columns of one call: scalars for its position, arrays over the heads."""
        columns: dict[str, Any] = {name: getattr(call, name) for name in PLACE[:-1]}
        columns |= {"branch": branch, "kind": kind, "head": range(q.shape[1])}
        for name, values in statistics.items():
            mean, error = summarise(values, self.grid[1] * self.grid[2])
            columns[name], columns[error_name(name)] = mean.cpu().numpy(), error.cpu().numpy()
        self.rows.append(columns)


def _halves(tokens: int, text: int, text_first: bool) -> tuple[slice, slice]:
    """Where the tokens of the video stand among those of joint attention, and where those of the text do."""
    if text_first:
        return slice(text, tokens), slice(0, text)
    return slice(0, tokens - text), slice(tokens - text, tokens)


def _lists(blocks: Sequence[Block]) -> dict[str, int]:
    """Lists of blocks in the order of their layers, with the number of each."""
    return {
        name: len(list(group)) for name, group in groupby(block.path.partition(".")[0] for block in blocks)
    }


def _table(rows: list[dict[str, Any]], model: Model, grid: tuple[int, ...]) -> pd.DataFrame:
    if not rows:
        raise WanlabError(
            f"{model.spec.name}: no attention was seen at these steps, layers and branches; ask for others"
        )
    table = pd.concat([pd.DataFrame(columns) for columns in rows], ignore_index=True)
    names = dict.fromkeys((*statistic_names(SELF), *statistic_names(CROSS)))
    for name in (name for name in names if name != TEXT_PERCENT):  # which only joint attention has
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
