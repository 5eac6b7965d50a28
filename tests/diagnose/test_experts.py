"""Experts: the schedule is what really runs, times are measured, the boundary moves and comes back, experts disagree."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models_tiny import save

from wanlab import diagnose, measure, models, plots
from wanlab.core.answer import LONGEST
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.models.schedule import ExpertSchedule, Prefetch, boundary_at, fewest_steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SMALL = dict(height=64, width=64, frames=5)
PROMPT = "the camera pans left"


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("single"), transformer_2=None, boundary_ratio=None)
    return models.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two experts that run in milliseconds."""
    return models.load(str(save(tmp_path_factory.mktemp("tiny"))), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def photo():
    return heldout.example_case().truth()[0]


@settings(max_examples=12)
@given(steps=st.integers(1, 7), ratio=st.sampled_from([0.0, 0.359, 0.714, 0.833, 0.9, 0.909, 0.999, 1.0]))
def test_schedule_is_what_really_runs(tiny, photo, steps, ratio):
    with boundary_at(tiny, ratio), measure.stages(tiny) as recorder:
        plan = models.precompute_schedule(tiny, steps)
        tiny.generate(photo, "a", height=16, width=32, frames=5, steps=steps, output="latent")
    ran = [call for call in recorder.calls if call.branch == "cond"]
    assert [call.component for call in ran] == plan.table["component"].tolist()
    assert [call.timestep for call in ran] == pytest.approx(plan.table["timestep"].tolist())
    for entry in plan.prefetch:
        mine = [call.step for call in ran if call.component == entry.component]
        assert entry.steps == plan.steps_of(entry.component) == len(mine)
        assert entry.first_step == (mine[0] if mine else None)
        assert entry.hiding_steps == (mine[0] if mine else 0)
        weights = tiny.component(entry.component).parameters()
        assert entry.size_bytes == sum(p.numel() * p.element_size() for p in weights)
    assert plan.switches == tuple(i for i in range(1, steps) if ran[i].component != ran[i - 1].component)
    assert bool(plan.note) == (len({call.component for call in ran}) == 1)


def test_schedule_of_a_model_with_one_expert_says_so(single):
    plan = models.precompute_schedule(single, 4)
    assert "one expert" in plan.note
    assert plan.switches == ()
    assert plan.boundary_ratio is None
    assert plan.frame()["component"].tolist() == ["expert"]
    assert plan.steps_of("expert") == 4


def test_bytes_to_move_are_known_before_an_expert_is_loaded(nano):
    alone = models.load("wan-nano", device="cpu", components=("expert_high",))
    assert [p.size_bytes for p in models.precompute_schedule(alone).prefetch] == [
        p.size_bytes for p in models.precompute_schedule(nano).prefetch
    ]


@given(ratio=st.floats(0, 1), fails=st.booleans())
def test_boundary_comes_back(tiny, ratio, fails):
    before = dict(tiny.pipeline.config)
    seen = None
    try:
        with boundary_at(tiny, ratio):
            seen = tiny.pipeline.config.boundary_ratio
            table = tiny.schedule(9)
            assert (
                (table["timestep"] >= np.float32(1000 * ratio)) == (table["component"] == "expert_high")
            ).all()
            if fails:
                raise KeyError("in the block")
    except KeyError:
        assert fails
    assert seen == ratio
    assert dict(tiny.pipeline.config) == before


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan, True, "0.9", None])
def test_a_boundary_out_of_range_is_refused(tiny, ratio):
    with pytest.raises(WanlabError, match="from 0 to 1"), boundary_at(tiny, ratio):
        pass


