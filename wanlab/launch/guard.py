"""Guards a run: limits of time, memory and output; the reason of its end; processes that a killed runner left."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback as tracebacks
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
import psutil
from nbclient.exceptions import DeadKernelError

from wanlab.core.errors import WanlabError, clean, first_line
from wanlab.core.files import append_bytes, now, why, write_json
from wanlab.pages.report import render
from wanlab.runs.folder import Heartbeat, RunFolder, host_id, living_process, process_id
from wanlab.runs.results import run_folders

MEMORY_ERROR = re.compile(r"(?:\w+\.)*_?(?:Array)?(?:MemoryError|OutOfMemoryError)\Z")
MEMORY_MESSAGE = re.compile(
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
# The last line of an exception in a traceback, also of one that caused another.
MEMORY_CAUSE = re.compile(r"^(?:\w+\.)*_?(?:Array)?(?:MemoryError|OutOfMemoryError)\b(?::|$)", re.MULTILINE)
CHILD_KILLED = re.compile(r"SIGKILL|signal: Killed|killed by signal 9|exit code:? -9")


def ran_out(name: str, text: str, traceback: str = "") -> bool:
    """Whether an exception reports an allocation that failed.

    Args:
        name: name of its class.
        text: its message.
        traceback: printed traceback, without colours.
    """
    return bool(MEMORY_ERROR.match(name) or MEMORY_MESSAGE.search(text) or MEMORY_CAUSE.search(traceback))


def counter(pid: int, root: Path = Path("/")) -> Path | None:
    """The file in which Linux counts processes killed because memory ran out: of the control group of a process (v2, then
    v1), else of the whole machine.

    Source: `oom_kill` in memory.events, memory.oom_control and /proc/vmstat; Linux documentation of cgroups v2 and v1.
    """
    groups = root / "sys" / "fs" / "cgroup"
    candidates: list[Path] = []
    for line in _lines(root / "proc" / str(pid) / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = path.lstrip("/")
        # In a container the path can be the host's while the mount is its own; then the top of the mount is right.
        if not controllers:
            candidates += [groups / inside / "memory.events", groups / "memory.events"]
        elif "memory" in controllers.split(","):
            mounted = groups / "memory"
            candidates += [mounted / inside / "memory.oom_control", mounted / "memory.oom_control"]
    candidates.append(root / "proc" / "vmstat")
    return next((file for file in candidates if count(file) is not None), None)


def count(file: Path | None) -> int | None:
    """Processes killed so far because memory ran out; None where that is not known."""
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


def descendants(pids: Iterable[int], every_thread: bool = True) -> set[int]:
    """Process ids of all descendants of `pids`, without these themselves.

    Args:
        every_thread: list the children of each thread of a process, not only of the first.
    """
    all_pids: set[int] = set()
    waiting = list(pids)
    while waiting:
        new = set(_children(waiting.pop(), every_thread)) - all_pids
        all_pids |= new
        waiting += new
    return all_pids


def alive(process: psutil.Process) -> bool:
    """Whether this process still runs: it is no zombie, and its id was not given to another process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process], wait_s: float = 3.0) -> list[int]:
    """Kill processes and all their descendants, until none is left or `wait_s` is over.

    Returns:
        Ids of the processes that were killed.
    """
    targets = {process.pid: process for process in processes}
    killed: set[int] = set()
    deadline = time.monotonic() + wait_s
    while living := [process for process in targets.values() if alive(process)]:
        for pid in descendants(process.pid for process in living):
            with contextlib.suppress(psutil.Error):
                targets.setdefault(pid, psutil.Process(pid))
        for process in targets.values():
            with contextlib.suppress(psutil.Error):
                if alive(process):
                    process.kill()
                    killed.add(process.pid)
        # Not psutil's own wait: it would take the kernel's exit status from the process that started the kernel.
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return sorted(killed)


