"""Sampling until a ratio can be told: what ends it, and that a stop calls nothing different that is equal."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.core.stats import median_interval
from wanlab.measure import in_turn


def binomial_outside(count: int, below: int) -> float:
    return 2 * sum(math.comb(count, k) for k in range(below)) / 2**count


@pytest.mark.parametrize(("count", "below"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (100, 40)])
def test_the_interval_of_a_median_is_of_two_of_its_values(count, below):
    """The published table of 95 % intervals of a median, such as Le Boudec 2010, appendix A."""
    assert median_interval(range(1, count + 1)) == (below, count + 1 - below)
    assert binomial_outside(count, below) <= 0.05 < binomial_outside(count, below + 1)


def test_a_median_of_too_few_values_has_no_interval():
    assert median_interval(range(5)) is None
    assert median_interval([]) is None
    assert median_interval([1.0, math.nan] * 5) is None
    assert median_interval(range(3000)) is not None  # beyond what a float can count


def test_the_shares_of_all_looks_add_up_to_five_percent():
    shares = [in_turn.share(look) for look in range(1, 60)]
    assert shares[0] == Fraction(1, 32)  # from the smallest to the largest of 6
    assert sum(shares) < in_turn.ERROR
    assert float(sum(shares)) == pytest.approx(0.05)


class Machine:
    """Times of two calls on a clock that they advance."""

    def __init__(self, patch, draw):
        self.now_s, self.draw, self.order = 0.0, draw, []
        patch.setattr("time.monotonic", lambda: self.now_s)

    def sample(self, label):
        taken_ms = self.draw(label)
        self.order.append(label)
        self.now_s += taken_ms / 1e3
        return taken_ms


def taken(machine, **until):
    settings = {"rounds": 3, "precision": 5.0, "limit_s": 60.0} | until
    return in_turn.take_in_turn(["a", "b"], machine.sample, progress=False, **settings)


def test_a_quiet_machine_ends_at_the_first_look(monkeypatch):
    noise = itertools.cycle([0.99, 1.0, 1.01])
    machine = Machine(monkeypatch, lambda label: {"a": 100.0, "b": 50.0}[label] * next(noise))
    halves, ended = taken(machine)
    assert machine.order == list("abba" * 3)
    assert {label: len(halves[label, 0]) for label in "ab"} == {"a": 3, "b": 3}
    assert (ended.by, ended.pairs, ended.look) == ("precision", 6, 1)
    assert ended.text(2.0) == "6 pairs in 1 s, until known to 5 %"


def test_a_machine_that_never_calms_down_ends_at_the_limit(monkeypatch):
    draw = np.random.default_rng(0)
    machine = Machine(monkeypatch, lambda label: 1000 * draw.uniform(1, 3))
    _, ended = taken(machine)
    assert ended.by == "time limit"
    assert ended.seconds <= 60
    assert (ended.pairs, ended.look) == (14, 3)  # not narrow enough after 6 and 12
    assert ended.text(40.0) == "14 pairs in 57 s, ended by the limit of 60 s: known to 40 %, asked 5 %"


def test_work_longer_than_the_limit_is_done_as_often_as_asked(monkeypatch):
    machine = Machine(monkeypatch, lambda label: 100_000.0)
    _, ended = taken(machine, rounds=1)
    assert (ended.by, ended.pairs) == ("time limit", 2)
    assert ended.text(math.inf).endswith("limit of 60 s: too few to know it, asked 5 %")
    _, ended = taken(machine)
    assert (ended.by, ended.pairs) == ("precision", 6)


def test_a_comparison_says_what_ended_it():
    timed = measure.until_told(
        {"a": lambda: sum(range(2000)), "b": lambda: None}, precision=80, limit_s=0.5, progress=False
    )
    found = timed.comparisons["b"]
    assert found.sampling == timed.ended.text(in_turn.known_percent(found.speedup, found.low, found.high))
    assert f", {found.sampling})" in str(found)
    assert found.row()["sampling"] == found.sampling
    assert timed.samples["a"].n == timed.ended.pairs
    fixed = measure.until_told(
        {"a": lambda: None, "b": lambda: None}, precision=None, rounds=2, progress=False
    )
    assert (fixed.ended.by, fixed.ended.pairs, fixed.comparisons["b"].sampling) == ("rounds", 4, "")


@pytest.mark.parametrize("until", [{"precision": 0}, {"limit_s": -1}, {"precision": None, "limit_s": 5}])
def test_impossible_ends_are_refused(until):
    with pytest.raises(WanlabError, match=r"precision|limit_s"):
        in_turn.take_in_turn(["a"], lambda label: 1.0, rounds=1, progress=False, **{"precision": 5.0} | until)


def quiet(draw):
    return lambda: draw.normal(1, 0.03)


def heavy(draw):
    """Now and then a call takes twice or ten times as long."""
    return lambda: draw.lognormal(0, 0.1) * (1 + draw.pareto(1.5) * (draw.random() < 0.3))


def drifting(draw):
    clock = itertools.count()
    return lambda: (1 + 0.01 * next(clock)) * draw.lognormal(0, 0.02)


def bursts(draw):
    """Another program comes and goes, and stays for some calls."""
    state = [False]

    def sample():
        if draw.random() < 0.15:
            state[0] = not state[0]
        return draw.lognormal(0, 0.05) * (2.2 if state[0] else 1)

    return sample


@pytest.mark.parametrize("noise", [quiet, heavy, drifting, bursts])
@pytest.mark.parametrize("limit_s", [8, 40, 200])
def test_equal_work_is_called_different_in_no_more_than_five_percent(monkeypatch, noise, limit_s):
    """Interval alone and verdict, over sampling that stops at its own width; one call takes about one second."""
    trials, outside, different = 300, 0, 0
    for trial in range(trials):
        draw = noise(np.random.default_rng(trial))
        machine = Machine(monkeypatch, lambda label, draw=draw: 1e3 * max(draw(), 0.01))
        precision = 5.0 if limit_s < 200 else 12.0
        halves, ended = taken(machine, precision=precision, limit_s=limit_s)
        a, b = ((*halves[label, 0], *halves[label, 1]) for label in "ab")
        low, high = in_turn.pair_interval(a, b, ended.look)
        outside += not (math.isnan(low) or low <= 1 <= high)
        if low > 1 or high < 1:
            control = measure.timing.control_of(
                measure.Samples("a", tuple(halves["a", 0])), measure.Samples("again", tuple(halves["a", 1]))
            )
            ratio = float(np.median(a) / np.median(b))
            different += (
                measure.timing.verdict_of(ratio, low, high, control.noise_percent) != "not distinguishable"
            )
    # 5 % and three standard errors of the simulation itself.
    assert outside / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert different <= outside
