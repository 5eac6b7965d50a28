"""One theme, and one colour per component, engine and format everywhere.

The theme has no background and middle-grey text, so a figure reads on a white page and on a dark one.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from wanlab.core.errors import WanlabError
from wanlab.core.formats import format_colours
from wanlab.core.words import NAMES, UNITS, label  # noqa: F401  (part of this module's face)
from wanlab.engines.registry import ENGINES, engine_text, kind_of_label

COMPONENT_COLOURS = {
    "text_encoder": "#9154ff",
    "text_encoder_2": "#b18eff",
    "text_encoder_3": "#dfacfd",
    "image_encoder": "#3cb1b3",
    "vae_encoder": "#2ddb99",
    "expert": "#d38400",
    "expert_high": "#d9534f",
    "expert_low": "#e8a33d",
    "vae_decoder": "#3d85c6",
    "other": "#cbd8e2",
}
CATEGORY_COLOURS = {
    "self_attention": "#3d85c6",
    "cross_attention": "#8f7ffa",
    "linear": "#e07b39",
    "norm_modulation_rotary": "#1ace82",
    "expert_switching": "#eb4269",
    "vae_encoder": "#4ead9f",
    "vae_decoder": "#c848a0",
    "text_encoder": "#8cea8f",
    "communication": "#94a7f1",
    "other": "#b7bcc4",
    "host_device_transfer": "#d0b219",
    "memory_allocation": "#a4700e",
    "launch_and_idle": "#cdd7e2",
}
"""Apart from one another for readers who do not tell red from green or blue from yellow too; a test measures it."""
FORMAT_COLOURS = format_colours()
OTHERS = ("#3d85c6", "#e07b39", "#3fa796", "#b0679b", "#e8a33d", "#8b7ec8", "#d9534f", "#6fa832")
GREY, LINE = "#808a95", "rgba(128,138,149,0.28)"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif'
INSIDE = "#0b0e12"  # text inside a bar: every colour here is light enough for it, in dark mode too
ROW_PX = 34


def engine_colours() -> dict[str, str]:
    """Engine -> colour."""
    return {kind.name: kind.colour for kind in ENGINES.values()}


def colour(name: str) -> str:
    """The colour of a component, engine or format; a name such as "onnxruntime FP16" takes its engine's.

    A name that is none of them gets a stable colour of its own.
    """
    plain = str(name).lower()
    if plain in COMPONENT_COLOURS:
        return COMPONENT_COLOURS[plain]
    if kind := kind_of_label(plain):
        return kind.colour
    for kind in sorted(ENGINES.values(), key=lambda kind: -len(kind.title)):  # one may begin as another
        for title in (kind.title.lower(), kind.title.lower().replace(" ", "-")):
            plain = plain.replace(title, kind.name)
    words = {*re.split(r"[^a-z0-9]+", plain), *re.split(r"[^a-z0-9_]+", plain)}
    for table in (engine_colours(), FORMAT_COLOURS):
        for known, value in table.items():
            if known in words:
                return value
    return OTHERS[sum(plain.encode()) % len(OTHERS)]


@functools.cache
def theme() -> str:
    """Register the plotly template and return its name."""
    axis = {
        "gridcolor": LINE,
        "zerolinecolor": LINE,
        "linecolor": LINE,
        "ticks": "",
        "automargin": True,
        "exponentformat": "none",  # 70,000 and not 70k, which before "ms" is read as a unit
        "separatethousands": True,
        "title": {"standoff": 10, "font": {"size": 13}},
    }
    pio.templates["wanlab"] = go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": GREY},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(OTHERS),
            "margin": {"l": 10, "r": 10, "t": 20, "b": 10},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": {"text": ""}},
            "hoverlabel": {"font": {"family": FONT, "size": 13}},
            "bargap": 0.28,
        },
        data={"bar": [{"marker": {"line": {"width": 0}}, "insidetextfont": {"color": INSIDE}}]},
    )
    return "wanlab"


def needs(df: Any, function: str, *columns: str) -> None:
    """Refuse a table that lacks columns, with their names."""
    missing = [column for column in columns if column not in getattr(df, "columns", ())]
    if missing:
        raise WanlabError(f"{function} needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")


def variant_name(variant: str) -> str:
    """A label of an engine for readers, "eager (again)" as "eager PyTorch (again)"; any other label as it is."""
    engine, space, remark = variant.partition(" (")
    known = "," not in engine and kind_of_label(engine)
    return f"{engine_text(engine)}{space}{remark}" if known else variant


def limit_line(
    figure: go.Figure, y: float, text: str, *, x: float = 1.0, xanchor: str = "right", log: bool = False
) -> None:
    """A dashed horizontal line with its name above it.

    Args:
        y: where it lies, in the unit of the axis.
        x: place of the name, as a share of the width. xanchor: its side that lies there.
        log: whether the axis is logarithmic, of which annotations have the exponent.
    """
    figure.add_hline(y=y, line={"color": GREY, "dash": "dash", "width": 1.2}, layer="below")
    figure.add_annotation(
        x=x,
        xref="x domain",
        y=math.log10(y) if log else y,
        text=text,
        showarrow=False,
        yanchor="bottom",
        xanchor=xanchor,
    )
