"""Videos as arrays: reading and writing files, and one form for videos from any source."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.core.files import atomic_path

ITU709 = 1  # FFmpeg's number for BT.709 in colour matrix, primaries and transfer
LIMITED_RANGE = 1  # FFmpeg's number for 16..235
CRF = 16  # x264 quality at which 8-bit clips look the same to the eye


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video and their rate.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB; float32 in `[0, 1]` when made from float arrays.
        fps: frames per second, None when not known (plain arrays).
        path: source file, or a name for messages.
    """

    frames: np.ndarray
    fps: float | None
    path: str

    @property
    def length(self) -> int:
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]


def read_video(path: str | os.PathLike) -> Video:
    """Decode every frame of a video file.

    Returns:
        Video: frames uint8 `[T, H, W, 3]`, fps, path.

    Raises:
        WanlabError: the file is missing, is not a video, is damaged, or has no frame; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise WanlabError(f"video {path} does not exist; check the path")
    if not path.is_file():
        raise WanlabError(f"{path} is not a file; give one video file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise WanlabError(f"{path} holds no video stream; give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            expected = _expected_frames(container, stream, rate)
            frames, damaged = [], 0
            for frame in container.decode(stream):
                damaged += frame.is_corrupt
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # PyAV's errors derive from built-in ones; their last words say what FFmpeg found.
        reason = getattr(error, "strerror", None) or str(error)
        raise WanlabError(f"cannot read video {path}: {reason}; is it a complete video file?") from error
    if not frames:
        raise WanlabError(f"video {path} holds no frame; is it a complete video file?")
    if damaged:
        raise WanlabError(
            f"video {path} is damaged in {damaged} of {len(frames)} frames; make or copy it again"
        )
    if len(frames) + 1.5 < 0.98 * expected:
        raise WanlabError(
            f"video {path} ends after {len(frames)} of about {expected:.0f} frames; make or copy it again"
        )
    if any(frame.shape != frames[0].shape for frame in frames):
        raise WanlabError(f"video {path} changes its size midway; re-encode it at one size")
    return Video(np.stack(frames), float(rate) if rate else None, str(path))


def read_pair(
    original: str | os.PathLike | None, optimized: str | os.PathLike | None
) -> tuple[list[Video], list[Video]]:
    """Both files of a comparison as two lists of one video each, or two empty lists when neither is given.

    Raises:
        WanlabError: only one is given, or as for `read_video`.
    """
    if bool(original) != bool(optimized):
        raise WanlabError("one video is given; give both original and optimized, or neither")
    return ([read_video(original)], [read_video(optimized)]) if original and optimized else ([], [])


def _expected_frames(container, stream, rate) -> float:
    """The number of frames according to the headers; 0 when they do not state it."""
    if not rate:
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base * rate)
    # Matroska has one duration for all streams, so another stream may be the longest.
    alone = len(container.streams) == 1
    return float(container.duration / 1e6 * rate) if alone and container.duration else 0.0


def write_video(path: str | os.PathLike, frames, fps: float, *, lossless: bool = False) -> Path:
    """Encode frames; the file appears only when it is complete.

    The default is H.264, yuv420p, BT.709, at a visually transparent rate, with its index first:
    every browser plays it. This format has half the colour resolution and even sizes only, so an odd
    height or width is padded by repeating the last row or column. `lossless=True` writes FFV1 in
    RGB, which `read_video` returns bit for bit, odd sizes included (FFV1 needs 2 columns).

    Args:
        path: `.mp4` (or `.mov`), or `.mkv` when lossless. Its folder is created when missing.
        frames: uint8 `[T, H, W, 3]`, or float in `[0, 1]`, which is rounded to 8 bits.
        fps: frames per second, above 0.

    Raises:
        WanlabError: wrong suffix, shape, values or rate, or an error of FFmpeg.
    """
    path = Path(path)
    suffixes = (".mkv",) if lossless else (".mp4", ".mov", ".mkv")
    if path.suffix.lower() not in suffixes:
        kind = "lossless video (FFV1)" if lossless else "H.264 video"
        raise WanlabError(f"cannot write {kind} to {path}; name it {path.with_suffix(suffixes[0]).name}")
    if not (isinstance(fps, int | float | Fraction) and math.isfinite(fps) and fps > 0):
        raise WanlabError(f"fps of {path} is {fps}; give frames per second above 0")
    frames = to_uint8(as_frames(frames, str(path)))
    try:
        with atomic_path(path, path.suffix) as draft:
            _encode(draft, frames, Fraction(fps).limit_denominator(1001), lossless=lossless)
    except av.error.FFmpegError as error:
        raise WanlabError(f"cannot write video {path}: {error.strerror or error}") from error
    return path


def _encode(path: Path, frames: np.ndarray, rate: Fraction, *, lossless: bool) -> None:
    if not lossless:
        frames = np.pad(
            frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge"
        )
    # The index goes before the frames, so that a browser can play before it has the whole file.
    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    with av.open(str(path), "w", options=options) as container:
        if lossless:
            stream = container.add_stream("ffv1", rate=rate, options={"level": "3", "slicecrc": "1"})
            stream.pix_fmt = "bgr0"
        else:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF), "preset": "medium"})
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = ITU709
            context.color_range = LIMITED_RANGE
        stream.height, stream.width = frames.shape[1:3]
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if not lossless:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def as_video(source, *, name: str = "") -> Video:
    """A Video from a path, a Video, an array `[T, H, W, 3]`, or anything with `.video` and `.fps`.

    Raises:
        WanlabError: a file that cannot be read, or an array that is not a video.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, str | os.PathLike):
        return read_video(source)
    if hasattr(source, "video"):
        return Video(as_frames(source.video, name), getattr(source, "fps", None), name)
    return Video(as_frames(source, name), None, name)


def as_frames(frames, name: str = "") -> np.ndarray:
    """Check frames `[T, H, W, 3]`: uint8, or float in `[0, 1]` (returned as float32).

    Raises:
        WanlabError: another shape or type, no frames, or values that are not finite or out of range.
    """
    label = f"video {name!r}" if name else "the video"
    frames = np.asarray(frames.detach().cpu() if hasattr(frames, "detach") else frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise WanlabError(f"{label} has shape {list(frames.shape)}; give frames as [T, H, W, 3]")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise WanlabError(f"{label} has type {frames.dtype}; give uint8, or float from 0 to 1")
    low, high = float(frames.min()), float(frames.max())
    # A small excess is rounding of the network's clamp; the comparison is false for NaN as well.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise WanlabError(f"{label} has float values from {low:g} to {high:g}; give floats from 0 to 1")
    return np.clip(frames, 0, 1).astype(np.float32)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames as uint8; floats in `[0, 1]` are rounded to the nearest of 256 levels."""
    return frames if frames.dtype == np.uint8 else np.rint(frames * 255).astype(np.uint8)
