"""The same work side by side, other work refused by name, and no figure that nobody measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import measure, plots, runs
from wanlab.core.errors import WanlabError
from wanlab.measure.timing import AAControl, Samples
from wanlab.runs import PlatformRecord, Work
from wanlab.runs.platforms import BUILT, machine_of

WORK = Work("video", "wan-nano", "pretrained", 128, 192, 17, steps=10, guided=True, seed=0)
EAGER = PlatformRecord(
    "run a", "NVIDIA H200", 139.8, "eager", "bfloat16", WORK, latency_ms=1000.0, samples=4, noise_percent=3.0
)
FAST = replace(EAGER, engine="onnxruntime-cuda", latency_ms=500.0, load_ms=80.0)
BUILDS = Path(__file__).resolve().parents[2] / "data" / "results" / "tensorrt_builds_cpu.json"
FORWARD = replace(WORK, what="expert_high forward", steps=None, guided=None, seed=None)


def test_one_row_per_machine_and_engine_with_its_ratio_to_eager_there():
    slow = replace(EAGER, machine="AMD EPYC, 2 threads", precision="float32", latency_ms=8000.0)
    table = runs.platform_table([EAGER, FAST, slow]).set_index(["machine", "engine"])
    row = table.loc[("NVIDIA H200", "onnxruntime-cuda")]
    assert row["ratio_to_eager"] == 2.0
    assert row["latency_per_frame_ms"] == pytest.approx(500 / 17)
    assert row["throughput_per_s"] == pytest.approx(2.0)
    assert (row["steps"], row["seed"], row["shape"]) == (10, 0, "17x128x192")
    assert table.loc[("AMD EPYC, 2 threads", "eager"), "ratio_to_eager"] == 1.0
    assert math.isnan(row["peak_memory_gib"])  # nobody measured it
    assert not table["note"].any()


def test_the_newest_of_two_equal_rows_is_shown():
    old, new = replace(EAGER, taken="2026-01-01"), replace(EAGER, taken="2026-02-01", latency_ms=900.0)
    for order in ([old, new], [new, old]):
        assert runs.platform_table(order)["latency_ms"].tolist() == [900.0]


def test_rows_say_what_weakens_them():
    close = replace(FAST, latency_ms=985.0)
    alone = replace(FAST, machine="Tesla T4", noise_percent=None)
    notes = runs.platform_table([EAGER, close, alone])["note"].tolist()
    assert notes[0] == ""
    assert notes[1] == "not distinguishable from eager"
    noisy = runs.platform_table([replace(EAGER, noise_percent=150.0), FAST])
    assert noisy["note"].iloc[1] == "not distinguishable from eager"  # the noise of either counts
    assert notes[2] == "no A/A control: its noise is not known; no eager row of this machine"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "wan2.2-ti2v-5b", "model is wan2.2-ti2v-5b, here wan-nano"),
        ("weights", "random", "weights is random, here pretrained"),
        ("height", 256, "height is 256, here 128"),
        ("width", None, "width is not known, here 192"),
        ("frames", 9, "frames is 9, here 17"),
        ("steps", 2, "steps is 2, here 10"),
        ("guided", False, "guided is False, here True"),
        ("seed", 1, "seed is 1, here 0"),
        ("plan", "uniform-int8", "plan is uniform-int8, here none"),
        ("what", "expert_high forward", "what is expert_high forward, here video"),
    ],
)
def test_other_work_is_refused_with_the_field_and_both_values(field, value, said):
    other = replace(EAGER, machine="Tesla T4", source="run b", work=replace(WORK, **{field: value}))
    with pytest.raises(WanlabError) as refusal:
        runs.platform_table([EAGER, other])
    assert said in str(refusal.value)
    assert "run b (Tesla T4, eager)" in str(refusal.value)
    kept, refused = runs.comparable([EAGER, other, FAST])
    assert kept == [EAGER, FAST]
    assert refused["reason"].tolist() == [said]
    marked = runs.platform_table([EAGER, other], allow_different=True)
    assert said in marked["note"].iloc[1]
    assert marked["ratio_to_eager"].iloc[1] == 1.0  # its own eager, not that of the other work


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "height": st.sampled_from([128, 256]),
            "steps": st.sampled_from([2, 10]),
            "seed": st.integers(0, 2),
            "weights": st.sampled_from(["random", "pretrained"]),
            "guided": st.booleans(),
        },
    )
)
@settings(max_examples=50)
def test_kept_is_exactly_what_a_table_takes(changes):
    other = replace(EAGER, machine="Tesla T4", work=replace(WORK, **changes))
    kept, refused = runs.comparable([EAGER, other])
    assert len(kept) + len(refused) == 2
    assert (other in kept) == (other.work == WORK)
    assert len(runs.platform_table(kept)) == len(kept)


def test_nothing_to_show_is_an_error():
    with pytest.raises(WanlabError, match="no record"):
        runs.platform_table([])


def test_records_of_before_there_were_plans_are_those_without_one():
    old = EAGER.to_dict()
    del old["work"]["plan"], old["model"]
    assert PlatformRecord.from_dict(old) == EAGER
    planned = replace(EAGER, work=replace(WORK, plan="uniform-int8"))
    assert PlatformRecord.from_dict(planned.to_dict()) == planned
    assert str(planned.work).endswith("10 steps, uniform-int8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The receipt of a build by TensorRT for RTX, here and now."""
    pytest.importorskip("onnx")
    from support.tensorrt_tiny import patch_graph

    from wanlab.engines import build_tensorrt
    from wanlab.engines.tensorrt.runtime import installed

    if not installed("tensorrt-rtx"):
        pytest.skip('needs pip install "wanlab[rtx]", which Linux on x86 has')
    graph = patch_graph(tmp_path_factory.mktemp("built") / "expert_high.onnx", model="wan-nano")
    return build_tensorrt(graph, level=0, progress=False)


