from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.evaluate import metrics
from wanlab.evaluate.metrics import ms_ssim, psnr, scales, ssim


def noisy(frames, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, frames.shape)
    return np.clip(frames + noise, 0, 1).astype(np.float32)


def clip(frames=4, height=32, width=48, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.random((frames, height // 8, width // 8, 3))
    return np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.float32) * 0.8 + 0.1


def tensor(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(32, 50), st.integers(32, 50), st.integers(0, 99), st.sampled_from("fu"))
def test_a_perfect_copy_scores_perfectly(frames, height, width, seed, kind):
    video = np.random.default_rng(seed).random((frames, height, width, 3))
    video = video.astype(np.float32) if kind == "f" else (video * 255).astype(np.uint8)
    scores = evaluate.compare_videos(video, video.copy(), progress=False)
    values = scores.per_frame.groupby("metric")["value"].unique()
    assert values["lpips"].tolist() == [0]
    assert values["ssim"].tolist() == [1]
    assert values["psnr"].tolist() == [math.inf]
    assert len(scores.per_frame) == 3 * frames
    assert scores.mean("psnr") == math.inf


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.08))
def test_more_noise_is_worse(seed, amount):
    video = clip(2, seed=seed)
    little, much = (
        evaluate.compare_videos(video, noisy(video, sigma, seed), progress=False)
        for sigma in (amount, 3 * amount)
    )
    assert 0 < little.mean("lpips") < much.mean("lpips")
    assert 1 > little.mean("ssim") > much.mean("ssim")
    assert little.mean("psnr") > much.mean("psnr")


def test_psnr_is_the_textbook_value():
    black = torch.zeros(2, 3, 16, 16)
    grey = torch.stack([torch.full((3, 16, 16), 0.1), torch.full((3, 16, 16), 0.01)])
    np.testing.assert_allclose(psnr(black, grey), [20, 40], atol=1e-5)


@pytest.mark.parametrize("amount", [0.002, 0.05, 0.5])
def test_ssim_equals_scikit_image(amount):
    video = clip(3, 40, 56)
    other = noisy(video, amount)
    expected = [
        structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(video, other, strict=True)
    ]
    np.testing.assert_allclose(ssim(tensor(video), tensor(other)), expected, atol=2e-4)


def textured(height, width):
    """The same numbers on every machine: a sum of waves, and a copy with more of them."""
    y, x = np.mgrid[0:height, 0:width]
    plain = 0.5 + 0.2 * np.sin(x / 7.0) * np.cos(y / 5.0) + 0.1 * np.sin((x + 2 * y) / 2.5)
    other = plain + 0.08 * np.cos(x / 1.7) * np.sin(y / 1.3)
    stacked = [np.stack([frame, frame**2, 1 - frame])[None] for frame in (plain, other)]
    return [torch.from_numpy(frame.astype(np.float32)) for frame in stacked]


# What pytorch-msssim 1.0.0, ms_ssim(a, b, data_range=1), says of the same pictures.
@pytest.mark.parametrize(
    ("size", "expected"), [((176, 192), 0.968835), ((191, 203), 0.965782), ((300, 260), 0.967789)]
)
def test_ms_ssim_is_that_of_a_library(size, expected):
    assert ms_ssim(*textured(*size)).item() == pytest.approx(expected, abs=2e-5)


def test_ms_ssim_of_small_frames_has_fewer_scales():
    assert [scales(size, 300) for size in (11, 22, 44, 88, 176, 704)] == [1, 2, 3, 4, 5, 5]
    # One scale is SSIM itself.
    pair = textured(20, 200)
    assert ms_ssim(*pair).item() == pytest.approx(ssim(*pair).item(), abs=1e-6)
    video = clip(2, 32, 48)
    scores = evaluate.compare_videos(video, noisy(video, 0.05), "ms_ssim", progress=False)
    assert scores.summary["backbone"].tolist() == ["2 scales"]
    # A negative is not a number's root.
    assert ms_ssim(pair[0], 1 - pair[0]).item() >= 0


def test_floats_are_not_rounded_to_8_bits():
    video = clip()
    scores = evaluate.compare_videos(video, video + np.float32(1e-4), metrics="psnr", progress=False)
    assert scores.mean("psnr") == pytest.approx(80, abs=0.1)


def test_batches_do_not_change_scores(monkeypatch):
    video = clip(4)
    whole = evaluate.compare_videos(video, noisy(video, 0.1), progress=False)
    monkeypatch.setitem(metrics.BATCH_PIXELS, "cpu", 1)
    single = evaluate.compare_videos(video, noisy(video, 0.1), progress=False)
    np.testing.assert_allclose(single.per_frame["value"], whole.per_frame["value"], rtol=1e-4)
    assert list(single.per_frame["frame"][:4]) == list(range(4))


