"""The effect check: quiet on what was done as asked, loud on every planted fault."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from wanlab import models, precision
from wanlab.core.errors import WanlabError
from wanlab.precision.apply import AS_LOADED
from wanlab.precision.formats import decode_weight, encode_weight, get_format
from wanlab.precision.quant_linear import QuantLinear

LAYER = "blocks.2.ffn.net.2"


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def narrow():
    return models.load("wan-nano", device="cpu", dtype="bfloat16")


def ffn(format, **changes):
    return precision.make_plan("test", rules=[{"format": format, "layers": ("ffn.*",)} | changes])


def put(applied, layer, module, component="expert_high"):
    """A fault planted into what was applied."""
    parent, _, name = layer.rpartition(".")
    setattr(applied.model.component(component).get_submodule(parent), name, module)


def at(applied, layer=LAYER, component="expert_high"):
    return applied.model.component(component).get_submodule(layer)


def fails(said, original, applied):
    with pytest.raises(WanlabError, match=said) as error:
        precision.effect_check(original, applied)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what was done as asked


@pytest.mark.parametrize("kernels", ["simulated", "native"])
@pytest.mark.parametrize("format", ["int8", "fp8", "fp8-channel", "int8-weight", "int4-weight-32", "fp16"])
def test_a_plan_that_was_done_passes(model, format, kernels):
    applied = precision.apply_plan(model, ffn(format), kernels=kernels)
    effect = precision.effect_check(model, applied)
    frame = effect.frame.set_index(["component", "format"])
    for component in ("expert_high", "expert_low"):
        row = frame.loc[component, format]
        assert row["layers_asked"] == row["layers_found"] == 12
        assert row["weight_bytes"] < row["weight_before_bytes"]
        left = frame.loc[component, AS_LOADED]
        assert left["layers_found"] == 55
        assert left["weight_bytes"] == left["weight_before_bytes"]
    if kernels == "native" and format in ("int8", "fp8", "fp8-channel"):
        product, dtype = ("_int_mm", "int8") if format == "int8" else ("_scaled_mm", "float8_e4m3fn")
        assert row["products"] == f"{product} {dtype} x {dtype}"
        assert row["held"] == dtype
    assert f"12 of 12 layers of expert_low in {format}" in effect.verdict


def test_kernels_are_named_when_asked(model):
    applied = precision.apply_plan(model, ffn("int8"), kernels="native")
    effect = precision.effect_check(model, applied, profile=True)
    calls = effect.kernels.set_index(["component", "operator"])["calls"]
    assert calls["expert_high", "_int_mm"] == 12
    assert effect.frame.set_index(["component", "format"]).loc["expert_low", "int8"]["kernels"] == "_int_mm"


def test_formats_of_steps_are_each_looked_at(model):
    plan = precision.make_plan(
        "steps", rules=[{"format": "int8", "layers": ("ffn.*",), "steps": "0-1"}], num_steps=3
    )
    applied = precision.apply_plan(model, plan)
    effect = precision.effect_check(model, applied)
    assert set(effect.frame["format"]) == {"int8", AS_LOADED}
    stepped = at(applied)
    stepped.variants["int8"] = stepped.variants[AS_LOADED]
    fails(f"{LAYER} of expert_high is held in float32 with the original's values", model, applied)


def test_a_network_in_a_smaller_float_passes(narrow):
    effect = precision.effect_check(narrow, precision.apply_plan(narrow, "uniform-fp8", kernels="native"))
    assert (effect.frame["layers_found"] == effect.frame["layers_asked"]).all()


def test_in_place_is_checked_without_the_original():
    model = models.load("wan-nano", device="cpu", components=["expert_high"])
    applied = precision.apply_plan(model, ffn("int8"), in_place=True)
    effect = precision.effect_check(model, applied)
    assert effect.frame["layers_found"].sum() == 67
    put(applied, LAYER, linear(at(applied).decoded(), at(applied).bias))
    fails("dequantised once at load", model, applied)


# ---- planted faults


def linear(weight, bias):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = torch.nn.Parameter(weight.detach().clone(), requires_grad=False), bias
    return layer


def test_a_plan_that_changes_nothing(model):
    fails("plan all-fp32 changed nothing", model, precision.apply_plan(model, "all-fp32"))
    kept = precision.make_plan("kept", rules=[{"format": "default", "layers": ("ffn.*",)}])
    fails("plan kept changed nothing", model, precision.apply_plan(model, kept))


def test_a_plan_that_was_not_applied(model):
    applied = precision.apply_plan(model, ffn("int8"))
    fails(
        "changed nothing: none of its 24 layers in expert_high, expert_low",
        model,
        replace(applied, model=model),
    )


@pytest.mark.parametrize("skipped", ["expert_high", "expert_low"])
def test_only_one_expert_quantised(model, skipped):
    applied = precision.apply_plan(model, ffn("int8"))
    part = model.spec.part_of(skipped)
    setattr(applied.model.pipeline, part, getattr(model.pipeline, part))
    other = {"expert_high": "expert_low", "expert_low": "expert_high"}[skipped]
    fails(f"only {other} was quantised; none of 12 layers of {skipped}", model, applied)


def test_one_expert_is_enough_where_the_plan_asks_for_one(model):
    precision.effect_check(model, precision.apply_plan(model, ffn("int8", component="expert_low")))


def test_a_layer_name_that_matches_nothing(model):
    applied = precision.apply_plan(model, ffn("int8"))
    frame = applied.assignment.frame.copy()
    frame.loc[frame["layer"] == LAYER, "layer"] = "blocks.2.ffn.net.9"
    wrong = replace(applied, assignment=replace(applied.assignment, frame=frame))
    fails(r"expert_high has no layer 'blocks\.2\.ffn\.net\.9': the name matches none", model, wrong)


def test_one_layer_left_out(model):
    applied = precision.apply_plan(model, ffn("int8"))
    put(applied, LAYER, model.component("expert_high").get_submodule(LAYER))
    fails(f"{LAYER} of expert_high is held in float32 with the original's values", model, applied)


def test_a_layer_that_the_plan_leaves_was_quantised(model):
    applied = precision.apply_plan(model, ffn("int8"))
    other = precision.apply_plan(model, "uniform-int8")
    put(applied, "proj_out", at(other, "proj_out"))
    fails(
        "proj_out of expert_high is int8, though the plan asks for float32, as it was loaded", model, applied
    )


def test_another_format_than_asked(model):
    applied = precision.apply_plan(model, ffn("int8"))
    for other, said in (("fp8", "held in float8_e4m3fn"), ("int4-weight", "held in uint8")):
        put(applied, LAYER, at(precision.apply_plan(model, ffn(other))))
        fails(said, model, applied)
    applied = precision.apply_plan(model, ffn("fp8"))
    put(applied, LAYER, at(precision.apply_plan(model, ffn("fp8-channel"))))
    fails("has scales of shape", model, applied)


def test_weights_of_another_layer(model):
    applied = precision.apply_plan(model, ffn("int8"))
    put(applied, LAYER, copy.deepcopy(at(applied, "blocks.3.ffn.net.2")))
    fails("codes that are not the original's weight", model, applied)


def test_fp32_weights_where_the_plan_says_otherwise(narrow):
    applied = precision.apply_plan(narrow, ffn("fp8"))
    original = narrow.component("expert_high").get_submodule(LAYER)
    put(applied, LAYER, linear(original.weight.float(), original.bias))
    fails("held in float32, where the plan asks for fp8: FP32 fallback", narrow, applied)
    applied = precision.apply_plan(narrow, ffn("fp8"))
    last = at(applied, "proj_out", "expert_low")
    put(applied, "proj_out", linear(last.weight.float(), last.bias), "expert_low")
    fails("proj_out of expert_low is held in float32, .*bfloat16.*FP32 fallback", narrow, applied)
    applied = precision.apply_plan(narrow, ffn("fp16"))
    at(applied).weight = at(applied).weight.float()
    fails("held in float32, where the plan asks for fp16: FP32 fallback", narrow, applied)


class InFloat32(QuantLinear):
    """Computes in float32 whatever it was asked for."""

    def forward(self, values):
        return torch.nn.functional.linear(values.float(), self.decoded().float(), self.bias.float()).to(
            values.dtype
        )


class Unrounded(QuantLinear):
    """Takes its input as it comes."""

    def _rounded(self, values):
        return values


class Cached(QuantLinear):
    """Multiplies with another weight than its codes'."""

    def decoded(self):
        return super().decoded()

    def forward(self, values):
        return torch.nn.functional.linear(self._rounded(values), self.other, self.bias)


