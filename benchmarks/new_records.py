"""What keep_run.py kept of runs of notebooks, in the form of the records that tables read.

Typed rows of 42_component lie in data/results/NAME.jsonl, the recorded values of another notebook in NAME.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanlab.measure import Samples
from wanlab.runs import Result, load_results


def rows_of(path: Path) -> list[Result]:
    """The typed rows of a kept run, the baseline first."""
    results, unread = load_results([path])
    if len(unread):
        raise ValueError(f"{path}: {unread.to_dict('records')}")
    kept: dict[str, Result] = {}
    for row in reversed(results):  # a run records its baseline last
        kept.setdefault(label(row), row)
    return sorted(kept.values(), key=lambda row: "speedup" in row.figures)


def environment_of(row: Result) -> dict[str, Any]:
    """Machine and software as `measure.environment` names them."""
    machine = row.machine
    gpu = {"name": machine.gpu} if machine.gpu else None
    known = {"cpu": machine.cpu, "threads": machine.threads, "python": ""}
    return known | {"gpu": gpu, "packages": row.software}


def label(row: Result) -> str:
    """Engine, plan and techniques."""
    return ", ".join([row.engine, *filter(None, [row.plan]), *row.techniques])


def engines_record(path: Path) -> dict[str, Any]:
    """As the tables `engines`, `kernels` and `expert_engines` read it."""
    rows = rows_of(path)
    work = rows[0].work
    settings = {"model": work.model, "component": work.component, "dtype": rows[0].dtype}
    settings |= {"height": work.height, "width": work.width, "frames": work.frames}
    engines = {label(row): _figures(row) for row in rows}
    return {"settings": settings, "environment": environment_of(rows[0]), "engines": engines}


def variants_record(path: Path) -> dict[str, Any]:
    """As the table `precision_speed` reads it: plan and engine in place of engine and plan."""
    rows = rows_of(path)
    record = engines_record(path)
    variants = {f"{row.plan or 'as-loaded'}:{row.engine}": _figures(row) for row in rows}
    record["settings"]["plan"] = []
    return record | {"variants": variants}


def _figures(row: Result) -> dict[str, Any]:
    figures = row.figures
    known = {
        "samples": Samples(label(row), row.samples_ms, row.device).to_dict(),
        "noise_percent": row.noise_percent,
        "peak_gib": row.peak_memory_gib,
        "component_gib": row.weights_gib,
        "load_ms": row.load_ms,
        "size_bytes": row.size_bytes,
        "dtype": row.dtype,
        "engine": label(row),
        "time_ms": row.time_ms,
        "relative_l2": figures.get("relative_l2"),
        "distance": {name: figures.get(name) for name in ("relative_l2", "cosine", "psnr_db")},
        "kernels": _kernels(figures),
    }
    if "speedup" in figures:
        gain = {"low": figures["speedup_low"], "high": figures["speedup_high"]}
        known["gain"] = gain | {"speedup": figures["speedup"], "verdict": figures["verdict"]}
        known |= known["gain"]
    if "bound_speedup" in figures:
        known["bound"] = {"speedup": figures["bound_speedup"]}
    return known


def _kernels(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per kind; that of products has the name of the longest."""
    found = []
    for name, value in figures.items():
        if name.startswith("kernel_") and name.endswith("_ms"):
            kind = name.removeprefix("kernel_").removesuffix("_ms")
            shown = figures.get("product_kernel") if kind == "linear" else kind
            found.append({"name": shown or kind, "kind": kind, "time_ms": value})
    return found


def tvm_record(path: Path) -> dict[str, Any]:
    """As the table `tvm` reads it."""
    record = engines_record(path)
    engines = record["engines"]
    names = {name: row for name, row in engines.items() if "gain" in row}
    return record | {
        "samples": {name: row["samples"] for name, row in engines.items()},
        "noise_percent": max(row["noise_percent"] for row in engines.values()),
        "builds": [{"build": label(row), "build_ms": row.build_ms} for row in rows_of(path) if row.build_ms],
        "parity": [
            {"engine": name, "against": "eager", "relative_l2": row["relative_l2"]}
            for name, row in names.items()
        ],
        "comparisons": [
            row["gain"] | {"candidate": name, "baseline": "eager"} for name, row in names.items()
        ],
    }


def read_kept(record: dict[str, Any]) -> dict[str, Any]:
    """A record by the names that tables know, where it is what a notebook recorded; any other as it is."""
    known = dict(record)
    if "range_cost" in record:  # 42_component with profiler_ranges
        cost = record["range_cost"]
        interval = [cost["cost_low_percent"], cost["cost_high_percent"]]
        known |= cost | {"cost_percent_interval": interval}
        known["settings"] = record["settings"] | {"forwards": 2 * record["settings"]["rounds"]}
    if "sensitivity" in record:  # 30_sensitivity
        known |= {"prediction": record["sensitivity"], "cost": record["cost"][0]}
    if "floor_work" in record:  # 40_quality
        settings, work = record["settings"], record["floor_work"]
        size = [work["frames"], work["height"], work["width"]]
        known["notes"] = work["notes"]
        known["settings"] = settings | {
            "dtype": work["dtype"].removeprefix("torch."),
            "size": size,
            "steps": work["steps"],
        }
    if "host" in record and "exports" in record:  # 20_export_onnx
        peak_gib, written = record["host"]["peak_gib"], record["host"]["weights_written_bytes"]
        known["weights_gib"] = max(written) / 2**30
        known["exports"] = [
            row
            | {
                "graph": "float32 arithmetic"
                if row["stored_dtype"] not in (None, row["dtype"])
                else row["dtype"],
                "weights_written_bytes": count,
                "peak_host_gib": peak_gib,
                "peak_over_weights": peak_gib / known["weights_gib"],
            }
            for row, count in zip(record["exports"], written, strict=True)
        ]
    if "receipts" in record:  # 22_tensorrt
        known |= {"builds": record["receipts"], "runtime": record["engines"][0]["runtime"]}
    if "before_after" in record and "speedup" in record:  # 21_onnxruntime
        gain = record["speedup"]
        scores = {row["metric"]: row["mean"] for row in record["divergence"]}
        known |= {
            "comparison": gain,
            "psnr_db": scores["psnr"],
            "samples": {gain["baseline"]: {"values_ms": []}},
        }
    if "final" in record and "search" in record:  # 31_precision_plan with final_cases
        known["dtype"] = record.get("dtype") or record["settings"]["dtype"]
    return known
