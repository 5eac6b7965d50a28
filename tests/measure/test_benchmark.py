"""Benchmarks of engines: the figures of trtexec, its warnings, and comparisons that refuse what is not alike."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import convert_tiny as tiny

from wanlab import engines, export, measure
from wanlab.core.errors import WanlabError
from wanlab.engines import registry
from wanlab.export.components import component_spec
from wanlab.measure.bench import Bench, make_buffers

pytestmark = pytest.mark.slow

SHAPE = export.ClipShape(1, 32, 48, 9, 24)
QUICK = dict(warmup_ms=0, duration_ms=0, progress=False)


@pytest.fixture(scope="module")
def model():
    model = tiny.bare(tiny.pipeline())
    model.spec = replace(
        model.spec, name="wan-nano"
    )  # whose sizes the tiny model has, as other modules name it
    return model


@pytest.fixture(scope="module")
def engine(model, exported):
    (report,) = exported(model, "expert_high", height=64, width=96, frames=9)
    return engines.OrtEngine(report.path, provider="cpu", threads=1)


def feeds(model, shape=SHAPE):
    plan = component_spec(model, "expert_high")
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    return dict(zip(plan.inputs, inputs, strict=True))


def made_up(
    device_ms=(10.0, 10.0, 10.0, 10.0), *, h2d=1.0, d2h=1.0, enqueue=1.0, name="a", **changes
) -> Bench:
    """A benchmark as a GPU would give it; the figures are the test's own."""
    n = len(device_ms)
    where = "cuda:0 test"
    samples = {
        "latency": measure.Samples("latency", tuple(v + h2d + d2h for v in device_ms), where),
        "h2d": measure.Samples("h2d", (h2d,) * n, where),
        "device": measure.Samples("device", tuple(device_ms), where),
        "d2h": measure.Samples("d2h", (d2h,) * n, where),
        "enqueue": measure.Samples("enqueue", (enqueue,) * n, where),
    }
    half = measure.Samples("device", tuple(device_ms), where)
    control = measure.AAControl(half, half, 1.0, 0.0)
    fields = dict(
        engine=name,
        metadata={},
        inputs={"x": ("float32", (1, 2))},
        outputs={"y": ("float32", (1, 2))},
        settings={"transfers": True, "cuda_graph": False},
        samples=samples,
        control=control,
        wall_ms=100.0,
        environment={"gpu": {"name": "one"}},
    )
    return Bench(**fields | changes)


def test_a_benchmark_on_the_cpu_has_latency_and_nothing_it_did_not_measure(model, engine):
    result = measure.bench(engine, feeds(model), iterations=6, **QUICK)
    assert set(result.samples) == {"latency"}
    assert result.main.n == 6
    assert result.control.first.n + result.control.second.n == 6
    assert result.wall_ms >= result.device_total_ms > 0
    assert result.throughput_per_s == pytest.approx(6 / result.wall_ms * 1e3)
    frame = result.frame()
    assert list(frame["measure"]) == ["latency"]
    assert (
        frame.loc[0, "min_ms"]
        <= frame.loc[0, "median_ms"]
        <= frame.loc[0, "p99_ms"]
        <= frame.loc[0, "max_ms"]
    )


def test_iterations_go_on_until_both_limits_are_reached(model, engine):
    result = measure.bench(engine, feeds(model), iterations=2, warmup_ms=0, duration_ms=150, progress=False)
    assert result.wall_ms >= 150
    assert result.main.n > 2


def test_an_engine_whose_outputs_do_not_arrive_has_no_time(model, monkeypatch):
    monkeypatch.setattr(
        registry, "ENGINES", dict(registry.ENGINES)
    )  # importing the file registers its engine
    forgetful = importlib.import_module("support.forgetful_engine").ForgetfulEngine(model, "expert_high")
    with pytest.raises(
        WanlabError, match=r"output 'velocity' of eager over fixed memory differs by .* from its own run"
    ):
        measure.bench(forgetful, feeds(model), iterations=2, **QUICK)


