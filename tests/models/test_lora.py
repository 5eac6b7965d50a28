"""LoRA files: every convention of names gives the same weights, equal to the formula; what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models_tiny import save
from support.wan_names import of_transformer

from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError
from wanlab.diagnose.memory import options
from wanlab.models import get, load
from wanlab.models.fusion import Fusion, open_fusion
from wanlab.models.lora import read_loras, split_model, with_lora
from wanlab.models.networks import parameter_names, skeleton
from wanlab.models.registry import reference

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, ALPHA = 4, 2.0
SIZE = dict(height=16, width=32, frames=5, steps=2, guidance_scale=1.0, seed=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def network(tiny):
    return skeleton(get(str(tiny)).part("transformer"))


@pytest.fixture(scope="module")
def shapes(network):
    """Layer -> shape of its weight, of every linear layer and convolution."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in parameter_names(network).items()
        if name.endswith(".weight") and tensor.ndim > 1
    }


@pytest.fixture(scope="module")
def matrices(shapes):
    """Layer -> (up [out, rank], down [rank, in, ...])."""
    return random_matrices(shapes)


def random_matrices(shapes, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    return {
        layer: (drawn(shape[0], rank, *[1] * (len(shape) - 2)), drawn(rank, *shape[1:]))
        for layer, shape in shapes.items()
    }


def own(layer):
    """The layer's name in Wan's release."""
    return of_transformer(f"{layer}.weight").removesuffix(".weight")


def named(matrices, name, down="lora_A", up="lora_B", alpha=ALPHA):
    """Tensors of a LoRA file; `name` gives a layer's name in it."""
    tensors = {}
    for layer, (b, a) in matrices.items():
        tensors |= {f"{name(layer)}.{down}.weight": a, f"{name(layer)}.{up}.weight": b}
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path, tensors, metadata=None):
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def file(tmp_path, matrices):
    return write(tmp_path / "fast.safetensors", named(matrices, lambda layer: f"transformer.{layer}"))


def expert(folder, lora=None, component="expert_high", **options):
    return load(str(folder), device="cpu", components=[component], lora=lora, **options)


def state(model, part="transformer"):
    return dict(getattr(model.pipeline, part).state_dict())


def added(matrices, shapes, scale):
    """Parameter -> what the formula adds to it, in float64."""
    return {
        f"{layer}.weight": scale * (b.double().flatten(1) @ a.double().flatten(1)).reshape(shapes[layer])
        for layer, (b, a) in matrices.items()
    }


def assert_fused(model, original, changes, dtype=torch.float32):
    """Every weight is the original plus its change, rounded once; the others are untouched."""
    for name, tensor in state(model).items():
        assert tensor.dtype == original[name].to(dtype).dtype or tensor.dtype == torch.float32
        exact = original[name].double() + changes.get(name, 0.0)
        if name not in changes:
            assert torch.equal(tensor, exact.to(tensor.dtype)), name
        elif tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
        else:  # at most one rounding away: half a unit in the last place, beside float32's own
            error = (tensor.double() - exact).abs()
            assert bool((error <= exact.abs() * (torch.finfo(tensor.dtype).eps / 2 + 1e-5) + 1e-7).all()), (
                name
            )


@pytest.fixture(scope="module")
def original(tiny):
    return state(expert(tiny, dtype="float32"))


def test_a_fused_weight_is_the_original_plus_the_scaled_product(tiny, file, original, matrices, shapes):
    model = expert(tiny, f"{file}@expert_high:0.8")
    assert_fused(model, original, added(matrices, shapes, 0.8 * ALPHA / RANK))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fusing_rounds_once_also_where_the_files_are_in_float32(
    tiny, file, original, matrices, shapes, dtype
):
    model = expert(tiny, f"{file}@expert_high", dtype=dtype)
    assert_fused(model, original, added(matrices, shapes, ALPHA / RANK), getattr(torch, dtype))


