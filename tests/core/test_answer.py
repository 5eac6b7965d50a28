"""Answers of notebooks: figures as a reader says them, and no more text than a phone shows."""

from __future__ import annotations

import math

import pytest

from wanlab.core.answer import (
    Answer,
    answer,
    loss_texts,
    percent_text,
    ratio_text,
    sentence,
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
        (time_text(1e-5), "below 0.001 ms"),
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
