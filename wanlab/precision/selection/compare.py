"""Verified plans side by side, case by case against the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.selection.verify import Verification

PAIRED = ("lpips", "loss_percent")


def compare_plans(verifications: Sequence[Verification], *, seed: int = 0) -> pd.DataFrame:
    """One row per plan, with its differences to the first plan on the same cases.

    Args:
        verifications: from `verify_plan`, of the same cases.
        seed: of the bootstrap.

    Returns:
        DataFrame: the columns of `Verification.row`, and of lpips and loss_percent how much `_more` than the first plan's it
        is, mean over cases, with the ends of its 95 % bootstrap interval `_more_low` and `_more_high` (NaN for the first).

    Raises:
        WanlabError: nothing, or other cases.
    """
    import math

    import pandas as pd

    from wanlab.evaluate.bootstrap import bootstrap_mean

    if not verifications:
        raise WanlabError("no verified plan to compare; give at least one")
    first, rows = verifications[0], []
    for each in verifications:
        if (each.purpose, list(each.frame["case"])) != (first.purpose, list(first.frame["case"])):
            raise WanlabError(
                f"{each.plan.name} was verified on other cases than {first.plan.name}; take the same originals"
            )
        row = each.row()
        for metric in PAIRED if each is not first else ():
            apart = (each.frame[metric] - first.frame[metric]).to_numpy(float)
            low, high = bootstrap_mean(apart, seed) or (math.nan, math.nan)
            row |= {
                f"{metric}_more": float(apart.mean()),
                f"{metric}_more_low": low,
                f"{metric}_more_high": high,
            }
        rows.append(row)
    return pd.DataFrame(rows)
