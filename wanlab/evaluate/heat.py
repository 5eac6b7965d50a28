"""Shows where two videos differ: heat maps, difference clips, and the worst frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.core.words import shown
from wanlab.evaluate import lpips
from wanlab.evaluate.catalogue import METRICS
from wanlab.evaluate.metrics import device_of, same_geometry, to_tensor
from wanlab.evaluate.scores import Scores
from wanlab.evaluate.video import VideoLike, as_video

KINDS = ("lpips", "absolute")
BRIGHTEST_SHARE = 0.999  # share of the values of a difference clip that are not clipped; a few pixels may be

SAMPLED_VALUES = 2_000_000


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Difference of each pixel of one frame.

    Attributes:
        frame: number of the frame.
        kind: `"lpips"`: the LPIPS map of the network; `"absolute"`: mean over colours of |Q - O|, in intensity.
        title: title of the picture, with the backbone.
        values: float32 `[H, W]`.
    """

    frame: int
    kind: str
    title: str
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class DifferenceClip:
    """Optimised minus original, frame by frame, computed as it is read; equal pixels are grey.

    Attributes:
        original, optimized: the two videos.
        gain: factor by which the difference is amplified, the same for the whole clip; 1 without a difference.
        fps: frames per second, None when not known.
    """

    original: VideoLike
    optimized: VideoLike
    gain: float
    fps: float | None

    @property
    def height(self) -> int:
        return self.original.height

    @property
    def width(self) -> int:
        return self.original.width

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All frames in order: float32 `[N, H, W, 3]` in [0, 1], `size` frames each."""
        for difference in _differences(self.original, self.optimized, size):
            difference *= np.float32(self.gain)
            difference += np.float32(0.5)
            yield np.clip(difference, 0, 1, out=difference)

    @property
    def video(self) -> np.ndarray:
        """All frames in memory: float32 `[T, H, W, 3]` in [0, 1]."""
        return np.concatenate(list(self.batches(1)))

    @property
    def label(self) -> str:
        return f"difference, amplified {shown(self.gain)} times" if self.gain > 1.05 else "difference"


def _differences(a: VideoLike, b: VideoLike, size: int) -> Iterator[np.ndarray]:
    for pair in zip(a.batches(size), b.batches(size), strict=True):
        first, second = (np.float32(frames) / (255 if frames.dtype == np.uint8 else 1) for frames in pair)
        yield np.subtract(second, first, out=second)


def heat_maps(
    original, optimized, frame: int, *, kinds=KINDS, backbone: str = "auto", device="auto"
) -> list[HeatMap]:
    """Heat maps of one frame of two videos.

    Args:
        original, optimized: two videos, as for `compare_videos`.
        frame: number of the frame, from 0; `Scores.summary` gives the worst one.
        kinds: names from `KINDS`.
        backbone, device: as for `compare_videos`.

    Raises:
        WanlabError: as for `compare_videos`, no such frame, or an unknown kind.
    """
    a, b = as_video(original, name="original"), as_video(optimized, name="optimized")
    same_geometry(a, b)
    if not 0 <= frame < a.length:
        raise WanlabError(f"{a.path} has frames 0 to {a.length - 1}, not {frame}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise WanlabError(f"no heat map {unknown[0]!r}; known: {', '.join(KINDS)}")
    x, y = (to_tensor(video.frame(frame)[None], device_of(device)) for video in (a, b))
    maps = []
    for kind in kinds:
        if kind == "lpips":
            name = lpips.resolve(backbone)
            title, values = f"LPIPS, {name}", lpips.distance_maps(x, y, name)
        else:
            title, values = "absolute difference (intensity)", (x - y).abs().mean(1)
        maps.append(HeatMap(frame, kind, title, values[0].cpu().numpy()))
    return maps


def difference_clip(original, optimized) -> DifferenceClip:
    """The difference of two videos as a clip to play beside them.

    Raises:
        WanlabError: as for `compare_videos`, when the videos do not match.
    """
    a, b = as_video(original, name="original"), as_video(optimized, name="optimized")
    same_geometry(a, b)
    # A sample of pixels is enough for the gain; sorting all of a long clip takes longer than everything else.
    step = max(1, a.length * a.height * a.width * 3 // SAMPLED_VALUES)
    sampled, largest, seen = [], 0.0, 0
    for difference in _differences(a, b, 1):
        sampled.append(np.abs(difference.reshape(-1)[-seen % step :: step]))
        largest = max(largest, float(np.abs(difference, out=difference).max()))
        seen += difference.size
    gain = 0.5 / (float(np.quantile(np.concatenate(sampled), BRIGHTEST_SHARE)) or largest or 0.5)
    return DifferenceClip(a, b, gain, a.fps if a.fps is not None else b.fps)


def worst_frames(original, optimized, scores: Scores, metrics=METRICS) -> dict[int, dict[str, np.ndarray]]:
    """Original, optimised and their difference at the worst frame of each metric.

    Args:
        original, optimized: the two videos, as for `compare_videos`.
        scores: their scores.
        metrics: metrics whose worst frames are shown, if they were measured.

    Returns:
        Frame -> {label: picture float32 `[H, W, 3]` in [0, 1]}, in the order of the metrics; a frame that
        is worst in several metrics appears once. In the difference, equal pixels are grey and the largest difference
        of the frame is black or white; its label states the amplification.
    """
    a, b = (as_video(video) for video in (original, optimized))
    pictures: dict[int, dict[str, np.ndarray]] = {}
    summary = scores.summary
    rows = summary[summary["metric"].isin(metrics)]
    for frame, names in rows.groupby("worst_frame", sort=False)["metric"]:
        one, two = (
            picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
            for picture in (a.frame(int(frame)), b.frame(int(frame)))
        )
        largest = float(np.abs(two - one).max())
        gain = 0.5 / largest if largest else 1.0
        pictures[int(frame)] = {
            f"original, frame {frame} (worst {', '.join(names)})": one,
            f"optimised, frame {frame}": two,
            f"difference, amplified {shown(gain)} times" if largest else "difference: none": 0.5
            + gain * (two - one),
        }
    return pictures
