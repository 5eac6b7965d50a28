"""51_platforms on this machine, and over runs of others."""

from __future__ import annotations

import json
import shutil

import pytest

from wanlab.runs.folder import RunFolder
from wanlab.runs.seal import seal

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def here(run_notebook):
    return run_notebook("51_platforms", "-p", "rounds=3", "-p", "limit_s=0.1")


def test_this_machine_is_measured_in_every_engine(here):
    rows = {row["engine"]: row for row in here.values["platforms"] if row["source"] == "measured here"}
    wanted = {"eager", "onnxruntime-cpu"}
    if "tvm" not in here.values["left_out"]:
        wanted.add("tvm-llvm")
    assert set(rows) == wanted
    for row in rows.values():
        assert row["latency_ms"] > 0
        assert row["throughput_per_s"] == pytest.approx(1e3 / row["latency_ms"])
        assert row["noise_percent"] == pytest.approx(here.values["control"]["noise_percent"])
        assert row["ratio_to_eager"] == pytest.approx(rows["eager"]["latency_ms"] / row["latency_ms"])
    assert here.record["verdict"].startswith("On this machine, ")
    assert "wan-nano expert_high forward, 17x128x192" in here.answer
    assert "Timed in turn: 6 pairs in " in here.page.get_text()
    assert len(here.page.select("div.figure[data-figure]")) == 2


def test_recorded_machines_stand_beside_this_one(here, root):
    """With default parameters: the same forward on the H200, and what was built for GPUs that were not there."""
    rows = here.values["platforms"]
    recorded = json.loads((root / "data" / "results" / "onnx_forms_h200.json").read_text())
    forms = {(row["dtype"], row["form"]): row["time_ms"] for row in recorded["forms"]}
    there = {
        (row["engine"], row["precision"]): row["latency_ms"]
        for row in rows
        if row["machine"] == "NVIDIA H200"
    }
    assert there == {
        ("eager", "float32"): forms["float32", "eager"],
        ("onnxruntime-cuda", "float32"): forms["float32", "friendly"],
        ("eager", "bfloat16"): forms["bfloat16", "eager"],
        ("onnxruntime-cuda", "bfloat16"): forms["bfloat16", "fused"],
    }
    built = [row for row in rows if row["state"] == "built only"]
    assert {row["machine"][-4:].strip() for row in built} == {"8.6", "8.9", "12.0"}
    assert {row["what"] for row in built} == {"expert_high"}
    assert len(built) == 11  # FP8 not for 8.6
    assert "4 engines built for 3 machines not there, not executed" in here.page.get_text()
    assert "tensorrt-rtx" in here.page.get_text()


def test_every_engine_agrees_with_eager(here):
    assert {row["engine"] for row in here.values["engines"]} >= {"eager", "onnxruntime-cpu"}
    assert all(row["relative_l2"] < 1e-5 for row in here.values["engines"])


def test_recorded_results_of_other_work_are_refused_with_the_reason(here):
    refused = {row["source"].split("/")[0]: row["reason"] for row in here.values["refused"]}
    assert "model is wan2.2-" in refused["h200_baseline.json"]
    assert refused["onnxruntime_cpu.json"] == "component is the whole video, here expert_high"


def test_runs_of_other_machines_are_put_side_by_side(here, run_notebook, outputs, root, tmp_path):
    """The run above, and a copy of it that says it was taken on another processor and with other weights."""
    first = next(path.parent for path in outputs.glob("51_platforms/*/run.json"))
    other = {"cpu": "Other CPU", "threads": 4}
    for number, change in enumerate(({}, {"machine": other}, {"weights": "random"})):
        folder = shutil.copytree(first, tmp_path / "runs" / f"{number}" / "51_platforms" / first.name)
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        for row in rows:
            row["machine"] |= change.get("machine", {})
            row["work"]["weights"] = change.get("weights", row["work"]["weights"])
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seal(RunFolder(folder))  # as the run on that machine would have
    done = run_notebook(
        "51_platforms", "-p", f"runs=['{tmp_path / 'runs'}']", "-p", f"results=['{tmp_path}']"
    )
    machines = {row["machine"] for row in done.values["platforms"]}
    assert len(machines) == 2
    assert "Other CPU, 4 threads" in machines
    assert {row["reason"] for row in done.values["refused"]} == {"weights is random, here pretrained"}
    assert "2 machines" in done.answer
