"""Families of models: sizes, tokens, inputs, schedules and roles, held against diffusers' pipelines and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wanlab import heldout, models
from wanlab.core.errors import WanlabError
from wanlab.models import families
from wanlab.models.facts import wan_expert_flop
from wanlab.models.families.base import Family, Tensor
from wanlab.models.networks import skeleton
from wanlab.models.registry import HUB_MODELS, tiny_names

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = [
    "tiny-wan2.2-i2v", "tiny-wan2.2-t2v", "tiny-wan2.2-ti2v", "tiny-wan2.1-i2v", "tiny-wan2.1-t2v",
    "tiny-wan2.1-flf2v", "tiny-wan2.1-v2v", "tiny-vace", "tiny-skyreels-i2v", "tiny-skyreels-t2v",
    "tiny-ltx-t2v", "tiny-ltx-i2v", "tiny-cogvideox-t2v", "tiny-cogvideox-i2v", "tiny-cogvideox1.5-i2v",
    "tiny-hunyuan-t2v", "tiny-hunyuan-i2v", "tiny-mochi",
]  # fmt: skip
UNKNOWN = ["tiny-latte", "tiny-easyanimate", "tiny-chronoedit", "tiny-kandinsky5-t2v", "tiny-ltx2-t2v"]


@pytest.fixture(scope="module")
def loaded():
    kept: dict[str, models.Model] = {}

    def load(name: str) -> models.Model:
        if name not in kept:
            kept[name] = models.load(name, weights="random", device="cpu")
        return kept[name]

    return load


def asked(model: models.Model) -> dict:
    return {"prompt": "a cat"} | heldout.inputs(model.conditions, model.spec.defaults.frames)


# Sizes and tokens that are published, or follow from published factors: name, size, latents [C, T, H, W], tokens.
PUBLISHED = [
    ("wan2.2-i2v-a14b", (720, 1280, 81), (16, 21, 90, 160), 75_600),
    ("wan2.1-t2v-1.3b", (480, 832, 81), (16, 21, 60, 104), 32_760),
    ("wan2.2-ti2v-5b", (704, 1280, 121), (48, 31, 44, 80), 27_280),
    ("hunyuanvideo", (720, 1280, 129), (16, 33, 90, 160), 118_800),
    ("mochi-1", (480, 848, 163), (12, 28, 60, 106), 44_520),
    ("cogvideox-5b", (480, 720, 49), (16, 13, 60, 90), 17_550),
    ("cogvideox1.5-5b-i2v", (768, 1360, 81), (16, 21, 96, 170), 44_880),
    ("ltx-video-2b", (512, 704, 161), (128, 21, 16, 22), 7_392),
    ("skyreels-v2-i2v-14b-540p", (544, 960, 97), (16, 25, 68, 120), 51_000),
]


@pytest.mark.parametrize(("name", "size", "latent", "tokens"), PUBLISHED)
def test_latents_and_tokens_are_those_published(name, size, latent, tokens):
    shape = models.latent_shape(models.get(name), *size)
    assert (shape.channels, shape.frames, shape.height, shape.width) == latent
    assert shape.tokens == tokens


@pytest.mark.parametrize(
    ("name", "size", "complaint"),
    [
        ("mochi-1", (480, 848, 81), r"6k\+1: the nearest is 79"),
        ("mochi-1", (488, 848, 79), "multiple of 16"),
        ("ltx-video-2b", (480, 840, 97), "multiple of 32"),
        ("ltx-video-2b", (480, 832, 81 + 4), r"8k\+1: the nearest is 81 or 89"),
        ("cogvideox-5b-i2v", (480, 736, 49), "learned for 480x720"),
        ("tiny-cogvideox1.5-i2v", (64, 96, 9), "end at 64x64: take at most that size"),
        ("hunyuanvideo", (720, 1288, 129), "multiple of 16"),
        ("wan2.2-ti2v-5b", (720, 1280, 121), "multiple of 32"),
    ],
)
def test_sizes_that_a_family_cannot_make_are_refused_with_the_nearest(name, size, complaint):
    with pytest.raises(WanlabError, match=complaint):
        models.latent_shape(models.get(name), *size)


@pytest.mark.parametrize("name", [*HUB_MODELS, *tiny_names()])
def test_default_sizes_are_legal(name):
    if name == "tiny-allegro":
        pytest.skip("its VAE takes 4k frames, a rule of its own")
    spec = models.get(name)
    models.latent_shape(spec, spec.defaults.height, spec.defaults.width, spec.defaults.frames)


@pytest.mark.parametrize("name", KNOWN)
def test_factors_are_those_of_the_pipeline(name, loaded):
    model = loaded(name)
    for ours, theirs in (("spatial_factor", "spatial"), ("temporal_factor", "temporal")):
        spellings = (
            f"vae_scale_factor_{theirs}",
            f"vae_{theirs}_compression_ratio",
            f"vae_{theirs}_scale_factor",
        )
        stated = [getattr(model.pipeline, key) for key in spellings if hasattr(model.pipeline, key)]
        assert stated == [getattr(model.spec, ours)], name


@pytest.mark.parametrize("name", KNOWN)
def test_a_video_has_the_size_and_the_schedule_that_were_told(name, loaded):
    model = loaded(name)
    usual = model.spec.defaults
    told = model.schedule(3)["timestep"].to_numpy()
    video = model.generate(**asked(model), steps=3).video
    assert video.shape == (usual.frames, usual.height, usual.width, 3)
    np.testing.assert_allclose([float(t) for t in model.pipeline.scheduler.timesteps], told, rtol=1e-6)
    latents = model.generate(**asked(model), steps=2, output="latent").video
    shape = models.latent_shape(model.spec, usual.height, usual.width, usual.frames)
    assert latents.shape == (shape.channels, shape.frames, shape.height, shape.width)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_that_is_not_known_makes_videos_and_tells_no_schedule_that_it_cannot_know(name, loaded):
    model = loaded(name)
    usual = model.spec.defaults
    told = model.schedule(2)["timestep"].to_numpy()
    assert model.generate(**asked(model), steps=2).video.shape == (usual.frames, usual.height, usual.width, 3)
    if not np.isnan(told).all():
        np.testing.assert_allclose([float(t) for t in model.pipeline.scheduler.timesteps], told, rtol=1e-6)
    assert model.family.title == ""


@pytest.mark.parametrize("name", KNOWN)
def test_a_denoiser_is_called_with_what_its_family_says(name, loaded):
    model, calls = loaded(name), []
    network = model.pipeline.transformer
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs | dict(enumerate(args))), with_kwargs=True
    )
    with torch.no_grad():
        try:
            model.generate(**asked(model), steps=2, guidance_scale=1.0, output="latent")
        finally:
            handle.remove()
    usual = model.spec.defaults
    shape = models.latent_shape(model.spec, usual.height, usual.width, usual.frames)
    latent = (shape.channels, shape.frames, shape.height, shape.width)
    part = model.spec.part("transformer")
    described = model.family.denoiser_inputs(model.spec, part, latent, shape.tokens, model.text_tokens)
    for key, value in described.items():
        given = calls[0][key]
        if isinstance(value, Tensor):
            assert tuple(given.shape) == value.shape, key
        elif not isinstance(value, tuple) or not isinstance(value[0], Tensor):
            assert given == pytest.approx(value), key
        else:
            assert [tuple(tensor.shape) for tensor in given] == [tensor.shape for tensor in value], key
    tensors = {key for key, value in calls[0].items() if isinstance(value, torch.Tensor)}
    assert tensors <= set(described), tensors - set(described)


@pytest.mark.parametrize("name", [name for name in tiny_names() if models.get(name).parts])
def test_every_linear_layer_of_a_known_family_has_a_role(name):
    spec = models.get(name)
    family = families.family_of(spec.pipeline_class)
    if not family.title:
        pytest.skip("not known")
    network = skeleton(spec.part("transformer"))
    linear = [key for key, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    roles = {key: family.role(key) for key in linear}
    assert not [key for key, role in roles.items() if role == "other"]
    assert {"FFN"} < set(roles.values())


def test_a_text_to_video_model_takes_no_picture_and_others_say_what_they_need(loaded):
    with pytest.raises(WanlabError, match=r"takes no image; give image=None: it makes a video from text"):
        loaded("tiny-mochi").generate(np.zeros((8, 8, 3), np.uint8), "a cat")
    with pytest.raises(WanlabError, match=r"last_image \(picture\)"):
        loaded("tiny-wan2.1-flf2v").generate(np.zeros((8, 8, 3), np.uint8), "a cat")
    with pytest.raises(WanlabError, match="did you mean 'last_image'"):
        loaded("tiny-wan2.1-flf2v").generate(None, "a cat", conditions={"last_imge": 1})
    model = models.load("tiny-animate", weights="random", device="cpu", components=["expert"])
    assert model.conditions == {"image": "picture", "pose_video": "clip", "face_video": "clip"}


def test_a_clip_that_is_too_short_is_refused_before_anything_runs(loaded):
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(WanlabError, match="video must be a clip of at least 9 frames, not 3 frames"):
        loaded("tiny-wan2.1-v2v").generate(None, "a cat", conditions={"video": clip})


@pytest.mark.parametrize("name", ["tiny-ltx-t2v", "tiny-mochi"])
def test_too_few_steps_for_a_schedule_are_refused(name, loaded):
    with pytest.raises(WanlabError, match="needs at least 2 denoising steps, not 1"):
        loaded(name).generate(None, "a cat", steps=1)


def test_operations_counted_on_meta_tensors_agree_with_the_formula_for_wan():
    """An expert with a picture encoder is counted; without the picture's part it must be the formula."""
    spec = models.get("tiny-wan2.1-t2v")
    table = models.facts(spec).set_index("component")
    part = spec.part("transformer")
    shape = models.latent_shape(spec, spec.defaults.height, spec.defaults.width, spec.defaults.frames)
    by_formula = sum(wan_expert_flop(dict(part.config), shape.tokens, spec.defaults.text_tokens).values())
    assert table.loc["expert", "total_tflop"] == pytest.approx(by_formula / 1e12)
    relative = models.facts("tiny-skyreels-t2v").set_index(
        "component"
    )  # the same network under another name, counted
    assert relative.loc["expert", "total_tflop"] > 0


@pytest.mark.parametrize("name", KNOWN)
def test_operations_of_every_network_are_known(name):
    table = models.facts(name)
    assert table["total_tflop"].notna().all(), table[["component", "total_tflop"]]
    assert (table["total_tflop"] > 0).all()


def test_a_new_family_is_one_class():
    class Other(Family):
        title, pipelines = "Other", (r"Other.*",)

    families.families.cache_clear()
    try:
        assert isinstance(families.family_of("OtherPipeline"), Other)
        assert families.family_of("NobodyKnowsPipeline").title == ""
    finally:
        Other.pipelines = ()
        families.families.cache_clear()


def test_schedules_need_no_arrays():
    """Sigmas are plain numbers, so that facts of models cost no numpy; they end as the pipelines' own do."""
    spec = models.get("mochi-1")
    sigmas = families.family_of(spec.pipeline_class).schedule(spec, 64, 44_520)["sigmas"]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == 1.0
    assert math.isclose(sigmas[32], 1 - 0.025)
