"""Dots with intervals, of a kind that a phone can show."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from wanlab import plots
from wanlab.core.errors import WanlabError

FRAME = pd.DataFrame(
    {
        "name": ["a <b>", "b", "c"],
        "value": [1.0, 2.5, math.nan],
        "low": [0.9, math.nan, 1.0],
        "high": [1.2, math.nan, 2.0],
    }
)


def test_every_known_row_has_its_figure_and_its_interval():
    figure = plots.interval_rows(FRAME, unit="ms", reference=1.0, reference_text="baseline", limit=2.0)
    assert [trace.x[0] for trace in figure.data] == [1.0, 2.5]
    texts = [note.text for note in figure.layout.annotations]
    assert texts[:2] == [
        "<b>1.00 ms</b> (0.90 to 1.20) a &lt;b>",
        "<b>2.50 ms</b> (interval unknown) b",
    ]
    assert texts[2:] == ["baseline", "limit"]
    assert figure.data[0].error_x.array[0] == pytest.approx(0.2)
    assert figure.data[0].error_x.arrayminus[0] == pytest.approx(0.1)
    assert figure.data[1].error_x.array[0] == 0


def test_no_more_rows_are_drawn_than_a_first_screen_holds():
    many = pd.DataFrame({"name": list("abcdefghij"), "value": range(1, 11)})
    figure = plots.interval_rows(many)
    assert len(figure.data) == 7
    assert figure.layout.height <= 420


def test_a_short_logarithmic_axis_has_ticks_within_a_decade():
    figure = plots.interval_rows(FRAME.head(1), log=True)
    assert {"0.5", "1", "2"} <= set(figure.layout.xaxis.ticktext)
    wide = plots.interval_rows(pd.DataFrame({"name": ["a", "b"], "value": [1e-4, 10.0]}), log=True)
    assert wide.layout.xaxis.dtick == 1


def test_what_is_missing_is_named():
    with pytest.raises(WanlabError, match="missing: value"):
        plots.interval_rows(FRAME[["name"]])


def test_distances_stand_beside_what_is_allowed():
    parity = pd.DataFrame(
        {"component": ["expert_high", "vae_decoder", "expert_high"], "relative_l2": [1e-5, 0.0, 2e-5]}
    )
    figure = plots.distance_rows(parity, 1e-3)
    assert [trace.x[0] for trace in figure.data] == pytest.approx([2e-3, 1e-6])
    assert figure.layout.annotations[0].text == "<b>0.002 %</b> high-noise expert"
    assert figure.layout.annotations[-1].text == "limit"


def test_plans_stand_beside_the_limit_with_or_without_truths():
    rows = {
        "plan": ["chosen"],
        "weight_mib": [3.1],
        "lpips": [0.02],
        "lpips_low": [0.01],
        "lpips_high": [0.03],
    }
    known = pd.DataFrame(
        rows | {"loss_percent": [0.4], "loss_low_percent": [-0.3], "loss_high_percent": [1.2]}
    )
    assert plots.loss_rows(known, 3.0).layout.annotations[0].text == (
        "<b>+0.40 %</b> (-0.30 to +1.20) chosen, 3.1 MiB"
    )
    unknown = known.assign(loss_percent=math.nan)
    assert (
        plots.loss_rows(unknown, 3.0).layout.annotations[0].text.startswith("<b>0.020</b> (0.010 to 0.030)")
    )


def test_candidates_stand_with_what_they_gain_and_their_bound():
    table = pd.DataFrame(
        [
            {"candidate": "eager", "time_ms": 40.0, "speedup": 1.0, "verdict": "baseline", "roofline_ms": 8.0},
            {"candidate": "onnxruntime", "time_ms": 20.0, "speedup": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster",
             "roofline_ms": 8.0},
        ]
    )  # fmt: skip
    figure = plots.component_bars(table)
    assert figure.layout.annotations[0].text == "<b>40 ms</b> eager PyTorch · baseline"
    assert figure.layout.annotations[1].text == "<b>20 ms</b> ONNX Runtime · 2.00× (1.90 to 2.10), faster"
    assert [trace.name for trace in figure.data if trace.showlegend] == ["roofline"]
    assert list(figure.data[1].error_x.array) == pytest.approx([40 / 1.9 - 20])
