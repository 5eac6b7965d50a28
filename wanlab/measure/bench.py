"""Benchmark of a single engine, with the same figures as trtexec; the host and device memory that it uses on a GPU."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, did_you_mean, require
from wanlab.core.files import write_text
from wanlab.measure.environment import environment
from wanlab.measure.load import LoadMeter
from wanlab.measure.timing import CV_LIMIT_PERCENT, AAControl, Samples, compare, control_of

SCHEMA = 1
ENQUEUE_LIMIT = 0.8
"""Limit of enqueue time over device time; above it trtexec warns that the host cannot feed the GPU."""
ORDER = ("latency", "h2d", "device", "d2h", "enqueue")


@dataclass(frozen=True, eq=False)
class Bench:
    """One benchmark of one engine.

    Attributes:
        engine: name of the engine. metadata: facts about it, with size_bytes and load_ms.
        inputs, outputs: tensor name -> dtype and shape.
        settings: warmup_ms, duration_ms, iterations, transfers, cuda_graph, buffers.
        samples: `latency`, and on a GPU `device`, `enqueue`, and with transfers `h2d` and `d2h`.
        control: A/A control: the device time (on the CPU the latency) split in two series.
        wall_ms: time from the first iteration to the end of the last.
        events_ratio: device time measured by `events_check` over the device time here; None if it was not called.
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
        """The measure that engines are compared by: device time, on the CPU latency."""
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
        rows = [self.samples[name].row() for name in ORDER if name in self.samples]
        return pd.DataFrame(rows).rename(columns={"label": "measure"}).drop(columns="warning")

    def warnings(self) -> list[dict[str, str]]:
        """Warnings about the figures: hazard, mitigation and help, at the limits of trtexec, and the load of the machine."""
        rows = []
        main = self.main
        if main.load and main.load.text:
            rows.append(
                {
                    "hazard": f"timed while {main.load.text}",
                    "mitigation": "stop other work and measure again",
                    "help": "run it again on an idle machine",
                }
            )
        if main.cv_percent > CV_LIMIT_PERCENT:
            rows.append(
                {
                    "hazard": f"{main.label} varies: CV {main.cv_percent:.1f} % is over {CV_LIMIT_PERCENT} %",
                    "mitigation": "lock the clocks, stop other work, or run for longer",
                    "help": "medians of such a series move from run to run; compare within the A/A noise",
                }
            )
        enqueue = self.samples.get("enqueue")
        if enqueue and enqueue.median > ENQUEUE_LIMIT * main.median:
            rows.append(
                {
                    "hazard": f"bound by the host: enqueue {enqueue.median:.3g} ms of {main.median:.3g} ms on the device",
                    "mitigation": "capture a CUDA graph, or give the engine more work a call",
                    "help": f"over {ENQUEUE_LIMIT:g} of the device time the GPU waits for launches",
                }
            )
        for name in ("h2d", "d2h"):
            copy = self.samples.get(name)
            if copy and copy.median >= main.median:
                rows.append(
                    {
                        "hazard": f"bound by transfers: {name} {copy.median:.3g} ms, device {main.median:.3g} ms",
                        "mitigation": "keep the tensor on the device between calls, or overlap the copy",
                        "help": "without transfers (--no-transfers) the engine alone is measured",
                    }
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The benchmark as data for JSON; `read_bench` reads it back. Times in milliseconds."""
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
        """Write the JSON file, atomically."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, default=str))


def read_bench(path: str | os.PathLike) -> Bench:
    """Read a saved benchmark.

    Raises:
        WanlabError: no such file, not a benchmark, or another schema version.
    """
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
    """Table of several engines; the first is the baseline.

    Returns:
        engine, medians of every measure in ms, p99_ms, cv_percent, throughput_per_s, speedup with low and high
        (95 % interval), noise_percent of the baseline, verdict.

    Raises:
        WanlabError: nothing to compare, or inputs, device, transfers or graph capture differ (unless allowed).
    """
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
    """The setting that makes two benchmarks incomparable, with both values; empty when they are comparable."""
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


EFFECT_LIMIT = 0.02
"""Largest relative L2 difference of outputs, run directly and run over fixed memory; bfloat16 rounding stays below it."""


def bench(
    engine,
    feeds: Mapping[str, torch.Tensor],
    *,
    warmup_ms: float = 200.0,
    duration_ms: float = 3000.0,
    iterations: int = 10,
    transfers: bool = True,
    cuda_graph: bool = False,
    buffers: str = "auto",
    progress: bool = True,
) -> Bench:
    """Time an engine as trtexec does, one inference in flight at a time.

    On a GPU every iteration copies the inputs from page-locked memory, enqueues the engine, and copies the outputs
    back, on one stream with an event before and after each: `h2d`, `device`, `d2h`, together `latency`; `enqueue` is
    the host time of the call that launches the engine. On the CPU there is only `latency`, by a monotonic
    clock. Iterations continue until both `iterations` and `duration_ms` are reached. They are assigned to two series in
    turn (A B B A ...), which are the A/A control.

    Args:
        engine: see `wanlab.engines.base.Engine`.
        feeds: every input by name; cast to the engine's dtypes.
        warmup_ms: duration of the warm-up; at least one call is made.
        transfers: copy inputs and outputs in every iteration; if False, copy the inputs once before all.
        cuda_graph: capture the engine as a CUDA graph once and replay it.
        buffers: `"pycuda"`, `"torch"` or `"auto"`; used on a GPU only.

    Raises:
        WanlabError: impossible settings, inputs that do not fit, an engine that does not support the settings, or one
            whose outputs over fixed memory differ from those of `run`.
    """
    if iterations < 2 or min(warmup_ms, duration_ms) < 0:
        raise WanlabError(
            f"iterations is {iterations}, warm-up {warmup_ms:g} ms, duration {duration_ms:g} ms; give at least 2"
            " iterations (two sides are compared) and no negative times"
        )
    inputs, shapes, expected = _prepared(engine, feeds)
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        memory = make_buffers(buffers, inputs, shapes, engine.device)
        one: _GpuIteration | _CpuIteration = _GpuIteration(engine, memory, transfers, cuda_graph)
    else:
        if cuda_graph:
            raise WanlabError(
                f"{engine.name} runs on the CPU, which has no CUDA graphs; leave cuda_graph out"
            )
        memory, transfers = None, False
        one = _CpuIteration(engine, inputs, shapes)
    try:
        until = time.perf_counter() + warmup_ms / 1e3
        one()
        while time.perf_counter() < until:
            one()
        check_bound(engine.name, expected, one.results())
        del expected
        times: list[dict[str, float]] = []
        meter, begin = LoadMeter(on_gpu), time.perf_counter()
        bar = _Bar(engine.name, iterations, duration_ms, progress)
        while len(times) < iterations or (time.perf_counter() - begin) * 1e3 < duration_ms:
            times.append(one())
            bar.show(len(times), (time.perf_counter() - begin) * 1e3)
        wall_ms = (time.perf_counter() - begin) * 1e3
        bar.close()
    finally:
        if memory is not None:
            memory.close()
    load = meter.load()
    clock = ("CUDA events", str(engine.device)) if on_gpu else ("monotonic clock", "cpu")
    samples = {
        name: Samples(
            name,
            tuple(row[name] for row in times),
            clock[1],
            "monotonic clock" if name == "enqueue" else clock[0],
            load,
        )
        for name in times[0]
    }
    return Bench(
        engine=engine.name,
        metadata={**engine.metadata, "size_bytes": engine.size_bytes, "load_ms": engine.load_ms},
        inputs={name: _type(tensor) for name, tensor in inputs.items()},
        outputs=shapes,
        settings={
            "warmup_ms": warmup_ms,
            "duration_ms": duration_ms,
            "iterations": iterations,
            "transfers": transfers,
            "cuda_graph": cuda_graph,
            "buffers": memory.backend if memory is not None else None,
        },
        samples=samples,
        control=_sides(samples["device" if on_gpu else "latency"]),
        wall_ms=wall_ms,
        environment=environment(engine.device),
    )


def events_check(engine, feeds: Mapping[str, torch.Tensor], result: Bench, *, iterations: int = 50) -> float:
    """Device time by events of PyTorch, on its stream and memory, divided by the device time that `bench` measured.

    An independent measurement that shares no buffers, stream or events with the first; 1.00 when they agree.

    Raises:
        WanlabError: an engine on the CPU, which has no events.
    """
    if engine.device.type != "cuda":
        raise WanlabError(f"{engine.name} runs on the CPU; there are no events to check its times with")
    inputs, shapes, _ = _prepared(engine, feeds)
    outputs = _memory(shapes, engine.device)
    call = engine.bind(inputs, outputs, cuda_graph=result.settings["cuda_graph"])
    sources = {name: tensor.cpu().pin_memory() for name, tensor in inputs.items()}
    targets = {name: tensor.cpu().pin_memory() for name, tensor in outputs.items()}
    transfers = result.settings["transfers"]
    times: list[float] = []
    until = time.perf_counter() + result.settings["warmup_ms"] / 1e3
    while len(times) < iterations:
        # The rhythm of `bench`: without its copies and waits between the calls the device runs hotter, so slower.
        if transfers:
            _copy(sources, inputs)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        if transfers:
            _copy(outputs, targets)
        torch.cuda.synchronize(engine.device)
        if time.perf_counter() > until:
            times.append(first.elapsed_time(last))
    return statistics.median(times) / result.samples["device"].median


class _GpuIteration:
    """One iteration on a GPU; returns its times in ms."""

    def __init__(self, engine, memory, transfers: bool, cuda_graph: bool) -> None:
        self.memory, self.transfers = memory, transfers
        memory.upload()
        self.call = engine.bind(memory.inputs, memory.outputs, stream=memory.stream, cuda_graph=cuda_graph)

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs of the last call."""
        first = self.memory.mark()
        self.memory.download()
        self.memory.elapsed_ms(first, self.memory.mark())  # waits for the device
        return self.memory.results()

    def __call__(self) -> dict[str, float]:
        memory = self.memory
        marks = [memory.mark()]
        if self.transfers:
            memory.upload()
            marks.append(memory.mark())
        begin = time.perf_counter()
        self.call()
        enqueue_ms = (time.perf_counter() - begin) * 1e3
        marks.append(memory.mark())
        if self.transfers:
            memory.download()
            marks.append(memory.mark())
        stretches = [memory.elapsed_ms(first, last) for first, last in pairwise(marks)]
        names = ("h2d", "device", "d2h") if self.transfers else ("device",)
        return {"latency": sum(stretches), **dict(zip(names, stretches, strict=True)), "enqueue": enqueue_ms}


class _CpuIteration:
    """One iteration on the CPU; returns its time in ms."""

    def __init__(self, engine, inputs, shapes) -> None:
        self.outputs = _memory(shapes, engine.device)
        self.call = engine.bind(inputs, self.outputs)

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs of the last call."""
        return self.outputs

    def __call__(self) -> dict[str, float]:
        begin = time.perf_counter()
        self.call()
        return {"latency": (time.perf_counter() - begin) * 1e3}


def _prepared(engine, feeds):
    """Inputs in the engine's dtypes, types and shapes of its outputs, and the outputs on the host; all by name."""
    outputs = engine.run(feeds)  # refuses inputs that do not fit, and gives the sizes of the outputs
    inputs = {
        name: torch.as_tensor(feeds[name]).to(engine.device, getattr(torch, dtype)).contiguous()
        for name, (dtype, _) in engine.inputs.items()
    }
    expected = {name: tensor.cpu() for name, tensor in outputs.items()}
    return inputs, {name: _type(tensor) for name, tensor in outputs.items()}, expected


def check_bound(
    engine: str, expected: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> None:
    """Refuse an engine whose outputs over fixed memory (`bind`) differ from its own `run`: its times mean nothing.

    Args:
        engine: its name, for the message.
        expected: outputs of `run`, on the host.
        outputs: what the bound function wrote, on any device.

    Raises:
        WanlabError: an output differs by more than `EFFECT_LIMIT` (relative L2).
    """
    for name, reference in expected.items():
        # Random weights may overflow; values that are not finite must be so in both.
        a, b = (
            torch.nan_to_num(tensor.cpu().float(), 1.0, 2.0, -2.0) for tensor in (reference, outputs[name])
        )
        scale = a.abs().max().clamp_min(1e-30)  # squares of large values would overflow
        difference = (((a - b) / scale).norm() / (a / scale).norm().clamp_min(1e-30)).item()
        if not difference <= EFFECT_LIMIT:
            raise WanlabError(
                f"output {name!r} of {engine} over fixed memory differs by {difference:.1g} (relative L2) from its own run;"
                " these are times of another computation; open the engine anew, without cuda_graph if it has one"
            )


def _copy(sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in sources.items():
        targets[name].copy_(tensor, non_blocking=True)


def _memory(shapes, device) -> dict[str, Any]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, (dtype, shape) in shapes.items()
    }


def _type(tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _sides(samples: Samples) -> AAControl:
    """Two series from one, samples assigned in turn A B B A."""
    sides: tuple[list[float], list[float]] = ([], [])
    for index, value in enumerate(samples.values_ms):
        sides[(index + 1) // 2 % 2].append(value)
    first, second = (
        Samples(name, tuple(values), samples.device, samples.clock)
        for name, values in zip((samples.label, f"{samples.label} (again)"), sides, strict=True)
    )
    return control_of(first, second)


class _Bar:
    """Progress bar towards the number of iterations or the duration, whichever takes longer."""

    def __init__(self, label: str, iterations: int, duration_ms: float, progress: bool) -> None:
        self.limits = (iterations, max(duration_ms, 1e-9))
        self.bar = tqdm(total=100, desc=f"bench {label}", unit="%", leave=False, disable=not progress)

    def show(self, count: int, elapsed_ms: float) -> None:
        done = min(count / self.limits[0], elapsed_ms / self.limits[1])
        self.bar.update(min(int(100 * done), 100) - self.bar.n)

    def close(self) -> None:
        self.bar.close()


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> PyTorch's name of the dtype, and shape."""


class TorchBuffers:
    """Page-locked and device memory, stream and events of PyTorch.

    Attributes:
        inputs, outputs: tensors on the device, by name.
        stream: `CUstream` handle that copies and events use, and that the engine must use.
    """

    backend = "torch"

    def __init__(self, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.stream: int = self._stream.cuda_stream
        self._host_inputs = {name: tensor.cpu().contiguous().pin_memory() for name, tensor in feeds.items()}
        self.inputs = {
            name: torch.empty_like(host, device=device) for name, host in self._host_inputs.items()
        }
        self.outputs = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, shape) in outputs.items()
        }
        self._host_outputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            for name, tensor in self.outputs.items()
        }
        torch.cuda.synchronize(device)

    def upload(self) -> None:
        """Copy the inputs from the host, on the stream."""
        self._copy(self._host_inputs, self.inputs)

    def download(self) -> None:
        """Copy the outputs to the host, on the stream."""
        self._copy(self.outputs, self._host_outputs)

    def _copy(self, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            _copy(source, target)

    def mark(self) -> Any:
        """Record an event on the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    @staticmethod
    def elapsed_ms(first: Any, last: Any) -> float:
        """Device time between two events; waits for the second."""
        last.synchronize()
        return first.elapsed_time(last)

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs on the host after the last finished download."""
        return dict(self._host_outputs)

    def close(self) -> None:
        """Free all memory."""
        for tensors in (self.inputs, self.outputs, self._host_inputs, self._host_outputs):
            tensors.clear()


class PycudaBuffers:
    """As `TorchBuffers`, with memory, stream, copies and events of PyCUDA, in the context that PyTorch uses."""

    backend = "pycuda"

    def __init__(self, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device) -> None:
        driver = require("pycuda.driver", "pycuda")
        torch.cuda.synchronize(device)  # creates the primary context, which both libraries then share
        driver.init()
        self._driver = driver
        self._context = driver.Device(device.index or 0).retain_primary_context()
        self._context.push()
        try:
            self._stream = driver.Stream()
            self.stream: int = self._stream.handle
            self._sources: dict[str, Any] = {}
            self._targets: dict[str, Any] = {}
            self.inputs = {name: self._input(name, tensor.cpu(), device) for name, tensor in feeds.items()}
            self.outputs = {
                name: self._tensor(name, self._targets, dtype, shape, device)
                for name, (dtype, shape) in outputs.items()
            }
        finally:
            self._context.pop()

    def upload(self) -> None:
        """Copy the inputs from the host, on the stream."""
        self._context.push()
        for memory, host in self._sources.values():
            self._driver.memcpy_htod_async(memory, host, self._stream)
        self._context.pop()

    def download(self) -> None:
        """Copy the outputs to the host, on the stream."""
        self._context.push()
        for memory, host in self._targets.values():
            self._driver.memcpy_dtoh_async(host, memory, self._stream)
        self._context.pop()

    def mark(self) -> Any:
        """Record an event on the stream."""
        self._context.push()
        event = self._driver.Event()
        event.record(self._stream)
        self._context.pop()
        return event

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Device time between two events; waits for the second."""
        self._context.push()
        last.synchronize()
        elapsed = first.time_till(last)
        self._context.pop()
        return elapsed

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs on the host after the last finished download."""
        outputs = {}
        for name, (_, host) in self._targets.items():
            like = self.outputs[name]
            outputs[name] = torch.from_numpy(host.copy()).view(like.dtype).view(like.shape)
        return outputs

    def close(self) -> None:
        """Free all memory."""
        self.inputs.clear()
        self.outputs.clear()
        self._context.push()
        self._stream.synchronize()
        for memory, _ in (*self._sources.values(), *self._targets.values()):
            memory.free()
        self._sources.clear()
        self._targets.clear()
        self._stream = None  # while its context exists: without it a stream cannot be destroyed
        self._context.pop()
        self._context.detach()

    def _input(self, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        device_tensor = self._tensor(name, self._sources, dtype, tuple(tensor.shape), device)
        self._sources[name][1][:] = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return device_tensor

    def _tensor(self, name: str, places: dict, dtype: str, shape: tuple[int, ...], device) -> torch.Tensor:
        """Device memory as a tensor, without a copy, and page-locked memory of the same size."""
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        memory = self._driver.mem_alloc(max(size, 1))
        places[name] = (memory, self._driver.pagelocked_empty(size, np.uint8))
        return torch.as_tensor(_Bytes(int(memory), size), device=device).view(kind).view(shape)


class _Bytes:
    """Device memory in the CUDA array interface (version 3), as bytes, because the interface has no bfloat16."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


BACKENDS = {"pycuda": PycudaBuffers, "torch": TorchBuffers}


def make_buffers(backend: str, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device):
    """Buffers for one engine on a GPU.

    Args:
        backend: `"pycuda"`, `"torch"`, or `"auto"`: PyCUDA when it is installed.
        feeds: the inputs, in the dtypes of the engine.
        outputs: name -> dtype and shape.

    Raises:
        WanlabError: unknown backend, or `"pycuda"` when PyCUDA is not installed.
    """
    if backend == "auto":
        backend = "pycuda" if find_spec("pycuda") else "torch"
    if backend not in BACKENDS:
        raise WanlabError(
            f"no buffers of {backend!r}{did_you_mean(backend, BACKENDS)}; give auto, {', '.join(BACKENDS)}"
        )
    return BACKENDS[backend](feeds, outputs, device)
