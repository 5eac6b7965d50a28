"""The memory notebook: a fresh capture with its options, and the recorded trace of a large model."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_memory_of_a_fresh_capture_and_what_options_save(run_notebook):
    done = run_notebook("14_memory", "-p", "height=64", "-p", "width=64", "-p", "steps=2")
    memory = done.values["memory"]
    parts = ("weights", "activations", "workspace", "text_embedding", "fragmentation", "other")
    assert sum(memory[f"{part}_gib"] for part in parts) == pytest.approx(memory["peak_gib"])
    assert "would lower it most, by" in str(done.page)


def test_memory_of_a_recorded_trace(run_notebook, root):
    trace = root / "data" / "traces" / "wan2.2-ti2v-5b.pt.trace.json.gz"
    done = run_notebook("14_memory", "-p", f"trace={trace}")
    assert 30 < done.values["memory"]["peak_gib"] < 40
    assert done.values["memory"]["fragmentation_gib"] > 1
