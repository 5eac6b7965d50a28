"""Time of attention, and an upper bound of the speed-up from skipping keys that hold little of its mass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from wanlab.core.answer import Answer, answer, step
from wanlab.core.errors import WanlabError
from wanlab.core.words import listed
from wanlab.diagnose.attention.backends import AttentionKernels
from wanlab.diagnose.attention.calls import FORWARD, SELF, AttentionCall, attention_calls
from wanlab.diagnose.attention.maps import AttentionMap
from wanlab.diagnose.attention.statistics import BLOCK_KEYS
from wanlab.measure.load import metered
from wanlab.models.device import synchronise
from wanlab.models.pipeline import Model
from wanlab.models.schedule import fewest_steps, precompute_schedule


def attention_times(
    model: Model, image: Any, prompt: str, *, repeats: int = 1, warmup: bool = True, **settings
) -> pd.DataFrame:
    """Time every attention call of generations that run without statistics; every sample is kept.

    Only the kernel is timed, not the projections, norms and rotary embedding before it: between CUDA events on a GPU, which
    includes waiting for the host, by a monotonic clock elsewhere. A dense kernel does the same work for every
    head, so the time of a head is its share of the kernel's and is not measured separately.

    Args:
        model: from `wanlab.models.load`, eager.
        image, prompt, settings: arguments of `Model.generate`; the decoder does not run.
        repeats: number of timed generations.
        warmup: generate once before, with the smallest number of steps that runs every expert.

    Returns:
        DataFrame: repeat, component, step, branch, layer, kind, time_ms, head_ms (time over heads); kind "forward" is the
        whole expert and has no layer. A call for both branches of guidance has the branch "both". Joint attention of video
        and text is one kernel: its kind is "self", and a further column, joint, is true.

    Raises:
        WanlabError: as for `attention_calls` and `Model.generate`, or repeats under 1.
    """
    if repeats < 1:
        raise WanlabError(f"repeats is {repeats}; time at least 1 generation")
    settings = settings | {"output": "latent"}
    if warmup:
        plan = precompute_schedule(model, settings.get("steps"))
        model.generate(image, prompt, **settings | {"steps": fewest_steps(model, plan)})
    mark, elapsed_ms = _clock(model.device)
    samples: list[tuple[int, AttentionCall, int, Any, Any]] = []
    repeat = 0

    def timed(call: AttentionCall, run: Callable, query: Any = None, key: Any = None) -> Any:
        begin = mark()
        result = run()
        end = mark()
        heads = 0 if query is None else query.shape[2]
        samples.append((repeat, call.without_tensors(), heads, begin, end))
        return result

    with metered(model.device), attention_calls(model, timed):
        for repeat in range(repeats):  # noqa: B007 - read by `timed`
            model.generate(image, prompt, **settings)
    synchronise(model.device)
    joint = any(call.joint for _, call, *_ in samples)
    frame = pd.DataFrame(
        {
            "repeat": number,
            "component": call.component,
            "step": call.step,
            "branch": call.branch,
            "layer": call.layer,
            "kind": call.kind,
            "time_ms": (took := elapsed_ms(begin, end)),
            "head_ms": took / heads if heads else None,
        }
        | ({"joint": call.joint} if joint else {})
        for number, call, heads, begin, end in samples
    )
    order = ["repeat", "step", "branch", "component"]
    return frame.astype({"layer": "Int64", "head_ms": float}).sort_values(
        order, kind="stable", ignore_index=True
    )


def layer_times(times: pd.DataFrame) -> pd.DataFrame:
    """Median of each layer over steps, branches and repeats: component, kind, layer, calls, median_ms, min_ms, max_ms,
    head_ms (median over heads); joint too where `times` has it. Kernels that one call of a layer launches are added up."""
    own = ["component", "kind", "layer", *(["joint"] if "joint" in times else [])]
    parts = times[times["kind"] != FORWARD]
    parts = parts.groupby([*own, "repeat", "step", "branch"], sort=False)[["time_ms", "head_ms"]].sum()
    grouped = parts.groupby(level=own, sort=False)
    frame = grouped["time_ms"].agg(calls="size", median_ms="median", min_ms="min", max_ms="max")
    return frame.assign(head_ms=grouped["head_ms"].median()).reset_index()


LOOKS = {
    "spatial": "mostly at their own frame",
    "temporal": "at one place through time",
    "global": "all over the video",
}
"""Type of a head -> what such heads look at."""
NORMAL_95 = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True, eq=False)
class Skippable:
    """Heads for which a sparse kernel could skip keys.

    Attributes:
        table: self-attention heads, most skippable first: component, layer, head, type, stable_percent (share of steps and
            branches with that type), density_percent (share of keys that holds the mass, mean over steps and branches),
            density_max_percent (the largest of them), block_density_percent (in blocks of neighbouring keys),
            skippable_percent (100 - density_percent).
        level_percent: share of the mass that is kept.
        shares: per component: forward_ms, attention_ms (self-attention kernels of one forward), attention_share_percent,
            skippable_percent (of all pairs of query and key), bound_ratio and block_bound_ratio. Empty without times.
        attention_share_percent: share of self-attention kernels in the time of all forwards; None without times.
        bound_ratio: denoising time over the time that remains if skipped keys cost nothing (Amdahl): an upper
            bound, as it selects keys for every query separately and counts no time for the selection; None without times.
        block_bound_ratio: the same for whole blocks of neighbouring keys, as real kernels skip them.
    """

    table: pd.DataFrame
    level_percent: int
    shares: pd.DataFrame
    attention_share_percent: float | None
    bound_ratio: float | None
    block_bound_ratio: float | None

    def row(self) -> dict[str, float | None]:
        """The result as a flat record, with the median density over heads and the shares of the types."""
        types = 100 * self.table["type"].value_counts(normalize=True)
        return {
            "attention_share_percent": self.attention_share_percent,
            f"density{self.level_percent}_median_percent": float(self.table["density_percent"].median()),
            "skippable_percent": float(self.table["skippable_percent"].mean()),
            "block_skippable_percent": 100 - float(self.table["block_density_percent"].mean()),
            "bound_ratio": self.bound_ratio,
            "block_bound_ratio": self.block_bound_ratio,
            **{f"{name}_percent": float(types.get(name, 0.0)) for name in ("spatial", "temporal", "global")},
        }

    @property
    def _looks(self) -> str:
        """What the heads look at, as a sentence: the share of each type that there is, the largest first."""
        shares = {name: self.row()[f"{name}_percent"] or 0.0 for name in LOOKS}
        parts = sorted((name for name in LOOKS if shares[name] >= 0.5), key=lambda name: -shares[name])
        if len(parts) == 1:
            return f"All heads look {LOOKS[parts[0]]}."
        said = [
            f"{shares[name]:.0f} %{'' if at else ' of the heads look'} {LOOKS[name]}"
            for at, name in enumerate(parts)
        ]
        return f"{listed(said)}."

    def answer(
        self, heads: AttentionMap, kernels: AttentionKernels | None = None, caveat: str = ""
    ) -> Answer:
        """How few keys the heads need, and the most that a kernel which skips the others can gain.

        Args:
            heads: the map that was ranked. kernels: kernels that were timed for the dense work, if any.
            caveat: sentence about a profile that is shown beside the map.
        """
        share = self.row()
        half = share[f"density{self.level_percent}_median_percent"]
        known = f"± {NORMAL_95 * heads.error_percent(self.level_percent):.1f} % (95 % interval)"
        first = float(heads.of()["first_frame_percent"].median())
        even = heads.uniform()["first_frame_percent"]
        more = [
            (f"keys for {self.level_percent} %", f"≤ {half:.0f} %", f"in half of the heads, {known}"),
            ("look all over the video", f"{share['global_percent']:.0f} %", "of the heads"),
            ("on the first frame", f"{first:.0f} %", f"of the attention; even would be {even:.0f} %"),
        ]
        tiles = more
        head = f"{self._looks} What skipping keys gains is not known: nothing was timed."
        following = step("times attention, so that the gain is known", "13_attention")
        if self.bound_ratio is not None and self.block_bound_ratio is not None:
            part = f"{self.attention_share_percent:.0f} %"
            head = (
                f"{self._looks} Self-attention is {part} of the denoising time: skipping keys makes denoising at most"
                f" {self.bound_ratio:.2f} times as fast."
            )
            if heads.caveat:
                only = "The weights are random, so only times mean something"
                head = f"{only}: self-attention is {part} of the denoising time."
            blocks = f"in blocks of {BLOCK_KEYS} keys ≤ {self.block_bound_ratio:.2f}×"
            own = ("self-attention", part, "of the denoising time")
            tiles = [own, ("gain of skipping", f"≤ {self.bound_ratio:.2f}×", blocks), *more]
            following = step("ranks skipping keys beside every other change", "15_triage")
        return answer(
            head,
            f"{caveat}{heads.caveat}",
            f"Measured with {heads.facts['model']} on {heads.facts['queries_per_frame']} queries of each latent frame."
            " The bound assumes that choosing the keys costs nothing. What skipping does to the video is not measured.",
            "" if kernels is None else kernels.sentence,
            next=following,
            tiles=tuple(tiles),
        )


def skippable(attention: AttentionMap, times: pd.DataFrame | None = None) -> Skippable:
    """Rank heads by the keys that they do not need for 95 % of their mass, and bound the speed-up from skipping these.

    With a share s of the time in self-attention kernels and a density d (mean over heads, which all take the same time) the
    denoising is at most 1 / (1 - s (1 - d)) times as fast (Amdahl 1967, doi:10.1145/1465482.1465560). Experts are weighted
    by their share of the denoising time. Of joint attention only pairs of two tokens of the video are skipped, and all pairs
    with text are computed.

    Args:
        attention: map from `attention_map`.
        times: table from `attention_times`; by default the times that were saved with the map.

    Raises:
        WanlabError: the map has no self-attention.
    """
    rows = attention.of(SELF)
    if rows.empty:
        raise WanlabError("the map has no self-attention rows; make one with attention_map")
    level = 95
    head = ["component", "layer", "head"]
    grouped = rows.groupby(head, sort=False)
    table = grouped[f"density{level}_percent"].agg(density_percent="mean", density_max_percent="max")
    table["block_density_percent"] = grouped[f"block_density{level}_percent"].mean()
    counts = rows.pivot_table("step", head, "type", aggfunc="size", fill_value=0, sort=False)
    table.insert(0, "type", counts.idxmax(axis=1))
    table.insert(1, "stable_percent", 100 * counts.max(axis=1) / counts.sum(axis=1))
    table["skippable_percent"] = 100 - table["density_percent"]
    table = table.reset_index().sort_values("density_percent", kind="stable", ignore_index=True)
    times_ms = (attention if times is None else attention.with_times(times)).times_ms
    pairs = attention.skippable_pairs
    lines = []
    for component in rows["component"].unique():
        own = table[table["component"] == component]
        took = times_ms.get(str(component))
        if took is None:
            continue
        share = took["self_ms"] / took["forward_ms"]
        dense, blocks = (
            1 - pairs * (1 - own[name].mean() / 100) if pairs < 1 else own[name].mean() / 100
            for name in ("density_percent", "block_density_percent")
        )
        lines.append(
            {
                "component": component,
                "forwards": took["forwards"],
                "forward_ms": took["forward_ms"],
                "attention_ms": took["self_ms"],
                "attention_share_percent": 100 * share,
                "skippable_percent": 100 * (1 - dense),
                "bound_ratio": 1 / (1 - share * (1 - dense)),
                "block_bound_ratio": 1 / (1 - share * (1 - blocks)),
            }
        )
    shares = pd.DataFrame(lines)
    if shares.empty:
        return Skippable(table, level, shares, None, None, None)
    whole = shares["forwards"] * shares["forward_ms"]
    return Skippable(
        table,
        level,
        shares,
        float(100 * (shares["forwards"] * shares["attention_ms"]).sum() / whole.sum()),
        *(float(whole.sum() / (whole / shares[name]).sum()) for name in ("bound_ratio", "block_bound_ratio")),
    )


def _clock(device: Any) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Two functions: one marks a moment, the other gives the milliseconds between two marks."""
    if torch.device(device).type != "cuda":
        return time.perf_counter, lambda begin, end: (end - begin) * 1e3

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark, lambda begin, end: begin.elapsed_time(end)