def kill_group(pid: int) -> None:
    """Kill what is left of a kernel's process group (the kernel leads its own session)."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _children(pid: int, every_thread: bool) -> list[int]:
    """Direct children of a process; none where it has ended."""
    if not _listed():
        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task") if every_thread else [pid]:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                pids += map(int, file.read().split())
    return pids


@functools.cache
def _listed() -> bool:
    """Whether this system lists the children of a process, as most Linux kernels do."""
    return os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")


TEXT_LIMIT_CHARS = 200_000  # printed text of a cell that the notebook keeps; console.log has all of it
RICH_LIMIT_BYTES = (
    16 * 2**20
)  # figures, tables and clips of a cell that the notebook keeps, without the last one
RICH_LIMIT = 200  # number of them
LARGEST_BYTES = 64 * 2**20  # size of one
ERROR_LIMIT_CHARS, ERROR_LIMIT_LINES = 20_000, 200  # message and lines of a traceback


class Console:
    """Receives the output messages of a run's cells, logs them and limits them.

    Attributes:
        cut: indices of cells whose output is not complete in the notebook.
        total_bytes: bytes printed and shown so far, without output that was cleared.
    """

    def __init__(self, path: Path, limit_mib: float, end: Callable[[str, str], None]):
        """`end` is called once with state and reason, when the limit is exceeded or the disk is full."""
        self.path, self.limit_mib, self.end = path, limit_mib, end
        self.cut: set[int] = set()
        self.total_bytes = 0
        self._ended = False
        self._text: dict[int, int] = {}
        self._rich: dict[int, list[int]] = {}

    def keeps(self, message: dict[str, Any], index: int) -> bool:
        """Receive an output of cell `index`, which may be shortened in place; returns whether the notebook keeps it."""
        if self._ended:
            return False
        kind = message["msg_type"]
        if kind == "error":
            _shorten(message["content"])
            return True
        return self._printed(message["content"], index) if kind == "stream" else self._shown(message, index)

    def cleared(self, index: int) -> None:
        """Forget the output that a cell has cleared, as live plots and progress displays do."""
        self._text.pop(index, None)
        self.total_bytes -= sum(self._rich.pop(index, []))

    def _printed(self, content: dict[str, Any], index: int) -> bool:
        text = content["text"]
        data = clean(text, "\n\t\r").encode()
        try:
            append_bytes(self.path, data)
        except OSError as error:
            self._end("failed", why(error))
            return False
        self._add(len(data), index)
        before = self._text.get(index, 0)
        self._text[index] = before + len(text)
        if before + len(text) > TEXT_LIMIT_CHARS:
            self.cut.add(index)
            kept = text[: max(0, TEXT_LIMIT_CHARS - before)]
            content["text"] = f"{kept}\n... output continues in {self.path.name}\n"
        return before <= TEXT_LIMIT_CHARS

    def _shown(self, message: dict[str, Any], index: int) -> bool:
        data = message["content"].get("data") or {}
        size = len(json.dumps(data, default=str))
        kept = self._rich.setdefault(index, [])
        full = sum(kept) >= RICH_LIMIT_BYTES or len(kept) >= RICH_LIMIT or size > LARGEST_BYTES
        self._add(size, index)
        if not full:
            kept.append(size)
        elif index not in self.cut:
            self.cut.add(index)
            message["content"]["data"] = {"text/plain": "... this cell shows more than the notebook keeps"}
            return True
        return not full

    def _add(self, size: int, index: int) -> None:
        self.total_bytes += size
        if self.total_bytes > self.limit_mib * 2**20:
            self._end("flooded", flood(self.total_bytes / 2**20, index + 1, self.limit_mib))

    def _end(self, state: str, reason: str) -> None:
        self._ended = True
        self.end(state, reason)


def flood(written_mib: float, cell: int, limit_mib: float) -> str:
    """The reason of a run that is ended because it wrote too much."""
    return f"wrote {math.ceil(written_mib * 10) / 10:g} MiB of output by cell {cell}, over its limit of {limit_mib:g} MiB"


def _shorten(content: dict[str, Any]) -> None:
    """Shorten the message and traceback of an exception, which can be very long."""
    content["evalue"] = str(content.get("evalue", ""))[:ERROR_LIMIT_CHARS]
    lines = [str(line)[:ERROR_LIMIT_CHARS] for line in content.get("traceback", [])]
    half = ERROR_LIMIT_LINES // 2
    content["traceback"] = lines if len(lines) <= 2 * half else [*lines[:half], "...", *lines[-half:]]


EVERY_S = 0.25
THOROUGH = (
    4  # every 4th sample also lists the children of every thread, and reads the log and the count of kills
)
GRACE_S = 3.0  # after the deadline, until a run that nothing else has ended is ended here
KILLS_S = 10  # a large process can take so long to end after the system has killed it
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    Attributes:
        timeout_s: time of the whole notebook.
        memory_gib: resident memory of the kernel and its descendants.
        output_mib: bytes printed and shown, in MiB.
    """

    timeout_s: float | None = None
    memory_gib: float | None = None
    output_mib: float = 256.0

    @property
    def late(self) -> str:
        return f"not done after {self.timeout_s:g} s" if self.timeout_s else "a cell gave no answer"


