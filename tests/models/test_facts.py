"""Parameters, bytes and work of every component, against counts made in another way."""

from __future__ import annotations

import pytest
from support.models_tiny import save

from wanlab.core.errors import WanlabError
from wanlab.models import facts, get, latent_shape
from wanlab.models.facts import wan_expert_flop
from wanlab.models.networks import skeleton


def row(name, component, **size):
    return facts(name, **size).set_index("component").loc[component]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "component", "size", "linear", "attention"),
    [
        ("wan2.2-i2v-a14b", "expert_high", dict(height=720, width=1280), 1810, 4714),
        ("wan2.2-i2v-a14b", "expert_low", dict(height=480, width=832), 785, 893),
        ("wan2.2-ti2v-5b", "expert", dict(height=704, width=1280, frames=121), 237, 279),
    ],
)
def test_known_work_of_the_experts(name, component, size, linear, attention):
    found = row(name, component, **size)
    assert found["linear_tflop"] == pytest.approx(linear, abs=0.6)
    assert found["attention_tflop"] == pytest.approx(attention, abs=0.6)


def test_known_parameters():
    """14.3 and 5.0 billion are the published sizes; UMT5-XXL's encoder has 5.7 billion."""
    large = facts("wan2.2-i2v-a14b", frames=5).set_index("component")["parameters"]
    assert large["expert_high"] == large["expert_low"] == 14_288_901_184
    assert large["text_encoder"] == 5_680_910_336
    assert large["vae_encoder"] + large["vae_decoder"] == 126_892_531
    small = facts("wan2.2-ti2v-5b", frames=5).set_index("component")["parameters"]
    assert small["expert"] == 4_999_787_712
    assert small["vae_encoder"] + small["vae_decoder"] == 704_688_668


def test_parameters_are_those_of_real_networks(tmp_path):
    from diffusers import WanImageToVideoPipeline

    folder = save(tmp_path)
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    found = facts(get(folder), height=32, width=32, frames=5).set_index("component")
    for component, networks in {
        "text_encoder": [pipeline.text_encoder],
        "vae_encoder": [pipeline.vae.encoder, pipeline.vae.quant_conv],
        "expert_high": [pipeline.transformer],
        "expert_low": [pipeline.transformer_2],
        "vae_decoder": [pipeline.vae.decoder, pipeline.vae.post_quant_conv],
    }.items():
        count = sum(p.numel() for network in networks for p in network.parameters())
        assert found.loc[component, "parameters"] == count
        assert found.loc[component, "size_fp32_bytes"] == 4 * count
        assert found.loc[component, "size_bf16_bytes"] == 2 * count
        assert found.loc[component, "size_fp8_bytes"] == count


@pytest.mark.parametrize("expanded", [False, True])
def test_the_formula_agrees_with_a_count(expanded):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    spec = get("wan-nano")
    config = dict(spec.part("transformer").config)
    latent = latent_shape(spec, 64, 96, 9)
    network = skeleton(spec.part("transformer")).to("meta")
    video = torch.empty(1, config["in_channels"], latent.frames, latent.height, latent.width, device="meta")
    times = torch.empty((1, latent.tokens) if expanded else 1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(video, times, torch.empty(1, 24, config["text_dim"], device="meta"))
    formula = wan_expert_flop(config, latent.tokens, 24, timestep_tokens=latent.tokens if expanded else 1)
    assert sum(formula.values()) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_work_of_the_vae_is_continued_exactly(component):
    """A few latent frames are counted and the rest inferred; a full count must agree."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    spec = get("wan-nano")
    latent = latent_shape(spec, 32, 48, 33)
    vae = skeleton(spec.part("vae")).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if component == "vae_encoder":
            vae.encode(torch.empty(1, 3, 33, 32, 48, device="meta"))
        else:
            vae.decode(
                torch.empty(1, latent.channels, latent.frames, latent.height, latent.width, device="meta")
            )
    found = row(spec, component, height=32, width=48, frames=33)
    assert found["total_tflop"] * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert found["convolution_tflop"] > 0.9 * found["total_tflop"]


def test_every_known_component_has_work():
    table = facts("wan2.2-ti2v-5b", height=256, width=256, frames=9)
    assert (table["total_tflop"] > 0).all()
    encoder = table.set_index("component").loc["vae_encoder"]
    assert encoder["input_shape"] == "[1, 3, 1, 256, 256]"  # this model encodes the image alone


def test_an_illegal_size_is_refused():
    with pytest.raises(WanlabError, match="480x848"):
        facts("wan2.2-i2v-a14b", height=480, width=854)
