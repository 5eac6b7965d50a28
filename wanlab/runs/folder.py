"""The run folder: its files, the process that writes it, and earlier attempts."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from wanlab.core.errors import WanlabError
from wanlab.core.files import checked_name, digest, move_into, now, read_json, why, write_bytes, write_json
from wanlab.core.text import convert
from wanlab.runs.forms import RecordForm, StatusForm

HEARTBEAT_S = 5.0
PATIENCE_BEATS = 2  # failed writes in a row before `on_trouble` is called
SILENCE_S = 120.0  # a run on another machine without a heartbeat for so long counts as dead
RESERVE_BYTES = 2**19  # reserved for the last status and the report of a run whose disk is full
FINAL = ("finished", "failed", "died", "timeout", "memory", "flooded", "aborted")


@dataclass(frozen=True)
class RunFolder:
    """`outputs/<name>/<run_id>/` and the names inside it."""

    path: Path

    @classmethod
    def of(cls, outputs: Path, name: str, run_id: str) -> RunFolder:
        return cls(Path(outputs).resolve() / checked_name(name, "run name") / checked_name(run_id, "run id"))

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def status_json(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def notebook(self) -> Path:
        return self.path / "executed.ipynb"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def record(self) -> dict[str, Any]:
        """run.json.

        Raises:
            WanlabError: it is missing or broken, or a field is of another type.
        """
        record = read_json(self.run_json)
        convert(record, RecordForm, str(self.run_json))
        return record

    def status(self) -> dict[str, Any]:
        """status.json, or {} without one; the state "running" becomes "died" where the writer has ended.

        Raises:
            WanlabError: it is broken, or a field is of another type.
        """
        status = self.written_status()
        if status.get("state") == "running" and not writer_alive(status):
            status = {**status, "state": "died", "reason": "the process that ran it is gone"}
        return status

    def written_status(self) -> dict[str, Any]:
        """`status` as it was written, whether the writer has ended or not."""
        if not self.status_json.is_file():
            return {}
        status = read_json(self.status_json)
        convert(status, StatusForm, str(self.status_json))
        return status

    def update(self, **fields: Any) -> dict[str, Any]:
        """Merge fields into run.json."""
        record = read_json(self.run_json) if self.run_json.is_file() else {}
        record.update(fields)
        write_json(self.run_json, record)
        return record

    def open(self, reserve: bool = False) -> RunFolder:
        """Prepare the folder for a new attempt; files of an earlier one are moved to `attempts/N`.

        Args:
            reserve: reserve space until `release`, for the last status and the report of a run whose disk is full.

        Raises:
            WanlabError: another living process is writing it, or it cannot be written.
        """
        try:
            status = self.status()
        except WanlabError:
            status = {}  # broken files are moved like those of any attempt
        writer = status.get("writer", {})
        if status.get("state") == "running" and writer.get("pid") != os.getpid():
            raise WanlabError(
                f"run {self.path} is being written by process {writer.get('pid')}; wait for it or stop it"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.release()
            if reserve:  # before anything is moved: zeros would take no space where files are compressed
                write_bytes(self._reserved, os.urandom(RESERVE_BYTES))
            self._keep_earlier()
            self.artifacts.mkdir()
        except OSError as error:
            self.release()
            raise self.unwritable(error) from error
        return self

    def release(self) -> None:
        """Free the space that `open` has reserved."""
        with contextlib.suppress(OSError):
            self._reserved.unlink(missing_ok=True)

    def _keep_earlier(self) -> None:
        left = [item for item in self.path.iterdir() if item not in (self.path / "attempts", self._reserved)]
        if left:
            attempts = self.path / "attempts"
            attempts.mkdir(exist_ok=True)
            number = 1 + max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=0)
            move_into(attempts / str(number), left)

    def unwritable(self, error: OSError) -> WanlabError:
        """The error for a folder of runs that cannot be written."""
        outputs = self.path.parent.parent
        return WanlabError(f"cannot write runs in {outputs}: {why(error)}; give another folder with --output")

    @property
    def _reserved(self) -> Path:
        return self.path / ".reserved"


class Heartbeat:
    """Writes status.json while a run is running: state, progress, and every 5 s the time, from a thread."""

    def __init__(self, folder: RunFolder, **fields: Any):
        self.folder = folder
        self.on_trouble: Callable[[OSError], None] = lambda error: (
            None
        )  # called when writing fails repeatedly
        self.begun = time.monotonic()
        self.fields: dict[str, Any] = {
            "state": "running",
            "started": now(),
            "host": host_id(),
            "writer": process_id(os.getpid()),
            **fields,
        }
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="wanlab-heartbeat", daemon=True)
        self.write()
        self._thread.start()

    def note(self, **fields: Any) -> None:
        """Set fields; the next heartbeat writes them."""
        with self._lock:
            self.fields.update(fields)

    def write(self, **fields: Any) -> float:
        """Set fields and write the file; returns the seconds since the start of the run."""
        with self._lock:
            self.fields.update(fields)
            seconds = round(time.monotonic() - self.begun, 3)
            write_json(self.folder.status_json, {**self.fields, "heartbeat": now(), "seconds": seconds})
        return seconds

    def end(self, state: str, **fields: Any) -> float:
        """Stop the heartbeat thread and write the last status; returns the seconds that the run took."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        return self.write(state=state, ended=now(), **fields)

    @property
    def ended(self) -> bool:
        return self._stop.is_set()

    def _beat(self) -> None:
        failed = 0
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if not self.folder.path.is_dir():  # the user deleted the run: do not create it again
                    return
                self.write()
                failed = 0
            except OSError as error:  # the disk is full, or a network file system not reachable for a moment
                failed += 1
                if failed == PATIENCE_BEATS:
                    self.on_trouble(error)


def process_id(pid: int) -> dict[str, Any]:
    """Id and start time of a process; the start time distinguishes it from a later process with the same id."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.Error:
        return {"pid": pid, "started": None}


def living_process(who: Any) -> psutil.Process | None:
    """The living process of a record of `process_id`; None where it has ended or its id belongs to another process.

    A record without a start time is compared by its id only.
    """
    try:
        process = psutil.Process(int(who["pid"]))
        same = who.get("started") is None or abs(process.create_time() - float(who["started"])) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None


def writer_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status may still be running."""
    if status.get("host") == host_id():
        return living_process(status.get("writer")) is not None
    try:
        silence = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
        return silence.total_seconds() < SILENCE_S
    except (KeyError, TypeError, ValueError):
        return False


@functools.cache
def host_id() -> str:
    """A short hash that differs between machines and boots, without their names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return digest([platform.node(), boot.read_text() if boot.is_file() else ""], 12)
