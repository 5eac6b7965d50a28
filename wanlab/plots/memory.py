"""Memory: what the peak is made of, who holds how much when, and what the levers save."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from wanlab.core.errors import WanlabError
from wanlab.diagnose.memory.account import PART_NAMES as PART_NAMES
from wanlab.plots.style import NAMES, OTHERS, ROW_PX, colour, theme

_COMPONENTS = (
    "text_encoder",
    "vae_encoder",
    "vae",
    "expert",
    "expert_high",
    "expert_low",
    "vae_decoder",
    "outside",
)


def memory_bars(account: Any) -> go.Figure:
    """The peak as bars that add up, a bar per part, divided by component.

    Args:
        account: `diagnose.MemoryAccount`.
    """
    table, (scale, unit) = account.frame, _unit(account.peak_bytes)
    sums = table.groupby("part")["size_bytes"].sum().sort_values(ascending=False)
    figure = go.Figure()
    for component in [name for name in _COMPONENTS if name in set(table["component"])]:
        mine = table[table["component"] == component]
        figure.add_bar(
            x=(mine["size_bytes"] / scale).tolist(),
            y=[PART_NAMES[part] for part in mine["part"]],
            orientation="h",
            name=_name(component),
            marker={"color": _colour(component)},
            hovertemplate=f"%{{y}}, %{{fullData.name}}: %{{x:,.3f}} {unit}<extra></extra>",
        )
    for part, size in sums.items():
        text = f"{size / scale:,.2f} {unit} · {100 * size / account.peak_bytes:.1f} %"
        figure.add_annotation(
            x=max(size, 0) / scale, y=PART_NAMES[part], text=text, xanchor="left", xshift=4, showarrow=False
        )
    figure.update_layout(template=theme(), barmode="stack", height=110 + ROW_PX * len(sums), margin={"t": 40})
    figure.update_xaxes(
        title_text=f"{unit}; together {account.peak_bytes / scale:,.2f} at the peak",
        range=[0, 1.35 * float(sums.max()) / scale],
    )
    order = [PART_NAMES[part] for part in sums.index]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    return figure


def memory_timeline(account: Any) -> go.Figure:
    """What was allocated over time, by the component that asked for it, above what was there before; the peak marked.

    Args:
        account: `diagnose.MemoryAccount`.
    """
    table, (scale, unit) = account.timeline, _unit(account.peak_bytes)
    seconds = table["time_ms"] / 1e3
    figure = go.Figure()
    for name in ["before", *(name for name in _COMPONENTS if name in table)]:
        figure.add_scatter(
            x=seconds.tolist(),
            y=(table[name] / scale).tolist(),
            stackgroup="held",
            mode="lines",
            name="there before: weights" if name == "before" else _name(name),
            line={"width": 0.5, "shape": "hv", "color": "#c3c9d0" if name == "before" else _colour(name)},
            hovertemplate=f"%{{y:,.2f}} {unit}<extra>%{{fullData.name}}</extra>",
        )
    figure.add_vline(x=account.peak_ms / 1e3, line={"color": "#d9534f", "width": 1.5, "dash": "dot"})
    figure.add_annotation(
        x=account.peak_ms / 1e3, yref="paper", y=1.0, text="peak", showarrow=False, xanchor="right", xshift=-4
    )
    figure.update_layout(template=theme(), height=380, margin={"t": 50}, hovermode="x unified")
    figure.update_xaxes(title_text="time in the profile (s)")
    figure.update_yaxes(title_text=f"allocated ({unit})", rangemode="tozero")
    return figure


def memory_option_bars(table: Any) -> go.Figure:
    """What each lever saves, beside what it costs in time; levers within the noise are grey.

    Args:
        table: as `diagnose.memory_options` gives it.

    Raises:
        WanlabError: no lever was measured.
    """
    measured = table[table["state"] == "measured"]
    if measured.empty:
        raise WanlabError("no lever was measured; see the reasons in the table")
    scale, unit = _unit(float(table["peak_gib"].max()) * 2**30)
    saved = measured["saved_gib"] * 2**30 / scale
    slower = [
        f"{value:,.2f} {unit}, takes {ratio:.2f}x the time"
        for value, ratio in zip(saved, measured["time_ratio"], strict=True)
    ]
    figure = go.Figure(
        go.Bar(
            x=saved.tolist(),
            y=measured["lever"].tolist(),
            orientation="h",
            text=slower,
            textposition="outside",
            cliponaxis=False,
            marker={"color": [OTHERS[2] if saves else "#9aa3ad" for saves in measured["saves"]]},
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    noise = float(table["noise_gib"].max()) * 2**30 / scale
    figure.update_layout(template=theme(), height=80 + ROW_PX * len(measured), showlegend=False)
    low, high = min(0.0, saved.min()), max(saved.max(), noise)
    figure.update_xaxes(
        title_text=f"saved of the peak ({unit}); noise {noise:,.3f} {unit}",
        range=[low - 0.05 * (high - low or 1), high + 0.75 * (high - low or 1)],
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _unit(most_bytes: float) -> tuple[int, str]:
    return (1 << 30, "GiB") if most_bytes >= 1 << 30 else (1 << 20, "MiB")


def _name(component: str) -> str:
    return {"outside": "outside of all", "vae": "VAE"}.get(component, NAMES.get(component, component))


def _colour(component: str) -> str:
    return colour({"outside": "other", "vae": "vae_decoder"}.get(component, component))