NAMES = {
    "PEFT inside a model": (lambda layer: f"base_model.model.{layer}", "lora_A", "lora_B"),
    "PEFT with an adapter's name": (lambda layer: f"transformer.{layer}", "lora_A.default", "lora_B.default"),
    "the second transformer's": (lambda layer: f"transformer_2.{layer}", "lora_A", "lora_B"),
    "older diffusers": (lambda layer: f"transformer.{layer}", "lora.down", "lora.up"),
    "no prefix": (lambda layer: layer, "lora_down", "lora_up"),
    "Wan's": (lambda layer: f"diffusion_model.{own(layer)}", "lora_down", "lora_up"),
    "Wan's with A and B": (lambda layer: f"diffusion_model.{own(layer)}", "lora_A", "lora_B"),
    "Wan's inside a model": (lambda layer: f"model.diffusion_model.{own(layer)}", "lora_A", "lora_B"),
    "Wan's without a prefix": (own, "lora_down", "lora_up"),
    "kohya's of Wan's": (lambda layer: f"lora_unet_{own(layer).replace('.', '_')}", "lora_down", "lora_up"),
    "kohya's of diffusers'": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"),
    "LyCORIS": (lambda layer: f"lycoris_{own(layer).replace('.', '_')}", "lora_down", "lora_up"),
}


@pytest.mark.parametrize("names", NAMES)
def test_every_convention_of_names_gives_the_same_weights(tiny, file, tmp_path, matrices, names):
    other = write(tmp_path / "other.safetensors", named(matrices, *NAMES[names]))
    ours, theirs = (state(expert(tiny, f"{each}@expert_high")) for each in (other, file))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_wans_names_reach_every_layer_with_a_weight(network, tiny, tmp_path, shapes, matrices):
    """Also embedders, modulation-free norms and the head; the same table renames whole checkpoints."""
    path = write(tmp_path / "x.safetensors", named(matrices, lambda layer: f"diffusion_model.{own(layer)}"))
    spec = get(f"{tiny}+{path}@expert_low")
    (opened,) = open_fusion(spec, spec.part("transformer_2"), network).opened
    assert {name.removesuffix(".weight") for name in opened.terms} == set(shapes)
    assert not open_fusion(spec, spec.part("transformer"), network)


@given(
    rank=st.integers(1, 9),
    alpha=st.none() | st.floats(0.01, 64),
    strength=st.floats(-2, 2),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rank_alpha_strength_and_choice_of_layers_follows_the_formula(
    tiny, network, shapes, tmp_path, rank, alpha, strength, seed, data
):
    layers = data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    matrices = random_matrices({layer: shapes[layer] for layer in layers}, rank, seed)
    path = write(tmp_path / "x.safetensors", named(matrices, lambda layer: layer, alpha=alpha))
    spec = get(f"{tiny}+{path}@expert_high:{strength!r}")
    fusion = open_fusion(spec, spec.part("transformer"), network)
    changes = added(matrices, shapes, strength * (1.0 if alpha is None else alpha / rank))
    for name, change in changes.items():
        weight = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed))
        before = weight.clone()
        ours = fusion.fused(name, weight, torch.float32)
        assert torch.equal(weight, before)  # the source is left as it is
        torch.testing.assert_close(ours.double(), before.double() + change, rtol=1e-5, atol=1e-5)


PEFT = {"lora_alpha": 8, "r": RANK, "alpha_pattern": {"blocks.1.attn1.to_q": 1}}


@pytest.mark.parametrize("where", ["metadata", "adapter_config.json", "nowhere"])
@pytest.mark.parametrize("root", [False, True])
def test_alphas_that_peft_keeps_beside_the_tensors_are_read(
    tiny, tmp_path, original, matrices, shapes, where, root
):
    tensors = named(matrices, lambda layer: f"transformer.{layer}", alpha=None)
    config = PEFT | {"use_rslora": root}
    if where == "metadata":
        stored = {f"transformer.{key}": value for key, value in config.items()}
        path = write(
            tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(stored), "format": "pt"}
        )
    else:
        path = write(tmp_path / "adapter_model.safetensors", tensors)
    if where == "adapter_config.json":
        path.with_name("adapter_config.json").write_text(json.dumps(config))
    model = expert(tiny, f"{path}@expert_high")
    divisor = 2.0 if root else RANK  # the root of 4
    scale, other = (1.0, 1.0) if where == "nowhere" else (8 / divisor, 1 / divisor)
    changes = added(matrices, shapes, scale)
    changes["blocks.1.attn1.to_q.weight"] *= other / scale
    assert_fused(model, original, changes)


