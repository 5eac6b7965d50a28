"""The notebook of serving: loads with batches and without, on a service that it starts and ends itself."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_loads_are_sent_both_ways_and_none_is_lost(shared_run):
    done = shared_run("70_serving")
    loads = done.values["loads"]
    assert [row["way"] for row in loads] == ["one at a time", "in batches"] * 3
    assert all(row["completed"] == row["requests"] for row in loads)
    most = {row["load"]: row["mean_batch"] for row in loads if row["way"] == "in batches"}
    assert most["1 caller"] == 1 < most["4 callers"] <= 4
    (bound,) = done.values["bound"]
    assert 1 <= bound["times_faster_at_most"] <= 4


def test_a_configuration_that_makes_one_at_a_time_says_why(run_notebook):
    small = {
        "configuration": "cached",
        "callers": "1",
        "busy_percents": "",
        "requests": 2,
        "rounds": 1,
        "limit_s": 1,
    }
    done = run_notebook(
        "70_serving", *[word for name, value in small.items() for word in ("-p", f"{name}={value}")]
    )
    assert {row["way"] for row in done.values["loads"]} == {"one at a time"}
    assert "It makes one video at a time" in " ".join(done.record["details"])
