"""Where time went, sample by sample, and before beside after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.plots.style import NAMES, ROW_PX, colour, label, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def breakdown_bar(df: pd.DataFrame) -> go.Figure:
    """Time per component as bars, each with its milliseconds and its share.

    Args:
        df: columns component, time_ms and, if known, share_percent and calls; as `StageRecorder.breakdown`
            gives.
    """
    import plotly.graph_objects as go

    needs(df, "breakdown_bar", "component", "time_ms")
    total = float(df["time_ms"].sum())
    share = df["share_percent"] if "share_percent" in df else 100.0 * df["time_ms"] / (total or 1.0)
    calls = df["calls"] if "calls" in df else [None] * len(df)
    names = [NAMES.get(name, str(name)) for name in df["component"]]
    texts = [f"{ms:,.1f} ms · {part:.1f} %" for ms, part in zip(df["time_ms"], share, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=df["time_ms"].tolist(),
            y=names,
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": [colour(name) for name in df["component"]]},
            customdata=[["" if c is None else f"<br>{c} calls"] for c in calls],
            hovertemplate="%{y}<br>%{text}%{customdata[0]}<extra></extra>",
        )
    )
    longest = float(df["time_ms"].max()) if len(df) else 1.0
    figure.update_layout(template=theme(), height=70 + ROW_PX * max(len(df), 1), showlegend=False)
    # Room for the text behind the longest bar.
    figure.update_xaxes(title_text="time (ms)", range=[0, longest * 1.32 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def samples_strip(samples: Sequence[Any]) -> go.Figure:
    """Every sample of each timing as a dot, in order, with the median as a line.

    Args:
        samples: `Samples`, each with `label`, `values_ms` and `median`.
    """
    import plotly.graph_objects as go

    if not samples:
        raise WanlabError("samples_strip needs at least one timing")
    figure = go.Figure()
    for row, sample in enumerate(samples):
        tint = colour(sample.label)
        n = len(sample.values_ms)
        # Spread by order, so that a drift shows as a slope.
        spread = [row + 0.5 * ((i + 0.5) / n - 0.5) for i in range(n)]
        figure.add_trace(
            go.Scatter(
                x=list(sample.values_ms),
                y=spread,
                mode="markers",
                name=sample.label,
                marker={"color": tint, "size": 7, "opacity": 0.7},
                customdata=[[i + 1, n] for i in range(n)],
                hovertemplate="%{x:.3f} ms<br>sample %{customdata[0]} of %{customdata[1]}"
                "<extra>%{fullData.name}</extra>",
            )
        )
        figure.add_shape(
            type="line",
            x0=sample.median,
            x1=sample.median,
            y0=row - 0.36,
            y1=row + 0.36,
            line={"color": tint, "width": 3},
        )
        figure.add_annotation(
            x=sample.median, y=row - 0.42, text=f"{sample.median:,.2f} ms", showarrow=False, yanchor="bottom"
        )
    figure.update_layout(template=theme(), height=80 + 64 * len(samples), showlegend=False)
    figure.update_xaxes(title_text="time (ms), median marked")
    figure.update_yaxes(
        tickvals=list(range(len(samples))),
        ticktext=[sample.label for sample in samples],
        range=[len(samples) - 0.5, -0.7],
        showgrid=False,
        zeroline=False,
    )
    return figure


def before_after_bars(df: pd.DataFrame) -> go.Figure:
    """One small panel per measure, one bar per row, with the ratio to the first row.

    Args:
        df: the first column names what is compared ("eager", "onnxruntime", ...), the first row is the
            baseline; each numeric column is a measure with its unit in its name (frame_ms, load_ms).
    """
    import pandas as pd
    from plotly.subplots import make_subplots

    measures = [c for c in df.columns[1:] if pd.api.types.is_numeric_dtype(df[c]) and df[c].notna().any()]
    if df.empty or not measures:
        raise WanlabError(
            "before_after_bars needs a column of names, at least one row and one numeric column"
        )
    across = len(measures) if len(measures) <= 4 else 3
    down = -(-len(measures) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[label(measure) for measure in measures],
        vertical_spacing=0.32 / down,
        horizontal_spacing=0.07,
    )
    names = [str(name) for name in df.iloc[:, 0]]
    for index, measure in enumerate(measures):
        values = [float(value) for value in df[measure]]
        place = {"row": index // across + 1, "col": index % across + 1}
        figure.add_bar(
            x=names,
            y=values,
            text=[_with_ratio(value, values[0]) for value in values],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [colour(name) for name in names]},
            hovertemplate="%{x}<br>%{text}<extra></extra>",
            showlegend=False,
            **place,
        )
        top = max((value for value in values if value == value), default=1.0)
        figure.update_yaxes(range=[0, top * 1.3 or 1.0], showticklabels=False, showgrid=False, **place)
    figure.update_layout(template=theme(), height=60 + 240 * down, margin={"t": 40})
    figure.update_annotations(font={"size": 13})
    return figure


def _with_ratio(value: float, baseline: float) -> str:
    if value != value:
        return ""
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if value == baseline or not value or not baseline:
        return shown
    ratio = baseline / value
    return f"{shown}<br>{ratio:.2f}× less" if ratio > 1 else f"{shown}<br>{1 / ratio:.2f}× more"


def schedule_timeline(df: pd.DataFrame) -> go.Figure:
    """Which component ran when, as a bar from its start to its end.

    Args:
        df: columns component, start_ms, time_ms and, for experts, step, timestep and branch; as
            `StageRecorder.frame` gives.
    """
    import pandas as pd
    import plotly.graph_objects as go

    needs(df, "schedule_timeline", "component", "start_ms", "time_ms")
    names = list(dict.fromkeys(df["component"]))
    figure = go.Figure()
    for name in names:
        part = df[df["component"] == name]
        notes = []
        for row in part.to_dict(orient="records"):
            known = [(key, row.get(key)) for key in ("step", "timestep", "branch")]
            notes.append(
                "".join(f"<br>{key} {_number(v)}" for key, v in known if v is not None and not pd.isna(v))
            )
        figure.add_bar(
            x=part["time_ms"].tolist(),
            base=part["start_ms"].tolist(),
            y=[NAMES.get(name, str(name))] * len(part),
            orientation="h",
            name=NAMES.get(name, str(name)),
            marker={"color": colour(name), "line": {"width": 0.5, "color": "rgba(255,255,255,0.35)"}},
            customdata=[[note] for note in notes],
            hovertemplate="%{x:.1f} ms from %{base:.0f} ms%{customdata[0]}<extra>%{fullData.name}</extra>",
            showlegend=False,
        )
    figure.update_layout(template=theme(), height=80 + ROW_PX * max(len(names), 1), barmode="overlay")
    figure.update_xaxes(title_text="time since the start (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
