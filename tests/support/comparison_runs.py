"""Sweeps as written records: what a comparison reads, without running anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanlab.runs.result import Quality, Result

WORK = {
    "model": "wan-nano", "weights": "pretrained", "height": 64, "width": 64, "frames": 5, "steps": 4, "guided": True,
    "seed": 0,
}  # fmt: skip
CPU = {"device": "cpu", "gpu": None, "cpu": "Test CPU", "threads": 1}


def result_line(figures: Mapping[str, Any], work: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A line of results.jsonl with these figures; `time_per_video_ms` is kept only where there are no samples."""
    values = {
        name: value
        for name, value in figures.items()
        if name not in ("time_per_video_ms", "time_per_frame_ms")
    }
    quality = {name: values.pop(name) for name in Quality.__struct_fields__ if name in values}
    own = {name: values.pop(name) for name in list(values) if name in Result.__struct_fields__}
    own |= {"plan": None if own.get("plan") in (None, "default") else own["plan"]}
    if not more.get("samples_ms"):
        more["median_ms"] = figures.get("time_per_video_ms")
    return {"work": dict(work), "engine": "eager"} | own | {"quality": quality, "figures": values} | more


def write_run(
    folder: Path,
    *,
    ms: float = 100.0,
    n: int = 12,
    cv: float = 0.01,
    seed: int = 0,
    state: str = "finished",
    parameters: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    work: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] = CPU,
    repeat: int | None = None,
    name: str = "41_configuration",
    reason: str | None = None,
    started: str = "2026-01-01T00:00:00+00:00",
    clips: bool = False,
) -> Path:
    """One run whose samples lie around `ms` with a relative spread of `cv`."""
    folder.mkdir(parents=True)
    samples = (ms * (1 + cv * np.random.default_rng(seed).standard_normal(n))).tolist()
    parameters = {"engine": "eager", "plan": "default", "steps": None} | dict(parameters or {})
    device = "cuda:0" if environment.get("gpu") else "cpu"
    figures = {
        "engine": parameters["engine"], "plan": parameters["plan"], "time_per_video_ms": float(np.median(samples)),
        "time_per_frame_ms": float(np.median(samples)) / 5, "noise_percent": 1.0, "peak_memory_gib": 1.0, "load_ms": 200.0,
        "weights_gib": 0.04, "divergence_lpips": 0.0, "psnr_db": "inf", "quality_loss_percent": 0.0,
        "quality_loss_low_percent": 0.0, "quality_loss_high_percent": 0.0, "effect": "applied",
    } | dict(summary or {})  # fmt: skip
    row = result_line(figures, WORK | dict(work or {}), samples_ms=samples, device=device)
    record = {
        "run_id": folder.name, "name": name, "notebook": f"notebooks/{name}.ipynb", "parameters": parameters,
        "environment": dict(environment), "wanlab": "0.1.0", "wanlab_source": "abc",
    }  # fmt: skip
    record |= {} if repeat is None else {"repeat": repeat}
    status = {"state": state, "started": started, "seconds": 20.0} | ({"reason": reason} if reason else {})
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "status.json").write_text(json.dumps(status))
    if state == "finished":
        (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
    if clips:
        from wanlab.evaluate import write_video

        (folder / "artifacts").mkdir()
        for clip in ("video", "original", "truth"):
            frames = np.random.default_rng(seed).random((5, 64, 64, 3), dtype=np.float32)
            write_video(folder / "artifacts" / f"{clip}.mp4", frames, 8)
    return folder


def write_sweep(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    axes: Iterable[str] = ("engine", "plan"),
    baseline: Mapping[str, Any] | None = None,
    pending: Iterable[Mapping[str, Any]] = (),
    **more: Any,
) -> Path:
    """A sweep's folder; `rows` are what `write_run` takes, `pending` parameters of runs that never started."""
    axes, runs = list(axes), []
    for index, row in enumerate(rows):
        run_id = f"{index:012x}"
        write_run(folder / run_id, seed=index, **row)
        runs.append(
            _entry(
                run_id, axes, row.get("parameters") or {}, row.get("state", "finished"), row.get("repeat", 1)
            )
        )
    runs += [_entry(f"f{i:011x}", axes, parameters, "pending", 1) for i, parameters in enumerate(pending)]
    sweep = {
        "name": folder.name,
        "title": "Test sweep",
        "state": "finished",
        "axes": axes,
        "baseline": baseline,
    }
    (folder / "sweep.json").write_text(json.dumps(sweep | {"show": None, "runs": runs} | more))
    return folder


def _entry(
    run_id: str, axes: list[str], parameters: Mapping[str, Any], state: str, repeat: int
) -> dict[str, Any]:
    values = {axis: parameters.get(axis, {"engine": "eager", "plan": "default"}.get(axis)) for axis in axes}
    label = ", ".join(f"{axis}={value}" for axis, value in values.items())
    notebook = "notebooks/41_configuration.ipynb"
    return {
        "label": label,
        "run_id": run_id,
        "notebook": notebook,
        "parameters": values,
        "repeat": repeat,
        "state": state,
    }


def techniques(**changes: Any) -> list[dict[str, Any]]:
    """Engine x plan: ONNX Runtime 2x, the plan 1.25x, both together 1.6x instead of 2.5x."""
    made = []
    for engine, plan, ms, loss in (
        ("eager", "default", 100.0, 0.0),
        ("onnxruntime", "default", 50.0, 0.0),
        ("eager", "uniform-int8", 80.0, 2.0),
        ("onnxruntime", "uniform-int8", 62.5, 2.0),
    ):
        quality = {
            f"quality_loss_{end}percent": loss + off for end, off in (("", 0), ("low_", -0.5), ("high_", 0.5))
        }
        made.append({"ms": ms, "parameters": {"engine": engine, "plan": plan}, "summary": quality, **changes})
    return made
