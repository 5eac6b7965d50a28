from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.core.stats import resampled_medians
from wanlab.measure.load import Load
from wanlab.measure.timing import check_statistics

times = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=40)
QUICK = settings(max_examples=30, deadline=None)


@QUICK
@given(times)
def test_statistics_equal_numpy(values):
    samples = measure.Samples("x", tuple(values))
    assert samples.values_ms == tuple(values)
    assert samples.n == len(values)
    assert samples.median == pytest.approx(np.median(values))
    assert samples.mean == pytest.approx(np.mean(values))
    assert (samples.min, samples.max) == (min(values), max(values))
    for p, value in ((90, samples.p90), (95, samples.p95), (99, samples.p99)):
        known = pytest.approx(np.percentile(values, p))
        assert value == known if samples.n >= 3 else np.isnan(value)
    assert samples.cv_percent == pytest.approx(100 * np.std(values) / np.mean(values), abs=1e-9)
    assert (samples.warning is None) == (samples.n > 2 and samples.cv_percent <= 2.5)
    assert measure.Samples.from_dict(json.loads(json.dumps(samples.to_dict()))) == samples


def test_warns_when_the_spread_is_large_and_says_how_large():
    assert measure.Samples("calm", (100.0, 101.0, 100.0)).warning is None
    assert "CV 35.4 %" in measure.Samples("wild", (50.0, 100.0, 50.0)).warning
    assert measure.Samples("single", (5.0,)).warning.startswith(
        "one sample: spread, percentiles and interval are unknown"
    )
    assert measure.Samples("pair", (5.0, 5.0)).warning.startswith("2 samples: spread")


@pytest.mark.parametrize("values", [(), (float("nan"),), (float("inf"),), (-1.0, 2.0)])
def test_samples_that_are_none_are_refused(values):
    with pytest.raises(WanlabError, match="'x'"):
        measure.Samples("x", values)


def test_time_ms_counts_calls_and_keeps_every_sample():
    calls = []
    samples = measure.time_ms(lambda: calls.append(1), warmup=3, iterations=7, progress=False, label="append")
    assert len(calls) == 10
    assert samples.n == 7
    assert samples.label == "append"
    assert samples.clock == "monotonic clock"


def test_time_ms_measures_what_passes():
    samples = measure.time_ms(lambda: time.sleep(0.01), warmup=0, iterations=3, progress=False, device="cpu")
    assert 10 <= samples.min < 200
    assert samples.device == "cpu"


def test_time_ms_lets_errors_of_the_call_through():
    with pytest.raises(ZeroDivisionError):
        measure.time_ms(lambda: 1 / 0, progress=False)


@pytest.mark.parametrize("function", [measure.time_ms, measure.aa_control])
@pytest.mark.parametrize("counts", [{"iterations": 0}, {"warmup": -1}])
def test_impossible_counts_are_refused(function, counts):
    with pytest.raises(WanlabError, match=r"iterations|warmup"):
        function(lambda: None, progress=False, **counts)


def test_aa_control_interleaves_both_sides(monkeypatch):
    # A clock that ticks once per look turns the order of calls into the samples.
    ticks = itertools.count(step=1_000_000)
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(ticks))
    order = []
    control = measure.aa_control(lambda: order.append(len(order)), warmup=2, iterations=4, progress=False)
    assert len(order) == 2 + 2 * 4
    assert control.first.n == control.second.n == 4
    assert control.ratio == 1
    assert control.noise_percent == 0


def test_aa_control_sees_noise_but_not_drift():
    durations = iter(range(1, 100))  # every call takes longer than the last
    now = [0]

    def clock():
        return now[0]

    def slower_each_time():
        now[0] += next(durations) * 1_000_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter_ns", clock)
        control = measure.aa_control(slower_each_time, warmup=0, iterations=10, progress=False)
    assert control.ratio == pytest.approx(1, abs=0.02)  # alternation cancels the drift
    assert control.noise_percent > 10  # and the spread is still told


@QUICK
@given(times, times, st.integers(0, 1000))
def test_comparison_invariants(first, second, seed):
    a, b = measure.Samples("a", tuple(first)), measure.Samples("b", tuple(second))
    there = measure.compare(a, b, resamples=300, seed=seed)
    known = min(a.n, b.n) >= 3
    assert there.low <= there.speedup <= there.high if known else np.isnan([there.low, there.high]).all()
    assert known or there.verdict == "not distinguishable"
    assert there.speedup == pytest.approx(np.median(first) / np.median(second))
    assert str(there.row()) == str(measure.compare(a, b, resamples=300, seed=seed).row())  # also where NaN
    back = measure.compare(b, a, resamples=300, seed=seed)
    assert back.speedup == pytest.approx(1 / there.speedup)
    if there.verdict == "faster":
        assert there.low > 1
    elif there.verdict == "slower":
        assert there.high < 1
    assert measure.compare(a, a, resamples=300, seed=seed).verdict == "not distinguishable"
    # An effect inside the noise is none, whatever the interval says.
    effect_percent = 100 * (max(there.speedup, 1 / there.speedup) - 1)
    assert measure.compare(a, b, effect_percent + 1, resamples=300).verdict == "not distinguishable"


