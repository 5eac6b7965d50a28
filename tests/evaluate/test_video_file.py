"""Video files read as a player shows them: turned, in their colours, at their rate, a few frames at a time."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from wanlab import evaluate
from wanlab.cli.main import main
from wanlab.core.errors import WanlabError
from wanlab.evaluate.video import as_video


def corner(frames=4, height=32, width=48):
    """A grey clip, brighter from frame to frame, whose upper left corner is white."""
    clip = (
        np.full((frames, height, width, 3), 60, np.uint8)
        + np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8
    )
    clip[:, :8, :8] = 255
    return clip


def turned_copies(folder, matrix):
    """An MP4 with this display matrix (a, b, c, d), and the same remuxed to Matroska."""
    path = evaluate.write_video(folder / "a.mp4", corner(), 8)
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with av.open(str(path)) as source, av.open(str(folder / "a.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path, folder / "a.mkv"


@pytest.mark.parametrize(
    ("matrix", "shape", "white"),
    [
        ((1, 0, 0, 1), (32, 48), (0, 0)),
        ((0, 1, -1, 0), (48, 32), (0, -1)),  # 90 degrees clockwise: what was on the left is above
        ((-1, 0, 0, -1), (32, 48), (-1, -1)),
        ((0, -1, 1, 0), (48, 32), (-1, 0)),
        ((-1, 0, 0, 1), (32, 48), (0, -1)),  # mirrored
        ((1, 0, 0, -1), (32, 48), (-1, 0)),
        ((0, 1, 1, 0), (48, 32), (0, 0)),
        ((0, -1, -1, 0), (48, 32), (-1, -1)),
    ],
)
def test_a_video_is_turned_and_mirrored_as_a_player_shows_it(tmp_path, matrix, shape, white):
    for path in turned_copies(tmp_path, matrix):
        video = evaluate.open_video(path)
        assert (video.height, video.width) == shape
        corners = {
            (y, x): int(video.frame(0)[2 if y == 0 else -3, 2 if x == 0 else -3].mean())
            for y in (0, -1)
            for x in (0, -1)
        }
        assert max(corners, key=corners.get) == white
        assert sorted(corners.values())[-2] < 80


def encoded(path, frames, form, **colour):
    """Frames through an encoder without loss in a pixel format, with these colour tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        matrix = {1: "ITU709", 6: "ITU601"}[colour["colorspace"]]
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            full = "JPEG" if colour["color_range"] == 2 else "MPEG"
            container.mux(
                stream.encode(
                    frame.reformat(
                        format=form, dst_colorspace=matrix, dst_color_range=full, interpolation=0x40004
                    )
                )
            )
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("form", ["yuv444p", "yuv444p10le"])
@pytest.mark.parametrize("matrix", [1, 6])  # BT.709 and BT.601
@pytest.mark.parametrize("extent", [1, 2])  # limited and full range
def test_colours_are_converted_by_the_matrix_and_range_of_the_file(tmp_path, form, matrix, extent):
    frames = np.zeros((1, 16, 64, 3), np.uint8)
    for index, colour in enumerate([(200, 30, 60), (10, 220, 240), (250, 250, 5), (128, 128, 128)]):
        frames[:, :, 16 * index : 16 * index + 16] = colour
    path = encoded(tmp_path / "a.mkv", frames, form, colorspace=matrix, color_range=extent)
    error = evaluate.read_video(path).frames.astype(int) - frames
    assert np.abs(error).max() <= (1 if form == "yuv444p10le" else 2)


def test_10_bit_video_and_subsampled_colours_are_read_exactly(tmp_path):
    y, x = np.mgrid[:64, :96]
    waves = [128 + 100 * np.sin(x / 9 + k) * np.cos(y / 11 + k) for k in range(3)]
    frames = np.stack(waves, -1).round().astype(np.uint8)[None]
    read = {}
    for form in ("yuv420p", "yuv420p10le"):
        path = encoded(tmp_path / f"{form}.mkv", frames, form, colorspace=1, color_range=1)
        read[form] = evaluate.read_video(path).frames.astype(float)
    mse = {form: np.mean((pixels - frames) ** 2) for form, pixels in read.items()}
    assert 10 * np.log10(255**2 / mse["yuv420p"]) > 44
    assert 10 * np.log10(255**2 / mse["yuv420p10le"]) > 46
    assert all(abs((pixels - frames).mean()) < 0.3 for pixels in read.values())  # no bias of cut fractions