def test_worst_frame_is_found_in_the_right_direction():
    video = clip(5)
    other = noisy(video, 0.02)
    other[3] = noisy(video[3:4], 0.3)[0]
    summary = evaluate.compare_videos(video, other, progress=False).summary.set_index("metric")
    assert summary["worst_frame"].to_dict() == {"lpips": 3, "psnr": 3, "ssim": 3}
    assert summary.loc["lpips", "worst"] > summary.loc["lpips", "mean"]
    assert summary.loc["psnr", "worst"] < summary.loc["psnr", "mean"]
    assert summary["backbone"].to_dict() == {"lpips": "stlpips-alex", "psnr": "-", "ssim": "-"}


def test_one_equal_frame_does_not_hide_the_others():
    video = clip(2)
    other = video.copy()
    other[1] += np.float32(0.01)
    scores = evaluate.compare_videos(video, other, metrics=["psnr"], progress=False)
    assert scores.mean("psnr") == pytest.approx(40, abs=0.01)
    assert scores.summary["worst_frame"].tolist() == [1]


def test_different_videos_are_refused_with_both_values(tmp_path):
    a = evaluate.write_video(tmp_path / "a.mkv", clip(4), 8, lossless=True)
    b = evaluate.write_video(tmp_path / "b.mkv", clip(5, 40, 48), 16, lossless=True)
    with pytest.raises(WanlabError) as error:
        evaluate.compare_videos(a, b, progress=False)
    message = str(error.value)
    for part in ("4 and 5 frames", "32x48 and 40x48", "8 and 16 fps", str(a), str(b)):
        assert part in message
    # A container may round a rate; that is no difference.
    c = evaluate.Video(clip(4), 29.97, "c")
    d = evaluate.Video(clip(4), 30000 / 1001, "d")
    assert evaluate.compare_videos(c, d, metrics="ssim", progress=False).fps == 29.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "lpisp"}, "did you mean 'lpips'"),
        ({"metrics": []}, "no metric"),
        ({"backbone": "lpips-alexnet"}, "did you mean 'lpips-alex'"),
        ({"device": "gpu"}, "unknown device"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(WanlabError, match=message):
        evaluate.compare_videos(clip(), clip(), progress=False, **options)


@pytest.mark.parametrize(("metric", "size"), [("lpips", 24), ("ssim", 8)])
def test_frames_too_small_are_refused(metric, size):
    video = clip(1, size, size)
    with pytest.raises(WanlabError, match=f"{size}x{size}"):
        evaluate.compare_videos(video, video, metrics=metric, progress=False)


def test_scores_survive_json(tmp_path):
    video = clip()
    for other in (video, noisy(video, 0.1)):  # with infinite PSNR and without
        scores = evaluate.compare_videos(video, other, metrics="all", progress=False)
        text = scores.to_json(tmp_path / "sub" / "scores.json")
        strict = json.loads(text, parse_constant=pytest.fail)  # no bare Infinity or NaN
        assert strict["metrics"]["lpips"]["backbone"] == "stlpips-alex"
        for back in (
            evaluate.Scores.from_json(text),
            evaluate.Scores.from_json(tmp_path / "sub" / "scores.json"),
        ):
            assert back.per_frame.equals(scores.per_frame)
            assert back.summary.equals(scores.summary)
            assert (back.original, back.frames, back.height) == ("original", 4, 32)
    for bad in ("absent.json", "{}", "{not json", '{"metrics": {"lpips": 3}}'):
        with pytest.raises(WanlabError, match="scores"):
            evaluate.Scores.from_json(bad)


def test_scores_beside_scores():
    video = clip()
    near, far = (
        evaluate.compare_videos(video, noisy(video, amount), progress=False) for amount in (0.02, 0.1)
    )
    table = far.difference(near).set_index("metric")
    assert table.loc["lpips", "difference"] == far.mean("lpips") - near.mean("lpips") > 0
    perfect = evaluate.compare_videos(video, video, metrics="psnr", progress=False)
    assert perfect.difference(perfect)["difference"].tolist() == [0]
    with pytest.raises(WanlabError, match="no metric in common"):
        perfect.difference(evaluate.compare_videos(video, video, metrics="ssim", progress=False))
    with pytest.raises(WanlabError, match="no 'lpips'; measured: psnr"):
        perfect.mean()


def test_scores_of_different_backbones_are_never_compared():
    video = clip()
    scores = evaluate.compare_videos(video, noisy(video, 0.1), progress=False)
    text = scores.to_json().replace("stlpips-alex", "lpips-vgg")
    other = evaluate.Scores.from_json(text)
    with pytest.raises(WanlabError, match="lpips-vgg and stlpips-alex"):
        scores.difference(other)
    with pytest.raises(WanlabError, match="lpips-vgg and stlpips-alex"):
        evaluate.quality_loss([scores], [other])
    with pytest.raises(WanlabError, match="lpips-vgg and stlpips-alex"):
        evaluate.divergence(video, video, floor=other, progress=False)
