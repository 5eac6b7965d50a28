"""Sparse attention tried out: time of its kernel against density, and quality of several choices of patterns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from wanlab.core.answer import Answer, answer, fitting, step
from wanlab.core.files import slug
from wanlab.core.words import percent_text
from wanlab.measure.in_turn import InTurn, until_told
from wanlab.models.device import synchronise
from wanlab.models.pipeline import Model
from wanlab.techniques.answers import next_step
from wanlab.techniques.attention.blocks import head_tables
from wanlab.techniques.attention.kernels import heads_first
from wanlab.techniques.attention.sparse import SPARSE, Table, kernel_here
from wanlab.techniques.head_patterns import HeadPatterns
from wanlab.techniques.measured_patterns import Grid, tried_patterns
from wanlab.techniques.sparse_attention import SparseAttention
from wanlab.techniques.trial import Trial, Tried, try_out

DENSE, OF_HEADS = "PyTorch's own, dense", "a pattern for each head"
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.125)

MASKED = "masked"
"""The kernel that computes all scores and masks some."""
MASKS = "no time is saved here, where a mask lies over all scores"


@dataclass(frozen=True, eq=False)
class KernelTimes:
    """One attention at several densities.

    Attributes:
        kernel: see `attention.sparse.SPARSE`.
        timed: times of all in turn, PyTorch's own dense attention first.
        densities: label -> part of the blocks that is computed. first_ms: label -> time of its first call, in which kernels
            are compiled.
        tokens, heads, block: of the attention.
    """

    kernel: str
    timed: InTurn
    densities: Mapping[str, float]
    first_ms: Mapping[str, float]
    tokens: int
    heads: int
    block: int

    @property
    def saves(self) -> bool:
        """Whether the kernel leaves blocks out; else it computes all scores and masks some."""
        return self.kernel != MASKED

    @property
    def noise_percent(self) -> float:
        """A/A noise of the dense attention."""
        return self.timed.controls[DENSE].noise_percent

    def frame(self) -> pd.DataFrame:
        """One row per attention: attention, density_percent, time_ms, first_call_ms, speedup (over PyTorch's own) with low
        and high, verdict, and of the kernel at all blocks: of_all_blocks_percent, its time as a part of that."""
        everything = next(label for label in self.densities if label not in (DENSE, OF_HEADS))
        whole = self.timed.samples[everything].median
        rows = []
        for label, density in self.densities.items():
            time_ms = self.timed.samples[label].median
            row: dict[str, Any] = {
                "attention": label,
                "density_percent": 100 * density,
                "time_ms": time_ms,
                "first_call_ms": self.first_ms[label],
            }
            gain = self.timed.comparisons.get(label)
            if gain is None:
                row |= {"verdict": "baseline"}
            else:
                row |= {"speedup": gain.speedup, "low": gain.low, "high": gain.high, "verdict": gain.verdict}
            if label != DENSE:
                row["of_all_blocks_percent"] = 100 * time_ms / whole
            rows.append(row)
        columns = [
            "attention",
            "density_percent",
            "time_ms",
            "first_call_ms",
            "of_all_blocks_percent",
            "speedup",
        ]
        return pd.DataFrame(rows, columns=[*columns, "low", "high", "verdict"])

    @property
    def saved_share(self) -> float:
        """Part of what is left out by which the time falls, at the lowest density: 1 is proportional."""
        rows = self.frame()
        rows = rows[~rows["attention"].isin([DENSE, OF_HEADS])]
        least = rows.loc[rows["density_percent"].idxmin()]
        return float((100 - least["of_all_blocks_percent"]) / (100 - least["density_percent"]))

    def sentence(self) -> str:
        """Whether the time falls with the density."""
        if not self.saves:
            return (
                "The kernel of this machine computes all scores and masks those of blocks that are left out, so that no time"
                " is saved: the quality holds anywhere, but the time needs a kernel for blocks on a GPU."
            )
        rows = self.frame()
        rows = rows[~rows["attention"].isin([DENSE, OF_HEADS])]
        least = rows.loc[rows["density_percent"].idxmin()]
        how = "nearly in proportion" if self.saved_share > NEAR else "by less than in proportion"
        return (
            f"The time of the kernel falls {how}: at {least['density_percent']:.3g} % of the blocks it takes"
            f" {least['of_all_blocks_percent']:.3g} % of its time for all of them (noise {self.noise_percent:.2g} %)."
        )


NEAR = 0.9
"""Part of what is left out by which the time falls, from which it falls nearly in proportion."""


def time_by_density(
    model: Model,
    grid: Grid,
    *,
    block: int = 128,
    densities: Sequence[float] = DENSITIES,
    patterns: HeadPatterns | None = None,
    kernel: str | None = None,
    rounds: int = 15,
    seed: int = 0,
    progress: bool = True,
) -> KernelTimes:
    """Time one self-attention of a model at several densities, on random numbers, in turn with PyTorch's own dense one.

    Args:
        model: for its heads, device and dtype. grid: tokens of the video, (frames, height, width). block: tokens of a block.
        densities: parts of the blocks; of each the pattern that is next to it, and always all blocks.
        patterns: of heads, of which the first block's are timed too.
        kernel: see `attention.sparse.SPARSE`; the fastest that runs here if None.
        rounds: rounds of timing; each makes two calls of every attention.
        seed: of the random numbers.
    """
    part = next(part for part in model.spec.parts if part.name.startswith("transformer"))
    heads, size = part.config["num_attention_heads"], part.config["attention_head_dim"]
    name = kernel or kernel_here(model.device, block, model.dtype, size)
    tokens = grid[0] * grid[1] * grid[2]
    draw = torch.Generator(model.device).manual_seed(seed)
    shape = (1, tokens, heads, size)
    query, key, value = (
        torch.randn(shape, generator=draw, device=model.device, dtype=model.dtype) for _ in range(3)
    )
    tried = [table for _, table in tried_patterns(grid, block)]
    nearest = [min(tried, key=lambda table: abs(table.density - wanted)) for wanted in densities]
    chosen: dict[str, Table] = {
        f"{percent_text(100 * table.density)} of the blocks": table
        for table in dict.fromkeys([tried[-1], *sorted(nearest, key=lambda table: -table.density)])
    }
    if patterns is not None:
        chosen[OF_HEADS] = head_tables(patterns)[patterns.heads[0].component, patterns.heads[0].block]
    dense, run = heads_first(F.scaled_dot_product_attention), SPARSE[name]
    calls: dict[str, Callable[[], torch.Tensor]] = {DENSE: partial(dense, query, key, value)}
    calls |= {label: partial(run, query, key, value, table) for label, table in chosen.items()}
    first_ms = {}
    with torch.no_grad():
        for label, call in calls.items():
            synchronise(model.device)
            begun = time.perf_counter()
            call()
            synchronise(model.device)
            first_ms[label] = 1e3 * (time.perf_counter() - begun)
        timed = until_told(
            calls,
            warmup=2,
            rounds=rounds,
            precision=None,
            device=model.device,
            progress=progress,
        )
    parts = {DENSE: 1.0} | {label: table.density for label, table in chosen.items()}
    return KernelTimes(name, timed, parts, first_ms, tokens, heads, block)


@dataclass(frozen=True, eq=False)
class SparseTrial:
    """Choices of patterns beside the original.

    Attributes:
        trial: all variants. patterns: label -> the patterns of its heads; None where all heads have the same.
        files: label -> the file of its patterns.
    """

    trial: Trial
    patterns: Mapping[str, HeadPatterns | None]
    files: Mapping[str, Path]

    def computed_percent(self, label: str) -> float:
        """Percent of the scores of self-attention that a variant computed, of a whole generation: of the blocks that its
        masks kept, and of the means."""
        (technique,) = self._tried(label).switched.techniques
        assert isinstance(technique, SparseAttention)
        return 100 * technique.computed()

    def settings(self, label: str, path: str | Path) -> dict[str, dict[str, Any]]:
        """Techniques of a configuration with the patterns of a variant, whose file is at `path`."""
        own = self._tried(label).switched.techniques[0].settings
        dense = {"dense_percent": own.dense_percent, "dense_blocks": own.dense_blocks}
        return {"sparse_attention": {"patterns": str(path)} | dense}

    def frame(self) -> pd.DataFrame:
        """One row per variant: variant, kind (`OF_HEADS` or the pattern of all heads), computed_percent, heads_dense_percent
        and heads_with_means_percent (NaN of one pattern for all), quality_loss_percent, loss_low, loss_high, speedup, low,
        high, verdict, times_faster_at_most, did_what_it_says."""
        frame = self.trial.frame()
        patterns = [self.patterns[label] for label in frame["variant"]]
        tables = [None if each is None else each.frame() for each in patterns]
        settings = [tried.switched.techniques[0].settings for tried in self.trial.variants]
        frame.insert(
            1,
            "kind",
            [OF_HEADS if own else each.pattern for own, each in zip(patterns, settings, strict=True)],
        )
        frame.insert(2, "computed_percent", [self.computed_percent(label) for label in frame["variant"]])
        for name, of in (
            ("heads_dense_percent", lambda table: (table["density_percent"] == 100).mean()),
            ("heads_with_means_percent", lambda table: table["means_added"].mean()),
        ):
            frame[name] = [np.nan if table is None else 100 * of(table) for table in tables]
        return frame.drop(columns=["techniques", "skipped_percent"])

    def chosen(self, limit_percent: float) -> Tried:
        """The variant with a pattern for each head that computes least within a limit of quality loss, at the upper end of
        its interval; where none is, the one that loses least."""
        own = [tried for tried in self.trial.variants if self.patterns[tried.label]]
        within = [tried for tried in self.trial.within(limit_percent) if tried in own]
        if within:
            return min(within, key=lambda tried: self.computed_percent(tried.label))
        return min([tried for tried in own if tried.passed] or own, key=_upper)

    def answer(self, times: KernelTimes, limit_percent: float, cases: int) -> Answer:
        """What sparse attention costs and brings here.

        Args:
            times: time of its kernel. limit_percent: limit of the quality loss. cases: number of cases.
        """
        tried = self.chosen(limit_percent)
        patterns = self.patterns[tried.label]
        assert patterns is not None
        computed = percent_text(self.computed_percent(tried.label))
        gain = self.trial.comparison(tried.label)
        within = tried.passed and tried.loss.within(limit_percent) == "yes"
        brings = MASKS if not times.saves else gain.clause("the video", "the original")
        what = f"With a pattern for each head {computed} of the scores of self-attention are computed"
        none = (
            ""
            if within or not tried.loss.known
            else f"None is known to stay within {limit_percent:g} % quality loss. "
        )
        headline = fitting(
            f"{none}{what}: {tried.loss.text}; {brings}.", f"{none}{what}: {tried.loss.text}.", f"{what}."
        )
        heads = patterns.frame()
        with_means = int(heads["means_added"].sum())
        return answer(
            headline,
            times.sentence(),
            self._beside(tried, limit_percent),
            f"In {with_means} of {len(heads)} heads the means of what is left out are added, which lowers their error."
            if with_means
            else "",
            tiles=[
                (
                    "scores computed",
                    computed,
                    f"heads from {_range(heads['density_percent'])} of their blocks",
                ),
                ("quality loss", *tried.loss.tile(limit_percent)),
                self._kernel_tile(times),
                (
                    "most it could buy",
                    f"{tried.times_faster_at_most:.2f}×",
                    "of a video, at no cost of its own",
                ),
            ],
            next=next_step(tried, cases, AFTER_SPARSE),
        )

    def _kernel_tile(self, times: KernelTimes) -> tuple[str, str, str]:
        rows = times.frame().set_index("attention")
        label = OF_HEADS if OF_HEADS in rows.index else rows["density_percent"].idxmin()
        how = times.kernel if times.saves else "a mask"
        beside = f"of a dense one; {how}, noise {times.noise_percent:.2g} %"
        return "time of an attention", f"{1 / rows.loc[label, 'speedup']:.2f}×", beside

    def _beside(self, tried: Tried, limit_percent: float) -> str:
        """The patterns for all heads alike, beside the choice."""
        others = [other for other in self.trial.variants if self.patterns[other.label] is None]
        if not others or not tried.loss.known:
            return ""
        near = min(
            others,
            key=lambda each: abs(self.computed_percent(each.label) - self.computed_percent(tried.label)),
        )
        share = percent_text(self.computed_percent(near.label))
        return f"One pattern for all heads ({near.label}) computes {share}: {near.loss.text}."

    def _tried(self, label: str) -> Tried:
        return next(tried for tried in self.trial.variants if tried.label == label)


AFTER_SPARSE = step(
    "measures the chosen patterns as a configuration, with memory and load time", "41_configuration"
)


def _upper(tried: Tried) -> float:
    high = tried.loss.high_percent if tried.loss.high_percent is not None else tried.loss.percent
    return float("inf") if high is None else high


def _range(percent: pd.Series) -> str:
    return f"{percent.min():.3g} to {percent.max():.3g} %"


def try_patterns(
    model: Model,
    patterns: Mapping[str, HeadPatterns],
    folder: str | Path,
    asked: Sequence[Mapping[str, Any]],
    truths: Sequence[np.ndarray] | None = None,
    *,
    whole: Mapping[str, Mapping[str, Any]] | None = None,
    dense_percent: float = 0.0,
    dense_blocks: int = 0,
    **timing: Any,
) -> SparseTrial:
    """Generate the same cases with each choice of patterns, and with patterns that all heads share.

    Args:
        model, asked, truths: as `try_out`. patterns: label -> patterns. folder: where their files are written.
        whole: label -> settings of `sparse_attention` of the others, such as pattern, density and block.
        dense_percent, dense_blocks: settings of all.
        timing: rounds, precision, limit_s, progress of `try_out`.

    Raises:
        WanlabError: as `try_out`.
    """
    shared = {"dense_percent": dense_percent, "dense_blocks": dense_blocks}
    files = {label: own.save(Path(folder) / f"{slug(label)}.json") for label, own in patterns.items()}
    variants = {
        label: {"sparse_attention": shared | {"patterns": str(path)}} for label, path in files.items()
    }
    variants |= {label: {"sparse_attention": {**shared, **own}} for label, own in (whole or {}).items()}
    trial = try_out(model, variants, asked, truths, **timing)
    return SparseTrial(trial, {label: patterns.get(label) for label in variants}, files)
