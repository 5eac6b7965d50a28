"""Figures and clauses of the top of a report."""

from __future__ import annotations

import math

import pytest

from wanlab.core.answer import apart_text, between_text, component_text, counted, listed, shown, speed_text


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


def test_lists_and_counts_are_sentences():
    assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [counted(n, "case") for n in (1, 2)] == ["1 case", "2 cases"]