def test_verdicts():
    slow = measure.Samples("slow", (100.0, 101.0, 99.0, 100.5, 99.5))
    fast = measure.Samples("fast", (50.0, 50.5, 49.5, 50.2, 49.8))
    assert measure.compare(slow, fast).verdict == "faster"
    assert measure.compare(fast, slow).verdict == "slower"
    assert measure.compare(slow, fast, noise_percent=150).verdict == "not distinguishable"
    two = measure.compare(slow, measure.Samples("two", (50.0, 50.0)))
    assert np.isnan([two.low, two.high]).all()
    assert two.verdict == "not distinguishable"
    assert "(ratio 2.00, 95 % interval unknown, noise 0.0 %)" in str(two)
    control = measure.timing.control_of(measure.Samples("a", (4.0, 5.0)), measure.Samples("b", (5.0, 4.0)))
    assert (control.ratio, control.noise_percent) == (1, pytest.approx(25))  # the farthest two samples
    assert str(measure.compare(slow, fast)).startswith(
        "fast is 2.00 times as fast as slow (95 % interval 1.9"
    )
    assert str(measure.compare(fast, slow)).startswith("slow is slower: 0.50 times as fast as fast (")
    assert str(measure.compare(slow, fast, noise_percent=150)).startswith(
        "fast: no difference from slow can be told from noise on this machine now (ratio 2.00, 95 % interval 1.9"
    )


def test_a_busy_machine_gives_a_direction_and_no_size():
    """PyTorch's threads wait for one another: beside two busy processes ONNX Runtime was 12 times as fast, alone 2.4."""
    busy = Load(others_percent=81.0)
    slow = measure.Samples("slow", (100.0, 101.0, 99.0, 100.5, 99.5), load=busy)
    fast = measure.Samples("fast", (50.0, 50.5, 49.5, 50.2, 49.8))
    words = "by how much cannot be told, while other processes used 81 % of the processors (ratio"
    one, other = (
        replace(measure.compare(*pair), sampling="6 pairs") for pair in ((slow, fast), (fast, slow))
    )
    assert str(one).startswith(f"fast is faster than slow; {words} 2.00, 95 % interval")
    assert str(other).startswith(f"slow is slower than fast; {words} 0.50, 95 % interval")
    assert one.direction_only
    assert not measure.compare(slow, fast).direction_only  # of a given number of samples
    assert "on this machine now, while other processes used 81 %" in str(measure.compare(slow, fast, 150))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        a, b = (tuple(generator.normal(mean, 5, 30)) for mean in (120, 100))
        result = measure.compare(measure.Samples("a", a), measure.Samples("b", b), resamples=500, seed=trial)
        hits += result.low <= 1.2 <= result.high
    assert 0.90 <= hits / 200 <= 1.0


def test_bootstrap_in_chunks_keeps_memory_small(monkeypatch):
    many = measure.Samples("many", tuple(np.linspace(1, 2, 50_000)))
    medians = resampled_medians(np.asarray(many.values_ms), np.random.default_rng(0), 100)
    assert medians.shape == (100,)
    assert medians.mean() == pytest.approx(1.5, abs=0.01)


def test_comparisons_that_mean_nothing_are_refused():
    gpu, cpu = measure.Samples("a", (1.0,), "cuda:0 GPU"), measure.Samples("b", (2.0,), "cpu")
    with pytest.raises(WanlabError, match="cuda:0 GPU and 'b' on cpu"):
        measure.compare(gpu, cpu)
    assert measure.compare(gpu, cpu, allow_different_devices=True).speedup == 0.5
    with pytest.raises(WanlabError, match="noise_percent"):
        measure.compare(cpu, cpu, -1)
    with pytest.raises(WanlabError, match="0 ms"):
        measure.compare(cpu, measure.Samples("zero", (0.0, 0.0)))


def test_in_turn_interleaves_the_calls_forwards_and_backwards():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples, control = measure.interleaved(calls, warmup=1, rounds=2, progress=False)
    assert "".join(order) == "abc" + "abccba" * 2
    assert {label: timing.n for label, timing in samples.items()} == dict.fromkeys("abc", 4)
    assert (control.first.n, control.second.n) == (2, 2)
    assert control.first.label == "a"


@pytest.mark.parametrize(("calls", "rounds"), [({}, 1), ({"a": print}, 0)])
def test_in_turn_refuses_nothing_to_do(calls, rounds):
    with pytest.raises(WanlabError):
        measure.interleaved(calls, rounds=rounds, progress=False)


def test_a_number_beyond_every_float_is_refused():
    with pytest.raises(WanlabError, match="negative or not finite"):
        measure.Samples("x", (1.0, 10**400))
    with pytest.raises(WanlabError, match="one was edited"):
        check_statistics({"values_ms": [1.0, 1.0, 1.0], "median_ms": 10**400}, "here")
