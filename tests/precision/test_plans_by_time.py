"""What waits for a GPU goes through on the CPU: plans selected by time, as 42_component selects and measures them."""

from __future__ import annotations

import pytest

from wanlab import models, precision
from wanlab.core.errors import WanlabError
from wanlab.precision.selection.select import TIMED_FORMATS

SIZE = {"height": 64, "width": 64, "frames": 5}


@pytest.fixture(scope="module")
def model():
    return models.load(
        "wan-nano", weights="random", components=["expert_high"], device="cpu", dtype="bfloat16"
    )


def test_plans_are_selected_by_time_and_within_half_the_effect(model, tmp_path):
    found = precision.plans_by_time(model, "expert_high", progress=False, **SIZE)
    assert 1 <= len(found.plans) <= 2
    effects = found.predicted.set_index("plan")["effect"]
    for row in found.selected.to_dict("records"):
        plan = precision.load_plan(precision.save_plan(found.plans[row["plan"]], tmp_path / "plan.yaml"))
        assert plan.hash == found.plans[row["plan"]].hash
        assert "GFLOP (counted)" in plan.note  # nothing is timed on a CPU, and the plan says so
        assert row["saved_percent"] > 0
    assert found.selected["effect"].iloc[-1] <= effects["uniform-fp8"] / 2
    assert set(found.costs["format"]) == {"default", *TIMED_FORMATS}


def test_a_random_recording_has_the_steps_of_its_expert_and_inputs_of_their_own(model, tmp_path):
    recording = precision.random_recording(model, "expert_high", tmp_path, steps=4, **SIZE)
    steps = model.schedule(4).query("component == 'expert_high'")
    assert [call.step for call in recording.calls] == steps["step"].tolist()
    states = [recording.inputs(call)["hidden_states"] for call in recording.calls]
    assert not states[0].equal(states[1])
    times = [float(recording.inputs(call)["timestep"].flatten()[0]) for call in recording.calls]
    assert times == pytest.approx(steps["timestep"].tolist(), rel=0.01)
    assert recording.of("expert_high")[0].sigma == pytest.approx(steps["sigma"].iloc[0])


def test_a_random_recording_of_too_few_steps_is_refused(tmp_path):
    low = models.load("wan-nano", weights="random", components=["expert_low"], device="cpu")
    with pytest.raises(WanlabError, match="expert_low runs in none of 1 steps; give more steps"):
        precision.random_recording(low, "expert_low", tmp_path, steps=1, **SIZE)
