"""Variants measured in turn, weights rounded in place, the other attention kernel, and the worst frames."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wanlab import evaluate, measure
from wanlab.core.errors import WanlabError
from wanlab.models import alternate_sdpa, round_weights


class Fake:
    """A model whose videos take the time they are told to, and which notes the order of calls."""

    device = "cpu"

    def __init__(self, name, wall_ms, log):
        self.name, self.wall_ms, self.log = name, wall_ms, log
        self.pipeline = SimpleNamespace(text_encoder=lambda: None)

    def generate(self, image, prompt, **settings):
        self.log.append(self.name)
        self.pipeline.text_encoder()
        return SimpleNamespace(wall_ms=next(self.wall_ms), settings={"frames": 5})


def forever(*values):
    while True:
        yield from values


def test_every_variant_is_taken_forwards_and_backwards():
    log = []
    variants = {"a": Fake("a", forever(100.0), log), "b": Fake("b", forever(50.0), log)}
    seen = measure.compare_models(variants, None, "", rounds=2, progress=False)
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]  # the last two are recorded, not timed
    assert seen.comparisons["b"].speedup == 2
    assert seen.comparisons["b"].verdict == "faster"
    assert seen.control.noise_percent == 0
    assert seen.times["time_per_frame_ms"].tolist() == [20, 10]
    assert seen.breakdown["component"].tolist() == ["text_encoder", "other"]
    assert seen.breakdown[["a_ms", "b_ms"]].sum().tolist() == pytest.approx([100, 50])


def test_a_gain_within_the_noise_of_the_first_is_no_gain():
    log = []
    variants = {
        "a": Fake("a", forever(100.0, 180.0, 100.0, 180.0), log),
        "b": Fake("b", forever(90.0), log),
    }
    seen = measure.compare_models(variants, None, "", rounds=2, progress=False)
    assert seen.control.noise_percent >= 40
    assert seen.comparisons["b"].verdict == "not distinguishable"


@pytest.mark.parametrize(("variants", "rounds"), [({}, 1), ({"a": None}, 0)])
def test_nothing_to_measure_is_refused(variants, rounds):
    with pytest.raises(WanlabError, match="at least one"):
        measure.compare_models(variants, None, "", rounds=rounds)


def model_of(module, engine="eager"):
    spec = SimpleNamespace(part_of=lambda name: name)
    return SimpleNamespace(spec=spec, components={"expert": module}, engines={"expert": engine})


def test_rounding_moves_matrices_and_leaves_vectors():
    module = torch.nn.Linear(8, 8)
    torch.nn.init.constant_(module.weight, 1 / 3)
    torch.nn.init.constant_(module.bias, 1 / 3)
    assert round_weights(model_of(module), "bfloat16") == {"expert": 100.0}
    assert (module.weight == torch.tensor(1 / 3).bfloat16().float()).all()
    assert (module.bias == torch.tensor(1 / 3)).all()
    assert round_weights(model_of(module), "bfloat16") == {"expert": 0.0}  # no effect the second time


def test_rounding_keeps_what_is_too_large_finite():
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, 1e6)
    round_weights(model_of(module), "float8_e4m3fn")
    assert (module.weight == 448).all()


def test_rounding_refuses_unknown_formats_and_engines():
    with pytest.raises(WanlabError, match="did you mean 'bfloat16'"):
        round_weights(model_of(torch.nn.Linear(2, 2)), "bfloat61")
    with pytest.raises(WanlabError, match="runs on onnxruntime-cpu"):
        round_weights(model_of(torch.nn.Linear(2, 2), "onnxruntime-cpu"), "bfloat16")


def test_other_attention_is_exact_and_names_its_kernel():
    q = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    usual = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with alternate_sdpa(torch.device("cpu")) as name:
        other = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert name == "math"
    assert torch.allclose(usual, other, atol=1e-5)


def test_worst_frames_are_those_that_were_changed():
    original = np.full((5, 32, 32, 3), 0.5, np.float32)
    changed = original.copy()
    changed[3, 8:16, 8:16] += 0.1
    scores = evaluate.compare_videos(original, changed, ("psnr", "ssim"), progress=False)
    found = evaluate.worst_frames(original, changed, scores)
    assert list(found) == [3]
    one, two, difference = found[3].values()
    assert np.allclose(two - one, changed[3] - original[3])
    assert difference.max() == pytest.approx(1)
    assert difference[0, 0] == pytest.approx([0.5] * 3)


def test_equal_videos_have_a_grey_difference():
    video = np.zeros((2, 16, 16, 3), np.uint8)
    scores = evaluate.compare_videos(video, video, ("psnr",), progress=False)
    (pictures,) = evaluate.worst_frames(video, video, scores).values()
    assert (pictures["difference: none"] == 0.5).all()
