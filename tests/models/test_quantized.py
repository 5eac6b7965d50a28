"""Checkpoints of other programs: quantized weights with their scales, variants, and numbers that are not finite."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models_tiny import save

from wanlab.core.errors import WanlabError
from wanlab.models import load

LAYER = "blocks.0.attn1.to_q"
NF4 = torch.linspace(-1, 1, 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def original(tiny):
    return {
        k: t
        for file in sorted((tiny / "transformer").glob("*.safetensors"))
        for k, t in load_file(file).items()
    }


@pytest.fixture
def store(tiny, tmp_path):
    """Writes the transformer's tensors, and optionally quantization_config, to a copy of the model; returns the folder."""

    def write(tensors, config=None, name="diffusion_pytorch_model.safetensors"):
        folder = tmp_path / "copy"
        if not folder.exists():
            shutil.copytree(tiny, folder)
            for file in (folder / "transformer").glob("diffusion_pytorch_model*"):
                file.unlink()
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
            folder / "transformer" / name,
        )
        if config is not None:
            path = folder / "transformer" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
        return folder

    return write


def expert(folder, **options):
    return load(str(folder), device="cpu", components=["expert_high"], **options)


def layers(original):
    """Names of the linear layers of the blocks."""
    return [
        k.removesuffix(".weight")
        for k, t in original.items()
        if k.startswith("blocks.") and t.ndim == 2 and "weight" in k
    ]


def fp8(weight, scale):
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def per_tensor(weight):
    scale = weight.abs().max() / 448
    return fp8(weight, scale), scale


