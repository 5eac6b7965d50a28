"""Every pair of techniques that no reason forbids: both do what they say, and neither changes what the other means."""

from __future__ import annotations

from itertools import combinations

import pytest

from wanlab import techniques
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


def test_all_go_together_and_each_can_be_taken_out(bench, original):
    chosen = {name: own for name, own in CHOSEN.items() if name != "guidance_interval"}
    switched, _ = bench.switched_on(chosen, **SETTINGS)
    failed = {name: proof.sentence for name, proof in switched.proofs().items() if not proof.passed}
    assert failed == {}
    assert (bench.generate(bench.model, **SETTINGS) == original).all()
