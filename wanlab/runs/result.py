"""What a run measured as one typed row, and the one rule by which two rows did the same work."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec

from wanlab import models
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import now
from wanlab.engines.registry import ENGINES, computes_on_cpu
from wanlab.measure.timing import Samples

MEASURED: Final = "measured"
BUILT: Final = "built only"
HERE = "measured here"
VIDEO = "the whole video"
UNCHANGED = (None, "", "default")
"""Names under which notebooks take no plan."""

SOFTWARE = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "apache-tvm")
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class _Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Work(_Row, frozen=True):
    """What was done: one video, or one call of a component.

    Attributes:
        model: registry name. weights: `"pretrained"` or `"random"`; None where it is not known.
        component: None for a whole video, else whose single call was timed, such as `"expert_high"`.
        height, width: in pixels. frames: of the clip. batch: clips in one call.
        steps, guided, seed: of a generation; None for one call, which has none of them.
    """

    model: str | None = None
    weights: str | None = None
    component: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    steps: int | None = None
    guided: bool | None = None
    seed: int | None = None

    @property
    def what(self) -> str:
        """`"video"`, or `"expert_high forward"`."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return "video" if self.component is None else f"{self.component} forward{batch}"

    @property
    def shape(self) -> str:
        """Frames x height x width."""
        return f"{self.frames}x{self.height}x{self.width}"

    def __str__(self) -> str:
        steps = f", {self.steps} steps" if self.steps is not None else ""
        return f"{self.model} {self.what}, {self.shape}{steps}"


class Machine(_Row, frozen=True):
    """What it ran on: a GPU with its limits, or a processor with its threads.

    Attributes:
        gpu: its name; None where the CPU did the work, also on a machine with a GPU.
        sm_clock_max_mhz, power_limit_w: of the GPU. cpu, threads: where the CPU did the work.
        memory_gib: of the GPU, or of the host.
    """

    gpu: str | None = None
    sm_clock_max_mhz: float | None = None
    power_limit_w: float | None = None
    cpu: str | None = None
    threads: int | None = None
    memory_gib: float | None = None

    @property
    def name(self) -> str:
        if self.gpu:
            return self.gpu
        count = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        return f"{self.cpu or 'unknown processor'}{count}"


class Quality(_Row, frozen=True):
    """Distance of the videos from the original's and from the truth.

    Attributes:
        divergence_lpips, psnr_db: to the original's videos. divergence_floor_lpips: of what is no change at all.
        quality_loss_percent: relative worsening of LPIPS to the ground truth, with its 95 % interval; None without truth.
    """

    divergence_lpips: float | None = None
    divergence_floor_lpips: float | None = None
    psnr_db: float | None = None
    quality_loss_percent: float | None = None
    quality_loss_low_percent: float | None = None
    quality_loss_high_percent: float | None = None

    @classmethod
    def of(cls, divergence: Any = None, loss: Any = None) -> Quality:
        """From `evaluate.divergence` and `evaluate.QualityLoss`; either may be missing."""
        values: dict[str, float | None] = {}
        if divergence is not None:
            scores = divergence.frame.set_index("metric")
            if "lpips" in scores.index:
                values["divergence_lpips"] = float(scores["mean"]["lpips"])
                values["divergence_floor_lpips"] = float(scores["floor"]["lpips"])
            if "psnr" in scores.index:
                values["psnr_db"] = float(scores["mean"]["psnr"])
        if loss is not None:
            values |= {
                "quality_loss_percent": loss.percent,
                "quality_loss_low_percent": loss.low_percent,
                "quality_loss_high_percent": loss.high_percent,
            }
        return cls(**values)


