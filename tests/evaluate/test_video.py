from __future__ import annotations

from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.evaluate.video import as_video


def clip(frames=5, height=32, width=48, seed=0):
    """A smooth moving gradient with a little texture, uint8 [T, H, W, 3]."""
    t, y, x = np.mgrid[:frames, :height, :width]
    texture = np.random.default_rng(seed).normal(0, 3, (height, width))
    channels = [120 + 80 * np.sin((x + 3 * t) / 9), 120 + 90 * np.cos((y - 2 * t) / 7), 90 + 2.0 * (t + y)]
    return np.clip(np.stack(channels, -1) + texture[..., None], 0, 255).astype(np.uint8)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(2, 40)),
    st.sampled_from([0.5, 8, 16, 24000 / 1001, 29.97, 60]),
    st.integers(0, 1000),
)
def test_lossless_returns_every_bit(tmp_path_factory, shape, fps, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("lossless") / "clip.mkv"
    assert evaluate.write_video(path, frames, fps, lossless=True) == path
    video = evaluate.read_video(path)
    np.testing.assert_array_equal(video.frames, frames)
    assert video.fps == pytest.approx(fps, rel=1e-3)
    assert video.path == str(path)
    assert [file.name for file in path.parent.iterdir()] == ["clip.mkv"]  # nothing temporary stays


def test_mp4_is_what_browsers_play(tmp_path):
    path = evaluate.write_video(tmp_path / "deep" / "clip.mp4", clip(17, 128, 192), 8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1  # BT.709, which the pixels were converted with
        assert stream.average_rate == 8
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # plays before it has arrived completely


def test_mp4_looks_the_same(tmp_path):
    frames = clip(9, 64, 96)
    video = evaluate.read_video(evaluate.write_video(tmp_path / "a.mp4", frames, 8))
    error = video.frames.astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 34
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1.5  # no colour cast


def test_saturated_colours_survive(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    for i, colour in enumerate([(200, 30, 60), (10, 220, 240), (250, 250, 5)]):
        frames[i] = colour
    video = evaluate.read_video(evaluate.write_video(tmp_path / "a.mp4", frames, 1))
    assert np.abs(video.frames.astype(int) - frames).max() <= 4


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    frames = clip(3, 33, 47)
    video = evaluate.read_video(evaluate.write_video(tmp_path / "a.mp4", frames, 8))
    assert video.frames.shape == (3, 34, 48, 3)
    error = video.frames[:, :33, :47].astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 34


def test_float_frames_are_rounded_not_cut(tmp_path):
    frames = np.full((2, 8, 8, 3), 99.6 / 255, np.float32)
    video = evaluate.read_video(evaluate.write_video(tmp_path / "a.mkv", frames, 8, lossless=True))
    assert (video.frames == 100).all()


def test_an_unreadable_file_is_named(tmp_path):
    whole = tmp_path / "whole.mp4"
    evaluate.write_video(whole, clip(17, 64, 96), 8)
    data = whole.read_bytes()
    audio = tmp_path / "audio.wav"
    with av.open(str(audio), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    cases = {
        "absent.mp4": (None, "does not exist"),
        "empty.mp4": (b"", "cannot read"),
        "text.mp4": (b"this is no video " * 50, "cannot read"),
        "headless.mp4": (data[: data.find(b"moov")], "cannot read"),
        "half.mp4": (data[: len(data) // 2], "of about 17 frames"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WanlabError, match=message) as error:
            evaluate.read_video(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(WanlabError, match="not a file"):
        evaluate.read_video(tmp_path)
    with pytest.raises(WanlabError, match="no video stream"):
        evaluate.read_video(audio)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = evaluate.write_video(tmp_path / "a.mp4", clip(2), 8)
    before = path.read_bytes()

    def fail(*_, **__):
        raise av.error.InvalidDataError(1, "encoder broke")

    monkeypatch.setattr("wanlab.evaluate.video._encode", fail)
    with pytest.raises(WanlabError, match="encoder broke"):
        evaluate.write_video(path, clip(2), 8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "lossless", "message"),
    [
        ("a.gif", clip(1), 8, False, "a.mp4"),
        ("a.mp4", clip(1), 8, True, "a.mkv"),
        ("a.mp4", clip(1), 0, False, "fps"),
        ("a.mp4", clip(1), float("nan"), False, "fps"),
        ("a.mp4", clip(1)[0], 8, False, r"\[32, 48, 3\]"),
        ("a.mp4", clip(1)[:0], 8, False, r"\[0, 32, 48, 3\]"),
        ("a.mp4", clip(1).astype(int), 8, False, "int64"),
        ("a.mp4", clip(1).astype(np.float32), 8, False, "floats from 0 to 1"),
        ("a.mp4", np.full((1, 8, 8, 3), np.nan), 8, False, "floats from 0 to 1"),
    ],
)
def test_what_cannot_be_written_is_explained(tmp_path, name, frames, fps, lossless, message):
    with pytest.raises(WanlabError, match=message):
        evaluate.write_video(tmp_path / name, frames, fps, lossless=lossless)
    assert not list(tmp_path.iterdir())


def test_every_kind_of_video_is_taken(tmp_path):
    frames = clip(3)
    path = evaluate.write_video(tmp_path / "a.mkv", frames, 8, lossless=True)
    for source in (path, str(path), evaluate.read_video(path), frames, torch.from_numpy(frames)):
        np.testing.assert_array_equal(as_video(source).frames, frames)
    generation = SimpleNamespace(video=frames / np.float32(255), fps=8)
    assert as_video(generation).fps == 8
    assert as_video(generation).frames.dtype == np.float32  # not rounded to 8 bits
