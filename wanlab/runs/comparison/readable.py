"""A comparison as people read it: few digits, every figure with its ratio or difference behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.runs.comparison.configurations import shown
from wanlab.runs.comparison.frontier import NO_EFFECT
from wanlab.runs.comparison.metrics import is_ratio

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.runs.comparison.compare import Comparisons


def readable(found: Comparisons, *, apart: bool = False) -> pd.DataFrame:
    """Words only: configuration, the compared figure, its ratio with interval, noise and verdict, the other figures.

    Args:
        apart: a column for each varied parameter in place of the configuration's name.
    """
    import pandas as pd

    gain = "ratio" if is_ratio(found.by) else "difference"
    others = [name for name in found.shown if name != found.by]
    rows = []
    for row in found.frame.to_dict(orient="records"):
        known = row["low"] == row["low"]
        named = {axis: shown(row[axis]) for axis in found.axes} if apart and found.axes else None
        made = (named or {"configuration": row["configuration"]}) | {
            found.by: figure(row[found.by]),
            gain: figure(row[gain], gain),
            "95 % interval": f"{row['low']:.2f} to {row['high']:.2f}" if known else "",
            "noise %": figure(row["noise_percent"]),
            "verdict": row["verdict"] + (f", {NO_EFFECT}" if row.get("effect") == NO_EFFECT else ""),
        }
        for name in others:
            kind = "ratio" if is_ratio(name) else "difference"
            first = row["configuration"] == found.baseline.label
            change = "" if first else figure(row[f"{name}_{kind}"], kind)
            made[name] = figure(row[name]) + (f" ({change})" if change else "")
        rows.append(made | ({"effect": row["effect"]} if "effect" in row else {}))
    return pd.DataFrame(rows)


def readable_techniques(matrix: pd.DataFrame) -> pd.DataFrame:
    """Words only: technique, speed-up with its interval, the product of the single ones, what became of it."""
    import pandas as pd

    rows = []
    for row in matrix.to_dict(orient="records"):
        both = row["product"] == row["product"]
        rows.append(
            {
                "techniques": row["techniques"],
                "speed-up": f"{figure(row['speedup'], 'ratio')} ({row['low']:.2f} to {row['high']:.2f})",
                "product of the single ones": figure(row["product"], "ratio") if both else "",
                "of the product": f"{row['of_product']:.2f} ({row['of_low']:.2f} to {row['of_high']:.2f})"
                if both
                else "",
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(rows)


def readable_engines(table: pd.DataFrame) -> pd.DataFrame:
    """Words only: a line per measure, a column per engine, the ratio to the first behind each figure."""
    import pandas as pd

    names = [name for name in table.columns if f"{name}_ratio" in table.columns]
    lines: list[dict[str, str]] = []
    for name in ["state", *names, "note"]:
        line = {"measure": name}
        for place, row in enumerate(table.to_dict(orient="records")):
            if name in names:
                change = figure(row[f"{name}_ratio"], "ratio") if place else ""
                line[row["engine"]] = figure(row[name]) + (f" ({change})" if change else "")
            else:
                line[row["engine"]] = str(row[name])
        lines.append(line)
    return pd.DataFrame(lines)


def figure(value: Any, kind: str = "") -> str:
    """A number in few digits; nothing for NaN."""
    if value is None or value != value:
        return ""
    if kind == "ratio":
        return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"
    if kind == "difference":
        return f"{value:+.3g}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
