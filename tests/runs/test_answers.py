"""Answers of comparisons: what holds comes first, and nothing within the noise is called a gain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.comparison_runs import techniques, write_sweep

from wanlab.core.answer import LONGEST
from wanlab.evaluate.loss import QualityLoss
from wanlab.measure.timing import Comparison
from wanlab.runs import compare, engine_table, gain_answer, technique_answer, technique_matrix
from wanlab.runs.answers import loss_words, technique_title

LOSS = QualityLoss(-0.001, -0.002, 0.001, 3)


def gain(speedup: float, verdict: str, low: float = math.nan, high: float = math.nan) -> Comparison:
    return Comparison("PyTorch eager", "ONNX Runtime", speedup, low, high, verdict, noise_percent=3.1)


def test_a_gain_is_said_with_its_interval_and_what_it_costs():
    found = gain_answer(gain(1.73, "faster", 1.7, 1.77), LOSS, 61.2)
    assert found.headline == (
        "ONNX Runtime is 1.73 times as fast as PyTorch eager (95 % interval 1.70 to 1.77). It costs no quality that can be"
        " measured: less than 0.01 %."
    )
    assert found.details[0].endswith(
        "differ by up to 3.1 %; a smaller gain would not count. The two videos agree to 61 dB (PSNR)."
    )
    assert found.next.notebook == "10_baseline"
    slower = gain_answer(gain(0.5, "slower", 0.4, 0.6), LOSS, 61.2)
    assert slower.headline.startswith("ONNX Runtime is slower: 0.50 times as fast as PyTorch eager")
    same = gain_answer(gain(1.01, "not distinguishable"), LOSS, 61.2)
    assert same.headline.startswith(
        "No difference in time between ONNX Runtime and PyTorch eager can be told from noise."
    )


def test_beside_other_work_the_headline_claims_no_size_and_a_detail_what_ended_the_timing():
    busy = {
        "busy": "other processes used 50 % of the processors",
        "sampling": "6 pairs in 40 s, ended by the limit of 40 s",
    }
    found = gain_answer(replace(gain(3.89, "faster", 3.25, 5.55), **busy), LOSS, 61.2)
    assert found.headline.startswith(
        "ONNX Runtime is faster than PyTorch eager; by how much cannot be told while other processes used 50 % of the"
        " processors. "
    )
    assert "3.89" not in found.headline
    assert len(found.headline) <= LONGEST
    assert found.tiles[0][:2] == ("speed-up", "faster")
    assert "idle machine" in found.next.why
    assert "Timed in turn: 6 pairs in 40 s, ended by the limit of 40 s." in found.details
    same = gain_answer(replace(gain(1.01, "not distinguishable"), **busy), LOSS, 61.2)
    assert "can be told from noise while other processes used 50 % of the processors." in same.headline


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (LOSS, "It costs no quality that can be measured: less than 0.01 %."),
        (QualityLoss(0.4, -0.2, 1.0, 5), "No loss of quality can be told from noise (95 % interval -0.20 to +1.00 %)."),
        (QualityLoss(2.0, 1.5, 2.5, 5), "It costs 2.00 % of quality (95 % interval +1.50 to +2.50 %)."),
        (QualityLoss(-2.0, -2.5, -1.5, 5), "It gains 2.00 % of quality (95 % interval -2.50 to -1.50 %)."),
        (QualityLoss(0.4, None, None, 1), "Quality changes by +0.40 %, from 1 case, too few to say how sure that is."),
        (QualityLoss.unknown(), "What it costs in quality is not known: there is no true video."),
    ],
)  # fmt: skip
def test_a_loss_in_words_says_how_sure_it_is(loss, said):
    assert loss_words(loss) == said


def test_techniques_have_names_that_one_reads():
    assert technique_title("engine=onnxruntime") == "ONNX Runtime"
    assert technique_title("engine=onnxruntime + plan=uniform-int8") == "ONNX Runtime with plan uniform-int8"
    assert technique_title("guidance_scale=1") == "guidance scale 1"


def answered(folder, rows):
    found = compare(write_sweep(folder, rows, baseline={"engine": "eager", "plan": "default"}))
    return technique_answer(found, technique_matrix(found), engine_table(found))


def test_a_combination_that_is_slower_than_the_best_alone_gains_nothing(tmp_path):
    found = answered(tmp_path / "s", techniques())
    assert found.headline.startswith(
        "ONNX Runtime alone is 1.99 times as fast as the original (95 % interval 1.98 to"
    )
    assert found.headline.endswith(
        "Combining gains nothing: ONNX Runtime with plan uniform-int8 is slower, at 1.61 times."
    )
    assert len(found.headline) <= LONGEST
    assert found.details[0].startswith(
        "ONNX Runtime with plan uniform-int8 beside the product of each alone: Gains do not"
    )
    assert [tile[0] for tile in found.tiles[:3]] == ["best alone", "best combined", "time per video"]
    assert found.tiles[0][1] == "1.99×"
    assert found.tiles[2][1:] == ("50.2 ms", "original: 100 ms")


def test_a_combination_that_gains_more_is_the_best(tmp_path):
    rows = techniques()
    rows[3]["ms"] = 40.0
    found = answered(tmp_path / "s", rows)
    assert "ONNX Runtime with plan uniform-int8 gains more: 2.5" in found.headline
    assert found.tiles[2][1] == "39.9 ms"


def test_noise_is_said_first(tmp_path):
    rows = techniques(cv=1e-4)
    for row in rows:
        row["summary"] = row["summary"] | {"noise_percent": 300.0}
    assert answered(tmp_path / "s", rows).headline.startswith(
        "No technique gives a difference from the original that can be told from noise. The best, ONNX Runtime, was 2.00"
    )