@pytest.mark.parametrize("kernels", ["simulated", "native"])
def test_fp32_products_where_the_plan_says_otherwise(narrow, kernels):
    applied = precision.apply_plan(narrow, ffn("fp8"), kernels=kernels)
    at(applied).__class__ = InFloat32
    fails("computes addmm float32 x float32 where .* is planned: FP32 fallback", narrow, applied)


def test_a_kernel_that_was_not_used(model):
    applied = precision.apply_plan(model, ffn("int8"), kernels="native")
    at(applied).kernel = "simulated"
    fails(r"computes addmm float32 x float32 where _int_mm is planned", model, applied)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4-weight", "fp8-channel"])
def test_weights_dequantised_once_at_load(narrow, model, format):
    for loaded in (model, narrow):
        applied = precision.apply_plan(loaded, ffn(format))
        put(applied, LAYER, linear(at(applied).decoded(), at(applied).bias))
        fails(f"values are those of {format}: it was dequantised once at load", loaded, applied)


def test_a_float_copy_beside_the_codes(model):
    applied = precision.apply_plan(model, ffn("int8"))
    at(applied).cache = at(applied).decoded()
    fails("bytes of floats beside its int8 codes: it was dequantised once at load", model, applied)


def test_a_quantiser_that_rounds_nothing(model):
    applied = precision.apply_plan(model, ffn("int8-weight"))
    original = model.component("expert_high").get_submodule(LAYER)
    at(applied).codes, at(applied).scale = original.weight.detach().clone(), torch.ones(len(original.weight))
    said = fails("bitwise the original's", model, applied)
    assert LAYER in said


