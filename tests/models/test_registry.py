"""Which models are known, what is known of them, and what is said of a folder that is no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.models_tiny import save

from wanlab.core.errors import WanlabError
from wanlab.models import get, names
from wanlab.models.registry import reference


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path):
    """A folder with the same configuration files, to change."""
    for path in tiny.rglob("*.json"):
        target = tmp_path / path.relative_to(tiny)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a14b():
    spec = get("wan2.2-i2v-a14b")
    assert spec.components == ("text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder")
    assert [spec.part_of(name) for name in spec.components] == [
        "text_encoder", "vae", "transformer", "transformer_2", "vae",
    ]  # fmt: skip
    assert (spec.boundary_ratio, spec.expand_timesteps, spec.defaults.flow_shift) == (0.9, False, 3.0)
    assert (spec.spatial_factor, spec.temporal_factor, spec.patch, spec.latent_channels) == (
        8,
        4,
        (1, 2, 2),
        16,
    )
    assert not spec.is_local


def test_ti2v():
    spec = get("wan2.2-ti2v-5b")
    assert spec.components == ("text_encoder", "vae_encoder", "expert", "vae_decoder")
    assert (spec.boundary_ratio, spec.expand_timesteps, spec.defaults.flow_shift) == (None, True, 5.0)
    assert (spec.spatial_factor, spec.latent_channels, spec.defaults.fps) == (16, 48, 24)


def test_hub_id_of_a_registered_model_needs_no_network():
    assert get("Wan-AI/Wan2.2-TI2V-5B-Diffusers").name == "wan2.2-ti2v-5b"


def test_wan_nano_is_a_folder():
    spec = get("wan-nano")
    assert spec.is_local
    assert (spec.defaults.height, spec.defaults.width, spec.defaults.frames) == (128, 192, 17)
    assert get(spec.source).defaults == spec.defaults


def test_wan_nano_without_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("WANLAB_NANO", str(tmp_path / "gone"))
    with pytest.raises(WanlabError, match=r"gone is missing; .*WANLAB_NANO"):
        get("wan-nano")


def test_local_folder(tiny):
    spec = get(tiny)
    assert (spec.name, spec.source, spec.pipeline_class) == (tiny.name, str(tiny), "WanImageToVideoPipeline")
    assert (spec.spatial_factor, spec.temporal_factor, spec.latent_channels, spec.max_positions) == (
        4,
        4,
        4,
        64,
    )


def test_local_copy_of_a_published_model_has_its_defaults(copy):
    published = get("wan2.2-ti2v-5b")
    change(copy / "transformer" / "config.json", **published.part("transformer").config)
    change(copy / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    assert get(copy).defaults == published.defaults
    assert get(copy).components == published.components


@pytest.mark.parametrize(
    ("stated", "known"), [({}, False), ({"fps": 8}, False), ({"height": 480, "width": 832}, True)]
)
def test_sizes_are_known_where_they_are_stated(copy, stated, known):
    (copy / "wanlab.json").write_text(json.dumps({"defaults": stated}))
    assert get(copy).sizes_stated is known


@pytest.mark.parametrize("name", ["wan2.1-vace-1.3b", "mochi-1", "tiny-mochi", "wan-nano"])
def test_sizes_of_a_named_model_are_its_own(name):
    assert get(name).sizes_stated


def test_a_folder_with_the_name_of_a_published_model_is_opened_again(copy):
    folder = copy.parent / "tiny-mochi"
    copy.rename(folder)
    assert (get(folder).name, reference(get(folder))) == ("tiny-mochi", str(folder))
    assert reference(get("tiny-mochi")) == "tiny-mochi"


def test_text_to_video_folder_with_expanded_timesteps_takes_an_image(copy):
    change(copy / "model_index.json", _class_name="WanPipeline", expand_timesteps=True)
    assert get(copy).pipeline_class == "WanImageToVideoPipeline"
    change(copy / "model_index.json", expand_timesteps=False)
    assert get(copy).pipeline_class == "WanPipeline"


def test_another_family(tmp_path):
    """A folder of another class: names, factors and patch come from its configuration."""
    index = {
        "_class_name": "LTXImageToVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    }
    configs = {
        "text_encoder": {},
        "transformer": {"_class_name": "LTXVideoTransformer3DModel", "patch_size": 1, "patch_size_t": 1},
        "vae": {
            "_class_name": "AutoencoderKLLTXVideo",
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
            "latent_channels": 128,
        },
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.0}')
    for part, config in configs.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    spec = get(tmp_path)
    assert spec.components == ("text_encoder", "vae_encoder", "expert", "vae_decoder")
    assert (spec.spatial_factor, spec.temporal_factor, spec.patch, spec.latent_channels) == (
        32,
        8,
        (1, 1, 1),
        128,
    )
    assert spec.defaults.flow_shift == 2.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wan-nanno", "unknown model 'wan-nanno' .did you mean 'wan-nano'"),
        ("", "unknown model ''"),
        ("./nowhere/at-all", "no folder ./nowhere/at-all"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(WanlabError, match=says):
        get(name)


def test_unknown_component():
    with pytest.raises(WanlabError, match=r"no component 'expert_hihg' .did you mean 'expert_high'"):
        get("wan2.2-i2v-a14b").part_of("expert_hihg")


def _no_index(folder):
    (folder / "model_index.json").unlink()


def _no_config(folder):
    (folder / "vae" / "config.json").unlink()


def _half_json(folder):
    path = folder / "transformer" / "config.json"
    path.write_bytes(path.read_bytes()[:40])


def _no_object(folder):
    (folder / "model_index.json").write_text("[]")


def _image_pipeline(folder):
    change(
        folder / "model_index.json",
        _class_name="StableDiffusionPipeline",
        transformer=["diffusers", "UNet2DConditionModel"],
        transformer_2=[None, None],
        vae=["diffusers", "AutoencoderKL"],
    )


def _no_class(folder):
    change(folder / "model_index.json", _class_name=None)


def _no_vae(folder):
    change(folder / "model_index.json", vae=[None, None])


def _no_expert(folder):
    change(folder / "model_index.json", transformer=[None, None], transformer_2=[None, None])


def _two_models(folder):
    change(folder / "vae" / "config.json", _class_name="AutoencoderKLMochi")


@pytest.mark.parametrize(
    ("breaking", "says"),
    [
        (_no_index, "has no model_index.json"),
        (_no_config, "vae/config.json is missing"),
        (_half_json, "transformer/config.json cannot be read as JSON"),
        (_no_object, "holds no JSON object"),
        (_image_pipeline, "is a StableDiffusionPipeline, not a video pipeline"),
        (_no_class, "names no pipeline class"),
        (_no_vae, "names no vae"),
        (_no_expert, "names no transformer"),
        (_two_models, "says vae is AutoencoderKLWan, its config.json says AutoencoderKLMochi"),
    ],
)
def test_broken_folders(copy, breaking, says):
    breaking(copy)
    with pytest.raises(WanlabError, match=says) as caught:
        get(copy)
    assert "\n" not in str(caught.value)


def test_unreachable_hub(tmp_path):
    """Against a port where nothing listens; in its own process, as the client reads settings at import."""
    code = (
        "from wanlab import models\n"
        "from wanlab.core.errors import WanlabError\n"
        "try:\n    models.get('nobody/nothing')\n"
        "except WanlabError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert out.stdout.startswith("cannot fetch nobody/nothing from the hub (")
    assert out.stdout.count("\n") == 1


def test_facts_of_a_model_cost_no_torch():
    code = (
        "import sys, wanlab.models as m\n"
        "assert m.latent_shape(m.get('wan2.2-i2v-a14b'), 720, 1280, 81).tokens == 75600\n"
        "assert len([m.get(name) for name in m.names()]) > 20\n"
        "print([name for name in ('torch', 'diffusers', 'pandas', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names_are_all_gettable():
    assert [get(name).name for name in names()] == list(names())
