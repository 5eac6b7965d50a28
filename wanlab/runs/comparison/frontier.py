"""Pareto efficiency: rows that no other row beats in everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

SENSES = ("min", "max")
NO_EFFECT = "no effect"


def pareto(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """Which rows are efficient: no other row is at least as good in every column and better in one.

    Rows that are equal in every column stand or fall together. A row that lacks one of the values is not efficient and
    beats nobody.

    Args:
        frame: one row per candidate.
        goals: column -> `"min"` where less is better, `"max"` where more is.

    Returns:
        Booleans with the frame's index.

    Raises:
        WanlabError: no goal, an unknown column, or another sense.
    """
    import numpy as np
    import pandas as pd

    if not goals:
        raise WanlabError('pareto needs at least one column, e.g. {"time_ms": "min"}')
    for column, sense in goals.items():
        if column not in frame.columns:
            raise WanlabError(f"no column {column!r}{did_you_mean(column, map(str, frame.columns))}")
        if sense not in SENSES:
            raise WanlabError(f'{column} is to be "min" or "max", not {sense!r}')
    costs = np.column_stack(
        [
            pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
            * (1.0 if sense == "min" else -1.0)
            for column, sense in goals.items()
        ]
    )
    known = ~np.isnan(costs).any(axis=1)
    rows = costs[known] + 0.0  # no -0.0, which is another row than 0.0
    # Of equal rows one is looked at. Sorted, a row can only be beaten by one before it.
    points, of_row = np.unique(rows, axis=0, return_inverse=True)
    efficient = np.zeros(len(points), dtype=bool)
    best = np.empty((0, points.shape[1]))
    for index, point in enumerate(points):
        if not (best <= point).all(axis=1).any():
            efficient[index] = True
            best = np.vstack([best, point])
    made = np.zeros(len(frame), dtype=bool)
    made[known] = efficient[of_row.reshape(-1)]
    return pd.Series(made, index=frame.index, name="efficient")


def efficient(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """`pareto` among the rows whose `effect` is not "no effect": those are another configuration than their name says."""
    real = frame["effect"] != NO_EFFECT if "effect" in frame else frame.index == frame.index
    return pareto(frame[real], goals).reindex(frame.index, fill_value=False)