def test_differences_of_weights_biases_and_modulations_are_added(tiny, tmp_path, original):
    """LightX2V's distilled LoRAs have them beside the products."""
    parameters = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",  # two conventions give their names crosswise
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    torch.manual_seed(0)
    tensors = {
        f"diffusion_model.{name}": torch.randn(original[parameter].shape)
        for name, parameter in parameters.items()
    }
    path = write(tmp_path / "x.safetensors", tensors)
    changes = {
        parameter: 0.5 * tensors[f"diffusion_model.{name}"].double() for name, parameter in parameters.items()
    }
    assert_fused(expert(tiny, f"{path}@expert_high:0.5"), original, changes)


def test_a_bias_of_peft_is_scaled_as_the_product_is(tiny, tmp_path, original, shapes):
    matrices = random_matrices({"proj_out": shapes["proj_out"]})
    bias = torch.randn(shapes["proj_out"][0])
    path = write(
        tmp_path / "x.safetensors",
        named(matrices, lambda layer: layer) | {"proj_out.lora_B.bias": bias},
    )
    scale = ALPHA / RANK
    changes = added(matrices, shapes, scale) | {"proj_out.bias": scale * bias.double()}
    assert_fused(expert(tiny, f"{path}@expert_high"), original, changes)


def test_the_model_computes_what_a_lora_beside_every_layer_computes(tiny, file, matrices):
    fused, plain = expert(tiny, f"{file}@expert_high").pipeline, expert(tiny).pipeline
    for layer, (b, a) in matrices.items():
        if a.ndim == 2:
            plain.transformer.get_submodule(layer).register_forward_hook(
                lambda _, inputs, output, a=a, b=b: output + ALPHA / RANK * (inputs[0] @ a.T @ b.T)
            )
        else:  # the patch embedding, whose product is a convolution after a convolution
            plain.transformer.get_submodule(layer).register_forward_hook(
                lambda module, inputs, output, a=a, b=b: (
                    output
                    + ALPHA
                    / RANK
                    * torch.nn.functional.conv3d(
                        torch.nn.functional.conv3d(inputs[0], a, stride=module.stride), b
                    )
                )
            )
    torch.manual_seed(0)
    inputs = torch.randn(1, 12, 2, 4, 4), torch.tensor([500]), torch.randn(1, 6, 16)
    with torch.no_grad():
        ours, theirs = (pipe.transformer(*inputs, return_dict=False)[0] for pipe in (fused, plain))
        before = expert(tiny).pipeline.transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 100 * (ours - theirs).abs().max()


@pytest.mark.parametrize("names", ["Wan's", "PEFT"])
def test_diffusers_loads_and_fuses_the_same_weights_with_peft(tiny, tmp_path, shapes, names):
    pytest.importorskip("peft")
    from diffusers import WanImageToVideoPipeline

    linear = {layer: shape for layer, shape in shapes.items() if len(shape) == 2 and "proj_out" not in layer}
    wide = random_matrices({layer: shape for layer, shape in linear.items() if "ffn" in layer}, 2 * RANK)
    matrices = random_matrices(linear) | wide  # two ranks in one file
    if names == "PEFT":
        tensors = named(matrices, lambda layer: f"transformer.{layer}", alpha=None)
    else:
        blocks = {layer: pair for layer, pair in matrices.items() if layer.startswith("blocks.")}
        tensors = named(blocks, lambda layer: f"diffusion_model.{own(layer)}", "lora_down", "lora_up")
    path = write(tmp_path / "x.safetensors", tensors)
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny)
    for second, name in enumerate(("high", "low")):
        pipeline.load_lora_weights(str(path), adapter_name=name, load_into_transformer_2=bool(second))
    pipeline.set_adapters(["high", "low"], [0.8, 0.8])
    pipeline.fuse_lora(["transformer", "transformer_2"])
    pipeline.unload_lora_weights()
    model = load(str(tiny), device="cpu", lora=[f"{path}@expert_high:0.8", f"{path}@expert_low:0.8"])
    for part in ("transformer", "transformer_2"):
        ours, theirs = state(model, part), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_two_loras_of_one_component_add_up_before_the_one_rounding(
    tiny, tmp_path, original, matrices, shapes
):
    other = random_matrices(shapes, rank=2, seed=1)
    paths = [
        write(tmp_path / f"{rank}.safetensors", named(each, lambda layer: layer, alpha=None))
        for rank, each in enumerate((matrices, other))
    ]
    model = expert(tiny, f"{paths[0]}@expert_high + {paths[1]}@expert_high:-0.5", dtype="bfloat16")
    first, second = added(matrices, shapes, 1.0), added(other, shapes, -0.5)
    assert_fused(model, original, {name: first[name] + second[name] for name in first}, torch.bfloat16)
    assert sum("fused into" in note for note in model.notes) == 2


