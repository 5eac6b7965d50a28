"""The fastest kernel for dense attention that is exact enough, measured once and remembered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import write_json
from wanlab.core.paths import cache
from wanlab.measure.timing import time_ms
from wanlab.techniques.attention.errors import LIMITS, attention_error, exact_attention, sampled_queries
from wanlab.techniques.attention.kernels import KERNELS, fits, heads_first

OF_OWN = 1.5
"""Times the error of PyTorch's own choice that a kernel may have, where scores are so peaked that this is above `LIMITS`."""

PACKAGES = ("torch", "fa3-fwd", "flash-attn-4", "sageattention", "triton")


@dataclass(frozen=True)
class Candidate:
    """One kernel at one shape.

    Attributes:
        time_ms: median of some calls; None where it did not run. error: see `attention_error`.
        reason: why it is not taken; empty where it may be.
    """

    kernel: str
    time_ms: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The kernel for one shape, dtype and device.

    Attributes:
        kernel: its name. error: its error. limit: the largest error that was allowed.
        candidates: all kernels. measured_here: whether they were timed in this process, not remembered from another.
    """

    kernel: str
    error: float
    limit: float
    candidates: tuple[Candidate, ...]
    measured_here: bool


def remembered_file() -> Path:
    """Where choices are kept, in the folder of what can be made again."""
    return cache("attention", "kernels.json")


def choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, iterations: int = 3) -> Choice:
    """The fastest kernel for these tensors, `[B, L, H, D]`, whose error is within `LIMITS`, or little more than that of
    PyTorch's own choice; remembered over processes by shape, dtype, device and versions of the packages.

    Raises:
        WanlabError: no kernel runs.
    """
    name, kept = _key(query), _kept()
    if name in kept:
        record = kept[name]
        candidates = tuple(Candidate(**each) for each in record["candidates"])
        return Choice(record["kernel"], record["error"], record["limit"], candidates, False)
    dtype = str(query.dtype).removeprefix("torch.")
    reference = exact_attention(query, key, value, sampled_queries(query.shape[1]))
    own = attention_error(heads_first(F.scaled_dot_product_attention), query, key, value, reference=reference)
    limit = max(LIMITS[dtype], OF_OWN * own)
    candidates = tuple(
        _measured(kernel, query, key, value, reference, limit, iterations) for kernel in KERNELS
    )
    usable = [each for each in candidates if not each.reason]
    if not usable:
        reasons = "; ".join(f"{each.kernel}: {each.reason}" for each in candidates)
        raise WanlabError(
            f"no kernel for attention is exact enough here ({reasons}); leave attention_kernel out"
        )
    best = min(usable, key=lambda each: each.time_ms or 0.0)
    choice = Choice(best.kernel, best.error or 0.0, limit, candidates, True)
    record = {"kernel": choice.kernel, "error": choice.error, "limit": limit}
    record["candidates"] = [asdict(each) for each in candidates]
    write_json(remembered_file(), _kept() | {name: record})
    return choice


def _measured(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    reference: torch.Tensor,
    limit: float,
    iterations: int,
) -> Candidate:
    kernel = KERNELS[name]
    if reason := kernel.lacks(query.device, query.dtype, query.shape[-1]):
        return Candidate(name, reason=f"it needs {reason}")
    if not fits(kernel, query):
        return Candidate(name, reason="its scores take more than half of the free memory")
    try:
        error = attention_error(kernel.run, query, key, value, reference=reference)
        if not error <= limit:
            return Candidate(name, error=error, reason=f"its error {error:.2g} is above {limit:g}")
        timed = time_ms(
            lambda: kernel.run(query, key, value),
            warmup=1,
            iterations=iterations,
            device=query.device,
            progress=False,
        )
    except Exception as problem:  # compilers and drivers raise exceptions of any class
        return Candidate(name, reason=first_line(problem))
    return Candidate(name, timed.median, error)


def _key(query: torch.Tensor) -> str:
    on_gpu = query.device.type == "cuda"
    device = torch.cuda.get_device_name(query.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    shape = "x".join(map(str, query.shape))
    return ", ".join([device, str(query.dtype), shape, *filter(None, map(_version, PACKAGES))])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _kept() -> dict[str, Any]:
    """Choices on disk; what cannot be read is made again."""
    try:
        found = json.loads(remembered_file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
