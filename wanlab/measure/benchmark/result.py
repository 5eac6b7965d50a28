"""What a benchmark found: all samples, the statistics of trtexec, its warnings, JSON, tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.samples import CV_LIMIT_PERCENT, AAControl, Samples, compare

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
ENQUEUE_LIMIT = 0.8
"""Of the device time: with more, trtexec warns that the host cannot feed the GPU."""
ORDER = ("latency", "h2d", "device", "d2h", "enqueue")


@dataclass(frozen=True, eq=False)
class Bench:
    """One benchmark of one engine.

    Attributes:
        engine: its name. metadata: what it knows of itself, its size_bytes and load_ms.
        inputs, outputs: tensor name -> dtype and shape.
        settings: warmup_ms, duration_ms, iterations, transfers, cuda_graph, buffers.
        samples: `latency`, and on a GPU `device`, `enqueue`, and with transfers `h2d` and `d2h`.
        control: the device time (on the CPU the latency) as if it were of two engines.
        wall_ms: from the first iteration to the end of the last.
        events_ratio: device time by other events over this one, where `events_check` was asked for.
    """

    engine: str
    metadata: dict[str, Any]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    settings: dict[str, Any]
    samples: dict[str, Samples]
    control: AAControl
    wall_ms: float
    environment: dict[str, Any]
    events_ratio: float | None = None

    @property
    def main(self) -> Samples:
        """What engines are compared by: device time, on the CPU latency."""
        return self.samples.get("device", self.samples["latency"])

    @property
    def throughput_per_s(self) -> float:
        """Inferences per second of wall time, one at a time."""
        return self.main.n / self.wall_ms * 1e3

    @property
    def device_total_ms(self) -> float:
        return sum(self.main.values_ms)

    def frame(self) -> pd.DataFrame:
        """One row per measure with the statistics of `Samples.row`."""
        import pandas as pd

        rows = [self.samples[name].row() for name in ORDER if name in self.samples]
        return pd.DataFrame(rows).rename(columns={"label": "measure"}).drop(columns="warning")

    def warnings(self) -> list[dict[str, str]]:
        """What to read the figures with: hazard, mitigation and help, at the limits at which trtexec warns."""
        found = []
        main = self.main
        if main.cv_percent > CV_LIMIT_PERCENT:
            found.append(
                {
                    "hazard": f"{main.label} varies: CV {main.cv_percent:.1f} % is over {CV_LIMIT_PERCENT} %",
                    "mitigation": "lock the clocks, stop other work, or run for longer",
                    "help": "medians of such a series move from run to run; compare within the A/A noise",
                }
            )
        enqueue = self.samples.get("enqueue")
        if enqueue and enqueue.median > ENQUEUE_LIMIT * main.median:
            found.append(
                {
                    "hazard": f"bound by the host: enqueue {enqueue.median:.3g} ms of {main.median:.3g} ms on the device",
                    "mitigation": "capture a CUDA graph, or give the engine more work a call",
                    "help": f"over {ENQUEUE_LIMIT:g} of the device time the GPU waits for launches",
                }
            )
        for name in ("h2d", "d2h"):
            copy = self.samples.get(name)
            if copy and copy.median >= main.median:
                found.append(
                    {
                        "hazard": f"bound by transfers: {name} {copy.median:.3g} ms, device {main.median:.3g} ms",
                        "mitigation": "keep the tensor on the device between calls, or overlap the copy",
                        "help": "without transfers (--no-transfers) the engine alone is measured",
                    }
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `read_bench` reads it back. Times in milliseconds."""
        return {
            "schema": SCHEMA,
            "engine": self.engine,
            "metadata": self.metadata,
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.inputs.items()},
            "outputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.outputs.items()},
            "settings": self.settings,
            "samples": {name: samples.to_dict() for name, samples in self.samples.items()},
            "control": [self.control.first.to_dict(), self.control.second.to_dict()],
            "noise_percent": self.control.noise_percent,
            "wall_ms": self.wall_ms,
            "throughput_per_s": self.throughput_per_s,
            "events_ratio": self.events_ratio,
            "warnings": self.warnings(),
            "environment": self.environment,
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the JSON in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_dict(), indent=1, default=str), encoding="utf-8")
        os.replace(temporary, path)
        return path


