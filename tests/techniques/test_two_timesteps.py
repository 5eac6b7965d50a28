"""Two timesteps of TI2V: the same video from two rows, and faults that the proof has to see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.distances import far

from wanlab import models, techniques
from wanlab.core.errors import WanlabError
from wanlab.models.blocks import blocks_of
from wanlab.models.variants import compile_blocks, shared_copy
from wanlab.techniques.switch_on import begin
from wanlab.techniques.timestep_rows import TwoRowBlock, modulated, use_two_rows

SETTINGS = {"height": 64, "width": 64, "frames": 9, "steps": 2, "output": "latent"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return models.load("tiny-wan2.2-ti2v", weights="random", device="cpu", dtype=request.param)


def generate(model):
    return model.generate(
        np.random.default_rng(0).random((64, 64, 3), dtype=np.float32), "a cat", **SETTINGS
    ).video


def test_two_rows_give_the_video_of_a_row_for_each_token(model):
    original = generate(model)
    switched = techniques.switch_on(model, ["two_timesteps"])
    assert far(generate(switched.model), original) < (1e-5 if model.dtype == torch.float32 else 0.02)
    # Three latent frames of 2 x 2 tokens; two steps with two branches.
    tokens, forwards = 3 * 2 * 2, 4
    assert switched.proofs()["two_timesteps"].sentence == (
        f"two_timesteps embedded {2 * forwards} rows for {tokens * forwards} tokens of the expert."
    )
    assert (generate(model) == original).all()
    assert not isinstance(model.component("expert").blocks[0], TwoRowBlock)


def test_it_goes_with_what_else_changes_the_network(model):
    chosen = [
        "two_timesteps",
        "text_keys",
        "fused_qkv",
        "attention_kernel",
        "batched_guidance",
        "vae_channels_last",
    ]
    switched = techniques.switch_on(model, chosen)
    original = generate(model)
    assert far(generate(switched.model), original) < (1e-4 if model.dtype == torch.float32 else 0.03)
    failed = {name for name, proof in switched.proofs().items() if not proof.passed}
    assert failed <= {"text_keys", "vae_channels_last"}  # of two steps none is kept, and nothing is decoded


def test_a_forward_is_exact_in_any_number_of_frames_and_batches():
    network = models.load("tiny-wan2.2-ti2v", weights="random", device="cpu").component("expert")
    copy = shared_copy(network)
    rows = use_two_rows(copy)
    draw = torch.Generator().manual_seed(0)
    for batch, frames in ((1, 1), (2, 1), (1, 4), (2, 3)):
        latents = torch.randn(batch, 48, frames, 4, 6, generator=draw)
        steps = torch.full((batch, frames, 2 * 3), 700.0)
        steps[:, 0] = 0
        text = torch.randn(batch, 512, 32, generator=draw)
        inputs = {"hidden_states": latents, "timestep": steps.flatten(1), "encoder_hidden_states": text}
        with torch.no_grad():
            expected, got = (each(**inputs, return_dict=False)[0] for each in (network, copy))
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert (rows.others, rows.first) == (0, 6)


def test_rows_are_multiplied_and_added_where_their_tokens_are():
    values = torch.ones(1, 5, 2)
    factors, shifts = torch.tensor([[[2.0, 3.0], [4.0, 5.0]]]), torch.tensor([[[0.5, 0.5], [1.0, 1.0]]])
    out = modulated(values, factors, 2, shifts)
    assert out[0].tolist() == [[2.5, 3.5]] * 2 + [[5.0, 6.0]] * 3


def test_a_model_with_one_timestep_lacks_it(bench):
    with pytest.raises(WanlabError, match="it needs a model with a timestep for every token, such as"):
        techniques.switch_on(bench.model, ["two_timesteps"])


def test_its_bound_counts_the_table_of_modulations():
    shares = techniques.shares_by_operations(models.get("wan2.2-ti2v-5b"), height=704, width=1280, frames=121)
    # 10.6 % eager and 5 % compiled were measured on an H200.
    assert shares.timesteps == pytest.approx(0.097, abs=0.01)
    assert techniques.shares_by_operations(models.get("wan2.2-i2v-a14b")).timesteps == 0


@pytest.mark.slow
def test_compiled_blocks_take_two_rows_too():
    torch._dynamo.reset()
    model = models.load("tiny-wan2.2-ti2v", weights="random", device="cpu")
    begun = begin(model, ["two_timesteps"], {})
    begun.place.finish(compile_blocks(begun.model))
    assert far(generate(begun.model), generate(model)) < 1e-4
    assert begun.proofs()["two_timesteps"].passed


# Planted faults.


def test_a_timestep_for_every_token_is_seen(model):
    switched = techniques.switch_on(model, ["two_timesteps"])
    network = switched.model.component("expert")
    network._forward_pre_hooks.clear()  # nothing tells how many tokens the first frame has
    generate(switched.model)
    proof = switched.proofs()["two_timesteps"]
    assert (proof.passed, proof.sentence) == (
        False,
        "two_timesteps embedded 48 of 48 rows of the expert: in 4 of 4 forwards they were not those of the first frame and"
        " of the others.",
    )


def test_an_embedding_that_was_put_back_is_seen(model):
    switched = techniques.switch_on(model, ["two_timesteps"])
    network = switched.model.component("expert")
    network.condition_embedder = network.condition_embedder.inner
    assert all(block.module.rows.asked == 0 for block in blocks_of(network))
    generate(switched.model)
    proof = switched.proofs()["two_timesteps"]
    assert (proof.passed, proof.sentence) == (
        False,
        "two_timesteps: the expert was given no timesteps of tokens.",
    )
