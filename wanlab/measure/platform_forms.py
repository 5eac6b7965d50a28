"""The forms that measurements are kept in, each turned into platform records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wanlab.measure.platform_records import BUILT, VIDEO, PlatformRecord, Work, machine_of, software

RECORDS = "platform_records"  # the name under which 51_platforms keeps its own
SIZE = ("height", "width", "frames")
UNCHANGED = (None, "", "default")  # what notebooks call no plan


def of_run(source: str, run: Mapping[str, Any]) -> list[PlatformRecord]:
    """A run folder: run.json, with its last metrics by name as `metrics`."""
    metrics, environment = run["metrics"], run.get("environment") or {}
    kept = [PlatformRecord.from_dict(record) for record in metrics.get(RECORDS, [])]
    taken = str(run.get("created") or "")
    facts = {"environment": environment, "taken": taken, "parameters": run.get("parameters") or {}}
    return kept + _of_notebook(source, metrics | facts)


def of_file(source: str, data: Mapping[str, Any]) -> list[PlatformRecord]:
    """A JSON file of any form that is known here; nothing for another."""
    if isinstance(data.get("runs"), list):  # notebooks' numbers, gathered
        return [
            record
            for run in data["runs"]
            for record in _of_notebook(f"{source}/{run.get('run_id', '')}", run)
        ]
    if RECORDS in data:
        return [PlatformRecord.from_dict(record) for record in data[RECORDS]]
    if "compute_capabilities" in data:
        return _of_receipt(source, data)
    if isinstance(data.get("builds"), list) and all("compute_capabilities" in one for one in data["builds"]):
        taken = {"taken": data.get("taken", "")}
        return [record for one in data["builds"] for record in _of_receipt(source, one | taken)]
    if isinstance(data.get("forms"), list):
        return _of_forms(source, data)
    if {"schema", "engine", "inputs", "samples", "metadata"} <= data.keys():
        return [_of_bench(source, data)]
    if "environment" in data and isinstance(settings := data.get("settings", {}), dict):
        timed = isinstance(data.get("samples"), dict) and "model" in data
        engines = data.get("engines")
        each = isinstance(engines, dict) and any(
            "samples" in row for row in engines.values() if isinstance(row, dict)
        )
        if timed or (each and "model" in settings):
            return _of_benchmark(source, data)
    return []


def _of_notebook(source: str, found: Mapping[str, Any]) -> list[PlatformRecord]:
    """What a notebook recorded, by the names that it recorded it under.

    10_baseline has `baseline` and `forward`; 21_onnxruntime has `before_after`, `engines` and `speedup`; 22_tensorrt has
    `receipts`; a notebook of one configuration has `work` and `summary`.
    """
    parameters, environment = found.get("parameters") or {}, found.get("environment") or {}
    taken = str(found.get("taken") or found.get("started") or "")
    records = [
        record
        for one in found.get("receipts") or []
        for record in _of_receipt(source, one | {"taken": taken})
    ]
    if not parameters.get("model"):
        return records
    work, precision = _work(parameters), _precision(parameters, environment)

    def record(engine: str, what: Work, latency_ms: float, **more: Any) -> PlatformRecord:
        return _measured(source, environment, engine, precision, what, latency_ms, taken=taken, **more)

    if isinstance(base := found.get("baseline"), Mapping) and base.get("time_per_video_ms"):
        records.append(
            record(
                str(base.get("variant", "eager")),
                work,
                base["time_per_video_ms"],
                noise_percent=base.get("noise_percent"),
                peak_memory_gib=base.get("peak_memory_gib"),
                load_ms=base.get("load_ms"),
                samples=2 * int(parameters.get("iterations") or 0) or None,
            )
        )
        records += [
            record("eager", _forward(work, row["component"]), row["median_ms"], samples=int(row["calls"]))
            for row in found.get("forward") or []
        ]
    engines = found.get("engines")
    engines = set(engines.values()) if isinstance(engines, Mapping) else set()
    noise = (found.get("speedup") or {}).get("noise_percent")
    for row in found.get("before_after") or []:
        fast = next((e for e in engines if e.startswith(str(row["variant"]))), row["variant"])
        more = {"noise_percent": noise, "load_ms": row.get("load_ms")}
        records.append(record(str(fast), work, row["time_per_video_ms"], **more))
    done, one = found.get("work"), found.get("summary")
    if isinstance(done, Mapping) and isinstance(one, Mapping) and one.get("time_per_video_ms"):
        known = {key: done[key] for key in (*SIZE, "steps", "guided", "seed") if key in done}
        what = Work(VIDEO, str(done["model"]), done.get("weights"), **known, plan=_plan(one.get("plan")))
        more = {key: one.get(key) for key in ("noise_percent", "peak_memory_gib", "load_ms")}
        more["samples"] = (found.get("samples") or {}).get("n")
        records.append(
            record(_engine_name(str(one["engine"]), environment), what, one["time_per_video_ms"], **more)
        )
    return records


def _of_forms(source: str, data: Mapping[str, Any]) -> list[PlatformRecord]:
    """What `benchmarks/onnx_forms.py` writes: eager, and of the graphs the one that `convert.export` makes by default."""
    settings, environment = data["settings"], data["environment"]
    work, records = _forward(_work(settings), settings["component"]), []
    for row in data["forms"]:
        used = "fused" if row["dtype"] == "bfloat16" else "friendly"
        engine = {"eager": "eager", used: "onnxruntime"}.get(row["form"])
        if engine is None:
            continue
        more = {"samples": len(row["samples_ms"]), "noise_percent": row["noise_percent"]}
        name, taken = _engine_name(engine, environment), str(data.get("taken", ""))
        records.append(
            _measured(source, environment, name, row["dtype"], work, row["time_ms"], taken=taken, **more)
        )
    return records


def _of_benchmark(source: str, data: Mapping[str, Any]) -> list[PlatformRecord]:
    """What the scripts in benchmarks/ write.

    `onnxruntime_pipeline.py` (whole videos) and `tvm_engine.py` (one call) have `samples` by engine, `engines.py` (one
    call, each in a process of its own) has them inside of `engines`, with noise and memory of their own.
    """
    settings = {"model": data.get("model")} | dict(data.get("settings") or {}) | dict(data.get("shape") or {})
    settings |= {"seed": data["seed"]} if "seed" in data else {}
    component = data.get("component") or settings.get("component")
    work, environment = _work(settings), data["environment"]
    work = _forward(work, component) if component else work
    load_ms, taken = data.get("load_ms") or {}, str(data.get("taken", ""))
    builds = {row.get("build"): row for row in data.get("builds") or []}
    rows: dict[str, Mapping[str, Any]] = {
        label: {"samples": samples, "noise_percent": data.get("noise_percent"), "load_ms": load_ms.get(label)}
        for label, samples in (data.get("samples") or {}).items()
    } or {label: row for label, row in data["engines"].items() if "samples" in row}
    records = []
    for label, row in rows.items():
        build = builds.get(label, {})
        made = _measured(
            source,
            environment,
            _engine_name(label, environment),
            data.get("dtype") or _precision(settings, environment),
            work,
            row["samples"]["median_ms"],
            samples=row["samples"]["n"],
            noise_percent=row.get("noise_percent"),
            peak_memory_gib=row.get("peak_gib"),
            load_ms=row.get("load_ms"),
            size_bytes=build.get("size_bytes"),
            build_ms=build.get("build_ms"),
            taken=taken,
        )
        if "tvm" in build:
            made = replace(made, software={**made.software, "apache-tvm": build["tvm"]})
        records.append(made)
    return records


def _of_bench(source: str, data: Mapping[str, Any]) -> PlatformRecord:
    """What `wanlab bench` saves: the device's time where it is known apart from transfers."""
    from wanlab import models

    facts, inputs, engine = data["metadata"], data["inputs"], str(data["engine"])
    samples = data["samples"].get("device") or data["samples"]["latency"]
    name = str(facts.get("model", ""))
    batch, *_, frames, height, width = next(
        (shape for _, shape in inputs.values() if len(shape) == 5), [None] * 5
    )
    if frames is not None and "video" not in inputs:  # latents
        spec = models.get(name) if name in models.names() else None
        frames = (frames - 1) * spec.temporal_factor + 1 if spec else None
        height, width = (n * spec.spatial_factor if spec else None for n in (height, width))
    work = _forward(Work(VIDEO, name, None, height, width, frames), str(facts.get("component", engine)))
    if batch and batch > 1:
        work = replace(work, what=f"{work.what}, batch {batch}")
    return _measured(
        source,
        data["environment"],
        engine,
        next((dtype for dtype, shape in inputs.values() if len(shape) == 5), ""),
        work,
        samples["median_ms"],
        samples=samples["n"],
        noise_percent=data.get("noise_percent"),
        load_ms=facts.get("load_ms"),
        size_bytes=facts.get("size_bytes"),
    )


