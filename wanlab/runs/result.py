"""A typed row of what a run measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from wanlab import models
from wanlab.core.effects import APPLIED
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import now
from wanlab.core.stats import LEAST
from wanlab.core.text import WRONG
from wanlab.engines.registry import ENGINES, computes_on_cpu
from wanlab.measure.load import Load
from wanlab.measure.timing import Samples

MEASURED: Final = "measured"
BUILT: Final = "built only"
HERE = "measured here"
VIDEO = "the whole video"
UNCHANGED = (None, "", "default")
"""Values of a notebook's parameter `plan` that mean no plan."""

SIZE = ("height", "width", "frames")
SOFTWARE = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "apache-tvm")
NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Numbers that JSON does not have, by the words that stand for them."""

TIMED = ("time_per_video_ms", "time_per_frame_ms", "time_per_call_ms")
"""Figures that the samples of a result are samples of."""

OWN_FIGURES = (
    "noise_percent", "peak_memory_gib", "load_ms", "weights_gib", "prepare_ms", "size_bytes", "build_ms",
)  # fmt: skip
"""Fields of a result that are figures under their own names."""


class _Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Work(_Row, frozen=True):
    """What was done: one video, or one call of a component.

    Attributes:
        model: registry name.
        weights: `"pretrained"` or `"random"`; None where it is not known.
        lora: LoRAs that are fused into the weights, by content, component and strength; None without any.
        component: component of which one call was timed, such as `"expert_high"`; None for a whole video.
        height, width: size in pixels.
        frames: frames of the clip.
        batch: clips in one call.
        steps, guided, seed: settings of a generation; None for one call, which has none of them.
    """

    model: str | None = None
    weights: str | None = None
    lora: str | None = None
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
        lora = f" with LoRA {self.lora}" if self.lora else ""
        return f"{self.model}{lora} {self.what}, {self.shape}{steps}"


class Machine(_Row, frozen=True):
    """Hardware that did the work: a GPU with its limits, or a CPU with its threads.

    Attributes:
        gpu: name of the GPU; None where the CPU did the work, also on a machine with a GPU.
        sm_clock_max_mhz, power_limit_w: limits of the GPU.
        cpu, threads: name of the CPU and number of threads, where it did the work.
        memory_gib: memory of the GPU, or of the host.
        cores: cores of the CPU, where it did the work.
    """

    gpu: str | None = None
    sm_clock_max_mhz: float | None = None
    power_limit_w: float | None = None
    cpu: str | None = None
    threads: int | None = None
    memory_gib: float | None = None
    cores: int | None = None

    @property
    def name(self) -> str:
        if self.gpu:
            return self.gpu
        count = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        return f"{self.cpu or 'unknown processor'}{count}"


class Quality(_Row, frozen=True):
    """Distance of the videos from the original's and from the ground truth.

    Attributes:
        divergence_lpips, psnr_db: distance from the original's videos.
        divergence_floor_lpips: distance of the original from itself under changes that do not count.
        quality_loss_percent: relative increase of LPIPS to the ground truth, with its 95 % interval; None without truth.
    """

    divergence_lpips: float | None = None
    divergence_floor_lpips: float | None = None
    psnr_db: float | None = None
    quality_loss_percent: float | None = None
    quality_loss_low_percent: float | None = None
    quality_loss_high_percent: float | None = None

    @classmethod
    def of(cls, divergence: Any = None, loss: Any = None) -> Quality:
        """Quality from `evaluate.divergence` and `evaluate.QualityLoss`; either may be missing."""
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
        work: what was done.
        engine: registry name of the engine, such as `"eager"` or `"onnxruntime"`.
        plan: name of the precision plan, None without one.
        configuration: name of the configuration file, or its hash.
        techniques: names of the techniques that were applied beside engine and plan.
        dtype: dtype that the model was loaded in, such as `"bfloat16"`; of an engine file the dtype of its inputs.
        state: `"measured"`, or `"built only"` where this machine lacks the GPU that an engine was built for.
        samples_ms: every sample.
        median_ms, sample_count: median and number of samples, where the samples themselves are not known.
        noise_percent: noise of the A/A control; None without one.
        peak_memory_gib: peak of the whole run.
        weights_gib: size of the weights as this configuration stores them.
        load_ms: time to load a model or engine until it can run.
        prepare_ms: time of conversion, calibration and compilation.
        size_bytes, build_ms: size of the engine's files, and time to build them.
        effect: `"applied"`, `"not applied"` or `"baseline"`, see `wanlab.core.effects`.
        kernels: kernels that do the matrix products.
        figures: other numbers or words by name, with the unit at the end of the name.
        device: device that the samples were taken on.
        load: load of the machine by others while they were taken; None where not known.
        machine, software: hardware and package versions; `run.result` fills them in.
        notes: remarks about weights and settings that the figures depend on, e.g. that a prompt was cut.
        taken: time of the measurement, ISO 8601.
        source: run or file that the row was read from.
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
    load: Load | None = None
    machine: Machine | None = None
    software: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    taken: str = ""
    source: str = ""

    @property
    def time_ms(self) -> float | None:
        """Median over all samples."""
        return self.samples.median if self.samples else self.median_ms

    @property
    def time_name(self) -> str:
        """Name of its time among the figures: of a video, or of one call."""
        return TIMED[0] if self.work.component is None else TIMED[2]

    @property
    def n(self) -> int | None:
        """Number of samples."""
        return len(self.samples_ms) or self.sample_count

    @property
    def samples(self) -> Samples | None:
        """All samples as a timing; None where the samples are not known."""
        return Samples(self.engine, self.samples_ms, self.device, load=self.load) if self.samples_ms else None

    @property
    def results(self) -> dict[str, Any]:
        """The same as `row()`, under the name that a `MeasuredConfiguration` has for it."""
        return self.row()

    @property
    def setup(self) -> dict[str, str]:
        """Software that its time depends on: versions of PyTorch, of its engine and of the driver, where known."""
        needs = ENGINES[self.engine].needs if self.engine in ENGINES else ()
        packages = {need.package.removesuffix("-gpu") for need in needs} - {"torch"}
        names = {name: name.removesuffix("-gpu") for name in self.software}  # two wheels install one package
        versions = [f"{name} {self.software[full]}" for full, name in names.items() if name in packages]
        facts = {name: self.software.get(name) for name in ("torch", "driver")}
        return {
            name: value
            for name, value in (facts | {"engine_version": "".join(versions[:1])}).items()
            if value
        }

    @property
    def engine_name(self) -> str:
        """The engine with the kind of device that it ran on, such as `"onnxruntime-cuda"`."""
        device = "cuda" if self.machine and self.machine.gpu else "cpu"
        return ENGINES[self.engine].label(device) if self.engine in ENGINES else self.engine

    @property
    def key(self) -> tuple:
        """Identity of this row among those of its run: a later row with the same key replaces it."""
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
        """All figures by name, as comparisons, tables and exports show them; figures that are not known are left out."""
        time_ms, samples = self.time_ms, self.samples
        values: dict[str, Any] = {
            "engine": self.engine,
            "plan": self.plan or "default",
            self.time_name: time_ms,
        }
        if time_ms is not None and self.work.component is None and self.work.frames:
            values["time_per_frame_ms"] = time_ms / self.work.frames
        if samples and samples.n >= LEAST:
            values |= {"p95_ms": samples.p95, "cv_percent": samples.cv_percent}
        values |= {name: getattr(self, name) for name in OWN_FIGURES}
        values |= msgspec.structs.asdict(self.quality) if self.quality else {}
        values |= {"effect": self.effect, "kernels": self.kernels} | self.figures
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The row as data for JSON; `parse_result` reads it back."""
        return msgspec.to_builtins(self)


