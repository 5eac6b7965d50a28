"""Known distortions order as they should, and each metric reacts to what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.registration import optical_flow_ilk

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.evaluate import metrics
from wanlab.evaluate import metrics as flow
from wanlab.evaluate import metrics as temporal
from wanlab.heldout import cases as heldout

STILL_FREE = [case for case in heldout.load_cases("selection") if case.clip.motion != "still"]
QUICK = settings(max_examples=4, deadline=None)
some_case = st.integers(0, 11)


def clip(index=0, frames=9):
    """A clip that moves, away from black and white so that what is added is not cut off."""
    return 0.2 + 0.6 * STILL_FREE[index].truth(frames, 64, 96)


def noise(video, amount, seed=0):
    return video + amount * np.random.default_rng(seed).standard_normal(video.shape).astype(np.float32)


def blur(video, sigma):
    return gaussian_filter(video, (0, sigma, sigma, 0))


def shift(video, pixels):
    return np.roll(video, pixels, axis=2)


def cast(video, amount):
    return video + np.float32([amount, 0, -amount])


def flash(video, amount):
    return video + amount * np.where(np.arange(len(video)) % 2, -1, 1).astype(np.float32).reshape(-1, 1, 1, 1)


def repeat(video, count):
    """The last `count` frames are the one before them."""
    return video[np.minimum(np.arange(len(video)), len(video) - 1 - count)]


def drop(longer, count, frames=9):
    """Frames 1 to `count` of a longer clip are missing."""
    return longer[np.where(np.arange(frames), np.arange(frames) + count, 0)]


def scored(video, other, metrics="all"):
    return evaluate.compare_videos(video, np.clip(other, 0, 1), metrics, progress=False)


def error(scores, metric):
    return evaluate.CATALOGUE[metric].error(scores.mean(metric))


FRAMES = ("lpips", "psnr", "ssim", "ms_ssim")
DISTORTIONS = {
    # name: (function, little, much, metrics that must grow with it, metrics that must not see it)
    "blur": (blur, 0.7, 1.6, (*FRAMES, "motion_ratio", "flicker"), ()),
    "noise": (noise, 0.02, 0.08, (*FRAMES, "motion_ratio", "flicker", "warp_error"), ()),
    "shift": (shift, 1, 3, FRAMES, ()),
    "colour cast": (cast, 0.03, 0.1, ("lpips", "psnr"), ("flicker", "motion_ratio", "warp_error")),
    "flashing": (flash, 0.02, 0.08, ("psnr", "flicker", "motion_ratio", "warp_error"), ()),
    "frame repeat": (repeat, 1, 4, (*FRAMES, "flicker", "motion_ratio"), ()),
    # Once nothing overlaps, structure does not become less alike: SSIM is not held to it.
    "frame drop": (drop, 1, 4, ("lpips", "psnr", "ms_ssim"), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTORTIONS)
@QUICK
@given(some_case)
def test_more_distortion_is_worse_in_every_metric_that_is_for_it(name, index):
    distort, little, much, seen, unseen = DISTORTIONS[name]
    longer = clip(index, 13)
    video = longer[:9]
    given = longer if name == "frame drop" else video
    less, more = (scored(video, distort(given, amount)) for amount in (little, much))
    for metric in seen:
        assert 0 < error(less, metric) < error(more, metric), metric
    for metric in unseen:
        assert error(more, metric) < 2e-3, metric


@QUICK
@given(some_case, st.integers(2, 9), st.sampled_from("fu"))
def test_a_perfect_copy_is_perfect_in_motion_too(index, frames, kind):
    video = clip(index, frames)
    video = video if kind == "f" else (video * 255).astype(np.uint8)
    scores = (
        scored(video, video.copy())
        if kind == "f"
        else evaluate.compare_videos(video, video.copy(), "all", progress=False)
    )
    assert set(scores.summary["metric"]) == set(evaluate.ALL_METRICS)
    for metric, facts in evaluate.CATALOGUE.items():
        values = scores.per_frame.loc[scores.per_frame["metric"] == metric]
        assert (values["value"] == facts.perfect).all()
        assert values["frame"].tolist() == list(range(facts.first_frame, frames))


def test_directions_say_what_happened():
    video = clip()
    assert scored(video, repeat(video, 4)).mean("motion_ratio") < 0.7
    assert scored(video, noise(video, 0.08)).mean("motion_ratio") > 1.3
    assert scored(video, flash(video, 0.05)).mean("warp_error") > 0.02
    assert scored(video, blur(video, 1.6)).mean("warp_error") < 0
    frozen = scored(video, repeat(video, 8))
    assert 0 <= frozen.mean("motion_ratio") < 0.05
    moves = float(np.abs(np.diff(video, axis=0)).mean())
    assert scored(video, drop(clip(0, 10), 1)).mean("flicker") > 0.3 * moves
    # A repeated frame is found where it is.
    held = video.copy()
    held[5] = held[4]
    motion = scored(video, held, ["motion_ratio"])
    assert motion.worst_frame("motion_ratio") in (5, 6)


def test_a_still_original_has_finite_ratios():
    still = np.repeat(clip()[:1], 4, axis=0)
    scores = scored(still, noise(still, 0.02))
    assert np.isfinite(scores.per_frame["value"]).all()
    assert scores.mean("motion_ratio") > 2


def test_drift_is_the_slope_of_the_scores():
    video = clip()
    growing = video + 0.01 * np.arange(len(video), dtype=np.float32).reshape(-1, 1, 1, 1)
    even = noise(video, 0.02)
    drift = [scored(video, other).summary.set_index("metric")["drift_per_frame"] for other in (growing, even)]
    assert drift[0]["psnr"] < -1.5
    assert drift[0]["lpips"] > 0
    assert abs(drift[1]["psnr"]) < 0.05


def test_motion_ratio_is_the_ratio_of_the_clips_energies():
    one, two = np.array([0.1, 0.2, 0.0]), np.array([0.05, 0.1, 0.03])
    ratio = temporal.motion_ratio(one, two).mean()
    assert ratio == pytest.approx((two.mean() + temporal.STILL) / (one.mean() + temporal.STILL))


@pytest.mark.parametrize("index", [0, 3, 5])
def test_flow_is_that_of_scikit_image(index):
    grey = STILL_FREE[index].truth(4).mean(-1)
    found = flow.optical_flow(torch.from_numpy(grey[1:]), torch.from_numpy(grey[:-1])).numpy()
    for i in range(3):
        expected = optical_flow_ilk(grey[i + 1], grey[i])
        assert np.median(np.hypot(*(found[i] - expected))) < 0.02


def test_flow_of_a_pan_is_its_speed_and_the_warped_frame_is_the_next():
    case = next(case for case in STILL_FREE if case.clip.motion == "pan_left" and not case.clip.objects)
    frames = torch.from_numpy(case.truth(5)).permute(0, 3, 1, 2)
    found = flow.optical_flow(frames[1:].mean(1), frames[:-1].mean(1))
    assert found.flatten(2).median(-1).values.numpy() == pytest.approx(np.tile([0, -4], (4, 1)), abs=0.05)
    inside = flow.inside(found)
    error = ((frames[1:] - flow.warp(frames[:-1], found)).abs() * inside).mean()
    assert error < 0.3 * (frames[1:] - frames[:-1]).abs().mean()
    assert 0.9 < inside.float().mean() < 1


def test_batches_do_not_change_what_looks_at_two_frames(monkeypatch):
    video = clip()
    other = np.clip(noise(video, 0.05), 0, 1)
    whole = evaluate.compare_videos(video, other, evaluate.TEMPORAL, progress=False)
    for pixels in (1, 2 * 64 * 96):
        monkeypatch.setitem(metrics.BATCH_PIXELS, "cpu", pixels)
        parts = evaluate.compare_videos(video, other, evaluate.TEMPORAL, progress=False)
        np.testing.assert_allclose(parts.per_frame["value"], whole.per_frame["value"], atol=1e-6)
        assert parts.per_frame["frame"].tolist() == whole.per_frame["frame"].tolist()


def test_one_frame_has_no_motion():
    picture = clip(0, 2)[:1]
    assert set(scored(picture, picture).summary["metric"]) == {"lpips", "psnr", "ssim", "ms_ssim"}
    with pytest.raises(WanlabError, match="flicker looks at two frames"):
        scored(picture, picture, "flicker")


def test_scores_of_motion_survive_json():
    video = clip()
    scores = scored(video, noise(video, 0.05))
    back = evaluate.Scores.from_json(scores.to_json())
    assert back.per_frame.equals(scores.per_frame)
    assert back.summary.equals(scores.summary)
