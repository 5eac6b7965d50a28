"""Exploring a trace: selections whose sums are the trace's own, SQL that reads nothing else, questions, packed bytes."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diagnose_traces import event, launched, trace_of

from wanlab import diagnose, measure
from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import attribute, kernel_categories
from wanlab.diagnose.explorer.events import shape_text
from wanlab.diagnose.explorer.pack import pack
from wanlab.diagnose.explorer.questions import QUESTIONS

ROOF = measure.Ceilings("GPU", {"bf16": 100.0}, 1000.0, {"pinned": 50.0})
DIMS = {"Input Dims": [[64, 64], [64, 64]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}


def ranged(name, start, time):
    return event(name, start, time, "user_annotation")


def generation(folder, name="t.json", slow=1.0):
    """Two steps, one on each expert: attention, a product, a chain of pointwise kernels, and a copy after a pause."""
    events, link = [], 1
    for step, expert in enumerate(("expert_high", "expert_low")):
        at = 1000 * step
        events += [ranged(f"ProfilerStep#{step}", at, 1000), ranged(expert, at + 10, 600)]
        events += [ranged(f"{expert}.blocks.0.attn1", at + 20, 100)]
        events += [
            event("aten::mm", at + 25, 20, **DIMS),
            *launched("gemm", at + 30, at + 40, 60 * slow, link),
        ]
        events += [ranged(f"{expert}.blocks.0", at + 200, 200)]
        for k in range(3):
            events += [event("aten::mul", at + 205 + 10 * k, 8, **DIMS)]
            events += launched(f"elementwise_{k}", at + 206 + 10 * k, at + 250 + 30 * k, 20, link + 1 + k)
        copy = launched(
            "Memcpy DtoH (Device -> Pinned)", at + 700, at + 800, 50, link + 4, "gpu_memcpy", bytes=1 << 20
        )
        events += copy
        link += 5
    return trace_of(folder, *events, name=name)


@pytest.fixture
def view(tmp_path):
    return diagnose.explore(generation(tmp_path), ceilings=ROOF)


def test_an_event_knows_where_in_the_model_it_is(view):
    (row,) = view.select(step=1, name="gemm").to_dict("records")
    wanted = {
        "side": "gpu", "component": "expert_low", "category": "linear", "module": "expert_low.blocks.0.attn1",
        "shapes": "64×64, 64×64", "format": "bf16", "flop": 2 * 64**3, "moved_bytes": 3 * 64 * 64 * 2, "lane": "stream 7",
    }  # fmt: skip
    assert {key: row[key] for key in wanted} == wanted
    assert row["roofline_us"] == pytest.approx(3 * 64 * 64 * 2 / 1000e9 * 1e6)
    assert view.events.frame.loc[row["parent"], "name"] == "cudaLaunchKernel"


def test_conditions_are_met_together(view):
    assert set(view.select(component="expert_low", side="gpu").name) == {
        "gemm",
        *(f"elementwise_{k}" for k in range(3)),
    }
    assert len(view.select(module="expert_high.blocks.*.attn1", side="gpu")) == 1
    assert len(view.select(module="expert_high.blocks.0", side="gpu")) == 4
    assert len(view.select(search="ELEMENTWISE", step=[0, 1])) == 6
    cut = view.select(side="gpu", between=(50, 260))
    assert cut.set_index("name")["inside_us"].to_dict() == {"gemm": 50, "elementwise_0": 10}
    view.chosen = {"step": 1, "category": "linear"}
    assert view.selection[["step", "name"]].to_dict("records") == [{"step": 1, "name": "gemm"}]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"componnt": "x"}, "no condition 'componnt' (did you mean 'component'?)"),
        ({"component": "expert_lo"}, "no component is 'expert_lo' (did you mean 'expert_low'?)"),
        ({"between": (3, 1)}, "ends before it begins"),
    ],
)
def test_a_condition_that_cannot_be_is_told_in_one_line(view, condition, said):
    with pytest.raises(WanlabError) as refused:
        view.select(**condition)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=40)
@given(data=st.data())
def test_every_sum_of_a_selection_is_the_traces_own(tmp_path_factory, data):
    """Whatever overlaps: by component, step, category, lane and time, parts add up to the whole."""
    at, events = st.integers(0, 300), []
    for i in range(data.draw(st.integers(0, 10))):
        name = data.draw(st.sampled_from(["gemm", "fmha", "Memcpy HtoD (Pageable -> Device)", "elementwise"]))
        kind = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
        events += launched(
            name, data.draw(at), data.draw(at), data.draw(st.integers(0, 80)), i + 1, kind,
            stream=data.draw(st.integers(5, 7)),
        )  # fmt: skip
    for _ in range(data.draw(st.integers(0, 5))):
        name = data.draw(
            st.sampled_from(["expert", "expert.blocks.0.attn1", "vae_decoder", "ProfilerStep#1", "odd"])
        )
        events.append(ranged(name, data.draw(at), data.draw(st.integers(1, 90))))
    for _ in range(data.draw(st.integers(0, 5))):
        events.append(
            event(
                "aten::mm",
                data.draw(at),
                data.draw(st.integers(1, 90)),
                thread=data.draw(st.integers(1, 2)),
                **DIMS,
            )
        )
    trace = trace_of(tmp_path_factory.mktemp("t"), event("aten::add", 0, 200), *events)
    view, placed = diagnose.explore(trace, ceilings=ROOF), attribute(trace)
    frame = view.events.frame
    host, gpu = view.select(side="host"), view.select(side="gpu")
    assert host["own_us"].sum() == pytest.approx(diagnose.cpu_flame(trace, by_step=True).total_us)
    assert gpu["own_us"].sum() == pytest.approx(trace.kernels["time_us"].sum())
    assert (frame["own_us"] >= 0).all()
    if trace.has_gpu:
        spent = (
            pd.Series(trace.kernels["time_us"].to_numpy()).groupby(kernel_categories(trace, placed)[0]).sum()
        )
        mine = gpu.groupby(gpu["category"].cat.codes)["own_us"].sum()
        assert mine.to_dict() == pytest.approx(spent.to_dict())
    else:
        assert view.events.work["flop"].sum() == pytest.approx(placed.flop.sum())
        assert view.events.work["moved_bytes"].sum() <= placed.moved_bytes.sum() + 1e-6
    for column in ("component", "category", "lane", "kind"):
        parts = [view.select(**{column: value})["own_us"].sum() for value in frame[column].cat.categories]
        assert sum(parts) == pytest.approx(frame["own_us"].sum())
    edges = sorted({-1.0, 1000.0, *map(float, data.draw(st.lists(at, max_size=4)))})
    pieces = [view.select(between=pair)["inside_us"].sum() for pair in pairwise(edges)]
    assert sum(pieces) == pytest.approx(frame["own_us"].sum())
    wall = view.events.stretches.groupby("category", observed=True)["time_us"].sum() / 1e3
    rows = diagnose.breakdown(trace).frame.set_index("category")["time_ms"]
    assert wall.to_dict() == pytest.approx(rows[rows > 0].to_dict())


def test_sql_gives_the_same_sums(view):
    found = view.query("SELECT component, sum(own_us) AS own_us FROM work GROUP BY 1 ORDER BY 1")
    assert found.set_index("component")["own_us"].to_dict() == {
        "expert_high": 120,
        "expert_low": 120,
        "outside": 100,
    }
    assert view.query("SELECT sum(time_us) AS wall FROM stretches")["wall"][0] == pytest.approx(
        view.trace.wall_us
    )


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM glob('/*')",
        "COPY events TO '{file}'",
        "COPY (SELECT 1) TO '{file}'",
        "ATTACH '{file}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA enable_profiling",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW events",
        "SELECT 1; SELECT 2",
        "SELECT * FROM range(100000000000)",
        "SELECT * FROM view",
        "SELECT nothing FROM events",
        "SELEC 1",
        "",
    ],
)
def test_hostile_and_wrong_sql_is_refused_in_one_line(view, tmp_path, sql):
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    with pytest.raises(WanlabError) as refused:
        view.query(sql.format(file=file))
    assert "\n" not in str(refused.value)
    assert file.read_text() == "a\n1\n"
    assert len(view.query("SELECT * FROM work")) == 10


def test_a_query_without_an_end_is_stopped(view, monkeypatch):
    monkeypatch.setattr("wanlab.diagnose.explorer.view.SECONDS", 0.5)
    with pytest.raises(WanlabError, match="the query took over"):
        view.query(
            "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range % 7 = b.range % 5"
        )


def test_ready_questions_answer_what_they_say(view):
    gaps = view.ask("longest_gaps")
    first = gaps.iloc[0]
    assert (first["gap_us"], first["after"], first["waits_for"]) == (
        800 - 330,
        "elementwise_2",
        "launch_and_idle",
    )
    copies = view.ask("largest_copies")
    assert copies["moved_bytes"].tolist() == [2 << 20]
    assert copies["gb_per_s"].iloc[0] == pytest.approx((1 << 20) / 50 / 1e3)
    lost = view.ask("far_from_roofline").set_index("name")
    assert lost.loc["gemm", "lost_ms"] == pytest.approx((120 - 2 * 0.024576) / 1e3)
    fused = view.ask("not_fused")
    assert fused[["part", "chains", "kernels"]].to_dict("records") == [
        {"part": "expert.blocks.*", "chains": 2, "kernels": 3.0}
    ]
    assert fused["saves_ms"].iloc[0] == pytest.approx(2 * (60 - 0.024576) / 1e3)
    assert set(QUESTIONS) == {
        "longest_gaps",
        "largest_copies",
        "far_from_roofline",
        "steps_differ",
        "not_fused",
    }
    with pytest.raises(WanlabError, match=r"no question 'longest_gap' \(did you mean 'longest_gaps'"):
        view.ask("longest_gap")


def test_steps_are_compared_whatever_the_expert(tmp_path):
    trace = generation(tmp_path)
    view = diagnose.explore(trace)
    frame = view.events.frame
    frame.loc[(frame["name"] == "gemm") & (frame["step"] == 1), "own_us"] += 40
    found = view.ask("steps_differ")
    first = found.iloc[0]
    assert (first["part"], first["quick_step"], first["slow_step"], first["change_ms"]) == (
        "expert.blocks.*.attn1", 0, 1, pytest.approx(0.04)
    )  # fmt: skip
    assert found["change_ms"].iloc[1:].abs().max() < 1e-9


def test_what_changed_follows_the_selection(tmp_path):
    slow, quick = generation(tmp_path, slow=2.0), generation(tmp_path, "q.json")
    view = diagnose.explore(slow, quick)
    found = view.changes()
    assert found["change_ms"].sum() == pytest.approx(
        (quick.kernels["time_us"].sum() - slow.kernels["time_us"].sum()) / 1e3
    )
    assert found["module"].iloc[0].endswith("blocks.0.attn1")
    part = view.changes(step=1)
    assert part["change_ms"].sum() == pytest.approx(found["change_ms"].sum() / 2)
    stretch = view.changes(between=(0, 999))
    assert set(stretch["step"]) == {0}
    assert view.changes("part")["part"].iloc[0] == "expert.blocks.*.attn1"
    assert view.query("SELECT count(*) AS n FROM other_work")["n"][0] == 10
    with pytest.raises(WanlabError, match="needs a second trace"):
        diagnose.explore(slow).changes()


def test_packed_bytes_hold_what_the_table_holds(view):
    data = pack(view, compress=False)
    assert gzip.decompress(pack(view)) == data
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    (trace,) = header["traces"]
    at, columns = -(-(4 + length) // 8) * 8, {}
    for column in trace["columns"]:
        width = np.dtype(column["type"]).itemsize
        planes = np.frombuffer(data[at : at + width * column["count"]], np.uint8).reshape(width, -1)
        values = sum(plane.astype(np.int64) << 8 * k for k, plane in enumerate(planes))
        columns[column["name"]] = np.cumsum(values) % 256**width if column["delta"] else values
        at += width * column["count"]
    assert at == len(data)
    frame = view.events.frame
    start = (columns["start_low"] + (columns["start_high"] << 32)) / 1e3
    assert np.allclose(start, frame["start_us"], atol=1e-3)
    assert (columns["parent"] - 1 == frame["parent"]).all()
    assert [trace["words"]["name"][i] for i in columns["name"]] == list(frame["name"].astype(str))
    assert (columns["flop"].astype(np.uint32).view(np.float32) == frame["flop"].to_numpy(np.float32)).all()


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ('[[[2,3],[],[5]],["float"],[]]', "2×3, 5"),
        ('[[[[1,2],[3]]],["TensorList"],[]]', "[1×2, 3]"),
        ("", ""),
        ("no json", ""),
        ("[]", ""),
        ("7", ""),
    ],
)
def test_shapes_as_text(inputs, text):
    assert shape_text(inputs) == text


@pytest.mark.parametrize("name", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "wan2.2-ti2v-5b-compiled"])
def test_recorded_traces_are_explored(root, name):
    trace = diagnose.read_trace(root / "data" / "traces" / f"{name}.pt.trace.json.gz")
    view = diagnose.explore(trace)
    work = view.events.work
    assert work["own_us"].sum() == pytest.approx(trace.kernels["time_us"].sum())
    assert work["flop"].sum() == pytest.approx(attribute(trace).flop.sum())
    shares = diagnose.breakdown(trace).frame
    assert work["moved_bytes"].sum() / 1e9 == pytest.approx(shares["moved_gb"].sum())
    assert view.events.stretches["time_us"].sum() == pytest.approx(trace.wall_us)
    assert all(len(view.ask(question)) for question in QUESTIONS)
    assert len(view.answer().headline) <= 240