@dataclass(frozen=True)
class Ending:
    """Why a run was ended from outside."""

    state: str
    reason: str


class Watch:
    """Guards one run from the start of its kernel.

    Attributes:
        ending: set once, by the first limit that is exceeded; then the kernel is killed and the client notices it.
        peak_bytes: largest resident memory of the kernel and its descendants in one sample. Pages that processes share
            count for each of them.
    """

    def __init__(self, heartbeat: Heartbeat, limits: Limits, log: Path | None = None):
        """
        Args:
            heartbeat: writer of the status, which gets `kernel`, `processes` (living descendants) and `peak_memory_gib`.
            log: file of the kernel process's own output, which is limited too.
        """
        self.heartbeat, self.limits, self.log = heartbeat, limits, log
        self.deadline = None if limits.timeout_s is None else time.monotonic() + limits.timeout_s
        self.ending: Ending | None = None
        self.peak_bytes = 0
        self._kernel: psutil.Process | None = None
        self._others: dict[int, psutil.Process] = {}
        self._recorded: set[int] = set()
        self._recorded_at = 0.0
        self._counter: Path | None = None
        self._kills: deque[int | None] = deque(maxlen=KILLS_S)  # one a second, oldest first
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wanlab-watch", daemon=True)

    def begin(self, pid: int) -> None:
        """Start to guard the kernel, which is process `pid`."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already, which the client notices
            self._kernel = psutil.Process(pid)
        self._counter = counter(pid)
        self._kills.append(count(self._counter))
        self.heartbeat.write(kernel=process_id(pid))
        if not self._thread.is_alive():
            self._thread.start()

    def end(self, state: str, reason: str) -> None:
        """End the run with this state, unless another reason has ended it."""
        with self._lock:
            if self.ending is None:
                self.ending = Ending(state, reason)
                self._kill()

    def close(self) -> None:
        """Stop the guard, and kill everything that the kernel started."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._kill()
            self.heartbeat.note(processes=self._records())

    def look(self, thorough: bool = True) -> None:
        """Take one sample: the descendants of the kernel, and the memory of all of them."""
        with self._lock:
            if self._kernel is None or self._stop.is_set() or not self._kernel.is_running():
                return
            if thorough:
                self._kills.append(count(self._counter))
            self._find(thorough)
            used = sum(_resident(process) for process in (self._kernel, *self._others.values()))
            self.peak_bytes = max(self.peak_bytes, used)
            self.heartbeat.note(peak_memory_gib=round(self.peak_bytes / GIB, 3))
            self._record_living()
            self._enforce(used, thorough)

    def killed_by_system(self) -> bool | None:
        """Whether the system has just killed a process because memory ran out; None where that is not known."""
        before, after = next(iter(self._kills), None), count(self._counter)
        return None if before is None or after is None else after > before

    def _find(self, thorough: bool) -> None:
        if thorough:
            self._others = {pid: process for pid, process in self._others.items() if alive(process)}
        # Orphans are roots too: they descend from the kernel no more.
        roots = (
            [self._kernel.pid, *(self._others if thorough else ())] if alive(self._kernel) else self._others
        )
        for pid in descendants(roots, thorough) - {self._kernel.pid, *self._others}:
            with contextlib.suppress(psutil.Error):
                self._others[pid] = psutil.Process(pid)

    def _record_living(self) -> None:
        """Write the living descendants to status.json, at most once a second, for `reap` if this process is killed."""
        if self._recorded != set(self._others) and time.monotonic() - self._recorded_at > 1.0:
            self._recorded, self._recorded_at = set(self._others), time.monotonic()
            try:
                self.heartbeat.write(processes=self._records())
            except OSError as error:
                self.heartbeat.on_trouble(error)

    def _records(self) -> list[dict[str, Any]]:
        return [{"pid": p.pid, "started": p.create_time()} for p in self._others.values() if alive(p)]

    def _enforce(self, used_bytes: int, thorough: bool) -> None:
        """End the run where it exceeds a limit."""
        limit = self.limits.memory_gib
        if (
            limit is not None
            and used_bytes > limit * GIB
            and (unshared := self._unshared(used_bytes)) > limit * GIB
        ):
            cell = self.heartbeat.fields["progress"]["cell"]
            taken = math.ceil(unshared / GIB * 10) / 10  # never less than the limit
            self.end("memory", f"took {taken:g} GiB in cell {cell}, over its limit of {limit:g} GiB")
        if self.deadline is not None and time.monotonic() > self.deadline + GRACE_S:
            self.end("timeout", self.limits.late)
        if thorough and self.log is not None and self.log.is_file():
            written, limit = self.log.stat().st_size / 2**20, self.limits.output_mib
            if written > limit:
                self.end("flooded", flood(written, self.heartbeat.fields["progress"]["cell"], limit))

    def _unshared(self, used_bytes: int) -> int:
        """`used_bytes`, with pages that forked processes share counted once: too slow for every sample."""
        if not self._others:
            return used_bytes
        total = 0
        for process in (self._kernel, *self._others.values()):
            try:
                total += process.memory_full_info().pss
            except (psutil.Error, AttributeError):
                total += _resident(process)
        return total

    def _kill(self) -> None:
        if self._kernel is not None:
            self._find(True)
            kill([self._kernel, *self._others.values()])
            kill_group(self._kernel.pid)

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(EVERY_S):
            with contextlib.suppress(psutil.Error, OSError):  # one sample is lost
                self.look(number % THOROUGH == 0)
            number += 1


