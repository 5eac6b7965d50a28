"""Figures of precision: sensitivity, agreement, tolerance, frontier and format maps."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError
from wanlab.core.words import shown as shown_value
from wanlab.diagnose.experts.timeline import from_one
from wanlab.plots.intervals import MOST_ROWS, interval_rows
from wanlab.plots.style import GREY, NAMES, ROW_PX, colour, limit_line, needs, theme

VALUE_TITLES = {
    "effect": "effect on the final latents",
    "velocity_error": "error of the velocity",
    "local_error": "error of the layer's output",
}
BAR_TITLES = {
    "effect": "change of the final latents",
    "velocity_error": "error of the velocity",
    "local_error": "error of the layer's output",
}
KIND_SYMBOLS = {
    "layer": "circle",
    "block": "square",
    "projection": "diamond",
    "several": "triangle-up",
    "expert": "star",
}


def sensitivity_map(
    frame: pd.DataFrame, component: str, value: str = "effect", *, first_step: int | None = None
) -> go.Figure:
    """Block x projection of one expert, a panel per format; one logarithmic scale for all experts of the frame.

    Args:
        frame: `Sensitivity.frame`.
        value: `"effect"`, `"velocity_error"` or `"local_error"`; effects of several ranges of steps are added, errors
            averaged as squares.
        first_step: first step of one range of steps; None takes all ranges.

    Raises:
        WanlabError: missing columns, an unknown value, or no rows of this expert and range.
    """
    needs(
        frame, "sensitivity_map", "component", "layer", "block", "projection", "format", "first_step", value
    )
    if value not in VALUE_TITLES:
        raise WanlabError(f"value is {', '.join(VALUE_TITLES)}, not {value!r}")
    rows = frame[frame["component"] == component]
    rows = rows if first_step is None else rows[rows["first_step"] == first_step]
    if rows.empty:
        raise WanlabError(f"no rows of {component} in this range of steps")
    formats = list(dict.fromkeys(rows["format"]))
    projections = sorted(set(rows["projection"]), key=lambda name: (name.split(".")[0], name))
    blocks = sorted(set(rows["block"].astype(int)))
    tables = [_table(rows[rows["format"] == name], value, projections, blocks) for name in formats]
    low, high = _scale(frame if first_step is None else rows, value)
    figure = make_subplots(
        rows=1, cols=len(formats), subplot_titles=formats, shared_yaxes=True, horizontal_spacing=0.03
    )
    for column, table in enumerate(tables, 1):
        figure.add_heatmap(
            x=[str(block) for block in blocks],
            y=projections,
            z=table,
            coloraxis="coloraxis",
            customdata=[["" if v is None else _percent(v, value) for v in line] for line in table],
            hovertemplate=f"block %{{x}}, %{{y}}<br>{BAR_TITLES[value]} %{{customdata}}"
            f"<extra>{formats[column - 1]}</extra>",
            row=1,
            col=column,
        )
    ticks: list[float] = list(range(math.ceil(low), math.floor(high) + 1)) or [low, high]
    figure.update_layout(
        template=theme(),
        height=160 + 26 * len(projections),
        margin={"t": 72},
        title={"text": NAMES.get(component, component), "x": 0, "xanchor": "left", "font": {"size": 15}},
        coloraxis={
            "colorscale": "Viridis",
            "cmin": low,
            "cmax": high,
            "colorbar": {
                "thickness": 12,
                "tickvals": ticks,
                "ticktext": [_percent(tick, value) for tick in ticks],
                "title": {"text": BAR_TITLES[value], "side": "right", "font": {"size": 12}},
            },
        },
    )
    figure.update_xaxes(title_text="block", type="category", nticks=10)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_annotations(font={"size": 13})
    return figure


def _percent(power: float, value: str) -> str:
    """A place of the colour scale in percent; an effect is a square, and is shown as its root."""
    return shown_value(100 * 10 ** (power / 2 if value == "effect" else power), "%")


def sensitivity_bars(frame: pd.DataFrame, count: int = MOST_ROWS, value: str = "effect") -> go.Figure:
    """The most sensitive rows with their intervals, in the colour of their expert, in percent.

    Args:
        frame: `Sensitivity.frame` or `Sensitivity.ranked()`.
        value: as in `sensitivity_map`; an effect is drawn as its root, the change itself, and `local_error` has no interval.
    """
    needs(frame, "sensitivity_bars", "component", "layer", "format", "first_step", "last_step", value)
    rows = frame.sort_values(value, ascending=False).head(count)
    low, high = {"effect": ("effect_low", "effect_high")}.get(value, ("low", "high"))
    power = 0.5 if value == "effect" else 1.0
    shown = {"value": value} | ({} if value == "local_error" else {"low": low, "high": high})
    table = pd.DataFrame({name: 100 * rows[column].clip(lower=0) ** power for name, column in shown.items()})
    table["name"] = [row.layer for row in rows.itertuples()]
    expert = [NAMES.get(row.component, row.component).removesuffix(" expert") for row in rows.itertuples()]
    formats = list(dict.fromkeys(rows["format"]))
    each = [f"{row.format}, " * (len(formats) > 1) for row in rows.itertuples()]
    steps = map(_steps, rows.itertuples())
    table["note"] = [
        "".join((form, name, ", ", step)) for form, name, step in zip(each, expert, steps, strict=True)
    ]
    table["component"] = rows["component"]
    axis = "change of the final latents" if value == "effect" else VALUE_TITLES[value]
    title = f"{axis} by one layer{f' in {formats[0]}' if len(formats) == 1 else ''} (%)"
    return interval_rows(
        table, tint="component", note="note", axis=title, form="", unit="%", log=True, most=count
    )


def loss_rows(verified: pd.DataFrame, limit_percent: float) -> go.Figure:
    """Quality loss of plans on the same cases, each with its interval, and what their linear weights take.

    Without truths LPIPS to the original takes the place of the loss.

    Args:
        verified: from `precision.compare_plans`.
        limit_percent: largest quality loss that is allowed.
    """
    needs(verified, "loss_rows", "plan", "loss_percent", "weight_mib", "lpips")
    known = bool(verified["loss_percent"].notna().any())
    value, limit = ("loss_percent", limit_percent) if known else ("lpips", limit_percent / 100)
    stem = value.removesuffix("_percent")
    ends = (f"{stem}_low_percent", f"{stem}_high_percent") if known else ("lpips_low", "lpips_high")
    table = verified.assign(
        name=[f"{row.plan}, {row.weight_mib:.3g} MiB" for row in verified.itertuples()], tint=verified["plan"]
    )
    return interval_rows(
        table,
        value=value,
        low=ends[0],
        high=ends[1],
        tint="tint",
        axis="quality loss (%)" if known else "LPIPS to the original",
        form="+.2f" if known else ".3f",
        unit="%" if known else "",
        reference=0.0,
        reference_text="original",
        limit=limit,
    )


def tolerance_bars(tolerance: Any) -> go.Figure:
    """Velocity error and effect with all layers of an expert rounded, for each format, with intervals.

    Args:
        tolerance: from `precision.expert_tolerance`.
    """
    frame = tolerance.frame
    panels = [
        ("velocity_error", "velocity_low", "velocity_high", "change of one velocity (%)"),
        ("effect", "effect_low", "effect_high", "change of the final latents (%)"),
    ]
    figure = make_subplots(rows=1, cols=2, subplot_titles=[panel[-1] for panel in panels])
    for component, part in frame.groupby("component", sort=False):
        for column, names in enumerate(panels, 1):
            # An effect is a square: drawn is the change itself.
            power = 0.5 if names[0] == "effect" else 1.0
            value, low, high = (100 * part[name].clip(lower=0) ** power for name in names[:3])
            figure.add_scatter(
                x=part["format"].tolist(),
                y=value.tolist(),
                mode="markers",
                marker={"color": colour(component), "size": 11},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (high - value).tolist(),
                    "arrayminus": (value - low).tolist(),
                    "color": colour(component),
                    "thickness": 1.6,
                },
                name=NAMES.get(component, component),
                legendgroup=component,
                showlegend=column == 1,
                hovertemplate="%{x}: %{y:.3g} %<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
    figure.update_layout(template=theme(), height=340, margin={"t": 60}, legend={"y": 1.12})
    figure.update_yaxes(type="log", exponentformat="none", dtick=1)
    figure.update_annotations(font={"size": 13})
    return figure


def agreement_scatter(agreement: Any, truth: str = "true") -> go.Figure:
    """Predicted effect against the effect in generations, one mark per choice, with their rank correlation.

    Args:
        agreement: from `precision.end_to_end_agreement`.
        truth: `"true"` (final latents) or `"lpips"`.
    """
    correlation, frame = agreement.correlation(truth), agreement.frame
    figure, in_legend = go.Figure(), set()
    for (component, kind), part in frame.groupby(["component", "kind"], sort=True):
        title = NAMES.get(component, component)
        figure.add_scatter(
            x=part["predicted"].tolist(),
            y=part[truth].tolist(),
            mode="markers",
            marker={"color": colour(component), "symbol": KIND_SYMBOLS.get(kind, "circle"), "size": 10},
            name=title,
            legendgroup=component,
            showlegend=False,
            customdata=from_one(part)[["format", "layers", "steps", "layer"]].to_numpy().tolist(),
            hovertemplate=f"{kind}: %{{customdata[1]}} layer(s) %{{customdata[3]}}, %{{customdata[0]}}, steps"
            f" %{{customdata[2]}}<br>predicted %{{x:.3g}}, true %{{y:.3g}}<extra>{title}</extra>",
        )
        if component not in in_legend:  # the colour says the expert, the shape what was rounded
            in_legend.add(component)
            figure.add_scatter(
                x=[None], y=[None], mode="lines", line={"color": colour(component), "width": 5}, name=title
            )
    for kind in dict.fromkeys(frame["kind"]):
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": GREY, "symbol": KIND_SYMBOLS.get(kind, "circle"), "size": 9},
            name={
                "layer": "one layer",
                "block": "one block",
                "projection": "one projection of all blocks",
                "several": "several layers",
                "expert": "the whole expert",
            }.get(kind, kind),
        )
    positive = [*frame["predicted"], *(frame["true"] if truth == "true" else ())]
    ends = [min(v for v in positive if v > 0), max(positive)] if any(v > 0 for v in positive) else [0.1, 1]
    if truth == "true":
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot", "width": 1.2}, name="equal"
        )
    floor = agreement.floor if truth == "true" else agreement.floor_lpips
    least = frame[truth].min()
    if floor and floor > least / 30:
        limit_line(figure, floor, "noise floor", log=True)
    figure.add_annotation(
        x=0.02,
        y=0.98,
        xref="x domain",
        yref="y domain",
        text=f"{len(frame)} choices: rank correlation {correlation}",
        showarrow=False,
        xanchor="left",
        yanchor="top",
        font={"size": 14},
    )
    words = {"true": "effect in generations (squared change)", "lpips": "LPIPS to the original video"}
    figure.update_layout(template=theme(), height=460)
    title = "predicted effect (squared change of the final latents)"
    figure.update_xaxes(title_text=title, type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title_text=words[truth], type="log", exponentformat="power", dtick=1)
    return figure


def _steps(row: Any) -> str:
    first, last = row.first_step + 1, row.last_step + 1  # readers count from 1
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _scale(frame: pd.DataFrame, value: str) -> tuple[float, float]:
    """Ends of the colour scale as powers of ten: at most six decades."""
    groups = frame.groupby(["component", "format", "layer"])[value]
    values = groups.sum() if value == "effect" else groups.max()
    values = values[values > 0]
    if values.empty:
        return 0.0, 1.0
    low, high = math.log10(values.min()), math.log10(values.max())
    return max(low, high - 6), high if high > low else low + 1


def _table(rows: pd.DataFrame, value: str, projections: list[str], blocks: list[int]) -> list[list]:
    """Logarithms of the values, a row per projection and a column per block; None where there is no value."""
    groups = rows.groupby(["projection", rows["block"].astype(int)])[value]
    values = groups.sum() if value == "effect" else groups.agg(lambda each: (each**2).mean() ** 0.5)
    known = {place: float(v) for place, v in values.items() if v > 0}
    return [
        [math.log10(known[name, block]) if (name, block) in known else None for block in blocks]
        for name in projections
    ]


CHOSEN = "#3d85c6"
OTHER = "#e07b39"
BITS = "bits_per_weight"
TITLES = {
    BITS: "bits per linear weight",
    "saved_percent": "time or memory saved (%)",
    "effect": "predicted effect (squared change of the latents)",
}


def frontier_plot(
    frontier: Any,
    presets: pd.DataFrame | None = None,
    *,
    selected: Any = None,
    budget: float | None = None,
    cost: str = BITS,
) -> go.Figure:
    """Predicted effect against cost: plans of the frontier, presets, and the plan that was chosen.

    Args:
        frontier: from `precision.frontier`, or its table.
        presets: from `precision.predict`.
        selected: `Selection`, or its row.
        budget: largest allowed effect, drawn as a line.
        cost: `"bits_per_weight"` or `"saved_percent"`.

    Raises:
        WanlabError: missing columns.
    """
    frame = getattr(frontier, "frame", frontier)
    needs(frame, "frontier_plot", "plan", "effect", cost)
    figure = go.Figure()
    shown = frame[frame["effect"] > 0].sort_values(cost)
    hover = f"%{{text}}<br>{TITLES[cost]} %{{x:.2f}}<br>effect %{{y:.2g}}<extra></extra>"
    figure.add_scatter(
        x=shown[cost].tolist(),
        y=shown["effect"].tolist(),
        text=shown["plan"].tolist(),
        mode="lines+markers",
        line={"color": CHOSEN, "width": 2},
        marker={"size": 7},
        name="cheapest within a budget",
        hovertemplate=hover,
    )
    if presets is not None and len(presets):
        needs(presets, "frontier_plot", "plan", "effect", cost)
        own = presets[presets["effect"] > 0].sort_values([cost, "effect"])
        figure.add_scatter(
            x=own[cost].tolist(),
            y=own["effect"].tolist(),
            text=own["plan"].tolist(),
            mode="markers+text",
            textposition=_sides(own[cost].tolist(), own["effect"].tolist(), budget),
            textfont={"size": 11},
            marker={"color": OTHER, "size": 9, "symbol": "diamond"},
            name="picked by hand",
            hovertemplate=hover,
        )
    if selected is not None:
        row = selected.row() if hasattr(selected, "row") else dict(selected)
        figure.add_scatter(
            x=[row[cost]],
            y=[row["effect"]],
            text=[row["plan"]],
            mode="markers",
            marker={"color": CHOSEN, "size": 16, "symbol": "star", "line": {"color": GREY, "width": 1}},
            name="chosen",
            hovertemplate=hover,
        )
    if budget:
        limit_line(figure, budget, "largest effect within the limit", x=0.55, xanchor="auto", log=True)
    figure.update_layout(template=theme(), height=440)
    figure.update_xaxes(title_text=TITLES[cost])
    figure.update_yaxes(
        title_text=TITLES["effect"], type="log", exponentformat="power", minexponent=1, dtick=1
    )
    return figure


FORMS = {
    "linear": "fit: loss in proportion to effect",
    "square root": "fit: loss as the root of effect",
}
"""Form of a `Relation` -> what a curve of it says; on a logarithmic axis a proportion is a curve too."""


def relation_plot(
    relation: Any, predictions: pd.DataFrame | None = None, limit_percent: float | None = None
) -> go.Figure:
    """Upper end of the quality loss against the predicted effect: plans that were tried, the fit, and the limit.

    Args:
        relation: from `precision.fit_relation`.
        predictions: `Chosen.predictions()`, whose last row is the chosen plan.
    """
    points = relation.points
    largest = points["predicted"].max()
    least = min(
        points["predicted"].min(),
        *(predictions["predicted_effect"] if predictions is not None else [largest]),
    )
    xs = [least * (largest / least) ** (i / 60) for i in range(61)] if largest > least else [largest]
    figure = go.Figure()
    figure.add_scatter(
        x=xs,
        y=[relation.upper_percent(x) for x in xs],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        name=f"{FORMS.get(relation.form, relation.form)}, {relation.residual_percent:.2g} % of loss off",
        hoverinfo="skip",
    )
    hover = "%{text}<br>effect %{x:.2g}<br>upper end %{y:.2f} %<extra></extra>"
    figure.add_scatter(
        x=points["predicted"].tolist(),
        y=points["upper_percent"].tolist(),
        text=points["plan"].tolist(),
        mode="markers",
        marker={"color": CHOSEN, "size": 10},
        name="plans tried",
        hovertemplate=hover,
    )
    if predictions is not None:
        last = predictions.iloc[-1]
        figure.add_scatter(
            x=[last["predicted_effect"]],
            y=[last["upper_percent"]],
            text=[last["plan"]],
            mode="markers",
            marker={"color": CHOSEN, "size": 16, "symbol": "star", "line": {"color": GREY, "width": 1}},
            name="chosen",
            hovertemplate=hover,
        )
    if limit_percent:
        limit_line(figure, limit_percent, "limit", x=0.0, xanchor="left")
    figure.update_layout(template=theme(), height=360)
    figure.update_xaxes(
        title_text=TITLES["effect"], type="log", exponentformat="power", minexponent=1, dtick=1
    )
    figure.update_yaxes(title_text="quality loss, upper end (%)")
    return figure


def format_map(selection: Any) -> go.Figure:
    """The format of every layer: a row per projection, a column per block, a panel per expert; steps in the hover text.

    Args:
        selection: from `precision.select_plan`.
    """
    frame = selection.frame.dropna(subset=["block"])
    components = list(dict.fromkeys(frame["component"]))
    formats = sorted(set(frame["format"]), key=lambda name: (name != "default", name))
    projections = sorted(set(frame["projection"]))
    blocks = sorted(set(frame["block"].astype(int)))
    figure = make_subplots(
        rows=1,
        cols=len(components),
        subplot_titles=[NAMES.get(name, name) for name in components],
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    shades = {name: _shade(name, index) for index, name in enumerate(formats)}
    for column, component in enumerate(components, 1):
        own = frame[frame["component"] == component]
        table: list[list[int | None]] = [[None] * len(blocks) for _ in projections]
        words = [[""] * len(blocks) for _ in projections]
        for (projection, block), rows in own.groupby(["projection", "block"]):
            line, place = projections.index(projection), blocks.index(int(block))
            # Where the format changes with the step, the first is drawn.
            table[line][place] = formats.index(rows["format"].iloc[0])
            words[line][place] = ", ".join(dict.fromkeys(rows["format"]))
        steps = [
            [i / len(formats) + at, shades[name]]
            for i, name in enumerate(formats)
            for at in (0, 1 / len(formats))
        ]
        figure.add_heatmap(
            x=[str(block) for block in blocks],
            y=projections,
            z=table,
            customdata=words,
            zmin=-0.5,
            zmax=len(formats) - 0.5,
            colorscale=steps,
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="block %{x}, %{y}<br>%{customdata}<extra></extra>",
            row=1,
            col=column,
        )
    for name in formats:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": shades[name], "symbol": "square", "size": 11},
            name=name,
        )
    figure.update_layout(
        template=theme(),
        height=150 + int(0.7 * ROW_PX * len(projections)),
        margin={"t": 70},
        legend={"y": 1.1},
    )
    figure.update_xaxes(title_text="block", type="category", nticks=10)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_annotations(font={"size": 13})
    return figure


def _shade(name: str, index: int) -> str:
    """Colour of a format; paler for weight-only and per-channel formats, which have the colour of their numeric type."""
    if name == "default":
        return "#9aa3ad"
    base = colour(name)
    if "-" not in name:
        return base
    red, green, blue = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    mix = 0.4 if "weight" in name and "int4" not in name else 0.0 if "int4" in name else 0.35
    return f"rgb({', '.join(str(round(c + (255 - c) * mix)) for c in (red, green, blue))})"


BESIDE_LINE = 3.0
"""A name is kept off a line where its mark's value is within this factor of it: about two lines of text."""


def _sides(xs: list[float], ys: list[float], line: float | None = None) -> list[str]:
    """Position of each name: alternately above and below where marks are near each other, and away from a level line.

    Args:
        line: where a level line lies on the logarithmic axis, None without one.
    """
    middle = (min(xs) + max(xs)) / 2 if xs else 0
    sides: list[str] = []
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        near = (
            index and abs(x - xs[index - 1]) < 0.15 * (max(xs) - min(xs) or 1) and 0.5 < y / ys[index - 1] < 2
        )
        up = "bottom" if near and sides[-1].startswith("top") else "top"
        if line and 1 / BESIDE_LINE < y / line < BESIDE_LINE:
            up = "top" if y >= line else "bottom"
        sides.append(f"{up} {'right' if x <= middle else 'left'}")
    return sides
