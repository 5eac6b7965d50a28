"""What holds on a GPU where there is one, and the refusal where there is none."""

from __future__ import annotations

import pytest
import torch

from wanlab import measure
from wanlab.core.errors import WanlabError

GPU = torch.cuda.is_available()
QUARTER_GIB = 32 * 1024**2  # float64 values


def test_cuda_events_see_work_that_the_host_does_not_wait_for():
    if not GPU:
        with pytest.raises(WanlabError, match="no GPU"):
            measure.time_ms(lambda: None, device="cuda", progress=False)
        return
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    samples = measure.time_ms(lambda: x @ x, warmup=3, iterations=10, device="cuda", progress=False)
    assert samples.clock == "CUDA events"
    assert samples.median > 0.3  # 1.1 TFLOP; launching it takes some microseconds
    assert torch.cuda.get_device_name() in samples.device
    by_clock = measure.time_ms(lambda: x @ x, warmup=3, iterations=10, progress=False)
    assert by_clock.clock == "monotonic clock"
    assert by_clock.median == pytest.approx(samples.median, rel=0.2)


def test_gpu_peak_has_allocator_and_whole_device():
    if not GPU:
        with pytest.raises(WanlabError, match="no GPU"), measure.peak_memory("cuda"):
            pass
        return
    torch.cuda.empty_cache()
    with measure.peak_memory("cuda") as outer:
        first = torch.ones(QUARTER_GIB, dtype=torch.float64, device="cuda")
        second = torch.ones(QUARTER_GIB, dtype=torch.float64, device="cuda")
        del first, second
        with measure.peak_memory("cuda") as inner:
            third = torch.ones(QUARTER_GIB, dtype=torch.float64, device="cuda")
            del third
    assert inner.allocated_gib == pytest.approx(0.25, abs=0.1)
    assert outer.allocated_gib == pytest.approx(0.5, abs=0.1)  # a reset inside does not forget it
    assert outer.peak_gib >= outer.reserved_gib >= outer.allocated_gib
    assert outer.increase_gib >= 0.49
    assert "whole device" in outer.source


def test_the_fingerprint_names_the_gpu():
    found = measure.environment()
    if not GPU:
        assert (found["device"], found["gpu"], found["gpu_count"]) == ("cpu", None, 0)
        return
    assert found["device"] == "cuda"
    assert found["gpu"]["name"] == torch.cuda.get_device_name()
    assert found["gpu"]["memory_gib"] > 1
    assert measure.environment("cpu")["gpu"] is None
