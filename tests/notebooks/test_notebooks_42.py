"""42_component: one network by every engine and plan, with its control, memory, kernels and bounds."""

from __future__ import annotations

import json

import pytest

from wanlab.runs import load_results

pytestmark = pytest.mark.notebook


def results(run) -> dict:
    """Engine and plan -> typed row."""
    rows, unread = load_results(run.folder)
    assert not len(unread)
    return {f"{row.engine} {row.plan or ''}".strip(): row for row in rows}


@pytest.fixture(scope="module")
def default(run_notebook, outputs):
    given = (f"files={outputs / 'configured'}", "rounds=3", "limit_s=0.1")
    return run_notebook("42_component", *(word for each in given for word in ("-p", each)))


def test_two_engines_are_timed_in_turn_and_held_against_each_other(default):
    rows = {row["candidate"]: row for row in default.values["candidates"]}
    assert list(rows) == ["eager", "onnxruntime"]
    assert rows["eager"]["verdict"] == "baseline"
    fast = rows["onnxruntime"]
    assert fast["low"] <= fast["speedup"] <= fast["high"]
    assert fast["speedup"] == pytest.approx(rows["eager"]["time_ms"] / fast["time_ms"])
    assert fast["relative_l2"] < 1e-5
    assert fast["cosine"] == pytest.approx(1)
    assert (rows["eager"]["effect"], fast["effect"]) == ("baseline", "applied")
    assert "nodes on CPUExecutionProvider" in fast["proof"]
    assert default.values["left_out"] == {}
    for row in rows.values():
        assert row["peak_memory_gib"] > row["weights_gib"] > 0.01
        assert row["load_ms"] > 0
        assert row["of_roofline_percent"] > 0
    assert rows["eager"]["roofline_ms"] == fast["roofline_ms"]
    kinds = {(row["candidate"], row["kind"]) for row in default.values["kinds"]}
    assert kinds >= {("eager", "linear"), ("eager", "attention"), ("onnxruntime", "linear")}
    assert len(default.page.select("div.figure[data-figure]")) == 4
    assert default.record["verdict"].startswith("High-noise expert: ONNX Runtime ")
    assert "wan-nano at 5x64x64 in float32 on the CPU." in default.answer
    assert "Timed in turn: 6 pairs in " in default.answer


def test_the_typed_rows_are_what_was_measured(default):
    found = results(default)
    assert set(found) == {"eager", "onnxruntime"}
    row = found["onnxruntime"]
    assert (row.work.component, row.work.frames, row.work.weights) == ("expert_high", 5, "pretrained")
    assert len(row.samples_ms) == 6
    shown = {each["candidate"]: each for each in default.values["candidates"]}["onnxruntime"]
    assert row.time_ms == pytest.approx(shown["time_ms"])
    assert row.figures["speedup"] == pytest.approx(shown["speedup"])
    assert row.figures["kernel_linear_ms"] > 0


def test_a_plan_that_is_not_applied_and_an_engine_that_is_not_here_are_said(run_notebook, outputs, tmp_path):
    """The plan has rules for the other expert alone; TensorRT needs a GPU. The rest still runs."""
    plan = tmp_path / "other-expert.yaml"
    plan.write_text("name: other-expert\nrules:\n- component: expert_low\n  format: int8-weight\n")
    given = (
        "engines=['eager', 'tensorrt']", f"plans=['default', 'uniform-int8-weight', '{plan}']", "rounds=1",
        "limit_s=0.1", f"files={outputs / 'configured'}", "float32=False",
    )  # fmt: skip
    done = run_notebook("42_component", *(word for each in given for word in ("-p", each)))
    rows = {row["candidate"]: row for row in done.values["candidates"]}
    assert list(rows) == ["eager", "eager uniform-int8-weight", "eager other-expert"]
    assert rows["eager uniform-int8-weight"]["effect"] == "applied"
    assert rows["eager uniform-int8-weight"]["weights_gib"] < 0.5 * rows["eager"]["weights_gib"]
    assert rows["eager other-expert"]["effect"] == "not applied"
    assert "changed nothing" in rows["eager other-expert"]["proof"]
    left_out = done.values["left_out"]
    assert set(left_out) == {"tensorrt", "tensorrt uniform-int8-weight", "tensorrt other-expert"}
    assert all("\n" not in line for line in left_out.values())
    assert "eager other-expert was not applied" in done.answer
    assert "tensorrt was not measured" in done.answer
    assert json.dumps(done.values["products"]) == "[]"  # nothing is multiplied on codes on a CPU


def test_the_streamed_vae_is_measured_in_a_process_of_its_own(run_notebook, outputs):
    given = (
        "component=vae_decoder", "engines=['eager', 'streamed_vae']", "rounds=1", "processes=each",
        f"files={outputs / 'configured'}", "height=32", "width=32",
    )  # fmt: skip
    done = run_notebook("42_component", *(word for each in given for word in ("-p", each)))
    rows = {row["candidate"]: row for row in done.values["candidates"]}
    assert list(rows) == ["eager", "streamed_vae"]
    assert rows["streamed_vae"]["relative_l2"] < 1e-4
    assert all(row["peak_memory_gib"] > 0 for row in rows.values())
    assert done.values["control"]["ratio"] > 0
    found = results(done)
    assert {row.work.component for row in found.values()} == {"vae_decoder"}
