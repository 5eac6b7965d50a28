"""The same optimization on different GPUs, side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab import models
from wanlab.core.errors import WanlabError
from wanlab.core.paths import data, locate
from wanlab.measure.environment import environment
from wanlab.measure.timing import AAControl, Samples

MEASURED, BUILT = "measured", "built only"
VIDEO = "video"
HERE = "measured here"


@dataclass(frozen=True)
class Work:
    """What was timed. Two latencies can be compared when all of this is equal.

    Attributes:
        what: `"video"` for a whole generation, or such as `"expert_high forward"` for one call.
        model: registry name. weights: `"pretrained"` or `"random"`; None where a file does not say, which is then not
            held against, as the values of weights do not change a time.
        height, width: in pixels. frames: of the clip.
        steps, guided, seed: of a generation; None for one call, which has none of them.
        plan: name of the precision plan that was applied; None for the network as it is.
    """

    what: str
    model: str
    weights: str | None
    height: int | None
    width: int | None
    frames: int | None
    steps: int | None = None
    guided: bool | None = None
    seed: int | None = None
    plan: str | None = None

    def differences(self, other: Work) -> list[str]:
        """Each field that differs, with both values: `"steps is 10, here 2"`.

        Between a video and one call the settings of a generation are not held against each other.
        """
        names = [field.name for field in fields(self)]
        if (self.what == VIDEO) != (other.what == VIDEO):
            names = [name for name in names if name not in ("steps", "guided", "seed")]
        if self.weights is None or other.weights is None:
            names.remove("weights")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name} is {_said(name, mine)}, here {_said(name, theirs)}"
            for name, mine, theirs in pairs
            if mine != theirs
        ]

    def __str__(self) -> str:
        size = f"{self.frames}x{self.height}x{self.width}"
        steps = f", {self.steps} steps" if self.steps is not None else ""
        plan = f", {self.plan}" if self.plan is not None else ""
        return f"{self.model} {self.what}, {size}{steps}{plan}"


@dataclass(frozen=True)
class PlatformRecord:
    """One engine on one machine.

    Attributes:
        source: run or file that it comes from.
        machine: GPU, or processor and threads. memory_gib: of the GPU, or of the host.
        engine: as in `wanlab.convert`: `"eager"`, `"onnxruntime-cuda"`, `"tensorrt"`, ...
        precision: of the weights, such as `"bfloat16"`.
        work: None where nothing ran. model, component: that an engine is of which did not run.
        state: `"measured"`, or `"built only"` where the machine that it was built for was not there.
        latency_ms: median of `samples`. noise_percent: of the A/A control, None where there was none.
        peak_memory_gib: of everything during the run. load_ms: into an engine that can run.
        size_bytes, build_ms: of the engine's files, and of making them.
        software: package -> version.
        taken: when, ISO 8601; the later of two equal records is shown.
    """

    source: str
    machine: str
    memory_gib: float | None
    engine: str
    precision: str
    work: Work | None
    state: str = MEASURED
    model: str = ""
    component: str = ""
    latency_ms: float | None = None
    samples: int | None = None
    noise_percent: float | None = None
    peak_memory_gib: float | None = None
    load_ms: float | None = None
    size_bytes: int | None = None
    build_ms: float | None = None
    software: Mapping[str, str] = field(default_factory=dict)
    taken: str = ""

    def differences(self, work: Work) -> list[str]:
        """In what this is other than some work, as `Work.differences`.

        An engine that did not run is held against the model, and against the component when that alone was timed.
        """
        if self.work is not None:
            return self.work.differences(work)
        called = work.what.partition(" forward")[0]
        pairs = [("model", self.model, work.model), ("component", self.component, called)]
        return [
            f"{name} is {mine}, here {theirs}"
            for name, mine, theirs in pairs[: 1 if work.what == VIDEO else 2]
            if mine and mine != theirs
        ]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlatformRecord:
        work = data.get("work")
        return cls(**dict(data) | {"work": Work(**work) if work else None})


def machine_of(environment: Mapping[str, Any], engine: str = "") -> tuple[str, float | None]:
    """Name and memory in GiB of what an engine ran on, from `measure.environment`.

    An engine that says it ran on the CPU did so on a machine with a GPU too.
    """
    gpu = environment.get("gpu")
    if gpu and not engine.endswith(("-cpu", "-llvm", "-llvm (plain)")):
        return str(gpu["name"]), gpu.get("memory_gib")
    threads = environment.get("threads")
    count = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"{environment.get('cpu', 'unknown processor')}{count}", environment.get("ram_gib")


def forward_records(
    samples: Mapping[str, Samples],
    work: Work,
    control: AAControl,
    *,
    device=None,
    precision: str = "",
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[PlatformRecord]:
    """Records of calls that were timed here, now.

    Args:
        samples: engine -> timing. control: their A/A control.
        device: where they ran, for the machine's name.
        facts: engine -> load_ms, size_bytes, build_ms, as far as they are known.
    """
    here, now = environment(device), datetime.now(UTC).isoformat(timespec="seconds")
    records = []
    for engine, timing in samples.items():
        known = (facts or {}).get(engine, {})
        known = {key: known[key] for key in ("load_ms", "size_bytes", "build_ms") if key in known}
        known |= {"latency_ms": timing.median, "samples": timing.n, "noise_percent": control.noise_percent}
        known |= {"software": software(here), "taken": now}
        records.append(PlatformRecord(HERE, *machine_of(here, engine), engine, precision, work, **known))
    return records


def software(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a latency depends on, from `measure.environment`."""
    packages = environment.get("packages", {})
    names = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "apache-tvm")
    found = {name: packages[name] for name in names if name in packages}
    if environment.get("gpu") and "onnxruntime-gpu" in found:
        # Both are one package when imported; only this one has the CUDA provider, so it is the one that ran.
        found.pop("onnxruntime", None)
    driver = (environment.get("gpu") or {}).get("driver")
    return found | ({"driver": driver} if driver else {})


