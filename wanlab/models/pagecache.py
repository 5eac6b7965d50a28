"""How much of a file the kernel already holds in memory, and a request to let go of it.

A load is cold when the bytes come from the disk and warm when they come from the page cache; without
looking, a second load is easily mistaken for a fast disk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def cached_fraction(files: Iterable[Path]) -> float | None:
    """Share of the files' pages in the page cache, 0 to 1, by mincore(2); None where it cannot be known."""
    import numpy as np

    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    held = total = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            failed = mincore(view.ctypes.data, size, pages.ctypes.data)
            del view  # the mapping cannot be closed while it is looked at
        if failed:
            return None
        held += int((pages & 1).sum())
        total += len(pages)
    return held / total if total else None


def drop(files: Iterable[Path]) -> bool:
    """Ask the kernel to drop these files' pages (posix_fadvise); False where it cannot be asked.

    It may refuse, for pages that another process maps: look with `cached_fraction` afterwards.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written back would be kept
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
