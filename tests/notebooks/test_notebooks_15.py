"""The triage notebook: with no run to look at, and over runs that other notebooks have just made."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook
SMALL = ["-p", "height=64", "-p", "width=64", "-p", "frames=5", "-p", "steps=3"]


def test_triage_says_what_to_measure_and_then_walks_what_was_measured(run_notebook, outputs):
    empty = run_notebook("15_triage")
    assert empty.record["verdict"].startswith("Nothing is measured yet")
    assert empty.record["next"]["command"] == "wanlab run 10_baseline"
    assert empty.record["details"][0].startswith("Then run 11_flame_graph and 40_quality")
    assert empty.values["triage"]["measured"] == 0
    assert "wanlab run notebooks/40_quality.ipynb" in str(empty.page)
    assert len(empty.page.select("div.figure[data-figure]")) == 1

    baseline = run_notebook("10_baseline", *SMALL, "-p", "iterations=1")
    shares = run_notebook("11_flame_graph", *SMALL).values["breakdown"]  # the latest profile counts
    done = run_notebook("15_triage", "-p", "memory_high_percent=0.01")
    sources = str(done.page)
    assert f"10_baseline/{baseline.record['run_id']}" in sources
    assert f"{baseline.values['baseline']['time_per_video_ms']:.4g}"[:3] in sources
    vae = shares["vae_encoder_percent"] + shares["vae_decoder_percent"]
    assert done.record["verdict"].startswith(
        f"Change first: Run the VAE on ONNX Runtime. {vae:.0f} % of the time goes to the VAE"
    )
    said = " ".join(done.record["details"])
    assert f"share of the VAE {vae:.0f} %" in said
    assert done.record["next"]["command"].startswith("wanlab run 21_onnxruntime -p height=64 -p width=64")
    assert f"Run the VAE on ONNX Runtime (at most {1 / (1 - vae / 100):.2f} times as fast)" in said
    assert len(done.page.select("div.figure[data-figure]")) == 2
    assert "no GPU in the trace" in sources
    assert "unknown until 40_quality is run" in said
    assert "-p height=64 -p width=64 -p frames=5 -p steps=3" in sources
    assert done.values["triage"]["not applicable"] == 1
    # Of the memory only the peak is known, and it is over this threshold.
    assert "unknown until 14_memory is run" in said

    # What it reads can have changed without its parameters: it is never taken from an earlier run.
    kept = outputs / "15_triage" / done.record["run_id"] / "attempts"
    before = len(list(kept.glob("*")))
    run_notebook("15_triage", "-p", "memory_high_percent=0.01", force=False)
    assert len(list(kept.glob("*"))) == before + 1


def test_triage_of_a_recorded_profile(run_notebook, root):
    trace = root / "data" / "traces" / "wan2.2-i2v-a14b.pt.trace.json.gz"
    done = run_notebook("15_triage", "-p", f"trace={trace}")
    said = " ".join(done.record["details"])
    assert "Fuse operators (at most 1.13 times as fast), then Cheaper attention" in said
    assert "Memory is not the limit" in said