def _said(name: str, value: Any) -> str:
    return str(value) if value is not None else "none" if name == "plan" else "not known"


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
    """What `benchmarks/onnx_forms.py` writes: eager, and of the graphs the one that `export.export` makes by default."""
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
    """A receipt of `engines.build_tensorrt`: target, numbers, size and time of an engine, and no latency."""
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


RESULTS = data("results")


def read_platforms(paths: Iterable[str | os.PathLike]) -> tuple[list[PlatformRecord], pd.DataFrame]:
    """Every record that can be found in files and folders.

    Understood are run folders of 10_baseline, 21_onnxruntime and 51_platforms, JSON under `data/results/` of
    those and of the engine benchmarks, the JSON of `wanlab bench`, and receipts of engine builds.

    Args:
        paths: run folders, JSON files, or folders of JSON files.

    Returns:
        The records in the order of the paths, and a DataFrame of what holds none: source, reason.
    """
    found, nothing = [], []
    for path in _files(paths):
        try:
            records = read_platform(path)
        except WanlabError as error:
            nothing.append({"source": path.name, "reason": str(error)})
            continue
        found += records
    return found, pd.DataFrame(nothing, columns=["source", "reason"])


def read_platform(path: str | os.PathLike) -> list[PlatformRecord]:
    """Records of one run folder or JSON file.

    Raises:
        WanlabError: it cannot be read, or no latency of an engine and no built engine is in it.
    """
    path = Path(path)
    if path.is_dir():
        run = _json(path / "run.json") | {"metrics": _metrics(path / "metrics.jsonl")}
        records = of_run(f"{path.parent.name}/{path.name}", run)
    else:
        records = of_file(path.name, _json(path))
    if not records:
        raise WanlabError(f"{path.name} holds no latency of an engine on a machine")
    return records


