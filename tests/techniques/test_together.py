"""Every pair of techniques that no reason forbids: both do what they say, and neither changes what the other means."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from wanlab import configuration, techniques
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
CHOSEN = INSIDE | AROUND
SETTINGS = {"steps": 10, "output": "np"}
LOSSY = {name for name in CHOSEN if techniques.TECHNIQUES[name].tier == "lossy"}


@pytest.fixture(scope="module")
def original(bench):
    return bench.generate(bench.model, **SETTINGS)


@pytest.mark.parametrize(
    ("one", "other"), [pair for pair in combinations(CHOSEN, 2) if set(pair) & set(INSIDE)]
)
def test_two_go_together(bench, original, one, other):
    assert not conflicts((one, other))
    switched, video = bench.switched_on({name: CHOSEN[name] for name in (one, other)}, **SETTINGS)
    proofs = switched.proofs()
    assert {name: proof.sentence for name, proof in proofs.items() if not proof.passed} == {}
    distance = abs(video - original).mean()
    assert distance < (0.1 if {one, other} & LOSSY else 1e-4)


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


def test_all_go_together_and_each_can_be_taken_out(bench, original):
    chosen = {name: own for name, own in CHOSEN.items() if name != "guidance_interval"}
    switched, _ = bench.switched_on(chosen, **SETTINGS)
    failed = {name: proof.sentence for name, proof in switched.proofs().items() if not proof.passed}
    assert failed == {}
    assert (bench.generate(bench.model, **SETTINGS) == original).all()