def _resident(process: psutil.Process) -> int:
    """Bytes in RAM; 0 for a process that has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


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
OF_A_GROUP = re.compile(r"^ *(?:\| )+((?!\w*Group: )[A-Za-z_][\w.]*: .+)$", re.MULTILINE)  # in its traceback
DISK = re.compile(r"\[Errno (?:28|122|30)\] (?P<what>[^:]+)(?:: '(?P<path>.*)')?\Z")


def completed(done: Any, folder: RunFolder, watch: Watch) -> tuple[str, dict[str, Any]]:
    """State and fields of status.json where Papermill raised nothing: finished only if all cells completed and
    `run.finish()` was called."""
    if watch.ending is not None:
        return watch.ending.state, {"reason": watch.ending.reason}
    record = folder.record()
    unfinished = "environment" in record and "finished" not in record
    for index, cell in enumerate(done.cells):
        if cell.metadata.get("papermill", {}).get("status") == "completed":
            continue
        if not any(output.get("ename") == "SystemExit" for output in cell.get("outputs", [])):
            return "failed", {"reason": f"cell {index + 1} did not complete", "cell": index + 1}
        if unfinished:
            return "failed", {"reason": "sys.exit(0) before run.finish()", "cell": index + 1}
        break  # the notebook ends here because it says so
    if unfinished:
        return "failed", {"reason": "the notebook ended without run.finish()"}
    return "finished", {}


def raised(error: BaseException, watch: Watch, log: Path) -> tuple[str, dict[str, Any]]:
    """State and fields of status.json where Papermill raised.

    Args:
        error: exception of Papermill.
        log: file of the kernel process's own output.
    """
    if watch.ending is not None:  # it caused the exception
        return watch.ending.state, {"reason": watch.ending.reason}
    if isinstance(error, papermill.PapermillExecutionError):
        return _cell(error, watch)
    if isinstance(error, DeadKernelError):
        return _death(one_line(str(error)), watch, _last_output(log))
    if isinstance(error, TimeoutError):
        return "timeout", {"reason": watch.limits.late}
    if isinstance(error, KeyboardInterrupt):
        return "aborted", {"reason": one_line(str(error)) or "interrupted by Ctrl-C"}
    if isinstance(error, OSError):
        return "failed", {"reason": one_line(why(error))}
    if isinstance(error, RuntimeError):
        return "died", {"reason": one_line(f"the kernel did not start: {error}"), **_last_output(log)}
    reason = one_line(f"the runner failed: {type(error).__name__}: {error}")
    return "failed", {"reason": reason, "traceback": "".join(tracebacks.format_exception(error))}


def one_line(text: str, limit: int = 300) -> str:
    """The first line of a text, without what a terminal would obey; empty for an empty text."""
    return first_line(text, limit) if text.strip() else ""


def _cell(error: Any, watch: Watch) -> tuple[str, dict[str, Any]]:
    """State and fields of status.json where a cell raised."""
    message = clean(error.evalue or "").strip()
    traceback = clean("\n".join(error.traceback))
    memory = MEMORY_MESSAGE.search(message)
    # ONNX Runtime names its source files first; the words about memory come at the end.
    telling = message[memory.start() :] if memory and memory.end() > 200 else message
    reason = one_line(f"{error.ename}: {telling}".removesuffix(": "))
    if "sub-exception" in message and (parts := OF_A_GROUP.findall(traceback)):
        reason = one_line(f"{reason}: {'; '.join(parts)}")
    if disk := DISK.match(one_line(message)):
        what, path = disk["what"], disk["path"]
        reason = f"{what[:1].lower()}{what[1:]}" + (f": {path}" if path else "")
    child_killed = CHILD_KILLED.search(message) and watch.killed_by_system()
    state = "memory" if child_killed or ran_out(error.ename, message, traceback) else "failed"
    return state, {
        "reason": reason,
        "cell": error.cell_index + 1,
        "traceback": "\n".join(error.traceback),
    }


def _death(reason: str, watch: Watch, words: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """State and fields of status.json where the kernel ended and this process has not killed it."""
    if MEMORY_MESSAGE.search(words.get("traceback", "")):
        return "memory", {"reason": f"memory ran out, and {reason}", **words}
    if "SIGKILL" not in reason:
        return "died", {"reason": reason, **words}
    by_system = watch.killed_by_system()
    if by_system:
        peak = f" at {watch.peak_bytes / 2**30:.1f} GiB" if watch.peak_bytes else ""
        return "memory", {"reason": f"memory ran out{peak}: the system killed the kernel", **words}
    hint = "; the system does that when memory runs out" if by_system is None else ""
    return "died", {"reason": reason + hint, **words}


def _last_output(log: Path, lines: int = 60) -> dict[str, str]:
    """Last output of the kernel's process, such as the Python stack of a segmentation fault."""
    text = log.read_text("utf-8", "replace").strip() if log.is_file() else ""
    return {"traceback": "\n".join(text.splitlines()[-lines:])} if text else {}


