"""Benchmarks of engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.plots.style import GREY, NAMES, ROW_PX, colour, label, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

STRETCHES = ("h2d", "device", "d2h")
COPIES = {"h2d": "copy to the device", "d2h": "copy back"}


def bench_bars(df: pd.DataFrame) -> go.Figure:
    """One bar per benchmark: its median latency, on a GPU in its stretches, with the speed-up over the baseline.

    Args:
        df: columns engine, latency_ms and, where they were measured, h2d_ms, device_ms, d2h_ms, speedup, verdict,
            component; as `measure.bench_table` and `convert.bench_components` give.
    """
    import plotly.graph_objects as go

    needs(df, "bench_bars", "engine", "latency_ms")
    rows = df.to_dict(orient="records")
    places = [_names(rows, "component"), _names(rows, "engine")]
    y = places if "component" in df else places[1]
    figure = go.Figure()
    parts = [name for name in STRETCHES if f"{name}_ms" in df] or ["latency"]
    for name in parts:
        copies = name in COPIES
        figure.add_bar(
            x=[row[f"{name}_ms"] for row in rows],
            y=y,
            orientation="h",
            name=COPIES.get(name, "computing" if name == "device" else "latency"),
            marker={"color": GREY if copies else [colour(row["engine"]) for row in rows]},
            hovertemplate="%{x:,.3f} ms<extra>%{fullData.name}</extra>",
            text=[_text(row) for row in rows] if name == parts[-1] else None,
            textposition="outside",
            cliponaxis=False,
        )
    longest = max(row["latency_ms"] for row in rows)
    figure.update_layout(
        template=theme(), barmode="stack", height=80 + ROW_PX * len(rows), showlegend=False, margin={"r": 20}
    )
    # Room for the text behind the longest bar.
    figure.update_xaxes(title_text="latency (ms), median", range=[0, longest * 1.5 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False, showdividers=False)
    return figure


def operator_bars(df: pd.DataFrame, top: int = 10) -> go.Figure:
    """Operators that an engine spends most time in, as bars with their share and number of nodes.

    Args:
        df: columns operator, nodes, time_ms, share_percent, longest first; as `convert.operator_times` gives.
        top: bars; what is left is one more, named "others".
    """
    import pandas as pd
    import plotly.graph_objects as go

    needs(df, "operator_bars", "operator", "nodes", "time_ms", "share_percent")
    shown, rest = df.head(top), df.iloc[top:]
    if len(rest):
        sums = rest[["nodes", "time_ms", "share_percent"]].sum().to_dict()
        shown = pd.concat([shown, pd.DataFrame([{"operator": f"{len(rest)} others"} | sums])])
    texts = [
        f"{row.time_ms:,.2f} ms · {row.share_percent:.1f} % · {row.nodes:,.0f} node{'s' * (row.nodes != 1)}"
        for row in shown.itertuples()
    ]
    figure = go.Figure(
        go.Bar(
            x=shown["time_ms"].tolist(),
            y=shown["operator"].tolist(),
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": colour("onnxruntime")},
            hovertemplate="%{y}<br>%{text}<extra></extra>",
        )
    )
    figure.update_layout(template=theme(), height=70 + 28 * len(shown), showlegend=False)
    longest = float(shown["time_ms"].max()) if len(shown) else 1.0
    figure.update_xaxes(title_text=label("time_ms"), range=[0, longest * 1.5 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _names(rows: list[dict], key: str) -> list[str]:
    return [NAMES.get(row.get(key), str(row.get(key, ""))) for row in rows]


def _text(row: dict) -> str:
    shown = f"{row['latency_ms']:,.2f} ms"
    if "speedup" not in row or row.get("verdict") == "baseline":
        return shown
    return f"{shown} · {row['speedup']:.2f}x, {row['verdict']}"
