"""Video files and animated pictures, decoded frame by frame as a player shows them.

Frames are RGB in 8 bits: by the colour matrix and range that the file states (BT.601 in limited range where it states
none, as FFmpeg does), with accurate rounding and full interpolation of the chroma. They are turned and mirrored as the
file's display matrix says, and transparent pixels are laid over `BACKGROUND`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import av.container
import av.filter
import numpy as np
from av.video.reformatter import VideoReformatter

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.limits import check, limit
from wanlab.core.pictures import BACKGROUND, TRANSPARENT, converted, opened_picture

# FFmpeg's numbers: bicubic, full chroma in output and input, accurate rounding. PyAV's names for them are recent.
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers for the transfer of HDR10 and of broadcast HDR
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
THREADS = 4  # each holds a frame in the decoder
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")
"""Formats that Pillow reads: FFmpeg has no animated WebP and one frame of AVIF, and no durations of their frames."""

NO_DELAY_S = 0.1  # how long browsers show a frame of an animation that states no duration
TOLERANCE = 0.02  # share of the duration that may be missing at the end of a file


@dataclass(frozen=True)
class VideoFile:
    """A video in a file, decoded anew each time its frames are asked for, so that few of them are in memory.

    Attributes:
        path: the file.
        length: number of frames. height, width: pixels, as shown.
        fps: frames per second, the mean for a variable frame rate; None when the file states no times.
        notes: what a reader of its scores should know, such as a variable frame rate.
    """

    path: str
    length: int
    height: int
    width: int
    fps: float | None
    notes: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All frames in order, as uint8 `[N, H, W, 3]` of `size` frames each; the last may have fewer.

        Raises:
            WanlabError: the file was changed since it was opened.
        """
        batch: list[np.ndarray] = []
        count = 0
        for shown in _frames(Path(self.path), _Header()):
            count += 1
            if shown.size != (self.height, self.width) or count > self.length:
                raise WanlabError(f"{self.path} was changed while it was read; run again")
            batch.append(shown.pixels())
            if len(batch) == size or count == self.length:
                yield np.stack(batch)
                batch = []
        if count < self.length:
            raise WanlabError(f"{self.path} was changed while it was read; run again")

    def frame(self, index: int) -> np.ndarray:
        """One frame by its number from 0: uint8 `[H, W, 3]`. The frames before it are decoded and dropped."""
        for number, shown in enumerate(_frames(Path(self.path), _Header())):
            if number == index:
                return shown.pixels()
        raise WanlabError(f"{self.path} has frames 0 to {self.length - 1}, not {index}")

    @property
    def frames(self) -> np.ndarray:
        """All frames in memory: uint8 `[T, H, W, 3]`.

        Raises:
            WanlabError: more than the limit `video_mib`.
        """
        size_mib = self.length * self.height * self.width * 3 / 2**20
        check(
            "video_mib",
            size_mib,
            f"{self.path}: all {self.length} frames of {self.width}x{self.height} in memory",
        )
        return np.concatenate(list(self.batches(1)))


