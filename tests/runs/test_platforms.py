"""The same work side by side, other work refused by name, and no figure that nobody measured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers import faults

from wanlab import measure, models, plots, runs
from wanlab.core.errors import WanlabError
from wanlab.core.files import plain
from wanlab.measure.load import Load
from wanlab.measure.timing import AAControl, Samples
from wanlab.runs import Machine, Result, Work
from wanlab.runs.result import BUILT, build_results, completed, machine_of
from wanlab.runs.results import read_file

replace = msgspec.structs.replace
H200 = Machine(gpu="NVIDIA H200", memory_gib=139.8)
T4 = Machine(gpu="Tesla T4")
WORK = Work(
    model="wan-nano", weights="pretrained", height=128, width=192, frames=17, steps=10, guided=True, seed=0
)
EAGER = Result(
    work=WORK, engine="eager", dtype="bfloat16", median_ms=1000.0, sample_count=4, noise_percent=3.0, machine=H200,
    source="run a",
)  # fmt: skip
FAST = replace(EAGER, engine="onnxruntime-cuda", median_ms=500.0, load_ms=80.0)
RECORDED = Path(__file__).resolve().parents[2] / "data" / "results"
BUILDS = RECORDED / "tensorrt_builds_cpu.json"
FORWARD = replace(WORK, component="expert_high", steps=None, guided=None, seed=None)


def record_results(folder, results):
    """As `run.result` does."""
    lines = [json.dumps(plain(result.to_dict())) + "\n" for result in results]
    (folder / "results.jsonl").write_text("".join(lines))


def recorded(*files):
    """Rows of data/results/platforms.jsonl that were taken from these files."""
    rows, _ = runs.load_results([runs.RESULTS])
    return [row for row in rows if row.source.split("/")[0] in files]


def test_one_row_per_machine_and_engine_with_its_ratio_to_eager_there():
    slow = replace(EAGER, machine=Machine(cpu="AMD EPYC", threads=2), dtype="float32", median_ms=8000.0)
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
    old, new = replace(EAGER, taken="2026-01-01"), replace(EAGER, taken="2026-02-01", median_ms=900.0)
    for order in ([old, new], [new, old]):
        assert runs.platform_table(order)["latency_ms"].tolist() == [900.0]


def test_rows_say_what_weakens_them():
    close = replace(FAST, median_ms=985.0)
    alone = replace(FAST, machine=T4, noise_percent=None)
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
        ("component", "expert_high", "component is expert_high, here the whole video"),
        ("batch", 2, "batch is 2, here 1"),
    ],
)
def test_other_work_is_refused_with_the_field_and_both_values(field, value, said):
    other = replace(EAGER, machine=T4, source="run b")
    other = (
        replace(other, plan=value)
        if field == "plan"
        else replace(other, work=replace(WORK, **{field: value}))
    )
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
    other = replace(EAGER, machine=T4, work=replace(WORK, **changes))
    kept, refused = runs.comparable([EAGER, other])
    assert len(kept) + len(refused) == 2
    assert (other in kept) == (other.work == WORK)
    assert len(runs.platform_table(kept)) == len(kept)


def test_nothing_to_show_is_an_error():
    with pytest.raises(WanlabError, match="no result"):
        runs.platform_table([])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build information of a build by TensorRT for RTX, here and now."""
    pytest.importorskip("onnx")
    from support.tensorrt_tiny import patch_graph

    from wanlab.engines import build_tensorrt
    from wanlab.engines.tensorrt.runtime import installed

    if not installed("tensorrt-rtx"):
        pytest.skip('needs pip install "wanlab[rtx]", which Linux on x86 has')
    graph = patch_graph(tmp_path_factory.mktemp("built") / "expert_high.onnx", model="wan-nano")
    return build_tensorrt(graph, level=0, progress=False)


def test_the_information_of_a_real_build_is_read_from_its_file_and_from_a_run(built, tmp_path):
    records = read_file(f"{built.path}.json")
    assert [r.machine.name for r in records] == [
        f"GPU of compute capability {c}" for c in ("8.6", "8.9", "12.0")
    ]
    for record in records:
        assert (record.engine, record.dtype, record.state) == ("tensorrt-rtx", "float32", BUILT)
        assert (record.work.model, record.work.component) == ("wan-nano", "expert_high")
        assert (record.size_bytes, record.build_ms) == (built.size_bytes, built.time_ms)
        assert record.software == {"tensorrt-rtx": built.version}
        assert record.time_ms is None
    folder = tmp_path / "22_tensorrt" / "abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"created": "2026-11-01", "parameters": {"model": "wan-nano"}})
    )
    record_results(folder, build_results(built.record(), taken="2026-11-01"))
    assert str(tmp_path) not in (folder / "results.jsonl").read_text()
    source = {"source": "22_tensorrt/abc", "taken": "2026-11-01"}
    assert read_file(folder) == [replace(record, **source) for record in records]


