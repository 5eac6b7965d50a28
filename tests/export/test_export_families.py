"""Graphs of families other than Wan: of the clip that was asked for, and of what can be converted; the rest has a reason."""

from __future__ import annotations

import pytest

from wanlab import engines, export, models
from wanlab.core.errors import WanlabError
from wanlab.engines.tensorrt.profile import read_source
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