def test_a_lora_is_fused_into_its_own_expert_alone(tiny, file):
    plain, fused = (load(str(tiny), device="cpu", lora=lora) for lora in (None, f"{file}@expert_low"))
    for part, same in (("transformer", True), ("transformer_2", False), ("vae", True)):
        assert (
            weights_key(getattr(plain.pipeline, part)) == weights_key(getattr(fused.pipeline, part))
        ) is same


def test_random_weights_take_a_lora(tiny, file, matrices, shapes):
    plain = state(expert(tiny, weights="random", dtype="float32"))
    fused = expert(tiny, f"{file}@expert_high", weights="random", dtype="float32")
    assert_fused(fused, plain, added(matrices, shapes, ALPHA / RANK))
    for dtype in ("bfloat16", "float16"):
        plain = state(expert(tiny, weights="random", dtype=dtype))
        fused = expert(tiny, f"{file}@expert_high", weights="random", dtype=dtype)
        assert_fused(fused, plain, added(matrices, shapes, ALPHA / RANK), getattr(torch, dtype))


def test_a_quantized_checkpoint_takes_a_lora_before_it_is_rounded(
    tiny, tmp_path, file, original, matrices, shapes
):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    tensors = {
        key: tensor
        for path in (tiny / "transformer").glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    stored, dequantized = dict(tensors), dict(original)
    for key, tensor in tensors.items():
        if key.startswith("blocks.") and tensor.ndim == 2 and key.endswith("weight"):
            scale = tensor.abs().max() / 448
            stored[key] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[key.removesuffix("weight") + "scale_weight"] = scale
            dequantized[key] = stored[key].float() * scale
    for path in (folder / "transformer").glob("diffusion_pytorch_model*"):
        path.unlink()
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors", stored)
    model = expert(folder, f"{file}@expert_high", dtype="bfloat16")
    assert_fused(model, dequantized, added(matrices, shapes, ALPHA / RANK), torch.bfloat16)
    assert any("FP8 weights with per-tensor scales" in note for note in model.notes)


def test_the_note_says_what_was_fused_and_how_much_it_changed(tiny, file, shapes):
    model = expert(tiny, f"{file}@expert_high:0.8")
    digest = model.spec.loras[0].digest
    facts = f"LoRA fast.safetensors ({digest}), strength 0.8, rank 4, alpha 2"
    assert f"expert_high: {facts}, fused into {len(shapes)} tensors" in model.notes
    (share,) = (note for note in model.notes if "of the numbers of" in note)
    assert 99 < float(re.search(r"changed ([\d.]+) %", share)[1]) <= 100


@pytest.mark.parametrize("how", ["up is 0", "strength 0"])
def test_a_lora_without_effect_is_said(tiny, tmp_path, matrices, original, how):
    zero = {layer: (torch.zeros_like(b), a) for layer, (b, a) in matrices.items()}
    path = write(
        tmp_path / "x.safetensors", named(zero if how == "up is 0" else matrices, lambda layer: layer)
    )
    model = expert(tiny, f"{path}@expert_high:{0 if how == 'strength 0' else 1}")
    assert any("has no effect: all that it adds is 0" in note for note in model.notes)
    assert not any("fused into" in note for note in model.notes)
    assert_fused(model, original, {})


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_sum_beyond_the_range_of_the_dtype_is_refused(tiny, file, weights):
    with pytest.raises(WanlabError, match=r"fast\.safetensors: with it .* is beyond the range of float16"):
        expert(tiny, f"{file}@expert_high:1e8", dtype="float16", weights=weights)
    expert(tiny, f"{file}@expert_high:1e8", dtype="bfloat16", weights=weights)


def test_a_lora_too_small_for_the_dtype_is_said(tiny, tmp_path, matrices):
    small = {layer: (b * 1e-6, a) for layer, (b, a) in matrices.items() if "to_q" in layer}
    path = write(tmp_path / "x.safetensors", named(small, lambda layer: layer))
    model = expert(tiny, f"{path}@expert_high", dtype="bfloat16")
    assert any("no effect: it adds less than the weights can hold" in note for note in model.notes)


def refused(tiny, tensors, tmp_path, lora="@expert_high", metadata=None):
    path = write(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(WanlabError) as error:
        expert(tiny, f"{path}{lora}")
    assert "\n" not in str(error.value)
    return str(error.value)


LAYER = "transformer.blocks.0.attn1.to_q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(4, 24), f"{LAYER}.lora_B.weight": torch.ones(24, 4)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 99)},
         r"blocks\.0\.attn1\.to_q\.lora_B\.weight changes a tensor of shape \[24, 99\], .* has \[24, 24\]"),
        ({f"{LAYER}.lora_B.weight": torch.ones(24, 5)}, r"shape \[24, 24\].*LoRA of another model"),
        ({f"{LAYER}.diff_b": torch.ones(3)}, r"diff_b changes a tensor of shape \[3\], .* has \[24\]"),
        ({"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.ones(4, 24),
          "transformer.blocks.7.attn1.to_q.lora_B.weight": torch.ones(24, 4)},
         r"blocks\.7\.attn1\.to_q\.lora_B\.weight fits no layer of expert_high \(WanTransformer3DModel\)"),
        ({"text_encoder.encoder.x.lora_A.weight": torch.ones(4, 24),
          "text_encoder.encoder.x.lora_B.weight": torch.ones(24, 4)}, "fits no layer of expert_high"),
        ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 24),
          "transformer_2.blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 4)}, "one file for each component"),
        ({"transformer.proj_out.lora_A.weight": torch.ones(4, 24)}, "lora_A.weight has no up matrix"),
        ({"transformer.proj_out.alpha": torch.tensor(1.0)}, "alpha has no down and no up matrix"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "alpha is no finite number"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "alpha is no finite number"),
        ({f"{LAYER}.lora_A.weight": torch.full((4, 24), float("nan"))}, "lora_A.weight holds NaN or infinity"),
        ({f"{LAYER}.lora_B.weight": torch.full((24, 4), float("inf"))}, "lora_B.weight holds NaN or infinity"),
        ({f"{LAYER}.lora_B.weight": torch.ones(24, 4, dtype=torch.int8)}, "is I8; give the LoRA in floating point"),
        ({f"{LAYER}.dora_scale": torch.ones(24, 1)}, "a sign of DoRA"),
        ({"transformer.proj_out.hada_w1_a": torch.ones(2, 2)}, "a sign of LoHa"),
        ({"lycoris_proj_out.lokr_w1": torch.ones(2, 2)}, "a sign of LoKr"),
        ({"transformer.proj_out.weight": torch.ones(2, 2)}, "a whole network goes into the folder"),
        ({f"{LAYER}.diff": torch.ones(24, 24)}, "has both a product and"),
        ({f"{LAYER}.lora_A.other.weight": torch.ones(4, 24)}, "has two tensors down"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tiny, tmp_path, tensors, said):
    message = refused(tiny, PAIR | tensors, tmp_path)
    assert re.search(said, message), message
    assert "bad.safetensors" in message