def test_engines_that_were_only_built_have_no_figures():
    """Recorded builds of wan-nano, held against one call of its first expert."""
    builds = json.loads(BUILDS.read_text())["builds"]
    eager = replace(EAGER, work=FORWARD)
    kept, refused = runs.comparable([eager, *recorded(BUILDS.name)])
    assert recorded(BUILDS.name) == read_file(BUILDS)
    assert set(refused["reason"]) == {"component is vae_decoder, here expert_high"}
    assert set(refused["what"]) == {"wan-nano vae_decoder, built only"}
    table = runs.platform_table(kept)
    rows = table[table["state"] == BUILT]
    for one in builds:
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
    notes = runs.platform_notes(table, refused)
    assert notes.startswith("4 engines built for 3 machines not there, not executed; ")
    only = runs.platform_table(kept[1:])
    nothing = runs.platform_answer(only, only.iloc[:0])
    assert nothing.headline.startswith("Nothing here was measured: 4 engines")
    # Both components are of a video; of another model there are none.
    assert len(runs.comparable([EAGER, *read_file(BUILDS)])[0]) > len(kept)
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

    files = {place: f"onnx_forms_{place}.json" for place in ("cpu", "h200")}
    measured = {
        place: json.loads((root / "data" / "results" / name).read_text()) for place, name in files.items()
    }
    found = recorded(*files.values())
    assert {result.work for result in found} == {FORWARD}
    table = runs.platform_table(found).set_index(["machine", "engine", "precision"])
    assert len(table) == 6
    for place, machine in (("cpu", "AMD EPYC, 1 thread"), ("h200", "NVIDIA H200")):
        forms = {(row["dtype"], row["form"]): row for row in measured[place]["forms"]}
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
    assert "2 machines" in " ".join(runs.platform_answer(table.reset_index(), table.iloc[:0]).details)


def test_a_row_without_eager_in_its_precision_says_which_it_is_held_against():
    half = replace(FAST, dtype="float16")
    table = runs.platform_table([EAGER, half])
    assert table["note"].tolist() == ["", "eager is in bfloat16"]
    assert table["ratio_to_eager"].tolist() == [1.0, 2.0]


def test_runs_of_one_configuration_are_held_against_each_other_by_their_plan(tmp_path):
    environment = {"gpu": None, "cpu": "AMD EPYC", "threads": 2, "ram_gib": 23.5, "packages": {}}
    for engine, plan, latency in (
        ("eager", None, 900.0),
        ("onnxruntime", None, 300.0),
        ("onnxruntime", "uniform-int8", 150.0),
    ):
        folder = tmp_path / "41_configuration" / f"{engine}-{plan}"
        folder.mkdir(parents=True)
        facts = {"parameters": {"model": "wan-nano", "engine": engine, "plan": plan}}
        (folder / "run.json").write_text(json.dumps(facts | {"environment": environment}))
        row = Result(work=WORK, engine=engine, plan=plan, samples_ms=(latency, latency), noise_percent=2.0)
        record_results(folder, [completed(row, environment)])
    found, unread = runs.load_results(sorted((tmp_path / "41_configuration").iterdir()))
    assert unread.empty
    kept, refused = runs.comparable(found)
    table = runs.platform_table(kept)
    assert table["engine"].tolist() == ["eager", "onnxruntime-cpu"]
    assert table["ratio_to_eager"].tolist() == [1.0, 3.0]
    assert table["samples"].tolist() == [2, 2]
    assert refused["reason"].tolist() == ["plan is uniform-int8, here none"]
    assert refused["what"].tolist() == ["wan-nano video, 17x128x192, 10 steps, uniform-int8"]
    assert kept[0].work == WORK