def _files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(locate, paths):
        inside = path.is_dir() and not (path / "run.json").is_file()
        files += sorted(path.glob("*.json")) if inside else [path]
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WanlabError(f"cannot read {path.name}: {error}") from error
    if not isinstance(found, dict):
        raise WanlabError(f"{path.name} is not a JSON object")
    return found


def _metrics(path: Path) -> dict[str, Any]:
    """The last value of each name in a metrics.jsonl; a torn last line is skipped."""
    found: dict[str, Any] = {}
    for line in path.read_text("utf-8", "replace").split("\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry["name"]] = entry["value"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def comparable(
    records: Sequence[PlatformRecord], work: Work | None = None
) -> tuple[list[PlatformRecord], pd.DataFrame]:
    """Split records into those of this work, and the others with their reasons.

    Args:
        work: None takes the first record's that ran. Engines that were built only did no work; they are kept where they
            are of the model, and of the component that was timed.

    Returns:
        The records that `platform_table` takes, in their order, and a DataFrame of the others: source, machine,
        engine, what, reason (every field that differs, with both values).
    """
    kept, refused, work = [], [], work or _first_work(records)
    for record in records:
        reasons = _reasons(record, work)
        if not reasons:
            kept.append(record)
            continue
        refused.append(
            {
                "source": record.source,
                "machine": record.machine,
                "engine": record.engine,
                "what": str(record.work or f"{record.model} {record.component}, {record.state}"),
                "reason": "; ".join(reasons),
            }
        )
    return kept, pd.DataFrame(refused, columns=["source", "machine", "engine", "what", "reason"])


def platform_table(
    records: Sequence[PlatformRecord], *, work: Work | None = None, allow_different: bool = False
) -> pd.DataFrame:
    """One row per machine, engine and precision: the newest record of each, of those with an A/A control if any.

    Args:
        work: that all of them must have done; None takes the first measured record's.
        allow_different: keep rows of other work, each with a note that says in what it differs.

    Returns:
        machine, memory_gib, state, engine, precision, plan, model, what, shape, steps, seed, latency_ms,
        latency_per_frame_ms and throughput_per_s (videos or calls), ratio_to_eager (eager's latency on the same machine
        over this one, above 1 is faster; eager in the same precision where there is one), noise_percent, samples,
        peak_memory_gib, load_ms, size_bytes, build_ms, software, note, source.
        What was not measured is empty.

    Raises:
        WanlabError: no record, or one of other work, with the fields and both values.
    """
    if not records:
        raise WanlabError("no record to put into a platform table; measure one, or read a run of 10_baseline")
    work = work or _first_work(records)
    newest: dict[tuple, PlatformRecord] = {}
    for record in records:
        if (reasons := _reasons(record, work)) and not allow_different:
            raise WanlabError(
                f"{record.source} ({record.machine}, {record.engine}) is other work: {'; '.join(reasons)};"
                " leave it out with measure.comparable, or pass allow_different=True to mark it"
            )
        built = (record.state, record.model, record.component)
        key = (record.machine, record.engine, record.precision, record.work, *built)
        if key not in newest or _worth(record) >= _worth(newest[key]):
            newest[key] = record
    eager = [record for record in newest.values() if record.engine == "eager"]
    return pd.DataFrame([_row(record, work, _baseline(record, eager)) for record in newest.values()])