class Result(_Row, frozen=True):
    """One typed row of what a run measured; `run.result` writes it, `load_results` reads it.

    Attributes:
        work: what was done. engine: what did it, such as `"eager"` or `"onnxruntime"`.
        plan: name of the precision plan, None without one. configuration: name of the configuration file, or its hash.
        techniques: names of what was switched on beside engine and plan.
        dtype: that the model was loaded in, such as `"bfloat16"`; of an engine file that of its inputs.
        state: `"measured"`, or `"built only"` where the machine that an engine was built for was not there.
        samples_ms: every sample. median_ms, sample_count: where only these are known.
        noise_percent: of the A/A control; None where there was none.
        peak_memory_gib: of everything during the run. weights_gib: as this configuration holds them.
        load_ms: into a model or engine that can run. prepare_ms: conversion, calibration, compilation.
        size_bytes, build_ms: of the engine's files, and of making them.
        effect: `"applied"`, `"not applied"`, `"baseline"`, see `wanlab.core.effects`. kernels: what multiplies.
        figures: other numbers or words by name, with the unit at the end of the name.
        device: that the samples were taken on. machine, software: of the environment; `run.result` fills them in.
        taken: when, ISO 8601. source: run or file that it was read from.
    """

    work: Work
    engine: str
    plan: str | None = None
    configuration: str | None = None
    techniques: tuple[str, ...] = ()
    dtype: str | None = None
    state: Literal["measured", "built only"] = MEASURED
    samples_ms: tuple[float, ...] = ()
    median_ms: float | None = None
    sample_count: int | None = None
    noise_percent: float | None = None
    peak_memory_gib: float | None = None
    weights_gib: float | None = None
    load_ms: float | None = None
    prepare_ms: float | None = None
    size_bytes: int | None = None
    build_ms: float | None = None
    quality: Quality | None = None
    effect: str | None = None
    kernels: str | None = None
    figures: dict[str, float | str | bool | None] = {}
    device: str = ""
    machine: Machine | None = None
    software: dict[str, str] = {}
    taken: str = ""
    source: str = ""

    @property
    def time_ms(self) -> float | None:
        """Median over all samples."""
        return statistics.median(self.samples_ms) if self.samples_ms else self.median_ms

    @property
    def n(self) -> int | None:
        """How many samples."""
        return len(self.samples_ms) or self.sample_count

    @property
    def samples(self) -> Samples | None:
        """All samples as a timing; None where only their median is known."""
        return Samples(self.engine, self.samples_ms, self.device) if self.samples_ms else None

    @property
    def results(self) -> dict[str, Any]:
        """As `row`; comparisons read results and configurations alike."""
        return self.row()

    @property
    def engine_name(self) -> str:
        """The engine with the place that it ran in, such as `"onnxruntime-cuda"`."""
        place = "cuda" if self.machine and self.machine.gpu else "cpu"
        return ENGINES[self.engine].label(place) if self.engine in ENGINES else self.engine

    @property
    def key(self) -> tuple:
        """What names this row among those of its run: recorded again, it replaces the earlier one."""
        gpu = self.machine.gpu if self.machine and self.state == BUILT else None
        return (
            self.work,
            self.engine,
            self.plan,
            self.configuration,
            self.techniques,
            self.dtype,
            self.state,
            gpu,
        )

    def row(self) -> dict[str, Any]:
        """All figures by name, as comparisons, tables and exports show them; what is not known is left out."""
        kind, time_ms = "video" if self.work.component is None else "call", self.time_ms
        values: dict[str, Any] = {
            "engine": self.engine,
            "plan": self.plan or "default",
            f"time_per_{kind}_ms": time_ms,
        }
        if time_ms is not None and kind == "video" and self.work.frames:
            values["time_per_frame_ms"] = time_ms / self.work.frames
        if len(self.samples_ms) > 1:
            mean = statistics.fmean(self.samples_ms)
            values["p95_ms"] = _percentile(self.samples_ms, 95)
            values["cv_percent"] = 100 * statistics.pstdev(self.samples_ms) / mean if mean else 0.0
        names = (
            "noise_percent",
            "peak_memory_gib",
            "load_ms",
            "weights_gib",
            "prepare_ms",
            "size_bytes",
            "build_ms",
        )
        values |= {name: getattr(self, name) for name in names}
        values |= msgspec.structs.asdict(self.quality) if self.quality else {}
        values |= {"effect": self.effect, "kernels": self.kernels} | self.figures
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `parse_result` reads it back."""
        return msgspec.to_builtins(self)


def parse_result(value: Any, where: str) -> Result:
    """A `Result` from JSON.

    Raises:
        WanlabError: a field that is missing or of another type, with its path; `where` names the file and line.
    """
    try:
        if isinstance(value, Mapping) and isinstance(value.get("figures"), Mapping):
            figures = {name: _NUMBERS.get(item, item) for name, item in value["figures"].items()}
            value = {**value, "figures": figures}
        return msgspec.convert(value, Result, strict=False)  # not strict: JSON has no infinity but in words
    except (msgspec.ValidationError, TypeError) as error:
        raise WanlabError(f"cannot read {where}: {error}") from error


def checked_result(result: Any) -> Result:
    """The result, if every field is of its type; a `Struct` itself does not look.

    Raises:
        WanlabError: it is no `Result`, or a field is of another type.
    """
    if not isinstance(result, Result):
        raise WanlabError(
            f"run.result takes a wanlab.runs.Result, not {type(result).__name__}; runs.video_result makes one"
        )
    return parse_result(result.to_dict(), "the result")


# Made from what notebooks have


def video_result(model: Any, cost: Any, *, engine: str = "eager", **facts: Any) -> Result:
    """Whole videos that `measure.baseline` timed.

    Args:
        model: the `Model` that was timed. cost: its `Baseline`.
        facts: other fields of `Result`, such as plan, quality, peak_memory_gib; they win over what `cost` knows.
    """
    known = {"peak_memory_gib": cost.memory.peak_gib, "load_ms": cost.load_ms}
    return _timed(
        video_work(model, cost.generation), model, cost.samples, cost.control, engine, known | facts
    )


def comparison_results(
    variants: Mapping[str, Any], pair: Any, facts: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Result, ...]:
    """Whole videos of several variants that `measure.compare_models` timed, in its order.

    Args:
        variants: label -> model, as `compare_models` took them; the label is the engine, unless `facts` names another.
        facts: label -> other fields of `Result`.
    """
    results = []
    for label, model in variants.items():
        known = dict((facts or {}).get(label, {}))
        engine, work = known.pop("engine", label), video_work(model, pair.generations[label])
        results.append(_timed(work, model, pair.samples[label], pair.control, engine, known))
    return tuple(results)


def forward_results(model: Any, cost: Any, *, engine: str = "eager", **facts: Any) -> tuple[Result, ...]:
    """Single calls of each expert, as the recorded generation of a `Baseline` made them; without an A/A control."""
    results, settings = [], cost.generation.settings
    for component, calls in cost.calls.groupby("component", sort=False):
        if str(component).startswith("expert"):
            samples = tuple(map(float, calls["time_ms"]))
            known = {"samples_ms": samples, "device": cost.samples.device, "dtype": _dtype(model)} | facts
            work = call_work(model, str(component), **{name: settings[name] for name in SIZE})
            results.append(Result(work=work, engine=engine, **known))
    return tuple(results)


def call_results(
    work: Work,
    samples: Mapping[str, Any],
    control: Any,
    *,
    dtype: str | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Result, ...]:
    """Calls of one component in several engines that `measure.interleaved` timed.

    Args:
        work: from `call_work`. samples, control: engine -> timing, and the A/A control of the first.
        dtype: of the weights. facts: engine -> other fields of `Result`; names that it does not have are left out. Where
            several rows have one engine, the keys are labels and the facts name the engine.
    """
    results = []
    for engine, timing in samples.items():
        known = {name: value for name, value in (facts or {}).get(engine, {}).items() if name in FIELDS}
        known = {"engine": engine, "dtype": dtype, "noise_percent": control.noise_percent} | known
        results.append(Result(work=work, samples_ms=timing.values_ms, device=timing.device, **known))
    return tuple(results)


def build_results(
    builds: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, taken: str = "", source: str = ""
) -> tuple[Result, ...]:
    """Engines of `engines.build_tensorrt` that did not run: a row for each GPU that each was built for.

    Args:
        builds: one or several, as `BuildInfo.record` gives them, or as they lie beside the engines.
    """
    return tuple(
        Result(
            work=Work(model=str(build.get("model", "")), component=str(build.get("component", ""))),
            engine=str(build["kind"]),
            dtype=str(build["numbers"]),
            state=BUILT,
            size_bytes=build["size_bytes"],
            build_ms=build["time_ms"],
            machine=Machine(gpu=build.get("gpu") or f"GPU of compute capability {target}"),
            software={str(build["kind"]): str(build["version"])},
            taken=taken or str(build.get("taken", "")),
            source=source,
        )
        for build in ([builds] if isinstance(builds, Mapping) else builds)
        for target in build["compute_capabilities"]
    )


def bench_result(bench: Mapping[str, Any], *, source: str = "") -> Result:
    """What `wanlab bench` saved: the device's time where it is known apart from transfers."""
    facts, inputs, engine = bench["metadata"], bench["inputs"], str(bench["engine"])
    samples = bench["samples"].get("device") or bench["samples"]["latency"]
    name = str(facts.get("model", ""))
    clips = [(dtype, shape) for dtype, shape in inputs.values() if len(shape) == 5]
    dtype, (batch, _, frames, height, width) = clips[0] if clips else (None, [None] * 5)
    if frames is not None and "video" not in inputs:  # latents
        spec = models.get(name) if name in models.names() else None
        frames = (frames - 1) * spec.temporal_factor + 1 if spec else None
        height, width = (size * spec.spatial_factor if spec else None for size in (height, width))
    size = {"height": height, "width": width, "frames": frames, "batch": batch or 1}
    return completed(
        Result(
            work=Work(model=name, component=str(facts.get("component", engine)), **size),
            engine=engine,
            dtype=dtype,
            samples_ms=tuple(samples["values_ms"]),
            noise_percent=bench.get("noise_percent"),
            load_ms=facts.get("load_ms"),
            size_bytes=facts.get("size_bytes"),
            device=samples.get("device", ""),
            source=source,
        ),
        bench["environment"],
    )