def parse_result(value: Any, where: str) -> Result:
    """A `Result` from JSON.

    Raises:
        WanlabError: a field is missing or of another type; the message names its path, and the file and line (`where`).
    """
    try:
        if isinstance(value, Mapping) and isinstance(value.get("figures"), Mapping):
            figures = {name: NON_FINITE.get(item, item) for name, item in value["figures"].items()}
            value = {**value, "figures": figures}
        result = msgspec.convert(value, Result, strict=False)  # not strict: infinity is a word in JSON
    except (TypeError, *WRONG) as error:
        raise WanlabError(f"cannot read {where}: {first_line(error.__cause__ or error)}") from error
    if contradiction := _contradiction(result):
        raise WanlabError(f"cannot read {where}: {contradiction}; one of them was edited")
    return result


def _contradiction(result: Result) -> str:
    """The first figure that its own samples or interval contradict, in words; empty without one."""
    samples = result.samples
    pairs: list[tuple[str, Any, Any]] = []
    if samples:
        pairs += [("median_ms", result.median_ms, samples.median)]
        pairs += [("sample_count", result.sample_count, samples.n)]
    own = msgspec.structs.replace(result, figures={}).row()
    pairs += [(f"figures.{name}", value, own.get(name)) for name, value in result.figures.items()]
    for name, stated, computed in pairs:
        numbers = isinstance(stated, int | float) and isinstance(computed, int | float)
        if numbers and not math.isclose(stated, computed, rel_tol=1e-6):
            return f"{name} is {stated:g}, its samples or field say {computed:g}"
    quality = result.quality or Quality()
    loss, low, high = (getattr(quality, f"quality_loss_{end}percent") for end in ("", "low_", "high_"))
    if None not in (loss, low, high) and (loss < low or loss > high):
        return f"quality_loss_percent is {loss:g}, outside its interval {low:g} to {high:g}"
    return ""


