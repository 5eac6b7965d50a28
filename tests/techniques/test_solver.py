"""Fewer steps by another solver on wan-nano: noise levels, classes, counted steps, and planted faults."""

from __future__ import annotations

import pytest
from support.distances import far

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques import solver
from wanlab.techniques.solver import SolverSettings, scheduler_for

SIZE = {"height": 64, "width": 96, "frames": 5}
SETTINGS = {**SIZE, "steps": 12, "output": "latent"}


@pytest.fixture(scope="module")
def original(model, request_of_a_video):
    return model.generate(*request_of_a_video, **SETTINGS).video


def generated(model, request_of_a_video, settings, **others):
    switched = techniques.switch_on(model, {"solver": settings} | others)
    return switched, switched.model.generate(*request_of_a_video, **SETTINGS).video


@pytest.mark.parametrize(
    ("method", "order", "title"),
    [
        ("unipc", 3, "UniPCMultistepScheduler of order 3"),
        ("dpm++", 2, "DPMSolverMultistepScheduler of order 2"),
        ("euler", 2, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_solver_makes_a_share_of_the_steps(model, request_of_a_video, original, method, order, title):
    given = {"method": method, "order": order, "steps_percent": 60}
    switched, video = generated(model, request_of_a_video, given)
    proof = switched.proofs()["solver"]
    assert proof.passed
    assert proof.sentence == (
        f"solver made 8 of 12 steps with {title} in place of UniPCMultistepScheduler of order 2, in 16 calls (6 of the"
        " high-noise expert and 10 of the low-noise expert)."
    )
    assert 0 < far(video, original) < 0.4
    assert (model.generate(*request_of_a_video, **SETTINGS).video == original).all()
    assert (switched.model.generate(*request_of_a_video, **SETTINGS).video == video).all()


@pytest.mark.parametrize("method", ["unipc", "dpm++", "euler"])
def test_noise_levels_shift_and_experts_are_those_of_the_model(model, method):
    switched = techniques.switch_on(model, {"solver": {"method": method, "steps_percent": 50}})
    fewer, usual = switched.model.schedule(12), model.schedule(6)
    assert len(fewer) == 6
    assert fewer["sigma"].to_numpy() == pytest.approx(usual["sigma"].to_numpy(), abs=1e-5)
    assert fewer["timestep"].to_numpy() == pytest.approx(usual["timestep"].to_numpy(), abs=1.0)
    assert (fewer["component"] == usual["component"]).all()


def test_all_the_steps_by_another_order_is_near_the_original(model, request_of_a_video, original):
    fine = model.generate(*request_of_a_video, **(SETTINGS | {"steps": 48})).video
    apart = {}
    for method in ("unipc", "dpm++", "euler"):
        switched, video = generated(
            model, request_of_a_video, {"method": method, "order": 3, "steps_percent": 100}
        )
        assert switched.proofs()["solver"].passed
        apart[method] = far(video, fine)
    assert max(apart.values()) < 2 * far(original, fine) + 0.05
    assert apart["unipc"] < apart["euler"]


def test_euler_is_first_order_in_the_noise_level(model):
    """One step of Euler's method: x + (s' - s) v."""
    import torch

    scheduler = scheduler_for(model.pipeline.scheduler, SolverSettings(method="euler", steps_percent=100))
    scheduler.set_timesteps(4)
    x, v = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    step = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    assert float(step) == pytest.approx(2 + 3 * float(scheduler.sigmas[1] - scheduler.sigmas[0]))
    assert float(scheduler.sigmas[-1]) == 0


def test_it_goes_with_rules_that_count_steps(model, request_of_a_video):
    others = {"easy_cache": {"threshold": 0.5}, "guidance_gate": {}, "batched_guidance": {}, "text_keys": {}}
    switched, _ = generated(model, request_of_a_video, {"steps_percent": 84}, **others)
    assert [each.name for each in switched.techniques][:2] == ["text_keys", "solver"]
    assert {name: proof for name, proof in switched.proofs().items() if not proof.passed} == {}
    calls = switched.calls
    assert calls["step"].max() == 10
    assert calls.loc[calls["step"] == 10, "ran"].any()  # the cache computes the last step, of eleven
    assert set(calls.loc[(calls["by"] == "guidance_gate"), "step"]) == {6, 7, 8, 9, 10}


def test_it_goes_with_a_plan_of_skips_and_a_half_size_start(model, request_of_a_video):
    given = {"steps_percent": 84}
    switched, _ = generated(model, request_of_a_video, given, mag_cache={"threshold": 0.3})
    assert {name: proof for name, proof in switched.proofs().items() if not proof.passed} == {}
    assert switched.techniques[-1].plan[-1].step == 10
    for method in ("unipc", "dpm++", "euler"):
        switched, _ = generated(model, request_of_a_video, given | {"method": method}, half_size_start={})
        assert {name: proof for name, proof in switched.proofs().items() if not proof.passed} == {}


def test_a_configuration_proves_it(model, tmp_path):
    text = 'name: mine\ntechniques: {solver: {method: "dpm++", steps_percent: 50}}\n'
    used = configuration.configure(
        model, configuration.parse_configuration(text), tmp_path, **SIZE, steps=12, progress=False
    )
    assert used.effect == "applied"
    assert "solver made 6 of 12 steps with DPMSolverMultistepScheduler of order 2" in used.proof


def test_the_bound_is_the_share_of_steps():
    shares = techniques.Shares("a measurement", 0.8, 0.1, 0.6, 0.01, 2, 20)
    bound = techniques.TECHNIQUES["solver"](SolverSettings(steps_percent=60)).bound(shares)
    assert bound.saved == pytest.approx(0.8 * 8 / 20)
    assert [solver.fewer(10, percent) for percent in (1, 60, 61, 100)] == [1, 6, 7, 10]
    assert solver.fewer(100, 7) == 7  # not 8, by rounding of 7 / 100


# Planted faults.


def test_a_solver_that_changes_nothing_is_seen(model, request_of_a_video, original):
    switched, video = generated(model, request_of_a_video, {"order": 2, "steps_percent": 100})
    proof = switched.proofs()["solver"]
    assert (proof.passed, proof.sentence) == (
        False,
        "solver changed nothing: UniPCMultistepScheduler of order 2 made all 12 steps without it too.",
    )
    assert (video == original).all()


def test_a_scheduler_that_was_not_changed_is_seen(model, request_of_a_video, monkeypatch):
    monkeypatch.setattr(solver, "scheduler_for", lambda scheduler, settings: scheduler)
    switched, _ = generated(model, request_of_a_video, {"method": "dpm++"})
    proof = switched.proofs()["solver"]
    assert (proof.passed, proof.sentence) == (
        False,
        "solver was to use DPMSolverMultistepScheduler, but UniPCMultistepScheduler of order 2 made the 12 steps.",
    )
    switched, _ = generated(model, request_of_a_video, {"steps_percent": 50})
    proof = switched.proofs()["solver"]
    assert proof.sentence == (
        "solver was to make 6 of 12 steps, but UniPCMultistepScheduler of order 2 made 12."
    )


def test_steps_that_leave_out_an_expert_are_seen(model, request_of_a_video):
    switched, _ = generated(model, request_of_a_video, {"steps_percent": 1})
    proof = switched.proofs()["solver"]
    assert (proof.passed, proof.sentence) == (
        False,
        "solver left no step to the low-noise expert: 1 of 12 steps are too few.",
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "heun"}, "solver: Invalid enum value 'heun'"),
        ({"order": 4}, "solver: Expected `int` <= 3"),
        ({"steps_percent": 0}, "solver: Expected `float` > 0"),
        ({"steps": 4}, r"solver has no setting 'steps' \(did you mean 'steps_percent'\?\)"),
    ],
)
def test_what_cannot_be_is_one_line(model, given, message):
    with pytest.raises(WanlabError, match=message):
        techniques.switch_on(model, {"solver": given})


def test_another_family_is_refused():
    other = models.load("tiny-ltx-i2v", weights="random", device="cpu")
    with pytest.raises(WanlabError, match="solver cannot run here: it needs a model of the Wan family"):
        techniques.switch_on(other, ["solver"])