def video_work(model: Any, generation: Any) -> Work:
    """What a generation of a model did."""
    settings = generation.settings
    guidance = settings["guidance_scale"]
    known: dict[str, Any] = {name: settings[name] for name in (*SIZE, "steps")}
    return Work(
        model=model.spec.name, weights=model.load.weights, guided=guidance > 1, seed=generation.seed, **known
    )


def call_work(model: Any, component: str, **size: Any) -> Work:
    """One call of a component: height, width, frames, batch."""
    return Work(model=model.spec.name, weights=model.load.weights, component=component, **size)


def work_of_parameters(parameters: Mapping[str, Any]) -> Work:
    """What a run with these parameters does, where it recorded no result: what was not given is the model's default."""
    given = {name: value for name, value in parameters.items() if value is not None}
    known = _defaults(str(given["model"])) | given if "model" in given else given
    guidance = known.get("guidance_scale")
    if "guided" not in known and isinstance(guidance, int | float):
        known["guided"] = guidance > 1
    values = {
        name: known[name] for name in (*SIZE, "model", "weights", "steps", "guided", "seed") if name in known
    }
    return Work(**values)


def completed(result: Result, environment: Mapping[str, Any], *, taken: str = "", source: str = "") -> Result:
    """The row with machine and software of an environment, where it does not name its own."""
    changes: dict[str, Any] = {"taken": result.taken or taken, "source": result.source or source}
    if result.machine is None:
        changes["machine"] = machine_of(environment, device=result.device, engine=result.engine)
    if not result.software:
        changes["software"] = software_of(environment)
    return msgspec.structs.replace(result, **changes)