def test_recorded_results_are_read(root):
    found, unread = runs.load_results([root / "data" / "results"])
    by_source = {record.source.split("/")[0] for record in found}
    assert {"h200_baseline.json", "onnxruntime_cpu.json"} <= by_source
    assert "wan_nano_heldout.json" in set(unread["source"])
    file = json.loads((root / "data" / "results" / "h200_baseline.json").read_text())
    first = file["runs"][0]
    video = next(r for r in found if r.source.endswith(first["run_id"]) and r.work.what == "video")
    assert video.time_ms == first["baseline"]["time_per_video_ms"]
    assert (video.machine.name, video.machine.memory_gib) == ("NVIDIA H200", 139.8)
    assert (video.dtype, video.work.weights, video.work.guided) == ("bfloat16", "random", False)
    assert (video.work.height, video.work.frames, video.work.steps) == (704, 121, 2)
    assert video.software["torch"].startswith("2.11")
    ort = [r for r in found if r.source == "onnxruntime_cpu.json"]
    assert {r.engine for r in ort} == {"eager", "onnxruntime-cpu"}
    # What was not given is the model's default.
    assert {(r.work.steps, r.work.height, r.work.guided) for r in ort} == {(10, 128, True)}
    table = runs.platform_table(ort)
    assert table["ratio_to_eager"].max() == pytest.approx(2.424, abs=1e-3)


class Fake:
    """As much of a model as a row takes."""

    def __init__(self, name="wan-nano", weights="pretrained", dtype="torch.bfloat16"):
        self.spec = dataclasses.replace(models.get("wan-nano"), name=name)
        self.load, self.dtype = SimpleNamespace(weights=weights), dtype


def generation(**settings):
    size = {"height": 128, "width": 192, "frames": 17, "steps": 10, "guidance_scale": 5.0}
    return SimpleNamespace(settings=size | settings, seed=0)


def control(noise_percent):
    sides = Samples("eager", (10.0, 11.0)), Samples("eager (again)", (10.0, 11.0))
    return AAControl(*sides, 1.0, noise_percent)


def cost_of(*times_ms, **settings):
    """As `measure.baseline` gives it: two videos of `times_ms`, two calls of the expert."""
    calls = pd.DataFrame(
        {"component": ["text_encoder", "expert_high", "expert_high"], "time_ms": [1.0, 30.0, 34.0]}
    )
    return SimpleNamespace(
        generation=generation(**settings),
        samples=Samples("eager", times_ms, "cuda:0 NVIDIA H200"),
        control=control(4.0),
        memory=SimpleNamespace(peak_gib=20.0),
        load_ms=9.0,
        calls=calls,
    )


