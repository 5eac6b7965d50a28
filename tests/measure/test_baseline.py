"""The before/after table: ratios point the right way and nothing is divided by nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.measure import before_after
from wanlab.measure.baseline import Baseline
from wanlab.measure.timing import AAControl, Samples


def test_ratios_are_above_one_where_the_variant_is_better():
    rows = [
        {"variant": "a", "time_ms": 10.0, "throughput_frames_per_s": 2.0, "load_ms": None},
        {"variant": "b", "time_ms": 5.0, "throughput_frames_per_s": 4.0, "load_ms": 3.0},
        {"variant": "c", "time_ms": 20.0, "throughput_frames_per_s": 1.0, "load_ms": 3.0},
    ]
    table = before_after(rows, quality=["reference", "0.1 %", "5 %"]).set_index("measure")
    assert table.loc["time_ms", "b ratio"] == "2.00x"
    assert table.loc["throughput_frames_per_s", "b ratio"] == "2.00x"
    assert table.loc["time_ms", "c ratio"] == table.loc["throughput_frames_per_s", "c ratio"] == "0.50x"
    assert table.loc["load_ms", "b ratio"] == table.loc["load_ms", "a"] == ""
    assert list(table.loc["quality"]) == ["reference", "0.1 %", "5 %", "", ""]


def measured(recorded_ms: float, noise_percent: float = 1.0) -> Baseline:
    """Four videos of 91 s, and the breakdown of one more that was recorded."""
    halves = [Samples("eager", (91_000.0, 91_200.0)), Samples("eager (again)", (90_900.0, 91_000.0))]
    settings = {"width": 8, "height": 8, "frames": 5, "steps": 10}
    parts = [0.75 * recorded_ms, 0.25 * recorded_ms]
    return Baseline(
        label="eager",
        control=AAControl(*halves, 1.0, noise_percent),
        memory=SimpleNamespace(peak_gib=1.0),
        breakdown=pd.DataFrame(
            {"component": ["expert_high", "other"], "time_ms": parts, "share_percent": [75.0, 25.0]}
        ),
        calls=pd.DataFrame(),
        generation=SimpleNamespace(settings=settings),
        again=SimpleNamespace(settings=settings),
        load_ms=None,
    )


def test_components_that_do_not_go_with_the_video_are_said_below_the_headline():
    said = str(measured(157_000.0).answer("wan-nano"))
    assert "The components add up to 157 s, 73 % more than the timed videos" in said
    assert "add up" not in str(measured(92_000.0).answer("wan-nano"))
    assert measured(60_000.0).caveat.startswith("the components add up to 60 s, 34 % less")
    assert (
        "157 s" in measured(157_000.0, noise_percent=80).caveat
    )  # noise explains it, but a reader still adds up


def test_the_answer_is_the_time_the_largest_component_and_the_noise():
    found = measured(92_000.0).answer("wan-nano")
    assert found.headline == (
        "wan-nano makes one video in 91 s, and the high-noise expert takes 75 % of that. Equal videos differ by up to"
        " 1.0 %, so a smaller change cannot be seen."
    )
    assert "2 + 2 of them were timed" in found.details[0]


def test_a_video_and_its_frames_are_of_the_same_samples():
    row = measured(157_000.0).row
    assert row["time_per_frame_ms"] * 5 == row["time_per_video_ms"]
    assert row["throughput_frames_per_s"] * row["time_per_frame_ms"] == 1e3


class Timed:
    """A model whose videos take a time of this clock."""

    device = torch.device("cpu")

    def __init__(self, seconds):
        self.seconds = seconds

    def generate(self, image, prompt):
        time.sleep(self.seconds)


def test_two_baselines_are_timed_in_turn_until_their_ratio_is_known():
    slow = (measured(92_000.0), Timed(0.02))
    fast = (replace(measured(92_000.0), label="fast"), Timed(0.01))
    before, after, gain = measure.versus(slow, fast, None, "", precision=60.0, limit_s=5, progress=False)
    assert before.samples.n == after.samples.n >= 6
    assert after.samples.median < before.samples.median < 1000
    assert (gain.baseline, gain.candidate) == ("eager", "fast")
    assert gain.speedup == before.samples.median / after.samples.median
    assert before.breakdown is slow[0].breakdown
    with pytest.raises(WanlabError, match="two labels"):
        measure.versus(slow, slow, None, "")