def test_timeline_measures_every_step_and_both_branches(nano, photo):
    ran = diagnose.timeline(nano, photo, PROMPT, repeats=2, steps=6, guidance_scale=2.0, **SMALL)
    assert ran.as_planned
    assert len(ran.calls) == 2 * 6 * 2
    assert ran.steps["step"].tolist() == list(range(6))
    assert ran.steps["component"].tolist() == ["expert_high"] * 3 + ["expert_low"] * 3
    assert ran.steps["time_ms"].to_numpy() == pytest.approx(
        (ran.steps["cond_ms"] + ran.steps["uncond_ms"]).to_numpy()
    )
    assert ran.steps["time_ms"].nunique() == 6  # measured, not prorated
    assert ran.steps[["timestep", "sigma", "snr"]].to_numpy() == pytest.approx(
        nano.schedule(6)[["timestep", "sigma", "snr"]].to_numpy()
    )
    forward = ran.forward_ms().set_index("component")
    assert forward["steps"].tolist() == [3, 3]
    assert forward["share_percent"].sum() == pytest.approx(100)
    row = ran.row()
    assert (row["switches"], row["high_steps"], row["low_steps"]) == (1, 3, 3)
    assert row["low_ms"] == forward.loc["expert_low", "median_ms"]
    assert row["after_switch_noise_ms"] >= 0
    assert ran.order == "the high-noise expert runs steps 1 to 3, the low-noise expert steps 4 to 6"
    assert [tile[:2] for tile in ran.tiles] == [
        ("high-noise expert", "3 steps"),
        ("low-noise expert", "3 steps"),
    ]
    figure = plots.expert_steps(ran)
    assert {"#d9534f", "#e8a33d"} <= {trace.marker.color for trace in figure.data}
    assert any("900" in note.text for note in figure.layout.annotations)


def test_timeline_of_one_expert_without_guidance(single, photo):
    ran = diagnose.timeline(single, photo, "a", steps=3, guidance_scale=1.0, height=16, width=32, frames=5)
    assert ran.as_planned
    assert ran.after_switch() == {}
    assert "uncond_ms" not in ran.steps
    assert ran.row()["expert_steps"] == 3
    assert ran.order == "one expert runs all 3 steps"
    plots.expert_steps(ran)
    with pytest.raises(WanlabError, match="at least 1"):
        diagnose.timeline(single, photo, "a", repeats=0)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_fewest_steps_reach_every_expert(nano, steps):
    plan = models.precompute_schedule(nano, steps)
    few = fewest_steps(nano, plan)
    assert few == (1 if steps == 1 else 2)
    assert set(nano.schedule(few)["component"]) == set(plan.table["component"])


def test_experts_disagree_by_what_an_own_calculation_finds(nano, photo):
    """The inputs are recorded again and both experts asked by hand."""
    import torch

    asked = dict(steps=4, seed=3, guidance_scale=2.0, **SMALL)
    plain = nano.generate(photo, PROMPT, output="latent", **asked).video
    found = diagnose.disagreement(nano, photo, PROMPT, at_steps=[1, 2], **asked)
    assert np.array_equal(nano.generate(photo, PROMPT, output="latent", **asked).video, plain)
    assert found.steps["step"].tolist() == [1, 2]
    assert found.steps["component"].tolist() == ["expert_high", "expert_low"]
    inputs: list[dict] = []
    pair = [nano.component("expert_high"), nano.component("expert_low")]
    handles = [m.register_forward_pre_hook(lambda m, a, k: inputs.append(k), with_kwargs=True) for m in pair]
    nano.generate(photo, PROMPT, output="latent", **asked)
    for handle in handles:
        handle.remove()
    for row in found.steps.itertuples():
        with torch.no_grad():
            high, low = (m(**inputs[2 * row.step])[0].numpy().astype(np.float64).ravel() for m in pair)
        ran, other = (high, low) if row.component == "expert_high" else (low, high)
        assert row.relative_l2 == pytest.approx(np.linalg.norm(ran - other) / np.linalg.norm(ran), rel=1e-5)
        cosine = ran @ other / np.linalg.norm(ran) / np.linalg.norm(other)
        assert row.cosine == pytest.approx(cosine, rel=1e-6)
    assert (found.steps["again_l2"] == 0).all()
    assert (found.steps["kernel_l2"] > 0).all()
    assert (found.steps["relative_l2"] > 1000 * found.steps["kernel_l2"]).all()
    assert found.at_boundary()["step"] == 1  # timestep 937 is nearer to 900 than 833
    assert found.row()["disagreement_floor"] == pytest.approx(found.steps["kernel_l2"].iloc[0])
    assert "math kernel" in str(plots.disagreement_curve(found).to_json())


