"""The experts notebook: two experts with a recorded switch, and a model with one expert."""

from __future__ import annotations

import pytest
from support.models_tiny import save

from wanlab import models
from wanlab.diagnose import SwitchCost
from wanlab.measure import Samples
from wanlab.runs import read_run

pytestmark = pytest.mark.notebook


def test_experts_of_wan_nano(run_notebook, tmp_path, root):
    record = tmp_path / "switch.json"
    samples = {name: Samples(name, (520.0, 521.0)) for name in ("pinned", "pinned again")}
    SwitchCost(samples, 28_600_000_000, 5e3, 600.0, "some GPU").save(record)
    trace = root / "data" / "traces" / "wan2.2-i2v-a14b.pt.trace.json.gz"
    few = ["-p", "cases=1", "-p", "boundaries=[1.0]", "-p", f"switch_record={record}", "-p", f"trace={trace}"]
    done = run_notebook("12_experts", *few)
    found = done.values["experts"]
    assert (found["switches"], found["high_steps"], found["low_steps"]) == (1, 4, 6)
    assert found["as_planned"]
    assert min(found["high_ms"], found["low_ms"]) > 0
    rows = {row.work.component: row for row in read_run(done.folder).results}
    for name, steps in (("high", 4), ("low", 6)):
        row = rows[f"expert_{name}"]
        assert (row.n, row.time_ms) == (2 * steps, pytest.approx(found[f"{name}_ms"]))
        assert (row.work.model, row.work.frames) == ("wan-nano", models.get("wan-nano").defaults.frames)
    assert found["disagreement"] > 1000 * found["disagreement_floor"]
    assert found["boundary_best"] is None  # one case decides nothing
    assert "undecided (1 case, 1 other boundary)" in done.answer
    assert "-p cases=8" in done.record["next"]["command"]
    if not found["switch_source"].startswith("measured"):
        assert found["switch_pinned_ms"] == 520.5
        assert "On another machine (some GPU)" in str(done.page)
    for words in (
        "WanTransformer3DModel",
        "high-noise expert",
        "boundary: timestep 900",
        "LPIPS to the true video",
        "12.3",  # seconds of the first call in the profile
    ):
        assert words in str(done.page)


def test_one_expert_comes_to_a_verdict(run_notebook, tmp_path):
    folder = save(tmp_path / "single", transformer_2=None, boundary_ratio=None)
    small = ["-p", f"model={folder}", "-p", "height=32", "-p", "width=32", "-p", "frames=5", "-p", "steps=2"]
    done = run_notebook("12_experts", *small)
    found = done.values["experts"]
    assert found["switches"] == 0
    assert found["expert_steps"] == 2
    assert found["expert_ms"] > 0
    assert "disagreement" not in found
    (row,) = read_run(done.folder).results
    assert (row.work.component, row.work.height, row.n) == ("expert", 32, 4)  # two steps, guided
    assert done.record["verdict"].startswith("One expert runs all 2 steps. Nothing is switched.")
