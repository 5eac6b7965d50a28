"""The frames at which two videos differ most, as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.evaluate.catalogue import METRICS
from wanlab.evaluate.video import as_video

if TYPE_CHECKING:
    import numpy as np

    from wanlab.evaluate.scores import Scores


def worst_frames(original, optimized, scores: Scores, metrics=METRICS) -> dict[int, dict[str, np.ndarray]]:
    """Original, optimised and their difference at the worst frame of each metric.

    Args:
        original, optimized: what was compared: anything `compare_videos` takes.
        scores: of these two.
        metrics: whose worst frames to show, of those that were measured.

    Returns:
        Frame -> {label: picture float32 `[H, W, 3]` in [0, 1]}, in the order of the metrics; a frame that
        is worst in several metrics comes once. In the difference, grey is equal and the largest difference
        of the frame is black or white; its label says by how much it was amplified.
    """
    import numpy as np

    a, b = (as_video(video).frames for video in (original, optimized))
    found: dict[int, dict[str, np.ndarray]] = {}
    summary = scores.summary
    wanted = summary[summary["metric"].isin(metrics)]
    for frame, names in wanted.groupby("worst_frame", sort=False)["metric"]:
        one, two = (
            picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
            for picture in (a[frame], b[frame])
        )
        largest = float(np.abs(two - one).max())
        gain = 0.5 / largest if largest else 1.0
        found[int(frame)] = {
            f"original, frame {frame} (worst {', '.join(names)})": one,
            f"optimised, frame {frame}": two,
            f"difference, amplified {gain:,.3g} times" if largest else "difference: none": 0.5
            + gain * (two - one),
        }
    return found
