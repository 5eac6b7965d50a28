from __future__ import annotations

import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from wanlab import plots
from wanlab.core.errors import WanlabError
from wanlab.measure import COMPONENTS, OTHER, Samples
from wanlab.plots.style import CATEGORY_COLOURS


def as_json(figure) -> dict:
    """As a report stores it; also proof that it is plain JSON."""
    return json.loads(figure.to_json())


def test_every_component_has_its_own_colour_and_name():
    names = [*COMPONENTS, OTHER]
    assert set(names) <= set(plots.COMPONENT_COLOURS)
    assert set(names) <= set(plots.NAMES)
    assert len(set(plots.COMPONENT_COLOURS.values())) == len(plots.COMPONENT_COLOURS)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("ONNX Runtime", "onnxruntime"),
        ("onnxruntime FP16", "onnxruntime"),
        ("eager FP32", "eager"),
        ("FP8 plan", "fp8"),
        ("Eager", "eager"),
    ],
)
def test_colours_follow_the_engine_then_the_format(name, same):
    assert plots.colour(name) == plots.colour(same)


def test_unknown_names_keep_one_colour():
    assert plots.colour("mine") == plots.colour("mine")
    assert plots.colour("mine") in plots.OTHERS


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("peak_memory_gib", "peak memory (GiB)"),
        ("time_ms", "time (ms)"),
        ("throughput_frames_per_s", "throughput (frames/s)"),
        ("calls", "calls"),
        ("quality_loss_percent", "quality loss (%)"),
    ],
)
def test_units_come_from_the_name(column, words):
    assert plots.label(column) == words


def test_breakdown_bar_shows_times_and_shares():
    df = pd.DataFrame({"component": ["expert_high", "other"], "time_ms": [75.0, 25.0], "calls": [4, 0]})
    figure = plots.breakdown_bar(df)
    assert list(figure.data[0].x) == [75.0, 25.0]
    assert figure.data[0].text[0] == "75 ms · 75 %"
    assert figure.data[0].marker.color[0] == plots.COMPONENT_COLOURS["expert_high"]
    assert as_json(figure)["layout"]["height"] > 0


def test_samples_strip_keeps_every_sample():
    figure = plots.samples_strip([Samples("eager", (1.0, 2.0, 3.0)), Samples("onnxruntime", (0.5, 0.6))])
    assert [list(trace.x) for trace in figure.data] == [[1.0, 2.0, 3.0], [0.5, 0.6]]
    assert figure.layout.shapes[0].x0 == 2.0
    as_json(figure)
    with pytest.raises(WanlabError, match="at least one"):
        plots.samples_strip([])


def test_before_after_bars_shows_ratios_to_the_first_row():
    df = pd.DataFrame(
        {
            "engine": ["eager", "onnxruntime"],
            "frame_ms": [100.0, 40.0],
            "load_ms": [10.0, 20.0],
            "note": ["a", "b"],
        }
    )
    figure = plots.before_after_bars(df)
    assert [trace.text[1] for trace in figure.data] == ["40 · 2.50× less", "20 · 2.00× more"]
    assert [a.text for a in figure.layout.annotations] == ["frame (ms)", "load (ms)"]
    as_json(figure)
    with pytest.raises(WanlabError, match="one numeric column"):
        plots.before_after_bars(pd.DataFrame({"engine": ["a"], "note": ["b"]}))


def scores(backbone="stlpips-alex"):
    rows = [(f, "lpips", backbone, 0.01 * f) for f in range(3)] + [
        (f, "psnr", "-", float("inf")) for f in range(3)
    ]
    return SimpleNamespace(per_frame=pd.DataFrame(rows, columns=["frame", "metric", "backbone", "value"]))


def test_per_frame_curves_names_the_backbone():
    figure = plots.per_frame_curves(scores())
    assert [a.text for a in figure.layout.annotations] == ["LPIPS, stlpips-alex", "PSNR (dB)"]
    assert list(figure.data[0].y) == [0.0, 0.01, 0.02]
    assert list(figure.data[1].y) == [None] * 3
    as_json(figure)
    assert len(plots.per_frame_curves({"a": scores(), "b": scores()}).data) == 4


def test_backbones_are_never_mixed_in_a_figure():
    with pytest.raises(WanlabError, match="different backbones"):
        plots.per_frame_curves({"a": scores(), "b": scores("lpips-vgg")})


def test_schedule_timeline_places_calls_by_time():
    df = pd.DataFrame(
        {
            "component": ["text_encoder", "expert_high", "expert_low"],
            "start_ms": [0.0, 10.0, 30.0],
            "time_ms": [8.0, 20.0, 5.0],
            "step": pd.array([None, 0, 1], dtype="Int64"),
            "timestep": pd.array([None, 999.0, 800.0], dtype="Float64"),
            "branch": [None, "cond", "cond"],
        }
    )
    figure = plots.schedule_timeline(df)
    assert [list(t.base) for t in figure.data] == [[0.0], [10.0], [30.0]]
    assert figure.data[0].customdata[0][0] == ""
    assert "timestep 999" in figure.data[1].customdata[0][0]
    as_json(figure)


@pytest.mark.parametrize("function", [plots.breakdown_bar, plots.schedule_timeline, plots.per_frame_curves])
def test_missing_columns_are_named(function):
    with pytest.raises(WanlabError, match="needs the columns"):
        function(pd.DataFrame({"x": [1]}))


def test_theme_has_no_background():
    import plotly.io as pio

    layout = pio.templates[plots.theme()].layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"


# Machado, Oliveira, Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009, severity 1.
SIGHTS = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
TO_OKLAB = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766]]  # fmt: skip


def seen(colour: str, sight: str) -> np.ndarray:
    """A colour in Oklab (Ottosson, 2020), as a reader with that sight sees it."""
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    light = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return TO_OKLAB @ np.cbrt(np.array(TO_CONES) @ np.clip(np.array(SIGHTS[sight]) @ light, 0, 1))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("table", [CATEGORY_COLOURS, plots.COMPONENT_COLOURS])
def test_colours_are_told_apart_by_readers_who_do_not_see_all(table, sight):
    """Three times the 0.02 or so of Oklab that is just seen."""
    pairs = {
        (one, other): float(np.linalg.norm(seen(table[one], sight) - seen(table[other], sight)))
        for one, other in combinations(table, 2)
    }
    nearest = min(pairs, key=pairs.__getitem__)
    assert pairs[nearest] >= 0.06, nearest