@pytest.mark.parametrize("kind", ["onnxruntime", "eager"])
def test_memory_that_does_not_fit_is_refused(model, engine, kind):
    engine = engine if kind == "onnxruntime" else engines.TorchEngine(model, "expert_high")
    inputs = feeds(model)
    output = torch.empty_like(engine.run(inputs)["velocity"])
    flat = output.permute(0, 1, 4, 3, 2)
    for change, memory, message in (
        ({"hidden_states": inputs["hidden_states"].half()}, output, "'hidden_states' .* is float32 on cpu"),
        (
            {"hidden_states": inputs["hidden_states"].transpose(3, 4)},
            output,
            "'hidden_states' is not contiguous",
        ),
        ({}, flat, "'velocity' is not contiguous"),
    ):
        with pytest.raises(WanlabError, match=message):
            engine.bind(inputs | change, {"velocity": memory})
    with pytest.raises(WanlabError, match="needs memory for 'velocity'; none was given"):
        engine.bind(inputs, {})
    for wrong in (torch.zeros(3, *output.shape[1:]), output[:, :, :1].contiguous()):
        before = wrong.clone()
        with pytest.raises(WanlabError, match="memory"):
            engine.bind(inputs, {"velocity": wrong})()
        assert torch.equal(wrong, before)


def test_the_engine_runs_over_the_memory_it_was_given(model, engine):
    given = feeds(model)
    expected = engine.run(given)["velocity"]
    output = torch.full_like(expected, float("nan"))
    call = engine.bind(dict(given), {"velocity": output})
    call()
    assert torch.equal(output, expected)
    given["hidden_states"].mul_(2)
    call()
    assert torch.equal(output, engine.run(given)["velocity"])
    assert not torch.equal(output, expected)


def test_a_benchmark_survives_json(model, engine, tmp_path):
    result = measure.bench(engine, feeds(model), iterations=4, **QUICK)
    again = measure.read_bench(result.save(tmp_path / "b" / "one.json"))
    assert again.to_dict() == json.loads((tmp_path / "b" / "one.json").read_text())
    assert again.samples["latency"].values_ms == result.samples["latency"].values_ms
    assert again.inputs == result.inputs
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(WanlabError, match=r"two\.json is no saved benchmark"):
        measure.read_bench(tmp_path / "two.json")
    newer = json.loads((tmp_path / "b" / "one.json").read_text()) | {"schema": 99}
    (tmp_path / "two.json").write_text(json.dumps(newer))
    with pytest.raises(WanlabError, match="schema 99"):
        measure.read_bench(tmp_path / "two.json")


JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(made_up().to_dict())), JSON, st.booleans())
def test_a_spoilt_file_is_refused_in_one_line_or_read_whole(tmp_path_factory, key, value, alone):
    path = tmp_path_factory.mktemp("wild") / "b.json"
    path.write_text(json.dumps(value if alone else made_up().to_dict() | {key: value}))
    said, read = "", None
    try:
        read = measure.read_bench(path)
    except WanlabError as error:
        said = str(error)
    assert "\n" not in said
    assert said or read.main.n == 4


@pytest.mark.parametrize(
    ("result", "hazards"),
    [
        (made_up(), []),
        (made_up((9.0, 10.0, 11.0, 10.0)), ["varies: CV"]),
        (made_up(enqueue=7.9), []),
        (made_up(enqueue=8.1), ["bound by the host"]),
        (made_up(h2d=9.9), []),
        (made_up(h2d=10.0), ["bound by transfers: h2d"]),
        (made_up(d2h=12.0), ["bound by transfers: d2h"]),
    ],
)
def test_warnings_come_at_the_limits_of_trtexec(result, hazards):
    found = result.warnings()
    assert len(found) == len(hazards)
    for row, hazard in zip(found, hazards, strict=True):
        assert hazard in row["hazard"]
        assert row["mitigation"]
        assert row["help"]


def test_engines_side_by_side(model, engine):
    eager = engines.TorchEngine(model, "expert_high")
    results = [measure.bench(one, feeds(model), iterations=6, **QUICK) for one in (eager, engine)]
    table = measure.bench_table(results)
    assert list(table["engine"]) == ["eager", "onnxruntime-cpu"]
    assert table["verdict"][0] == "baseline"
    assert (table["low"] <= table["speedup"]).all()
    assert (table["speedup"] <= table["high"]).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": {"x": ("float32", (2, 2))}}, "shapes"),
        ({"settings": {"transfers": False, "cuda_graph": False}}, "transfers"),
        ({"settings": {"transfers": True, "cuda_graph": True}}, "cuda_graph"),
        ({"environment": {"gpu": {"name": "another"}}}, "GPU"),
    ],
)
def test_what_is_not_alike_is_not_compared(changes, reason):
    pair = [made_up(), made_up(name="b", **changes)]
    with pytest.raises(WanlabError, match=rf"b and a differ in {reason}"):
        measure.bench_table(pair)
    table = measure.bench_table(pair, allow_different=True)
    assert reason in table["differs_in"][1]
    # another dtype is what a comparison may well be about
    measure.bench_table([made_up(), made_up(inputs={"x": ("float16", (1, 2))})])