def test_a_baseline_is_a_row_of_the_whole_video_and_one_of_each_forward(tmp_path):
    folder = tmp_path / "10_baseline" / "abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    cost = cost_of(900.0, 1100.0, guidance_scale=1.0)
    rows = [runs.video_result(Fake(), cost), *runs.forward_results(Fake(), cost)]
    record_results(folder, [completed(row, GPU, taken="2026-11-01T00:00:00+00:00") for row in rows])
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"work": {"torn')
    video, forward = read_file(folder)
    assert (video.time_ms, video.noise_percent, video.peak_memory_gib, video.load_ms) == (
        1000.0,
        4.0,
        20.0,
        9.0,
    )
    assert video.work == replace(WORK, guided=False)
    assert (video.dtype, video.machine.name, video.source) == ("bfloat16", "NVIDIA H200", "10_baseline/abc")
    assert forward.work == FORWARD
    assert (forward.time_ms, forward.n, forward.noise_percent) == (32.0, 2, None)
    assert forward.taken == "2026-11-01T00:00:00+00:00"
    assert "expert_high forward" in runs.comparable([video, forward])[1]["what"].iloc[0]


def test_engines_side_by_side_are_rows_with_one_control():
    pair = SimpleNamespace(
        generations={label: generation(steps=3) for label in ("eager", "onnxruntime")},
        samples={
            "eager": Samples("eager", (300.0, 300.0)),
            "onnxruntime": Samples("onnxruntime", (100.0, 100.0)),
        },
        control=control(4.0),
    )
    models = {label: Fake(dtype="torch.float32") for label in pair.samples}
    rows = runs.comparison_results(
        models, pair, {"eager": {"load_ms": 5.0}, "onnxruntime": {"load_ms": 50.0}}
    )
    environment = {
        "gpu": None,
        "cpu": "AMD EPYC",
        "threads": 1,
        "ram_gib": 23.5,
        "packages": {"torch": "2.14"},
    }
    table = runs.platform_table([completed(row, environment) for row in rows])
    assert table["engine"].tolist() == ["eager", "onnxruntime-cpu"]
    assert table["ratio_to_eager"].tolist() == [1.0, 3.0]
    assert table["noise_percent"].tolist() == [4.0, 4.0]
    assert table["load_ms"].tolist() == [5.0, 50.0]
    assert table["peak_memory_gib"].isna().all()  # memory that a load added is no peak
    assert table["machine"].tolist() == ["AMD EPYC, 1 thread"] * 2


def samples(label, *values):
    return Samples(label, values).to_dict()


GPU = {"gpu": {"name": "NVIDIA H200", "memory_gib": 139.8}, "cpu": "Xeon", "threads": 8, "packages": {}}


def test_recorded_engines_in_processes_of_their_own_keep_their_noise_and_memory():
    """Each engine had a process of its own, so noise and memory are its own too; one that failed makes no row."""
    for name in ("engines_dit_h200.json", "engines_vae_h200.json"):
        file = json.loads((RECORDED / name).read_text())
        ran = {engine: row for engine, row in file["engines"].items() if "samples" in row}
        table = runs.platform_table(recorded(name))
        assert table["engine"].tolist() == [{"onnxruntime": "onnxruntime-cuda"}.get(e, e) for e in ran]
        for column, key in (
            ("noise_percent", "noise_percent"),
            ("peak_memory_gib", "peak_gib"),
            ("load_ms", "load_ms"),
        ):
            assert table[column].tolist() == [row[key] for row in ran.values()]
        assert table["latency_ms"].tolist() == [row["samples"]["median_ms"] for row in ran.values()]
        assert set(table["what"]) == {f"{file['settings']['component']} forward"}


def test_recorded_loops_of_tvm_stand_beside_the_others():
    file = json.loads((RECORDED / "tvm_cpu.json").read_text())
    table = runs.platform_table(recorded("tvm_cpu.json")).set_index("engine")
    assert table.index.tolist() == ["eager", "onnxruntime-cpu", "tvm-llvm", "tvm-llvm (plain)"]
    build = next(row for row in file["builds"] if row["build"] == "tvm")
    assert table.loc["tvm-llvm", "build_ms"] == build["build_ms"]
    assert f"apache-tvm {build['tvm']}" in table.loc["tvm-llvm", "software"]
    assert table.loc["tvm-llvm", "latency_ms"] == file["samples"]["tvm"]["median_ms"]


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
    found, unread = runs.load_results([tmp_path])
    assert unread.empty
    kept, refused = runs.comparable(found, replace(EAGER, work=FORWARD))
    table = runs.platform_table(kept)
    assert table["ratio_to_eager"].tolist() == [1.0, 2.0]
    assert refused["reason"].tolist() == ["batch is 2, here 1"]


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
    record = read_file(result.save(tmp_path / "bench.json"))[0]
    assert record.time_ms == result.samples["latency"].median
    assert (record.work.frames, record.work.height, record.work.width) == (17, 128, 192)


def test_a_row_with_its_noise_is_better_than_a_newer_one_without():
    bare = replace(EAGER, noise_percent=None, taken="2026-12-01", median_ms=1.0)
    assert runs.platform_table([EAGER, bare])["latency_ms"].tolist() == [1000.0]


def test_what_holds_no_latency_is_said(tmp_path):
    for name, text in {"a.json": "[]", "b.json": "{", "c.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    found, unread = runs.load_results([tmp_path, tmp_path / "none.json"])
    assert found == []
    assert len(unread) == 4
    assert unread["reason"].str.contains("holds no result").sum() == 1


def test_rows_of_this_machine_survive_a_file(tmp_path):
    facts = {"eager": {"load_ms": None, "size_bytes": 7, "build_ms": None, "relative_l2": 0.0}}
    timed = {"eager": Samples("eager", (10.0, 11.0), "cpu")}
    rows = runs.call_results(FORWARD, timed, control(2.0), dtype="float32", facts=facts)
    made = [completed(row, measure.environment("cpu"), source="mine.jsonl") for row in rows]
    assert (made[0].time_ms, made[0].noise_percent, made[0].size_bytes) == (10.5, 2.0, 7)
    assert made[0].software["torch"]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(plain(row.to_dict())) + "\n" for row in made))
    assert read_file(path) == made


