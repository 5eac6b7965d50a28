"""One component by several candidates: which there are, what bounds them, and what is said of those that did nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.answers import faults
from support.models_tiny import save

from wanlab import models
from wanlab.configuration.component import (
    Candidate,
    Files,
    check_effect,
    component_candidates,
    needs_model,
    open_candidate,
)
from wanlab.configuration.component_cost import ComponentCost, measure_component, roofline_ms
from wanlab.configuration.configuration import load_configuration
from wanlab.core.errors import WanlabError
from wanlab.diagnose.operators import Operations, call_kernels, count_operations
from wanlab.engines import registry
from wanlab.measure import Ceilings, Samples
from wanlab.measure.in_turn import Ended
from wanlab.measure.timing import control_of
from wanlab.precision.quant_linear import QuantLinear
from wanlab.precision.selection.bound import product_bound
from wanlab.precision.selection.costs import product_times
from wanlab.runs.prepare import prepare

CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 64, "frames": 5}


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", components=["expert_high"], device="cpu")


def test_candidates_are_every_engine_by_every_plan_and_then_configurations():
    found, left_out = component_candidates(
        "expert_high", ["eager", "onnxruntime"], ["default", "uniform-int8"], ["compiled-fp8"]
    )
    assert [each.label for each in found] == [
        "eager",
        "eager uniform-int8",
        "onnxruntime",
        "onnxruntime uniform-int8",
        "compiled-fp8",
    ]
    assert found[4].kind("expert_high").name == "compiled"
    assert not left_out


def test_what_cannot_be_had_is_left_out_with_one_line():
    found, left_out = component_candidates("vae_decoder", ["eager", "tensorrt"], ["default", "uniform-fp8"])
    assert [each.label for each in found] == ["eager"]
    assert set(left_out) == {"eager uniform-fp8", "tensorrt", "tensorrt uniform-fp8"}
    assert left_out["eager uniform-fp8"] == "plans are for experts; vae_decoder has none"
    assert all(line and "\n" not in line for line in left_out.values())
    _, left_out = component_candidates("expert_high", ["eager", "streamed_vae"])
    assert left_out == {"streamed_vae": "streamed_vae runs vae_encoder and vae_decoder, not expert_high"}
    _, left_out = component_candidates("expert_high", ["eager", "tvm"], ["default", "uniform-int8"])
    assert left_out["tvm uniform-int8"] == "tvm applies no precision plan"


def test_names_that_do_not_exist_are_mistakes():
    with pytest.raises(WanlabError, match=r"unknown engine 'eagre' .did you mean 'eager'"):
        component_candidates("expert_high", ["eagre"])
    with pytest.raises(WanlabError, match="uniform-int8"):
        component_candidates("expert_high", ["eager"], ["uniform-int9"])
    with pytest.raises(WanlabError, match="nothing to measure expert_high with: streamed_vae runs"):
        component_candidates("expert_high", ["streamed_vae"])


def test_cuda_graphs_are_candidates_of_their_own():
    found, _ = component_candidates("expert_high", ["eager"], cuda_graphs=True, device="cuda")
    assert [(each.label, each.cuda_graph) for each in found] == [
        ("eager", False),
        ("eager, CUDA graph", True),
    ]


def test_a_plan_in_pytorch_is_proven_and_one_that_was_undone_has_no_effect(model):
    candidate = Candidate("int8", load_configuration(engine="eager", plan="uniform-int8-weight"))
    files = Files(networks={"int8": None})
    assert needs_model("expert_high", candidate, files)
    (opened,) = open_candidate(model, "expert_high", candidate, files, CPU)
    effect, proof = check_effect(opened)
    assert effect == "applied"
    assert "66 of 66 layers of expert_high in int8-weight" in proof
    eager = Candidate("eager", load_configuration())
    (plain,) = open_candidate(model, "expert_high", eager, Files(networks={"eager": None}), CPU)
    assert check_effect(plain)[0] == "baseline"
    assert opened.weight_bytes < 0.5 * plain.weight_bytes

    planned, original = opened.engine._spec.network, model.component("expert_high")
    for name, layer in list(planned.named_modules()):  # put every layer back as it was loaded
        if isinstance(layer, QuantLinear):
            parent, _, last = name.rpartition(".")
            setattr(planned.get_submodule(parent), last, original.get_submodule(name))
    effect, proof = check_effect(opened)
    assert effect == "not applied"
    assert proof.startswith("plan uniform-int8-weight changed nothing")


def test_an_engine_that_runs_instead_of_another_has_no_effect(model):
    candidate = Candidate("compiled", load_configuration(engine="compiled"))
    (opened,) = open_candidate(model, "expert_high", candidate, Files(networks={"compiled": None}), CPU)
    assert check_effect(opened, compiled_graphs=0)[0] == "not applied"
    assert check_effect(opened, compiled_graphs=2) == (
        "applied",
        "PyTorch, compiled ran; torch.compile made 2 graphs",
    )
    opened.engine.name = "eager uncompiled"
    assert check_effect(opened, compiled_graphs=2) == (
        "not applied",
        "eager uncompiled ran instead of compiled",
    )


def test_a_bound_call_that_computes_something_else_has_no_time(tmp_path, monkeypatch):
    file = str(Path(__file__).parents[1] / "support" / "forgetful_engine.py")
    monkeypatch.setenv(registry.VARIABLE, file)  # for the processes that measure memory
    registry._load_files(file)
    how = {"device": "cpu", "processes": "one", "float32": False, "rounds": 1, "progress": False}
    try:
        cost = measure_component(
            "wan-nano", "expert_high", tmp_path, engines=["eager", "forgetful"], **how, **SIZE
        )
    finally:
        del registry.ENGINES["forgetful"]
    assert list(cost.samples) == ["eager"]
    assert "output 'velocity' of forgetful over fixed memory differs" in cost.left_out["forgetful"]


def test_operations_are_those_of_the_formulas():
    linear, query = torch.nn.Linear(8, 16), torch.randn(1, 2, 32, 8)
    convolution = torch.nn.Conv3d(3, 5, 3, padding=1)

    @torch.no_grad()
    def call():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        convolution(torch.randn(1, 3, 4, 6, 6))
        return linear(torch.randn(10, 8))

    found, output = count_operations(call)
    assert found.linear == 2 * 10 * 8 * 16
    assert found.attention == 2 * 2 * 2 * 32 * 32 * 8
    assert found.convolution == 2 * 4 * 6 * 6 * 5 * 3 * 27
    assert found.flop == found.linear + found.attention + found.convolution
    assert output.shape == (10, 16)
    table = call_kernels(call, "cpu")
    assert set(table["kind"]) >= {"linear", "attention"}
    assert table["share_percent"].sum() == pytest.approx(100)
    assert table["time_ms"].is_monotonic_decreasing


def test_the_roofline_is_the_slower_of_computing_and_moving():
    ceilings = {"tflop_per_s": {"bf16": 100.0}, "memory_gb_per_s": 1000.0}
    assert roofline_ms(Operations(linear=2e12), 1e9, ceilings, "bfloat16") == pytest.approx(20)
    assert roofline_ms(Operations(linear=2e9), 1e9, ceilings, "bfloat16") == pytest.approx(1)
    assert roofline_ms(Operations(linear=2e12), 1e9, ceilings, "float32") is None


def test_amdahls_bound_takes_planned_products_at_their_rate():
    rows = [
        ("as-loaded", ("a", "b"), 10.0), ("fp8", ("a", "b"), 5.0), ("as-loaded", ("c",), 20.0), ("fp8", ("c",), 12.0),
    ]  # fmt: skip
    products = pd.DataFrame(rows, columns=["format", "layers", "time_ms"])
    found = product_bound(products, {"a": "fp8", "c": "fp8"}, linear_share_percent=40)
    saved = (5 + 8) / 40  # of the time of all products: a and b take 10 each, c 20
    assert found["bound_speedup"] == pytest.approx(1 / (1 - 0.4 * saved))
    assert found["planned_percent"] == pytest.approx(100 * 30 / 40)
    assert found["product_speedup"] == pytest.approx(30 / 17)
    assert product_bound(products, {"a": "int8"}, 40) is None


def test_products_on_codes_are_timed_only_where_they_are_computed(model):
    layer = model.component("expert_high").blocks[0].ffn.net[2]
    found = product_times({"ffn": (64, layer), "again": (64, layer)}, ["int8", "int8-weight"], iterations=2)
    assert found["format"].tolist() == ["as-loaded"]  # simulated and weight-only products are in float
    assert found["layers"].tolist() == [("ffn", "again")]
    assert found["tflop_per_s"][0] == pytest.approx(2 * 64 * layer.weight.numel() / found["time_ms"][0] / 1e9)


def _cost(**facts) -> ComponentCost:
    samples = {
        "eager": Samples("eager", (100.0, 101.0, 99.0, 100.0), "cpu"),
        "fast": Samples("fast", (50.0, 50.5, 49.5, 50.0), "cpu"),
        "odd": Samples("odd", (100.5, 99.5, 100.0, 101.0), "cpu"),
    }
    base = {"engine": "eager", "plan": None, "cuda_graph": False, "weights_gib": 1.0, "relative_l2": 0.0}
    rows = {
        "eager": base | {"effect": "baseline"},
        "fast": base | {"engine": "onnxruntime", "effect": "applied", "relative_l2": 1e-6},
        "odd": base | {"plan": "mine", "effect": "not applied"},
    }
    for label, changes in facts.items():
        rows[label] |= changes
    kernels = pd.DataFrame(
        [("eager", "a", "linear", 1, 60.0, 60.0), ("eager", "b", "pointwise", 1, 40.0, 40.0)],
        columns=["candidate", "name", "kind", "calls", "time_ms", "share_percent"],
    )
    first = samples["eager"]
    return ComponentCost(
        "wan-nano", "expert_high", "float32", "the CPU", {"height": 64, "width": 64, "frames": 5}, "one", samples,
        control_of(first, first), Ended("rounds", 4, 1.0), rows, kernels, pd.DataFrame(), Operations(),
        Ceilings("CPU", {}, 1.0, {}),
        {"tensorrt": "not installed"},
    )  # fmt: skip


def test_the_verdict_says_what_holds_first_and_what_had_no_effect():
    answer = _cost().answer
    assert faults(answer) == []
    assert answer.headline.startswith("High-noise expert: fast is 2.00 times as fast as eager PyTorch (95")
    assert answer.details[0] == (
        "odd was not applied, so its figures are not its own. tensorrt was not measured: not installed."
    )
    assert answer.details[1] == "wan-nano at 5x64x64 in float32 on the CPU."
    assert answer.tiles[:2] == (
        ("speed-up", "2.00×", answer.tiles[0].beside),
        ("time of a call", "50 ms", "100 ms in eager PyTorch"),
    )


def test_rows_hold_ratios_and_what_ran_at_another_speed_has_none():
    table = _cost().table.set_index("candidate")
    assert table["verdict"].tolist() == ["baseline", "faster", "not distinguishable"]
    assert table["speedup"]["fast"] == pytest.approx(2)
    off = _cost(fast={"not_compared": "a fixed product took +9 % longer than with eager"})
    table = off.table.set_index("candidate")
    assert math.isnan(table["speedup"]["fast"])
    assert table["verdict"]["fast"].startswith("a fixed product took +9 %")
    assert "no other candidate can be compared with it" in off.answer.headline
    assert "fast was not compared: a fixed product took +9 %" in off.answer.details[0]
    facts = _cost().result_facts()
    assert facts["fast"]["engine"] == "onnxruntime"
    assert facts["eager"]["figures"]["kernel_linear_ms"] == 60
    assert facts["fast"]["figures"]["speedup"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("change", "same"), [({}, True), ({"seed": 1}, False), ({"plans": ["uniform-int8"]}, False)]
)
def test_a_measurement_is_gone_on_with_under_the_same_settings_only(root, tmp_path, change, same):
    """A run is found again by its id, which says what was asked for."""
    notebook = root / "notebooks" / "42_component.ipynb"
    first = prepare(notebook, {"seed": 0}, output=tmp_path)
    assert (prepare(notebook, {"seed": 0} | change, output=tmp_path).run_id == first.run_id) == same


def test_a_remark_on_the_weights_is_kept_with_the_cost(tmp_path):
    folder = save(tmp_path / "tiny")
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file(load_file(file) | {"nowhere.weight": torch.zeros(2)}, file)
    size = {"height": 16, "width": 32, "frames": 5}
    cost = measure_component(
        str(folder),
        "expert_high",
        tmp_path / "files",
        engines=["eager"],
        device="cpu",
        rounds=2,
        processes="one",
        **size,
    )
    assert any("nowhere.weight" in note for note in cost.notes)


@pytest.mark.slow
def test_a_lora_is_in_every_candidate_and_in_the_cost(tmp_path):
    layer, folder = "blocks.0.attn1.to_q", save(tmp_path / "tiny")
    lora = tmp_path / "x.safetensors"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 24), f"{layer}.lora_B.weight": torch.ones(24, 2)}, lora
    )
    size = {"height": 16, "width": 32, "frames": 5}
    cost = measure_component(
        f"{folder}+{lora}@expert_high",
        "expert_high",
        tmp_path / "files",
        engines=["eager", "onnxruntime"],
        device="cpu",
        rounds=2,
        processes="one",
        **size,
    )
    assert cost.model == "tiny"
    assert cost.lora.endswith("@expert_high:1")
    assert any("fused into 1 tensor" in note for note in cost.notes)
    assert cost.facts["onnxruntime"]["relative_l2"] < 1e-4  # the graph has the fused weights too
    assert [path.name.rpartition("-lora-")[0] for path in (tmp_path / "files").iterdir()] == ["tiny"]
