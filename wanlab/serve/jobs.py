"""Records of jobs in SQLite, with their pictures and results as files beside it.

A job is accepted when its row is on the disk: what was accepted survives a restart. The write-ahead log lets readers go on
while a job is written; every change is one transaction.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import msgspec

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import write_bytes

QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = (
    "queued",
    "in_progress",
    "completed",
    "failed",
    "cancelled",
)
ENDED = (COMPLETED, FAILED, CANCELLED)
DATABASE, LOCK = "jobs.sqlite", "service.lock"
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    request_digest TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    error_code TEXT,
    result TEXT,
    result_bytes INTEGER NOT NULL DEFAULT 0,
    removed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, created_at);
CREATE INDEX IF NOT EXISTS by_end ON jobs (ended_at);
"""


class KeyTaken(WanlabError):
    """An idempotency key that was given before, with another request."""


class Job(msgspec.Struct, kw_only=True):
    """One request and what became of it.

    Attributes:
        id: `video_` and 24 hex digits. status: queued, in_progress, completed, failed or cancelled.
        request: the checked request, as JSON values. request_digest: digest of what the caller sent.
        created_at, started_at, ended_at: seconds since 1970; None where it is not there yet.
        attempts: times it was started. error, error_code: why it failed, in a line, and as a word.
        result: what is told of the video: times, sizes, digest. result_bytes: size of its file.
        removed: whether the file of the result was removed to make room.
    """

    id: str
    status: str
    request: dict[str, Any]
    request_digest: str
    idempotency_key: str | None
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int = 0
    error: str | None = None
    error_code: str | None = None
    result: dict[str, Any] | None = None
    result_bytes: int = 0
    removed: bool = False


