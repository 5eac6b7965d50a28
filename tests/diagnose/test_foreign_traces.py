"""Traces of other programs, other accelerators and damaged files: read as their owner means them, or refused in one line."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from support.diagnose_traces import event, launched, trace_of
from support.foreign_traces import EPOCH, TRACES, work, write, zipped

from wanlab import diagnose
from wanlab.core.errors import WanlabError
from wanlab.diagnose.trace import launchers
from wanlab.diagnose.trace_events import plausible

REFUSED = {
    "Ascend NPU": "'Ascend Hardware'",
    "Meta MTIA": "'mtia_ccp_events'",
    "XLA": "'/device:TPU:0'",
    "launches, but no kernels": "launches of work on an accelerator",
}
HOST_ONLY = "a GPU in the machine, no events of it"
SAME = {"linear": 40, "norm_modulation_rotary": 30, "host_device_transfer": 20, "launch_and_idle": 10}


def shares(trace) -> dict[str, int]:
    frame = diagnose.breakdown(trace).frame
    return {row.category: round(row.time_ms * 1e3) for row in frame.itertuples()}


@pytest.mark.parametrize("name", [name for name in TRACES if name not in (*REFUSED, HOST_ONLY)])
def test_the_same_work_has_the_same_shares_however_it_is_written(tmp_path, name):
    trace = diagnose.read_trace(write(tmp_path, name))
    assert shares(trace) == SAME
    flames = diagnose.flames(trace)
    assert flames.gpu.total_us == pytest.approx(90)
    assert flames.cpu.wall_us == pytest.approx(100)
    small = diagnose.read_trace(diagnose.trim(trace.path, tmp_path / "small.json.gz", shortest_us=0))
    assert shares(small) == SAME


@pytest.mark.parametrize(("name", "complaint"), REFUSED.items())
def test_work_of_an_unknown_accelerator_is_named_and_not_told_as_idle(tmp_path, name, complaint):
    with pytest.raises(WanlabError, match=complaint) as error:
        diagnose.read_trace(write(tmp_path, name))
    assert "not diagnosed" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_begin_without_an_end_is_counted(tmp_path):
    opened = event("aten::add", EPOCH + 60, 5) | {"ph": "B"}
    trace = trace_of(tmp_path, *work(), {key: value for key, value in opened.items() if key != "dur"})
    assert shares(trace) == SAME
    assert any("1 without a start or a duration" in note for note in trace.notes)


def test_kernels_of_two_processes_with_the_same_numbers_are_below_their_own_calls(tmp_path):
    later = [e | {"ts": e["ts"] + 200, "pid": 2 if e["tid"] == 1 else 1} for e in work()]
    trace = trace_of(tmp_path, *work(), *later)
    calls = trace.host.iloc[launchers(trace.host, trace.kernels)]
    assert (calls["start_us"].to_numpy() // 200 == trace.kernels["start_us"].to_numpy() // 200).all()
    assert any("same correlation ids" in note for note in trace.notes)


def test_a_step_is_known_by_its_category_too(tmp_path):
    trace = trace_of(tmp_path, *work(), event("ProfilerStep#3", EPOCH, 100, "ProfilerStep"))
    assert trace.steps["step"].tolist() == [3]


def test_a_gpu_without_events_is_said_and_not_diagnosed(tmp_path):
    trace = diagnose.read_trace(write(tmp_path, HOST_ONLY))
    assert "times of the host alone: the file lists NVIDIA A100" in str(diagnose.breakdown(trace))
    with pytest.raises(WanlabError, match="capture it again with ProfilerActivity"):
        diagnose.traced_measurements(trace)
    own = trace_of(
        tmp_path, event("aten::mm", 0, 5), deviceProperties=[{"name": "A100"}], wanlab={"device": "cpu"}
    )
    assert not own.cautions  # the capture says that the model ran on the CPU


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("time 0 in one event", "1 at time 0"),
        ("a duration that is negative", "1 of negative duration"),
        ("a duration that is missing", "1 without a start or a duration"),
        ("a duration of a year", "1 longer than a day"),
        ("a category of another tool beside the kernels", "'dataloader' (1 event, 0.06 ms)"),
    ],
)
def test_what_is_left_out_is_counted_in_the_headline(tmp_path, name, said):
    trace = diagnose.read_trace(write(tmp_path, name))
    assert said in str(diagnose.breakdown(trace))
    assert any(said in note for note in trace.notes)


def test_a_pause_of_minutes_is_a_pause_and_an_epoch_is_not():
    start = np.array([0.0, 0.0, 1e9, 1e9 + 30, 1e9 + 40])
    sound, reasons = plausible(start, np.full(5, 10.0))
    assert sound.tolist() == [False, False, True, True, True]
    assert reasons == {"at time 0": 2}
    calm = np.array([5.0, 10.0, 600e6, 601e6])  # ten minutes in which nothing was recorded
    assert plausible(calm, np.full(4, 1.0))[0].all()
    assert plausible(np.array([np.nan, 1.0]), np.array([1.0, np.inf]))[0].tolist() == [False, False]


def test_all_events_with_impossible_times_are_a_refusal(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": [event("aten::mm", EPOCH, -5)] * 3}))
    with pytest.raises(WanlabError, match=r"no event with times that can be.*3 of negative duration"):
        diagnose.read_trace(path)
    path.write_text(json.dumps({"traceEvents": [event("aten::mm", EPOCH, 0)]}))
    with pytest.raises(WanlabError, match="last 0 µs"):
        diagnose.read_trace(path)


def test_older_ranges_and_shapes_are_found(tmp_path):
    trace = diagnose.read_trace(write(tmp_path, "Kineto of 2021"))
    assert len(trace.steps) == 1
    assert trace.device_name == "Tesla V100"
    assert any("older Kineto" in note for note in trace.notes)
    frame = diagnose.breakdown(trace).frame.set_index("category")
    assert frame.loc["linear", "tflop"] * 1e12 == pytest.approx(2 * 2 * 3 * 5)


def test_single_backslashes_stand_for_themselves(tmp_path):
    trace = diagnose.read_trace(write(tmp_path, "paths of Windows with single backslashes"))
    assert r"torch\nn\modules\linear.py(219): forward" in set(trace.events["name"])
    assert any("repaired" in note for note in trace.notes)


def test_a_folder_may_hold_other_files(tmp_path):
    write(tmp_path, "torch.profiler on CUDA")
    (tmp_path / "settings.json").write_text('{"steps": 4}')
    trace = diagnose.read_trace(tmp_path)
    assert trace.path.name == "trace.json"
    assert any("settings.json is left out" in note for note in trace.notes)
    trace.path.unlink()
    with pytest.raises(WanlabError, match="not a profiler trace"):
        diagnose.read_trace(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"' * 100_000, "not a profiler trace"),
        (b'["\\' * 50_000, "trace"),
        (zipped(a__txt=b"1"), "hold one .json"),
        (zipped(a__json=b"{}", b__json=b"{}"), "a.json, b.json"),
        (TRACES["a zip"][:-40], "cut off or damaged"),
        (gzip.compress(TRACES["torch.profiler on CUDA"])[:-20], "cut off or damaged"),
        (b"\x1f\x8b" + bytes(100), "cut off or damaged"),
        (b"\xff\xfe" + b"a", "not JSON"),
        (b'{"traceEvents": {"a": 1}}', "not a profiler trace"),
    ],
)
def test_damaged_and_deep_files_are_one_line(tmp_path, content, complaint):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(WanlabError, match=complaint) as error:
        diagnose.read_trace(path)
    assert "\n" not in str(error.value)


def test_a_small_file_that_unpacks_to_a_large_one_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("wanlab.core.packed.SUSPECT", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * (16 << 20)))
    with pytest.raises(WanlabError, match=r"bomb.*limit of 100; WANLAB_LIMITS='packed_ratio=\d+' raises it"):
        diagnose.read_trace(path)
    monkeypatch.setenv("WANLAB_LIMITS", "packed_ratio=5000,trace_mib=4")
    with pytest.raises(WanlabError, match=r"over the limit of 4 MiB; WANLAB_LIMITS='trace_mib="):
        diagnose.read_trace(path)
    monkeypatch.setenv("WANLAB_LIMITS", "json_objects=10")
    with pytest.raises(WanlabError, match="objects of JSON: 19 is over"):
        diagnose.read_trace(write(tmp_path, "torch.profiler on CUDA"))


ODD = [None, 10**30, -1, 1e300, "x", [], {}, True, "0x1f", [[10**400]], "\u0000"]


@pytest.mark.parametrize("field", ["ph", "cat", "name", "pid", "tid", "ts", "dur", "args"])
def test_fields_of_other_types_cost_only_their_event(tmp_path, field):
    odd = [event("aten::add", EPOCH + 60, 5) | {field: value} for value in ODD]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": [*work(), *odd]}))
    found = diagnose.breakdown(diagnose.read_trace(path))
    assert found.frame.set_index("category")["time_ms"]["linear"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    "name",
    ["correlation", "stream", "bytes", "Input Dims", "Input type", "Concrete Inputs", "Device Type", "Addr"],
)
def test_arguments_of_other_types_are_unknown(tmp_path, name):
    events = [e | {"args": e["args"] | {name: value}} for value in ODD for e in work()]
    operators = [
        event(
            "aten::convolution",
            EPOCH,
            9,
            **{"Input Dims": [[1, 2], []], "Input type": ["float"], name: value},
        )
        for value in ODD
    ]
    blocks = [
        event("[memory]", EPOCH + i, 0, "cpu_instant_event", **{"Bytes": 512, name: value})
        for i, value in enumerate(ODD)
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": [*events, *operators, *blocks]}))
    trace = diagnose.read_trace(path)
    assert diagnose.breakdown(trace).gpu["busy_percent"] == pytest.approx(90, abs=0.1)
    assert diagnose.memory_account(trace).peak_bytes > 0


def test_descriptions_of_other_types_are_left_out(tmp_path):
    content = {
        "wanlab": {"settings": 3},
        "distributedInfo": [1],
        "deviceProperties": "x",
        "trimmed": {"a": 1},
    }
    trace = trace_of(tmp_path, *work(), **content)
    assert (trace.generation, trace.rank, trace.devices) == ({}, None, ())
    assert sum("cannot be read" in note for note in trace.notes) == 4


def test_a_planted_trace_with_overlapping_streams_is_exact(tmp_path):
    """Every kernel is half beside the next one, on another stream; each moment counts once, for the row that goes first."""
    count, events = 2_000, []
    for i in range(count):
        at = 100 * i
        kinds = [("fmha", 0), ("gemm", 20), ("elementwise", 40)]
        for stream, (name, shift) in enumerate(kinds):
            events += launched(name, at + stream, at + shift, 40, 3 * i + stream + 1, stream=stream)
    trace = trace_of(tmp_path, event("aten::zeros", 0, 1), *events, event("aten::zeros", 100 * count - 1, 1))
    expected = {"self_attention": 40, "linear": 20, "norm_modulation_rotary": 20, "launch_and_idle": 20}
    assert shares(trace) == {name: time * count for name, time in expected.items()}
    frame = diagnose.breakdown(trace).frame.set_index("category")
    assert (frame["hidden_ms"] * 1e3 / count).round(6).to_dict() == {
        "self_attention": 0,
        "linear": 20,
        "norm_modulation_rotary": 20,
        "launch_and_idle": 0,
    }


def deep(count: int) -> list[dict]:
    return [event("aten::add", i, 2 * count - 2 * i) for i in range(count)]


def test_calls_nested_thousands_deep_take_no_longer(tmp_path):
    trace = trace_of(tmp_path, *deep(20_000))
    assert diagnose.breakdown(trace).frame["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)


def expert_trace(tmp_path, *, layers: int, width: int, model: str | None = None):
    """One forward of an expert: a query projection in each block, and a feed-forward layer that is not square."""
    events = [event("expert_high", 0, 10 * layers, "user_annotation")]
    for i in range(layers):
        events += [
            event(f"expert_high.blocks.{i}.attn1.to_q", 10 * i, 9, "user_annotation"),
            event("aten::linear", 10 * i, 4, **{"Input Dims": [[7, width], [width, width], [width]]}),
            event("aten::linear", 10 * i + 5, 4, **{"Input Dims": [[7, width], [4 * width, width], []]}),
        ]
    return trace_of(tmp_path, *events, wanlab={"model": model, "device": "cpu"} if model else {})


def test_a_trace_of_another_model_is_named_by_layers_and_width(tmp_path):
    named = "wan-nano (6 layers of width 192)"
    other = expert_trace(tmp_path, layers=8, width=256)
    assert str(diagnose.traced_model(other)) == "an unnamed model (8 layers of width 256)"
    said = f"The trace is of an unnamed model (8 layers of width 256), not of {named}. "
    assert diagnose.trace_caveat(other, "wan-nano") == said
    renamed = expert_trace(tmp_path, layers=8, width=256, model="wan-nano")
    said = f"The trace names {named}, but what ran in it is a model (8 layers of width 256). "
    assert diagnose.trace_caveat(renamed, "wan-nano") == said
    assert "not of no-such-model" in diagnose.trace_caveat(renamed, "no-such-model")


def test_a_trace_of_the_named_model_has_no_caveat(tmp_path):
    own = expert_trace(tmp_path, layers=6, width=192, model="wan-nano")
    assert diagnose.trace_caveat(own, "wan-nano") == ""
    assert diagnose.trace_caveat(own) == ""
    bare = trace_of(tmp_path, event("aten::mm", 0, 5))
    assert diagnose.trace_caveat(bare, "wan-nano") == ""  # nothing speaks against it


def test_a_gpu_of_impossible_memory_is_left_out_and_said(tmp_path):
    gpus = [{"name": "GPU", "totalGlobalMem": 10**400}]
    trace = trace_of(tmp_path, event("aten::mm", 0, 5), deviceProperties=gpus)
    assert any("its GPUs cannot be read" in note for note in trace.notes)
    assert dict(trace.facts().to_numpy())["gpu_memory_gib"] == "None"


@pytest.mark.parametrize(("head_size", "said"), [(64, ""), (128, "it is of another model")])
def test_a_trace_of_another_model_is_noticed_by_its_attention_kernels(tmp_path, head_size, said):
    kernel = f"void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<{head_size}, 128, 64, 4>>"
    trace = trace_of(tmp_path, *launched(kernel, 0, 2, 50, 1))
    assert said in diagnose.trace_caveat(trace, "wan-nano")  # its heads have 48 channels
    assert bool(diagnose.trace_caveat(trace, "wan-nano")) == bool(said)


def test_a_trace_that_is_a_part_of_its_generation_is_said(tmp_path):
    part = trace_of(tmp_path, event("aten::mm", 0, 5000), wanlab={"wall_ms": 8.0, "device": "cpu"})
    said = str(diagnose.profile_answer(diagnose.breakdown(part)))
    assert "The rows add up to 5 ms, but the generation took 8 ms" in said


def test_steps_are_those_of_the_video(tmp_path):
    """A capture of 3 steps has a fourth step of the profiler for what comes after."""
    steps = [event(f"ProfilerStep#{i}", 10 * i, 10, "user_annotation") for i in range(4)]
    blocks = [
        event("[memory]", 10 * i + 5, 0, "cpu_instant_event", **{"Bytes": 512, "Addr": i + 1})
        for i in range(4)
    ]
    trace = trace_of(tmp_path, *steps, *blocks, wanlab={"settings": {"steps": 3}, "device": "cpu"})
    assert dict(trace.facts().to_numpy())["steps"] == "3"
    assert diagnose.memory_account(trace).churn["step"].tolist() == [0, 1, 2]


def said_of(path) -> str:
    """What wanlab says of a trace: what is left out or limited, or why it is refused; without the path."""
    try:
        trace = diagnose.read_trace(path)
    except WanlabError as error:
        return f"refused: {str(error).removeprefix(f'{path} ')}"
    return "; ".join(["read", *trace.notes])


def test_the_docs_say_what_is_said(tmp_path, root):
    rows = [f"| {name} | {said_of(write(tmp_path, name))} |" for name in TRACES]
    table = "\n".join(["| trace | what wanlab says |", "|---|---|", *rows])
    docs = (root / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    assert table in docs, f"the table of docs/diagnosis.md is to be:\n{table}"
