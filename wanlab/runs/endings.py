"""How a run ended: its state and the reason, from what was raised, what was seen and what the kernel left."""

from __future__ import annotations

import re
import traceback as tracebacks
from pathlib import Path
from typing import Any

from wanlab.runs.files import read_json, why
from wanlab.runs.folder import RunFolder
from wanlab.runs.guard import memory
from wanlab.runs.guard.watch import Watch

EXIT_CODES = {
    "finished": 0,
    "failed": 1,  # 2 is a mistake of the user, and nothing has run
    "died": 3,
    "timeout": 4,
    "memory": 5,
    "flooded": 6,
    "aborted": 130,
}
# Errors of a disk: full, over quota, read-only.
DISK = re.compile(r"\[Errno (?:28|122|30)\] (?P<what>[^:]+)(?:: '(?P<path>.*)')?\Z")


def completed(done: Any, folder: RunFolder, watch: Watch) -> tuple[str, dict[str, Any]]:
    """Papermill raised nothing; believe it only if all cells completed and `run.finish()` was reached."""
    if watch.ending is not None:
        return watch.ending.state, {"reason": watch.ending.reason}
    for index, cell in enumerate(done.cells):
        if cell.metadata.get("papermill", {}).get("status") != "completed":
            return "failed", {"reason": "the notebook stopped early (SystemExit)", "cell": index + 1}
    record = read_json(folder.run_json)
    if "environment" in record and "finished" not in record:
        return "failed", {"reason": "the notebook ended without run.finish()"}
    return "finished", {}


def raised(error: BaseException, watch: Watch, log: Path) -> tuple[str, dict[str, Any]]:
    """State, and what went wrong as fields of status.json.

    Args:
        error: what came out of Papermill.
        log: what the kernel's process itself wrote.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    if watch.ending is not None:  # whatever was raised came of that
        return watch.ending.state, {"reason": watch.ending.reason}
    if isinstance(error, papermill.PapermillExecutionError):
        return _cell(error, watch)
    if isinstance(error, DeadKernelError):
        return _death(one_line(str(error)), watch, _last_words(log))
    if isinstance(error, TimeoutError):
        return "timeout", {"reason": watch.limits.late}
    if isinstance(error, KeyboardInterrupt):
        return "aborted", {"reason": one_line(str(error)) or "interrupted by Ctrl-C"}
    if isinstance(error, OSError):
        return "failed", {"reason": one_line(why(error))}
    if isinstance(error, RuntimeError):
        return "died", {"reason": one_line(f"the kernel did not start: {error}"), **_last_words(log)}
    reason = one_line(f"the runner failed: {type(error).__name__}: {error}")
    return "failed", {"reason": reason, "traceback": "".join(tracebacks.format_exception(error))}


def one_line(text: str, limit: int = 300) -> str:
    """The first line, without colours."""
    from papermill.exceptions import strip_color

    lines = strip_color(text).strip().splitlines()
    return lines[0][:limit] if lines else ""


def _cell(error: Any, watch: Watch) -> tuple[str, dict[str, Any]]:
    """A cell raised."""
    from papermill.exceptions import strip_color

    said = strip_color(error.evalue or "")
    account = strip_color("\n".join(error.traceback))
    found = memory.SAID.search(said)
    # ONNX Runtime names its source files first; what was short comes at the end.
    telling = said[found.start() :] if found and found.end() > 200 else said
    reason = one_line(f"{error.ename}: {telling}".removesuffix(": "))
    if disk := DISK.match(one_line(said)):
        what, path = disk["what"], disk["path"]
        reason = f"{what[:1].lower()}{what[1:]}" + (f": {path}" if path else "")
    child_killed = memory.CHILD_KILLED.search(said) and watch.killed_by_system()
    state = "memory" if child_killed or memory.ran_out(error.ename, said, account) else "failed"
    return state, {
        "reason": reason,
        "cell": error.cell_index + 1,
        "traceback": "\n".join(error.traceback),
    }


def _death(reason: str, watch: Watch, words: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The kernel is gone, and nobody here has killed it."""
    if memory.SAID.search(words.get("traceback", "")):
        return "memory", {"reason": f"memory ran out, and {reason}", **words}
    if "SIGKILL" not in reason:
        return "died", {"reason": reason, **words}
    by_system = watch.killed_by_system()
    if by_system:
        peak = f" at {watch.peak_bytes / 2**30:.1f} GiB" if watch.peak_bytes else ""
        return "memory", {"reason": f"memory ran out{peak}: the system killed the kernel", **words}
    hint = "; the system does that when memory runs out" if by_system is None else ""
    return "died", {"reason": reason + hint, **words}


def _last_words(log: Path, lines: int = 60) -> dict[str, str]:
    """What a dying kernel wrote, such as the Python stack of a segmentation fault."""
    text = log.read_text("utf-8", "replace").strip() if log.is_file() else ""
    return {"traceback": "\n".join(text.splitlines()[-lines:])} if text else {}
