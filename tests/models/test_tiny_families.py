"""Tiny models of every family: read, loaded with random weights, run by diffusers' own pipeline, saved and loaded again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from support.saved_families import inputs, save_tiny

from wanlab.core.errors import WanlabError
from wanlab.models import get, load, names, tiny_names
from wanlab.models.networks import network_class, skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

# Frames and pixels per latent position, and channels, of the published models; the longest beginning of a name counts.
PUBLISHED = {
    "tiny-": (4, 8, 16),  # the VAEs of Wan2.1, CogVideoX, HunyuanVideo and EasyAnimate
    "tiny-allegro": (4, 8, 4),
    "tiny-animatediff": (1, 8, 4),
    "tiny-hunyuan1.5": (4, 16, 32),
    "tiny-latte": (1, 8, 4),
    "tiny-ltx": (8, 32, 128),
    "tiny-mochi": (6, 8, 12),
    "tiny-svd": (1, 8, 4),
    "tiny-wan2.2-ti2v": (4, 16, 48),
}
NOT_STORED = ("_class_name", "architectures", "model_type")
FOLDERS = ("tiny-wan2.1-i2v", "tiny-hunyuan-i2v", "tiny-ltx-i2v")
LONG = ("tiny-allegro", "tiny-animate", "tiny-helios", "tiny-hunyuan1.5")  # of more frames or larger parts
EVERY = pytest.mark.parametrize("name", tiny_names())
EVERY_RUN = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n.startswith(LONG) else n for n in tiny_names()],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp("saved") / name)
        return made[name]

    return folder


def geometry(name):
    return PUBLISHED[max((start for start in PUBLISHED if name.startswith(start)), key=len)]


def same_in(known, stated):
    """Whether a configuration holds what is stated, which may leave entries out."""
    if isinstance(stated, dict):
        return all(same_in(known.get(key), value) for key, value in stated.items())
    return json.loads(json.dumps(known)) == stated


def test_tiny_names_are_no_models_with_weights():
    assert not set(tiny_names()) & set(names())
    assert {"tiny-wan2.2-i2v", "tiny-ltx-i2v", "tiny-mochi"} <= set(tiny_names())


def test_a_misspelled_tiny_name_is_recognised():
    with pytest.raises(WanlabError, match=r"unknown model 'tiny-motchi' .did you mean 'tiny-mochi'"):
        get("tiny-motchi")


def test_weights_of_a_tiny_model_are_not_looked_for(monkeypatch):
    monkeypatch.setattr("wanlab.models.loading.fetch_folder", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(WanlabError, match=r'^tiny-mochi has no weights .* weights="random"$'):
        load("tiny-mochi", device="cpu")


@EVERY
def test_configurations_are_the_classes_own(name):
    spec = get(name)
    assert (spec.name, spec.source) == (name, name)
    assert spec.sizes_stated
    for part in spec.parts:
        config = skeleton(part).config
        known = config.to_dict() if part.library == "transformers" else dict(config)
        for key, value in part.config.items():
            assert key in NOT_STORED or same_in(known[key], value), (part.name, key)


@EVERY_RUN
def test_a_tiny_model_runs_in_its_own_pipeline(name):
    import numpy as np

    model = load(name, weights="random", device="cpu")
    shape = model.spec.defaults
    assert model.load.memory_bytes < 32e6
    given = inputs(model, prompt="a cat"), inputs(model, prompt="a dog walks")
    videos = [model.pipeline(**arguments).frames for arguments in given]
    for frames in videos:
        assert frames.shape == (1, shape.frames, shape.height, shape.width, 3)
        assert frames.min() >= 0
        assert frames.max() <= 1
    assert np.array_equal(*videos) != ("prompt" in given[0]), "the prompt does not reach the video"


@EVERY_RUN
def test_the_vae_has_the_geometry_of_the_published_one(name):
    import torch

    model = load(name, weights="random", device="cpu", components=("vae_encoder",))
    shape, (temporal, spatial, channels) = model.spec.defaults, geometry(name)
    vae = model.pipeline.vae
    video = torch.rand(1, 3, shape.frames, shape.height, shape.width) * 2 - 1
    with torch.no_grad():
        if temporal == 1:  # a VAE for pictures: the frames are a batch
            latents = vae.encode(video[0].movedim(1, 0)).latent_dist.mode()[None].movedim(2, 1)
        else:
            latents = vae.encode(video).latent_dist.mode()
    size = ((shape.frames - 1) // temporal + 1, shape.height // spatial, shape.width // spatial)
    assert tuple(latents.shape) == (1, channels, *size)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_gives_the_video_of_from_pretrained(name, saved):
    import diffusers
    import numpy as np
    import torch

    model = load(str(saved(name)), device="cpu")
    assert (model.spec.is_local, model.spec.defaults) == (True, get(name).defaults)
    reference = diffusers.DiffusionPipeline.from_pretrained(saved(name))
    reference.set_progress_bar_config(disable=True)
    assert type(reference) is type(model.pipeline)
    for part, network in reference.components.items():
        if hasattr(network, "state_dict"):
            read = getattr(model.pipeline, part).state_dict()
            assert all(torch.equal(read[key], tensor) for key, tensor in network.state_dict().items()), part
    ours, theirs = (made(**inputs(model)).frames for made in (model.pipeline, reference))
    # Equal weights lie at other addresses, and where a product begins decides how its kernel rounds: about 3e-8 were seen.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(tiny_names()) - set(FOLDERS)))
def test_every_saved_folder_runs(name, saved):
    model = load(str(saved(name)), device="cpu")
    shape = model.spec.defaults
    assert model.pipeline(**inputs(model)).frames.shape[1:4] == (shape.frames, shape.height, shape.width)


def test_names_of_an_earlier_transformers_are_read(saved, tmp_path):
    """Published folders have `vision_model.` before the layers of CLIP's picture encoder."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved("tiny-wan2.1-i2v"), tmp_path / "model")
    before = load(str(folder), device="cpu", components=["image_encoder"]).pipeline.image_encoder
    (file,) = (folder / "image_encoder").glob("*.safetensors")
    save_file({f"vision_model.{key}": value for key, value in load_file(file).items()}, file)
    after = load(str(folder), device="cpu", components=["image_encoder"]).pipeline.image_encoder
    for key, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]), key
    stored = load_file(file)
    lost = next(key for key in stored if "layers.1" in key)
    save_file({key: value for key, value in stored.items() if key != lost}, file)
    with pytest.raises(WanlabError, match=re.escape(f"lacks tensor {lost.removeprefix('vision_model.')} of")):
        load(str(folder), device="cpu", components=["image_encoder"])


