"""SHA-256 of whole files, also of hundreds of gigabytes: a large file is hashed once, and again when it has changed.

A digest is kept under the file's device, inode, size and times of change, in nanoseconds. A file that was written within the
last seconds is not kept, because a second write might leave its time as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, file_digest, write_text
from wanlab.core.paths import cache

KEPT_FROM_BYTES = 2**24
"""Smaller files are hashed each time."""
SETTLED_S = 2.0
CHUNK_BYTES = 2**24


def content_digest(path: str | os.PathLike, ranges: Sequence[tuple[int, int]] | None = None) -> str:
    """SHA-256 of a file's bytes, from the cache if the file is the one that was hashed.

    Args:
        ranges: start and length in bytes of the parts that count; None is the whole file.

    Raises:
        OSError: the file is missing or cannot be read.
        WanlabError: it changes while it is read.
    """
    before = _state(path)
    if before[2] < KEPT_FROM_BYTES:
        return _digest(path, ranges)
    kept = cache("digests", digest([*map(str, before), str(ranges)], 32))
    try:
        value = kept.read_text("ascii")
        if len(value) == 64:
            return value
    except (OSError, ValueError):
        pass
    value = _digest(path, ranges)
    if _state(path) != before:
        raise WanlabError(f"{os.fspath(path)} changed while it was read; start again when it is complete")
    if time.time() - max(before[3:]) / 1e9 > SETTLED_S:
        with contextlib.suppress(OSError):  # without a cache it is hashed again
            write_text(kept, value)
    return value


def _digest(path: str | os.PathLike, ranges: Sequence[tuple[int, int]] | None) -> str:
    if ranges is None:
        return file_digest(path)
    state = hashlib.sha256()
    with open(path, "rb") as file:
        for start, length in ranges:
            file.seek(start)
            for size in range(0, length, CHUNK_BYTES):
                state.update(file.read(min(CHUNK_BYTES, length - size)))
    return state.hexdigest()


def content_digests(paths: Iterable[Path]) -> list[str]:
    """`content_digest` of several files at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(content_digest, paths))


def tree_digest(folder: Path, files: Sequence[Path], length: int = 64) -> str:
    """Digest of names inside a folder and of contents of its files, in the order given; `length` as in `files.digest`."""
    names = (path.relative_to(folder).as_posix() for path in files)
    parts = [part for pair in zip(names, content_digests(files), strict=True) for part in pair]
    return digest(parts, length)


def _state(path: str | os.PathLike) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
