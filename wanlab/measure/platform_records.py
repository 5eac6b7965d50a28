"""What was timed or built where: one engine on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanlab.measure.samples import AAControl, Samples

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
    from datetime import UTC, datetime

    from wanlab.measure.environment import environment

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
