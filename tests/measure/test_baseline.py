"""The before/after table: ratios point the right way and nothing is divided by nothing."""

from __future__ import annotations

from wanlab.measure import before_after


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