def timed(path, milliseconds, codec="libx264"):
    """A Matroska file whose frames are shown at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for array, time in zip(corner(len(milliseconds)), milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_variable_frame_rate_and_dropped_frames_are_no_damage(tmp_path):
    steady = [round(index * 1000 / 30) for index in range(30)]
    varied = evaluate.open_video(timed(tmp_path / "vfr.mkv", steady[:8] + steady[8::3]))
    assert varied.length == 16
    assert varied.fps == pytest.approx(16 / 1.0, rel=0.1)
    assert any("variable frame rate" in note for note in varied.notes)
    dropped = evaluate.open_video(timed(tmp_path / "dropped.mkv", steady[:10] + steady[11:]))
    assert dropped.length == 29
    assert evaluate.open_video(timed(tmp_path / "even.mkv", steady)).fps == 30
    assert evaluate.open_video(tmp_path / "even.mkv").notes == ()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animations_are_read_with_their_frames_and_rate(tmp_path, name):
    pictures = [Image.fromarray(np.full((16, 24, 3), 40 * index, np.uint8)) for index in range(5)]
    options = {"lossless": True} if name == "a.webp" else {}
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=20, **options)
    video = evaluate.open_video(tmp_path / name)
    assert (video.length, video.height, video.width, video.notes) == (5, 16, 24, ())
    assert video.fps == pytest.approx(50)
    assert np.abs(video.frames[:, 8, 8].astype(int) - 40 * np.arange(5)[:, None]).max() <= 1


def test_transparent_frames_are_laid_over_white_and_said(tmp_path):
    layers = np.zeros((8, 8, 4), np.uint8)
    layers[:, :4] = (10, 20, 30, 255)
    pictures = [Image.fromarray(layers), Image.fromarray(layers[:, ::-1].copy())]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    video = evaluate.open_video(tmp_path / "a.png")
    assert (video.frame(0)[:, :4] == (10, 20, 30)).all()
    assert (video.frame(0)[:, 4:] == 255).all()
    scores = evaluate.compare_videos(video, tmp_path / "a.png", "psnr", progress=False)
    assert "over white" in scores.notes[0]


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_of_webm_is_laid_over_white_and_said(tmp_path, codec):
    path, frame = tmp_path / "a.webm", np.zeros((32, 48, 4), np.uint8)
    frame[:, :24, 3] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"b": "1M", "auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuva420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    video = evaluate.read_video(path)
    assert video.length == 3
    assert video.notes == ("is transparent in places, which is laid over white",)
    assert video.frames[:, :, :20].max() < 12
    assert video.frames[:, :, 28:].min() > 243


def test_what_a_player_shows_otherwise_is_said(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=8, options={"flags": "+ilme+ildct", "x264-params": "tff=1"}
        )
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in corner():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    said = " ".join(evaluate.open_video(path).notes)
    assert "not square (4:3)" in said
    assert "interlaced" in said


def test_a_video_file_is_read_a_few_frames_at_a_time(tmp_path, monkeypatch):
    frames = corner(7)
    path = evaluate.write_video(tmp_path / "a.mkv", frames, 8, lossless=True)
    video = as_video(path)
    batches = list(video.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), frames)
    assert np.array_equal(video.frame(4), frames[4])
    copy = evaluate.write_video(tmp_path / "b.mkv", video, 8, lossless=True)
    assert np.array_equal(evaluate.read_video(copy).frames, frames)
    evaluate.write_video(path, frames[:3], 8, lossless=True)
    with pytest.raises(WanlabError, match="was changed while it was read"):
        list(video.batches(3))
    monkeypatch.setenv("WANLAB_LIMITS", "video_mib=0.01")
    with pytest.raises(WanlabError, match=r"over the limit of 0 MiB; WANLAB_LIMITS='video_mib="):
        evaluate.read_video(copy)


def test_the_memory_for_scores_does_not_grow_with_the_length(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 540, 960, "yuv420p"
        frame = av.VideoFrame.from_ndarray(corner(1, 540, 960)[0], format="rgb24").reformat(format="yuv420p")
        for index in range(80):  # 119 MiB of frames
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = evaluate.open_video(tmp_path / "a.mkv")
    before = psutil.Process().memory_info().rss
    grown = max(psutil.Process().memory_info().rss - before for _ in video.batches(1))
    assert grown < 60 * 2**20


def test_declared_sizes_over_the_limit_are_refused_before_decoding(tmp_path, monkeypatch):
    path = evaluate.write_video(tmp_path / "a.mp4", corner(), 8)
    monkeypatch.setenv("WANLAB_LIMITS", "frame_pixels=1000")
    with pytest.raises(WanlabError, match="frames of 48x32 pixels: 1,536 is over the limit of 1,000"):
        evaluate.open_video(path)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif", "webp"])
def test_damaged_files_end_in_one_line_or_are_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind in ("mp4", "mkv"):
        evaluate.write_video(path, corner(), 8, lossless=kind == "mkv")
    else:
        pictures = [Image.fromarray(frame) for frame in corner()]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    data, generator, said = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(20):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), 8):
            changed[place] = generator.integers(256)
        path.write_bytes(changed[: generator.integers(1, len(data))])
        try:
            evaluate.open_video(path)
        except WanlabError as error:
            said.append(str(error))
    assert said
    assert not any("\n" in line for line in said)


def test_two_videos_that_differ_are_told_how_to_mend_it(tmp_path, capsys):
    a = evaluate.write_video(tmp_path / "a.mkv", corner(4), 8, lossless=True)
    b = evaluate.write_video(tmp_path / "b.mkv", corner(5, 40, 60), 16, lossless=True)
    assert main(["evaluate", "--original", str(a), "--optimized", str(b), "--metric", "psnr"]) == 2
    said = capsys.readouterr().err
    for words in ("length (4 and 5 frames)", "cut both to 4 frames", "scale=48:32", "one rate (ffmpeg -r 8"):
        assert words in said
