"""Whether a run ended for want of memory: what exceptions say, and what the system has counted."""

from __future__ import annotations

import re
from pathlib import Path

RAISED = re.compile(r"(?:\w+\.)*_?(?:Array)?(?:MemoryError|OutOfMemoryError)\Z")
SAID = re.compile(
    r"""
    (?:CUDA|HIP|XPU|MPS)(?:\ error:|\ backend)?\ out\ of\ memory    # PyTorch
    | can't\ allocate\ memory:\ you\ tried                           # PyTorch on a CPU
    | (?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_ALLOC_FAILED
    | Failed\ to\ allocate\ memory\ for\ requested\ buffer           # ONNX Runtime
    | (?:std::)?bad_alloc\b | \bbad\ allocation\b                    # C++
    | Cuda\ Runtime\ \(out\ of\ memory\)                             # TensorRT
    | cuMem\w+\ failed:\ out\ of\ memory                             # PyCUDA
    | \[Errno\ 12\]\ Cannot\ allocate\ memory
    """,
    re.VERBOSE,
)
# The last line of an exception's account, also of one that was the cause of another.
CAUSE = re.compile(r"^(?:\w+\.)*_?(?:Array)?(?:MemoryError|OutOfMemoryError)\b(?::|$)", re.MULTILINE)
CHILD_KILLED = re.compile(r"SIGKILL|signal: Killed|killed by signal 9|exit code:? -9")


def ran_out(name: str, text: str, traceback: str = "") -> bool:
    """Whether an exception tells of an allocation that failed.

    Args:
        name: its class. text: its message. traceback: as it was printed, without colours.
    """
    return bool(RAISED.match(name) or SAID.search(text) or CAUSE.search(traceback))


def counter(pid: int, root: Path = Path("/")) -> Path | None:
    """The file in which the system counts what it kills for want of memory: of the control group of a process (v2, then
    v1), else of the whole machine.

    Source: `oom_kill` in memory.events, memory.oom_control and /proc/vmstat; Linux documentation of cgroups v2 and v1.
    """
    groups = root / "sys" / "fs" / "cgroup"
    candidates: list[Path] = []
    for line in _lines(root / "proc" / str(pid) / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = path.lstrip("/")
        # In a container the path can be the host's, and the mount its own: then the top of the mount is right.
        if not controllers:
            candidates += [groups / inside / "memory.events", groups / "memory.events"]
        elif "memory" in controllers.split(","):
            mounted = groups / "memory"
            candidates += [mounted / inside / "memory.oom_control", mounted / "memory.oom_control"]
    candidates.append(root / "proc" / "vmstat")
    return next((file for file in candidates if count(file) is not None), None)


def count(file: Path | None) -> int | None:
    """Processes killed for want of memory so far; None where that is not known."""
    for line in _lines(file) if file else []:
        word, _, number = line.partition(" ")
        if word == "oom_kill" and number.strip().isdigit():
            return int(number)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
