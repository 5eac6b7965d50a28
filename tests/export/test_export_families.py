"""Graphs of families other than Wan: of the clip that was asked for, and of what can be converted; the rest has a reason."""

from __future__ import annotations

import pytest
import torch

from wanlab import engines, export, models
from wanlab.core.errors import WanlabError
from wanlab.engines import PixelProfile
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.engines.tensorrt.profile import network_shapes, read_source
from wanlab.export.components import component_spec, heaviest_components


@pytest.fixture(scope="module")
def ltx():
    return models.load("tiny-ltx-t2v", weights="random", device="cpu")


def test_a_graph_of_one_clip_has_the_sizes_that_were_asked_for(ltx, tmp_path):
    size = {"height": 64, "width": 96, "frames": 9}
    export.export(ltx, "expert", tmp_path / "expert.onnx", **size)
    shapes = {name: shape for name, (_, shape) in read_source(tmp_path / "expert.onnx").inputs.items()}
    assert shapes["hidden_states"] == ("batch", 2 * 2 * 3, 128)
    table = engines.compare_forms(ltx, "expert", tmp_path / "forms", rounds=1, progress=False, **size)
    assert table["form"].tolist() == ["original", "eager"]


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("tiny-wan2.2-t2v", ("expert_high", "vae_decoder")),
        ("tiny-ltx-t2v", ("expert", "vae_decoder")),
        ("tiny-ltx-condition", ("expert",)),
        ("tiny-animate", ("vae_decoder",)),
    ],
)
def test_the_heaviest_networks_are_those_that_convert(name, components):
    model = models.load(name, weights="random", device="cpu")
    assert heaviest_components(model) == components


def test_a_decoder_that_takes_a_timestep_stays_with_a_reason():
    model = models.load("tiny-ltx-condition", weights="random", device="cpu")
    assert "vae_decoder" not in export.components_of(model)
    with pytest.raises(WanlabError, match="which takes a timestep besides the latents: it stays in PyTorch"):
        component_spec(model, "vae_decoder")


@pytest.fixture(scope="module")
def mochi():
    model = models.load("tiny-mochi", weights="random", device="cpu")
    for name, weight in model.pipeline.transformer.named_parameters():
        if "blocks" in name and weight.ndim == 2:
            weight.data *= 20  # so that tokens of the text count as much as those of the video
    return model


TOKENS = 256
MASKS = {
    "all": torch.ones(2, TOKENS),
    "in front": torch.arange(TOKENS) < torch.tensor([[30], [7]]),
    "none": torch.arange(TOKENS) < torch.tensor([[0], [30]]),
    "behind": torch.arange(TOKENS) >= torch.tensor([[200], [255]]),
    "gaps": torch.arange(TOKENS) % torch.tensor([[3], [7]]) == 1,
}


def test_a_mask_of_the_text_makes_no_shape_of_the_graph_and_counts_as_in_pytorch(mochi, tmp_path):
    report = export.export(mochi, "expert", tmp_path / "expert.onnx")
    assert "NonZero" not in report.operators
    engine = OrtEngine(tmp_path / "expert.onnx", provider="cpu")
    plan = component_spec(mochi, "expert")
    drawn = plan.inputs_for(report.shape, torch.Generator().manual_seed(0))
    feeds = dict(zip(plan.inputs, drawn, strict=True))
    seen = []
    for mask in MASKS.values():
        feeds["encoder_attention_mask"] = mask.bool()
        with torch.no_grad():
            expected = plan.reference(*feeds.values())
        torch.testing.assert_close(engine.run(feeds)["velocity"], expected, rtol=1e-4, atol=1e-5)
        first = {name: tensor[:1] for name, tensor in feeds.items()}
        torch.testing.assert_close(engine.run(first)["velocity"], expected[:1], rtol=1e-4, atol=1e-5)
        seen.append(expected)
    # No two masks give the same, so that one which is ignored would show.
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(seen) for b in seen[:i])


def test_a_rewritten_network_of_one_clip_is_compared_with_its_original_form(mochi, tmp_path):
    table = engines.compare_forms(mochi, "expert", tmp_path, provider="cpu", rounds=1, progress=False)
    assert table["form"].tolist() == ["original", "friendly", "eager"]
    assert table["nodes"][0] > table["nodes"][1]
    assert (table["relative_l2"].dropna() < 1e-5).all()


def test_a_text_beside_a_picture_keeps_its_length_in_every_comparison(tmp_path):
    model = models.load("tiny-wan2.1-i2v", weights="random", device="cpu")
    report = export.export(model, "expert", tmp_path / "expert.onnx")
    assert "text_tokens" not in report.dynamic_axes["encoder_hidden_states"].values()
    table = engines.parity_all(model, [report], provider="cpu")
    assert len(table) == 3
    assert table["shape"].str.endswith(", 512 text tokens").all()
    assert (table["relative_l2"] < 1e-4).all()


@pytest.mark.parametrize("component", ["expert", "vae_decoder"])
def test_a_default_profile_stays_in_the_traced_range_of_a_small_model(component, tmp_path):
    model = models.load("tiny-wan2.2-ti2v", weights="random", device="cpu")
    source = read_source(export.export(model, component, tmp_path / "graph.onnx").path)
    low, best, high = network_shapes(source, PixelProfile()).inputs[next(iter(source.inputs))]
    frames = {"expert": (2, 3, 3), "vae_decoder": (3, 3, 3)}[component]
    rows = {"expert": (4, 4, 6), "vae_decoder": (2, 4, 6)}[component]
    assert (low[2], best[2], high[2]) == frames
    assert (low[3], best[3], high[3]) == (low[4], best[4], high[4]) == rows


def test_a_default_profile_of_a_graph_of_one_clip_is_this_clip(tmp_path):
    model = models.load("tiny-cogvideox-i2v", weights="random", device="cpu")
    source = read_source(export.export(model, "expert", tmp_path / "expert.onnx").path)
    shapes = network_shapes(source, PixelProfile())
    assert shapes.inputs["hidden_states"] == ((1, 3, 32, 8, 8), (1, 3, 32, 8, 8), (2, 3, 32, 8, 8))
    assert len({(clip.height, clip.width, clip.frames) for clip in shapes.clips.values()}) == 1


def test_what_all_clips_share_keeps_its_size_beside_both_branches_of_guidance(tmp_path):
    model = models.load("tiny-cogvideox1.5-i2v", weights="random", device="cpu")
    assert model.pipeline.transformer.config.ofs_embed_dim
    size = {"height": 64, "width": 64, "frames": 9}
    export.export(model, "expert", tmp_path / "expert.onnx", **size)
    inputs = read_source(tmp_path / "expert.onnx").inputs
    assert (inputs["ofs"][1], inputs["timestep"][1]) == ((1,), ("batch",))
    engine = OrtEngine(tmp_path / "expert.onnx", provider="cpu")
    plan = component_spec(model, "expert")
    shape = export.components.default_shape(model, batch=2, **size)
    drawn = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    feeds = dict(zip(plan.inputs, drawn, strict=True))
    with torch.no_grad():
        expected = plan.reference(*drawn)
    assert torch.allclose(engine.run(feeds)["velocity"], expected, atol=1e-4)
