"""The notebook of step caches: a table of variants, a map of skipped steps, and videos that are really other ones."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_caches_skip_steps_and_say_what_it_costs(shared_run):
    done = shared_run("44_caches")
    *caches, gate = done.values["variants"]
    labels = ["EasyCache at 0.05", "EasyCache at 0.2", "MagCache at 0.06", "MagCache at 0.24"]
    assert [row["variant"] for row in caches] == labels
    for mild, strong in (caches[:2], caches[2:]):
        assert 0 < mild["skipped_percent"] < strong["skipped_percent"]
    assert (gate["variant"], gate["skipped_percent"]) == ("gate after 50 %", 25)
    assert all(row["did_what_it_says"] for row in (caches[1], caches[3], gate))
    assert all(row["times_faster_at_most"] > 1 for row in (*caches, gate))


def test_a_model_without_a_truth_has_no_loss(run_notebook):
    small = {
        "model": "tiny-ltx-t2v",
        "weights": "random",
        "easy_cache": 5,
        "steps": 8,
        "cases": 1,
        "limit_s": 2,
    }
    small |= {"gates": ""} | dict.fromkeys(("height", "width", "frames"), "none")
    done = run_notebook(
        "44_caches", *[word for name, value in small.items() for word in ("-p", f"{name}={value}")]
    )
    (row,) = done.values["variants"]  # MagCache is of the Wan family alone, and is left out
    assert row["variant"] == "EasyCache at 5"
    assert row["skipped_percent"] > 0
    assert "quality loss is unknown" in done.record["verdict"]