def test_an_input_that_is_not_rounded(model):
    applied = precision.apply_plan(model, ffn("int8"))
    at(applied).__class__ = Unrounded
    fails("takes its input as it comes, where int8 rounds it", model, applied)


def test_a_product_with_another_weight(model):
    applied = precision.apply_plan(model, ffn("int8-weight"))
    layer = at(applied)
    layer.__class__ = Cached
    original = model.component("expert_high").get_submodule(LAYER).weight.detach()
    layer.__dict__["other"] = original[:, :]
    # The copy is hidden from the look at tensors, so only the product shows it.
    layer.__dict__["other"] = Hidden(original)
    Cached.forward = lambda self, values: torch.nn.functional.linear(values, self.other.tensor, self.bias)
    fails("multiplies with another weight", model, applied)


class Hidden:
    def __init__(self, tensor):
        self.tensor = tensor

    def __deepcopy__(self, memo):
        return self


def test_a_layer_that_is_never_called(model):
    applied = precision.apply_plan(model, ffn("int8"))
    block = applied.model.component("expert_high").blocks[2]
    block.ffn.forward = lambda values, *args, **kwargs: values
    fails("was not called in a forward", model, applied)


# ---- graphs


class Small(torch.nn.Module):
    """Two linear layers with the names of a Wan block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = torch.nn.Module()
        block.one, block.two = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 64, bias=False)
        self.blocks = torch.nn.ModuleList([block])


LAYERS = ("blocks.0.one", "blocks.0.two")


@pytest.fixture(scope="module")
def small():
    return Small()


def write(path, small, *, weights=None, dtype=TensorProto.FLOAT, component="expert"):
    """A float graph `x @ one @ two`, as the exporter names it."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes, tensors, value = [], [], "x"
    for layer in LAYERS:
        weight = (weights or {}).get(layer, small.get_submodule(layer).weight.detach())
        tensors.append(
            numpy_helper.from_array(weight.t().contiguous().numpy().astype(kind), f"{layer}.weight.T")
        )
        nodes.append(
            helper.make_node("MatMul", [value, f"{layer}.weight.T"], [f"{layer}.y"], name=f"{layer}/MatMul")
        )
        value = f"{layer}.y"
    shape = [2, 64]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(value, dtype, shape)],
        tensors,
        value_info=[helper.make_tensor_value_info("blocks.0.one.y", dtype, [2, 32])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(made, {"component": component})
    onnx.save(made, path)
    return path


def assigned(small, format="int8-weight", layers=("*",), default="fp32"):
    plan = precision.make_plan("graph", default, [{"format": format, "layers": layers}])
    return precision.assign(plan, {"expert": small})


def graph_fails(said, *args, **kwargs):
    with pytest.raises(WanlabError, match=said) as error:
        precision.graph_effect_check(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def graphs(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    source = write(folder / "float.onnx", small)
    made = {"float": source}
    for format in ("int8-weight", "int4-weight-32"):
        made[format] = folder / f"{format}.onnx"
        precision.quantize(source, made[format], layers=list(LAYERS), format=format, progress=False)
    made["half"] = folder / "half.onnx"
    precision.quantize(source, made["half"], layers=[LAYERS[0]], format="int8-weight", progress=False)
    return made


@pytest.mark.parametrize("format", ["int8-weight", "int4-weight-32"])
def test_a_graph_that_was_written_as_asked_passes(small, graphs, format):
    effect = precision.graph_effect_check(
        assigned(small, format), "expert", graphs[format], source=graphs["float"]
    )
    row = effect.frame.iloc[0]
    assert row["layers_asked"] == row["layers_found"] == 2
    assert row["held"] == get_format(format).weight.kind
    assert row["weight_bytes"] < 0.4 * 4 * 2 * 64 * 32
    part = precision.graph_effect_check(assigned(small, "int8-weight", ("one",)), "expert", graphs["half"])
    assert part.frame.set_index("format")["layers_found"].to_dict() == {"int8-weight": 1, AS_LOADED: 1}


def test_graph_faults(small, graphs, tmp_path):
    asked = assigned(small)
    graph_fails("changed nothing: none of its 2 layers", asked, "expert", graphs["float"])
    graph_fails("two of expert holds its weight in float32", asked, "expert", graphs["half"])
    graph_fails("has its weight in int4", asked, "expert", graphs["int4-weight-32"])
    graph_fails("has its weight in int8, though the plan asks for as-loaded",
                assigned(small, "int8-weight", ("one",)), "expert", graphs["int8-weight"])  # fmt: skip
    graph_fails(
        "takes its input as it comes, where int8", assigned(small, "int8"), "expert", graphs["int8-weight"]
    )
    graph_fails("no ONNX file", asked, "expert", tmp_path / "none.onnx")
    other = write(tmp_path / "other.onnx", small, component="expert_low")
    graph_fails("is a graph of expert_low, not of expert", asked, "expert", other)


def test_a_graph_in_fp32(small, graphs):
    graph_fails("computes in float32, where the plan asks for bfloat16: FP32 fallback",
                assigned(small, default="bf16"), "expert", graphs["int8-weight"])  # fmt: skip
    graph_fails("computes in float32, where the plan asks for fp16: FP32 fallback",
                assigned(small, "fp16"), "expert", graphs["float"])  # fmt: skip


def test_a_graph_that_was_folded(small, tmp_path):
    numbers = get_format("int8-weight").weight
    weights = {
        layer: decode_weight(*encode_weight(small.get_submodule(layer).weight.detach(), numbers, torch.float32),
                             numbers, torch.float32)
        for layer in LAYERS
    }  # fmt: skip
    graph_fails("values are those of int8-weight: it was dequantised once",
                assigned(small), "expert", write(tmp_path / "folded.onnx", small, weights=weights))  # fmt: skip


def test_a_graph_without_a_layer_or_with_other_weights(small, graphs, tmp_path):
    made = onnx.load(graphs["int8-weight"])
    for node in made.graph.node:
        node.name = node.name.replace("blocks.0.two/", "blocks.0.too/")
    onnx.save(made, tmp_path / "renamed.onnx")
    graph_fails("has no node of blocks.0.two", assigned(small), "expert", tmp_path / "renamed.onnx")
    other = write(tmp_path / "other.onnx", small, weights={LAYERS[0]: torch.randn(32, 64)})
    graph_fails("codes that are not the original's weight",
                assigned(small), "expert", graphs["int8-weight"], source=other)  # fmt: skip


def test_a_graph_that_rounds_its_weights_at_every_run(small, tmp_path):
    made = onnx.load(write(tmp_path / "late.onnx", small))
    for index, layer in enumerate(LAYERS):
        made.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), f"{layer}.s"))
        made.graph.initializer.append(numpy_helper.from_array(np.int8(0), f"{layer}.z"))
        given = [f"{layer}.s", f"{layer}.z"]
        pair = [
            helper.make_node("QuantizeLinear", [f"{layer}.weight.T", *given], [f"{layer}.q"]),
            helper.make_node("DequantizeLinear", [f"{layer}.q", *given], [f"{layer}.d"]),
        ]
        node = next(node for node in made.graph.node if node.name.startswith(layer))
        node.input[1] = f"{layer}.d"
        for offset, each in enumerate(pair):
            made.graph.node.insert(3 * index + offset, each)
    onnx.save(made, tmp_path / "late.onnx")
    graph_fails("rounds it at every run, instead of codes", assigned(small), "expert", tmp_path / "late.onnx")


def test_copies_of_the_check_do_not_change_the_model(model):
    applied = precision.apply_plan(model, ffn("int8"))
    before = {name: type(module) for name, module in applied.model.component("expert_high").named_modules()}
    precision.effect_check(model, applied)
    network = copy.deepcopy(applied.model.component("expert_high"))
    assert {name: type(module) for name, module in network.named_modules()} == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
