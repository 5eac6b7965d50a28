from __future__ import annotations

import math

import pytest

from wanlab.core.words import heading, label, number_text, scaled_unit, time_text, words_of


def spaced(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (2.25231e-06, "2.25 × 10⁻⁶"),
        (-4e-12, "-4 × 10⁻¹²"),
        (999.4, "999"),
        (70123.4, "70,123"),
        (999_600, "1 M"),
        (14_288_491_584, "14.3 G"),
        (3.2e15, "3.2 × 10¹⁵"),
        (math.inf, "infinite"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_three_significant_digits_and_no_exponent(value, shown):
    assert spaced(number_text(value)) == shown


@pytest.mark.parametrize(
    ("column", "head"),
    [
        ("peak_memory_gib", "peak memory, GiB"),
        ("time per video (ms)", "time per video, ms"),
        ("expert_low", "low-noise expert"),
        ("uncond_ms", "without prompt, ms"),
        ("linear_tflop", "linear, TFLOP"),
        ("95 % interval", "95 % interval"),
    ],
)
def test_heads_are_words_with_their_unit(column, head):
    assert heading(column) == head


def test_axes_keep_the_unit_in_brackets():
    assert label("peak_memory_gib") == "peak memory (GiB)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "yes"),
        (3.0, "3"),
        ({"steps": 3.0, "expert": "expert_low"}, "steps 3, expert low-noise expert"),
        (["int8", "fp8"], "int8, fp8"),
        ("[1, 16, 5]", "1, 16, 5"),
        ("['a', 'b']", "a, b"),
        ("expert_low", "low-noise expert"),
        ("expert_low takes 2.25231e-06 of it", "low-noise expert takes 2.25 × 10⁻⁶ of it"),
        ("steps=3.0, seed=1", "steps=3, seed=1"),
        ("expert_low.blocks.0", "expert_low.blocks.0"),
        ("nan", ""),
        ("above floor", "more than rounding"),
        ("version 1.10.0", "version 1.10.0"),
    ],
)
def test_values_are_words(value, shown):
    assert spaced(words_of(value)) == shown


def test_units_are_those_in_which_the_largest_is_read():
    assert scaled_unit("ms", 70_000) == (1e-3, "s")
    assert scaled_unit("ms", 500) == (1.0, "ms")
    assert scaled_unit("bytes", 2**31)[1] == "GiB"
    assert scaled_unit("TFLOP", 0.0001) == (1e3, "GFLOP")
    assert time_text(15062.5) == "15.1 s"
    assert time_text(314.96) == "315 ms"
