"""Every pair of techniques that no reason forbids: both do what they say, and neither changes what the other means."""

from __future__ import annotations

import importlib.util
from itertools import combinations

import pytest
import torch

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques.mag_cache import measure_magnitudes
from wanlab.techniques.registry import conflicts

INSIDE = {
    "fused_qkv": {},
    "attention_kernel": {"kernel": "sdpa-math"},
    "fp8_attention": {"rules": [{"format": "fp8", "blocks": "1-2"}]},
    "sparse_attention": {
        "pattern": "window",
        "block": 4,
        "density": 0.6,
        "dense_percent": 0,
        "dense_blocks": 4,
    },
    "vae_channels_last": {},
}
AROUND = {
    "text_keys": {},
    "batched_guidance": {},
    "easy_cache": {"threshold": 0.5, "first_percent": 0},
    "guidance_gate": {"after_percent": 60},
    "guidance_interval": {"low": 0.5},
}
FEWER = {
    "mag_cache": {"threshold": 0.12},
    "db_cache": {"threshold": 0.3},
    "half_size_start": {"until": 0.9},
    "solver": {"steps_percent": 80},
}
CHOSEN = INSIDE | AROUND | FEWER
SIZE = {"height": 64, "width": 96, "frames": 5}
SETTINGS = {"steps": 10, "output": "np"}
LOSSY = {name for name in CHOSEN if techniques.TECHNIQUES[name].tier == "lossy"}
PAIRS = [pair for pair in combinations(CHOSEN, 2) if set(pair) & {*INSIDE, *FEWER}]
JOINT = {"batched_guidance", "db_cache"}
"""Both branches are one call for the cache, which decides for both at once: another video, not other rounding."""


@pytest.fixture(scope="module")
def original(bench):
    return bench.generate(bench.model, **SETTINGS)


@pytest.fixture(scope="module")
def ratios(bench, tmp_path_factory):
    """A file of MagCache's ratios."""
    measured = measure_magnitudes(bench.model, **SIZE, steps=SETTINGS["steps"])
    return str(measured.save(tmp_path_factory.mktemp("ratios") / "ratios.json"))


@pytest.fixture(scope="module")
def settings_of(ratios):
    def settings(names):
        """Settings of techniques. MagCache measures anew only where the schedule is another one."""
        if "db_cache" in names and importlib.util.find_spec("cache_dit") is None:
            pytest.skip("needs cache-dit")
        chosen = {name: dict(CHOSEN[name]) for name in names}
        if "mag_cache" in names and "solver" not in names:
            chosen["mag_cache"]["ratios"] = ratios
        return chosen

    return settings


@pytest.fixture(scope="module")
def alone(bench, settings_of):
    """The video of one lossy technique alone, made once."""
    made = {}

    def video(name):
        if name not in made:
            _, made[name] = bench.switched_on(settings_of([name]), **SETTINGS)
        return made[name]

    return video


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if not conflicts(pair)])
def test_two_go_together(bench, original, settings_of, alone, one, other):
    switched, video = bench.switched_on(settings_of((one, other)), **SETTINGS)
    proofs = switched.proofs()
    assert {name: proof.sentence for name, proof in proofs.items() if not proof.passed} == {}
    lossy = {one, other} & LOSSY
    if len(lossy) == 1 and {one, other} != JOINT:
        rounding = 5e-3 if "fp8_attention" in lossy else 1e-4  # 8 bits may round to another code
        assert abs(video - alone(*lossy)).mean() < rounding  # not another part is left out
    assert abs(video - original).mean() < (0.1 if lossy else 1e-4)


@pytest.mark.slow
def test_compiled_blocks_take_all_of_them_and_are_not_compiled_anew_in_every_step(bench, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names = ["fused_qkv", "attention_kernel", "fp8_attention", "sparse_attention"]
    rules = [{"format": "fp8", "blocks": "1-2"}, {"format": "default", "steps": "3"}]
    chosen = {name: INSIDE[name] for name in names} | {"fp8_attention": {"rules": rules}}
    made = configuration.Configuration(
        name="mine", engines={"expert_high": "compiled", "expert_low": "compiled"}, techniques=chosen
    )
    size = {"height": 64, "width": 96, "frames": 5}
    used = configuration.configure(bench.model, made, tmp_path, **size, steps=8, progress=False)
    assert used.effect == "applied", used.proof
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2  # of a block, whatever its number, its expert and the step
    video = bench.generate(used.model, steps=8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    _, expected = bench.switched_on(chosen, steps=8)
    assert abs(video - expected).mean() < 0.05 * abs(expected).mean()


STACKS = {
    "easy_cache": {"mag_cache", "db_cache"},
    "db_cache": {"mag_cache", "easy_cache"},
    "mag_cache": {"easy_cache", "db_cache", "half_size_start", "solver"},
}
"""A step cache -> what the stack with all others does without. MagCache of 8 steps leaves none with two branches to join."""


@pytest.mark.parametrize("cache", STACKS)
def test_all_go_together_and_each_can_be_taken_out(bench, original, settings_of, cache):
    chosen = settings_of([name for name in CHOSEN if name not in STACKS[cache] | {"guidance_interval"}])
    switched, video = bench.switched_on(chosen, **SETTINGS)
    failed = {name: proof.sentence for name, proof in switched.proofs().items() if not proof.passed}
    assert failed == {}
    assert (bench.generate(switched.model, **SETTINGS) == video).all()
    assert (bench.generate(bench.model, **SETTINGS) == original).all()


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [(*pair, reason) for pair in PAIRS for *_, reason in conflicts(pair)],
)
def test_two_that_cannot_go_together_say_why(bench, one, other, reason):
    with pytest.raises(WanlabError, match=f"{one} and {other} cannot go together: {reason}; leave one out"):
        techniques.switch_on(bench.model, [one, other])


@pytest.fixture(scope="module")
def ti2v():
    return models.load("tiny-wan2.2-ti2v", weights="random", device="cpu")


@pytest.mark.parametrize("other", [*AROUND, "mag_cache", "db_cache", "solver"])
def test_two_timesteps_go_with_them(bench, ti2v, settings_of, other):
    settings = settings_of([other])
    settings[other].pop("ratios", None)  # those are wan-nano's
    alone = techniques.switch_on(ti2v, settings)
    both = techniques.switch_on(ti2v, settings | {"two_timesteps": {}})
    wanted = {"frames": 9, "steps": 6}
    expected = bench.generate(alone.model, **wanted)
    assert abs(bench.generate(both.model, **wanted) - expected).mean() < 1e-4
    assert both.proofs()["two_timesteps"].passed
    assert {name: proof.passed for name, proof in both.proofs().items() if name == other} == {
        name: proof.passed for name, proof in alone.proofs().items()
    }