def test_an_expert_agrees_with_itself(tiny, photo):
    """Both places held by one network: the distance is nothing at all."""
    import copy
    import dataclasses

    pipeline = copy.copy(tiny.pipeline)
    pipeline.transformer_2 = tiny.pipeline.transformer
    twice = dataclasses.replace(tiny, pipeline=pipeline)
    found = diagnose.disagreement(twice, photo, "a", steps=3, height=16, width=32, frames=5)
    assert len(found.steps) == 3
    assert (found.steps["relative_l2"] == 0).all()
    assert found.steps["cosine"].to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("at", [[9], [], [0, 7], [-1]])
def test_steps_that_are_not_there_are_refused(tiny, photo, at):
    with pytest.raises(WanlabError, match="choose from steps 0 to 3"):
        diagnose.disagreement(tiny, photo, "a", at_steps=at, steps=4)


def test_one_expert_neither_disagrees_nor_has_a_boundary(single, photo):
    with pytest.raises(WanlabError, match="one expert"):
        diagnose.disagreement(single, photo, "a")
    with pytest.raises(WanlabError, match="one expert"):
        diagnose.boundary_sweep(single, [0.5], heldout.draw_cases(1))


def test_sweep_scores_the_prefix_of_the_very_video(nano):
    from wanlab.evaluate import compare_videos

    [case] = heldout.draw_cases(1)
    asked = dict(steps=3, guidance_scale=1.0)
    sweep = diagnose.boundary_sweep(nano, [1.0, 0.9], [case], scored_frames=5, progress=False, **asked)
    assert sweep.frame["boundary"].tolist() == [0.9, 1.0]
    assert sweep.frame["own"].tolist() == [True, False]
    assert sweep.frame[["high_steps", "low_steps"]].to_numpy().tolist() == [[2, 1], [0, 3]]
    own = sweep.videos[sweep.videos["own"] & ~sweep.videos["control"]].iloc[0]
    truth = case.truth()
    whole = nano.generate(truth[0], case.caption, seed=case.seed, **asked).video
    mine = compare_videos(truth[:5], whole[:5], metrics=("lpips", "psnr"), progress=False)
    assert own["lpips"] == pytest.approx(mine.mean("lpips"), rel=1e-6)
    assert own["psnr_db"] == pytest.approx(mine.mean("psnr"), rel=1e-6)
    row = sweep.frame.iloc[0]
    assert row["change_percent"] == 0
    assert 0 <= sweep.floor_percent < 0.1
    assert sweep.noise_percent is None  # one case
    assert sweep.note == ""
    assert nano.pipeline.config.boundary_ratio == 0.9
    assert str(sweep).startswith(
        "Whether another boundary is better than the model's own, timestep 900, is undecided (1 case, 1 other boundary):"
    )
    assert sweep.row()["boundary_best"] is None
    assert sweep.shown["boundary"].tolist() == ["timestep 900", "timestep 1000"]
    assert len(plots.boundary_curves(sweep).data) == 4


def test_sweep_without_truth_still_times(nano):
    cases = heldout.draw_cases(2)
    sweep = diagnose.boundary_sweep(nano, [0.5], cases, steps=3, progress=False, guidance_scale=1.0, **SMALL)
    assert "the truth is 192x128x17, the video 64x64x5" in sweep.note
    assert "lpips" not in sweep.frame
    assert sweep.floor_percent is None
    assert sweep.noise_percent >= 0
    assert sweep.frame["denoising_ms"].gt(0).all()
    assert sweep.row()["boundary_best"] is None
    assert len(plots.boundary_curves(sweep).data) == 2
    with pytest.raises(WanlabError, match="no case"):
        diagnose.boundary_sweep(nano, [0.5], [])
    with pytest.raises(WanlabError, match="from 0 to 1"):
        diagnose.boundary_sweep(nano, [0.5, 1.5], cases)


