"""The answer of one configuration."""

from __future__ import annotations

import numpy as np
import pytest
from support.answers import faults

from wanlab import evaluate, runs
from wanlab.runs import Result, Work

ROW = Result(
    work=Work(model="wan-nano", weights="pretrained"), engine="onnxruntime", plan="ffn-int8",
    samples_ms=(500.0, 510.0, 520.0), noise_percent=4.2, peak_memory_gib=1.03, load_ms=635.0, effect="applied",
)  # fmt: skip


def answer(loss=None, **changes):
    clips = [np.full((2, 32, 32, 3), value, np.float32) for value in (0.2, 0.5, 0.7)]
    row = Result(**{name: getattr(ROW, name) for name in ROW.__struct_fields__} | changes)
    loss = loss or evaluate.quality_loss([1.01, 1.02, 1.0], [1.0] * 3)
    return runs.configuration_answer(
        row, loss, evaluate.divergence(clips, clips, progress=False), proof="Proof."
    )


def test_time_noise_and_quality_stand_in_the_headline():
    found = answer()
    assert faults(found) == []
    assert found.headline.startswith(
        "ONNX Runtime with plan ffn-int8 makes a video in 510 ms (repeats differ by up to 4.2 %). It keeps within 3 %"
        " of quality loss: at most 2.00 %."
    )
    assert found.details[:2] == ("The videos are identical in every pixel.", "Proof.")


def test_what_is_next_depends_on_what_is_decided():
    found = answer()
    assert found.next.parameters == {"engine": "eager", "plan": None, "configuration": None}
    noisy = answer(noise_percent=26.6)
    assert noisy.next.parameters["cases"] == 8
    few = answer(evaluate.quality_loss([1.02], [1.0]))
    assert "Whether it keeps within 3 % of quality loss is not decided: +2.00 %, from 1 case" in few.headline
    assert faults(few) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"effect": "not applied"}, "The configuration was not applied, so its figures are the original's."),
        (
            {"effect": "baseline", "engine": "eager", "plan": None},
            "Eager PyTorch makes a video in 510 ms (repeats",
        ),
    ],
)
def test_what_was_not_applied_and_the_baseline_are_said_first(changes, said):
    found = answer(**changes)
    assert faults(found) == []
    assert found.headline.startswith(said)
