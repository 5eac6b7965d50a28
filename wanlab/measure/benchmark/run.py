"""Run an engine over fixed memory and time every stretch of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.benchmark.buffers import buffers as make_buffers
from wanlab.measure.benchmark.result import Bench
from wanlab.measure.environment import environment
from wanlab.measure.samples import AAControl, Samples
from wanlab.measure.timing import control_of, time_ms

if TYPE_CHECKING:
    import torch

EFFECT_LIMIT = 0.02
"""Relative L2 between an engine run and the same engine over fixed memory; rounding in bfloat16 stays below it."""


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
    what the call that puts the work there takes on the host. On the CPU there is only `latency`, by a monotonic
    clock. Iterations go on until both `iterations` and `duration_ms` are reached. They fall alternately on two sides
    (A B B A ...), which are the A/A control.

    Args:
        engine: see `wanlab.convert.engine.Engine`.
        feeds: every input by name; cast to the engine's dtypes.
        warmup_ms: at least one call, and at least this long.
        transfers: copy in every iteration; without, once before all.
        cuda_graph: capture the engine once and replay it.
        buffers: `"pycuda"`, `"torch"` or `"auto"`; on a GPU only.

    Raises:
        WanlabError: figures that make no sense, inputs that do not fit, an engine that cannot do it, or one that
            computes something else over fixed memory than when it is run.
    """
    if iterations < 2 or min(warmup_ms, duration_ms) < 0:
        raise WanlabError(
            f"iterations is {iterations}, warm-up {warmup_ms:g} ms, duration {duration_ms:g} ms; give at least 2"
            " iterations (two sides are compared) and no negative times"
        )
    given, shapes, expected = _prepared(engine, feeds)
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        held = make_buffers(buffers, given, shapes, engine.device)
        one = _GpuIteration(engine, held, transfers, cuda_graph)
    else:
        if cuda_graph:
            raise WanlabError(
                f"{engine.name} runs on the CPU, which has no CUDA graphs; leave cuda_graph out"
            )
        held, transfers = None, False
        one = _CpuIteration(engine, given, shapes)
    try:
        until = time.perf_counter() + warmup_ms / 1e3
        one()
        while time.perf_counter() < until:
            one()
        _check_effect(engine.name, expected, one.results())
        del expected
        taken: list[dict[str, float]] = []
        begin = time.perf_counter()
        bar = _Bar(engine.name, iterations, duration_ms, progress)
        while len(taken) < iterations or (time.perf_counter() - begin) * 1e3 < duration_ms:
            taken.append(one())
            bar.show(len(taken), (time.perf_counter() - begin) * 1e3)
        wall_ms = (time.perf_counter() - begin) * 1e3
        bar.close()
    finally:
        if held is not None:
            held.close()
    clock = ("CUDA events", str(engine.device)) if on_gpu else ("monotonic clock", "cpu")
    samples = {
        name: Samples(
            name,
            tuple(row[name] for row in taken),
            clock[1],
            "monotonic clock" if name == "enqueue" else clock[0],
        )
        for name in taken[0]
    }
    return Bench(
        engine=engine.name,
        metadata={**engine.metadata, "size_bytes": engine.size_bytes, "load_ms": engine.load_ms},
        inputs={name: _type(tensor) for name, tensor in given.items()},
        outputs=shapes,
        settings={
            "warmup_ms": warmup_ms,
            "duration_ms": duration_ms,
            "iterations": iterations,
            "transfers": transfers,
            "cuda_graph": cuda_graph,
            "buffers": held.backend if held is not None else None,
        },
        samples=samples,
        control=_sides(samples["device" if on_gpu else "latency"]),
        wall_ms=wall_ms,
        environment=environment(engine.device),
    )


def events_check(engine, feeds: Mapping[str, torch.Tensor], result: Bench, *, iterations: int = 10) -> float:
    """Device time by PyTorch's events on PyTorch's stream and memory, over what `bench` measured.

    A second way to the same figure, sharing neither buffers, stream nor events with the first; 1.00 when they agree.

    Raises:
        WanlabError: an engine on the CPU, which has no events.
    """
    import torch

    if engine.device.type != "cuda":
        raise WanlabError(f"{engine.name} runs on the CPU; there are no events to check its times with")
    given, shapes, _ = _prepared(engine, feeds)
    inputs = {name: tensor.to(engine.device) for name, tensor in given.items()}
    outputs = _memory(shapes, engine.device)
    call = engine.bind(inputs, outputs, cuda_graph=result.settings["cuda_graph"])
    again = time_ms(call, warmup=3, iterations=iterations, device=engine.device, progress=False)
    torch.cuda.synchronize(engine.device)
    return again.median / result.samples["device"].median