def test_a_file_that_is_no_lora_is_refused(tiny, tmp_path):
    assert "has no tensors" in refused(tiny, {}, tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(WanlabError, match="truncated or corrupt"):
        expert(tiny, f"{tmp_path / 'cut.safetensors'}@expert_high")
    assert "no JSON object" in refused(tiny, PAIR, tmp_path, metadata={"lora_adapter_metadata": "["})
    dora = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    assert "is DoRA" in refused(tiny, PAIR, tmp_path, metadata=dora)


@pytest.mark.parametrize(
    ("text", "component", "strength"),
    [
        ("{}", "", 1.0),
        ("{}@expert_high", "expert_high", 1.0),
        ("{}:0.5", "", 0.5),
        ("{}@vae:-1e-1", "vae", -0.1),
    ],
)
def test_a_lora_is_a_file_a_component_and_a_strength(file, text, component, strength):
    (found,) = read_loras(text.format(file))
    assert (found.file, found.component, found.strength) == (str(file), component, strength)
    assert read_loras(str(found)) == (found,)


def test_a_file_whose_name_looks_like_the_form_is_found(file, tmp_path):
    odd = file.rename(tmp_path / "a@b:2+c.safetensors")
    assert read_loras(str(odd))[0].file == str(odd)
    assert read_loras([f"{odd}@expert_high:3"])[0].strength == 3.0
    assert read_loras(f"{odd}@expert_high")[0].component == "expert_high"


@pytest.mark.parametrize(
    ("text", "model", "loras"),
    [
        ("wan-nano", "wan-nano", []),
        ("wan-nano+a.safetensors", "wan-nano", ["a.safetensors"]),
        (
            "wan-nano + a.safetensors@expert_high:0.5 + b.safetensors@expert_low",
            "wan-nano",
            ["a.safetensors@expert_high:0.5", "b.safetensors@expert_low"],
        ),
        ("wan-nano+a+b.safetensors+c.safetensors", "wan-nano", ["a+b.safetensors", "c.safetensors"]),
        ("someone/model+a.safetensors", "someone/model", ["a.safetensors"]),
        ("a+b", "a+b", []),
        ("a+b+c.safetensors", "a+b", ["c.safetensors"]),
    ],
)
def test_the_name_of_a_model_ends_where_its_loras_begin(tmp_path, monkeypatch, text, model, loras):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert split_model(text) == (model, loras)


@pytest.mark.parametrize("name", ["wan-nano", "tiny"])
def test_a_spec_can_be_written_as_text(tiny, file, name):
    spec = get(f"{tiny if name == 'tiny' else name}+{file}@expert_low:0.3+{file}@expert_high")
    assert get(reference(spec)) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{}",
            r"expert_high and expert_low; say which one fast\.safetensors is for, such as fast\.safetensors@",
        ),
        ("{}@expert_hihg", "did you mean 'expert_high'"),
        ("{}@expert_high:strong", "the strength 'strong' is no number"),
        ("{}@expert_high:nan", "the strength 'nan' is no number"),
        ("{}@expert_high+{}@expert_high:0.5", "named twice for expert_high"),
        ("{}x", "is missing; the form is FILE"),
        ("/tmp", "is a folder"),
    ],
)
def test_a_lora_that_cannot_be_meant_is_refused(tiny, file, text, said):
    with pytest.raises(WanlabError, match=said):
        get(f"{tiny}+{text.format(file, file)}")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(WanlabError, match=r"x\.pt is not read; give a \.safetensors file"):
        read_loras(str(tmp_path / "x.pt"))