def machine_of(environment: Mapping[str, Any], *, device: str = "", engine: str = "") -> Machine:
    """What it ran on, from `measure.environment`.

    Args:
        device: of the samples. engine: one that says that it ran on the CPU did so on a machine with a GPU too.
    """
    gpu = environment.get("gpu")
    if gpu and not str(device).startswith("cpu") and not computes_on_cpu(engine):
        facts = gpu if isinstance(gpu, Mapping) else {"name": gpu}
        names = ("sm_clock_max_mhz", "power_limit_w", "memory_gib")
        return Machine(gpu=facts.get("name"), **{name: facts.get(name) for name in names})
    known = {"cpu": environment.get("cpu"), "threads": environment.get("threads")}
    return Machine(**known, memory_gib=environment.get("ram_gib"))


def software_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a time depends on, from `measure.environment`."""
    packages = environment.get("packages", {})
    versions = {name: packages[name] for name in SOFTWARE if name in packages}
    if environment.get("gpu") and "onnxruntime-gpu" in versions:
        # Both are one package when imported; only this one has the CUDA provider, so it is the one that ran.
        versions.pop("onnxruntime", None)
    gpu = environment.get("gpu")
    driver = gpu.get("driver") if isinstance(gpu, Mapping) else None
    return versions | ({"driver": driver} if driver else {})


def _timed(
    work: Work, model: Any, samples: Any, control: Any, engine: str, facts: Mapping[str, Any]
) -> Result:
    plan = facts.get("plan")
    known = {"dtype": _dtype(model), "noise_percent": control.noise_percent, "taken": now()} | dict(facts)
    known |= {"plan": None if plan in UNCHANGED else str(plan)}
    return Result(work=work, engine=engine, samples_ms=samples.values_ms, device=samples.device, **known)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _percentile(values: Sequence[float], percent: float) -> float:
    """Linear between samples, as numpy's default."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    try:
        defaults = models.get(model).defaults if model in models.names() else None
    except WanlabError:
        return {}
    return {name: getattr(defaults, name) for name in (*SIZE, "steps", "guidance_scale")} if defaults else {}


