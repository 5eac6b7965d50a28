"""Packaged configurations of published models, held against what papers, model cards and checkpoints state."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from typing import NamedTuple

import pytest
import torch

import wanlab.models
from wanlab.models import get, names
from wanlab.models.networks import network_class, parameter_names, skeleton
from wanlab.models.registry import HUB_MODELS
from wanlab.models.spec import Part

# Entries that the hub's files have and that no class of transformers reads any more.
_NO_LONGER_READ = {"decoder_start_token_id", "scalable_attention", "dropout"}
# What an encoder of T5 decides itself.
_SET_BY_THE_CLASS = {"tie_word_embeddings", "is_encoder_decoder", "use_cache"}


def packaged(name):
    return json.loads(resources.files(wanlab.models).joinpath("configs", f"{name}.json").read_text("utf-8"))


@functools.cache
def _built(library, class_name, config):
    return skeleton(Part("part", library, class_name, json.loads(config))).to("meta")


def network(name, part):
    """The network on the meta device; models that share one (UMT5, the VAE of Wan) build it once."""
    part = get(name).part(part)
    return _built(part.library, part.class_name, json.dumps(part.config, sort_keys=True))


def unknown_entries(part):
    """Entries of a configuration that are no arguments of its class, e.g. misspelt ones."""
    cls = network_class(part)
    if part.library == "diffusers":
        return set(part.config) - set(inspect.signature(cls.__init__).parameters) - {"_class_name"}
    built = cls.config_class.from_dict({k: v for k, v in part.config.items() if not k.startswith("_")})
    unknown = _unknown_to(type(built), part.config)
    for key in ("text_config", "vision_config"):
        if key in part.config:
            unknown |= {f"{key}.{name}" for name in _unknown_to(type(getattr(built, key)), part.config[key])}
    return unknown


def _unknown_to(config_class, config):
    known = set(config_class().to_dict()) | _NO_LONGER_READ
    return set(config) - known - ({"rope_theta"} if "rope_parameters" in known else set())


def parts():
    """Every distinct network of the packaged models, named by one of its models."""
    seen = {}
    for name in HUB_MODELS:
        for part in get(name).parts:
            seen.setdefault(json.dumps([part.class_name, part.config], sort_keys=True), (name, part.name))
    return list(seen.values())


def test_one_more_file_is_one_more_model():
    files = resources.files(wanlab.models).joinpath("configs").iterdir()
    assert set(HUB_MODELS) == {file.name[:-5] for file in files if file.name.endswith(".json")}
    assert names() == ("wan-nano", *HUB_MODELS)


def test_models_of_wan_stand_first():
    families = [name.split("-")[0] for name in HUB_MODELS]
    first = families.count("wan2.2")
    assert families[:first] == ["wan2.2"] * first
    assert families[first] == "wan2.1"
    wan = [name.startswith("wan") for name in HUB_MODELS]
    assert wan == sorted(wan, reverse=True)


def test_every_source_is_another_repository():
    sources = [get(name).source for name in HUB_MODELS]
    assert len(set(sources)) == len(sources)
    assert [get(source).name for source in sources] == list(HUB_MODELS)


def test_the_list_of_models_needs_no_torch():
    code = (
        "import sys, wanlab.cli.main as cli\n"
        "cli.main(['models'])\n"
        "print(*[name for name in ('torch', 'diffusers', 'pandas', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("\n") >= len(names())
    assert out.splitlines()[-1] == ""


@pytest.mark.parametrize("name", HUB_MODELS)
def test_parts_and_configurations_are_the_same_networks(name):
    data = packaged(name)
    assert set(data) == {"source", "defaults", "model_index", "configs"}
    assert set(data["configs"]) == {part.name for part in get(name).parts} | {"scheduler"}
    assert data["configs"]["scheduler"]["_class_name"] == data["model_index"]["scheduler"][1]


@pytest.mark.parametrize(("name", "part"), parts())
def test_every_packaged_entry_is_an_argument_of_its_class(name, part):
    part = get(name).part(part)
    assert not unknown_entries(part)
    built = network(name, part.name).config
    known = built.to_dict() if part.library == "transformers" else dict(built)
    stated = {key: value for key, value in part.config.items() if key not in ("_class_name", "architectures")}
    if part.library == "transformers":
        rope = known.get("rope_parameters") or {}
        ignored = (*_NO_LONGER_READ, *_SET_BY_THE_CLASS, "text_config", "vision_config")
        stated = {key: value for key, value in stated.items() if key not in ignored}
        known = rope | known
    for key, value in stated.items():
        assert json.loads(json.dumps(known[key])) == value, (part.name, key)


@pytest.mark.parametrize(
    ("name", "part", "where"),
    [
        ("wan2.1-t2v-14b", "transformer", ()),
        ("mochi-1", "text_encoder", ()),
        ("hunyuanvideo-i2v", "text_encoder", ("text_config",)),
    ],
)
def test_a_misspelt_entry_is_seen(name, part, where):
    part = get(name).part(part)
    config = json.loads(json.dumps(part.config))
    inner = functools.reduce(lambda entry, key: entry[key], where, config)
    inner["num_layerz"] = 3
    assert unknown_entries(replace(part, config=config)) == {".".join((*where, "num_layerz"))}


# Parameters of Llama-3-8B on the hub, and of it with 64 more tokens and an image encoder, as in LLaVA.
_LLAMA = 8030261248
_LLAVA = _LLAMA + 2 * 64 * 4096 + (304.29e6 - 1024 * 768) + (1024 + 1) * 4096 + (4096 + 1) * 4096


class Count(NamedTuple):
    """Stored values of a network, who published them, and how far their number was rounded."""

    name: str
    part: str
    values: float
    source: str
    rounded: float = 0


def gigabytes(name, part, sizes, value_bytes, source):
    """From file sizes as the hub shows them, "4.98+1.2": each may be off by a unit of its last digit."""
    files = sizes.split("+")
    unit = sum(10.0 ** -len(size.partition(".")[2]) for size in files)
    return Count(name, part, sum(map(float, files)) * 1e9 / value_bytes, source, unit * 1e9 / value_bytes)


COUNTS = [
    # Exact: sums over the headers of the checkpoints, or what a trainer or an index counted of them.
    Count("wan2.1-t2v-1.3b", "transformer", 1418996800, "parameters of Wan2.1-T2V-1.3B as counted by its loaders"),
    Count("wan2.2-t2v-a14b", "transformer", 14288491584, "header of Wan2.2-T2V-A14B-Diffusers"),
    Count("wan2.2-t2v-a14b", "transformer_2", 14288491584, "header of Wan2.2-T2V-A14B-Diffusers"),
    Count("wan2.2-i2v-a14b", "transformer", 14288901184, "header of Wan2.2-I2V-A14B-Diffusers"),
    Count("wan2.1-t2v-14b", "vae", 126892531, "header of Wan2.1_VAE"),
    Count("wan2.1-t2v-14b", "text_encoder", 5680910336, "total_size of UMT5-XXL's index"),
    Count("ltx-video-2b", "transformer", 1923385472, "finetrainers, docs of LTX-Video, full finetuning"),
    Count("ltx-video-13b", "transformer", 13042569344, "header of LTX-Video-0.9.7"),
    Count("ltx-video-13b", "vae", 1246913778, "header of LTX-Video-0.9.7"),
    Count("ltx-video-13b", "text_encoder", 4762310656, "header of LTX-Video-0.9.7"),
    Count("cogvideox-5b", "transformer", 5570283072, "finetrainers, docs of CogVideoX, full finetuning"),
    Count("mochi-1", "transformer", 40110710976 // 4, "total_size of the fp32 index of genmo/mochi-1-preview"),
    # Rounded: papers, cards and file sizes on the hub.
    Count("wan2.1-t2v-14b", "transformer", 14e9, "Wan, arXiv:2503.20314", 0.5e9),
    Count("wan2.2-ti2v-5b", "transformer", 5e9, "model card of Wan2.2-TI2V-5B", 0.5e9),
    gigabytes("wan2.1-i2v-14b-480p", "transformer", "32.8", 2, "wan2.1_i2v_480p_14B_bf16 of Comfy-Org"),
    gigabytes("wan2.1-i2v-14b-720p", "transformer", "9.95+9.80+9.98+9.98+9.90+9.90+6.08", 4, "ypyp/wan2.1_i2v_720p"),
    gigabytes("wan2.1-flf2v-14b-720p", "transformer", "32.8", 2, "wan2.1_flf2v_720p_14B_fp16 of Comfy-Org"),
    gigabytes("wan2.1-vace-14b", "transformer", "69.4", 4, "transformer of Wan2.1-VACE-14B-diffusers"),
    gigabytes("wan2.2-animate-14b", "transformer", "69.1", 4, "transformer of Wan2.2-Animate-14B-Diffusers"),
    gigabytes("wan2.2-animate-14b", "image_encoder", "1.26", 2, "image_encoder of Wan2.2-Animate-14B-Diffusers"),
    Count("wan2.1-i2v-14b-480p", "image_encoder", 632.08e6, "open_clip, model_profile.csv, ViT-H-14", 0.01e6),
    Count("skyreels-v2-t2v-14b-540p", "transformer", 14e9, "SkyReels-V2, arXiv:2504.13074", 0.5e9),
    Count("skyreels-v2-i2v-14b-540p", "transformer", 16e9, "the hub's count of a GGUF file of it", 0.5e9),
    gigabytes("ltx-video-2b", "transformer", "4.94+2.75", 4, "transformer of Lightricks/LTX-Video"),
    gigabytes("ltx-video-2b", "vae", "1.68", 4, "vae of Lightricks/LTX-Video"),
    Count("cogvideox-2b", "transformer", 2e9, "CogVideoX, arXiv:2408.06072", 0.5e9),
    gigabytes("cogvideox-5b-i2v", "transformer", "4.99+4.99+1.27", 2, "transformer of CogVideoX-5b-I2V"),
    gigabytes("cogvideox-5b", "vae", "0.431", 2, "vae of SkyReels-A1, that of CogVideoX-5b"),
    gigabytes("cogvideox1.5-5b", "transformer", "4.98+4.95+1.22", 2, "transformer of CogVideoX1.5-5B"),
    gigabytes("cogvideox1.5-5b-i2v", "transformer", "4.98+4.95+1.22", 2, "transformer of CogVideoX1.5-5B-I2V"),
    Count("hunyuanvideo", "transformer", 13e9, "HunyuanVideo, arXiv:2412.03603", 0.5e9),
    gigabytes("hunyuanvideo", "transformer", "25.6", 2, "hunyuan_video_720_cfgdistill_bf16 of Kijai"),
    gigabytes("hunyuanvideo-i2v", "transformer", "25.6", 2, "skyreels_hunyuan_i2v_bf16 of Kijai, of this size"),
    gigabytes("hunyuanvideo", "vae", "0.493", 2, "vae of HunyuanVideo in fp16"),
    gigabytes("hunyuanvideo", "text_encoder", "4.98+5.00+4.92+0.117", 2, "jbilcke-hf/HunyuanVideo-HFIE"),
    Count("hunyuanvideo", "text_encoder", _LLAMA - 128256 * 4096 + 64 * 4096, "Llama-3-8B, 64 more tokens, no head"),
    Count("hunyuanvideo", "text_encoder_2", 123.65e6 - 768**2, "open_clip, ViT-L-14, its projection left out", 0.01e6),
    Count("hunyuanvideo-i2v", "text_encoder", _LLAVA, "Llama-3-8B, ViT-L-14-336 of open_clip, a projector", 0.01e6),
    Count("mochi-1", "transformer", 10e9, "model card of Mochi 1", 0.5e9),
    gigabytes("mochi-1", "vae", "0.920", 2, "mochi_vae of Comfy-Org"),
]  # fmt: skip


@pytest.mark.parametrize("count", COUNTS, ids=lambda count: f"{count.name}-{count.part}-{count.rounded:.0f}")
def test_parameters_are_those_published(count):
    values = sum(tensor.numel() for tensor in parameter_names(network(count.name, count.part)).values())
    assert abs(values - count.values) <= count.rounded, count.source


def test_first_and_last_frame_add_a_position_embedding_of_two_images():
    """257 patches of 1280 channels for each of both images, as in the conversion script of diffusers."""
    one, two = (network(f"wan2.1-{name}", "transformer") for name in ("i2v-14b-720p", "flf2v-14b-720p"))
    sizes = [sum(tensor.numel() for tensor in module.parameters()) for module in (one, two)]
    assert sizes[1] - sizes[0] == 2 * 257 * 1280


def test_the_control_branch_of_vace_has_every_second_or_fifth_block():
    """15 blocks beside the 30 of 1.3B, 8 beside the 40 of 14B, as in the conversion script of diffusers."""
    for size, blocks in (("1.3b", 15), ("14b", 8)):
        module, base = (network(f"wan2.1-{kind}-{size}", "transformer") for kind in ("vace", "t2v"))
        assert len(module.vace_blocks) == blocks
        assert len(module.blocks) == len(base.blocks)


def test_the_decoder_of_mochi_has_362_million_parameters():
    """The parameter count that genmo states for the AsymmVAE is that of its decoder."""
    tensors = parameter_names(network("mochi-1", "vae"))
    decoder = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("decoder."))
    assert round(decoder / 1e6) in (362, 363)


# (pixels per latent, frames per latent, channels), with the source of the numbers.
VAES = {
    "wan2.1-t2v-14b": (8, 4, 16),  # arXiv:2503.20314: 4x8x8, 16 channels
    "wan2.2-ti2v-5b": (16, 4, 48),  # README of Wan2.2: 16x16x4
    "ltx-video-2b": (32, 8, 128),  # arXiv:2501.00103: 32x32x8 pixels per token, 128 channels
    "ltx-video-13b": (32, 8, 128),
    "cogvideox-5b": (8, 4, 16),  # arXiv:2408.06072: 8x8x4, 16 channels
    "hunyuanvideo": (8, 4, 16),  # arXiv:2412.03603: 4x8x8, 16 channels
    "mochi-1": (8, 6, 12),  # README of genmoai/mochi: 8x8 spatial, 6x temporal, 12 channels
}


@pytest.mark.parametrize("name", VAES)
def test_the_vae_compresses_as_published(name):
    """Two more latent frames and other than square, encoded on the meta device."""
    space, time, channels = VAES[name]
    video = torch.empty(1, 3, 2 * time + 1, 2 * space, 3 * space, device="meta")
    with torch.no_grad():
        moments = network(name, "vae").encode(video).latent_dist.parameters
    assert tuple(moments.shape[2:]) == (3, 2, 3)
    # LTX stores one variance for all channels, the others one for each.
    assert moments.shape[1] in (2 * channels, channels + 1)
    assert get(name).latent_channels == channels


@pytest.mark.parametrize("name", HUB_MODELS)
def test_the_denoiser_takes_and_gives_the_latents_of_the_vae(name):
    """Beside the noise, image-to-video takes latents of the image, and Wan a mask of 4 channels."""
    spec = get(name)
    config, channels = spec.part("transformer").config, spec.latent_channels
    assert config["out_channels"] in (channels, None)
    assert config["in_channels"] in (channels, 2 * channels, 2 * channels + 4)


def copy_of(name, folder, transformer=(), **index):
    """A folder with the configuration files of a packaged model, as a download leaves it."""
    data = packaged(name)
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(data["model_index"] | index))
    for part, config in data["configs"].items():
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = config | dict(transformer) if part.startswith("transformer") else config
        (folder / part / file).write_text(json.dumps(config))
    return folder


def settings(model):
    return replace(get(model).defaults, flow_shift=None)


@pytest.mark.parametrize("name", HUB_MODELS)
def test_a_copy_in_a_folder_named_as_its_repository_has_its_settings(name, tmp_path):
    folder = copy_of(name, tmp_path / get(name).source.rpartition("/")[2])
    assert settings(folder) == settings(name)
    assert get(folder).components == get(name).components


@pytest.mark.parametrize("size", ["480P", "720P"])
def test_a_copy_in_the_cache_of_the_hub_has_its_settings(size, tmp_path):
    snapshot = tmp_path / f"models--Wan-AI--Wan2.1-I2V-14B-{size}-Diffusers" / "snapshots" / "0f3a"
    assert get(copy_of("wan2.1-i2v-14b-720p", snapshot)).defaults.height == int(size[:-1])


def test_of_models_that_cannot_be_told_apart_the_first_counts(tmp_path):
    first, second = "wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"
    assert packaged(first)["configs"]["transformer"] == packaged(second)["configs"]["transformer"]
    assert settings(copy_of(second, tmp_path / "mine")) == settings(first)
    assert HUB_MODELS.index(first) < HUB_MODELS.index(second)


def test_models_with_the_same_denoiser_are_told_apart_by_their_experts(tmp_path):
    one, two = "wan2.1-t2v-14b", "wan2.2-t2v-a14b"
    assert packaged(one)["configs"]["transformer"] == packaged(two)["configs"]["transformer"]
    assert settings(one) != settings(two)
    assert [settings(copy_of(name, tmp_path / str(name == one))) for name in (one, two)] == [
        settings(one),
        settings(two),
    ]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("wan2.1-flf2v-14b-720p", "wan2.1-i2v-14b-720p"),
        ("skyreels-v2-i2v-14b-540p", "wan2.1-i2v-14b-480p"),
        ("hunyuanvideo-i2v", "hunyuanvideo"),
        ("ltx-video-13b", "ltx-video-2b"),
        ("cogvideox1.5-5b-i2v", "cogvideox-5b-i2v"),
    ],
)
def test_a_copy_without_a_telling_name_is_not_taken_for_a_relative(name, other, tmp_path):
    folder = copy_of(name, tmp_path / "mine")
    assert settings(folder) == settings(name)
    assert packaged(name)["configs"]["transformer"] != packaged(other)["configs"]["transformer"]


def test_an_older_file_without_the_newer_entries_is_recognised(tmp_path):
    folder = copy_of("wan2.1-t2v-1.3b", tmp_path / "mine")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    older = {key: value for key, value in config.items() if value is not None}
    assert older != config
    file.write_text(json.dumps(older))
    assert settings(folder) == settings("wan2.1-t2v-1.3b")


def test_another_sample_size_is_no_other_model(tmp_path):
    folder = copy_of("cogvideox1.5-5b", tmp_path / "mine", {"sample_height": 96, "sample_width": 170})
    assert settings(folder) == settings("cogvideox1.5-5b")


def test_a_smaller_network_has_not_the_published_settings(tmp_path):
    folder = copy_of("mochi-1", tmp_path / "mine", {"num_layers": 2})
    assert settings(folder) != settings("mochi-1")


def test_a_shift_that_no_scheduler_states_is_the_cards():
    assert "flow_shift" not in packaged("skyreels-v2-t2v-14b-540p")["configs"]["scheduler"]
    assert get("skyreels-v2-t2v-14b-540p").defaults.flow_shift == 8.0
    assert get("wan2.1-flf2v-14b-720p").defaults.flow_shift == 16.0
