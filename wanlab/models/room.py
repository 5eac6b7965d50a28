"""Whether weights fit, asked before they are allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch

GIB = 2**30
# Left over for the context and workspaces of CUDA libraries, or for Python and its packages.
RESERVE_BYTES = {"cuda": GIB, "cpu": GIB // 4}


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now: free GPU memory, or available host memory.

    Host memory is bounded by the control group, where there is one.
    """
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return min([psutil.virtual_memory().available, *_control_group()])


def check_room(name: str, needed: Mapping[str, int], device: torch.device, dtype: str) -> None:
    """Refuse what cannot fit.

    Args:
        name: model, for the message.
        needed: part -> bytes of its weights.
        device: where they go.
        dtype: what they are in, for the message.

    Raises:
        WanlabError: too little is free; gives both figures in GiB and what to do.
    """
    reserve = RESERVE_BYTES.get(device.type, GIB)
    free, total = free_bytes(device), sum(needed.values())
    if total + reserve <= free:
        return
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in needed.items())
    smaller = "" if dtype in ("bfloat16", "float16") else ' use dtype="bfloat16",'
    raise WanlabError(
        f"{name} in {dtype} needs {(total + reserve) / GIB:.1f} GiB on {device} ({parts}, reserve"
        f" {reserve / GIB:.2f}) and {free / GIB:.1f} GiB are free;{smaller} load fewer networks with"
        " components=(...), or take a smaller model (wan2.2-ti2v-5b, wan-nano)"
    )


def _control_group() -> list[int]:
    """What is left of the memory limit of this process's control group (version 2), if there is one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [limit - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))]
