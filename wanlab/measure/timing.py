"""Timing of calls on a device: CUDA events, or a monotonic clock with synchronisation."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from wanlab.errors import WanlabError
from wanlab.models.device import synchronise
from wanlab.measure.samples import AAControl, Samples, ratio_of_medians


def time_ms(
    fn: Callable[[], object],
    *,
    warmup: int = 1,
    iterations: int = 5,
    device=None,
    progress: bool = True,
    label: str = "",
) -> Samples:
    """Time a call; every sample is kept, warm-up calls are not.

    On a CUDA device each call lies between two CUDA events. Elsewhere a monotonic clock is used;
    when CUDA is already in use by this process, the device is synchronised around each call.

    Args:
        fn: called without arguments; its result is dropped.
        warmup: calls before the first sample.
        iterations: samples, at least 1.
        device: `torch.device`, `"cuda"`, `"cpu"`, or None for the clock with synchronisation.
        progress: show a progress bar (between the samples, never inside one).
        label: name in tables; the function's own name when empty.

    Raises:
        WanlabError: no iterations, negative warm-up, or a CUDA device that this machine lacks.
    """
    _check_counts(warmup, iterations)
    label = label or getattr(fn, "__name__", type(fn).__name__)
    clock = _Clock(device)
    values = [clock.sample(fn) for _ in _bar(range(-warmup, iterations), label=label, progress=progress)]
    return Samples(label, tuple(values[warmup:]), clock.device_name, clock.name)


def aa_control(
    fn: Callable[[], object],
    *,
    warmup: int = 1,
    iterations: int = 5,
    device=None,
    progress: bool = True,
    label: str = "",
) -> AAControl:
    """Measure one thing as if it were two, to learn the noise floor of comparisons.

    Samples alternate as A A' A' A A A' A' A ..., so that a slow drift falls on both sides alike.
    Arguments and errors as in `time_ms`; `iterations` is per side.
    """
    _check_counts(warmup, iterations)
    label = label or getattr(fn, "__name__", type(fn).__name__)
    clock = _Clock(device)
    for _ in range(warmup):
        clock.sample(fn)
    sides: tuple[list[float], list[float]] = ([], [])
    for pair in _bar(range(iterations), label=f"{label} A/A", progress=progress):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            sides[side].append(clock.sample(fn))
    first, second = (
        Samples(name, tuple(values), clock.device_name, clock.name)
        for name, values in zip((label, f"{label} (again)"), sides, strict=True)
    )
    return control_of(first, second)


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    rounds: int = 5,
    device=None,
    progress: bool = True,
) -> tuple[dict[str, Samples], AAControl]:
    """Time several calls against each other: a drift of the machine falls on all of them alike.

    A round takes every call once in the given order and once in its reverse. The two halves of the first call are
    the A/A control.

    Args:
        calls: label -> call without arguments; the first is the baseline.
        warmup: of each call, before the first round.
        rounds: at least 1; each gives two samples a call.

    Raises:
        WanlabError: no calls, no rounds, or as `time_ms`.
    """
    if not calls:
        raise WanlabError("nothing to time in turn; give at least one call")
    _check_counts(warmup, rounds)
    clock = _Clock(device)
    for call in calls.values():
        for _ in range(warmup):
            clock.sample(call)
    there: dict[str, list[float]] = {label: [] for label in calls}
    back: dict[str, list[float]] = {label: [] for label in calls}
    for _ in _bar(range(rounds), label="in turn", progress=progress):
        for label, call in calls.items():
            there[label].append(clock.sample(call))
        for label, call in reversed(calls.items()):
            back[label].append(clock.sample(call))
    samples = {
        label: Samples(label, (*there[label], *back[label]), clock.device_name, clock.name) for label in calls
    }
    base = next(iter(calls))
    first, second = (
        Samples(name, tuple(values[base]), clock.device_name, clock.name)
        for name, values in ((base, there), (f"{base} (again)", back))
    )
    return samples, control_of(first, second)


def control_of(first: Samples, second: Samples) -> AAControl:
    """Two series of one thing as an A/A control."""
    ratio, low, high = ratio_of_medians(first, second)
    if math.isinf(high):  # one sample a side: the only noise that was seen is the ratio itself
        low = high = ratio
    return AAControl(first, second, ratio, 100 * max(abs(ratio - 1), abs(low - 1), abs(high - 1)))


def _check_counts(warmup: int, iterations: int) -> None:
    if iterations < 1:
        raise WanlabError(f"iterations is {iterations}; take at least 1 sample")
    if warmup < 0:
        raise WanlabError(f"warmup is {warmup}; give 0 or more")


def _bar(items: Iterable, *, label: str, progress: bool) -> Iterable:
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label or "timing", leave=False, unit="call")


class _Clock:
    """Times single calls on one device."""

    def __init__(self, device) -> None:
        self.torch = sys.modules.get("torch")
        self.device = None
        self.device_name, self.name = "cpu", "monotonic clock"
        if device is not None:
            import torch

            self.torch, self.device = torch, torch.device(device)
            self.device_name = self.device.type
            if self.device.type == "cuda":
                if not torch.cuda.is_available():
                    raise WanlabError("device is cuda but PyTorch sees no GPU; pass device='cpu'")
                index = torch.cuda.current_device() if self.device.index is None else self.device.index
                self.device = torch.device("cuda", index)
                self.device_name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
                self.name = "CUDA events"
        elif self.torch is not None and self.torch.cuda.is_initialized():
            index = self.torch.cuda.current_device()
            self.device_name = f"cuda:{index} {self.torch.cuda.get_device_name(index)}"

    def sample(self, fn: Callable[[], object]) -> float:
        if self.name == "CUDA events":
            with self.torch.cuda.device(self.device):
                start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.torch.cuda.synchronize()
                start.record()
                fn()
                end.record()
                end.synchronize()
                return start.elapsed_time(end)
        synchronise(self.device)
        begin = time.perf_counter_ns()
        fn()
        synchronise(self.device)
        return (time.perf_counter_ns() - begin) / 1e6
