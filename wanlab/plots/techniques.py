"""Figures of techniques: which steps a cache skips, what it estimates, and what that costs in quality."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from wanlab.core.words import NAMES
from wanlab.plots.intervals import interval_rows
from wanlab.plots.style import GREY, ROW_PX, colour, needs, theme


def loss_of_variants(frame: pd.DataFrame, limit_percent: float) -> go.Figure:
    """Quality loss of each variant with its interval, beside what it skips and how fast it is.

    Args:
        frame: `Trial.frame`. limit_percent: limit of the loss.
    """
    needs(
        frame,
        "loss_of_variants",
        "variant",
        "quality_loss_percent",
        "loss_low",
        "loss_high",
        "skipped_percent",
    )
    rows = frame.assign(
        variant=[f"{row.variant}, skips {row.skipped_percent:.0f} %" for row in frame.itertuples()]
    )
    return interval_rows(
        rows,
        name="variant",
        value="quality_loss_percent",
        low="loss_low",
        high="loss_high",
        axis="quality loss (%), less is better",
        form="+.2f",
        unit="%",
        reference=0.0,
        reference_text="the original",
        limit=limit_percent,
    )


def skip_map(skipped: pd.DataFrame) -> go.Figure:
    """Which steps each variant computes: a row per variant, a square per step in the colour of its expert; the paler, the
    more of its calls were skipped.

    Args:
        skipped: variant, step, component, skipped_percent, as `wanlab.techniques.skipped_steps`.
    """
    needs(skipped, "skip_map", "variant", "step", "component", "skipped_percent")
    figure = go.Figure()
    variants = list(dict.fromkeys(skipped["variant"]))
    for component, rows in skipped.groupby("component", sort=False):
        computed = 1 - rows["skipped_percent"] / 100
        figure.add_scatter(
            x=rows["step"] + 1,
            y=rows["variant"],
            mode="markers",
            name=NAMES.get(str(component), str(component)),
            marker={
                "symbol": "square",
                "size": 15,
                "color": colour(str(component)),
                "opacity": (0.12 + 0.88 * computed).tolist(),
                "line": {"width": 1, "color": colour(str(component))},
            },
            customdata=rows["skipped_percent"],
            hovertemplate="step %{x}: %{customdata:.0f} % of the calls skipped<extra>%{y}</extra>",
        )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(categoryorder="array", categoryarray=variants[::-1], type="category")
    return figure.update_layout(
        template=theme(),
        height=100 + ROW_PX * len(variants),
        margin={"t": 40},
        legend={"itemsizing": "constant"},
    )


def change_curve(decisions: pd.DataFrame) -> go.Figure:
    """Sum of the estimated changes since the last computed step, by step, of each variant with its threshold.

    Args:
        decisions: variant, threshold, step, summed_change and more, as `Trial.decisions`.
    """
    needs(decisions, "change_curve", "variant", "step", "summed_change", "threshold")
    figure = go.Figure()
    for variant, rows in decisions.groupby("variant", sort=False):
        means = rows.groupby("step")["summed_change"].mean()
        tint = colour(str(variant))
        figure.add_scatter(
            x=means.index + 1,
            y=means,
            mode="lines+markers",
            name=str(variant),
            line={"color": tint, "width": 2},
            marker={"size": 6},
            hovertemplate="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
        figure.add_hline(y=rows["threshold"].iloc[0], line={"color": tint, "dash": "dot", "width": 1.5})
    figure.add_annotation(
        text="dotted: the thresholds",
        xref="paper",
        yref="paper",
        x=1,
        y=1.0,
        showarrow=False,
        font={"color": GREY},
    )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="estimated change since the last computed step", rangemode="tozero")
    return figure.update_layout(template=theme(), height=340, margin={"t": 40})


def ladder_rows(frame: pd.DataFrame) -> go.Figure:
    """Speed-up of each rung of a ladder with its interval: a row per technique, added to those above it.

    Args:
        frame: `Ladder.frame`.
    """
    needs(frame, "ladder_rows", "technique", "tier", "rung_speedup", "rung_low", "rung_high")
    plus = ["" if index == 0 else "+ " for index in range(len(frame))]
    titles = [
        f"{sign}{row.technique.replace('_', ' ')}, {row.tier}"
        for sign, row in zip(plus, frame.itertuples(), strict=True)
    ]
    return interval_rows(
        frame.assign(technique=titles),
        name="technique",
        value="rung_speedup",
        low="rung_low",
        high="rung_high",
        axis="times as fast as the original, more is better",
        unit="×",
        reference=1.0,
        reference_text="the original",
    )
