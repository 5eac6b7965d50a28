"""The wall clock of a trace by category and component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.plots.style import NAMES, ROW_PX, colour, theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

CATEGORY_NAMES = {
    "self_attention": "self-attention",
    "cross_attention": "cross-attention",
    "linear": "linear layers",
    "norm_modulation_rotary": "norm, modulation, rotary",
    "expert_switching": "expert selection, switching",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
    "text_encoder": "text encoder",
    "communication": "between GPUs",
    "host_device_transfer": "host-device transfer",
    "memory_allocation": "memory allocation",
    "launch_and_idle": "launch overhead, idle",
    "other": "other",
}


def category_bars(breakdown: Any) -> go.Figure:
    """Where the wall clock went: a bar per category, divided by component; what ran beside it behind, hatched.

    Args:
        breakdown: `diagnose.Breakdown`.
    """
    import plotly.graph_objects as go

    table, parts = breakdown.frame, breakdown.parts
    order = [CATEGORY_NAMES.get(name, name) for name in table["category"]]
    figure = go.Figure()
    for component in parts["component"].unique():
        mine = parts[parts["component"] == component]
        shown = "other" if component == "outside" else component
        figure.add_bar(
            x=mine["time_ms"].tolist(),
            y=[CATEGORY_NAMES.get(name, name) for name in mine["category"]],
            orientation="h",
            name="outside of all" if component == "outside" else NAMES.get(component, component),
            marker={"color": colour(shown)},
            hovertemplate="%{y}, %{fullData.name}: %{x:,.2f} ms<extra></extra>",
        )
    hidden = table[table["hidden_ms"] > 0.001 * breakdown.wall_ms]
    if len(hidden):
        figure.add_bar(
            x=hidden["hidden_ms"].tolist(),
            y=[CATEGORY_NAMES.get(name, name) for name in hidden["category"]],
            orientation="h",
            name="beside other work",
            marker={"color": "rgba(128,138,149,0.25)", "pattern": {"shape": "/"}},
            hovertemplate="%{y}: %{x:,.2f} ms more, beside other work<extra></extra>",
        )
    ends = table["time_ms"] + hidden["hidden_ms"].reindex(table.index, fill_value=0.0)
    for name, end, time_ms, share in zip(order, ends, table["time_ms"], table["share_percent"], strict=True):
        figure.add_annotation(
            x=end, y=name, text=f"{_time(time_ms)} · {share:.1f} %", xanchor="left", xshift=4, showarrow=False
        )
    figure.update_layout(
        template=theme(), barmode="stack", height=110 + ROW_PX * len(order), margin={"t": 40}
    )
    figure.update_xaxes(title_text="wall clock (ms)", range=[0, 1.3 * float(ends.max())])
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    return figure


def _time(time_ms: float) -> str:
    return f"{time_ms / 1e3:,.2f} s" if time_ms >= 1e4 else f"{time_ms:,.1f} ms"