def test_the_receipt_of_a_real_build_is_read_from_its_file_and_from_a_run(built, tmp_path):
    records = runs.read_platform(f"{built.path}.json")
    assert [r.machine for r in records] == [f"GPU of compute capability {c}" for c in ("8.6", "8.9", "12.0")]
    for record in records:
        assert (record.engine, record.precision, record.state) == ("tensorrt-rtx", "float32", BUILT)
        assert (record.model, record.component) == ("wan-nano", "expert_high")
        assert (record.size_bytes, record.build_ms) == (built.size_bytes, built.time_ms)
        assert record.software == {"tensorrt-rtx": built.version}
        assert record.latency_ms is None
    folder = tmp_path / "22_tensorrt" / "abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"created": "2026-11-01", "parameters": {"model": "wan-nano"}})
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"name": "receipts", "value": [built.record()]}))
    assert str(tmp_path) not in (folder / "metrics.jsonl").read_text()
    source = {"source": "22_tensorrt/abc", "taken": "2026-11-01"}
    assert runs.read_platform(folder) == [replace(record, **source) for record in records]


def test_engines_that_were_only_built_have_no_figures():
    """Recorded builds of wan-nano, held against one call of its first expert."""
    recorded = json.loads(BUILDS.read_text())
    eager = replace(EAGER, work=FORWARD)
    kept, refused = runs.comparable([eager, *runs.read_platform(BUILDS)])
    assert set(refused["reason"]) == {"component is vae_decoder, here expert_high"}
    assert set(refused["what"]) == {"wan-nano vae_decoder, built only"}
    table = runs.platform_table(kept)
    rows = table[table["state"] == BUILT]
    for one in recorded["builds"]:
        mine = rows[rows["precision"] == one["numbers"]]
        if one["component"] == "expert_high":
            assert mine["machine"].tolist() == [
                f"GPU of compute capability {target}" for target in one["compute_capabilities"]
            ]
            assert set(mine["build_ms"]) == {one["time_ms"]}
            assert set(mine["size_bytes"]) == {one["size_bytes"]}
    timed = [
        "latency_ms",
        "throughput_per_s",
        "ratio_to_eager",
        "peak_memory_gib",
        "load_ms",
        "latency_per_frame_ms",
    ]
    assert rows[timed].isna().all(axis=None)
    assert (rows["note"] == "expert_high built for it, not executed: no such machine here").all()
    said = runs.platform_verdict(table, refused)
    assert "; 4 engines built for 3 machines not there, not executed; " in said
    only = runs.platform_table(kept[1:])
    assert runs.platform_verdict(only, only.iloc[:0]).startswith("Nothing here was measured: 4 engines")
    # Both components are of a video; of another model there are none.
    assert len(runs.comparable([EAGER, *runs.read_platform(BUILDS)])[0]) > len(kept)
    other = replace(eager, work=replace(FORWARD, model="wan2.2-i2v-a14b"))
    assert runs.comparable([other, *kept[1:]])[0] == [other]