def test_a_model_with_one_expert_needs_no_component(file):
    spec = with_lora(get("wan2.2-ti2v-5b"), str(file))
    assert [each.component for each in spec.loras] == ["expert"]


def test_a_model_that_is_loaded_again_from_its_facts_has_its_loras(tiny, file):
    model = load(f"{tiny}+{file}@expert_high", device="cpu")
    with options._half_precision(model, {}) as half:
        assert half.spec.loras == model.spec.loras
        assert any("fused into" in note for note in half.notes)
        plain = expert(tiny, dtype="bfloat16")
        assert weights_key(half.pipeline.transformer) != weights_key(plain.pipeline.transformer)


def test_a_video_of_a_fused_model_is_another(tiny, file):
    def video(lora):
        return load(str(tiny), device="cpu", lora=lora).generate(np.zeros((16, 32, 3)), "pan", **SIZE).video

    assert abs(video(None) - video(f"{file}@expert_high")).max() > 1e-3


def test_without_a_lora_nothing_is_opened_or_cast(tiny, network, monkeypatch):
    monkeypatch.setattr(Fusion, "fused", lambda *_: pytest.fail("a weight took the way of a LoRA"))
    model = load(str(tiny), device="cpu", dtype="bfloat16")
    assert model.spec.loras == ()
    assert not any("LoRA" in note for note in model.notes)