def test_a_head_of_its_own_is_read_and_not_tied(saved, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved("tiny-hunyuan-i2v"), tmp_path / "model")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    stored = load_file(file)
    head = torch.rand_like(stored["language_model.model.embed_tokens.weight"])
    save_file(stored | {"language_model.lm_head.weight": head}, file)
    encoder = load(str(folder), device="cpu", components=["text_encoder"]).pipeline.text_encoder
    assert torch.equal(encoder.lm_head.weight, head)
    assert not torch.equal(encoder.get_input_embeddings().weight, head)


@pytest.mark.parametrize("library", ["os", "my.code", "../elsewhere"])
def test_networks_of_other_packages_are_refused(library):
    part = dataclasses.replace(get("tiny-ltx2-t2v").part("vocoder"), library=library)
    with pytest.raises(WanlabError, match=f"LTX2Vocoder comes from '{re.escape(library)}'"):
        network_class(part)


def test_statistics_of_latents_are_not_random():
    import torch

    vae = load("tiny-ltx-t2v", weights="random", device="cpu", components=("vae_decoder",)).pipeline.vae
    assert torch.equal(vae.latents_std, torch.ones_like(vae.latents_std))


def test_a_text_beside_the_tokens_of_a_picture_has_512_whatever_the_tokenizer_takes(saved, tmp_path):
    folder = shutil.copytree(saved("tiny-wan2.1-i2v"), tmp_path / "model")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 40}))
    model = load(str(folder), device="cpu")
    assert model.text_tokens == 512
    given = inputs(model)
    size = {name: given[name] for name in ("image", "prompt", "height", "width")}
    assert model.generate(**size, frames=given["num_frames"], steps=2).video.std() > 0
    stated = {"defaults": {"text_tokens": 40}}
    (folder / "wanlab.json").write_text(json.dumps(stated))
    with pytest.raises(WanlabError, match=r"wanlab\.json: text_tokens is 40, and .* takes 512 alone"):
        load(str(folder), device="cpu")