def test_recorded_builds_are_of_every_format_and_say_what_was_refused():
    recorded = json.loads(BUILDS.read_text())
    built = {
        (one["component"], one["numbers"].rpartition(" x ")[2] or one["numbers"]): one["compute_capabilities"]
        for one in recorded["builds"]
    }
    assert len(built) == len(recorded["builds"]) == 8
    for component in ("expert_high", "vae_decoder"):
        for numbers in ("float32", "float16", "int8", "fp8"):
            assert built[component, numbers] == ["8.6", "8.9", "12.0"][numbers == "fp8" :]
    for row in recorded["refused"]:
        assert row["capability"] in ("7.5", "8.6")
        assert row["node"] or "fp8" in row["reason"]


def test_one_expert_on_two_machines_is_recorded(root):
    """The forms of the CPU and the H200: eager, and the graph that an export gives by default."""
    from wanlab.export.components import FUSED_OPSET
    from wanlab.export.trace import chosen_opset

    results = root / "data" / "results"
    recorded = {
        place: json.loads((results / f"onnx_forms_{place}.json").read_text()) for place in ("cpu", "h200")
    }
    found, _ = runs.read_platforms(results / f"onnx_forms_{place}.json" for place in recorded)
    assert {record.work for record in found} == {FORWARD}
    table = runs.platform_table(found).set_index(["machine", "engine", "precision"])
    assert len(table) == 6
    for place, machine in (("cpu", "AMD EPYC, 1 thread"), ("h200", "NVIDIA H200")):
        forms = {(row["dtype"], row["form"]): row for row in recorded[place]["forms"]}
        for dtype in dict.fromkeys(dtype for dtype, _ in forms):
            used = "fused" if chosen_opset(None, f"torch.{dtype}") >= FUSED_OPSET else "friendly"
            engine = "onnxruntime-cuda" if place == "h200" else "onnxruntime-cpu"
            row = table.loc[(machine, engine, dtype)]
            assert row["latency_ms"] == forms[dtype, used]["time_ms"]
            # Against eager in the same precision, of which the H200 has two.
            assert row["ratio_to_eager"] == forms[dtype, "eager"]["time_ms"] / forms[dtype, used]["time_ms"]
            assert row["noise_percent"] == forms[dtype, used]["noise_percent"]
            assert row["samples"] == 20
    assert "onnxruntime 1.30.0" not in table.loc[("NVIDIA H200", "onnxruntime-cuda", "float32"), "software"]
    assert "2 machines" in runs.platform_verdict(table.reset_index(), table.iloc[:0])


def test_a_row_without_eager_in_its_precision_says_which_it_is_held_against():
    half = replace(FAST, precision="float16")
    table = runs.platform_table([EAGER, half])
    assert table["note"].tolist() == ["", "eager is in bfloat16"]
    assert table["ratio_to_eager"].tolist() == [1.0, 2.0]


def test_runs_of_one_configuration_are_held_against_each_other_by_their_plan(tmp_path):
    environment = {"gpu": None, "cpu": "AMD EPYC", "threads": 2, "ram_gib": 23.5, "packages": {}}
    work = {key: value for key, value in asdict(WORK).items() if key not in ("what", "plan")}
    for engine, plan, latency in (
        ("eager", "default", 900.0),
        ("onnxruntime", "default", 300.0),
        ("onnxruntime", "uniform-int8", 150.0),
    ):
        folder = tmp_path / "41_configuration" / f"{engine}-{plan}"
        folder.mkdir(parents=True)
        facts = {"parameters": {"model": "wan-nano", "engine": engine, "plan": plan}}
        (folder / "run.json").write_text(json.dumps(facts | {"environment": environment}))
        summary = {"engine": engine, "plan": plan, "time_per_video_ms": latency, "noise_percent": 2.0}
        kept = {"summary": summary, "work": work, "samples": samples(engine, latency, latency)}
        (folder / "metrics.jsonl").write_text(
            "\n".join(json.dumps({"name": n, "value": v}) for n, v in kept.items())
        )
    found, unread = runs.read_platforms(sorted((tmp_path / "41_configuration").iterdir()))
    assert unread.empty
    kept, refused = runs.comparable(found)
    table = runs.platform_table(kept)
    assert table["engine"].tolist() == ["eager", "onnxruntime-cpu"]
    assert table["ratio_to_eager"].tolist() == [1.0, 3.0]
    assert table["samples"].tolist() == [2, 2]
    assert refused["reason"].tolist() == ["plan is uniform-int8, here none"]
    assert kept[0].work == WORK


