"""The breakdown: every moment in one row, rows that add up, work from recorded shapes, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diagnose_traces import event, launched, trace_of

from wanlab import diagnose, measure, models, plots
from wanlab.core.errors import WanlabError
from wanlab.diagnose import operators
from wanlab.diagnose.capture import expected_events
from wanlab.heldout import cases as heldout

FAST = dict(height=64, width=64, frames=5, steps=3)


def ranged(name, start, time):
    return event(name, start, time, "user_annotation")


def times(trace) -> dict[str, float]:
    frame = diagnose.breakdown(trace).frame
    assert frame["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)
    return {row.category: round(row.time_ms * 1e3, 6) for row in frame.itertuples()}


def test_every_kind_of_gpu_time_is_told_apart(tmp_path):
    trace = trace_of(
        tmp_path,
        ranged("ProfilerStep#0", 0, 10),
        ranged("ProfilerStep#1", 10, 990),
        # 10 to 20: choosing the expert and preparing its input; the GPU waits until 30.
        event("aten::cat", 10, 10),
        *launched("CatArrayBatchedCopy", 15, 15, 3, 1),
        ranged("expert_low", 20, 300),
        ranged("expert_low.blocks.0.attn1", 21, 50),
        event("aten::scaled_dot_product_attention", 22, 10),
        *launched("fmha_kernel", 23, 30, 70, 2),
        ranged("expert_low.blocks.0.attn1.to_q", 40, 10),
        event("aten::linear", 41, 8),
        *launched("some_kernel", 42, 100, 40, 3),
        ranged("expert_low.blocks.0.attn2", 80, 20),
        event("aten::scaled_dot_product_attention", 81, 10),
        *launched("fmha_kernel", 82, 140, 10, 4),
        ranged("expert_low.blocks.0.norm1", 110, 10),
        event("aten::native_layer_norm", 111, 8),
        *launched("layer_norm", 112, 150, 20, 5),
        # Weights come in on another stream: 10 beside the norm, 30 alone.
        *launched("Memcpy HtoD (Pinned -> Device)", 125, 160, 40, 6, "gpu_memcpy", 9, bytes=1 << 24),
        event("cudaMalloc", 210, 60, "cuda_runtime", correlation=99),
        ranged("vae_decoder", 400, 100),
        *launched("implicit_gemm", 410, 500, 300, 7),
        *launched("Memcpy DtoH (Device -> Pageable)", 850, 900, 50, 8, "gpu_memcpy", bytes=4000),
    )
    assert times(trace) == {
        "expert_switching": 7 + 3 + 30,
        "self_attention": 70,
        "linear": 40,
        "cross_attention": 10,
        "norm_modulation_rotary": 20,
        "memory_allocation": 60,
        "vae_decoder": 300,
        "host_device_transfer": 50,
        "launch_and_idle": 410,
    }
    frame = diagnose.breakdown(trace).frame.set_index("category")
    assert frame.loc["expert_switching", "hidden_ms"] * 1e3 == pytest.approx(10)
    assert frame.loc["self_attention", "calls"] == 1
    assert frame.loc["vae_decoder", "amdahl_bound"] == pytest.approx(1000 / 700)


def test_joint_attention_is_called_so(tmp_path):
    trace = trace_of(
        tmp_path, event("aten::scaled_dot_product_attention", 0, 90), event("aten::linear", 90, 10)
    )
    found = diagnose.profile_answer(diagnose.breakdown(trace))
    assert found.headline.startswith(
        "Self-attention takes 90 % of the time, and all of it is the attention kernel."
    )
    trace.generation["joint_attention"] = True
    joint = diagnose.breakdown(trace)
    assert diagnose.profile_answer(joint).headline.startswith("Joint attention takes 90 % of the time")
    assert joint.name_of("cross_attention") == "cross-attention"
    assert "joint attention" in plots.category_bars(joint).to_json()


def test_gpu_figures(tmp_path):
    trace = trace_of(
        tmp_path,
        event("aten::mm", 0, 100),
        *launched("a", 1, 10, 20, 1),
        *launched("b", 2, 30, 10, 2),
        *launched("c", 3, 60, 40, 3),
    )
    shares = diagnose.breakdown(trace)
    gpu = shares.gpu
    assert gpu["busy_percent"] == pytest.approx(70)
    assert gpu["kernels"] == 3
    assert gpu["launch_gaps"] == 1
    assert gpu["launch_gap_ms"] == pytest.approx(0.02)
    found = diagnose.profile_answer(shares, "A caveat.")
    assert found.headline == (
        "Linear layers take 70 % of the time. Without all of that a video would be 3.33 times as fast, no more."
        " One profile: how much this varies is not known."
    )
    assert found.next.notebook == "30_sensitivity"
    assert diagnose.profile_answer(shares, trace="a.json").next.parameters == {"trace": "a.json"}
    assert found.details[0] == "A caveat."
    assert found.details[-1].startswith("The rows add up to the wall clock within 0.1 %.")
    assert ("GPU busy", "70 %", "gaps over 10 µs between kernels: 1") in found.tiles


@settings(max_examples=60)
@given(data=st.data())
def test_rows_add_up_whatever_overlaps(tmp_path_factory, data):
    kernels, at = [], st.integers(0, 300)
    names = st.sampled_from(["gemm", "fmha", "Memcpy HtoD (Pageable -> Device)", "elementwise"])
    for i in range(data.draw(st.integers(0, 12))):
        kernels += launched(
            data.draw(names), data.draw(at), data.draw(at), data.draw(st.integers(0, 80)), i + 1,
            stream=data.draw(st.integers(5, 7)),
        )  # fmt: skip
    ranges = [
        ranged(
            data.draw(st.sampled_from(["expert", "expert.blocks.0.attn1", "vae_decoder", "odd"])),
            data.draw(at),
            40,
        )
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    trace = trace_of(tmp_path_factory.mktemp("t"), event("aten::add", 0, 200), *ranges, *kernels)
    found = diagnose.breakdown(trace)
    assert found.frame["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)
    assert found.parts["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)
    assert (found.frame[["time_ms", "hidden_ms"]] >= 0).all(axis=None)
    if kernels:
        # What the GPU did is all there: alone in its row, or beside another.
        waiting = ("launch_and_idle", "memory_allocation", "expert_switching", "host_device_transfer")
        working = found.frame[~found.frame["category"].isin(waiting)]
        spent = trace.kernels[~trace.kernels["name"].str.startswith("Memcpy")]["time_us"].sum() / 1e3
        assert working["time_ms"].sum() + working["hidden_ms"].sum() == pytest.approx(spent)


def test_a_trace_without_names_or_host_still_has_kinds_of_kernels(tmp_path):
    kernels = [
        event("cutlass_80_gemm", 0, 30, "kernel", correlation=1, stream=7),
        event("flash_fwd_kernel", 30, 50, "kernel", correlation=2, stream=7),
        event("ncclDevKernel_AllReduce", 80, 20, "kernel", correlation=3, stream=9),
    ]
    bare = trace_of(tmp_path, *kernels)
    assert times(bare) == {"self_attention": 50, "linear": 30, "communication": 20}
    assert any("no named ranges" in note for note in diagnose.breakdown(bare).notes)
    assert any("no host events" in note for note in bare.notes)
    graph = trace_of(
        tmp_path,
        ranged("expert_high", 0, 100),
        event("cudaGraphLaunch", 1, 5, "cuda_runtime", correlation=5),
        *(kernel | {"args": {"correlation": 5, "stream": 7}} for kernel in kernels[:2]),
    )
    assert times(graph) == {"self_attention": 50, "linear": 30, "launch_and_idle": 20}
    assert any("CUDA graphs" in note for note in graph.notes)
    assert diagnose.gpu_flame(graph).folded().splitlines()[0] == "expert_high;cutlass_80_gemm 30"


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano")


@pytest.fixture(scope="module")
def captured(nano, tmp_path_factory):
    case = heldout.example_case()
    path = diagnose.capture(
        nano, case.truth()[0], case.caption, tmp_path_factory.mktemp("t"), memory=True, **FAST
    )
    return diagnose.read_trace(path)


def test_a_real_generation_closes_on_its_own_clock(captured):
    found = diagnose.breakdown(captured)
    assert abs(found.residual_percent) < 1
    assert found.recorded_ms == captured.generation["wall_ms"]
    assert {"expert_high", "expert_low", "vae_decoder", "text_encoder"} <= set(found.parts["component"])
    row = found.row()
    assert sum(row[f"{name}_percent"] for name in found.frame["category"]) == pytest.approx(100)
    assert 0 < row["host_busy_percent"] < 100


def test_recorded_shapes_hold_the_work_that_the_architecture_says(captured):
    """Operations from the trace beside those that `models.facts` counts without running anything."""
    facts = models.facts("wan-nano", height=64, width=64, frames=5).set_index("component")
    found = diagnose.breakdown(captured)
    experts = found.experts().groupby("category")["tflop"].sum()
    branches = 2 if captured.generation["settings"]["guidance_scale"] > 1 else 1
    forwards = FAST["steps"] * branches
    attention = experts["self_attention"] + experts["cross_attention"]
    assert attention == pytest.approx(forwards * facts.loc["expert_high", "attention_tflop"], rel=1e-6)
    other = facts.loc["expert_high", "linear_tflop"] + facts.loc["expert_high", "other_tflop"]
    assert experts["linear"] == pytest.approx(forwards * other, rel=1e-3)
    work = found.frame.set_index("category")["tflop"]
    assert work["vae_decoder"] == pytest.approx(facts.loc["vae_decoder", "total_tflop"], rel=1e-6)


def test_bounds_stand_beside_the_rows(captured):
    roof = measure.Ceilings("CPU", {"fp32": 0.1}, 20.0, {})
    table = diagnose.bounds(diagnose.breakdown(captured), roof).set_index("category")
    decoder = table.loc["vae_decoder"]
    assert decoder["of_roofline_percent"] == pytest.approx(100 * decoder["roofline_ms"] / decoder["time_ms"])
    assert decoder["amdahl_bound"] == pytest.approx(100 / (100 - decoder["share_percent"]))
    assert np.isnan(table.loc["launch_and_idle", "roofline_ms"])
    empty = diagnose.bounds(diagnose.breakdown(captured), None)
    assert empty["roofline_ms"].isna().all()


@pytest.mark.parametrize(
    ("name", "inputs", "wanted"),
    [
        ("aten::mm", '[[[2,3],[3,5]],["float","float"],[]]', 60),
        ("aten::addmm", '[[[5],[2,3],[3,5],[],[]],["float"],[]]', 60),
        ("aten::bmm", '[[[4,2,3],[4,3,5]],["float"],[]]', 240),
        ("aten::linear", '[[[7,2,3],[5,3],[5]],["float"],[]]', 420),
        ("aten::scaled_dot_product_attention", '[[[1,2,4,8],[1,2,6,8],[1,2,6,8]],["float"],[]]', 4 * 2 * 4 * 6 * 8),
        ("aten::mul", '[[[2,3],[2,3]],["float"],[]]', 0),
        ("aten::mm", "", 0),
        ("aten::mm", '[[[2,3]],["float"],[]]', 0),
    ],
)  # fmt: skip
def test_operations_of_an_operator(name, inputs, wanted):
    assert operators.flop(name, inputs) == wanted


def test_a_trimmed_trace_says_the_same(captured, tmp_path):
    small = diagnose.read_trace(diagnose.trim(captured.path, tmp_path / "small.json.gz", shortest_us=5.0))
    assert small.path.stat().st_size < 0.7 * captured.path.stat().st_size
    assert any("trimmed" in note for note in small.notes)
    before, after = (diagnose.breakdown(trace).row() for trace in (captured, small))
    assert after["wall_ms"] == pytest.approx(before["wall_ms"], rel=1e-3)
    for name in ("vae_decoder_percent", "linear_percent", "self_attention_percent"):
        assert after[name] == pytest.approx(before[name], abs=2.0)
    again = diagnose.trim(captured.path, tmp_path / "again.json.gz", shortest_us=5.0)
    assert again.read_bytes() == small.path.read_bytes()


def test_a_capture_takes_as_many_steps_as_fit_and_says_so(nano, tmp_path, captured):
    case = heldout.example_case()
    four = expected_events(nano, steps=4, frames=5)
    settings = FAST | {"steps": 50}
    trace = diagnose.read_trace(
        diagnose.capture(nano, case.truth()[0], case.caption, tmp_path, most_events=four, **settings)
    )
    assert len(trace.steps) == 4 + 1
    assert any("4 of 50 steps" in note for note in trace.notes)
    # The estimate is of the right size.
    assert 0.5 * four < len(trace.events) < 1.5 * four
    with pytest.raises(WanlabError, match="one step of each expert"):
        diagnose.capture(nano, case.truth()[0], case.caption, tmp_path, most_events=10, **settings)


def test_compiled_blocks_are_left_alone(tmp_path):
    case = heldout.example_case()
    model = models.load("wan-nano")
    for block in model.pipeline.transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    trace = diagnose.read_trace(diagnose.capture(model, case.truth()[0], case.caption, tmp_path, **FAST))
    names = set(trace.events["name"].astype(str))
    assert "expert_high" in names
    assert not [name for name in names if name.startswith("expert_high.blocks.0")]
    assert "expert_low.blocks.0.attn1" in names


def test_ceilings_are_measured_saved_and_found_again(tmp_path):
    found = measure.ceilings("cpu", size=128, iterations=3)
    assert found.tflop_per_s["fp32"] > 0
    assert found.memory_gb_per_s > 0
    found.save(tmp_path / "c.json")
    assert measure.recorded_ceilings(tmp_path / "c.json").tflop_per_s == found.tflop_per_s
    assert measure.recorded_ceilings("NVIDIA H200").tflop_per_s["bf16"] > 500
    assert measure.recorded_ceilings("no such device") is None
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(WanlabError, match="holds no ceilings"):
        measure.recorded_ceilings(tmp_path / "bad.json")