def checked_result(result: Any) -> Result:
    """The result, if every field is of its type; a `Struct` itself does not check types.

    Raises:
        WanlabError: it is no `Result`, or a field is of another type.
    """
    if not isinstance(result, Result):
        raise WanlabError(
            f"run.result takes a wanlab.runs.Result, not {type(result).__name__}; runs.video_result makes one"
        )
    return parse_result(result.to_dict(), "the result")


# Rows from the measurements of a notebook


def video_result(model: Any, cost: Any, *, engine: str = "eager", **facts: Any) -> Result:
    """Row of whole videos that `measure.baseline` timed.

    Args:
        model: the `Model` that was timed.
        cost: its `Baseline`.
        facts: other fields of `Result`, such as plan, quality, peak_memory_gib; they replace those of `cost`.
    """
    facts = {"peak_memory_gib": cost.memory.peak_gib, "load_ms": cost.load_ms} | facts
    return _timed(video_work(model, cost.generation), model, cost.samples, cost.control, engine, facts)


def comparison_results(
    variants: Mapping[str, Any], pair: Any, facts: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Result, ...]:
    """Rows of whole videos of several variants that `measure.compare_models` timed, in its order.

    Args:
        variants: label -> model, as given to `compare_models`; the label is the engine, unless `facts` names another.
        facts: label -> other fields of `Result`.
    """
    results = []
    for label, model in variants.items():
        values = dict((facts or {}).get(label, {}))
        engine, work = values.pop("engine", label), video_work(model, pair.generations[label])
        results.append(_timed(work, model, pair.samples[label], pair.control, engine, values))
    return tuple(results)


def forward_results(model: Any, cost: Any, *, engine: str = "eager", **facts: Any) -> tuple[Result, ...]:
    """Rows of single calls of each expert in the recorded generation of a `Baseline`; without an A/A control."""
    facts = {"device": cost.samples.device} | facts
    return _call_rows(model, cost.calls, cost.generation.settings, engine, facts)


def timeline_results(
    model: Any, timeline: Any, settings: Mapping[str, Any], *, engine: str = "eager", **facts: Any
) -> tuple[Result, ...]:
    """Rows of single calls of each expert that `diagnose.timeline` recorded; without an A/A control.

    Args:
        settings: settings of its generations; height, width and frames that are None are the model's defaults.
        facts: other fields of `Result`.
    """
    facts = {"device": str(model.device)} | facts
    return _call_rows(model, timeline.calls, _resolved(model, settings), engine, facts)


