"""MagCache on wan-nano: a plan that is known before the run, a zone in each expert, and planted faults."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from support.distances import far

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.precision.recording import nano_examples
from wanlab.techniques.mag_cache import Magnitudes, MagRule, MagSettings, measure_magnitudes

SIZE = {"height": 64, "width": 96, "frames": 5}
SETTINGS = {**SIZE, "steps": 12, "output": "latent"}
MILD = {"threshold": 0.12}


@pytest.fixture(scope="module")
def original(model, request_of_a_video):
    return model.generate(*request_of_a_video, **SETTINGS).video


@pytest.fixture(scope="module")
def magnitudes(model):
    return measure_magnitudes(model, **SIZE, steps=12)


@pytest.fixture(scope="module")
def saved(magnitudes, tmp_path_factory):
    return str(magnitudes.save(tmp_path_factory.mktemp("ratios") / "ratios.json"))


def generated(model, request_of_a_video, settings, **others):
    switched = techniques.switch_on(model, {"mag_cache": settings} | others)
    return switched, switched.model.generate(*request_of_a_video, **SETTINGS).video


def test_ratios_are_those_of_the_predictions(model, request_of_a_video):
    class Kept:
        name = "kept"

        def begin(self):
            self.residuals = {}

        def __call__(self, call, inner):
            prediction = inner(call)
            apart = prediction.float() - call.latents[:, : prediction.shape[1]].float()
            self.residuals[call.step, call.branch] = apart.numpy().copy()
            return prediction

    place, kept = techniques.Place(model), Kept()
    place.add(kept)
    place.finish(place.model)
    place.model.generate(*request_of_a_video, **SETTINGS)
    measured = measure_magnitudes(model, *request_of_a_video, **SIZE, steps=12)
    assert len(measured.ratios) == 24
    switch = next(row.step for row in measured.ratios if row.component == "expert_low")
    for row in measured.ratios:
        if row.step in (0, switch):
            assert row.ratio is None  # nothing of another expert is compared
            continue
        now, before = (
            np.linalg.norm(kept.residuals[step, row.branch], axis=1) for step in (row.step, row.step - 1)
        )
        assert row.ratio == pytest.approx((now / before).mean(), rel=1e-5)


def test_other_pictures_have_ratios_of_the_same_course(model, magnitudes):
    example = nano_examples(2)[1]
    other = measure_magnitudes(model, example.image, example.prompt, seed=5, **SIZE, steps=12)
    with_text = [
        [each.ratio for each in measured.ratios if each.ratio and each.branch == "cond"]
        for measured in (magnitudes, other)
    ]
    assert np.corrcoef(with_text)[0, 1] > 0.95
    assert with_text != [with_text[0]] * 2


def test_the_plan_is_static_and_a_zone_for_each_expert(model, request_of_a_video, magnitudes, saved):
    settings = MagSettings(**MILD)
    plan = magnitudes.plan(settings)
    assert plan == magnitudes.plan(settings)
    for branch in ("cond", "uncond"):
        for component in ("expert_high", "expert_low"):
            zone = [row for row in plan if (row.branch, row.component) == (branch, component)]
            assert not zone[0].skipped
            assert any(row.skipped for row in zone)
            runs = "".join("s" if row.skipped else "c" for row in zone)
            assert "sss" not in runs
            assert all(row.error < 0.12 for row in zone if row.skipped)
            assert all(
                row.component == component for row in plan if row.step in {each.source for each in zone}
            )
    switched, _ = generated(model, request_of_a_video, MILD | {"ratios": saved})
    calls = switched.calls
    did = set(calls.loc[calls["by"] == "mag_cache", ["step", "branch"]].itertuples(index=False, name=None))
    assert did == {(row.step, row.branch) for row in plan if row.skipped}
    assert switched.techniques[0].plan == plan


def test_the_ratios_are_measured_once_where_none_are_given(model, request_of_a_video, original, saved):
    switched, video = generated(model, request_of_a_video, MILD)
    assert len(switched.calls) == 24  # of the generation, without the one that measured
    rule = switched.techniques[0].rule
    assert [each.steps for each in rule.known] == [12]
    again = switched.model.generate(*request_of_a_video, **SETTINGS).video
    assert (again == video).all()
    assert len(rule.known) == 1
    _, from_file = generated(model, request_of_a_video, MILD | {"ratios": saved})
    assert (from_file == video).all()
    assert 0 < far(video, original) < 0.3
    assert (model.generate(*request_of_a_video, **SETTINGS).video == original).all()
    switched.model.generate(*request_of_a_video, **(SETTINGS | {"steps": 8}))
    assert [each.steps for each in rule.known] == [12, 8]


def test_a_higher_threshold_skips_more_and_the_known_magnitude_helps(
    model, request_of_a_video, original, saved
):
    skipped, apart = [], {}
    for threshold in (0.03, 0.12, 0.5):
        for rescaled in (True, False):
            given = {"threshold": threshold, "ratios": saved, "rescaled": rescaled}
            switched, video = generated(model, request_of_a_video, given)
            apart[threshold, rescaled] = far(video, original)
        skipped.append(int((switched.calls["by"] == "mag_cache").sum()))
    assert skipped == sorted(skipped)
    assert skipped[0] < skipped[-1]
    assert apart[0.5, True] < apart[0.5, False]


def test_it_goes_with_techniques_of_guidance_and_text(model, request_of_a_video, saved):
    others = {"guidance_gate": {"after_percent": 75}, "batched_guidance": {}, "text_keys": {}}
    given = MILD | {"ratios": saved}
    switched, video = generated(model, request_of_a_video, given, **others)
    assert {name for name, proof in switched.proofs().items() if not proof.passed} == set()
    assert (switched.model.generate(*request_of_a_video, **SETTINGS).video == video).all()
    # Measured in the same generation, what another technique counts is the same.
    measuring, _ = generated(model, request_of_a_video, MILD, **others)
    assert measuring.proofs()["text_keys"] == switched.proofs()["text_keys"]


def test_a_configuration_proves_it(model, tmp_path):
    text = "name: mine\ntechniques: {mag_cache: {threshold: 0.12}}\n"
    used = configuration.configure(
        model, configuration.parse_configuration(text), tmp_path, **SIZE, steps=12, progress=False
    )
    assert used.effect == "applied"
    assert "mag_cache answered" in used.proof
    never = configuration.parse_configuration("name: mine\ntechniques: {mag_cache: {threshold: 0.000001}}\n")
    used = configuration.configure(model, never, tmp_path, **SIZE, steps=12, progress=False)
    assert used.effect == "not applied"


def test_a_trial_shows_its_plan(model, request_of_a_video, saved):
    image, prompt = request_of_a_video
    asked = [{"image": image, "prompt": prompt} | SETTINGS | {"output": "np"}]
    trial = techniques.try_out(
        model,
        {"mag": {"mag_cache": MILD | {"ratios": saved}}},
        asked,
        rounds=1,
        precision=None,
        progress=False,
    )
    decisions = trial.decisions()
    assert set(decisions.loc[decisions["skipped"], "component"]) == {"expert_high", "expert_low"}
    assert trial.frame().loc[0, "did_what_it_says"]


# Planted faults.


def test_a_plan_that_never_skips_is_seen(model, request_of_a_video, original, saved):
    switched, video = generated(model, request_of_a_video, {"threshold": 1e-9, "ratios": saved})
    proof = switched.proofs()["mag_cache"]
    assert not proof.passed
    assert proof.sentence.startswith(
        "mag_cache skipped none of 24 calls: the smallest error of a step is 0.0"
    )
    assert proof.sentence.endswith(", the threshold is 1e-09.")
    assert (video == original).all()


def test_one_that_skips_across_the_switch_of_experts_is_seen(model, request_of_a_video, saved, monkeypatch):
    def never_forgets(rule, call, inner):
        if call.first and call.step:
            kept = rule._kept[call.branch]
            rule._kept[call.branch] = (call.component, *kept[1:])
            call = replace(call, first=False)
        return answer(rule, call, inner)

    plan, answer = Magnitudes.plan, MagRule.__call__
    switch = next(row.step for row in Magnitudes.load(saved).ratios if row.component == "expert_low")
    assert switch > 1
    monkeypatch.setattr(
        Magnitudes,
        "plan",
        lambda self, settings=None: [
            msgspec.structs.replace(
                row, skipped=True, source=row.source if row.step != switch else switch - 1
            )
            if row.step in (2, switch)
            else msgspec.structs.replace(row, skipped=False, source=row.step)
            for row in plan(self, settings)
        ],
    )
    monkeypatch.setattr(MagRule, "__call__", never_forgets)
    switched, _ = generated(model, request_of_a_video, MILD | {"ratios": saved})
    proof = switched.proofs()["mag_cache"]
    assert not proof.passed
    assert (
        "answered the first call of the low-noise expert with what another expert had predicted"
        in proof.sentence
    )


@pytest.mark.parametrize(
    ("idle", "title"), [("expert_high", "high-noise expert"), ("expert_low", "low-noise expert")]
)
def test_one_expert_only_is_seen(model, request_of_a_video, saved, monkeypatch, idle, title):
    plan = Magnitudes.plan
    monkeypatch.setattr(
        Magnitudes,
        "plan",
        lambda self, settings=None: [
            msgspec.structs.replace(row, skipped=row.skipped and row.component != idle)
            for row in plan(self, settings)
        ],
    )
    switched, _ = generated(model, request_of_a_video, MILD | {"ratios": saved})
    proof = switched.proofs()["mag_cache"]
    assert not proof.passed
    assert proof.sentence.startswith(f"mag_cache skipped nothing on the {title}: ")


def test_two_caches_cannot_go_together(model):
    with pytest.raises(WanlabError, match="cannot go together: both decide which steps are computed"):
        techniques.switch_on(model, ["mag_cache", "easy_cache"])
    with pytest.raises(
        WanlabError, match=r"mine\.yaml, line 2, .*easy_cache and mag_cache cannot go together"
    ):
        configuration.parse_configuration("name: mine\ntechniques: [easy_cache, mag_cache]\n", "mine.yaml")


def test_ratios_that_do_not_fit_are_one_line(model, request_of_a_video, saved, tmp_path):
    switched = techniques.switch_on(model, {"mag_cache": {"ratios": saved}})
    with pytest.raises(
        WanlabError, match="was measured with another number of steps, 12, than this generation's, 6"
    ):
        switched.model.generate(*request_of_a_video, **(SETTINGS | {"steps": 6}))
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"steps": 3}')
    with pytest.raises(WanlabError, match=r"wrong\.json holds no ratios of magnitudes"):
        techniques.switch_on(model, {"mag_cache": {"ratios": str(wrong)}})
    with pytest.raises(WanlabError, match=r"nowhere\.json"):
        techniques.switch_on(model, {"mag_cache": {"ratios": str(tmp_path / "nowhere.json")}})
    for given in (
        {"threshold": 0},
        {"in_a_row": 0},
        {"in_a_row": 1.5},
        {"first_percent": 101},
        {"rescaled": 3},
    ):
        with pytest.raises(WanlabError, match="mag_cache: Expected"):
            techniques.switch_on(model, {"mag_cache": given})


def test_another_family_is_refused(tmp_path):
    other = models.load("tiny-ltx-i2v", weights="random", device="cpu")
    with pytest.raises(WanlabError, match="mag_cache cannot run here: it needs a model of the Wan family"):
        techniques.switch_on(other, ["mag_cache"])


def test_the_table_is_read_without_pytorch():
    code = (
        "import sys, wanlab.techniques.mag_cache as m; print(m.MagCache().bound);"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
