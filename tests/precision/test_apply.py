"""A plan applied in PyTorch: the numbers of the formats, the original untouched, steps switched inside a generation."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import models, precision
from wanlab.core.errors import WanlabError
from wanlab.export import ClipShape
from wanlab.export.components import component_spec
from wanlab.precision.formats import encode_weight, get_format
from wanlab.precision.quant_linear import CastLinear, QuantLinear, kernel_for, pack, planned, unpack
from wanlab.precision.steps import SteppedLayer

SIZE = dict(height=64, width=64, frames=5, output="latent")
EXPERTS = ("expert_high", "expert_low")
NAMES = ("int8", "fp8", "fp8-channel", "int8-weight", "int4-weight", "int4-weight-32")
ROUNDED = ("int8", "fp8", "fp8-channel")
PATTERN = ("blocks.*",)


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def example():
    return precision.nano_examples(1)[0]


def forward(model, component="expert_high"):
    plan = component_spec(model, component)
    shape = ClipShape(1, 64, 64, 5, model.spec.defaults.text_tokens)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return plan.reference(*inputs)


def generate(model, example, **changes):
    settings = SIZE | dict(steps=3, seed=1) | changes
    return torch.from_numpy(np.asarray(model.generate(example.image, example.prompt, **settings).video))


def uniform(format, **changes):
    return precision.make_plan("test", rules=[{"format": format, "layers": PATTERN} | changes])


def ranges(model, amax=5.0):
    network = model.component("expert_high")
    layers = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    amax_of = {layer: amax + index % 3 for index, layer in enumerate(layers)}
    return {name: amax_of for name in EXPERTS}


def distance(first, second) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


# ---- numbers


@pytest.mark.parametrize("format", NAMES)
def test_simulation_is_the_arithmetic_of_fake_quantized(model, format):
    amax = ranges(model)
    applied = precision.apply_plan(model, uniform(format), amax)
    network = model.component("expert_high")
    formats = {
        row.layer: format
        for row in applied.assignment.frame.itertuples()
        if row.component == "expert_high" and row.format == format
    }
    assert len(formats) == 60
    with precision.fake_quantized(network, formats, amax["expert_high"]):
        expected = forward(model)
    assert torch.equal(forward(applied.model), expected)
    assert distance(expected, forward(model)) > 1e-3


@settings(max_examples=25)
@given(
    format=st.sampled_from(ROUNDED),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(17, 40),
    sizes=st.tuples(st.sampled_from([16, 48, 128]), st.sampled_from([16, 80])),
    amax=st.sampled_from([None, 0.5, 4.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_codes_are_those_of_the_simulation(format, dtype, rows, sizes, amax, bias, seed):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(*sizes, bias=bias).to(dtype)
    values = torch.randn(2, rows, sizes[0]).to(dtype)
    native = planned(layer, get_format(format), native=True, amax=amax)
    simulated = planned(layer, get_format(format), native=False, amax=amax)
    assert native.kernel in ("scaled_mm", "int_mm")
    assert simulated.kernel == "simulated"
    with torch.no_grad():
        made, expected = native(values), simulated(values)
    assert made.dtype == expected.dtype == dtype
    assert made.shape == (2, rows, sizes[1])
    # The codes are equal; sums differ in order, and in the rounding of decoded values to the layer's dtype.
    assert (
        distance(made, expected) < {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    )


def test_held_codes_are_those_of_the_format(model):
    applied = precision.apply_plan(model, "uniform-fp8")
    layer = applied.model.component("expert_low").get_submodule("blocks.3.ffn.net.2")
    original = model.component("expert_low").get_submodule("blocks.3.ffn.net.2")
    codes, scale = encode_weight(original.weight, get_format("fp8").weight, torch.float32)
    assert layer.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(layer.scale, scale)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_packed_codes_come_back(outputs, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (outputs, 2 * pairs), dtype=torch.int8, generator=generator)
    packed = pack(codes)
    assert packed.shape == (outputs, pairs)
    assert torch.equal(unpack(packed), codes)


def test_without_a_calibration_inputs_scale_themselves(model):
    layer = torch.nn.Linear(64, 64)
    values = torch.randn(3, 20, 64) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    whole = planned(layer, get_format("fp8"), native=False)
    each = planned(layer, get_format("fp8-channel"), native=False)
    assert (whole.scaling, each.scaling) == ("per tensor", "per token")
    # A row much smaller than the largest is lost by one scale for all, and not by one of its own.
    small = values[2]
    rounded = each._rounded(values.reshape(-1, 64)).reshape(values.shape)[2]
    assert distance(rounded, small) < 0.05
    applied = precision.apply_plan(model, uniform("fp8-channel"), {"expert_low": ranges(model)["expert_low"]})
    said = applied.frame[applied.frame["format"] == "fp8-channel"].groupby("component")["input"].unique()
    assert list(said["expert_high"]) == ["per token"]
    assert list(said["expert_low"]) == ["static"]


def test_few_rows_of_int8_are_decoded(model):
    layer = planned(torch.nn.Linear(64, 32), get_format("int8"), native=True)
    again = planned(torch.nn.Linear(64, 32), get_format("int8"), native=False)
    again.load_state_dict(layer.state_dict())
    values = torch.randn(1, 16, 64)
    assert torch.equal(layer(values), again(values))
    applied = precision.apply_plan(model, "uniform-int8", kernels="native")
    assert set(applied.frame.loc[applied.frame["kernel"] == "int_mm", "note"]) == {
        "decoded for fewer than 17 rows"
    }


def test_kernels_are_used_where_they_can_be():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert kernel_for(get_format("fp8"), (64, 64), cpu, True) == "scaled_mm"
    assert kernel_for(get_format("fp8"), (64, 64), cpu, False) == "simulated"
    assert kernel_for(get_format("int8"), (64, 4, 1, 2, 2), cpu, True) == "simulated"
    assert kernel_for(get_format("fp8"), (64, 72), gpu, True) == "simulated"  # not a multiple of 16
    assert kernel_for(get_format("int8"), (64, 60), gpu, True) == "simulated"
    assert kernel_for(get_format("int4-weight"), (64, 64), gpu, True) == "decoded"


def test_a_float_island_computes_between_two_casts(model):
    plan = uniform("fp16", layers=("ffn.net.2", "proj_out"))
    applied = precision.apply_plan(model, plan)
    network = applied.model.component("expert_high")
    island = network.get_submodule("blocks.2.ffn.net.2")
    original = model.component("expert_high").get_submodule("blocks.2.ffn.net.2")
    assert isinstance(island, CastLinear)
    values = torch.randn(1, 20, 512)
    with torch.no_grad():
        expected = torch.nn.functional.linear(
            values.half(), original.weight.half(), original.bias.half()
        ).float()
        assert torch.equal(island(values), expected)
    assert network.dtype == torch.float32
    assert applied.frame["kernel"].value_counts()["cast"] == 2 * 7
    assert 0 < distance(forward(applied.model), forward(model)) < 1e-2


def test_a_convolution_is_simulated(model):
    plan = precision.make_plan("conv", rules=[{"format": "int8", "layers": ("patch_embedding",)}])
    applied = precision.apply_plan(model, plan, kernels="native")
    assert "simulated" in applied.kernels
    assert 1e-4 < distance(forward(applied.model), forward(model)) < 0.2


# ---- the model


def test_the_original_is_as_it_was_and_shares_what_the_plan_leaves(model, example):
    before, names = forward(model), [name for name, _ in model.component("expert_high").named_parameters()]
    applied = precision.apply_plan(model, uniform("int8", component="expert_high"))
    assert torch.equal(forward(model), before)
    assert [name for name, _ in model.component("expert_high").named_parameters()] == names
    mine, theirs = model.component("expert_high"), applied.model.component("expert_high")
    shared = dict(mine.named_parameters())
    left = dict(theirs.named_parameters())
    assert left
    assert all(parameter is shared[name] for name, parameter in left.items())
    assert torch.equal(forward(applied.model, "expert_low"), forward(model, "expert_low"))
    assert applied.model.pipeline.scheduler is not model.pipeline.scheduler
    assert applied.model.engines["expert_high"] != model.engines["expert_high"] == "eager"
    assert not torch.equal(generate(applied.model, example), generate(model, example))


def test_bytes_are_those_of_codes_and_scales(model):
    table = precision.apply_plan(model, "uniform-int8").bytes().set_index(["component", "format"])
    row = table.loc["expert_high", "int8"]
    assert row["weight_before_bytes"] / row["weight_bytes"] == pytest.approx(
        3.93, abs=0.05
    )  # 8 of 32 bits, and scales
    table = precision.apply_plan(model, uniform("int4-weight")).bytes().set_index(["component", "format"])
    row = table.loc["expert_high", "int4-weight"]
    assert row["weight_before_bytes"] / row["weight_bytes"] == pytest.approx(32 / (4 + 32 / 64))


def test_in_place_frees_the_originals():
    model = models.load("wan-nano", device="cpu", components=["expert_high"])
    network = model.component("expert_high")
    weight = weakref.ref(network.get_submodule("blocks.0.ffn.net.2").weight)
    applied = precision.apply_plan(model, uniform("fp8"), in_place=True)
    gc.collect()
    assert weight() is None
    assert applied.model is model
    assert model.component("expert_high") is network
    floats = sum(
        p.nbytes for name, p in network.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    )
    assert floats == 0


def test_a_default_casts_the_network(model):
    applied = precision.apply_plan(model, "all-bf16")
    network = applied.model.component("expert_high")
    assert network.dtype == torch.bfloat16
    assert (
        network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    )  # diffusers keeps it
    assert model.component("expert_high").dtype == torch.float32
    assert distance(forward(applied.model), forward(model)) < 0.05


def test_a_dtype_below_float32_keeps_its_scales():
    model = models.load("wan-nano", device="cpu", dtype="bfloat16")
    applied = precision.apply_plan(model, "uniform-fp8", kernels="native")
    layer = applied.model.component("expert_high").get_submodule("blocks.0.attn1.to_q")
    assert layer.scale.dtype == torch.bfloat16
    assert forward(applied.model).dtype == torch.bfloat16
    assert distance(forward(applied.model).float(), forward(model).float()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["simulated", "native"])
@pytest.mark.parametrize("format", ["int8", "fp8", "fp8-channel", "int4-weight"])
def test_blocks_compile_whole(model, format, kernels):
    torch._dynamo.reset()
    applied = precision.apply_plan(model, uniform(format), kernels=kernels)
    expected = forward(applied.model)
    for block in applied.model.component("expert_high").blocks:
        block.compile(backend="eager", fullgraph=True)  # fails at a graph break
    assert torch.equal(forward(applied.model), expected)


# ---- steps


@pytest.fixture(scope="module")
def stepped(model):
    plan = precision.make_plan(
        "steps",
        rules=[
            {"format": "int8", "layers": PATTERN},
            {"format": "int4-weight", "layers": ("ffn.*",), "steps": "0"},
            {"format": "default", "layers": PATTERN, "steps": "2-3"},
        ],
        num_steps=4,
    )
    return precision.apply_plan(model, plan)


def test_formats_switch_inside_a_generation(stepped, example):
    assert stepped.clock.bands == [(0, 0), (1, 1), (2, 3)]
    counts: dict[tuple[int, str], int] = {}
    handles = []
    for component in EXPERTS:
        layer = stepped.model.component(component).get_submodule("blocks.1.ffn.net.2")
        assert isinstance(layer, SteppedLayer)
        for format, variant in layer.variants.items():

            def note(module, args, made, format=format):
                key = (stepped.clock.step, format)
                counts[key] = counts.get(key, 0) + 1

            handles.append(variant.register_forward_hook(note))
    generate(stepped.model, example, steps=4, guidance_scale=4.0)
    for handle in handles:
        handle.remove()
    # Both branches of guidance are one step.
    assert counts == {(0, "int4-weight"): 2, (1, "int8"): 2, (2, "as-loaded"): 2, (3, "as-loaded"): 2}
    assert stepped.clock.step is None


def test_a_step_computes_as_the_plan_of_that_step(stepped, model):
    with stepped.at(1):
        assert torch.equal(
            forward(stepped.model), forward(precision.apply_plan(model, uniform("int8")).model)
        )
    with stepped.at(3):
        assert torch.equal(forward(stepped.model), forward(model))


def test_ranges_that_cover_all_steps_are_the_plan_without_them(model, example):
    rules = [
        {"format": "int8", "layers": PATTERN, "steps": "0-1"},
        {"format": "int8", "layers": PATTERN, "steps": "2"},
    ]
    by_step = precision.apply_plan(model, precision.make_plan("s", rules=rules, num_steps=3))
    assert torch.equal(
        generate(by_step.model, example),
        generate(precision.apply_plan(model, uniform("int8")).model, example),
    )


def test_another_number_of_steps_is_refused_in_one_line(stepped, example):
    with pytest.raises(
        WanlabError, match=r"plan steps is for 4 steps, this generation has 3; .*steps=4"
    ) as error:
        generate(stepped.model, example, steps=3)
    assert "\n" not in str(error.value)


def test_a_stepped_network_outside_a_generation_asks_for_the_step(stepped):
    with pytest.raises(WanlabError, match=r"with applied\.at\(step\)"):
        forward(stepped.model)
    with pytest.raises(WanlabError, match="steps 0 to 3, not 4"), stepped.at(4):
        pass


def test_copies_go_by_the_same_clock_and_schedules_are_free(stepped, example):
    assert len(stepped.model.schedule(7)) == 7
    twin = copy.copy(stepped.model)
    twin.pipeline = copy.copy(stepped.model.pipeline)
    twin.pipeline.scheduler = copy.deepcopy(stepped.model.pipeline.scheduler)
    assert torch.equal(generate(twin, example, steps=4), generate(stepped.model, example, steps=4))


def test_compiled_blocks_switch_with_the_step(model):
    torch._dynamo.reset()
    rules = [{"format": "int8", "layers": ("ffn.*",), "steps": "0-1"}]
    applied = precision.apply_plan(model, precision.make_plan("c", rules=rules, num_steps=3))
    network = applied.model.component("expert_high")
    with applied.at(0):
        first = forward(applied.model)
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    for step, expected in ((0, first), (2, forward(model)), (1, first)):
        with applied.at(step):
            assert torch.equal(forward(applied.model), expected)


# ---- refusals


def test_what_cannot_be_applied_is_refused_in_one_line(model):
    applied = precision.apply_plan(model, "ffn-int8")
    cases = [
        (lambda: precision.apply_plan(applied.model, "ffn-int8"), "computes by a plan already"),
        (lambda: precision.apply_plan(model, "ffn-int8", kernels="natve"), "no kernels 'natve'.*native"),
        (
            lambda: precision.apply_plan(model, "ffn-int8", {"expert_hgh": {}}),
            "calibration is given for 'expert_hgh'",
        ),
        (
            lambda: precision.apply_plan(model, "ffn-int8", {"expert_high": {}}),
            "no range for the input of blocks.0.ffn",
        ),
    ]
    for call, said in cases:
        with pytest.raises(WanlabError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("format", ["int8", "fp8", "fp8-channel"])
@pytest.mark.parametrize("amax", [None, 4.0])
def test_the_gpu_multiplies_codes(format, dtype, amax):
    torch._dynamo.reset()  # each case is a version of one function, and their number has a limit
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    layer = torch.nn.Linear(256, 512).to("cuda", kind)
    values = torch.randn(1, 640, 256, device="cuda", dtype=kind)
    native = planned(layer, get_format(format), native=True, amax=amax)
    if native.kernel == "simulated":
        pytest.skip("this GPU has no such product")
    with torch.no_grad():
        expected = planned(layer, get_format(format), native=False, amax=amax)(values)
        # Fast accumulation of 8-bit floats keeps 14 bits of a sum.
        assert distance(native(values), expected) < (2e-2 if kind == torch.bfloat16 else 5e-3)
        compiled = torch.compile(copy.deepcopy(native), fullgraph=True)(values)
        assert distance(compiled, expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_plan_on_the_gpu_takes_effect():
    model = models.load("wan-nano", device="cuda", dtype="bfloat16")
    for plan in ("uniform-fp8", "uniform-int8", "uniform-fp8-channel"):
        applied = precision.apply_plan(model, plan)
        effect = precision.effect_check(model, applied)
        assert (effect.frame["layers_found"] == effect.frame["layers_asked"]).all()
        assert len(effect.kernels)
        assert isinstance(applied.model.component("expert_low").blocks[0].attn1.to_q, QuantLinear)