def reap(folder: str | os.PathLike) -> list[Path]:
    """End the runs below `folder` whose runner has ended: kill their recorded processes, and set their state to "died".

    Only runs of this machine since its last start, and only processes that a run's status.json names by id and start time
    (and their descendants).

    Returns:
        The folders of those runs.
    """
    return [path for path in run_folders(Path(folder)) if _reaped(RunFolder(path))]


def _reaped(run: RunFolder) -> bool:
    status = _left(run)
    if status is None:
        return False
    named = [status.get("kernel"), *(status.get("processes") or [])]
    timed = [who for who in named if isinstance(who, dict) and who.get("started") is not None]
    kill(process for who in timed if (process := living_process(who)))
    if _left(run) != status:  # another process has just done it, or has started the run again
        return False
    run.release()
    reason = "the process that ran it is gone"
    write_json(
        run.status_json,
        {**status, "state": "died", "exit": EXIT_CODES["died"], "reason": reason, "ended": now()}
        | {
            key: status["progress"][key] for key in ("cell", "title") if key in (status.get("progress") or {})
        },
    )
    render(run.path)
    return True


def _left(run: RunFolder) -> dict[str, Any] | None:
    """The status of a run that is "running" on this machine by its status.json, while its writer has ended; else None."""
    try:
        status = run.written_status()
    except WanlabError:
        return None
    if status.get("state") != "running" or status.get("host") != host_id():
        return None
    return None if living_process(status.get("writer")) else status
