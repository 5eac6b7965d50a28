"""A breakdown under the device's ceilings: what each row reaches of them, and how short it could be at best."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.diagnose.breakdown import Breakdown
    from wanlab.measure.ceilings import Ceilings


def bounds(breakdown: Breakdown, ceilings: Ceilings | None) -> pd.DataFrame:
    """The rows of a breakdown beside their bounds.

    Args:
        ceilings: of the device that the trace was taken on; None leaves the columns that need them empty.

    Returns:
        DataFrame: category, time_ms, share_percent, tflop_per_s, gb_per_s, of_roofline_percent (roofline_ms over the time
        spent), amdahl_bound (speed-up of the whole if the row cost nothing), roofline_ms (the larger of work over rate and
        bytes over bandwidth: no exact implementation of the same operators is faster, as far as shapes were recorded),
        ceiling_tflop_per_s, ceiling_gb_per_s, hidden_ms, calls.
    """
    import numpy as np

    table = breakdown.frame.copy()
    rates = ceilings.tflop_per_s if ceilings else {}
    table["ceiling_tflop_per_s"] = table["format"].map(rates).astype(float).where(table["tflop"] > 0)
    memory = ceilings.memory_gb_per_s if ceilings else np.nan
    link = ceilings.copy_gb_per_s.get("pinned", np.nan) if ceilings else np.nan
    bandwidth = np.where(table["category"] == "host_device_transfer", link, memory)
    table["ceiling_gb_per_s"] = np.where(table["moved_gb"] > 0, bandwidth, np.nan)
    arithmetic = table["tflop"] / table["ceiling_tflop_per_s"]
    traffic = table["moved_gb"] / table["ceiling_gb_per_s"]
    table["roofline_ms"] = 1e3 * np.fmax(arithmetic, traffic)
    spent = table["time_ms"] + table["hidden_ms"]
    table["of_roofline_percent"] = 100 * table["roofline_ms"] / spent
    columns = [
        "category", "time_ms", "share_percent", "tflop_per_s", "gb_per_s", "of_roofline_percent", "amdahl_bound",
        "roofline_ms", "ceiling_tflop_per_s", "ceiling_gb_per_s", "hidden_ms", "calls",
    ]  # fmt: skip
    return table[columns]
