"""Chrome traces: what is in the file is in the columns, and a bad file is named with its fault."""

from __future__ import annotations

import gzip
import json

import pytest

from wanlab import diagnose
from wanlab.core.errors import WanlabError

OPERATOR = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 2, "ts": 100.5, "dur": 10.0}
LAUNCH = {
    "ph": "X",
    "cat": "cuda_runtime",
    "name": "cudaLaunchKernel",
    "pid": 1,
    "tid": 2,
    "ts": 102.0,
    "dur": 2.0,
}
KERNEL = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 108.0, "dur": 30.0}
LINKED = {"args": {"correlation": 5, "stream": 7}}


def written(path, content) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_events_become_columns(tmp_path, name):
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        OPERATOR,
        LAUNCH | LINKED,
        KERNEL | LINKED,
    ]
    trace = diagnose.read_trace(
        written(tmp_path / name, {"traceEvents": events, "distributedInfo": {"rank": 3}})
    )
    assert list(trace.events["name"]) == ["aten::mm", "cudaLaunchKernel", "gemm"]
    assert list(trace.events["start_us"]) == [0.0, 1.5, 7.5]
    assert trace.rank == 3
    assert trace.wall_us == 37.5
    assert trace.has_gpu
    assert list(trace.kernels["correlation"]) == [5]
    assert trace.notes == ()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ('{"traceEvents": [{"ph": "X"', "cut off or not JSON"),
        ("[1, 2]", "not a profiler trace"),
        ('{"a": 1}', "not a profiler trace"),
        ({"traceEvents": []}, "no complete events"),
        ({"traceEvents": [{"ph": "M", "name": "x"}]}, "no complete events"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, content, complaint):
    with pytest.raises(WanlabError, match=complaint) as error:
        diagnose.read_trace(written(tmp_path / "bad.json", content))
    assert "bad.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cut_off_archive_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [OPERATOR] * 500}).encode())[:-20])
    with pytest.raises(WanlabError, match="cut off or damaged"):
        diagnose.read_trace(path)
    with pytest.raises(WanlabError, match=r"no trace .*nowhere\.json"):
        diagnose.read_trace(tmp_path / "nowhere.json")


def test_what_a_trace_lacks_is_said(tmp_path):
    cpu = diagnose.read_trace(written(tmp_path / "cpu.json", {"traceEvents": [OPERATOR]}))
    assert "no GPU events" in cpu.notes[0]
    unlinked = diagnose.read_trace(written(tmp_path / "unlinked.json", {"traceEvents": [OPERATOR, KERNEL]}))
    assert "no correlation id" in unlinked.notes[0]
    graph = LAUNCH | {"name": "cudaGraphLaunch"} | LINKED
    graphs = diagnose.read_trace(written(tmp_path / "graph.json", {"traceEvents": [graph, KERNEL | LINKED]}))
    assert "CUDA graphs" in graphs.notes[0]
