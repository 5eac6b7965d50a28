from __future__ import annotations

import numpy as np
import pytest

from wanlab import evaluate, plots
from wanlab.core.errors import WanlabError


def pair():
    """Two clips that differ in one square of frame 2."""
    generator = np.random.default_rng(0)
    video = generator.uniform(0.2, 0.8, (4, 48, 64, 3)).astype(np.float32)
    other = video.copy()
    other[2, 8:20, 40:56] += 0.1
    return video, other


def test_maps_show_where():
    video, other = pair()
    lpips, absolute = evaluate.heat_maps(video, other, 2)
    assert (lpips.kind, absolute.kind) == ("lpips", "absolute")
    assert lpips.title == "LPIPS, stlpips-alex"
    for each in (lpips, absolute):
        assert each.frame == 2
        assert each.values.shape == (48, 64)
        y, x = np.unravel_index(each.values.argmax(), each.values.shape)
        assert 4 <= y < 24
        assert 36 <= x < 64
    assert absolute.values[10, 45] == pytest.approx(0.1, abs=1e-6)
    assert absolute.values[30, 10] == 0
    equal = evaluate.heat_maps(video, other, 0)
    assert max(each.values.max() for each in equal) == 0


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [(4, {}, "frames 0 to 3, not 4"), (0, {"kinds": ["ssim"]}, "no heat map 'ssim'")],
)
def test_what_cannot_be_shown_is_refused(frame, options, message):
    with pytest.raises(WanlabError, match=message):
        evaluate.heat_maps(*pair(), frame, **options)


def test_the_difference_clip_is_grey_where_nothing_differs():
    video, other = pair()
    clip = evaluate.difference_clip(video, other)
    assert clip.video.shape == video.shape
    assert np.allclose(clip.video[[0, 1, 3]], 0.5)
    assert clip.gain == pytest.approx(5, rel=0.01)  # a difference of 0.1 is stretched to 0.5
    assert np.allclose(clip.video[2, 8:20, 40:56], 1, atol=0.01)
    assert clip.label == "difference, amplified 5 times"
    same = evaluate.difference_clip(video, video)
    assert (same.gain, same.video.min(), same.video.max()) == (1, 0.5, 0.5)
    # One wrong pixel of a long clip is still seen.
    lone = video.copy()
    lone[0, 0, 0, 0] += 0.2
    assert evaluate.difference_clip(video, lone).video.max() == 1


def test_files_are_compared_too(tmp_path):
    video, other = ((each * 255).astype(np.uint8) for each in pair())
    paths = [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    for path, frames in zip(paths, (video, other), strict=True):
        evaluate.write_video(path, frames, 8, lossless=True)
    before, after = evaluate.read_pair(*paths)
    clip = evaluate.difference_clip(before[0], after[0])
    assert clip.fps == 8
    assert clip.video[2].max() == pytest.approx(1, abs=0.02)
    assert evaluate.read_pair(None, None) == ([], [])
    with pytest.raises(WanlabError, match="give both"):
        evaluate.read_pair(paths[0], None)


def test_panels_have_a_scale_each_and_large_maps_are_averaged():
    video, other = pair()
    maps = evaluate.heat_maps(video, other, 2)
    figure = plots.heat_panels(maps)
    assert [trace.type for trace in figure.data] == ["heatmap", "heatmap"]
    assert [note.text for note in figure.layout.annotations] == [
        "frame 2: LPIPS, stlpips-alex",
        "frame 2: absolute difference (intensity)",
    ]
    small = np.asarray(plots.heat_panels(maps, longest_px=16).data[1].z)
    assert small.shape == (12, 16)
    assert small.mean() == pytest.approx(maps[1].values.mean(), rel=1e-3)
    with pytest.raises(WanlabError, match="at least one map"):
        plots.heat_panels([])


def test_the_loss_to_the_truth_needs_a_truth_of_the_same_size():
    truth, other = pair()
    worse = np.clip(other + 0.05 * np.random.default_rng(1).standard_normal(other.shape), 0, 1)
    loss = evaluate.loss_to_truth([truth, truth], [other, other], [worse, worse])
    assert loss.percent > 10
    assert loss.cases == 2
    direct = [evaluate.compare_videos(truth, each, "lpips", progress=False) for each in (worse, other)]
    assert loss.percent == pytest.approx(evaluate.quality_loss(*direct).percent)
    for nothing in (None, [], [truth[:2], truth]):
        assert not evaluate.loss_to_truth(nothing, [other, other], [worse, worse]).known
    with pytest.raises(WanlabError, match="1 truths, 2 original"):
        evaluate.loss_to_truth([truth], [other, other], [worse, worse])
