"""Which heads are local: how much of their mass lies near the query, over several cases, and how the experts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from wanlab import heldout
from wanlab.core.errors import WanlabError
from wanlab.core.stats import bootstrap_mean, interval_text
from wanlab.diagnose.attention.calls import SELF
from wanlab.diagnose.attention.maps import AttentionMap, attention_map
from wanlab.diagnose.attention.statistics import REACHES_FRAMES, within_name
from wanlab.models.pipeline import Model

STATISTICS = (*map(within_name, REACHES_FRAMES), "near_position_percent", "density95_percent")
"""Mass within some latent frames, mass in a window around the position in all frames, and keys that hold 95 %."""

LOCAL_PERCENT = 90.0
"""Mass near the query from which a head is local: what a kernel that computes nothing else would keep of it."""

ROUNDING_PERCENT = 1e-3
"""A difference below it is the rounding of sums, as where all frames lie within four of every query."""

LOCAL, NOT_LOCAL, UNDECIDED = "local", "not local", "cannot be told"
WORDS = (LOCAL, NOT_LOCAL, UNDECIDED)
EXPERTS = {
    "expert_high": "the high-noise expert",
    "expert_low": "the low-noise expert",
    "expert": "the expert",
}
HEAD = ["component", "layer", "head"]


@dataclass(frozen=True, eq=False)
class Locality:
    """Self-attention heads and the experts' means, over cases.

    Attributes:
        heads: one row per component, layer and head: each of `STATISTICS` as its mean over cases, with the ends of its 95 %
            interval (`within1_frames_low_percent`, `..._high_percent`; NaN with fewer than three cases), and in time and in
            space "local", "not local" or "cannot be told": in time by the mass within one latent frame, in space by the mass
            in a window around the position. A head is local where the whole interval lies above `local_percent`.
        experts: one row per component and statistic: mean over heads and cases with its interval, and uniform, the value for
            equal attention to all keys.
        differences: one row per statistic: the first expert's mean less the second's over the same cases, with its interval,
            and differ ("yes", "no" or "cannot be told"); empty with one expert.
        cases: number of cases.
        grid: tokens along frames, height and width.
        local_percent: the threshold.
    """

    heads: pd.DataFrame
    experts: pd.DataFrame
    differences: pd.DataFrame
    cases: int
    grid: tuple[int, int, int]
    local_percent: float = LOCAL_PERCENT

    @property
    def most_local(self) -> pd.DataFrame:
        """All heads, those with most mass within one latent frame first."""
        return self.heads.sort_values(within_name(1), ascending=False, kind="stable", ignore_index=True)

    @property
    def counts(self) -> pd.DataFrame:
        """Number of heads that are local, not local and undecided, in time and in space, by component."""
        rows = [
            {
                "component": component,
                "where": where,
                **{word: int((part[where] == word).sum()) for word in WORDS},
            }
            for component, part in self.heads.groupby("component", sort=False)
            for where in ("in_time", "in_space")
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        """How many heads of each expert are local, and whether the experts differ, in one or two sentences."""
        counts = self.counts.set_index(["where", "component"])
        shown = [
            f"in {EXPERTS.get(str(name), name)} {row[LOCAL]} in time and"
            f" {counts.loc[('in_space', name), LOCAL]} in space, of {row.sum()}"
            for name, row in counts.loc["in_time"].iterrows()
        ]
        text = f"local heads: {'; '.join(shown)}"
        if self.differences.empty:
            return text
        first = self.differences.iloc[0]
        if first["differ"] != "yes":
            return f"{text}; a difference between the experts cannot be told"
        apart = interval_text(first["low_percent"], first["high_percent"], "+.1f")
        return (
            f"{text}; of the mass within one latent frame the first expert has"
            f" {first['difference_percent']:+.1f} percentage points against the second ({apart})"
        )


def attention_locality(
    model: Model,
    cases: Sequence[heldout.Case],
    *,
    queries: int = 16,
    at_steps: Sequence[int] | None = None,
    seed: int = 0,
    local_percent: float = LOCAL_PERCENT,
    progress: bool = True,
    **settings: Any,
) -> Locality:
    """Look at the self-attention of every head while a model makes several held-out clips.

    Args:
        model: from `wanlab.models.load`, eager.
        cases: from `heldout.draw_cases`; three or more have intervals.
        queries, at_steps, seed: as in `attention_map`.
        local_percent: mass near the query from which a head is local.
        settings: settings of the generation, such as height, width, frames and steps.

    Raises:
        WanlabError: no case, or as for `attention_map`.
    """
    if not cases:
        raise WanlabError("no case to look at; give at least one, and three for intervals")
    requests, _ = heldout.ask(model, cases, **settings)
    maps = [
        attention_map(
            model,
            **request,
            queries=queries,
            at_steps=at_steps,
            branches=("cond",),
            progress=progress,
        )
        for request in (request | {"seed": request["seed"] + seed} for request in requests)
    ]
    return locality(maps, local_percent=local_percent)


def locality(maps: Sequence[AttentionMap], *, local_percent: float = LOCAL_PERCENT) -> Locality:
    """The locality of the heads of maps that were made with one model at one size, one map for each case.

    The mean of a head over steps is one value a case; intervals are bootstrap intervals over cases.

    Raises:
        WanlabError: no map, maps of different sizes, or one without these statistics.
    """
    grids = {tuple(each.facts["grid"]) for each in maps}
    if len(grids) != 1:
        shown = " and ".join("x".join(map(str, grid)) for grid in sorted(grids))
        raise WanlabError(
            f"maps of {shown} tokens cannot be put together; make them at one size"
            if grids
            else "no attention map"
        )
    rows = pd.concat([each.of(SELF, "cond").assign(case=number) for number, each in enumerate(maps)])
    lacking = [name for name in STATISTICS if name not in rows or rows[name].isna().all()]
    if lacking:
        raise WanlabError(
            f"the map has no {lacking[0]}: it is from an earlier version; make it again with attention_map"
        )
    by_case = rows.groupby([*HEAD, "case"], sort=False)[list(STATISTICS)].mean()
    heads = []
    for place, values in by_case.groupby(level=HEAD, sort=False):
        figures = {name: _mean_row(values[name].to_numpy()) for name in STATISTICS}
        row = dict(zip(HEAD, place, strict=True))
        for name, figure in figures.items():
            stem = name.removesuffix("_percent")
            ends = {f"{stem}_{end}_percent": figure[f"{end}_percent"] for end in ("low", "high")}
            row |= {name: figure["mean_percent"], **ends}
        row["in_time"] = _is_local(figures[within_name(1)], local_percent)
        row["in_space"] = _is_local(figures["near_position_percent"], local_percent)
        heads.append(row)
    uniform = maps[0].uniform()
    means = by_case.groupby(level=["component", "case"], sort=False).mean()
    components = list(rows["component"].unique())
    experts = [
        {"component": component, "statistic": name}
        | _mean_row(means.loc[component][name].to_numpy())
        | {"uniform_percent": uniform[name]}
        for component in components
        for name in STATISTICS
    ]
    (grid,) = grids
    return Locality(
        pd.DataFrame(heads),
        pd.DataFrame(experts),
        _differences(means, components),
        len(maps),
        grid,
        local_percent,
    )


def _differences(means: pd.DataFrame, components: Sequence[str]) -> pd.DataFrame:
    if len(components) < 2:
        return pd.DataFrame()
    first, second = components[:2]
    rows = []
    for name in STATISTICS:
        apart = (means.loc[first][name] - means.loc[second][name]).to_numpy()
        figures = _mean_row(apart)
        known = not np.isnan(figures["low_percent"])
        differ = figures["low_percent"] > ROUNDING_PERCENT or figures["high_percent"] < -ROUNDING_PERCENT
        rows.append(
            {"statistic": name, "difference_percent": figures.pop("mean_percent"), **figures}
            | {"differ": ("yes" if differ else "no") if known else UNDECIDED}
        )
    return pd.DataFrame(rows)


def _mean_row(values: np.ndarray) -> dict[str, float]:
    """Mean over cases, and the ends of its 95 % interval."""
    low, high = bootstrap_mean(values, seed=0) or (np.nan, np.nan)
    return {"mean_percent": float(values.mean()), "low_percent": low, "high_percent": high}


def _is_local(figure: dict[str, float], least_percent: float) -> str:
    low, high = figure["low_percent"], figure["high_percent"]
    if np.isnan(low):
        return UNDECIDED
    return LOCAL if low >= least_percent else NOT_LOCAL if high < least_percent else UNDECIDED