def summary(**more) -> diagnose.ExpertSummary:
    """Ten steps, two experts, a switch within noise, and experts that differ by 34 %."""
    steps = pd.DataFrame(
        {"step": range(10), "component": ["expert_high"] * 4 + ["expert_low"] * 6, "time_ms": 50.0}
    )
    calls = pd.concat(
        [steps.assign(branch=branch, time_ms=25.0 + steps["step"] % 2) for branch in ("cond", "uncond")]
    )
    plan = tuple(
        Prefetch(name, n, first, first, None)
        for name, n, first in (("expert_high", 4, 0), ("expert_low", 6, 4))
    )
    ran = diagnose.Timeline(ExpertSchedule(steps, 0.9, 900.0, plan, ""), steps, calls, True)
    apart = pd.DataFrame(
        {
            "timestep": [900.0, 400.0],
            "relative_l2": [0.34, 0.7],
            "again_l2": [0.0] * 2,
            "kernel_l2": [4.7e-7] * 2,
        }
    )
    parts = {"disagreement": diagnose.Disagreement(apart, 900.0, "math")} | more
    return diagnose.ExpertSummary(ran, diagnose.SwitchCost(note="a switch was not measured"), **parts)


def test_the_answer_says_who_runs_when_what_a_switch_takes_and_whether_the_choice_matters():
    found = summary().answer("wan-nano", "A caveat. ")
    assert found.headline == (
        "The high-noise expert runs steps 1 to 4, the low-noise expert steps 5 to 10. A switch adds no time that can be told"
        " from noise. The choice matters: their predictions differ by 34 % at the boundary, and by up to 70 % at other"
        " steps."
    )
    assert len(found.headline) <= LONGEST
    assert found.details[0] == "A caveat."
    assert found.details[1].startswith("Measured with wan-nano in one generation.")
    assert found.next.notebook == "14_memory"
    assert [tile[:2] for tile in found.tiles] == [
        ("high-noise expert", "4 steps"),
        ("low-noise expert", "6 steps"),
        ("extra time of a switch", "within noise"),
        ("experts differ by", "34 % to 70 %"),
    ]


def test_another_boundary_counts_only_where_its_interval_is_below_zero():
    def swept(change: float, high: float | None) -> diagnose.BoundarySweep:
        frame = pd.DataFrame(
            {
                "boundary": [0.9, 1.0],
                "own": [True, False],
                "cases": 3,
                "lpips": [0.2, 0.19],
                "change_percent": [0, change],
            }
            | {"low_percent": [0, change - 1 if high else None], "high_percent": [0, high]}
        )
        return diagnose.BoundarySweep(frame, frame, 1.0, 0.01, "")

    better, worse = swept(-3.0, -1.0), swept(3.0, 4.0)
    assert better.sentence.startswith(
        "A boundary at timestep 1000 is better than the model's own, timestep 900 (3 cases, 1 other boundary): LPIPS to the"
        " true video changes by -3.00 % at timestep 1000 (95 % interval -4.00 to -1.00)"
    )
    assert better.row()["boundary_best"] == 1.0
    assert worse.sentence.startswith("Every other boundary that was tried is worse than the model's own")
    assert worse.row()["boundary_best"] == 0.9
    for open_ in (swept(-3.0, 1.0), swept(-3.0, None), swept(0.5, 2.0)):
        assert "is undecided" in open_.sentence
        assert open_.row()["boundary_best"] is None
        found = summary(boundaries=open_).answer("wan-nano")
        assert (found.next.notebook, found.next.parameters) == ("", {"cases": 8})
        assert found.tiles[-1][:2] == ("better boundary", "undecided")


def test_steps_of_tables_for_readers_count_from_one():
    table = pd.DataFrame({"step": [0, 1], "first_step": [4, 5], "time_ms": [1.0, 2.0]})
    moved = diagnose.from_one(table)
    assert moved["step"].tolist() == [1, 2]
    assert moved["first_step"].tolist() == [5, 6]
    assert moved["time_ms"].tolist() == [1.0, 2.0]
    words = pd.DataFrame({"last_step": [2], "steps": ["0-3,5"]})
    assert diagnose.from_one(words).to_dict("records") == [{"last_step": 3, "steps": "1-4,6"}]
    assert diagnose.from_one(None) is None
