"""Machines and engines side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.plots.style import ROW_PX, colour, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def platform_bars(df: pd.DataFrame) -> go.Figure:
    """Latency per machine and engine as bars on a logarithmic axis; engines that were only built have no bar.

    Args:
        df: columns machine, engine, precision, state, latency_ms, ratio_to_eager and build_ms, as
            `measure.platform_table` gives.
    """
    import math

    import plotly.graph_objects as go

    needs(df, "platform_bars", "machine", "engine", "precision", "state", "latency_ms", "ratio_to_eager")
    rows = df.to_dict(orient="records")
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    rows.sort(key=lambda row: machines.index(row["machine"]))
    figure = go.Figure()
    places = [[row["machine"] for row in rows], [f"{row['engine']} {row['precision']}" for row in rows]]
    texts = [_text(row) for row in rows]
    known = [row["latency_ms"] for row in rows if not math.isnan(row["latency_ms"])]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    floor = low / 3
    figure.add_bar(
        x=[floor * 1.05 if math.isnan(row["latency_ms"]) else row["latency_ms"] for row in rows],
        y=places,
        orientation="h",
        text=texts,
        textposition="outside",
        cliponaxis=False,
        marker={
            "color": [
                "rgba(0,0,0,0)" if math.isnan(row["latency_ms"]) else colour(row["engine"]) for row in rows
            ]
        },
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(
        template=theme(), height=110 + ROW_PX * max(len(rows), 1), showlegend=False, margin={"r": 20}
    )
    # Room for the text behind the longest bar.
    reach = (math.log10(high) - math.log10(floor)) * 2.0
    figure.update_xaxes(
        type="log",
        range=[math.log10(floor), math.log10(floor) + max(reach, 0.5)],
        title_text="latency (ms), logarithmic",
        dtick="D2" if high / floor < 100 else 1,  # 1, 2, 5 where the axis is short
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, showdividers=False)
    return figure


def _text(row: dict) -> str:
    if row["latency_ms"] != row["latency_ms"]:
        build = row.get("build_ms")
        took = f" in {build / 1e3:,.1f} s" if build == build and build else ""
        return f"built{took}, not executed"
    ratio = row["ratio_to_eager"]
    if row["engine"] == "eager" or ratio != ratio:
        return f"{row['latency_ms']:,.1f} ms"
    said = f"{ratio:.2f}x as fast as eager" if ratio >= 1 else f"{1 / ratio:.2f}x slower than eager"
    return f"{row['latency_ms']:,.1f} ms · {said}"
