"""The log of torch.compile: graph breaks and recompilations with their source lines, and the kernels of a graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from wanlab import diagnose
from wanlab.core.errors import WanlabError

PROGRAM = """
import torch

class Block(torch.nn.Module):
    def forward(self, x):
        x = x + 1
        print("a graph break")
        return torch.relu(x) * 2

block = torch.compile(Block(), backend="eager")
for rows in (3, 4):
    block(torch.ones(rows, 8))
block(torch.ones(2, 3, 8))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The log that the installed PyTorch writes of a program."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "program.py").write_text(PROGRAM)
    subprocess.run(
        [sys.executable, str(folder / "program.py")],
        env=os.environ | {"TORCH_TRACE": str(folder / "log")},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return diagnose.read_compile_log(folder / "log")


def test_graph_breaks_and_recompilations_have_their_source_lines(log):
    (broken,) = log.breaks.to_dict("records")
    assert broken["source"].endswith("/program.py:7")
    assert "print" in broken["reason"]
    assert broken["hint"]
    assert broken["compilations"] == 3
    first = log.compilations[log.compilations["function"] == "forward"]
    assert [source.rpartition("/")[2] for source in first["source"]] == ["program.py:5"] * 3
    assert first["recompiled_because"].iloc[0] == ""
    assert "size mismatch" in first["recompiled_because"].iloc[1]
    assert "rank mismatch" in first["recompiled_because"].iloc[2]
    assert (log.compilations["compile_s"] > 0).all()
    assert (log.compilations["failed_because"] == "").all()


def test_one_table_has_what_happened_where_and_why(log, root):
    trace = diagnose.read_trace(root / "tests" / "fixtures" / "traces" / "cuda_graph.pt.trace.json.gz")
    table = log.table(trace)
    assert table["what"].iloc[0] == "graph break"
    assert table["times"].iloc[0] == 3
    assert set(table["what"]) == {"graph break", "compiled", "compiled again"}
    again = table[table["what"] == "compiled again"]
    assert again["why"].str.contains("mismatch").all()
    assert diagnose.compiler_table(None, trace) is None


def test_what_it_comes_to_is_said_in_a_sentence(log):
    again = (log.compilations["recompiled_because"] != "").sum()
    assert f"{again} of them again because a guard failed" in log.sentence
    assert "Graphs break at 1 source line." in log.sentence


def record(value: dict, payload: str = "") -> str:
    text = json.dumps(value | {"frame_id": 0, "frame_compile_id": 0})
    below = "".join(f"\t{line}\n" for line in payload.splitlines())
    return f"V1202 15:15:42.465000 24707 torch/_dynamo/utils.py:2363] {text}\n{below}"


METRICS = {
    "co_name": "forward",
    "co_filename": "/x/site-packages/diffusers/t.py",
    "co_firstlineno": 5,
    "graph_op_count": 3,
}


def test_a_compilation_is_joined_to_its_kernels_in_a_trace(root, tmp_path):
    trace = diagnose.read_trace(root / "data" / "traces" / "wan2.2-ti2v-5b-compiled.pt.trace.json.gz")
    (name,) = [n for n in trace.host["name"].cat.categories if "CompiledFxGraph" in n]
    key = name.split()[3]
    path = tmp_path / "one.log"
    path.write_text(
        record({"artifact": {"name": "fx_graph_cache_hit", "encoding": "json"}}, json.dumps({"key": key}))
        + record({"compilation_metrics": METRICS | {"entire_frame_compile_time_s": 20.5}})
    )
    log = diagnose.read_compile_log(path)
    (row,) = log.kernels(trace).to_dict("records")
    assert (row["compile_id"], row["source"]) == ("0/0", "diffusers/t.py:5")
    assert row["calls"] == (trace.host["name"] == name).sum()
    # The kernels are those below the graph's ranges in the explorer's table.
    work = diagnose.explore(trace).events.work
    inside = work[work["module"].astype(str) == name]
    assert (row["kernels"], row["time_ms"]) == (len(inside), pytest.approx(inside["time_us"].sum() / 1e3))
    assert row["kernels"] > 1000
    (shown,) = log.table(trace).to_dict("records")
    assert (shown["what"], shown["kernels"], shown["time_ms"]) == ("compiled", row["kernels"], row["time_ms"])


def test_a_failed_compilation_is_said(tmp_path):
    (tmp_path / "one.log").write_text(record({"compilation_metrics": METRICS | {"fail_reason": "no\nC++"}}))
    log = diagnose.read_compile_log(tmp_path)
    assert log.compilations["failed_because"].tolist() == ["no"]
    assert log.sentence.endswith("1 compilation failed and runs eagerly.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no log (.log) in"),
        ("hello\n\tworld\n", "is no log of torch.compile"),
        ("", "is no log of torch.compile"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "one.log").write_text(content)
    with pytest.raises(WanlabError) as refused:
        diagnose.read_compile_log(tmp_path)
    assert said in str(refused.value)
    with pytest.raises(WanlabError, match="cannot read"):
        diagnose.read_compile_log(tmp_path / "missing.log")


def test_damaged_records_are_passed_over(tmp_path):
    good = record({"compilation_metrics": METRICS})
    (tmp_path / "one.log").write_bytes(
        good.encode() + good.encode()[:90] + b'"compilation_metrics"\xff{]\n' + b"\t\xfe\n"
    )
    assert len(diagnose.read_compile_log(tmp_path).compilations) == 1
