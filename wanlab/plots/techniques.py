"""Figures of techniques: which steps a cache skips, what it estimates, and what that costs in quality."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.words import NAMES
from wanlab.plots.intervals import interval_rows
from wanlab.plots.style import GREY, OTHERS, ROW_PX, colour, limit_line, needs, theme


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


def loss_against_skipped(frame: pd.DataFrame, limit_percent: float) -> go.Figure:
    """Quality loss against the share of the work of the denoiser that is skipped, a line per technique through its settings,
    with their intervals; times as fast where no loss is known.

    Args:
        frame: `Trial.frame`. limit_percent: limit of the loss.
    """
    needs(frame, "loss_against_skipped", *_COLUMNS)
    known = frame["quality_loss_percent"].notna().any()
    value, low, high = (
        ("quality_loss_percent", "loss_low", "loss_high") if known else ("speedup", "low", "high")
    )
    unit, origin = ("%", 0.0) if known else ("×", 1.0)
    figure = go.Figure()
    for index, (title, variants) in enumerate(_groups(frame["variant"]).items()):
        rows = frame[frame["variant"].isin(variants)].sort_values("skipped_percent")
        middle, tint = rows[value].astype(float), OTHERS[index % len(OTHERS)]
        ends = {name: rows[column].astype(float) for name, column in (("low", low), ("high", high))}
        figure.add_scatter(
            x=rows["skipped_percent"],
            y=middle,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (ends["high"] - middle).fillna(0),
                "arrayminus": (middle - ends["low"]).fillna(0),
                "thickness": 1.5,
            },
            mode="lines+markers+text",
            name=title,
            text=[variant.partition(" ")[2] for variant in rows["variant"]],
            textposition="top right" if index % 2 == 0 else "bottom right",
            line={"color": tint, "width": 2},
            marker={
                "size": 10,
                "symbol": ["circle" if did else "circle-open" for did in rows["did_what_it_says"]],
            },
            customdata=rows[["variant", "speedup"]],
            hovertemplate="%{customdata[0]}: skips %{x:.3g} %, %{y:+.3g} "
            + unit
            + ", %{customdata[1]:.2f}× as fast<extra></extra>",
        )
    figure.add_scatter(
        x=[0],
        y=[origin],
        mode="markers",
        name="the original",
        marker={"color": GREY, "symbol": "diamond", "size": 11},
        hovertemplate="the original<extra></extra>",
    )
    if known:
        limit_line(figure, limit_percent, f"limit {limit_percent:g} %", x=0.08, xanchor="left")
    figure.update_xaxes(title_text="skipped work of the denoiser (%)", rangemode="tozero")
    figure.update_yaxes(
        title_text="quality loss (%), less is better" if known else "times as fast as the original"
    )
    return figure.update_layout(template=theme(), height=400, margin={"t": 40})


_COLUMNS = (
    "variant",
    "skipped_percent",
    "quality_loss_percent",
    "loss_low",
    "loss_high",
    "speedup",
    "low",
    "high",
    "did_what_it_says",
)


def _groups(variants: pd.Series) -> dict[str, list[str]]:
    """First word of the labels of variants, which names the technique, -> those labels."""
    groups: dict[str, list[str]] = {}
    for variant in dict.fromkeys(map(str, variants)):
        groups.setdefault(variant.partition(" ")[0], []).append(variant)
    return groups


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
    """What each cache decides by, by step: the sum of the estimated changes since the last computed step, or the change
    itself; beside the thresholds, dotted. A panel per cache, as each measures another thing.

    Args:
        decisions: variant, threshold, step, summed_change and more, as `Trial.decisions`.
    """
    needs(decisions, "change_curve", "variant", "step", "summed_change", "threshold")
    groups = _groups(decisions["variant"])
    figure = make_subplots(rows=len(groups), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (title, variants) in enumerate(groups.items(), 1):
        figure.update_yaxes(title_text=f"change, {title}", rangemode="tozero", row=row, col=1)
        for index, variant in enumerate(variants):
            rows = decisions[decisions["variant"] == variant]
            means = rows.groupby("step")["summed_change"].mean()
            tint = OTHERS[index % len(OTHERS)]
            figure.add_scatter(
                x=means.index + 1,
                y=means,
                mode="lines+markers",
                name=variant,
                line={"color": tint, "width": 2},
                marker={"size": 6},
                hovertemplate="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
                row=row,
                col=1,
            )
            line = {"color": tint, "dash": "dot", "width": 1.5}
            figure.add_hline(y=rows["threshold"].iloc[0], line=line, row=row, col=1)
    figure.update_xaxes(title_text="step", row=len(groups), col=1)
    figure.add_annotation(
        text="dotted: the thresholds",
        xref="paper",
        yref="paper",
        x=1,
        y=1.0,
        showarrow=False,
        font={"color": GREY},
    )
    return figure.update_layout(template=theme(), height=120 + 220 * len(groups), margin={"t": 40})


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