def test_recorded_results_are_read(root):
    found, unread = runs.read_platforms([root / "data" / "results"])
    by_source = {record.source.split("/")[0] for record in found}
    assert {"h200_baseline.json", "onnxruntime_cpu.json"} <= by_source
    assert "wan_nano_heldout.json" in set(unread["source"])
    file = json.loads((root / "data" / "results" / "h200_baseline.json").read_text())
    recorded = file["runs"][0]
    video = next(r for r in found if r.source.endswith(recorded["run_id"]) and r.work.what == "video")
    assert video.latency_ms == recorded["baseline"]["time_per_video_ms"]
    assert (video.machine, video.memory_gib) == ("NVIDIA H200", 139.8)
    assert (video.precision, video.work.weights, video.work.guided) == ("bfloat16", "random", False)
    assert (video.work.height, video.work.frames, video.work.steps) == (704, 121, 2)
    assert video.software["torch"].startswith("2.11")
    ort = [r for r in found if r.source == "onnxruntime_cpu.json"]
    assert {r.engine for r in ort} == {"eager", "onnxruntime-cpu"}
    # What was not given is the model's default.
    assert {(r.work.steps, r.work.height, r.work.guided) for r in ort} == {(10, 128, True)}
    table = runs.platform_table(ort)
    assert table["ratio_to_eager"].max() == pytest.approx(2.424, abs=1e-3)


def test_run_folders_are_read(root, tmp_path):
    recorded = json.loads((root / "data" / "results" / "h200_baseline.json").read_text())["runs"][0]
    folder = tmp_path / "10_baseline" / "abc"
    folder.mkdir(parents=True)
    facts = {key: recorded[key] for key in ("parameters", "environment")}
    (folder / "run.json").write_text(json.dumps(facts | {"created": "2026-11-01T00:00:00+00:00"}))
    lines = [json.dumps({"name": n, "value": recorded[n]}) for n in ("baseline", "forward")]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"name": "torn']))
    video, forward = runs.read_platform(folder)
    assert video.latency_ms == recorded["baseline"]["time_per_video_ms"]
    assert video.noise_percent == recorded["baseline"]["noise_percent"]
    assert video.taken == "2026-11-01T00:00:00+00:00"
    assert forward.work.what == "expert forward"
    assert forward.latency_ms == recorded["forward"][0]["median_ms"]
    assert forward.noise_percent is None
    assert "expert forward" in runs.comparable([video, forward])[1]["what"].iloc[0]


def test_a_run_of_the_onnxruntime_notebook_is_read(tmp_path):
    folder = tmp_path / "21_onnxruntime" / "def"
    folder.mkdir(parents=True)
    environment = {
        "gpu": None,
        "cpu": "AMD EPYC",
        "threads": 1,
        "ram_gib": 23.5,
        "packages": {"torch": "2.14"},
    }
    parameters = {"model": "wan-nano", "weights": "pretrained", "steps": 3, "seed": 0, "dtype": "auto"}
    (folder / "run.json").write_text(json.dumps({"parameters": parameters, "environment": environment}))
    rows = [
        {"variant": "eager", "time_per_video_ms": 300.0, "load_ms": 5.0, "added_memory_gib": 0.2},
        {"variant": "onnxruntime", "time_per_video_ms": 100.0, "load_ms": 50.0, "added_memory_gib": 0.1},
    ]
    kept = {
        "engines": {"expert_high": "onnxruntime-cpu"},
        "speedup": {"noise_percent": 4.0},
        "before_after": rows,
    }
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"name": n, "value": v}) for n, v in kept.items())
    )
    table = runs.platform_table(runs.read_platform(folder))
    assert table["engine"].tolist() == ["eager", "onnxruntime-cpu"]
    assert table["ratio_to_eager"].tolist() == [1.0, 3.0]
    assert table["noise_percent"].tolist() == [4.0, 4.0]
    assert table["peak_memory_gib"].isna().all()  # memory that a load added is no peak
    assert table["machine"].tolist() == ["AMD EPYC, 1 thread"] * 2


def samples(label, *values):
    return Samples(label, values).to_dict()


GPU = {"gpu": {"name": "NVIDIA H200", "memory_gib": 139.8}, "cpu": "Xeon", "threads": 8, "packages": {}}


