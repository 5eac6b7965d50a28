"""Peak memory of a block of code, and a process of its own for measurements whose peaks cannot be separated in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import psutil
import torch

from wanlab.core.errors import WanlabError

GIB = 1024**3
INTERVAL_S = 0.005  # between two samples of the memory; one sample takes some tens of microseconds
FREED_GIB = 0.05  # smallest amount that is mentioned
WHOLE_DEVICE = "whole device and CUDA allocator"

_open: list[PeakMemory] = []  # measurements in progress, updated before the allocator's peak is reset


@dataclass(eq=False)
class PeakMemory:
    """Peak memory of a block of code, in GiB. Complete when the `with` block has ended.

    Attributes:
        peak_gib: largest amount in use at one time. On a GPU of the whole device (every process and
            library on it, so engines outside PyTorch are included), and at least what PyTorch's allocator added; on a CPU
            this process's resident set.
        start_gib: the same quantity when the block began.
        allocated_gib: on a GPU the peak of tensors in PyTorch's allocator, else None.
        reserved_gib: on a GPU the peak that PyTorch's allocator had reserved from the driver, else None.
        source: `"whole device and CUDA allocator"`, with a remark if memory outside PyTorch was freed, or `"resident set"`.
    """

    peak_gib: float = 0.0
    start_gib: float = 0.0
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    source: str = "resident set"
    device: str = "cpu"
    _reserved_at_start_gib: float = field(default=0.0, repr=False)

    @property
    def increase_gib(self) -> float:
        """Peak minus the amount at the start."""
        return self.peak_gib - self.start_gib

    def row(self) -> dict:
        return {
            "peak_gib": self.peak_gib,
            "start_gib": self.start_gib,
            "increase_gib": self.increase_gib,
            "allocated_gib": self.allocated_gib,
            "reserved_gib": self.reserved_gib,
            "source": self.source,
        }

    def _absorb_allocator_peak(self) -> None:
        """Include the allocator's peak up to now; on a GPU only."""
        if self.allocated_gib is None:
            return
        allocated = torch.cuda.max_memory_allocated(self.device) / GIB
        reserved = torch.cuda.max_memory_reserved(self.device) / GIB
        self.allocated_gib = max(self.allocated_gib, allocated)
        self.reserved_gib = max(self.reserved_gib, reserved)


@contextmanager
def peak_memory(device=None):
    """Measure peak memory of the `with` block.

    The allocator's figures are exact. Whole device and resident set are sampled every 5 ms by a
    thread (and at both ends), so a shorter spike can be missed. Blocks may be nested. Do not time inside the block.

    Other processes on the GPU may free memory meanwhile, which would hide growth of this process. The whole-device peak is
    therefore at least the start of the outermost open block plus the growth of PyTorch's allocator since then, and
    `source` says so if memory outside PyTorch was freed.

    Args:
        device: `torch.device`, `"cuda"`, `"cpu"`; None or `"auto"` takes the GPU when there is one.

    Yields:
        PeakMemory: filled in when the block ends, also after an exception.

    Raises:
        WanlabError: a CUDA device is requested and PyTorch sees none.
    """
    device = _resolve(None if device == "auto" else device)
    if device == "cpu":
        with _Sampler(_resident_gib) as sampler:
            result = PeakMemory(start_gib=sampler.start)
            try:
                yield result
            finally:
                result.peak_gib = sampler.peak()
        return

    torch.cuda.synchronize(device)
    _reset_allocator_peak(device)
    with _Sampler(lambda: _device_gib(device)) as sampler:
        reserved = torch.cuda.memory_reserved(device) / GIB
        result = PeakMemory(
            start_gib=sampler.start,
            allocated_gib=0.0,
            reserved_gib=0.0,
            source=WHOLE_DEVICE,
            device=device,
            _reserved_at_start_gib=reserved,
        )
        _open.append(result)
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            outermost = next(block for block in _open if block.device == device)
            _open.remove(result)
            result._absorb_allocator_peak()
            without_torch = outermost.start_gib - outermost._reserved_at_start_gib
            result.peak_gib = max(sampler.peak(), without_torch + result.reserved_gib)
            freed_gib = without_torch + torch.cuda.memory_reserved(device) / GIB - _device_gib(device)
            if freed_gib > FREED_GIB:
                result.source = f"{WHOLE_DEVICE}; {freed_gib:.1f} GiB outside PyTorch were freed meanwhile"


def _resolve(device) -> str:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"  # tensors on other devices (such as meta) take no memory
    if not torch.cuda.is_available():
        raise WanlabError("device is cuda but PyTorch sees no GPU; pass device='cpu'")
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _reset_allocator_peak(device: str) -> None:
    for outer in _open:
        if outer.device == device:
            outer._absorb_allocator_peak()
    torch.cuda.reset_peak_memory_stats(device)


def _device_gib(device: str) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


@lru_cache(maxsize=1)
def _process(pid: int):
    return psutil.Process(pid)


def _resident_gib() -> float:
    return _process(os.getpid()).memory_info().rss / GIB


class _Sampler:
    """A thread that samples a quantity repeatedly and keeps its maximum."""

    def __init__(self, look: Callable[[], float], interval_s: float = INTERVAL_S) -> None:
        self.look, self.interval_s = look, interval_s
        self.start = self.maximum = look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="wanlab-memory")

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.maximum = max(self.maximum, self.look())

    def peak(self) -> float:
        """The maximum up to now."""
        self.maximum = max(self.maximum, self.look())
        return self.maximum

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def in_own_process(
    module: str, order: dict[str, Any], what: str, *, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m module` with `order` as JSON on its standard input; its last line of output is the result as JSON.

    Args:
        module: name of the module.
        order: settings of the measurement.
        what: name of the measurement, for the error message.
        environment: additional environment variables.

    Raises:
        WanlabError: the process failed; the message ends with its last line of output.
    """
    process = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(order),
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip() or "no message").splitlines()[-1]
        raise WanlabError(f"measuring {what} in a process of its own failed: {last}")
    return json.loads(process.stdout.splitlines()[-1])
