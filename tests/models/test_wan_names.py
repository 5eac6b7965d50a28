"""Tensors with the names of Wan's own release, as in single files for ComfyUI: read as those of diffusers."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models_tiny import save
from support.wan_names import of_transformer, of_vae

from wanlab.configuration.explain import explain
from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError
from wanlab.models import facts, get, load
from wanlab.models.networks import parameter_names, skeleton
from wanlab.models.spec import Part
from wanlab.models.weights import check, fill, open_checkpoint
from wanlab.runs.prepare import weights_id

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = "model.diffusion_model."
EXPERTS = ("transformer", "transformer_2")
CPU = torch.device("cpu")
SIZE = dict(height=64, width=96, frames=5, steps=3, guidance_scale=1.5, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def stored(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def put(folder, tensors, name="wan2.2_high_noise.safetensors"):
    """The weights of a part replaced by one file of another program."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        file.unlink()
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)


def own(tensors, prefix=""):
    return {prefix + of_transformer(key): tensor for key, tensor in tensors.items()}


def scaled(tensors, scale_name, input_name):
    """FP8 with a scale per tensor beside each matrix, by the names of diffusers."""
    found = dict(tensors)
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and key.endswith("weight"):
            layer, scale = key.removesuffix("weight"), tensor.abs().max().float() / 448
            found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found |= {layer + scale_name: scale.reshape(1), layer + input_name: torch.ones(1)}
    return found


def state(folder, part="transformer", **options):
    component = {"transformer": "expert_high", "transformer_2": "expert_low", "vae": "vae_decoder"}[part]
    model = load(str(folder), device="cpu", components=[component], **options)
    return dict(getattr(model.pipeline, part).state_dict()), model.notes


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


MARKER = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model."])
@pytest.mark.parametrize(
    ("names", "marker"),
    [(None, {}), (("scale_weight", "scale_input"), MARKER), (("weight_scale", "input_scale"), {})],
)
def test_wans_names_are_those_of_diffusers(copy, prefix, names, marker, dtype):
    tensors = stored(copy / "transformer")
    if names:
        tensors = scaled(tensors, *names)
    put(copy / "transformer", tensors | marker)
    theirs, before = state(copy, dtype=dtype)
    put(copy / "transformer", own(tensors | marker, prefix))
    ours, notes = state(copy, dtype=dtype)
    assert_same(ours, theirs)
    assert f"transformer: {len(tensors | marker)} tensors renamed from Wan's own names" in notes
    assert set(notes) >= set(before)
    assert any("FP8 weights with per-tensor scales" in note for note in notes) == bool(names)
    assert not any("not used" in note for note in notes)


def test_shards_with_an_index_are_read(copy):
    theirs, _ = state(copy)
    tensors = own(stored(copy / "transformer"))
    names, base = sorted(tensors), "diffusion_pytorch_model"
    put(copy / "transformer", {})
    (copy / "transformer" / "wan2.2_high_noise.safetensors").unlink()
    index = {}
    for part in (0, 1):
        file = f"{base}-0000{part + 1}-of-00002.safetensors"
        save_file({key: tensors[key].clone() for key in names[part::2]}, copy / "transformer" / file)
        index |= dict.fromkeys(names[part::2], file)
    (copy / "transformer" / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(state(copy)[0], theirs)


def test_other_networks_in_the_file_are_noted_by_their_names(copy):
    theirs, _ = state(copy)
    tensors = own(stored(copy / "transformer"), PREFIX)
    put(
        copy / "transformer",
        tensors | {"vae.conv1.bias": torch.ones(2), "text_encoders.umt5.x": torch.ones(2)},
    )
    ours, notes = state(copy)
    assert_same(ours, theirs)
    assert "transformer: 2 tensors of the files are not used, e.g. text_encoders.umt5.x" in notes


@pytest.mark.parametrize("name", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_every_tensor_of_the_published_models_is_found(tmp_path, name):
    """All layers and inputs of the published models, narrow."""
    config = get(name).part("transformer").config
    narrow = dict(num_attention_heads=1, attention_head_dim=12, ffn_dim=8, freq_dim=8, text_dim=8)
    part = Part("transformer", "diffusers", "WanTransformer3DModel", config | narrow)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(like.shape, generator=generator)
        for key, like in parameter_names(skeleton(part)).items()
    }
    assert len(tensors) == {"wan2.2-i2v-a14b": 1095, "wan2.2-ti2v-5b": 825}[name]
    assert tensors["patch_embedding.weight"].shape[1] == config["in_channels"]
    put(tmp_path, own(tensors))
    module, found = skeleton(part), open_checkpoint(tmp_path, network=part.class_name)
    fill(module, found, check(found, module), device=CPU, dtype=torch.float32)
    assert_same(dict(module.state_dict()), tensors)


def test_the_vae_of_wan_2_1_is_read(copy):
    torch.manual_seed(0)
    network = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    shutil.rmtree(copy / "vae")
    network.save_pretrained(copy / "vae")
    theirs, _ = state(copy, "vae")
    tensors = {of_vae(key): tensor for key, tensor in network.state_dict().items()}
    assert len(tensors) == 194
    put(copy / "vae", tensors, "Wan2.1_VAE.safetensors")
    ours, notes = state(copy, "vae")
    assert_same(ours, theirs)
    assert "vae: 194 tensors renamed from Wan's own names" in notes


def _drop(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _add(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("blocks.1.ffn.0.bias"), r"renamed from Wan's own names\) lacks tensor blocks.1.ffn.net.0.proj.bias of Wan"),
        (_add("blocks.2.norm3.weight", 24), "tensor blocks.2.norm3.weight belongs to a layer"),
        (_add("blocks.0.cross_attn.k_img.weight", 24, 24), "tensor blocks.0.cross_attn.k_img.weight belongs to a layer"),
        (_add("head.head.bias", 3), r"tensor head.head.bias has shape \[3\], config.json asks for \[16\]"),
        (_add("head.modulation", 1, 2, 3), r"tensor head.modulation has shape \[1, 2, 3\]"),
        (_add(f"{PREFIX}head.head.bias", 16), "names, which are not read for this WanTransformer3DModel"),
        (_add("motion_encoder.enc.net_app.convs.0.1.bias", 1, 4, 1, 1), "not read for this WanTransformer3DModel"),
        (_add("head.head.lora_A.weight", 2, 2), r"a LoRA \(its file follows"),
        (lambda tensors: tensors | {"head.head.bias": torch.full((16,), torch.nan)}, "tensor head.head.bias holds NaN"),
    ],
)  # fmt: skip
def test_what_is_left_over_or_missing_stops_the_load_by_name(copy, change, says):
    put(copy / "transformer", change(own(stored(copy / "transformer"))))
    with pytest.raises(WanlabError, match=says) as caught:
        state(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("UMT5EncoderModel", "token_embedding.weight"),
        ("WanAnimateTransformer3DModel", "head.modulation"),
        ("WanVACETransformer3DModel", "head.modulation"),
    ],
)
def test_networks_whose_names_are_not_read_are_refused_with_the_remedy(tmp_path, network, name):
    put(tmp_path, {name: torch.ones(2)})
    with pytest.raises(
        WanlabError, match=f"not read for this {network}; take the folder .* in the layout of diffusers"
    ):
        open_checkpoint(tmp_path, network=network)