def platform_verdict(table: pd.DataFrame, refused: pd.DataFrame) -> str:
    """The table in a sentence: the fastest row, what each engine did against eager, what was left out."""
    measured = table[table["state"] == MEASURED]
    if measured.empty:
        return f"Nothing here was measured: {_built(table)}."
    best = measured.loc[measured["latency_ms"].idxmin()]
    first = measured.iloc[0]
    said = [
        f"{first['model']} {first['what']}, {first['shape']}: {_count(measured['machine'].nunique(), 'machine')},"
        f" {_count(len(measured), 'row')};"
        f" fastest {best['engine']} {best['precision']} on {best['machine']}, {best['latency_ms']:,.1f} ms"
    ]
    for _, row in measured[measured["machine"] == first["machine"]].iterrows():
        ratio = row["ratio_to_eager"]
        if row["engine"] == "eager" or math.isnan(ratio):
            continue
        noise = row["noise_percent"]
        floor = "noise not known" if math.isnan(noise) else f"noise {noise:.1f} %"
        if "not distinguishable" in row["note"]:
            said.append(f"{row['engine']} not distinguishable from eager ({floor})")
        else:
            how = f"{ratio:.2f}x as fast as" if ratio > 1 else f"{1 / ratio:.2f}x slower than"
            said.append(f"{row['engine']} {how} eager ({floor})")
    said += [built] if (built := _built(table)) else []
    said += [f"{_count(len(refused), 'row')} refused as other work"] if len(refused) else []
    return "; ".join(said) + "."


def _row(record: PlatformRecord, work: Work | None, eager: PlatformRecord | None) -> dict[str, Any]:
    mine, ms = record.work, record.latency_ms
    ratio = eager.latency_ms / ms if eager and eager.latency_ms and ms else math.nan
    notes = _reasons(record, work)
    if record.state == BUILT:
        notes.append(f"{record.component} built for it, not executed: no such machine here".strip())
    elif record.noise_percent is None:
        notes.append("no A/A control: its noise is not known")
    elif eager and record is not eager:
        noise = max(record.noise_percent, eager.noise_percent or 0)
        if max(ratio, 1 / ratio) - 1 <= noise / 100:
            notes.append("not distinguishable from eager")
    if record.state == MEASURED and eager is None:
        notes.append("no eager row of this machine")
    if eager and eager.precision != record.precision:
        notes.append(f"eager is in {eager.precision}")
    return {
        "machine": record.machine,
        "memory_gib": record.memory_gib,
        "state": record.state,
        "engine": record.engine,
        "precision": record.precision,
        "plan": mine.plan if mine else None,
        "model": mine.model if mine else record.model,
        "what": mine.what if mine else record.component,
        "shape": f"{mine.frames}x{mine.height}x{mine.width}" if mine else "",
        "steps": mine.steps if mine else None,
        "seed": mine.seed if mine else None,
        "latency_ms": _number(ms),
        "latency_per_frame_ms": ms / mine.frames if ms and mine and mine.what == VIDEO else math.nan,
        "throughput_per_s": 1e3 / ms if ms else math.nan,
        "ratio_to_eager": ratio,
        "noise_percent": _number(record.noise_percent),
        "samples": record.samples,
        "peak_memory_gib": _number(record.peak_memory_gib),
        "load_ms": _number(record.load_ms),
        "size_bytes": _number(record.size_bytes),
        "build_ms": _number(record.build_ms),
        "software": ", ".join(f"{name} {version}" for name, version in record.software.items()),
        "note": "; ".join(notes),
        "source": record.source,
    }


def _baseline(record: PlatformRecord, eager: Sequence[PlatformRecord]) -> PlatformRecord | None:
    """Eager's record of the same work on the same machine, in the same precision if there is one."""
    same = [one for one in eager if (one.machine, one.work) == (record.machine, record.work)]
    return next((one for one in same if one.precision == record.precision), same[0] if same else None)


def _built(table: pd.DataFrame) -> str:
    """How many engines were built for how many machines; one engine may serve several. Empty without any."""
    rows = table[table["state"] == BUILT]
    if rows.empty:
        return ""
    engines = _count(len(rows.drop_duplicates(["engine", "precision", "model", "what", "source"])), "engine")
    return f"{engines} built for {_count(rows['machine'].nunique(), 'machine')} not there, not executed"


def _first_work(records: Sequence[PlatformRecord]) -> Work | None:
    return next((record.work for record in records if record.work), None)


def _reasons(record: PlatformRecord, work: Work | None) -> list[str]:
    return record.differences(work) if work else []


def _worth(record: PlatformRecord) -> tuple[bool, str]:
    return record.noise_percent is not None, record.taken


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
