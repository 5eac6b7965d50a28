"""From an image and a prompt to a video, and the schedule known beforehand."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.models_tiny import EXPERT, save

from wanlab.core.errors import WanlabError
from wanlab.models import get, load
from wanlab.models.inputs import first_frame, first_frame_of
from wanlab.models.standins import WordHashTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZE = dict(height=16, width=32, frames=5, steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save(tmp_path_factory.mktemp("tiny"))), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).random((40, 50, 3))


def test_equal_to_the_diffusers_pipeline(model, photo):
    import torch
    from diffusers import WanImageToVideoPipeline

    ours = model.generate(photo, "the camera pans left", guidance_scale=3.0, seed=7, **SIZE)
    reference = WanImageToVideoPipeline.from_pretrained(model.spec.source)
    reference.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "vae", "transformer", "transformer_2"):
        # Its weights are views of mapped files; a copy is aligned as ours are, which decides the last bit.
        reference.register_modules(**{name: copy.deepcopy(getattr(reference, name))})
    theirs = reference(
        image=first_frame(photo, 16, 32),
        prompt="the camera pans left",
        negative_prompt="",
        height=16,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        max_sequence_length=24,
    ).frames[0]
    assert ours.video.shape == (5, 16, 32, 3)
    assert ours.video.dtype == np.float32
    assert np.array_equal(ours.video, theirs)
    assert ours.video.min() >= 0
    assert ours.video.max() <= 1
    assert ours.wall_ms > 0
    assert ours.settings["guidance_scale"] == 3.0
    assert ours.settings["prompt"] == "the camera pans left"


def test_the_seed_decides(model, photo):
    first, again, other = (model.generate(photo, "a", seed=seed, **SIZE).video for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_latents_skip_the_decoder(model, photo):
    latents = model.generate(photo, "a", output="latent", **SIZE).video
    assert latents.shape == (4, 2, 4, 8)


def test_defaults_are_the_models(model, photo):
    small = dataclasses.replace(model.spec.defaults, height=16, width=32, frames=5, steps=2, fps=9)
    other = dataclasses.replace(model, spec=dataclasses.replace(model.spec, defaults=small))
    made = other.generate(photo, "a")
    assert made.video.shape == (5, 16, 32, 3)
    assert (made.fps, made.settings["steps"]) == (9, 2)


def test_progress_is_off_unless_asked_for(model, photo, capsys):
    model.generate(photo, "a", **SIZE)
    assert "step" not in capsys.readouterr().err
    model.generate(photo, "a", progress=True, **SIZE)
    assert "3/3" in capsys.readouterr().err
    model.generate(photo, "a", **SIZE)
    assert "step" not in capsys.readouterr().err


def test_expanded_timesteps_make_a_video(tmp_path, photo):
    """The form of TI2V-5B: one expert, one timestep per token, published as a text-to-video pipeline."""
    import diffusers

    expert = diffusers.WanTransformer3DModel(**EXPERT | {"in_channels": 4})
    changes = dict(transformer=expert, transformer_2=None, boundary_ratio=None, expand_timesteps=True)
    model = load(str(save(tmp_path, pipeline="WanPipeline", **changes)), device="cpu")
    assert model.spec.components == ("text_encoder", "vae_encoder", "expert", "vae_decoder")
    assert model.generate(photo, "a", **SIZE).video.shape == (5, 16, 32, 3)
    assert set(model.schedule(4)["component"]) == {"expert"}


def test_text_to_video(tmp_path, photo):
    import diffusers

    experts = {
        name: diffusers.WanTransformer3DModel(**EXPERT | {"in_channels": 4})
        for name in ("transformer", "transformer_2")
    }
    model = load(str(save(tmp_path, pipeline="WanPipeline", **experts)), device="cpu")
    assert model.generate(None, "a", **SIZE).video.shape == (5, 16, 32, 3)
    with pytest.raises(WanlabError, match="takes no image"):
        model.generate(photo, "a", **SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_make_a_finite_video(model, photo, dtype):
    made = load(model.spec, device="cpu", dtype=dtype, weights="random").generate(
        photo, "a", guidance_scale=4, **SIZE
    )
    assert np.isfinite(made.video).all()
    assert made.video.std() > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(height=17), "the nearest is 16x32"),
        (dict(frames=4), "the nearest is 5"),
        (dict(steps=0), "steps must be a whole number"),
        (dict(steps=2.5), "steps must be a whole number"),
        (dict(seed=-1), "seed must be"),
        (dict(seed=0.5), "seed must be"),
        (dict(output="gif"), "output is 'np' or 'latent', not 'gif'"),
        (dict(prompt=["a"]), "prompt must be a string"),
        (dict(image=None), "makes a video from image"),
        (dict(image="no/such/photo.png"), "no image no/such/photo.png"),
    ],
)
def test_wrong_arguments(model, photo, changes, says):
    with pytest.raises(WanlabError, match=says):
        model.generate(**dict(image=photo, prompt="a") | SIZE | changes)


def test_a_missing_network_is_named_before_the_run(model, photo):
    part = load(model.spec, device="cpu", components=["expert_high", "vae_decoder"])
    with pytest.raises(WanlabError, match="text_encoder is not loaded"):
        part.generate(photo, "a", **SIZE)


def test_components_and_engines(model):
    pipeline = model.pipeline
    assert model.components == {
        "text_encoder": pipeline.text_encoder,
        "vae_encoder": pipeline.vae,
        "expert_high": pipeline.transformer,
        "expert_low": pipeline.transformer_2,
        "vae_decoder": pipeline.vae,
    }
    assert model.engines == dict.fromkeys(model.spec.components, "eager")
    swapped = dataclasses.replace(model, engines={"expert_low": "onnxruntime"})
    assert swapped.engines["expert_low"] == "onnxruntime"
    assert swapped.engines["expert_high"] == "eager"
    with pytest.raises(WanlabError, match="no component 'expert_mid'"):
        dataclasses.replace(model, engines={"expert_mid": "tvm"})


@pytest.mark.parametrize("steps", [1, 10])
def test_the_schedule_is_what_the_pipeline_does(model, photo, steps):
    table = model.schedule(steps)
    seen = []
    hooks = [
        model.component(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.append((name, float(kwargs["timestep"][0]))),
            with_kwargs=True,
        )
        for name in ("expert_high", "expert_low")
    ]
    try:
        model.generate(photo, "a", guidance_scale=1.0, **SIZE | dict(steps=steps, frames=1))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == list(zip(table["component"], table["timestep"], strict=True))
    assert (table["sigma"].diff().dropna() < 0).all()
    assert table["snr"].to_numpy() == pytest.approx(((1 - table["sigma"]) / table["sigma"]).to_numpy() ** 2)


@pytest.mark.parametrize("kind", ["float", "uint8", "PIL", "path", "grey", "rotated"])
def test_images_of_every_kind(photo, kind, tmp_path):
    from PIL import Image

    pixels = np.round(photo * 255).astype(np.uint8)
    expected = first_frame(Image.fromarray(pixels), 16, 32)
    if kind in ("path", "rotated"):
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "rotated" else 1
        stored = Image.fromarray(np.rot90(pixels) if kind == "rotated" else pixels)
        stored.save(tmp_path / "photo.png", exif=exif)
    given = {
        "float": photo,
        "uint8": pixels,
        "PIL": Image.fromarray(pixels),
        "path": tmp_path / "photo.png",
        "rotated": str(tmp_path / "photo.png"),
        "grey": Image.fromarray(pixels).convert("L"),
    }[kind]
    found = first_frame(given, 16, 32)
    assert (found.mode, found.size) == ("RGB", (32, 16))
    assert kind == "grey" or np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_note_says_that_a_transparent_image_was_laid_over_white(photo, tmp_path):
    from PIL import Image

    layers = np.dstack([np.round(photo * 255), np.zeros(photo.shape[:2])]).astype(np.uint8)
    Image.fromarray(layers).save(tmp_path / "a.png")
    for image, name in (
        (tmp_path / "a.png", str(tmp_path / "a.png")),
        (Image.fromarray(layers), "the image"),
    ):
        frame, note = first_frame_of(image, 16, 32)
        assert np.asarray(frame).min() == 255
        assert note == f"{name} is transparent in places, which is laid over white"
    assert first_frame_of(photo, 16, 32)[1] == ""


def test_an_image_is_cropped_in_the_middle():
    wide = np.zeros((16, 60, 3), np.uint8)
    wide[:, 14:46] = 255
    assert (np.asarray(first_frame(wide, 16, 32))[:, 2:-2] == 255).all()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4)), "must be .H, W, 3."),
        (np.zeros((4, 4, 4)), "must be .H, W, 3."),
        (np.zeros((0, 4, 3)), "must be .H, W, 3."),
        (np.full((4, 4, 3), 2.0), "must lie in .0, 1."),
        (np.full((4, 4, 3), np.nan), "must lie in .0, 1."),
        (np.zeros((4, 4, 3), int), "must be uint8, or float"),
    ],
)
def test_arrays_that_are_no_image(array, says):
    with pytest.raises(WanlabError, match=says):
        first_frame(array, 16, 16)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "photo.png").write_text("no")
    with pytest.raises(WanlabError, match=r"photo\.png cannot be read as an image"):
        first_frame(tmp_path / "photo.png", 16, 16)


def test_stand_in_tokenizer():
    tokenizer = WordHashTokenizer(vocab_size=1000, model_max_length=512)
    options = dict(padding="max_length", truncation=True, return_tensors="pt")
    made = tokenizer(["a red ball", "word " * 900], max_length=512, **options)
    assert made.input_ids.shape == made.attention_mask.shape == (2, 512)
    assert made.attention_mask.sum(1).tolist() == [4, 512]
    assert made.input_ids.max() < 1000
    assert made.input_ids[0, 3] == made.input_ids[1, 511] == tokenizer.eos_token_id
    assert (made.input_ids == tokenizer(["A red  ball", "word " * 900], **options).input_ids).all()


def test_random_model_of_the_hub_runs_with_the_stand_in_tokenizer(model, photo):
    """The path of the 14B and 5B models, on a narrow network: a source that is no folder."""
    spec = dataclasses.replace(model.spec, source="nobody/nothing")
    made = load(spec, device="cpu", weights="random")
    assert isinstance(made.pipeline.tokenizer, WordHashTokenizer)
    assert any("words are hashed" in note for note in made.notes)
    videos = [made.generate(photo, prompt, **SIZE).video for prompt in ("a red ball", "the camera pans")]
    assert np.isfinite(videos[0]).all()
    assert get("wan-nano").name == "wan-nano"


def test_a_prompt_that_is_cut_is_said(model, photo):
    limit = model.text_tokens
    words = "the camera pans left " * limit
    made = model.generate(photo, words + "slowly", guidance_scale=1.0, **SIZE)
    (note,) = (note for note in made.notes if note.startswith("prompt has"))
    assert f"the text encoder takes {limit}: its end is cut (it ends in" in note
    assert "slowly" in note
    assert note in model.notes
    again = model.generate(photo, words + "slowly", guidance_scale=1.0, **SIZE)
    assert note in again.notes
    assert model.notes.count(note) == 1
    assert not any("prompt has" in n for n in model.generate(photo, "the camera pans left", **SIZE).notes)


def test_a_negative_prompt_that_is_cut_is_said_where_it_is_used(model, photo):
    words = "blur " * 600
    for scale in (1.0, 3.0):
        notes = model.generate(photo, "a", negative_prompt=words, guidance_scale=scale, **SIZE).notes
        assert any(note.startswith("negative_prompt has") for note in notes) == (scale > 1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "nan"])
def test_guidance_that_is_not_finite_is_refused(model, photo, scale):
    with pytest.raises(WanlabError, match="guidance_scale must be a finite number"):
        model.generate(photo, "a", guidance_scale=scale, **SIZE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("transformer", r"weight proj_out.bias of expert_high, so the latents .* after step 1 of 3"),
        ("transformer_2", r"weight proj_out.bias of expert_low, so the latents"),
    ],
)
def test_latents_that_are_not_finite_stop_the_generation_by_name(model, photo, name, says):
    bias = getattr(model.pipeline, name).proj_out.bias
    before = float(bias.data[0])
    bias.data[0] = float("nan")
    try:
        with pytest.raises(WanlabError, match=says):
            model.generate(photo, "a", output="latent", **SIZE)
    finally:
        bias.data[0] = before


def test_a_video_that_is_not_finite_is_refused(model, photo):
    bias = model.pipeline.vae.decoder.conv_out.bias
    before = bias.data.clone()
    bias.data.fill_(float("nan"))
    try:
        with pytest.raises(WanlabError, match="which vae_decoder made of finite latents"):
            model.generate(photo, "a", **SIZE)
    finally:
        bias.data.copy_(before)


@pytest.mark.parametrize(
    ("boundary", "says"),
    [
        (None, "expert_low runs in none of 3 steps (boundary_ratio is null): expert_high runs them all"),
        ("1.5", "expert_high runs in none of 3 steps (boundary_ratio is 1.5): expert_low runs them all"),
        (0.0, "expert_low runs in none of 3 steps (boundary_ratio is 0): expert_high runs them all"),
        ("0.9", ""),
    ],
)
def test_an_expert_that_no_step_uses_is_said(model, photo, tmp_path, boundary, says):
    folder = shutil.copytree(model.spec.source, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": boundary}))
    other = load(str(folder), device="cpu", dtype="float32")
    notes = other.generate(photo, "a", output="latent", **SIZE).notes
    assert (says in notes) == bool(says)
    assert any("runs in none of" in note for note in other.load.notes) == bool(says)
    if boundary == "0.9":  # text that is a number is the number
        expected = model.generate(photo, "a", output="latent", **SIZE).video
        video = other.generate(photo, "a", output="latent", **SIZE).video
        np.testing.assert_allclose(
            video, expected, rtol=0, atol=1e-4
        )  # weights at other addresses round otherwise


@pytest.mark.parametrize("boundary", ["high", float("nan"), True, [0.9]])
def test_a_boundary_that_is_no_number_is_refused(model, tmp_path, boundary):
    folder = shutil.copytree(
        model.spec.source, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": boundary}))
    with pytest.raises(WanlabError, match=r"boundary_ratio in model_index.json is"):
        get(str(folder))


def test_sizes_that_a_model_was_not_made_for_are_said(model, photo):
    known = dataclasses.replace(model.spec.defaults, height=16, width=32, frames=5, steps=3, fps=9)
    spec = dataclasses.replace(model.spec, defaults=known, sizes_stated=True)
    other = dataclasses.replace(model, spec=spec)
    assert other.generate(photo, "a", output="latent").notes == ()
    (note,) = other.generate(photo, "a", height=48, width=64, output="latent").notes
    assert note.startswith(
        "measured at 48x64 with 5 frames, 6 times larger than the model's usual 16x32 with 5"
    )
    both = dataclasses.replace(known, other_sizes=((48, 64, 5),))
    other = dataclasses.replace(model, spec=dataclasses.replace(spec, defaults=both))
    assert other.generate(photo, "a", height=48, width=64, output="latent").notes == ()
    (note,) = other.generate(photo, "a", height=96, width=128, frames=9, output="latent").notes
    assert "than the model's usual 48x64 with 5" in note
    notes = model.generate(photo, "a", height=16, width=32, steps=1, frames=None, output="latent").notes
    assert any("states no sizes of its own: frames 81 are assumed" in note for note in notes)


def test_sizes_that_would_take_the_machine_are_refused_before_anything_is_allocated(model, photo):
    spec = dataclasses.replace(model.spec, max_positions=None)
    large = dataclasses.replace(model, spec=spec)
    with pytest.raises(
        WanlabError, match=r"1600000x1600000 with 5 frames needs at least [\d,.]+ GiB on the host and"
    ):
        large.generate(photo, "a", height=1600000, width=1600000, frames=5, steps=3)
