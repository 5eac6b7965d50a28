"""Benchmarks component by component, where nodes run, and what ONNX Runtime's profiler says of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import convert_tiny as tiny

from wanlab import engines, plots
from wanlab.core.errors import WanlabError

pytestmark = pytest.mark.slow

SIZE = dict(height=32, width=48, frames=5)
EXPERTS = ("expert_high", "expert_low")


@pytest.fixture(scope="module")
def model():
    model = tiny.bare(tiny.pipeline())
    model.spec = replace(
        model.spec, name="wan-nano"
    )  # whose sizes the tiny model has, as other modules name it
    return model


@pytest.fixture(scope="module")
def opened(model, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benches")
    exported(model, EXPERTS, folder, height=64, width=96, frames=9)  # SIZE is theirs when they run
    return engines.load_engines(folder, EXPERTS, provider="cpu", threads=1, optimization="basic")


def test_experts_are_benchmarked_beside_eager(model, opened):
    quick = dict(iterations=4, duration_ms=0, warmup_ms=0, progress=False)
    table = engines.bench_components(model, opened, **quick, **SIZE)
    assert list(zip(table["component"], table["engine"], strict=True)) == [
        (name, engine) for name in EXPERTS for engine in ("eager", "onnxruntime-cpu")
    ]
    assert list(table["verdict"][::2]) == ["baseline", "baseline"]
    ratio = table["latency_ms"][0] / table["latency_ms"][1]
    assert table["speedup"][1] == pytest.approx(ratio)
    one = engines.bench_components(model, opened, ["expert_low"], **quick, **SIZE)
    assert set(one["component"]) == {"expert_low"}
    with pytest.raises(WanlabError, match="did you mean 'expert_low'"):
        engines.bench_components(model, opened, ["expert_lo"], **quick)


def test_engines_of_a_folder_take_the_options_of_one(opened):
    assert {engine.optimization for engine in opened.values()} == {"basic"}


def test_every_node_has_a_provider(opened):
    table = engines.provider_table(opened)
    assert list(table["component"]) == list(EXPERTS)
    assert list(table["nodes"]) == [engine.nodes_by_provider()["nodes"].sum() for engine in opened.values()]
    assert (table["share_percent"] == 100).all()
    assert all(text.count(",") == 2 for text in table["operators"])


def test_a_profile_as_nodes_and_operators(opened, tmp_path):
    engine = opened["expert_high"]
    feeds = {
        "hidden_states": torch.randn(1, 36, 2, 4, 6),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 96),
    }
    nodes = engines.node_times(engine.profile(feeds, tmp_path / "p.json", runs=4))
    assert set(nodes["runs"]) == {4}
    assert nodes["node"].is_unique
    assert nodes["time_ms"].is_monotonic_decreasing
    assert nodes["share_percent"].sum() == pytest.approx(100)
    assert any(name.startswith("blocks.0.attn1") for name in nodes["node"])
    operators = engines.operator_times(nodes)
    assert operators["nodes"].sum() == len(nodes)
    assert operators["time_ms"].sum() == pytest.approx(nodes["time_ms"].sum())
    assert {"MatMul", "Conv"} <= set(operators["operator"])
    figure = plots.operator_bars(operators, top=3)
    assert list(figure.data[0].y)[3] == f"{len(operators) - 3} others"
    assert sum(figure.data[0].x) == pytest.approx(operators["time_ms"].sum())
    with pytest.raises(WanlabError, match="no run of a node after 9 warm-up runs"):
        engines.node_times(tmp_path / "p.json", warmup=9)


def event(name: str, start: int, microseconds: int, operator: str = "MatMul") -> dict:
    args = {"op_name": operator, "provider": "CUDAExecutionProvider"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": microseconds, "args": args}


def test_the_first_run_is_left_out_by_its_time_and_not_by_its_place(tmp_path):
    path = tmp_path / "p.json"
    events = [event("a", 20, 3_000), event("a", 30, 5_000), event("a", 10, 90_000), event("b", 11, 7_000)]
    path.write_text(json.dumps([*events, event("b", 31, 1_000), {"cat": "Session", "name": "model_run"}]))
    nodes = engines.node_times(path)
    assert nodes[["node", "runs", "time_ms"]].to_numpy().tolist() == [["a", 2, 4.0], ["b", 1, 1.0]]


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(JSON | st.lists(st.fixed_dictionaries({"cat": st.just("Node"), "name": st.just("a_kernel_time")})))
def test_what_is_no_profile_is_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("wild") / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(WanlabError) as caught:
        engines.node_times(path)
    assert "\n" not in str(caught.value)


def test_bars_of_benchmarks_show_what_was_measured():
    gpu = pd.DataFrame(
        {
            "engine": ["eager", "tensorrt"],
            "latency_ms": [12.0, 7.0],
            "h2d_ms": [1.0, 1.0],
            "device_ms": [10.0, 5.0],
            "d2h_ms": [1.0, 1.0],
            "speedup": [1.0, 2.0],
            "verdict": ["baseline", "faster"],
        }
    )
    figure = plots.bench_bars(gpu)
    assert [bar.name for bar in figure.data] == ["copy to the device", "computing", "copy back"]
    assert list(figure.data[-1].text) == ["12 ms", "7 ms · 2.00x, faster"]
    cpu = plots.bench_bars(gpu[["engine", "latency_ms"]])
    assert [bar.name for bar in cpu.data] == ["latency"]
    with pytest.raises(WanlabError, match="latency_ms"):
        plots.bench_bars(gpu[["engine"]])
