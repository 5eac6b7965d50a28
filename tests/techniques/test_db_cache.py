"""DBCache of cache-dit on wan-nano: what it skips, that nothing of it is left in the process, and planted faults."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
from support.distances import far

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques import db_cache
from wanlab.techniques.db_cache import BlockRule

if importlib.util.find_spec("cache_dit") is None:
    pytest.skip("needs cache-dit", allow_module_level=True)

SIZE = {"height": 64, "width": 96, "frames": 5}
SETTINGS = {**SIZE, "steps": 12, "output": "latent"}
MILD = {"threshold": 0.2}


@pytest.fixture(scope="module")
def original(bench):
    return bench.generate(bench.model, **SETTINGS)


def switched_on(bench, settings, **others):
    return bench.switched_on({"db_cache": settings} | others, **SETTINGS)


def failed(switched):
    return {name: proof.sentence for name, proof in switched.proofs().items() if not proof.passed}


def test_late_blocks_are_left_out_on_both_experts_and_leaving_the_copy_undoes_it(bench, original):
    switched, video = switched_on(bench, MILD)
    assert failed(switched) == {}
    sentence = switched.proofs()["db_cache"].sentence
    assert sentence.startswith("db_cache left out 5 blocks in ")
    assert "calls of the high-noise expert and" in sentence
    assert 0 < far(video, original) < 0.3
    assert (bench.generate(switched.model, **SETTINGS) == video).all()  # nothing is left of the last video
    assert switched.proofs()["db_cache"].sentence == sentence
    assert (bench.generate(bench.model, **SETTINGS) == original).all()


def test_the_decisions_are_those_of_the_calls(bench):
    switched, _ = switched_on(bench, MILD)
    cache = switched.techniques[0]
    skipped = {row.step for row in cache.decisions if row.skipped}
    answers = cache.rule.answers
    assert skipped == {row.step for row in answers if row.skipped and row.branch == "cond"}
    assert all(row.change < 0.2 for row in cache.decisions if row.skipped)
    assert {row.component for row in cache.decisions} == {"expert_high", "expert_low"}
    assert not any(row.skipped for row in answers if row.first or not row.free)
    assert len(answers) == 24


def test_a_higher_threshold_skips_more_and_limits_hold(bench, original):
    counts, apart = [], []
    for threshold in (0.08, 0.2, 0.6):
        switched, video = switched_on(bench, {"threshold": threshold})
        counts.append(sum(row.skipped for row in switched.techniques[0].rule.answers))
        apart.append(far(video, original))
    assert counts == sorted(set(counts))
    assert apart[0] < apart[-1]
    given = {"threshold": 5, "first_percent": 50, "in_a_row": 1, "first_blocks": 2, "last_blocks": 1}
    switched, _ = switched_on(bench, given)
    assert switched.proofs()["db_cache"].sentence.startswith("db_cache left out 3 blocks in ")
    for component in ("expert_high", "expert_low"):
        rows = [row for row in switched.techniques[0].rule.answers if row.component == component]
        run = "".join("s" if row.skipped else "c" for row in rows if row.branch == "cond")
        assert "ss" not in run
        assert run.index("s") == -(-len(run) // 2)


def test_nothing_is_skipped_at_a_threshold_of_nearly_zero_and_the_video_is_the_original(bench, original):
    switched, video = switched_on(bench, {"threshold": 1e-9})
    assert (video == original).all()
    proof = switched.proofs()["db_cache"]
    assert not proof.passed
    assert proof.sentence.startswith(
        "db_cache skipped nothing in 10 calls of the high-noise expert: the smallest change was 0.0"
    )
    assert proof.sentence.endswith(", the threshold is 1e-09.")


def test_a_video_without_guidance_has_one_branch(bench):
    switched = techniques.switch_on(bench.model, {"db_cache": MILD})
    for scale, calls in ((1.0, 12), (None, 24), (1.0, 12)):  # in turn, so that each finds the other's cache
        bench.generate(switched.model, **SETTINGS, guidance_scale=scale)
        assert failed(switched) == {}
        assert len(switched.techniques[0].rule.answers) == calls


def test_two_models_in_one_process_and_nothing_is_left(bench, original, capfd):
    import diffusers

    classes = (
        diffusers.WanImageToVideoPipeline,
        diffusers.WanTransformer3DModel,
        type(bench.model.component("expert_low").blocks[1]),
        diffusers.DiffusionPipeline,
        logging.Logger,
    )
    before, variables = [dict(vars(each)) for each in classes], dict(os.environ)
    one, _ = switched_on(bench, MILD)
    sentence = one.proofs()["db_cache"].sentence
    video = bench.generate(one.model, **SETTINGS)
    capfd.readouterr()
    other = models.load("wan-nano", device="cpu", dtype="bfloat16")
    another = techniques.switch_on(other, {"db_cache": {"threshold": 0.5}})
    mixed = bench.generate(another.model, **SETTINGS)
    assert failed(another) == {}
    assert (bench.generate(one.model, **SETTINGS) == video).all()
    assert one.proofs()["db_cache"].sentence == sentence
    assert (bench.generate(another.model, **SETTINGS) == mixed).all()
    for model in (bench.model, other):
        for network in (model.component("expert_high"), model.component("expert_low")):
            assert not [name for name in vars(network) if "cache" in name or "context" in name]
            assert not [block for block in network.blocks if block._forward_pre_hooks]
            assert "forward" not in vars(network)
    assert [dict(vars(each)) for each in classes] == before
    assert dict(os.environ) == variables
    assert (bench.generate(bench.model, **SETTINGS) == original).all()
    out, _ = capfd.readouterr()
    assert "Cache-DiT" not in out


@pytest.mark.slow
def test_importing_the_package_leaves_loggers_and_variables_as_they_were():
    code = (
        "import logging, os, transformers; before = dict(os.environ), logging.Logger.warning_once\n"
        "from wanlab.techniques.db_cache import _cache_dit\n"
        "assert _cache_dit().__name__ == 'cache_dit'\n"
        "assert (dict(os.environ), logging.Logger.warning_once) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "others",
    [
        {"guidance_gate": {"after_percent": 60}},
        {"guidance_interval": {"low": 0.5, "high": 0.9}},
        {"batched_guidance": {}, "guidance_gate": {"after_percent": 75}},
    ],
    ids=lambda others: "+".join(others),
)
def test_a_cache_begins_anew_where_a_branch_ends_or_joins_the_other(bench, others):
    switched, video = switched_on(bench, MILD, **others)
    assert failed(switched) == {}
    assert (bench.generate(switched.model, **SETTINGS) == video).all()


def test_a_configuration_proves_it(bench, tmp_path):
    text = "name: mine\ntechniques: {db_cache: {threshold: 0.2}}\n"
    used = configuration.configure(
        bench.model, configuration.parse_configuration(text), tmp_path, **SIZE, steps=12, progress=False
    )
    assert used.effect == "applied"
    assert "db_cache left out" in used.proof
    never = configuration.parse_configuration("name: mine\ntechniques: {db_cache: {threshold: 0.000001}}\n")
    used = configuration.configure(bench.model, never, tmp_path, **SIZE, steps=12, progress=False)
    assert used.effect == "not applied"


def test_a_trial_counts_a_skipped_call_by_its_blocks(bench):
    asked = [{"image": bench.image, "prompt": bench.prompt} | SETTINGS | {"output": "np"}]
    variants, _ = techniques.cache_variants(bench.model, {"db_cache": [0.2]})
    trial = techniques.try_out(bench.model, variants, asked, rounds=1, precision=None, progress=False)
    (tried,) = trial.variants
    answers = tried.switched.techniques[0].rule.answers
    share = sum(answer.skipped for answer in answers) / 24
    assert tried.skipped_percent == pytest.approx(100 * share * 5 / 6)
    assert set(trial.decisions()["component"]) == {"expert_high", "expert_low"}


@pytest.mark.slow
def test_compiled_blocks_are_left_out_too(bench, tmp_path):
    made = configuration.Configuration(
        name="mine",
        engines={"expert_high": "compiled", "expert_low": "compiled"},
        techniques={"db_cache": MILD},
    )
    used = configuration.configure(bench.model, made, tmp_path, **SIZE, steps=12, progress=False)
    assert used.effect == "applied", used.proof
    _, expected = switched_on(bench, MILD)
    assert far(bench.generate(used.model, **SETTINGS), expected) < 1e-3


# Planted faults.


def test_one_that_skips_across_the_switch_of_experts_is_seen(bench, monkeypatch):
    """Both experts share one cache, which is not made anew for the second."""
    cache_dit, shared = db_cache._cache_dit(), []
    adapter, anew = cache_dit.BlockAdapter, BlockRule._anew

    def sharing(**given):
        return adapter(**given, unique_blocks_name=[["shared"]])

    def one_manager(network, config):
        put_around(network, config)
        shared.append(network)
        manager = shared[0]._context_manager
        network._context_manager._cached_context_manager = manager._cached_context_manager

    def once(rule, component, pairs, computed):
        if component == "expert_high":
            anew(rule, component, pairs, computed)
        rule._open = component

    put_around = db_cache.put_around
    monkeypatch.setattr(cache_dit, "BlockAdapter", sharing)
    monkeypatch.setattr(db_cache, "put_around", one_manager)
    monkeypatch.setattr(BlockRule, "_anew", once)
    switched, _ = switched_on(bench, {"threshold": 5, "in_a_row": 100})
    proof = switched.proofs()["db_cache"]
    assert not proof.passed
    assert "answered the first call of the low-noise expert from before it took over" in proof.sentence


def test_a_cache_that_is_not_made_anew_for_a_video_is_seen(bench, monkeypatch):
    switched, _ = switched_on(bench, {"threshold": 5, "in_a_row": 100})
    monkeypatch.setattr(BlockRule, "_begin_cache", lambda *given: None)
    bench.generate(switched.model, **SETTINGS)
    proof = switched.proofs()["db_cache"]
    assert not proof.passed
    # The cache of the high-noise expert was freed at the switch, so what is left is the other one's.
    assert "answered the first call of the low-noise expert" in proof.sentence


@pytest.mark.parametrize(
    ("idle", "title"), [("expert_high", "high-noise expert"), ("expert_low", "low-noise expert")]
)
def test_one_expert_only_is_seen(bench, monkeypatch, idle, title):
    begin = BlockRule._begin_cache
    monkeypatch.setattr(
        BlockRule,
        "_begin_cache",
        lambda rule, component, pairs, computed: begin(
            rule, component, pairs, 100 if component == idle else computed
        ),
    )
    switched, _ = switched_on(bench, MILD)
    proof = switched.proofs()["db_cache"]
    assert not proof.passed
    assert f"skipped nothing in {10 if idle == 'expert_high' else 14} calls of the {title}" in proof.sentence


def test_blocks_that_no_cache_is_around_are_seen(bench, monkeypatch):
    monkeypatch.setattr(db_cache, "put_around", lambda network, config: None)
    switched, _ = switched_on(bench, MILD)
    proof = switched.proofs()["db_cache"]
    assert not proof.passed
    assert "skipped nothing in 10 calls of the high-noise expert: no change was measured" in proof.sentence


def test_branches_that_are_taken_for_one_another_are_seen(bench, monkeypatch):
    begin = BlockRule._begin_cache
    monkeypatch.setattr(
        BlockRule, "_begin_cache", lambda rule, component, pairs, computed: begin(rule, component, False, 1)
    )
    switched, _ = switched_on(bench, {"threshold": 5})
    proof = switched.proofs()["db_cache"]
    assert not proof.passed


# Wrong input.


def test_what_cannot_be_is_one_line(bench, monkeypatch):
    for given in ({"threshold": 0}, {"first_blocks": 0}, {"in_a_row": 1.5}, {"first_percent": 101}):
        with pytest.raises(WanlabError, match="db_cache: Expected"):
            techniques.switch_on(bench.model, {"db_cache": given})
    with pytest.raises(WanlabError, match="fewer than 6 together, the blocks of a denoiser of wan-nano, and"):
        techniques.switch_on(bench.model, {"db_cache": {"first_blocks": 4, "last_blocks": 2}})
    for other in ("easy_cache", "mag_cache"):
        with pytest.raises(WanlabError, match="cannot go together: both decide which steps are computed"):
            techniques.switch_on(bench.model, ["db_cache", other])
    with pytest.raises(WanlabError, match=r"mine\.yaml, line 3, .*db_cache.*computes all blocks"):
        configuration.parse_configuration(
            "name: mine\nengines: onnxruntime\ntechniques: [db_cache]\n", "mine.yaml"
        )
    ltx = models.load("tiny-ltx-i2v", weights="random", device="cpu")
    with pytest.raises(WanlabError, match="db_cache cannot run here: it needs a WanTransformer3DModel"):
        techniques.switch_on(ltx, ["db_cache"])
    monkeypatch.setattr(db_cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WanlabError, match=r"needs the package cache-dit: pip install 'wanlab\[cache\]'"):
        techniques.switch_on(bench.model, ["db_cache"])


def test_blocks_that_the_package_does_not_know_are_one_line(bench, monkeypatch):
    def refuses(*given, **named):
        raise AssertionError("No block forward pattern matched,\nsupported lists: ...")

    monkeypatch.setattr(db_cache._cache_dit(), "enable_cache", refuses)
    with pytest.raises(WanlabError, match="does not take the blocks of WanTransformer3DModel") as caught:
        switched_on(bench, MILD)
    assert "\n" not in str(caught.value)


def test_the_table_is_read_without_pytorch_and_without_the_package():
    code = (
        "import sys, wanlab.techniques.db_cache as m; print(m.DBCache().settings);"
        "assert not {'torch', 'cache_dit', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
