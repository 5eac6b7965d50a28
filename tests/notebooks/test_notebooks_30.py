"""The sensitivity notebook: two experts with generations to hold predictions against, and a model with one expert."""

from __future__ import annotations

import pytest
from support.models_tiny import save

from wanlab.launch.grid import expand, load_grid

pytestmark = pytest.mark.notebook

SMALL = ["height=64", "width=64", "frames=5", "steps=4", "examples=2", "samples=8", "cases=1"]


def arguments(*values: str) -> list[str]:
    return [word for value in values for word in ("-p", value)]


def test_sensitivity_of_wan_nano(run_notebook):
    done = run_notebook("30_sensitivity", *arguments(*SMALL, "formats=['int8', 'int4-weight']"))
    found = done.values["sensitivity"]
    assert found["format"] == "int4-weight"
    assert found["effect"] > 0
    assert found["low"] <= found["rank_correlation"] <= found["high"]
    assert found["rank_correlation"] > 0.5
    cost = done.values["cost"][0]
    assert cost["calls"] == 2 * 4 * 2
    assert cost["forward_equivalents"] < 0.2 * cost["brute_force"]
    assert {row["less_tolerant"] for row in done.values["tolerance"]} <= {
        "expert_high",
        "expert_low",
        "neither",
    }
    assert "tolerates less" in done.record["verdict"]
    (checked,) = (
        tile for tile in done.record["tiles"] if tile["title"] == "predicted ranks against real ones"
    )
    assert checked["change"].startswith(
        "rank correlation of 8 generated choices, 1 is perfect; 95 % interval"
    )
    for words in ("high-noise expert", "brute force", "predicted"):
        assert words in str(done.page)


def test_one_expert_in_shards_and_no_generations(run_notebook, tmp_path):
    """What a shard measured is found by the run that merges; `test_shards_make_the_whole` holds the numbers equal."""
    folder = save(tmp_path / "single", transformer_2=None, boundary_ratio=None)
    small = [f"model={folder}", "height=32", "width=32", "frames=5", "steps=2", "examples=2", "samples=0"]
    small += ["formats=['int8-weight']", "calls=1", f"folder={tmp_path / 'kept'}"]
    part = run_notebook("30_sensitivity", *arguments(*small, "shard=1", "shards=2"))
    assert part.values["parts"].items() >= {"units": 1, "of": 2, "reused": 0, "shard": 1, "shards": 2}.items()
    assert part.record["verdict"].startswith("Part 2 of 2 only, so nothing is decided yet. One expert")
    merged = run_notebook("30_sensitivity", *arguments(*small))
    assert merged.values["parts"].items() >= {"units": 2, "of": 2, "reused": 1, "shards": 1}.items()
    assert merged.values["cost"][0]["calls"] == 2 * part.values["cost"][0]["calls"]
    assert merged.record["verdict"].startswith("One expert was measured: in int8-weight all its layers")
    assert "samples=18" in merged.record["next"]["command"]


def test_the_grid_of_shards_measures_every_example_once(root):
    tasks = expand(load_grid(root / "recipes" / "sweeps" / "sensitivity-shards.yaml"))
    shards = {task.overrides["shards"] for task in tasks}
    assert shards == {len(tasks)}
    assert [task.axes["shard"] for task in tasks] == list(range(len(tasks)))
    assert all(task.machine == "shared" for task in tasks)