def plan_results(
    model: Any, verifications: Iterable[Any], settings: Mapping[str, Any], *, engine: str = "eager"
) -> tuple[Result, ...]:
    """Rows of precision plans that `precision.verify_plans` verified: quality and bits, without a time.

    Args:
        verifications: one or several, all of the same cases.
        settings: settings of their generations; what is None is the model's default.
    """
    work = _generation_work(model, _resolved(model, settings))
    return tuple(
        Result(
            work=work,
            engine=engine,
            plan=each.plan.name,
            dtype=_dtype(model),
            quality=Quality.of(each.divergence, each.quality),
            effect=APPLIED,  # a plan that was not applied raises when it is verified
            kernels=each.kernels,
            figures={
                "bits_per_weight": each.bits_per_weight,
                "share_8bit_percent": 100 * each.share_8bit,
                "linear_weights_gib": each.weight_bytes / 2**30,
                "cases": len(each.frame),
            },
            device=str(model.device),
        )
        for each in verifications
    )


def call_results(
    work: Work,
    samples: Mapping[str, Any],
    control: Any,
    *,
    dtype: str | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Result, ...]:
    """Rows of calls of one component in several engines that `measure.interleaved` timed.

    Args:
        work: work of one call, from `call_work`.
        samples: engine -> timing.
        control: A/A control of the first engine.
        dtype: dtype of the weights.
        facts: engine -> other fields of `Result`; names that `Result` does not have are left out. Where several rows have
            one engine, the keys are labels and the facts name the engine.
    """
    results = []
    for engine, timing in samples.items():
        values = {"engine": engine, "dtype": dtype, "noise_percent": control.noise_percent}
        values |= {name: value for name, value in (facts or {}).get(engine, {}).items() if name in FIELDS}
        values |= {"samples_ms": timing.values_ms, "device": timing.device, "load": timing.load}
        results.append(Result(work=work, **values))
    return tuple(results)


def build_results(
    builds: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, taken: str = "", source: str = ""
) -> tuple[Result, ...]:
    """Rows of engines of `engines.build_tensorrt` that did not run: one for each GPU that each was built for.

    Args:
        builds: one or several records of `BuildInfo.record`, or of the files beside the engines.
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
    """Row of a file of `wanlab bench`: the device's time without transfers where it is known, else the latency."""
    facts, inputs, engine = bench["metadata"], bench["inputs"], str(bench["engine"])
    samples = bench["samples"].get("device") or bench["samples"]["latency"]
    name = str(facts.get("model", ""))
    clips = [(dtype, shape) for dtype, shape in inputs.values() if len(shape) == 5]
    dtype, (batch, _, frames, height, width) = clips[0] if clips else (None, [None] * 5)
    if frames is not None and "video" not in inputs:  # latents
        spec = models.get(name) if models.is_known(name) else None
        frames = (frames - 1) * spec.temporal_factor + 1 if spec else None
        height, width = (size * spec.spatial_factor if spec else None for size in (height, width))
    size = {"height": height, "width": width, "frames": frames, "batch": batch or 1}
    return completed(
        Result(
            work=Work(
                model=name, lora=facts.get("lora"), component=str(facts.get("component", engine)), **size
            ),
            engine=engine,
            dtype=dtype,
            samples_ms=tuple(samples["values_ms"]),
            noise_percent=bench.get("noise_percent"),
            load_ms=facts.get("load_ms"),
            size_bytes=facts.get("size_bytes"),
            device=samples.get("device", ""),
            load=msgspec.convert(samples["load"], Load) if samples.get("load") else None,
            source=source,
        ),
        bench["environment"],
    )


def video_work(model: Any, generation: Any) -> Work:
    """Work of a generation."""
    return _generation_work(model, generation.settings, generation.seed)


def _generation_work(model: Any, settings: Mapping[str, Any], seed: int | None = None) -> Work:
    values = {name: settings[name] for name in (*SIZE, "steps")}
    values |= {"guided": settings["guidance_scale"] > 1, "seed": seed}
    return Work(model=model.spec.name, weights=model.load.weights, lora=model.spec.lora_identity(), **values)


def call_work(model: Any, component: str, **size: Any) -> Work:
    """Work of one call of a component; `size` is height, width, frames, batch."""
    lora = model.spec.lora_identity(component)
    return Work(model=model.spec.name, weights=model.load.weights, lora=lora, component=component, **size)


