"""Fused projections: the same video, no second copy of the weights, and faults that the proof has to see."""

from __future__ import annotations

import pytest
import torch
from support.distances import far

from wanlab import models, techniques
from wanlab.core.errors import WanlabError
from wanlab.models.variants import shared_copy
from wanlab.precision import apply_plan, load_plan
from wanlab.techniques.joining import joined, joined_linear


def storages(*networks):
    """Bytes of all storages that some networks hold, each counted once."""
    tensors = [parameter for network in networks for parameter in network.parameters()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture
def own():
    """A model of its own, as its weights change their place."""
    return models.load("wan-nano", device="cpu")


def test_fused_projections_give_the_video_within_rounding_and_take_no_memory(own, bench):
    before = storages(*(own.component(name) for name in own.components if name.startswith("expert")))
    values = {name: value.clone() for name, value in own.component("expert_low").state_dict().items()}
    switched = techniques.switch_on(own, ["fused_qkv"])
    assert bench.far(bench.generate(switched.model)) < 1e-5
    proof = switched.proofs()["fused_qkv"]
    assert (proof.passed, proof.sentence) == (
        True,
        "fused_qkv joined the layers of blocks: 6 of self-attention and 6 of the text in the high-noise expert and 6 of"
        " self-attention and 6 of the text in the low-noise expert, counted by their products.",
    )
    experts = [
        each.component(name) for each in (own, switched.model) for name in ("expert_high", "expert_low")
    ]
    assert storages(*experts) == before
    after = own.component("expert_low").state_dict()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert (bench.generate(own) == bench.video).all()
    # Another copy shares what is joined already.
    again = techniques.switch_on(own, ["fused_qkv"])
    first, second = (
        each.model.component("expert_high").blocks[0].attn1.to_qkv.weight for each in (switched, again)
    )
    assert first.data_ptr() == second.data_ptr()


def test_parameters_become_views_of_what_they_are_joined_to():
    layers = [torch.nn.Linear(8, rows) for rows in (4, 6)]
    inputs = torch.randn(3, 8)
    expected = torch.cat([layer(inputs) for layer in layers], dim=-1)
    fused = joined_linear(layers)
    assert torch.allclose(fused(inputs), expected, atol=1e-6)
    assert layers[1].weight.untyped_storage().data_ptr() == fused.weight.data_ptr()
    assert joined([layer.weight for layer in layers]).data_ptr() == fused.weight.data_ptr()
    # In another order they do not lie one after another.
    turned = joined([layer.weight for layer in reversed(layers)])
    assert turned.data_ptr() != fused.weight.data_ptr()
    assert torch.equal(turned[:6], layers[1].weight)


def test_keys_of_the_text_stay_with_the_technique_that_keeps_them(own, bench):
    switched = techniques.switch_on(own, ["fused_qkv", "text_keys", "attention_kernel", "batched_guidance"])
    original = bench.generate(bench.model, steps=8)
    assert far(bench.generate(switched.model, steps=8), original) < 1e-5
    proofs = switched.proofs()
    assert all(proof.passed for proof in proofs.values())
    assert "6 of self-attention and 0 of the text in the high-noise expert" in proofs["fused_qkv"].sentence


@pytest.mark.parametrize("name", ["tiny-wan2.1-i2v", "tiny-wan2.2-t2v", "tiny-wan2.2-ti2v"])
def test_the_other_models_of_the_family_have_them_fused_too(name):
    model = models.load(name, weights="random", device="cpu")
    image = (
        torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
        if model.conditions
        else None
    )
    settings = {"height": 64, "width": 64, "frames": 5, "steps": 2, "output": "latent"}
    original = model.generate(image, "a cat", **settings).video
    switched = techniques.switch_on(model, ["fused_qkv"])
    video = switched.model.generate(image, "a cat", **settings).video
    assert abs(video - original).max() < 1e-3 * abs(original).max()
    assert switched.proofs()["fused_qkv"].passed


def test_layers_of_a_plan_stay_and_are_said(own):
    planned = apply_plan(own, load_plan("uniform-int8-weight"), {}).model
    with pytest.raises(
        WanlabError, match="fused_qkv joins linear layers of PyTorch, and those of the high-noise expert are "
    ):
        techniques.switch_on(planned, ["fused_qkv"])


# Planted faults.


def test_layers_that_are_not_joined_in_one_expert_are_seen(own, bench):
    switched = techniques.switch_on(own, ["fused_qkv"])
    low = shared_copy(own.component("expert_low"))
    switched.model.component("expert_low").blocks = low.blocks
    assert bench.far(bench.generate(switched.model)) < 1e-5
    proof = switched.proofs()["fused_qkv"]
    assert (proof.passed, proof.sentence) == (
        False,
        "fused_qkv left self-attention of 6 of 6 blocks of the low-noise expert in separate products.",
    )


def test_a_fused_layer_that_computes_in_parts_is_seen(own, bench):
    class Parts(torch.nn.Linear):
        def forward(self, values):
            return torch.cat([values @ part.t() for part in self.weight.chunk(3)], dim=-1) + self.bias

    switched = techniques.switch_on(own, ["fused_qkv"])
    switched.model.component("expert_high").blocks[2].attn1.to_qkv.__class__ = Parts
    bench.generate(switched.model)
    proof = switched.proofs()["fused_qkv"]
    assert not proof.passed
    assert "self-attention of 1 of 6 blocks of the high-noise expert" in proof.sentence