def test_benchmarks_of_engines_in_processes_of_their_own_are_read(tmp_path):
    """The form of benchmarks/engines.py; an engine that failed has no samples and makes no row."""
    settings = dict(
        model="wan2.2-ti2v-5b", weights="random", component="expert", height=704, width=1280, frames=121
    )
    rows = {
        "eager": {
            "samples": samples("eager", 1000.0, 1002.0),
            "noise_percent": 0.5,
            "load_ms": 9.0,
            "peak_gib": 20.0,
        },
        "onnxruntime": {
            "samples": samples("onnxruntime", 2000.0),
            "noise_percent": 1.0,
            "load_ms": 8.0,
            "peak_gib": 30.0,
        },
        "compiled": {"failed": "out of memory"},
    }
    path = tmp_path / "engines_h200.json"
    settings |= {"dtype": "bfloat16", "device": "cuda", "seed": 0}
    path.write_text(json.dumps({"settings": settings, "engines": rows, "environment": GPU}))
    table = runs.platform_table(runs.read_platform(path))
    assert table["engine"].tolist() == ["eager", "onnxruntime-cuda"]
    assert table["peak_memory_gib"].tolist() == [20.0, 30.0]
    assert table["ratio_to_eager"].tolist() == [1.0, pytest.approx(0.5005)]
    assert table["noise_percent"].tolist() == [0.5, 1.0]
    assert set(table["what"]) == {"expert forward"}
    assert set(table["shape"]) == {"121x704x1280"}


def test_the_tvm_benchmark_is_read(tmp_path):
    data = {
        "model": "wan-nano",
        "component": "expert_high",
        "shape": {"batch": 1, "height": 128, "width": 192, "frames": 17},
        "seed": 0,
        "dtype": "float32",
        "noise_percent": 3.0,
        "samples": {name: samples(name, 50.0, 51.0) for name in ("eager", "onnxruntime", "tvm", "tvm plain")},
        "builds": [{"build": "tvm", "build_ms": 4000.0, "size_bytes": 14, "tvm": "0.27.0"}],
        "load_ms": {"tvm": 11.0},
        "environment": GPU | {"gpu": None},
    }
    path = tmp_path / "tvm_cpu.json"
    path.write_text(json.dumps(data))
    table = runs.platform_table(runs.read_platform(path)).set_index("engine")
    assert table.index.tolist() == ["eager", "onnxruntime-cpu", "tvm-llvm", "tvm-llvm (plain)"]
    assert table.loc["tvm-llvm", "build_ms"] == 4000.0
    assert "apache-tvm 0.27.0" in table.loc["tvm-llvm", "software"]
    assert "apache-tvm" not in table.loc["eager", "software"]
    assert (table["note"].iloc[1:] == "not distinguishable from eager").all()


def bench_json(engine, latency, **changes):
    return {
        "schema": 1,
        "engine": engine,
        "metadata": {"component": "expert_high", "model": "wan-nano", "load_ms": 5.0, "size_bytes": 7},
        "inputs": {"hidden_states": ["float32", [1, 36, 5, 16, 24]], "timestep": ["float32", [1]]},
        "samples": latency,
        "noise_percent": 2.0,
        "environment": GPU,
    } | changes


