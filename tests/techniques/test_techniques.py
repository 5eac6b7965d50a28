"""Techniques on wan-nano: what each does to a video, its proof, and planted faults that the proof has to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.distances import far

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.core.plugins import run_files
from wanlab.measure import stages
from wanlab.techniques import registry
from wanlab.techniques.easy_cache import EasyCacheRule
from wanlab.techniques.remembering import Remembering

TOY = Path(__file__).parents[1] / "support" / "toy_technique.py"
SIZE = {"height": 64, "width": 64, "frames": 5}
SETTINGS = {**SIZE, "steps": 10, "output": "latent"}


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def request_of_a_video():
    return np.random.default_rng(0).random((64, 64, 3), dtype=np.float32), "the camera pans left"


@pytest.fixture(scope="module")
def original(model, request_of_a_video):
    return model.generate(*request_of_a_video, **SETTINGS).video


def switched_on(model, request_of_a_video, chosen, **settings):
    switched = techniques.switch_on(model, chosen)
    return switched, switched.model.generate(*request_of_a_video, **(SETTINGS | settings)).video


def test_an_exact_technique_gives_every_bit(model, request_of_a_video, original):
    switched, video = switched_on(model, request_of_a_video, ["text_keys"])
    assert (video == original).all()
    (proof,) = switched.proofs().values()
    assert proof.passed
    # Of ten steps with two branches, four on the high-noise expert: each has the text of either branch once.
    layers = 1 + 3 * len(model.component("expert_high").blocks)
    assert proof.sentence == (
        f"text_keys took {16 * layers} of {20 * layers} projections of the text from memory"
        f" ({6 * layers} of {8 * layers} of the high-noise expert and {10 * layers} of {12 * layers} of the low-noise"
        " expert)."
    )


def test_text_keys_follow_another_prompt(model, request_of_a_video):
    switched, _ = switched_on(model, request_of_a_video, ["text_keys"])
    image, _ = request_of_a_video
    changed = switched.model.generate(image, "the camera zooms in", **SETTINGS).video
    assert (changed == model.generate(image, "the camera zooms in", **SETTINGS).video).all()


def test_a_numeric_technique_differs_by_rounding(model, request_of_a_video, original):
    switched, video = switched_on(model, request_of_a_video, ["batched_guidance"])
    assert 0 < far(video, original) < 1e-5
    assert switched.proofs()["batched_guidance"].passed
    # An expert that has just taken over calls the branches apart.
    calls = switched.calls
    assert set(calls.loc[calls["by"] == "batched_guidance", "step"]) == set(range(10)) - {0, 4}


def test_a_cache_skips_more_above_a_higher_threshold(model, request_of_a_video, original):
    skipped, distance = [], []
    for threshold in (0.02, 0.1, 0.5):
        switched, video = switched_on(model, request_of_a_video, {"easy_cache": {"threshold": threshold}})
        calls = switched.calls
        skipped.append(int((calls["by"] == "easy_cache").sum()))
        distance.append(far(video, original))
        # Never in the first two calls of an expert, nor in the last step.
        assert calls.loc[calls["step"].isin([0, 1, 4, 5, 9]), "ran"].all()
        decisions = switched.techniques[0].decisions
        assert all(each.skipped == (each.summed_change < threshold) for each in decisions)
    assert skipped == sorted(skipped)
    assert skipped[0] < skipped[-1]
    assert distance[0] < distance[-1] < 0.6


def test_the_gate_is_what_the_difference_of_the_branches_says(model, request_of_a_video):
    switched, _ = switched_on(model, request_of_a_video, {"guidance_gate": {"after_percent": 60}})
    calls = switched.calls
    gated = calls[calls["by"] == "guidance_gate"]
    assert list(gated["step"]) == [6, 7, 8, 9]
    assert set(gated["branch"]) == {"uncond"}
    # A gate at the first step still computes both branches once on each expert.
    switched, _ = switched_on(model, request_of_a_video, {"guidance_gate": {"after_percent": 0}})
    ran = switched.calls.query("branch == 'uncond' and ran")
    assert list(ran["step"]) == [0, 4]


def test_an_interval_without_guidance_is_the_video_without_guidance(model, request_of_a_video):
    none = {"guidance_interval": {"low": 1.0, "high": 1.0}}
    switched, video = switched_on(model, request_of_a_video, none)
    unguided = model.generate(*request_of_a_video, guidance_scale=1.0, **SETTINGS).video
    assert far(video, unguided) < 1e-6
    assert int((switched.calls["by"] == "guidance_interval").sum()) == 10


def test_techniques_go_together_and_the_original_stays(model, request_of_a_video, original):
    chosen = {
        "guidance_gate": {},
        "easy_cache": {"threshold": 0.1},
        "batched_guidance": {},
        "text_keys": None,
    }
    switched, video = switched_on(model, request_of_a_video, chosen)
    assert [each.name for each in switched.techniques] == [
        "text_keys",
        "batched_guidance",
        "easy_cache",
        "guidance_gate",
    ]
    assert {name for name, proof in switched.proofs().items() if not proof.passed} == set()
    assert far(video, original) < 0.5
    # What is left out is not computed by anything inside: the branch without text never runs behind the gate.
    late = switched.calls.query("step >= 5 and branch == 'uncond'")
    assert set(late["by"]) == {"guidance_gate"}
    again = model.generate(*request_of_a_video, **SETTINGS).video
    assert (again == original).all()
    shared = switched.model.component("expert_high").blocks[0].attn1.to_q.weight
    assert shared is model.component("expert_high").blocks[0].attn1.to_q.weight
    # A second generation begins with empty memories.
    assert (switched.model.generate(*request_of_a_video, **SETTINGS).video == video).all()


def test_stages_are_measured_through_the_stand_ins(model, request_of_a_video):
    switched = techniques.switch_on(model, ["text_keys"])
    with stages(switched.model) as record:
        switched.model.generate(*request_of_a_video, **(SETTINGS | {"steps": 2}))
    frame = record.frame()
    assert list(frame.loc[frame["branch"].notna(), "branch"]) == ["cond", "uncond"] * 2


@pytest.mark.parametrize("name", ["tiny-ltx-i2v", "tiny-cogvideox-t2v", "tiny-mochi", "tiny-hunyuan-t2v"])
def test_a_cache_goes_around_the_denoiser_of_any_family(name):
    model = models.load(name, weights="random", device="cpu")
    image = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32) if model.conditions else None
    settings = {"steps": 8, "output": "latent"}
    switched = techniques.switch_on(model, {"easy_cache": {"threshold": 10.0, "first_percent": 0}})
    video = switched.model.generate(image, "a cat", **settings).video
    assert switched.proofs()["easy_cache"].passed
    assert switched.calls["ran"].sum() == 3  # the first two, and the last
    assert np.isfinite(video).all()
    with pytest.raises(WanlabError, match="guidance_gate cannot run here: it needs a model whose branches"):
        techniques.switch_on(model, ["guidance_gate"])


# Planted faults.


def test_a_cache_that_never_skips_is_seen(model, request_of_a_video, original):
    switched, video = switched_on(model, request_of_a_video, {"easy_cache": {"threshold": 1e-9}})
    proof = switched.proofs()["easy_cache"]
    assert not proof.passed
    assert proof.sentence.startswith(
        "easy_cache skipped none of 20 calls: the smallest sum of estimated changes was "
    )
    assert proof.sentence.endswith(", the threshold is 1e-09.")
    assert (video == original).all()


def test_a_cache_that_skips_across_the_switch_of_experts_is_seen(model, request_of_a_video, monkeypatch):
    forget, begun = EasyCacheRule._forget, []

    def once(rule):
        if rule not in begun:
            begun.append(rule)
            forget(rule)

    monkeypatch.setattr(EasyCacheRule, "_forget", once)
    switched, _ = switched_on(model, request_of_a_video, {"easy_cache": {"threshold": 5.0}})
    proof = switched.proofs()["easy_cache"]
    assert not proof.passed
    assert (
        "answered the first call of the low-noise expert with what another expert had predicted"
        in proof.sentence
    )


def test_a_technique_on_one_expert_only_is_seen(model, request_of_a_video):
    switched = techniques.switch_on(model, ["text_keys"])
    for memory in switched.model.component("expert_low").modules():
        if isinstance(memory, Remembering):
            memory.__class__ = type("Forgetful", (Remembering,), {"forward": forgetful})
    switched.model.generate(*request_of_a_video, **SETTINGS)
    proof = switched.proofs()["text_keys"]
    assert (proof.passed, proof.sentence) == (
        False,
        "text_keys computed keys and values of the low-noise expert anew in every step.",
    )


def forgetful(memory, values):
    memory.calls += 1
    memory.seen.add(id(values))
    return memory.inner(values)


def test_a_gate_without_guidance_is_seen(model, request_of_a_video):
    switched, _ = switched_on(
        model, request_of_a_video, ["guidance_gate", "batched_guidance"], guidance_scale=1.0
    )
    assert [proof.passed for proof in switched.proofs().values()] == [False, False]


def test_nothing_is_proven_before_a_generation(model):
    with pytest.raises(WanlabError, match="generate a video first"):
        techniques.switch_on(model, ["text_keys"]).proofs()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"easy_cach": {}}, r"no technique 'easy_cach' \(did you mean 'easy_cache'\?\)"),
        (
            {"easy_cache": {"treshold": 1}},
            r"easy_cache has no setting 'treshold' \(did you mean 'threshold'\?\); it has threshold, first_percent",
        ),
        (
            {"easy_cache": {"threshold": "much"}},
            r"easy_cache: Expected `float`, got `str` - at `\$.threshold`",
        ),
        ({"easy_cache": {"threshold": 0}}, r"easy_cache: Expected `float` > 0"),
        (
            {"guidance_gate": {}, "guidance_interval": {}},
            "guidance_gate and guidance_interval cannot go together: both",
        ),
        ({"guidance_interval": {"low": 0.9, "high": 0.1}}, "low end 0.9 is above its high end 0.1"),
    ],
)
def test_what_cannot_be_is_one_line(model, chosen, message):
    with pytest.raises(WanlabError, match=message):
        techniques.switch_on(model, chosen)


def test_an_engine_that_a_technique_does_not_work_on_is_known_by_its_label(model):
    engined = replace(model, engines=dict(model.engines) | {"expert_low": "onnxruntime-cpu"})
    with pytest.raises(
        WanlabError, match="low-noise expert: on onnxruntime its graph computes them from the text"
    ):
        techniques.switch_on(engined, ["text_keys"])
    assert techniques.switch_on(engined, ["easy_cache"]).techniques


# Configurations.


def test_a_configuration_names_techniques_with_or_without_settings():
    text = "name: mine\ntechniques: [guidance_gate, easy_cache]\n"
    listed = configuration.parse_configuration(text)
    assert listed.techniques == {"guidance_gate": {}, "easy_cache": {}}
    mapped = configuration.parse_configuration(
        "name: other\ntechniques:\n  easy_cache: {threshold: 0.05}\n  guidance_gate:\n"
    )
    assert mapped.hash == listed.hash  # a default is a default, and order means nothing
    assert configuration.parse_configuration(mapped.to_yaml()) == mapped
    assert configuration.parse_configuration(listed.to_yaml()) == listed
    stronger = configuration.parse_configuration("name: mine\ntechniques: {easy_cache: {threshold: 0.2}}\n")
    assert stronger.hash != listed.hash


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ("techniques: [easy_cache, easy_cach]", 2, "no technique 'easy_cach'"),
        ("techniques: [easy_cache, easy_cache]", 2, "'easy_cache' is given twice"),
        ("techniques:\n  easy_cache:\n    threshold: -1", 3, "Expected `float` > 0"),
        ("techniques:\n  easy_cache: 3", 3, "settings are {setting: value}"),
        ("techniques: easy_cache", 2, "Expected `object`"),
        ("techniques: [guidance_gate, guidance_interval]", 2, "cannot go together"),
        ("engines: onnxruntime\ntechniques:\n  batched_guidance:", 4, "its graph has one size of batch"),
    ],
)
def test_a_mistake_among_techniques_names_its_line(lines, line, message):
    with pytest.raises(WanlabError) as error:
        configuration.parse_configuration(f"name: mine\n{lines}\n", "mine.yaml")
    assert f"mine.yaml, line {line}" in str(error.value)
    assert message in str(error.value)


def test_a_configuration_applies_and_proves_its_techniques(model, tmp_path):
    chosen = configuration.parse_configuration(
        "name: mine\ntechniques: {easy_cache: {threshold: 0.5}, text_keys: }\n"
    )
    used = configuration.configure(model, chosen, tmp_path, **SIZE, steps=10, progress=False)
    assert used.effect == "applied"
    assert "text_keys took" in used.proof
    assert "easy_cache answered" in used.proof
    never = configuration.parse_configuration("name: mine\ntechniques: {easy_cache: {threshold: 0.000001}}\n")
    used = configuration.configure(model, never, tmp_path, **SIZE, steps=4, progress=False)
    assert used.effect == "not applied"


@pytest.mark.slow
def test_techniques_go_with_engines_and_plans(model, request_of_a_video, tmp_path):
    text = "name: mine\nengines: onnxruntime\nplan: uniform-int8-weight\ntechniques: {easy_cache: {threshold: 0.5}}\n"
    used = configuration.configure(
        model, configuration.parse_configuration(text), tmp_path, **SIZE, steps=10, progress=False
    )
    assert used.effect == "applied"
    assert "networks run in ONNX Runtime" in used.proof
    assert "easy_cache answered" in used.proof
    cost = configuration.measure_isolated(used, *request_of_a_video, **SIZE, steps=4)
    assert cost["first_video_ms"] > 0


def test_explain_says_the_order_and_why(capsys):
    explained = configuration.explain("cached", "wan-nano", device="cpu")
    assert list(explained.techniques["technique"]) == ["easy_cache", "guidance_gate"]
    assert explained.techniques["bound"].str.match(r"at most \d\.\d\dx: ").all()
    assert any("guidance_gate" in line for line in explained.checks)
    lacking = configuration.explain("cached", "tiny-ltx-i2v", device="cpu").missing
    assert any(line.startswith("for guidance_gate: a model whose branches") for line in lacking)


# The table.


def test_bounds_follow_from_where_the_time_goes():
    shares = techniques.Shares("a measurement", 0.8, 0.1, 0.6, 0.01, 2, 20)
    bounds = {name: kind().bound(shares) for name, kind in techniques.TECHNIQUES.items()}
    assert bounds["guidance_gate"].saved == pytest.approx(0.8 / 2 * 0.5)
    assert bounds["guidance_gate"].times_faster == pytest.approx(1.25)
    assert bounds["easy_cache"].saved == pytest.approx(0.8 * 15 / 20)
    assert bounds["text_keys"].saved == pytest.approx(0.8 * 0.01 * 19 / 20)
    assert str(bounds["guidance_gate"]) == "at most 1.25x: half of the work of 10 of 20 steps"


def test_shares_of_operations_are_those_of_the_facts():
    spec = models.get("wan2.2-i2v-a14b")
    shares = techniques.shares_by_operations(spec, height=720, width=1280, frames=81)
    assert shares.self_attention == pytest.approx(0.72, abs=0.03)  # 4 N^2 d of 40 layers at 75,600 tokens
    assert 0.95 < shares.denoising < 1
    assert (shares.branches, shares.steps) == (2, spec.defaults.steps)


def test_the_command_lists_what_this_machine_can_run(capsys):
    from wanlab.cli.main import main

    assert main(["techniques", "--model", "tiny-ltx-i2v", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "easy_cache" in out
    assert "it can run here" in out
    assert "it cannot run here: it needs a model whose branches of guidance are calls of their own" in out


def test_a_technique_of_ones_own_is_one_file(model, request_of_a_video, original, tmp_path):
    run_files(str(TOY), registry.VARIABLE, "wanlab_technique")
    try:
        switched, video = switched_on(model, request_of_a_video, ["halved", "text_keys"])
        assert (video == original).all()
        assert switched.proofs()["halved"].sentence == "halved 20 of 20 calls."
        chosen = configuration.parse_configuration("name: mine\ntechniques: [halved]\n")
        assert configuration.configure(model, chosen, tmp_path, **SIZE, steps=2).effect == "applied"
    finally:
        del registry.TECHNIQUES["halved"]
    code = "import wanlab, json; print(json.dumps(list(wanlab.techniques.TECHNIQUES)))"
    environment = os.environ | {registry.VARIABLE: str(TOY)}
    names = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(names.stdout)[-1] == "halved"


def test_the_docs_show_the_technique_that_is_tested(root):
    code = TOY.read_text().partition('"""\n\n')[2]
    assert f"```python\n{code}```" in (root / "docs" / "techniques.md").read_text()


def test_two_techniques_of_one_name_are_refused():
    with pytest.raises(WanlabError, match="there is a technique 'easy_cache' already"):
        registry.register(techniques.TECHNIQUES["easy_cache"])


def test_no_technique_is_stated_to_go_with_itself_or_with_one_that_does_not_exist():
    for kind in techniques.TECHNIQUES.values():
        assert set(kind.not_with) <= set(techniques.TECHNIQUES) - {kind.name}
        assert kind.tier in ("exact", "numeric", "lossy")
    orders = [kind.order for kind in techniques.TECHNIQUES.values()]
    assert len(set(orders)) == len(orders)
