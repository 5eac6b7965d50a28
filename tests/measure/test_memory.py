from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import pytest

from wanlab import measure
from wanlab.measure import memory

QUARTER_GIB = 256 * 1024**2


def written_block() -> mmap.mmap:
    """A quarter of a GiB of fresh pages: an allocator may serve from pages that are resident already."""
    pages = mmap.mmap(-1, QUARTER_GIB)
    np.frombuffer(pages, dtype=np.uint8)[:] = 1
    return pages


def test_resident_set_sees_a_block_that_is_gone_at_the_end():
    with measure.peak_memory("cpu") as peak:
        block = written_block()
        time.sleep(0.05)
        block.close()
    assert peak.source == "resident set"
    assert 0.2 < peak.increase_gib < 0.5
    assert peak.peak_gib == pytest.approx(peak.start_gib + peak.increase_gib)
    assert peak.allocated_gib is None
    assert peak.row()["peak_gib"] == peak.peak_gib


def test_nothing_allocated_is_nothing_measured():
    with measure.peak_memory("cpu") as peak:
        time.sleep(0.02)
    assert 0 <= peak.increase_gib < 0.05
    assert peak.start_gib > 0.02  # an interpreter with numpy is larger than this


def test_peak_is_known_after_an_exception_and_the_thread_is_gone():
    def fill():
        with measure.peak_memory("cpu") as peak:
            peaks.append(peak)
            block = written_block()
            raise RuntimeError(len(block))

    peaks = []
    with pytest.raises(RuntimeError):
        fill()
    assert peaks[0].increase_gib > 0.2
    assert "wanlab-memory" not in {thread.name for thread in threading.enumerate()}


def test_sampler_keeps_a_spike_between_its_ends():
    level = [1.0]
    with memory._Sampler(lambda: level[0], interval_s=0.001) as sampler:
        level[0] = 7.0
        deadline = time.monotonic() + 5
        while sampler.maximum < 7 and time.monotonic() < deadline:
            time.sleep(0.002)
        level[0] = 2.0
    assert sampler.start == 1.0
    assert sampler.peak() == 7.0


@pytest.mark.parametrize(("freed_gib", "peak_gib"), [(0.0, 13.0), (6.0, 13.0)])
def test_memory_that_another_process_frees_does_not_hide_the_growth_of_this_one(
    monkeypatch, freed_gib, peak_gib
):
    reserved, others = [1.0], [9.0]
    cuda = memory.torch.cuda
    for name, function in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: ((100 - reserved[0] - others[0]) * memory.GIB, 100 * memory.GIB),
        "memory_reserved": lambda device: reserved[0] * memory.GIB,
        "max_memory_reserved": lambda device: reserved[0] * memory.GIB,
        "max_memory_allocated": lambda device: reserved[0] * memory.GIB,
    }.items():
        monkeypatch.setattr(cuda, name, function)
    with measure.peak_memory("cuda") as outer:
        others[0] -= freed_gib
        reserved[0] += 1.0
        with measure.peak_memory("cuda") as inner:
            reserved[0] += 2.0
    assert (outer.start_gib, outer.peak_gib, inner.peak_gib) == pytest.approx((10.0, peak_gib, peak_gib))
    assert inner.peak_gib - outer.start_gib == pytest.approx(3.0)
    assert ("6.0 GiB outside PyTorch were freed" in inner.source) == bool(freed_gib)