# The same work

SIZE = ("height", "width", "frames")
OF_VIDEO = ("steps", "guided", "seed")
OF_WORK = ("model", "weights", "component", *SIZE, "batch", *OF_VIDEO)
OF_GPU = ("gpu", "sm_clock_max_mhz", "power_limit_w")
OF_CPU = ("cpu", "threads")
FACTS = (*OF_WORK, "dtype", *OF_GPU, *OF_CPU)
"""All that must be equal for two rows to be compared."""

UNKNOWN_ALLOWED = ("weights", "dtype")
"""No difference where a row does not say: the values of weights do not change a time."""

MEANT = {
    "clocks": ("sm_clock_max_mhz", "power_limit_w"),
    "machine": (*OF_GPU, *OF_CPU),
    "guidance_scale": ("guided",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
}
"""Words for several fields, or for what a field comes from."""

FIELDS = frozenset(Result.__struct_fields__)


class Done(Protocol):
    """What `differences` compares: a `Result`, or all repeats of one configuration."""

    @property
    def work(self) -> Work: ...

    @property
    def machine(self) -> Machine | None: ...

    @property
    def dtype(self) -> str | None: ...


def differences(one: Done, other: Done, allow: Iterable[str] = ()) -> list[tuple[str, Any, Any]]:
    """Fields in which one did other work than the other, or on another machine: field, its value, the other's.

    This is the only rule of what may be compared: model, weights, component, size, frames, batch, steps, guidance, seed,
    dtype of the model, and the machine with its clocks or threads.

    Args:
        allow: fields that may differ.

    Raises:
        WanlabError: an unknown field in `allow`.
    """
    left = fields(allow)
    if one.work.component != other.work.component and None in (one.work.component, other.work.component):
        left |= set(OF_VIDEO)  # of which one call has none
    mine, theirs = _facts(one), _facts(other)
    if mine["gpu"] != theirs["gpu"]:  # clocks and threads of different machines say nothing more
        left |= {*OF_GPU[1:], *OF_CPU}
    left |= {name for name in UNKNOWN_ALLOWED if None in (mine[name], theirs[name])}
    return [
        (name, mine[name], theirs[name]) for name in FACTS if name not in left and mine[name] != theirs[name]
    ]


def same_work(one: Done, other: Done, allow: Iterable[str] = ()) -> bool:
    """Whether two rows may be compared; see `differences`."""
    return not differences(one, other, allow)


def fields(allow: Iterable[str]) -> set[str]:
    """Fields that words of `allow` mean.

    Raises:
        WanlabError: an unknown word.
    """
    names: set[str] = set()
    for word in [allow] if isinstance(allow, str) else allow:
        if word not in FACTS and word not in MEANT:
            raise WanlabError(
                f"nothing is refused for {word!r}{did_you_mean(word, (*FACTS, *MEANT))}; allow takes"
                f" {', '.join((*FACTS, *MEANT))}"
            )
        names |= set(MEANT.get(word, (word,)))
    return names


def _facts(done: Done) -> dict[str, Any]:
    machine = done.machine or Machine()
    values = {name: getattr(done.work, name) for name in OF_WORK} | {"dtype": done.dtype}
    values |= {name: getattr(machine, name) for name in (*OF_GPU, *OF_CPU)}
    return values | {name: None for name in OF_CPU if machine.gpu}
