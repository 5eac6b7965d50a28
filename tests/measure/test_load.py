"""The load of the machine is measured with every timing, and said where it matters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from wanlab.measure import load, timing
from wanlab.measure.load import Load


def test_other_processes_are_counted_and_this_one_is_not():
    before, after = load._Counts(100.0, 5.0, 10.0, 0.0, 4), load._Counts(116.0, 7.0, 14.0, 10.0, 4)
    assert load._between(before, after) == Load(others_percent=30.0, stolen_percent=5.0)
    alone = load._Counts(104.0, 5.0, 14.0, 10.0, 4)
    assert load._between(before, alone) == Load(others_percent=0.0, stolen_percent=0.0)


def test_a_timing_beside_a_busy_process_says_so():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        samples = timing.time_ms(lambda: time.sleep(0.15), iterations=5, progress=False)
    finally:
        busy.kill()
        busy.wait()
    assert samples.load.others_percent > 0
    assert samples.load.others_percent <= 100
    assert timing.Samples.from_dict(samples.to_dict()) == samples
    assert load.taken().others_percent >= samples.load.others_percent


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Load(), ""),
        (Load(others_percent=9.9, stolen_percent=1.9, gpu_processes=0), ""),
        (Load(others_percent=55.2), "other processes used 55 % of the processors"),
        (
            Load(stolen_percent=4.0, gpu_processes=2),
            "the host took 4 % of the processors away and 2 other processes held the GPU",
        ),
        (Load(frequency_mhz=2800.0, fastest_mhz=3000.0), ""),
        (Load(frequency_mhz=2100.4, fastest_mhz=3000.0), "the processors ran at 2100 to 3000 MHz"),
    ],
)
def test_only_a_load_that_matters_is_said(found, text):
    assert found.text == text
    samples = timing.Samples("x", (1.0, 1.0, 1.0), load=found)
    assert (samples.warning or "").startswith(text)


def test_the_worst_of_several_loads_counts():
    loads = [Load(others_percent=3.0), None, Load(stolen_percent=4.0, others_percent=1.0)]
    assert load.worst(loads) == Load(others_percent=3.0, stolen_percent=4.0)


def test_the_clock_of_a_timing_counts_against_those_of_the_others():
    loads = [Load(frequency_mhz=3000.0), Load(frequency_mhz=2000.0), Load(frequency_mhz=2500.0)]
    assert (
        load.worst(loads) == load.worst([load.worst(loads)]) == Load(frequency_mhz=2000.0, fastest_mhz=3000.0)
    )
    assert load.worst(loads).slowed_percent == pytest.approx(100 / 3)
    assert loads[0].slowed_percent == 0


def test_the_clock_is_recorded_where_the_system_tells(monkeypatch):
    clocks = [SimpleNamespace(current=800.0), SimpleNamespace(current=3123.45)]
    monkeypatch.setattr(load.psutil, "cpu_freq", lambda percpu: clocks)
    assert load.LoadMeter().load().frequency_mhz == 3123.4
    monkeypatch.setattr(load.psutil, "cpu_freq", lambda percpu: None)
    assert load.LoadMeter().load().frequency_mhz is None


def test_the_load_of_a_whole_run_is_no_timing():
    load.forget()
    load.LoadMeter().load(timing=False)
    assert load.taken() == Load()


def test_the_load_of_a_timing_that_was_replaced_is_said_no_more():
    load.forget()
    one, two = load.LoadMeter().load(), load.LoadMeter().load()
    load.withdraw([one])
    assert load.taken() == load.worst([two])
    load.withdraw([two, None])
    assert load.taken() == Load()


@pytest.mark.parametrize(
    ("listed", "found"), [([], 0), (["77", "88"], 2), (None, None)], ids=["alone", "others", "other ids"]
)
def test_others_on_the_gpu_are_counted_where_the_driver_lists_this_process(
    tmp_path, monkeypatch, listed, found
):
    """In a container the driver's tool may show ids of the host; then nothing is known."""
    pids = ["77"] if listed is None else [str(os.getpid()), *listed]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {pid}\n" for pid in pids))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    load.forget()  # an answer counts for a while
    assert load.LoadMeter(gpu=True).load().gpu_processes == found