def per_channel(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return fp8(weight, scale), scale


def per_block(weight):
    """Blocks of 16 x 16, the last ones smaller."""
    rows, columns = (-(-size // 16) for size in weight.shape)
    scale = torch.rand(rows, columns) * 1e-3 + 1e-4
    wide = scale.repeat_interleave(16, 0)[: weight.shape[0]].repeat_interleave(16, 1)[:, : weight.shape[1]]
    return fp8(weight, wide), scale


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def scaled(original, quantize, name):
    """The checkpoint with the weights of its blocks as codes and scales."""
    stored = dict(original)
    for layer in layers(original):
        stored[f"{layer}.weight"], stored[f"{layer}.{name}"] = quantize(original[f"{layer}.weight"])
    return stored


COMFY = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.mark.parametrize(
    ("quantize", "name", "extra", "config", "says"),
    [
        (per_tensor, "scale_weight", COMFY, None, "FP8 weights with per-tensor scales"),
        (
            per_tensor,
            "weight_scale",
            {f"{LAYER}.input_scale": torch.ones(())},
            None,
            "FP8 weights with per-tensor",
        ),
        (
            per_channel,
            "weight_scale",
            {},
            {"quant_method": "compressed-tensors"},
            "FP8 weights with per-channel",
        ),
        (per_block, "weight_scale_inv", {}, BLOCKS, "FP8 weights with per-block scales"),
        (int8, "weight_scale", {}, None, "INT8 weights with per-channel scales"),
    ],
)
def test_scales_beside_the_weights_are_applied(store, original, quantize, name, extra, config, says):
    stored = scaled(original, quantize, name)
    model = expert(store(stored | extra, config), dtype="float32")
    weights = model.pipeline.transformer.state_dict()
    step = 2**-4 if quantize is not int8 else 1 / 250
    for key, value in original.items():
        if quantize is per_block and key.removesuffix(".weight") in layers(original):
            scale = (
                stored[key.removesuffix("weight") + name].repeat_interleave(16, 0).repeat_interleave(16, 1)
            )
            value = stored[key].float() * scale[: value.shape[0], : value.shape[1]]
            assert torch.equal(weights[key], value), key
        else:
            assert (weights[key] - value).abs().max() <= step * value.abs().max() + 1e-7, key
    assert f"transformer: {says}" in " ".join(model.notes)
    assert "dequantized to float32" in " ".join(model.notes)


def test_quanto_codes_and_scales_are_read(store, original):
    stored = dict(original)
    for layer in layers(original):
        weight = stored.pop(f"{layer}.weight")
        stored[f"{layer}.weight._data"], stored[f"{layer}.weight._scale"] = int8(weight)
        stored[f"{layer}.input_scale"] = stored[f"{layer}.output_scale"] = torch.ones(())
    weights = expert(store(stored, {"quant_method": "quanto"})).pipeline.transformer.state_dict()
    assert all((weights[k] - t).abs().max() <= t.abs().max() / 250 for k, t in original.items())


def test_bitsandbytes_in_8_bits_is_read(store, original):
    stored = dict(original)
    for layer in layers(original):
        codes, scale = int8(original[f"{layer}.weight"])
        stored |= {f"{layer}.weight": codes, f"{layer}.SCB": scale[:, 0] * 127}
        stored[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    model = expert(store(stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    weights = model.pipeline.transformer.state_dict()
    assert all((weights[k] - t).abs().max() <= t.abs().max() / 250 for k, t in original.items())
    assert any("INT8 (bitsandbytes) weights" in note for note in model.notes)


def four_bits(name, weight, nested):
    """A weight as bitsandbytes stores it: codes of NF4-like levels, two a byte, blocks of 8."""
    blocks = weight.flatten().reshape(-1, 8)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - NF4).abs().argmin(-1).flatten().to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 8, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {
        name: (codes[::2] << 4 | codes[1::2])[:, None],
        f"{name}.quant_map": NF4,
        f"{name}.absmax": absmax,
    }
    if nested:
        levels, offset = torch.linspace(-1, 1, 256), absmax.mean()
        largest = (absmax - offset).abs().max().reshape(1)
        inner = ((absmax - offset)[:, None] / largest - levels).abs().argmin(1).to(torch.uint8)
        stored |= {
            f"{name}.absmax": inner,
            f"{name}.nested_quant_map": levels,
            f"{name}.nested_absmax": largest,
        }
        state |= {"nested_blocksize": 4096, "nested_dtype": "float32", "nested_offset": float(offset)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored | {f"{name}.quant_state.bitsandbytes__nf4": text}


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits_is_read(store, original, nested):
    stored = dict(original)
    for layer in layers(original):
        stored |= four_bits(f"{layer}.weight", original[f"{layer}.weight"], nested)
    model = expert(store(stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    weights = model.pipeline.transformer.state_dict()
    for key, value in original.items():
        assert (weights[key] - value).abs().max() <= value.abs().max() / 12 + 1e-7, key
    assert any("4-bit NF4 (bitsandbytes) weights" in note for note in model.notes)


def test_fp8_without_scales_is_said(store, original):
    cast = {k: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for k, t in original.items()}
    model = expert(store(cast), dtype="bfloat16")
    assert any("FP8 weights without scales, converted to bfloat16" in note for note in model.notes)


def _comfy(text):
    return {f"{LAYER}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (lambda s: s | {f"{LAYER}.scale_shift": torch.ones(2)}, None, f"tensor {LAYER}.scale_shift belongs to a layer"),
        (lambda s: s | {"blocks.2.norm2.weight": torch.ones(24)}, None, "tensor blocks.2.norm2.weight belongs"),
        (lambda s: s | {f"{LAYER}.lora_A.weight": torch.ones(2, 2)}, None, r"a LoRA \(its file follows"),
        (lambda s: s | {f"{LAYER}.weight_scale_2": torch.ones(())}, None, "NVFP4"),
        (lambda s: s | _comfy('{"format": "int8_convrot"}'), None, "names the format 'int8_convrot'"),
        (lambda s: s, {"quant_method": "gptq"}, "quantized by gptq, which is not read"),
        (lambda s: {k: t for k, t in s.items() if k != f"{LAYER}.scale_weight"}, None, "its scale is missing"),
        (lambda s: s | {f"{LAYER}.weight": s[f"{LAYER}.weight"].to(torch.bfloat16)}, None, "follows no convention"),
        (lambda s: s | {f"{LAYER}.scale_weight": torch.ones(7)}, None, "do not belong together"),
        (lambda s: s | {f"{LAYER}.bias": s[f"{LAYER}.bias"].to(torch.int8)}, None, f"tensor {LAYER}.bias is I8"),
        (lambda s: s | {f"{LAYER}.scale_weight": torch.tensor(torch.nan)}, None, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_a_format_that_is_not_read_stops_the_load_by_name(store, original, change, config, says):
    folder = store(change(scaled(original, per_tensor, "scale_weight") | COMFY), config)
    with pytest.raises(WanlabError, match=says) as caught:
        expert(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "scale" in says or "belong" in says


def test_gguf_is_refused_by_name(store, original):
    folder = store(original)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    gguf = weights.rename(weights.with_name("q4.gguf"))
    for name in (folder, gguf):
        with pytest.raises(WanlabError, match=r"q4.gguf.*GGUF.*not read"):
            expert(name)


def test_the_only_file_of_weights_may_have_any_name(store, original):
    model = expert(store(original, name="wan2.2_high_noise.safetensors"))
    assert torch.equal(model.pipeline.transformer.proj_out.weight, original["proj_out.weight"])


def test_a_variant_is_read_and_a_choice_between_two_is_said(store, original):
    half = {key: tensor.half() for key, tensor in original.items()}
    folder = store(half, name="diffusion_pytorch_model.fp16.safetensors")
    model = expert(folder, dtype="float16")
    assert torch.equal(model.pipeline.transformer.state_dict()["proj_out.weight"], half["proj_out.weight"])
    assert not any("variant" in note for note in model.notes)
    store(original)
    model = expert(folder)
    assert torch.equal(
        model.pipeline.transformer.state_dict()["proj_out.weight"], original["proj_out.weight"]
    )
    assert any("the one without a name is used (also there: fp16)" in note for note in model.notes)


def test_sharded_variants_are_read(store, original):
    names = sorted(original)
    shards = {f"diffusion_pytorch_model.bf16-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, keys in shards.items():
        folder = store({key: original[key] for key in keys}, name=file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(
        json.dumps(index)
    )
    assert torch.equal(
        expert(folder).pipeline.transformer.state_dict()["proj_out.weight"], original["proj_out.weight"]
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_refused_and_named(store, original, number, dtype):
    broken = original[f"{LAYER}.weight"].clone()
    broken[3, 2] = number
    with pytest.raises(WanlabError, match=rf"tensor {LAYER}.weight holds NaN or infinity"):
        expert(store(original | {f"{LAYER}.weight": broken}), dtype=dtype)


def test_weights_beyond_the_range_of_float16_are_refused_and_named(store, original):
    large = original | {"proj_out.bias": torch.full_like(original["proj_out.bias"], 1e5)}
    with pytest.raises(WanlabError, match=r"tensor proj_out.bias has numbers beyond the range of float16"):
        expert(store(large), dtype="float16")
    assert float(expert(store(large), dtype="bfloat16").pipeline.transformer.proj_out.bias[0]) > 9e4