def test_the_vae_of_wan_2_2_is_refused_before_it_is_loaded(copy):
    """diffusers gives some of its tensors one name."""
    names = [f"decoder.upsamples.0.upsamples.{i}.residual.2.bias" for i in (0, 1)]
    put(
        copy / "vae",
        dict.fromkeys([*names, "decoder.middle.0.residual.0.gamma"], torch.ones(2)),
        "wan2.2_vae.safetensors",
    )
    with pytest.raises(
        WanlabError, match="vae: the tensors have Wan's own names, which are not read for this Auto"
    ) as caught:
        load(str(copy), device="cpu")
    assert str(caught.value) in str(explain("eager", model=str(copy), height=16, width=32, frames=5))


def test_tensors_of_diffusers_keep_their_names(copy):
    found = open_checkpoint(copy / "transformer", network="WanTransformer3DModel")
    assert set(found.where) == set(stored(copy / "transformer"))
    assert not found.renamed
    assert not found.notes


def test_a_file_beside_the_weights_of_diffusers_is_said(copy):
    save_file({"head.modulation": torch.ones(2)}, copy / "transformer" / "wan_fp8.safetensors")
    notes = state(copy)[1]
    assert any("is read, wan_fp8.safetensors beside it is not" in note for note in notes)


def test_one_file_as_the_model_is_told_its_place(copy):
    put(copy / "transformer", own(stored(copy / "transformer")))
    with pytest.raises(
        WanlabError, match=r"is one file of weights; put it into transformer/ .* give the folder"
    ):
        get(copy / "transformer" / "wan2.2_high_noise.safetensors")


def test_config_of_wans_release_is_told_what_replaces_it(copy):
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps({"_class_name": "WanModel", "dim": 24}))
    with pytest.raises(
        WanlabError, match=r"config.json of transformer is that of Wan's release; replace it by that of"
    ):
        get(copy)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Copies of wan-nano by what was done to the weights of its experts."""
    root = tmp_path_factory.mktemp("nano")

    def write(name, change):
        folder = shutil.copytree(get("wan-nano").source, root / name)
        for part in EXPERTS:
            put(folder / part, change(stored(folder / part)))
        return folder

    def fp8(tensors):
        return scaled(tensors, "scale_weight", "scale_input") | MARKER

    return {
        "diffusers": write("diffusers", dict),
        "wan": write("wan", own),
        "fp8": write("fp8", fp8),
        "wan fp8": write("wan_fp8", lambda tensors: own(fp8(tensors), PREFIX)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours"), [("diffusers", "wan"), ("fp8", "wan fp8")])
def test_generation_is_that_of_the_names_of_diffusers(nano, theirs, ours):
    photo = np.random.default_rng(0).random((64, 96, 3))
    models = [load(str(nano[name]), device="cpu", dtype="float32") for name in (theirs, ours)]
    videos = [model.generate(photo, "a red ball rolls to the right", **SIZE).video for model in models]
    assert videos[0].std() > 0
    np.testing.assert_allclose(*videos, rtol=0, atol=1e-5)  # weights at other addresses round otherwise
    for part in EXPERTS:
        assert any(
            note.startswith(f"{part}: ") and "renamed from Wan's own names" in note
            for note in models[1].notes
        )


def test_identity_of_files_and_of_weights(nano):
    """Other files are another input of a run; the same weights are the same weights."""
    assert len({weights_id(str(folder)) for folder in nano.values()}) == len(nano)
    keys = [
        weights_key(load(str(nano[name]), device="cpu", components=["expert_high"]).component("expert_high"))
        for name in ("diffusers", "wan", "fp8", "wan fp8")
    ]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert facts(get(nano["wan"])).equals(facts(get(nano["diffusers"])))
