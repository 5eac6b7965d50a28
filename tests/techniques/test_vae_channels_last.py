"""Channels last in the VAE: the same video, its own weights in another layout, and faults that the proof has to see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wanlab import configuration, models, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques.layouts import convolutions, layout, to_channels_last

SETTINGS = {"output": "np", "steps": 2}


@pytest.fixture(scope="module")
def decoded(bench):
    return bench.generate(bench.model, **SETTINGS)


def test_the_video_is_the_same_within_rounding_and_the_loaded_vae_stays(bench, decoded):
    before = [module.weight.stride() for module in convolutions(bench.model.component("vae_decoder"))]
    switched, video = bench.switched_on(["vae_channels_last"], **SETTINGS)
    assert abs(video - decoded).max() < 1e-4
    proof = switched.proofs()["vae_channels_last"]
    assert proof.passed
    decoder = switched.techniques[0].halves["decoder"]
    assert decoder.calls == 2  # latent frames
    assert decoder.seen["last"] > 20
    assert decoder.seen["first"] == 0
    assert (
        f"{decoder.seen['last']} of {decoder.seen['last'] + decoder.seen['both']} convolutions"
        in proof.sentence
    )
    original = bench.model.component("vae_decoder")
    assert [module.weight.stride() for module in convolutions(original)] == before
    assert switched.model.component("vae_decoder").decoder.inner is not original.decoder
    assert (bench.generate(bench.model, **SETTINGS) == decoded).all()
    # Biases and norms are shared; the copied bytes are those of the convolutions that changed.
    shared = switched.model.component("vae_decoder").decoder.conv_in.bias
    assert shared is original.decoder.conv_in.bias
    moved = [m.weight.nbytes for m in convolutions(original) if layout(m.weight) == "first"]
    assert switched.techniques[0].copied_bytes == sum(moved) > 0


def test_a_kernel_of_one_point_is_in_both_layouts():
    network = torch.nn.Sequential(
        torch.nn.Conv3d(4, 8, 1), torch.nn.Conv3d(4, 8, 3), torch.nn.Conv2d(4, 4, 3)
    )
    assert [layout(module.weight) for module in network] == ["both", "first", "first"]
    assert to_channels_last(network) == 4 * (8 * 4 * 27 + 4 * 4 * 9)
    assert [layout(module.weight) for module in network] == ["both", "last", "last"]
    assert to_channels_last(network) == 0


@pytest.mark.parametrize(
    "name", ["tiny-wan2.2-ti2v", "tiny-ltx-t2v", "tiny-cogvideox-t2v", "tiny-hunyuan-t2v", "tiny-mochi"]
)
def test_the_vaes_of_other_models_decode_by_it_too(name):
    model = models.load(name, weights="random", device="cpu")
    image = (
        torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
        if model.conditions
        else None
    )
    original = model.generate(image, "a cat", height=64, width=64, steps=2).video
    switched = techniques.switch_on(model, ["vae_channels_last"])
    assert (
        abs(switched.model.generate(image, "a cat", height=64, width=64, steps=2).video - original).max()
        < 1e-3
    )
    assert switched.proofs()["vae_channels_last"].passed


@pytest.mark.slow
def test_a_compiled_decoder_is_told_from_one_that_runs_without_the_compiler(bench, decoded):
    torch._dynamo.reset()
    for _ in range(2):  # the second may find the graphs of the first
        switched, video = bench.switched_on({"vae_channels_last": {"compiled": True}}, **SETTINGS)
        assert abs(video - decoded).max() < 1e-3
        proof = switched.proofs()["vae_channels_last"]
        assert proof.passed
        assert "2 calls of the decoder ran compiled" in proof.sentence
    with torch.compiler.set_stance("force_eager"):
        bench.generate(switched.model, **SETTINGS)
    assert not switched.proofs()["vae_channels_last"].passed


def test_engines_of_the_vae_are_refused(bench):
    engined = replace(bench.model, engines=dict(bench.model.engines) | {"vae_decoder": "onnxruntime-cpu"})
    with pytest.raises(WanlabError, match="on onnxruntime its graph holds the weights in its own layout"):
        techniques.switch_on(engined, ["vae_channels_last"])


def test_a_configuration_decodes_to_prove_it(bench, tmp_path):
    chosen = configuration.parse_configuration("name: mine\ntechniques: [vae_channels_last]\n")
    size = {"height": 64, "width": 96, "frames": 5}
    used = configuration.configure(bench.model, chosen, tmp_path, **size, steps=2, progress=False)
    assert used.effect == "applied"
    assert "convolutions in the watched calls of the decoder ran with channels last" in used.proof


# Planted faults.


def test_weights_that_are_copied_back_in_each_call_are_seen(bench):
    switched = techniques.switch_on(bench.model, ["vae_channels_last"])
    module = switched.model.component("vae_decoder").decoder.conv_in
    plain = module._conv_forward
    module._conv_forward = lambda values, weight, bias: plain(values, weight.contiguous(), bias)
    bench.generate(switched.model, **SETTINGS)
    proof = switched.proofs()["vae_channels_last"]
    assert not proof.passed
    assert "2 of " in proof.sentence
    assert proof.sentence.endswith("come first: they are copied back in every call.")


def test_weights_that_went_back_are_seen(bench):
    switched = techniques.switch_on(bench.model, ["vae_channels_last"])
    module = switched.model.component("vae_decoder").encoder.conv_in
    module.weight = torch.nn.Parameter(module.weight.detach().contiguous())
    bench.generate(switched.model, **SETTINGS)
    proof = switched.proofs()["vae_channels_last"]
    assert (proof.passed, proof.sentence) == (
        False,
        "vae_channels_last: 1 weights of the encoder have their channels first again.",
    )


def test_a_generation_without_decoding_proves_nothing(bench):
    switched, _ = bench.switched_on(["vae_channels_last"])
    assert not switched.proofs()["vae_channels_last"].passed


def test_a_compiler_that_did_nothing_is_seen(bench):
    switched = techniques.switch_on(bench.model, {"vae_channels_last": {"compiled": True}})
    switched.techniques[0].halves["decoder"].inner._compiled_call_impl = None
    bench.generate(switched.model, **SETTINGS)
    proof = switched.proofs()["vae_channels_last"]
    assert (proof.passed, proof.sentence) == (
        False,
        "vae_channels_last ran 2 of 2 calls of the decoder without the compiler.",
    )
