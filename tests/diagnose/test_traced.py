"""What a profile alone says about experts, attention and triage."""

from __future__ import annotations

import pytest
from support.diagnose_traces import event, launched, trace_of

from wanlab import diagnose, models
from wanlab.core.errors import WanlabError
from wanlab.diagnose.trace_model import model_facts
from wanlab.diagnose.trace_tables import layer_numbers
from wanlab.models.blocks import blocks_of
from wanlab.models.networks import skeleton


def ranged(name, start, time):
    return event(name, start, time, "user_annotation")


@pytest.fixture
def trace(tmp_path):
    """Two steps; in each an expert with one block, whose attention launches two kernels and whose product one."""
    events = []
    for step, (name, begin) in enumerate((("expert_high", 0), ("expert_low", 1000))):
        n = 10 * step
        events += [
            ranged(f"ProfilerStep#{step}", begin, 1000),
            ranged(name, begin + 10, 200),
            ranged(f"{name}.blocks.3", begin + 20, 180),
            ranged(f"{name}.blocks.3.attn1", begin + 30, 50),
            event("aten::scaled_dot_product_attention", begin + 40, 30),
            *launched("fmha", begin + 41, begin + 300, 100 + n, 1 + n),
            *launched("fmha_combine", begin + 45, begin + 450, 10, 2 + n),
            ranged(f"{name}.blocks.3.ffn", begin + 100, 50),
            event("aten::linear", begin + 110, 30),
            *launched("gemm", begin + 111, begin + 500, 300, 3 + n),
        ]
    return trace_of(tmp_path, *events)


def test_calls_of_experts_have_the_kernels_that_they_launched(trace):
    calls = diagnose.expert_calls(trace)
    assert calls["step"].tolist() == [0, 1]
    assert calls["component"].tolist() == ["expert_high", "expert_low"]
    assert calls["host_ms"].tolist() == [0.2, 0.2]
    assert calls["gpu_ms"].tolist() == pytest.approx([0.41, 0.42])
    assert calls["kernels"].tolist() == [3, 3]


def test_attention_of_a_layer_is_the_sum_of_its_kernels(trace):
    table = diagnose.attention_layers(trace)
    assert table["layer"].tolist() == [3, 3]
    assert table["kind"].tolist() == ["self", "self"]
    assert table["median_ms"].tolist() == pytest.approx([0.11, 0.12])


def test_layers_of_a_second_list_of_blocks_follow_after_the_first(tmp_path):
    events, begin = [ranged("ProfilerStep#0", 0, 1000), ranged("expert", 0, 900)], 10
    for path in ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "proj_out"):
        events += [
            ranged(f"expert.{path}", begin, 90),
            ranged(f"expert.{path}.attn", begin + 5, 50),
            event("aten::scaled_dot_product_attention", begin + 10, 30),
            *launched("fmha", begin + 11, begin + 1000, begin, begin),
        ]
        begin += 100
    table = diagnose.attention_layers(trace_of(tmp_path, *events))
    assert table["layer"].tolist() == [0, 1, 2]
    assert table["median_ms"].tolist() == pytest.approx([0.01, 0.11, 0.21])


def test_ranges_are_numbered_as_the_map_numbers_layers():
    names = [
        "expert.single_transformer_blocks.1.attn",
        "expert.transformer_blocks.2",
        "expert_low.blocks.3.attn1",
        "expert_low.vace_blocks.0.attn2",
        "expert._orig_mod.blocks.4",
        "expert.context_embedder.token_refiner.refiner_blocks.0.attn",
        "vae_decoder.up_blocks.0",
        "text_encoder.blocks.1",
        "expert.blocksy.1",
    ]
    assert layer_numbers(names) == dict(zip(names[:5], (4, 2, 3, 4, 4), strict=True))


def test_a_model_has_as_many_layers_as_its_trace_can_number():
    for name in ("tiny-hunyuan-t2v", "tiny-vace", "tiny-ltx-t2v", "tiny-wan2.2-i2v"):
        spec = models.get(name)
        network = skeleton(spec.part("transformer"))
        numbers = layer_numbers(f"expert.{path}" for path, _ in network.named_modules())
        layers = max(numbers.values()) + 1
        assert layers == model_facts(spec).layers == len(blocks_of(network)), name


def test_recorded_layers_add_up_to_the_breakdown(root):
    trace = diagnose.read_trace(root / "data" / "traces" / "wan2.2-i2v-a14b.pt.trace.json.gz")
    table = diagnose.attention_layers(trace)
    assert table.groupby(["component", "kind"]).size().tolist() == [40, 40, 40, 40]
    assert table["calls"].unique().tolist() == [2]
    total = 2 * table.loc[table["kind"] == "self", "median_ms"].sum()
    shares = diagnose.breakdown(trace).frame.set_index("category")
    assert total == pytest.approx(shares.loc["self_attention", "time_ms"], rel=1e-3)
    calls = diagnose.expert_calls(trace)
    assert calls["component"].tolist() == ["expert_high"] * 2 + ["expert_low"] * 2
    assert 12_000 < calls["gpu_ms"].min() <= calls["gpu_ms"].max() < 12_600


def test_a_profile_is_enough_for_triage(root):
    trace = diagnose.read_trace(root / "data" / "traces" / "wan2.2-ti2v-5b.pt.trace.json.gz")
    measured = diagnose.traced_measurements(trace)
    assert measured["breakdown.gpu_busy_percent"] > 80
    assert 30 < measured["memory.peak_gib"] < measured["14_memory.device_memory_gib"] < 150
    assert "Fuse operators" in str(diagnose.triage(measured).answer())


def test_a_trace_without_names_says_what_it_lacks(tmp_path):
    bare = trace_of(tmp_path, event("aten::mm", 0, 5))
    with pytest.raises(WanlabError, match="names no experts"):
        diagnose.expert_calls(bare)
    with pytest.raises(WanlabError, match="names no layers"):
        diagnose.attention_layers(bare)