def open_video(path: str | os.PathLike) -> VideoFile:
    """A video file, which is decoded once to count and check its frames.

    MP4, MOV, Matroska, WebM and whatever else FFmpeg reads, and animated GIF, PNG, WebP and AVIF.

    Raises:
        WanlabError: the file is missing, is not a video, is damaged, has no frame, or has frames over the limit
            `frame_pixels`; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise WanlabError(f"video {path} does not exist; check the path")
    if not path.is_file():
        raise WanlabError(f"{path} is not a file; give one video file")
    header = _Header()
    length = damaged = 0
    sizes: set[tuple[int, int]] = set()
    notes: dict[str, None] = {}
    starts: list[float] = []
    ends: list[float] = []
    gap = 0.0
    for shown in _frames(path, header):
        length += 1
        damaged += shown.corrupt
        sizes.add(shown.size)
        notes |= dict.fromkeys(shown.notes)
        if shown.start_s is not None:
            gap = max(gap, shown.start_s - starts[-1] if starts else 0.0, shown.duration_s)
            starts.append(shown.start_s)
            ends.append(shown.start_s + shown.duration_s)
    if not length:
        raise WanlabError(f"video {path} holds no frame; is it a complete video file?")
    if damaged:
        raise WanlabError(f"video {path} is damaged in {damaged} of {length} frames; make or copy it again")
    _check_end(path, header, length, starts, ends, gap)
    if len(sizes) > 1:
        raise WanlabError(f"video {path} changes its size midway; re-encode it at one size")
    fps, variable = _frame_rate(header, starts, ends)
    if variable:
        notes[f"has a variable frame rate, {fps:.3g} frames per second on average"] = None
    ((height, width),) = sizes
    return VideoFile(str(path), length, height, width, fps, tuple(notes))


def _check_end(path: Path, header: _Header, length: int, starts: list, ends: list, gap: float) -> None:
    """Refuse a file whose last frame ends long before its stated duration."""
    if header.duration_s is None or not starts:
        return
    end_s = max(ends) - header.start_s
    if header.duration_s - end_s > max(1.5 * gap, TOLERANCE * header.duration_s):
        expected = length * header.duration_s / end_s if end_s > 0 else 0
        raise WanlabError(
            f"video {path} ends after {length} of about {expected:.0f} frames; make or copy it again"
        )


def _frame_rate(header: _Header, starts: list, ends: list) -> tuple[float | None, bool]:
    """Frames per second, and whether they vary: what the header states where the frames' times agree with it."""
    rate, span = header.rate, starts[-1] - starts[0] if len(starts) > 1 else 0.0
    if span <= 0:
        return rate, False
    steps = len(starts) - 1
    # Times are rounded to ticks, Matroska's to milliseconds.
    if rate and abs(rate * span - steps) <= 0.01 * steps + 2 * header.tick_s * rate:
        return rate, False
    gaps = np.diff(starts)
    even = gaps.max() - gaps.min() <= 2 * header.tick_s + 0.01 * gaps.mean()
    whole = max(ends) - starts[0]
    return (len(starts) / whole if whole > span else steps / span), not even


@dataclass
class _Header:
    """What a file states about itself; filled by `_frames` before the first frame."""

    rate: float | None = None
    duration_s: float | None = None
    start_s: float = 0.0
    tick_s: float = 0.0


@dataclass
class _Shown:
    """One frame: its size as shown, its time, and its pixels, which are converted only when they are asked for."""

    size: tuple[int, int]
    start_s: float | None
    duration_s: float
    corrupt: bool
    pixels: Callable[[], np.ndarray]
    notes: tuple[str, ...] = field(default=())


def _frames(path: Path, header: _Header) -> Iterator[_Shown]:
    return _of_pillow(path, header) if _is_animation(path) else _of_ffmpeg(path, header)


def _is_animation(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(16)
    return (
        start[:4] in (b"GIF8", b"\x89PNG")
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or start[4:12] in (b"ftypavif", b"ftypavis")
    )


def _of_pillow(path: Path, header: _Header) -> Iterator[_Shown]:
    with opened_picture(path, ANIMATIONS) as picture:
        count, time_s = getattr(picture, "n_frames", 1), 0.0
        header.tick_s = 1e-3
        for index in range(count):
            picture.seek(index)
            picture.load()
            duration_s = (picture.info.get("duration") or 0) / 1e3 or NO_DELAY_S
            image, note = converted(picture, str(path))
            yield _Shown(
                image.size[::-1],
                time_s if count > 1 else None,
                duration_s,
                False,
                partial(np.asarray, image),
                (note,) if note else (),
            )
            time_s += duration_s


def _of_ffmpeg(path: Path, header: _Header) -> Iterator[_Shown]:
    count = 0
    try:
        with av.open(str(path)) as container:
            stream = _opened_stream(path, container)
            _state(header, container, stream)
            converter = VideoReformatter()
            turn = None
            for frame in _decoded(container, stream):
                count += 1
                # Once a file: PyAV's side data and its frame refer to each other, so frames would stay in memory.
                turn = _turn(frame) if turn is None else turn
                yield _shown(path, frame, turn, converter, _notes_of_stream(stream))
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        if count:
            of = (
                f" of about {max(header.duration_s * header.rate, count):.0f}"
                if header.duration_s and header.rate
                else ""
            )
            raise WanlabError(
                f"video {path} is damaged after {count}{of} frames; make or copy it again"
            ) from error
        # PyAV's errors derive from built-in ones; their last words say what FFmpeg found.
        reason = getattr(error, "strerror", None) or first_line(error)
        raise WanlabError(f"cannot read video {path}: {reason}; is it a complete video file?") from error


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream. FFmpeg's own decoders of VP8 and VP9 drop transparency, so those of libvpx read it."""
    name = WITH_ALPHA.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if name is None:
        yield from container.decode(stream)
        return
    context = av.VideoCodecContext.create(name, "r")
    assert isinstance(context, av.VideoCodecContext)
    context.extradata, context.options = stream.codec_context.extradata, stream.codec_context.options
    context.thread_count = stream.codec_context.thread_count
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)


