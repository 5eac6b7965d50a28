"""Reports of Nsight Systems as traces: kernels below modules and operators, copies, graphs, and what cannot be read."""

from __future__ import annotations

import sqlite3

import pytest
from support.nsys_report import NsysReport

from wanlab import diagnose, measure
from wanlab.core.errors import WanlabError

MM = "aten::mm, op_id = 5, sizes = [[64, 64], [64, 64]], input_op_ids = [[3, 0], [4, 0]]"


def generation(path, **changes):
    report = NsysReport(path, **changes)
    report.range("ProfilerStep#0", 0, 1000)
    report.range("expert_high, op_id = 1", 10, 600)
    report.range("expert_high.blocks.0.attn1, op_id = 2", 20, 100)
    report.range(MM, 25, 20)
    report.launched("void gemm<float>(int)", 30, 40, 60)
    report.launched("void at::native::elementwise_kernel<128>()", 200, 250, 20)
    report.launched("", 700, 800, 50, "MEMCPY", bytes=1 << 20, copyKind=2, srcKind=2, dstKind=1)
    report.row("TARGET_INFO_GPU", id=0, name="NVIDIA H200", totalMemory=150_000_000_000)
    return report


@pytest.fixture
def trace(tmp_path):
    return diagnose.read_trace(generation(tmp_path / "run.sqlite").closed())


def test_kernels_stand_below_the_modules_and_operators_that_launched_them(trace):
    view = diagnose.explore(trace, ceilings=measure.Ceilings("GPU", {}, 1000.0, {}))
    (row,) = view.select(name="void gemm<float>(int)").to_dict("records")
    wanted = {
        "component": "expert_high", "module": "expert_high.blocks.0.attn1", "category": "linear", "step": 0,
        "time_us": 60, "shapes": "64×64, 64×64", "flop": 2 * 64**3, "lane": "stream 3",
    }  # fmt: skip
    assert {key: row[key] for key in wanted} == wanted
    assert view.events.frame.loc[row["parent"], "name"] == "cudaLaunchKernel"
    names = view.select(side="host", kind="user_annotation")["name"]
    assert set(names) == {"ProfilerStep#0", "expert_high", "expert_high.blocks.0.attn1"}
    assert set(view.select(side="host", kind="cpu_op")["name"]) == {"aten::mm"}


def test_times_add_up_and_copies_have_their_direction_and_size(trace):
    shares = diagnose.breakdown(trace)
    assert shares.frame["time_ms"].sum() == pytest.approx(1.0)
    assert shares.share_percent("linear") == pytest.approx(6.0)
    copies = trace.of("gpu_memcpy")
    assert copies["name"].tolist() == ["Memcpy DtoH (Device -> Pinned)"]
    assert copies["size_bytes"].tolist() == [1 << 20]
    assert shares.share_percent("host_device_transfer") == pytest.approx(5.1)  # with the call that started it
    assert (trace.device_name, trace.device_bytes) == ("NVIDIA H200", 150_000_000_000)
    assert diagnose.gpu_flame(trace).total_us == pytest.approx(130)


def test_what_is_no_part_of_the_nest_is_left_out_and_said(tmp_path):
    report = generation(tmp_path / "run.sqlite")
    report.range("NCCL", 0, 0, kind=75, domain=2)
    report.range("ncclAllReduce", 30, 5, domain=2)
    report.range("prefetch", 5, 900, kind=60)
    report.launched("", 900, 905, 40, "GRAPH_TRACE", graphId=9)
    trace = diagnose.read_trace(report.closed())
    notes = " ".join(trace.notes)
    assert "ranges of libraries are left out: 1 of NCCL" in notes
    assert "ranges that need not nest (nvtxRangeStart) are left out: 1" in notes
    assert "--cuda-graph-trace=node" in notes
    assert "CUDA graph 9" in set(trace.kernels["name"])
    assert not {"ncclAllReduce", "prefetch"} & set(trace.host["name"])


def test_a_kernel_belongs_to_the_call_of_its_own_process(tmp_path):
    report = NsysReport(tmp_path / "run.sqlite")
    for process, expert in ((7, "expert_high"), (8, "expert_low")):
        report.range(expert, 0, 100, process=process)
        report.launched(f"kernel_{process}", 10, 20, 30, process=process, correlation=5)
    trace = diagnose.read_trace(report.closed())
    work = diagnose.explore(trace).events.work.set_index("name")
    assert work["component"].to_dict() == {"kernel_7": "expert_high", "kernel_8": "expert_low"}
    assert any("2 processes in one report" in note for note in trace.notes)


OPTIONAL = (
    "NVTX_EVENTS",
    "CUPTI_ACTIVITY_KIND_MEMSET",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
    "TARGET_INFO_GPU",
    "ENUM_CUDA_MEM_KIND",
)


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_table_that_was_not_recorded_counts_as_empty(tmp_path, missing):
    path = generation(tmp_path / "run.sqlite").closed()
    with sqlite3.connect(path) as database:
        database.execute(f"DROP TABLE {missing}")
    trace = diagnose.read_trace(path)
    assert trace.kernels["time_us"].sum() == pytest.approx(130)
    assert diagnose.breakdown(trace).frame["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)


def test_columns_of_another_version_and_odd_values_do_no_harm(tmp_path):
    path = generation(tmp_path / "run.sqlite").closed()
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN globalPid")
        database.execute("UPDATE NVTX_EVENTS SET text = CAST(x'ff41' AS TEXT) WHERE text LIKE 'Profiler%'")
        database.execute(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, text) VALUES ('soon', x'00', 59, NULL)"
        )
        database.execute("INSERT INTO NVTX_EVENTS (start, end, eventType, text) VALUES (5, NULL, 59, 'open')")
    trace = diagnose.read_trace(path)
    assert len(trace.kernels) == 3
    assert any("2 without a start or a duration" in note for note in trace.cautions)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.sqlite", b"SQLite format 3\0" + b"\0" * 200, "nsys export --type sqlite"),
        (
            "run.nsys-rep",
            b"QDREP",
            "is a report of Nsight Systems; export it: nsys export --type sqlite run.nsys-rep",
        ),
        ("run.sqlite", None, "has no kernels, calls of CUDA or ranges"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE t (x)")
    else:
        path.write_bytes(content)
    with pytest.raises(WanlabError) as refused:
        diagnose.read_trace(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_with_one_report_is_read(tmp_path):
    generation(tmp_path / "run.sqlite").closed()
    assert len(diagnose.read_trace(tmp_path).kernels) == 3