def test_an_engine_on_the_cpu_of_a_gpu_machine_is_on_the_cpu():
    environment = {
        "gpu": {"name": "NVIDIA H200", "memory_gib": 139.8},
        "cpu": "Xeon",
        "threads": 8,
        "ram_gib": 250.0,
    }
    assert machine_of(environment, engine="onnxruntime-cuda") == H200
    for place in ({"engine": "tvm-llvm"}, {"engine": "tvm-llvm (plain)"}, {"device": "cpu"}):
        machine = machine_of(environment, **place)
        assert (machine.name, machine.memory_gib) == ("Xeon, 8 threads", 250.0)


def test_the_verdict_tells_gains_losses_and_noise():
    slower = replace(FAST, engine="tvm-cuda", median_ms=2000.0)
    same = replace(FAST, engine="compiled", median_ms=1010.0)
    other = replace(EAGER, work=replace(WORK, steps=2))
    kept, refused = runs.comparable([EAGER, FAST, slower, same, other])
    answer = runs.platform_answer(runs.platform_table(kept), refused)
    assert faults(answer) == []
    assert answer.headline == (
        "On NVIDIA H200, ONNX Runtime is 2.00 times as fast as eager PyTorch (95 % interval unknown)."
    )
    others, fastest = answer.details[:2]
    assert "TVM is slower than eager PyTorch: 0.50 times as fast" in others
    assert "compiled PyTorch cannot be told from eager PyTorch in time: 0.99 times as fast" in others.replace(
        "C", "c", 1
    )
    assert fastest.startswith("Fastest of 4 rows of 1 machine: ONNX Runtime bfloat16 on NVIDIA H200, 500 ms.")
    assert runs.platform_notes(runs.platform_table(kept), refused) == "1 row refused as other work"


def test_engines_within_the_noise_are_said_to_be():
    same = [replace(EAGER, engine=engine, median_ms=1010.0) for engine in ("compiled", "onnxruntime")]
    table = runs.platform_table([EAGER, *same])
    answer = runs.platform_answer(table, table.iloc[:0])
    assert faults(answer) == []
    assert "compiled PyTorch cannot be told from eager PyTorch in time" in answer.headline
    assert answer.details[0].startswith("ONNX Runtime cannot be told from eager PyTorch in time")


def test_the_figure_leaves_out_what_was_not_run():
    built = replace(read_file(BUILDS)[0], build_ms=2500.0)
    figure = plots.platform_bars(runs.platform_table([EAGER, FAST, built]))
    assert figure.layout.xaxis.type == "log"
    assert [trace.x[0] for trace in figure.data] == [1000.0, 500.0]
    assert figure.layout.annotations[1].text == (
        "<b>500 ms</b> ONNX Runtime bfloat16 · 2.00× eager (unknown), NVIDIA H200"
    )
    with pytest.raises(WanlabError, match="missing: ratio_to_eager"):
        plots.platform_bars(runs.platform_table([EAGER]).drop(columns="ratio_to_eager"))


def test_an_answer_names_an_older_result_that_is_faster_than_the_newest():
    newest = replace(FAST, median_ms=500.0, taken="2026-02-01")
    older = replace(FAST, median_ms=400.0, taken="2026-01-01", source="run b")
    table = runs.platform_table([EAGER, newest, older])
    assert table["on_record_ms"].tolist() == [1000.0, 400.0]
    text = " ".join(runs.platform_answer(table, pd.DataFrame()).details)
    assert "500 ms; an older result of ONNX Runtime bfloat16 on NVIDIA H200 is faster, 400 ms." in text
    once = runs.platform_answer(runs.platform_table([EAGER, newest]), pd.DataFrame())
    assert "older" not in " ".join(once.details)


def test_a_row_beside_eager_of_another_pytorch_or_under_load_says_so():
    other = replace(FAST, software={"torch": "2.11"}, load=Load(others_percent=40.0))
    table = runs.platform_table([replace(EAGER, software={"torch": "2.10"}), other])
    assert "eager is of PyTorch 2.10, this of 2.11" in table["note"][1]
    assert "timed while other processes used 40 % of the processors" in table["note"][1]
    same = replace(EAGER, software={"torch": "2.11"}, median_ms=900.0, dtype="bfloat16")
    assert "PyTorch" not in runs.platform_table([same, other])["note"][1]