def _of_receipt(source: str, data: Mapping[str, Any]) -> list[PlatformRecord]:
    """A receipt of `convert.build_tensorrt`: target, numbers, size and time of an engine, and no latency."""
    return [
        PlatformRecord(
            source,
            data.get("gpu") or f"GPU of compute capability {target}",
            None,
            str(data["kind"]),
            str(data["numbers"]),
            None,
            state=BUILT,
            model=str(data.get("model", "")),
            component=str(data.get("component", "")),
            size_bytes=data["size_bytes"],
            build_ms=data["time_ms"],
            software={str(data["kind"]): str(data["version"])},
            taken=str(data.get("taken", "")),
        )
        for target in data["compute_capabilities"]
    ]


def _measured(
    source: str,
    environment: Mapping[str, Any],
    engine: str,
    precision: str,
    work: Work,
    latency_ms: float,
    **more: Any,
) -> PlatformRecord:
    """One latency, with the machine and the software that the environment names."""
    place, known = machine_of(environment, engine), software(environment)
    return PlatformRecord(
        source, *place, engine, precision, work, latency_ms=float(latency_ms), software=known, **more
    )


def _work(parameters: Mapping[str, Any]) -> Work:
    """What a generation with these parameters does; what was not given is the model's default."""
    from wanlab import models

    name = str(parameters["model"])
    defaults: dict[str, Any] = {}
    if name in models.names():
        spec = models.get(name)
        defaults = {key: getattr(spec.defaults, key) for key in (*SIZE, "steps", "guidance_scale")}
    known = defaults | {key: value for key, value in parameters.items() if value is not None}
    guidance = known.get("guidance_scale")
    return Work(
        VIDEO,
        name,
        str(known.get("weights", "pretrained")),
        *(known.get(key) for key in (*SIZE, "steps")),
        guided=None if guidance is None else guidance > 1,
        seed=known.get("seed"),
        plan=_plan(known.get("plan")),
    )


def _forward(work: Work, component: str) -> Work:
    """One call of a component: neither steps nor seed change how long it takes."""
    return replace(work, what=f"{component} forward", steps=None, guided=None, seed=None)


def _plan(name: Any) -> str | None:
    return None if name in UNCHANGED else str(name)


def _precision(parameters: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """As `models.load` resolves "auto"."""
    dtype = parameters.get("dtype") or "auto"
    on_gpu = environment.get("gpu") and parameters.get("device") != "cpu"
    return str(dtype) if dtype != "auto" else "bfloat16" if on_gpu else "float32"


def _engine_name(label: str, environment: Mapping[str, Any]) -> str:
    place = "cuda" if environment.get("gpu") else "cpu"
    known = {"onnxruntime": f"onnxruntime-{place}", "tvm": "tvm-llvm", "tvm plain": "tvm-llvm (plain)"}
    return known.get(label, label)