def read_bench(path: str | os.PathLike) -> Bench:
    """A saved benchmark.

    Raises:
        WanlabError: no such file, not a benchmark, or of another schema.
    """
    from wanlab.measure.timing import control_of

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise WanlabError(
                f"{path} has schema {data['schema']}, this wanlab reads {SCHEMA}; measure it again"
            )
        samples = {name: Samples.from_dict(row) for name, row in data["samples"].items()}
        if "latency" not in samples:
            raise ValueError("it has no samples of the latency")
        first, second = (Samples.from_dict(row) for row in data["control"])
        types = {
            key: {name: (dtype, tuple(shape)) for name, (dtype, shape) in data[key].items()}
            for key in ("inputs", "outputs")
        }
        return Bench(
            data["engine"],
            data["metadata"],
            types["inputs"],
            types["outputs"],
            data["settings"],
            samples,
            control_of(first, second),
            data["wall_ms"],
            data["environment"],
            data.get("events_ratio"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WanlabError(
            f"{path} is no saved benchmark ({error}); make one with wanlab bench --json"
        ) from error


def bench_table(results: Sequence[Bench], *, allow_different: bool = False) -> pd.DataFrame:
    """Engines side by side; the first is the baseline.

    Returns:
        engine, medians of every measure in ms, p99_ms, cv_percent, throughput_per_s, speedup with low and high
        (95 % interval), noise_percent of the baseline, verdict.

    Raises:
        WanlabError: nothing to compare, or inputs, device, transfers or graph capture differ (unless allowed).
    """
    import pandas as pd

    if not results:
        raise WanlabError("no benchmark to tabulate; give at least one")
    base = results[0]
    rows = []
    for result in results:
        different = _difference(base, result)
        if different and not allow_different:
            raise WanlabError(
                f"{result.engine} and {base.engine} differ in {different};"
                " measure both alike or pass allow_different=True"
            )
        gain = compare(
            base.main, result.main, base.control.noise_percent, allow_different_devices=allow_different
        )
        row: dict[str, Any] = {"engine": result.engine}
        row |= {f"{name}_ms": result.samples[name].median for name in ORDER if name in result.samples}
        row |= {"p99_ms": result.main.p99, "cv_percent": result.main.cv_percent}
        row |= {"throughput_per_s": result.throughput_per_s}
        row |= {"speedup": gain.speedup, "low": gain.low, "high": gain.high}
        row |= {"noise_percent": base.control.noise_percent}
        row["verdict"] = "baseline" if result is base else gain.verdict
        row["differs_in"] = different
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame if allow_different else frame.drop(columns="differs_in")


def _difference(base: Bench, other: Bench) -> str:
    """What makes two benchmarks incomparable, with both values; empty when nothing does."""
    shapes = [{name: shape for name, (_, shape) in result.inputs.items()} for result in (base, other)]
    if shapes[0] != shapes[1]:
        return f"shapes ({shapes[1]} against {shapes[0]})"
    if base.main.device != other.main.device:
        return f"device ({other.main.device} against {base.main.device})"
    for key in ("transfers", "cuda_graph"):
        if base.settings[key] != other.settings[key]:
            return f"{key} ({other.settings[key]} against {base.settings[key]})"
    kind = "CPU" if base.main.device == "cpu" else "GPU"
    both = [result.environment for result in (base, other)]
    names = [one.get("cpu") if kind == "CPU" else (one.get("gpu") or {}).get("name") for one in both]
    return f"{kind} ({names[1]} against {names[0]})" if names[0] != names[1] else ""