def _opened_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")  # not the cover picture
    if not isinstance(stream, av.VideoStream):
        raise WanlabError(f"{path} holds no video stream; give a video file")
    context = stream.codec_context
    if context is None:
        raise WanlabError(f"{path} holds a video that this FFmpeg cannot decode; re-encode it as H.264")
    _check_pixels(path, context.width, context.height)
    context.options = {"max_pixels": str(int(limit("frame_pixels")))}
    context.thread_type, context.thread_count = "AUTO", min(THREADS, os.cpu_count() or 1)
    return stream


def _shown(
    path: Path,
    frame: av.VideoFrame,
    turn: tuple[str, ...],
    converter: VideoReformatter,
    notes: tuple[str, ...],
) -> _Shown:
    _check_pixels(path, frame.width, frame.height)
    size = (frame.width, frame.height) if "transpose" in turn else (frame.height, frame.width)
    duration_s = float((getattr(frame, "duration", 0) or 0) * (frame.time_base or 0))
    return _Shown(
        size,
        frame.time,
        duration_s,
        bool(frame.is_corrupt),
        lambda: _rgb(converter, _turned(frame, turn) if turn else frame),
        (*notes, *_notes(frame)),
    )


def _check_pixels(path: Path, width: int, height: int) -> None:
    check("frame_pixels", width * height, f"video {path} states frames of {width}x{height} pixels")


def _state(header: _Header, container, stream) -> None:
    rate = stream.average_rate or stream.guessed_rate
    header.rate = float(rate) if rate else None
    header.tick_s = float(stream.time_base or 0)
    header.start_s = float((stream.start_time or 0) * (stream.time_base or 0))
    if stream.duration and stream.time_base:
        header.duration_s = float(stream.duration * stream.time_base)
    elif len(container.streams) == 1 and container.duration:
        # Matroska has one duration for all streams, so another stream may be the longest.
        header.duration_s = container.duration / 1e6


def _notes_of_stream(stream: av.VideoStream) -> tuple[str, ...]:
    ratio = stream.sample_aspect_ratio
    if not ratio or ratio == 1:
        return ()
    shape = f"{ratio.numerator}:{ratio.denominator}"
    return (f"has pixels that are not square ({shape}), compared as they are stored, without stretching",)


def _notes(frame: av.VideoFrame) -> Iterator[str]:
    if transfer := HDR_TRANSFERS.get(int(getattr(frame, "color_trc", 0) or 0)):
        yield f"is HDR ({transfer}), read without tone mapping"
    if frame.interlaced_frame:
        yield "is interlaced, read without deinterlacing"
    if _has_alpha(frame):
        yield TRANSPARENT


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _rgb(converter: VideoReformatter, frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 `[H, W, 3]`, over `BACKGROUND` where it is transparent."""
    alpha = _has_alpha(frame)
    form = "rgba" if alpha else "rgb24"
    pixels = converter.reformat(frame, format=form, interpolation=EXACT).to_ndarray()
    if not alpha:
        return pixels
    share = pixels[..., 3:].astype(np.float32) / 255
    return np.rint(pixels[..., :3] * share + np.float32(BACKGROUND) * (1 - share)).astype(np.uint8)


def _turn(frame: av.VideoFrame) -> tuple[str, ...]:
    """FFmpeg's filters that show a frame as its display matrix says; none for most videos.

    The matrix takes (x, y), y downwards, to (a x + c y, b x + d y). A turn by other than quarters is taken as the nearest.
    """
    try:
        matrix = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]  # PyAV's stubs lack it
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    except (KeyError, ValueError):
        return ()
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    upside_down, mirrored = (b < 0, c < 0) if transposed else (d < 0, a < 0)
    # "cclock_flip" is the plain transposition: x and y change places.
    return ("transpose",) * transposed + ("vflip",) * upside_down + ("hflip",) * mirrored


def _turned(frame: av.VideoFrame, turn: tuple[str, ...]) -> av.VideoFrame:
    """A frame through FFmpeg's filters, before its colours are converted, as FFmpeg's own tools do it."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    steps = [graph.add(name, "cclock_flip" if name == "transpose" else None) for name in turn]
    graph.link_nodes(source, *steps, graph.add("buffersink")).configure()
    graph.push(frame)
    shown = graph.pull()
    assert isinstance(shown, av.VideoFrame)
    shown.colorspace, shown.color_range = frame.colorspace, frame.color_range
    return shown