def test_saved_benchmarks_are_read(tmp_path):
    """The form of `wanlab bench --json`: device time without the transfers, sizes from the tensors."""
    timed = {"latency": samples("latency", 9.0), "device": samples("device", 5.0)}
    two = {"hidden_states": ["float32", [2, 36, 5, 16, 24]]}
    for name, data in {
        "a": bench_json("eager", {"latency": samples("latency", 10.0)}),
        "b": bench_json("onnxruntime-cuda", timed),
        "c": bench_json("tensorrt", timed, inputs=two),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    found, unread = runs.read_platforms([tmp_path])
    assert unread.empty
    pretrained = replace(WORK, what="expert_high forward", steps=None, guided=None, seed=None)
    kept, refused = runs.comparable(found, pretrained)
    table = runs.platform_table(kept)
    assert table["ratio_to_eager"].tolist() == [1.0, 2.0]
    assert refused["reason"].tolist() == ["what is expert_high forward, batch 2, here expert_high forward"]


def test_what_wanlab_bench_measures_is_read(tmp_path):
    """The real thing, so that a change of its form is seen here."""
    torch = pytest.importorskip("torch")

    class Double:
        name, device, size_bytes, load_ms = "eager", torch.device("cpu"), 0, 1.0

        def __init__(self):
            self.inputs = self.outputs = {"hidden_states": ("float32", (1, 36, 5, 16, 24))}
            self.metadata = {"component": "expert_high", "model": "wan-nano"}

        def run(self, feeds):
            return {name: tensor * 2 for name, tensor in feeds.items()}

        def bind(self, inputs, outputs, **_):
            return lambda: torch.mul(inputs["hidden_states"], 2, out=outputs["hidden_states"])

    feeds = {"hidden_states": torch.ones(1, 36, 5, 16, 24)}
    result = measure.bench(Double(), feeds, warmup_ms=0, duration_ms=0, iterations=4, progress=False)
    record = runs.read_platform(result.save(tmp_path / "bench.json"))[0]
    assert record.latency_ms == result.samples["latency"].median
    assert (record.work.frames, record.work.height, record.work.width) == (17, 128, 192)


def test_a_row_with_its_noise_is_better_than_a_newer_one_without():
    bare = replace(EAGER, noise_percent=None, taken="2026-12-01", latency_ms=1.0)
    assert runs.platform_table([EAGER, bare])["latency_ms"].tolist() == [1000.0]


def test_what_holds_no_latency_is_said(tmp_path):
    for name, text in {"a.json": "[]", "b.json": "{", "c.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    found, unread = runs.read_platforms([tmp_path, tmp_path / "none.json"])
    assert found == []
    assert len(unread) == 4
    assert unread["reason"].str.contains("no latency of an engine").sum() == 1


def test_records_of_this_machine_survive_a_file(tmp_path):
    first, second = Samples("eager", (10.0, 11.0)), Samples("eager (again)", (10.0, 11.0))
    control = AAControl(first, second, 1.0, 2.0)
    facts = {"eager": {"load_ms": None, "size_bytes": 7, "build_ms": None, "relative_l2": 0.0}}
    work = replace(WORK, what="expert_high forward", steps=None, guided=None, seed=None)
    made = runs.forward_records(
        {"eager": first}, work, control, device="cpu", precision="float32", facts=facts
    )
    assert made[0].latency_ms == 10.5
    assert made[0].noise_percent == 2.0
    assert made[0].size_bytes == 7
    assert made[0].software["torch"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"platform_records": [record.to_dict() for record in made]}))
    assert runs.read_platform(path) == made


def test_an_engine_on_the_cpu_of_a_gpu_machine_is_on_the_cpu():
    environment = {
        "gpu": {"name": "NVIDIA H200", "memory_gib": 139.8},
        "cpu": "Xeon",
        "threads": 8,
        "ram_gib": 250.0,
    }
    assert machine_of(environment, "onnxruntime-cuda") == ("NVIDIA H200", 139.8)
    assert machine_of(environment, "tvm-llvm") == ("Xeon, 8 threads", 250.0)


def test_the_verdict_tells_gains_losses_and_noise():
    slower = replace(FAST, engine="tvm-cuda", latency_ms=2000.0)
    same = replace(FAST, engine="compiled", latency_ms=1010.0)
    other = replace(EAGER, work=replace(WORK, steps=2))
    kept, refused = runs.comparable([EAGER, FAST, slower, same, other])
    said = runs.platform_verdict(runs.platform_table(kept), refused)
    assert "fastest onnxruntime-cuda bfloat16 on NVIDIA H200, 500.0 ms" in said
    assert "onnxruntime-cuda 2.00x as fast as eager (noise 3.0 %)" in said
    assert "tvm-cuda 2.00x slower than eager" in said
    assert "compiled not distinguishable from eager" in said
    assert "1 row refused as other work" in said


def test_the_figure_draws_no_bar_for_what_was_not_run():
    built = replace(runs.read_platform(BUILDS)[0], build_ms=2500.0)
    figure = plots.platform_bars(runs.platform_table([EAGER, FAST, built]))
    bar = figure.data[0]
    assert figure.layout.xaxis.type == "log"
    assert bar.text[1] == "500.0 ms · 2.00x as fast as eager"
    assert bar.text[2] == "built in 2.5 s, not executed"
    assert bar.marker.color[2] == "rgba(0,0,0,0)"
    with pytest.raises(WanlabError, match="missing: ratio_to_eager"):
        plots.platform_bars(runs.platform_table([EAGER]).drop(columns="ratio_to_eager"))
