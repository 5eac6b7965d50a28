"""Shows where two videos differ: heat maps, difference clips, and the worst frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.evaluate import lpips
from wanlab.evaluate.catalogue import METRICS
from wanlab.evaluate.metrics import device_of, same_geometry, to_tensor
from wanlab.evaluate.scores import Scores
from wanlab.evaluate.video import as_video

KINDS = ("lpips", "absolute")
BRIGHTEST_SHARE = 0.999  # share of the values of a difference clip that are not clipped; a few pixels may be


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
    """Optimised minus original, frame by frame; equal pixels are grey.

    Attributes:
        video: float32 `[T, H, W, 3]` in [0, 1].
        gain: factor by which the difference is amplified, the same for the whole clip; 1 without a difference.
        fps: frames per second, None when not known.
    """

    video: np.ndarray
    gain: float
    fps: float | None

    @property
    def label(self) -> str:
        return f"difference, amplified {self.gain:,.3g} times"


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
    x, y = (to_tensor(video.frames[frame : frame + 1], device_of(device)) for video in (a, b))
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
    first, second = (np.float32(v.frames) / (255 if v.frames.dtype == np.uint8 else 1) for v in (a, b))
    difference = np.subtract(second, first, out=second)
    # A sample of pixels is enough for the gain; sorting all of a long clip takes longer than everything else.
    step = max(1, difference.size // 2_000_000)
    largest = float(np.quantile(np.abs(difference.reshape(-1)[::step]), BRIGHTEST_SHARE))
    largest = largest or float(np.abs(difference).max())
    gain = 0.5 / largest if largest else 1.0
    difference *= np.float32(gain)
    difference += np.float32(0.5)
    fps = a.fps if a.fps is not None else b.fps
    return DifferenceClip(np.clip(difference, 0, 1, out=difference), gain, fps)


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
    a, b = (as_video(video).frames for video in (original, optimized))
    pictures: dict[int, dict[str, np.ndarray]] = {}
    summary = scores.summary
    rows = summary[summary["metric"].isin(metrics)]
    for frame, names in rows.groupby("worst_frame", sort=False)["metric"]:
        one, two = (
            picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
            for picture in (a[frame], b[frame])
        )
        largest = float(np.abs(two - one).max())
        gain = 0.5 / largest if largest else 1.0
        pictures[int(frame)] = {
            f"original, frame {frame} (worst {', '.join(names)})": one,
            f"optimised, frame {frame}": two,
            f"difference, amplified {gain:,.3g} times" if largest else "difference: none": 0.5
            + gain * (two - one),
        }
    return pictures