def work_of_parameters(parameters: Mapping[str, Any]) -> Work:
    """Work of a run that recorded no result, from its parameters and the defaults of its model."""
    values = {name: value for name, value in parameters.items() if value is not None}
    if isinstance(values.get("model"), str):
        values["model"], loras = models.split_model(values["model"])
        values["lora"] = ", ".join(loras) or None  # their contents stand in the identity of the run's weights
    values = _defaults(str(values.get("model"))) | values
    guidance = values.get("guidance_scale")
    if "guided" not in values and isinstance(guidance, int | float):
        values["guided"] = guidance > 1
    names = (*SIZE, "model", "weights", "lora", "steps", "guided", "seed")
    return Work(**{name: values[name] for name in names if name in values})


def completed(
    result: Result,
    environment: Mapping[str, Any],
    *,
    taken: str = "",
    source: str = "",
    notes: tuple[str, ...] = (),
) -> Result:
    """The row with machine and software of an environment, and with notes, where it has none of its own."""
    changes: dict[str, Any] = {"taken": result.taken or taken, "source": result.source or source}
    changes["notes"] = result.notes or notes
    if result.machine is None:
        changes["machine"] = machine_of(environment, device=result.device, engine=result.engine)
    if not result.software:
        changes["software"] = software_of(environment)
    return msgspec.structs.replace(result, **changes)


def machine_of(environment: Mapping[str, Any], *, device: str = "", engine: str = "") -> Machine:
    """Hardware that did the work, from `measure.environment`.

    Args:
        device: device of the samples.
        engine: engine that ran; some compute on the CPU also on a machine with a GPU.
    """
    gpu = environment.get("gpu")
    if gpu and not str(device).startswith("cpu") and not computes_on_cpu(engine):
        facts = gpu if isinstance(gpu, Mapping) else {"name": gpu}
        names = ("sm_clock_max_mhz", "power_limit_w", "memory_gib")
        return Machine(gpu=facts.get("name"), **{name: facts.get(name) for name in names})
    return Machine(
        cpu=environment.get("cpu"),
        threads=environment.get("threads"),
        memory_gib=environment.get("ram_gib"),
        cores=environment.get("cores"),
    )


def software_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a time depends on, from `measure.environment`."""
    packages = environment.get("packages", {})
    versions = {name: packages[name] for name in SOFTWARE if name in packages}
    if environment.get("gpu") and "onnxruntime-gpu" in versions:
        # Both are imported under one name; the one with the CUDA provider is the one that ran.
        versions.pop("onnxruntime", None)
    gpu = environment.get("gpu")
    driver = gpu.get("driver") if isinstance(gpu, Mapping) else None
    return versions | ({"driver": driver} if driver else {})


def _timed(
    work: Work, model: Any, samples: Any, control: Any, engine: str, facts: Mapping[str, Any]
) -> Result:
    plan = facts.get("plan")
    values = {"dtype": _dtype(model), "noise_percent": control.noise_percent, "taken": now()} | dict(facts)
    values |= {"plan": None if plan in UNCHANGED else str(plan)}
    values |= {"samples_ms": samples.values_ms, "device": samples.device, "load": samples.load}
    return Result(work=work, engine=engine, **values)


def _call_rows(
    model: Any, calls: Any, settings: Mapping[str, Any], engine: str, facts: Mapping[str, Any]
) -> tuple[Result, ...]:
    """A row per expert of a table of calls: component, time_ms."""
    size, rows = {name: settings[name] for name in SIZE}, []
    for component, each in calls.groupby("component", sort=False):
        if str(component).startswith("expert"):
            values = {"samples_ms": tuple(map(float, each["time_ms"])), "dtype": _dtype(model)} | dict(facts)
            rows.append(Result(work=call_work(model, str(component), **size), engine=engine, **values))
    return tuple(rows)


def _resolved(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a generation, with the model's defaults for those that are missing or None."""
    settings = {name: value for name, value in settings.items() if value is not None}
    return _settings_of(model.spec.defaults) | settings


def _settings_of(defaults: Any) -> dict[str, Any]:
    return {name: getattr(defaults, name) for name in (*SIZE, "steps", "guidance_scale")}


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    try:
        return _settings_of(models.get(model).defaults) if models.is_known(model) else {}
    except WanlabError:
        return {}


FIELDS = frozenset(Result.__struct_fields__)
