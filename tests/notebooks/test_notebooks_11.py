"""The flame graph notebook: a fresh capture, and two traces that are already there."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_flame_graph_of_a_fresh_capture_and_what_changed_between_two(run_notebook, outputs, shared_run):
    fast = ["-p", "height=64", "-p", "width=64", "-p", "frames=5", "-p", "steps=3"]
    first = shared_run("11_flame_graph", *fast).copied_to(outputs)
    assert first.values["totals"]["flame_ms"] <= first.values["totals"]["wall_ms"]
    assert "no GPU events" in str(first.page)
    second = run_notebook("11_flame_graph", *fast, "-p", "seed=1")
    one, two = sorted(str(path) for path in outputs.rglob("*.pt.trace.json.gz"))
    read = run_notebook("11_flame_graph", "-p", f"trace={one}", "-p", f"compare={two}")
    totals = {run.values["totals"]["wall_ms"] for run in (first, second)}
    assert abs(read.values["difference"]["change_ms"]) == pytest.approx(max(totals) - min(totals))


def test_flame_graph_runs_with_its_defaults(shared_run):
    assert shared_run("11_flame_graph").values["totals"]["share_percent"] > 10


def test_recorded_traces_of_a_large_model_are_read_and_compared(run_notebook, root):
    traces = root / "data" / "traces"
    read = run_notebook(
        "11_flame_graph",
        "-p", f"trace={traces / 'wan2.2-ti2v-5b.pt.trace.json.gz'}",
        "-p", f"compare={traces / 'wan2.2-ti2v-5b-compiled.pt.trace.json.gz'}",
    )  # fmt: skip
    assert read.record["verdict"].startswith("The second trace is ")
    assert read.record["details"][0].startswith(
        "The trace is of wan2.2-ti2v-5b (30 layers of width 3,072), not of wan-nano (6 layers of width 192). Before: "
    )
    assert read.values["breakdown"]["gpu_busy_percent"] > 80
    assert abs(read.values["breakdown"]["residual_percent"]) < 1
    assert read.values["difference"]["change_ms"] < -1000