class _GpuIteration:
    """One iteration on a GPU; returns its times in ms."""

    def __init__(self, engine, held, transfers: bool, cuda_graph: bool) -> None:
        self.held, self.transfers = held, transfers
        held.upload()
        self.call = engine.bind(held.inputs, held.outputs, stream=held.stream, cuda_graph=cuda_graph)

    def results(self) -> dict[str, torch.Tensor]:
        """What the last call made."""
        first = self.held.mark()
        self.held.download()
        self.held.elapsed_ms(first, self.held.mark())  # waits
        return self.held.results()

    def __call__(self) -> dict[str, float]:
        held = self.held
        marks = [held.mark()]
        if self.transfers:
            held.upload()
            marks.append(held.mark())
        begin = time.perf_counter()
        self.call()
        enqueue_ms = (time.perf_counter() - begin) * 1e3
        marks.append(held.mark())
        if self.transfers:
            held.download()
            marks.append(held.mark())
        stretches = [held.elapsed_ms(first, last) for first, last in pairwise(marks)]
        names = ("h2d", "device", "d2h") if self.transfers else ("device",)
        return {"latency": sum(stretches), **dict(zip(names, stretches, strict=True)), "enqueue": enqueue_ms}


class _CpuIteration:
    """One iteration on the CPU; returns its time in ms."""

    def __init__(self, engine, given, shapes) -> None:
        self.outputs = _memory(shapes, engine.device)
        self.call = engine.bind(given, self.outputs)

    def results(self) -> dict[str, torch.Tensor]:
        """What the last call made."""
        return self.outputs

    def __call__(self) -> dict[str, float]:
        begin = time.perf_counter()
        self.call()
        return {"latency": (time.perf_counter() - begin) * 1e3}


def _prepared(engine, feeds):
    """Inputs in the engine's dtypes, the types of what it makes of them, and that on the host; all by name."""
    import torch

    made = engine.run(feeds)  # refuses what does not fit, and tells the sizes of the outputs
    given = {
        name: torch.as_tensor(feeds[name]).to(engine.device, getattr(torch, dtype)).contiguous()
        for name, (dtype, _) in engine.inputs.items()
    }
    expected = {name: tensor.cpu() for name, tensor in made.items()}
    return given, {name: _type(tensor) for name, tensor in made.items()}, expected


def _check_effect(
    engine: str, expected: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor]
) -> None:
    """A call whose outputs do not arrive, or that reads other memory, has no time worth telling."""
    import torch

    for name, want in expected.items():
        # Random weights may overflow; what is not finite has to be so in both.
        a, b = (torch.nan_to_num(tensor.float(), 1.0, 2.0, -2.0) for tensor in (want, made[name]))
        scale = a.abs().max().clamp_min(1e-30)  # squares of large values would overflow
        apart = (((a - b) / scale).norm() / (a / scale).norm().clamp_min(1e-30)).item()
        if not apart <= EFFECT_LIMIT:
            raise WanlabError(
                f"{engine} over fixed memory is {apart:.1g} (relative L2) from its own run in {name!r}: its times would"
                " be of something else; open the engine anew, without cuda_graph if it has one"
            )


def _memory(shapes, device) -> dict[str, Any]:
    import torch

    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, (dtype, shape) in shapes.items()
    }


def _type(tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _sides(samples: Samples) -> AAControl:
    """The series as two, taken alternately A B B A."""
    sides = ([], [])
    for index, value in enumerate(samples.values_ms):
        sides[(index + 1) // 2 % 2].append(value)
    first, second = (
        Samples(name, tuple(values), samples.device, samples.clock)
        for name, values in zip((samples.label, f"{samples.label} (again)"), sides, strict=True)
    )
    return control_of(first, second)


class _Bar:
    """Progress towards whichever of iterations and duration is farther away."""

    def __init__(self, label: str, iterations: int, duration_ms: float, progress: bool) -> None:
        from tqdm.auto import tqdm

        self.wanted = (iterations, max(duration_ms, 1e-9))
        self.bar = tqdm(total=100, desc=f"bench {label}", unit="%", leave=False, disable=not progress)

    def show(self, count: int, elapsed_ms: float) -> None:
        done = min(count / self.wanted[0], elapsed_ms / self.wanted[1])
        self.bar.update(min(int(100 * done), 100) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
