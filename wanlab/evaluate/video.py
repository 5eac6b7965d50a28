"""One form for videos from any source, and writing them to files; `video_file` reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.core.files import atomic_path
from wanlab.evaluate.video_file import EXACT, VideoFile, open_video

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
        notes: what a reader of its scores should know, as in `VideoFile`.
    """

    frames: np.ndarray
    fps: float | None
    path: str
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All frames in order, `[N, H, W, 3]` of `size` frames each; the last may have fewer."""
        return (self.frames[start : start + size] for start in range(0, self.length, size))

    def frame(self, index: int) -> np.ndarray:
        """One frame by its number from 0: `[H, W, 3]`."""
        return self.frames[index]


VideoLike: TypeAlias = Video | VideoFile


def read_video(path: str | os.PathLike) -> Video:
    """Decode every frame of a video file into memory; `open_video` takes them a few at a time.

    Returns:
        Video: frames uint8 `[T, H, W, 3]`, fps, path.

    Raises:
        WanlabError: as `open_video`; more than the limit `video_mib`.
    """
    file = open_video(path)
    return Video(file.frames, file.fps, file.path, file.notes)


def read_pair(
    original: str | os.PathLike | None, optimized: str | os.PathLike | None
) -> tuple[list[VideoFile], list[VideoFile]]:
    """Both files of a comparison as two lists of one video each, or two empty lists when neither is given.

    Raises:
        WanlabError: only one is given, or as for `open_video`.
    """
    if bool(original) != bool(optimized):
        raise WanlabError("one video is given; give both original and optimized, or neither")
    return ([open_video(original)], [open_video(optimized)]) if original and optimized else ([], [])


def write_video(path: str | os.PathLike, frames, fps: float, *, lossless: bool = False) -> Path:
    """Encode frames; the file appears only when it is complete.

    The default is H.264, yuv420p, BT.709, at a visually transparent rate, with its index first:
    every browser plays it. This format has half the colour resolution and even sizes only, so an odd
    height or width is padded by repeating the last row or column. `lossless=True` writes FFV1 in
    RGB, which `read_video` returns bit for bit, odd sizes included (FFV1 needs 2 columns).

    Args:
        path: `.mp4` (or `.mov`), or `.mkv` when lossless. Its folder is created when missing.
        frames: uint8 `[T, H, W, 3]`, or float in `[0, 1]`, which is rounded to 8 bits; or a video, which is encoded as it
            is read.
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
    video = frames if hasattr(frames, "batches") else Video(as_frames(frames, str(path)), None, str(path))
    try:
        with atomic_path(path, path.suffix) as draft:
            _encode(draft, video, Fraction(fps).limit_denominator(1001), lossless=lossless)
    except av.error.FFmpegError as error:
        raise WanlabError(f"cannot write video {path}: {error.strerror or error}") from error
    return path


def _encode(path: Path, video: VideoLike, rate: Fraction, *, lossless: bool) -> None:
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
        stream.height, stream.width = video.height, video.width
        if not lossless:
            stream.height, stream.width = stream.height + stream.height % 2, stream.width + stream.width % 2
        for batch in video.batches(1):
            array = to_uint8(batch[0])
            if not lossless:
                odd = (0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)
                array = np.pad(array, odd, mode="edge") if array.shape[0] % 2 or array.shape[1] % 2 else array
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if not lossless:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", interpolation=EXACT)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def as_video(source, *, name: str = "") -> VideoLike:
    """A video from a path, a video, an array `[T, H, W, 3]`, or anything with `.video` and `.fps`.

    Raises:
        WanlabError: a file that cannot be read, or an array that is not a video.
    """
    if isinstance(source, Video | VideoFile):
        return source
    if isinstance(source, str | os.PathLike):
        return open_video(source)
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
