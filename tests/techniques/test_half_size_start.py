"""Half-size start on wan-nano: sizes of the calls, exact noise, both experts, and planted faults."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from support.distances import far

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques.half_size_start import GrowRule, Growth, noise_level_for

SIZE = {"height": 64, "width": 96, "frames": 5}
SETTINGS = {**SIZE, "steps": 12, "output": "latent"}
SMALL, LARGE = (2, 4, 6), (2, 8, 12)


@pytest.fixture(scope="module")
def original(model, request_of_a_video):
    return model.generate(*request_of_a_video, **SETTINGS).video


def generated(model, request_of_a_video, *, until=0.8, also=None, **settings):
    switched = techniques.switch_on(model, {"half_size_start": {"until": until}} | (also or {}))
    return switched, switched.model.generate(*request_of_a_video, **(SETTINGS | settings)).video


def grown(reached, full=(16, 24), patch=(2, 2)):
    """A growth at a noise level, with the noise of the full size."""
    growth = Growth(reached)
    growth.patch = patch
    growth.begin(3, reached)
    noise = torch.randn((1, 4, 3, *full), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    growth.level = growth.aligned(reached, growth.ratio(noise))
    growth.start(noise)
    return growth, noise


@pytest.mark.parametrize(("reached", "full"), [(0.8, (16, 24)), (0.4, (16, 24)), (0.7, (18, 20))])
def test_growing_is_exact_for_what_the_small_latents_hold(reached, full):
    """A video without the high frequencies, with noise, is after growing the same with the noise of the full size."""
    growth, noise = grown(reached, full)
    height, width = growth.small(noise)
    clean = Growth(reached)
    clean.patch = (2, 2)
    clean.start(noise.flip(0) * 2 + 1)  # any latents: their low frequencies as a video of half the size
    small = clean.latents
    silent = Growth(1.0)
    silent.patch = (2, 2)
    silent.begin(1, 1.0)
    silent.level = 1.0
    silent.noise, silent.latents = torch.zeros_like(noise), small
    large = silent.grown() * growth.ratio(noise)  # the same content at full size
    assert small.shape[-2:] == (height, width)
    assert large.mean() == pytest.approx(float(small.mean()), rel=1e-6)
    growth.latents = (1 - reached) * small + reached * growth.latents
    level = growth.level
    assert torch.allclose(growth.grown(), (1 - level) * large + level * noise, atol=1e-9)


def test_noise_stays_noise_of_unit_variance():
    growth, noise = grown(0.8, (64, 64))
    assert growth.latents.std() == pytest.approx(1, abs=0.05)
    assert growth.latents.mean() == pytest.approx(0, abs=0.05)
    assert growth.level == pytest.approx(2 * 0.8 / 1.8)
    growth.reached = growth.level = 1.0
    assert torch.allclose(growth.grown(), noise)


def test_the_half_is_whole_tokens():
    growth = Growth(0.8)
    assert growth.small(torch.zeros(90, 160)) == (44, 80)  # 720x1280: 45 rows are no whole tokens
    assert growth.small(torch.zeros(60, 104)) == (30, 52)
    assert growth.ratio(torch.zeros(60, 104)) == pytest.approx(2)
    with pytest.raises(WanlabError, match="latents of 2x24 cannot be halved"):
        growth.small(torch.zeros(2, 24))


def test_both_experts_run_at_half_size_first(model, request_of_a_video, original):
    switched, video = generated(model, request_of_a_video)
    calls = switched.calls
    assert video.shape == original.shape
    first = switched.techniques[0].growth.first_full
    assert set(calls.loc[calls["step"] < first, "size"]) == {SMALL}
    assert set(calls.loc[calls["step"] >= first, "size"]) == {LARGE}
    assert set(calls.loc[calls["size"] == SMALL, "component"]) == {"expert_high", "expert_low"}
    proof = switched.proofs()["half_size_start"]
    assert proof.passed
    assert (
        "10 of 10 calls of the high-noise expert and 4 of 14 calls of the low-noise expert" in proof.sentence
    )
    # What the step at full size is told is the noise level that growing leads to.
    level = switched.techniques[0].growth.level
    assert calls.loc[calls["step"] == first, "timestep"].tolist() == [round(1000 * level)] * 2
    assert 0.01 < far(video, original) < 0.9
    assert (model.generate(*request_of_a_video, **SETTINGS).video == original).all()
    assert (switched.model.generate(*request_of_a_video, **SETTINGS).video == video).all()
    shared = switched.model.component("expert_low").blocks[0].attn1.to_q.weight
    assert shared is model.component("expert_low").blocks[0].attn1.to_q.weight


def test_growing_late_is_farther_than_early(model, request_of_a_video, original):
    distances = [far(generated(model, request_of_a_video, until=level)[1], original) for level in (0.97, 0.5)]
    assert distances[0] < distances[1]


def test_growing_may_lead_back_above_the_boundary(model, request_of_a_video):
    switched, _ = generated(model, request_of_a_video, until=0.86)
    calls, first = switched.calls, switched.techniques[0].growth.first_full
    by_step = calls.drop_duplicates("step").set_index("step")["component"]
    assert (by_step[first - 1], by_step[first], by_step[first + 1]) == (
        "expert_low",
        "expert_high",
        "expert_low",
    )
    assert switched.proofs()["half_size_start"].passed


def test_the_first_frame_is_conditioned_at_both_sizes(model, request_of_a_video):
    seen = {}

    class Kept:
        name = "kept"

        def begin(self):
            seen.clear()

        def __call__(self, call, inner):
            seen[tuple(call.latents.shape[2:])] = call.latents[0, 16:].clone()
            return inner(call)

    place = techniques.Place(model)
    place.add(Kept())
    technique = techniques.TECHNIQUES["half_size_start"]()
    technique.apply(place)
    place.finish(place.model).generate(*request_of_a_video, **SETTINGS)
    assert set(seen) == {SMALL, LARGE}
    for condition in seen.values():
        mask, first_frame = condition[:4], condition[4:]
        assert (mask[:, 0] == 1).all()
        assert (mask[:, 1:] == 0).all()
        assert first_frame[:, 0].std() > 0.1
    small = torch.nn.functional.interpolate(seen[LARGE][None, 4:, 0], SMALL[1:], mode="area")[0]
    agreement = torch.corrcoef(torch.stack([small.flatten(), seen[SMALL][4:, 0].flatten()]))[0, 1]
    assert agreement > 0.5


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_other_solvers_grow_too(model, request_of_a_video, solver):
    config = model.pipeline.scheduler.config
    schedulers = {
        "dpm": DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"),
        "euler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    changed = copy.copy(model)
    changed.pipeline = copy.copy(model.pipeline)
    changed.pipeline.scheduler = schedulers[solver]
    switched, video = generated(changed, request_of_a_video)
    assert switched.proofs()["half_size_start"].passed
    assert far(video, changed.generate(*request_of_a_video, **SETTINGS).video) < 0.9


def test_what_stands_inside_begins_anew(model, request_of_a_video):
    also = {
        "easy_cache": {"threshold": 0.5, "first_percent": 0},
        "guidance_gate": {"after_percent": 20},
        "batched_guidance": {},
        "text_keys": {},
    }
    switched, video = generated(model, request_of_a_video, also=also)
    assert {name: proof for name, proof in switched.proofs().items() if not proof.passed} == {}
    assert np.isfinite(video).all()
    calls, first = switched.calls, switched.techniques[-1].growth.first_full
    assert calls.loc[
        calls["step"] == first, "ran"
    ].all()  # both branches, though the gate and the cache skip before
    assert not calls.loc[calls["step"] == first - 1, "ran"].all()


def test_a_configuration_proves_it(model, tmp_path):
    chosen = configuration.parse_configuration("name: mine\ntechniques: [half_size_start]\n")
    used = configuration.configure(model, chosen, tmp_path, **SIZE, steps=12, progress=False)
    assert used.effect == "applied"
    assert "half_size_start made 10 of 10 calls of the high-noise expert" in used.proof
    used = configuration.configure(model, chosen, tmp_path, **SIZE, steps=1, progress=False)
    assert used.effect == "not applied"
    wrong = "name: mine\nengines: onnxruntime\ntechniques: [half_size_start]\n"
    with pytest.raises(WanlabError, match="its graph has one size of video"):
        configuration.parse_configuration(wrong, "mine.yaml")


def test_noise_levels_of_the_publication():
    # Wan2.2 at 720x1280 and half the size; delta 0.01 and 0.05.
    assert noise_level_for(0.01, 90, 160) == pytest.approx(0.782, abs=1e-3)
    assert noise_level_for(0.05, 90, 160) == pytest.approx(0.612, abs=1e-3)


# Planted faults.


def test_a_run_that_never_changes_size_is_seen(model, request_of_a_video, original):
    switched, video = generated(model, request_of_a_video, until=0.999999)
    proof = switched.proofs()["half_size_start"]
    assert not proof.passed
    assert proof.sentence == (
        "half_size_start made all 24 calls at one size, 2x8x12: no step but the last begins above noise level 0.999999."
    )
    assert (video == original).all()


def test_one_that_never_halves_is_seen(model, request_of_a_video, monkeypatch):
    monkeypatch.setattr(
        Growth, "begin", lambda self, first, reached, begin=Growth.begin: begin(self, 0, reached)
    )
    switched, _ = generated(model, request_of_a_video)
    assert not switched.proofs()["half_size_start"].passed


def test_one_that_never_grows_is_seen(model, request_of_a_video, monkeypatch):
    begin = Growth.begin
    monkeypatch.setattr(Growth, "begin", lambda self, first, reached: begin(self, first and 11, reached))
    monkeypatch.setattr(
        GrowRule,
        "__call__",
        lambda rule, call, inner, answer=GrowRule.__call__: at_half(rule, call, inner, answer),
    )
    switched, _ = generated(model, request_of_a_video)
    proof = switched.proofs()["half_size_start"]
    assert (proof.passed, "made all 24 calls at one size, 2x4x6" in proof.sentence) == (False, True)


def at_half(rule, call, inner, answer):
    """A rule that goes on at half size where it should have grown."""
    if rule.growth.latents is not None:
        return answer(rule, call, inner)
    halved = torch.nn.functional.interpolate(call.latents, SMALL, mode="area")
    arguments = call.arguments | {"hidden_states": halved}
    prediction = inner(type(call)(**(vars(call) | {"arguments": arguments})))
    return torch.nn.functional.interpolate(prediction, LARGE, mode="nearest")


def test_one_expert_only_is_seen(model, request_of_a_video, monkeypatch):
    answer = GrowRule.__call__

    def spares_the_low_noise_expert(rule, call, inner):
        if call.component != "expert_low" or rule.growth.latents is None:
            return answer(rule, call, inner)
        return torch.nn.functional.interpolate(inner(call), SMALL, mode="area")

    monkeypatch.setattr(GrowRule, "__call__", spares_the_low_noise_expert)
    switched, _ = generated(model, request_of_a_video)
    proof = switched.proofs()["half_size_start"]
    assert not proof.passed
    assert "made 4 of 4 calls of the low-noise expert before step 8 at full size" in proof.sentence


def test_what_cannot_be_is_one_line(model):
    with pytest.raises(
        WanlabError, match="half_size_start and mag_cache cannot go together: the ratios of its plan"
    ):
        techniques.switch_on(model, ["half_size_start", "mag_cache"])
    for until in (0, 1, 1.5, "late"):
        with pytest.raises(WanlabError, match="half_size_start: Expected `float`"):
            techniques.switch_on(model, {"half_size_start": {"until": until}})
    other = models.load("tiny-ltx-i2v", weights="random", device="cpu")
    with pytest.raises(WanlabError, match="it needs a WanImageToVideoPipeline"):
        techniques.switch_on(other, ["half_size_start"])
    per_token = models.get("wan2.2-ti2v-5b")
    technique = techniques.TECHNIQUES["half_size_start"]()
    assert technique.lacks(per_token, torch.device("cpu"))


def test_a_video_that_cannot_be_halved_is_one_line(model, request_of_a_video):
    with pytest.raises(WanlabError, match="latents of 2x12 cannot be halved for half_size_start"):
        generated(model, request_of_a_video, height=16)
