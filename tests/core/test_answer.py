"""Answers of notebooks: figures as a reader says them, and no more text than a phone shows."""

from __future__ import annotations

import math

import pytest

from wanlab.core.answer import Answer, answer, loss_texts, ratio_text, speed_text
from wanlab.core.words import (
    apart_text,
    between_text,
    component_text,
    counted,
    listed,
    percent_text,
    sentence,
    shown,
    size_text,
    time_text,
)


def test_empty_details_and_missing_tiles_are_left_out():
    found = answer("Yes.", "", "Because. ", tiles=(("a", "1 s", ""), None))
    assert found == Answer("Yes.", ("Because.",), (("a", "1 s", ""),))
    assert str(found) == "Yes. Because."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (time_text(0.123), "0.123 ms"),
        (time_text(0.0123), "12.3 µs"),
        (time_text(999.4), "999 ms"),
        (time_text(999.6), "1 s"),
        (time_text(56_840), "56.8 s"),
        (time_text(1_234_000), "1,234 s"),
        (size_text(310 * 2**20), "310 MiB"),
        (size_text(1.25 * 2**30), "1.25 GiB"),
        (percent_text(41.26), "41.3 %"),
        (percent_text(0.0), "0 %"),
        (percent_text(4.7e-5), "less than 0.01 %"),
        (ratio_text(1.734, 1.7, 1.77, beside="eager"), "1.73 times as fast as eager (95 % interval 1.70 to 1.77)"),
        (ratio_text(1.734, math.nan, math.nan), "1.73 times as fast"),
        (sentence("it costs time"), "It costs time."),
        (sentence("Why?"), "Why?"),
        (sentence(" "), ""),
    ],
)  # fmt: skip
def test_figures_read_as_one_says_them(text, said):
    assert text == said


def test_a_quality_loss_is_never_a_row_of_zeros():
    assert loss_texts(-1e-5, -2e-5, 1e-5) == ("< 0.01 %", "95 % interval within ±0.01 %")
    assert loss_texts(1.28, -0.05, 2.61) == ("+1.28 %", "95 % interval -0.05 to +2.61")
    assert loss_texts(1.28, None, None) == ("+1.28 %", "95 % interval unknown")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", "unknown"),
        (math.nan, "", "unknown"),
        (0.0, "%", "0 %"),
        (4.7e-5, "%", "< 0.0001 %"),
        (0.00047, "%", "0.0005 %"),
        (0.0123456, "", "0.0123"),
        (554.4, "ms", "554 ms"),
        (1450.0, "ms", "1.45 s"),
        (123456.0, "", "123,456"),
        (3 * 2**20, "bytes", "3 MiB"),
        (1.5 * 2**30, "bytes", "1.5 GiB"),
        (2048, "bytes", "2 KiB"),
    ],
)
def test_figures_have_three_digits_and_no_power_of_ten(value, unit, text):
    assert shown(value, unit) == text


def test_an_interval_has_no_power_of_ten():
    assert between_text(4.7e-5, 1234.0) == "95 % interval < 0.0001 to 1,234"
    assert between_text(math.nan, 2.0) == between_text(None, 2.0) == "95 % interval unknown"


def test_a_distance_is_a_percentage():
    assert apart_text(4.7e-5) == "0.0047 %"
    assert apart_text(1e-9) == "< 0.0001 %"


def test_components_have_names_for_readers():
    assert component_text("expert_high") == "high-noise expert"
    assert component_text("some_network") == "some network"


def test_a_gain_a_loss_and_what_cannot_be_told_apart():
    names = {"candidate": "ONNX Runtime", "baseline": "eager PyTorch"}
    assert speed_text(2.0, 1.9, 2.1, **names) == (
        "ONNX Runtime is 2.00 times as fast as eager PyTorch (95 % interval 1.90 to 2.10)"
    )
    assert "is slower than eager PyTorch: 0.50 times as fast (95 % interval unknown)" in speed_text(
        0.5, **names
    )
    same = speed_text(1.02, 0.98, 1.06, same=True, noise_percent=4.4, **names)
    assert same.startswith("ONNX Runtime cannot be told from eager PyTorch in time: 1.02 times as fast")
    assert same.endswith("noise 4 %)")
    clause = speed_text(
        2.0, 1.9, 2.1, candidate="", baseline="eager PyTorch", noise_percent=2.6, how="as good"
    )
    assert clause == "2.00 times as good as eager PyTorch (95 % interval 1.90 to 2.10)"


def test_lists_and_counts_are_sentences():
    assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [counted(n, "case") for n in (1, 2)] == ["1 case", "2 cases"]