class JobStore:
    """The jobs of one service, in a folder. One process writes it.

    Args:
        folder: folder of the database, pictures and results; it is created.

    Raises:
        WanlabError: the folder cannot be written, or holds another service's live database.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._lock = filelock.FileLock(self.folder / LOCK, blocking=False, thread_local=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.acquire()
            self._db = sqlite3.connect(self.folder / DATABASE, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # an accepted job survives a loss of power
            self._db.executescript(_TABLE)
        except filelock.Timeout as error:
            raise WanlabError(
                f"another service keeps its jobs in {self.folder}; name another folder"
            ) from error
        except (OSError, sqlite3.Error) as error:
            self._lock.release()
            raise WanlabError(
                f"jobs cannot be kept in {self.folder}: {first_line(error)}; name another folder"
            ) from error

    def close(self) -> None:
        """Write the log into the database and close it."""
        self._db.close()
        self._lock.release()

    def add(
        self, request: dict[str, Any], digest: str, *, key: str | None = None, picture: bytes | None = None
    ) -> tuple[Job, bool]:
        """Accept a request.

        Args:
            request: JSON values. digest: digest of what the caller sent. key: idempotency key.
            picture: content of its picture, written before the row.

        Returns:
            The job, and whether it is new: a request with a key that was given before is the job of that time.

        Raises:
            KeyTaken: the key was given with another request.
            OSError, sqlite3.Error: the disk is full or broken; nothing was accepted.
        """
        if key is not None and (before := self.by_key(key)) is not None:
            return self._same(before, digest, key), False
        job = Job(
            id=f"video_{secrets.token_hex(12)}",
            status=QUEUED,
            request=request,
            request_digest=digest,
            idempotency_key=key,
            created_at=time.time(),
        )
        try:
            if picture is not None:
                write_bytes(self.picture(job.id), picture)
            self._db.execute(
                "INSERT INTO jobs (id, status, request, request_digest, idempotency_key, created_at) VALUES (?,?,?,?,?,?)",
                (job.id, job.status, json.dumps(request), digest, key, job.created_at),
            )
        except BaseException as error:
            self.picture(job.id).unlink(missing_ok=True)
            if isinstance(error, sqlite3.IntegrityError) and key is not None:
                return self._same(self.by_key(key), digest, key), False
            raise
        return job, True

    def _same(self, job: Job, digest: str, key: str) -> Job:
        if job.request_digest != digest:
            raise KeyTaken(
                f"Idempotency-Key {key[:80]!r} was given before with another request; choose a new key"
            )
        return job

    def get(self, identity: str) -> Job | None:
        """The job of an id; None where there is none."""
        return self._one("SELECT * FROM jobs WHERE id = ?", identity)

    def by_key(self, key: str) -> Job | None:
        """The job of an idempotency key; None where there is none."""
        return self._one("SELECT * FROM jobs WHERE idempotency_key = ?", key)

    def listed(self, status: str | None = None, limit: int = 100) -> list[Job]:
        """Jobs of a status, or all, the oldest first."""
        where, given = ("WHERE status = ?", [status]) if status else ("", [])
        rows = self._db.execute(
            f"SELECT * FROM jobs {where} ORDER BY created_at, id LIMIT ?", (*given, limit)
        )
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Status -> number of jobs."""
        return dict(
            tuple(row) for row in self._db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status")
        )

    def start(self, identity: str) -> bool:
        """A queued job begins; False where it is not queued any more."""
        changed = self._db.execute(
            "UPDATE jobs SET status = ?, started_at = ?, attempts = attempts + 1 WHERE id = ? AND status = ?",
            (IN_PROGRESS, time.time(), identity, QUEUED),
        )
        return changed.rowcount == 1

    def again(self, identity: str, *, counted: bool = True) -> None:
        """A job that was begun waits again; `counted`: whether it is one of its attempts, as where its worker died."""
        self._db.execute(
            "UPDATE jobs SET status = ?, started_at = NULL, attempts = attempts - ? WHERE id = ? AND status = ?",
            (QUEUED, int(not counted), identity, IN_PROGRESS),
        )

    def end(
        self,
        identity: str,
        status: str,
        *,
        error: str | None = None,
        code: str | None = None,
        result: dict[str, Any] | None = None,
        size_bytes: int = 0,
    ) -> bool:
        """A job ends; False where it had ended before, so that the first end counts. Its picture is removed."""
        changed = self._db.execute(
            "UPDATE jobs SET status = ?, ended_at = ?, error = ?, error_code = ?, result = ?, result_bytes = ?"
            " WHERE id = ? AND status IN (?, ?)",
            (
                *(
                    status,
                    time.time(),
                    error,
                    code,
                    None if result is None else json.dumps(result),
                    size_bytes,
                ),
                *(identity, QUEUED, IN_PROGRESS),
            ),
        )
        self.picture(identity).unlink(missing_ok=True)
        return changed.rowcount == 1

    def take_up(self, attempts: int) -> list[Job]:
        """After a restart: what was in progress waits again, or failed where it was started too often; all that waits."""
        for job in self.listed(IN_PROGRESS, limit=-1):
            if job.attempts >= attempts:
                self.end(
                    job.id,
                    FAILED,
                    error=f"the service ended {job.attempts} times while it was made",
                    code="lost",
                )
            else:
                self.again(job.id)
        self._remove_strays()
        return self.listed(QUEUED, limit=-1)

    def picture(self, identity: str) -> Path:
        """File of a job's picture."""
        return self.folder / f"{identity}.png"

    def video(self, identity: str, suffix: str = ".mp4") -> Path:
        """File of a job's result."""
        return self.folder / f"{identity}{suffix}"

    def remove(self, identity: str) -> None:
        """Forget a job and remove its files."""
        self._remove_files(identity)
        self._db.execute("DELETE FROM jobs WHERE id = ?", (identity,))

    def sweep(self, keep_s: float, keep_gib: float) -> int:
        """Forget jobs that ended longer ago than `keep_s`, and remove the oldest results beyond `keep_gib`.

        Returns:
            Number of jobs whose files were removed.
        """
        old = self._db.execute("SELECT id FROM jobs WHERE ended_at < ?", (time.time() - keep_s,)).fetchall()
        for row in old:
            self.remove(row["id"])
        left, over = keep_gib * 2**30, []
        query = "SELECT id, result_bytes FROM jobs WHERE result_bytes > 0 AND removed = 0 ORDER BY ended_at DESC, id"
        for row in self._db.execute(query).fetchall():
            left -= row["result_bytes"]
            if left < 0:
                over.append(row["id"])
        for identity in over:
            self._remove_files(identity)
            self._db.execute("UPDATE jobs SET removed = 1 WHERE id = ?", (identity,))
        return len(old) + len(over)

    def _remove_files(self, identity: str) -> None:
        for path in self.folder.glob(f"{identity}.*"):
            path.unlink(missing_ok=True)

    def _remove_strays(self) -> None:
        """Files of no job, which a process left that was killed between a file and its row."""
        for path in (*self.folder.glob("video_*.*"), *self.folder.glob(".video_*")):
            if self.get(path.name.lstrip(".").partition(".")[0]) is None:
                with suppress(OSError):
                    path.unlink()

    def _one(self, query: str, *given: Any) -> Job | None:
        row = self._db.execute(query, given).fetchone()
        return None if row is None else _job(row)


def _job(row: Iterable[Any]) -> Job:
    values = dict(row)
    values["request"] = json.loads(values["request"])
    values["result"] = None if values["result"] is None else json.loads(values["result"])
    values["removed"] = bool(values["removed"])
    return Job(**values)