def test_cpus_of_two_kinds_are_not_compared():
    one = {"latency": measure.Samples("latency", (1.0, 1.0), "cpu")}
    pair = [
        made_up(samples=one, environment={"gpu": None, "cpu": name}, name=name) for name in ("this", "that")
    ]
    with pytest.raises(WanlabError, match=r"CPU \(that against this\)"):
        measure.bench_table(pair)


def test_mistakes_are_named(model, engine):
    cases = [
        (lambda: measure.bench(engine, feeds(model), iterations=1), "at least 2 iterations"),
        (lambda: measure.bench(engine, feeds(model), duration_ms=-1), "no negative times"),
        (lambda: measure.bench(engine, feeds(model), cuda_graph=True), "no CUDA graphs"),
        (lambda: measure.bench(engine, {"hidden": torch.zeros(1)}), "did you mean 'hidden_states'"),
        (lambda: measure.events_check(engine, feeds(model), made_up()), "no events to check"),
        (lambda: measure.bench_table([]), "no benchmark"),
        (lambda: make_buffers("pycudda", {}, {}, torch.device("cpu")), "did you mean 'pycuda'"),
        (
            lambda: engine.bind(feeds(model), {"velocity": torch.zeros(1, dtype=torch.float16)}),
            "'velocity' of expert_high.onnx is float32 on cpu; torch.float16",
        ),
        (lambda: engine.bind({}, {}), "needs memory for 'hidden_states'"),
        (lambda: engine.bind({}, {}, cuda_graph=True), "with cuda_graph=True"),
        (lambda: engines.TorchEngine(model, "expert_high", mode="compield"), "did you mean 'compiled'"),
        (lambda: engines.open_engine("a.trt"), "no engine; give a file that ends in .onnx"),
        (lambda: engines.open_engine("a.onnx"), "no file at a.onnx"),
    ]
    for mistake, message in cases:
        with pytest.raises(WanlabError, match=message):
            mistake()


def test_compiled_pytorch_is_an_engine_too(model):
    given = feeds(model)
    eager, compiled = (engines.TorchEngine(model, "expert_high", mode=mode) for mode in ("eager", "compiled"))
    expected = eager.run(given)["velocity"]
    assert torch.allclose(compiled.run(given)["velocity"], expected, atol=1e-4)
    network = model.pipeline.transformer
    assert all(module._compiled_call_impl is None for module in network.modules()), "the model was touched"
    assert (compiled.name, compiled.size_bytes) == ("compiled", eager.size_bytes)


@pytest.mark.slow
def test_the_command_measures_a_file_and_a_model(tmp_path, commands):
    def run(*arguments):
        return commands.run(["bench", *map(str, arguments)], cwd=tmp_path)

    quick = [
        "--iterations",
        2,
        "--duration-s",
        0,
        "--warmup-ms",
        0,
        "--height",
        64,
        "--width",
        64,
        "--frames",
        5,
    ]
    done = run("wan-nano", "--component", "expert_low", *quick, "--json", tmp_path / "eager.json")
    assert done.returncode == 0, done.stderr
    assert "eager: expert_low of wan-nano" in done.stdout
    assert "A/A noise of latency" in done.stdout
    assert measure.read_bench(tmp_path / "eager.json").main.n == 2
    again = run("wan-nano", "--component", "expert_low", *quick, "--baseline", tmp_path / "eager.json")
    assert "against eager:" in again.stdout
    for arguments, message in (
        (["wan-nano"], "give --component"),
        (["wan-nano", "--component", "expert_lo"], "did you mean 'expert_low'"),
        (["none.onnx"], "no file at none.onnx"),
        (["wan-nano", "--component", "expert_low", "--baseline", "no.json"], "no.json is no saved benchmark"),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["torch", "pycuda"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu_device_times_agree_with_other_events(tmp_path, backend, cuda_graph):
    if backend == "pycuda":
        pytest.importorskip("pycuda")
    from wanlab import models

    model = models.load("wan-nano", components=["expert_high"], device="cuda", dtype="float16")
    engine = engines.TorchEngine(model, "expert_high")
    plan = component_spec(model, "expert_high")
    # Clips enough that the device, not the host's launches, sets the pace.
    shape = export.ClipShape(512, 128, 192, 17, 24)
    given = dict(zip(plan.inputs, plan.inputs_for(shape, torch.Generator().manual_seed(0)), strict=True))
    result = measure.bench(engine, given, buffers=backend, cuda_graph=cuda_graph, progress=False)
    assert set(result.samples) == {"latency", "h2d", "device", "d2h", "enqueue"}
    assert measure.events_check(engine, given, result) == pytest.approx(1.0, abs=0.02)
