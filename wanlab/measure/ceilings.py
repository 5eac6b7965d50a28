"""Measured ceilings of a device for the roofline model: matrix products, memory bandwidth, copies from the host.

Roofline model: Williams, Waterman, Patterson 2009 (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wanlab.core.errors import WanlabError
from wanlab.core.paths import data, locate
from wanlab.measure.timing import time_ms

RECORDED = data("results", "ceilings")
"""Recorded ceilings of devices that this machine may not have, one JSON file each."""


@dataclass(frozen=True)
class Ceilings:
    """Best sustained rates of a device (medians of samples).

    Attributes:
        device: name of the device.
        tflop_per_s: rate of a square matrix product, per number format.
        memory_gb_per_s: rate of a copy inside the device; bytes read and bytes written both count.
        copy_gb_per_s: host to device, from "pageable" and "pinned" memory; empty on a CPU.
        source: "measured" or the file it was read from.
    """

    device: str
    tflop_per_s: dict[str, float]
    memory_gb_per_s: float
    copy_gb_per_s: dict[str, float]
    source: str = "measured"

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def ceilings(device: Any = None, *, size: int | None = None, iterations: int = 10) -> Ceilings:
    """Measure a device; takes some seconds on a GPU, about one on a CPU.

    Args:
        device: device to measure; by default the GPU if there is one.
        size: rows and columns of the matrices; by default 8192 on a GPU, 1024 on a CPU.

    Raises:
        WanlabError: as for `time_ms`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    size = size or (8192 if on_gpu else 1024)

    def rate(call, work: float) -> float:
        return (
            work / time_ms(call, warmup=3, iterations=iterations, device=device, progress=False).median / 1e9
        )

    products = _products(device, size)
    tflop = {name: rate(call, 2 * size**3) for name, call in products.items()}
    copied = 1 << (31 if on_gpu else 27)
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    memory = rate(lambda: target.copy_(source), 2 * copied) * 1e3
    copies = {}
    if on_gpu:
        for kind in ("pageable", "pinned"):
            host = torch.empty(copied, dtype=torch.uint8, pin_memory=kind == "pinned").fill_(1)
            copies[kind] = rate(lambda host=host: target.copy_(host, non_blocking=True), copied) * 1e3
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Ceilings(name, tflop, memory, copies)


def recorded_ceilings(device: str | os.PathLike) -> Ceilings | None:
    """Ceilings from a file, or those recorded in `data/` for the name of a device; None if there are none.

    Raises:
        WanlabError: the file holds something else.
    """
    path = locate(device)
    if path.suffix == ".json":
        return _read(path)
    for path in sorted(RECORDED.glob("*.json")):
        recorded = _read(path)
        if recorded.device == str(device):
            return recorded
    return None


def _read(path: Path) -> Ceilings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Ceilings(**(content | {"source": path.name}))
    except (OSError, ValueError, TypeError) as error:
        raise WanlabError(
            f"{path} holds no ceilings ({error}); write them with `measure.ceilings().save`"
        ) from error


def _products(device: torch.device, size: int) -> dict:
    """Number format -> a product of two random square matrices."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=draw) for _ in range(2))
    calls = {"fp32": lambda: a @ b}
    if device.type != "cuda":
        return calls
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        x, y = a.to(dtype), b.to(dtype)
        calls[name] = functools.partial(torch.matmul, x, y)
    calls["tf32"] = lambda: _tf32(a, b)
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        x8, y8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        calls["fp8"] = lambda: torch._scaled_mm(x8, y8, one, one, out_dtype=torch.bfloat16)
    return calls


def _tf32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
