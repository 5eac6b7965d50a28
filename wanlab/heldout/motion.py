"""Measures which motion a clip shows, by optical flow and registration."""

from __future__ import annotations

import numpy as np
from scipy.signal import fftconvolve
from skimage.color import rgb2gray
from skimage.registration import optical_flow_ilk

from wanlab.heldout.clips import (
    CAMERA_MOTIONS,
    COLOUR_RGB,
    OBJECT_PX_PER_FRAME,
    OBJECT_RADIUS_PX,
    MovingObject,
    camera_path,
    outline_distance,
)

FRAME_GAP = 2
"""Frames between the two ends of a flow field: 8 pixels of pan, within the range of the flow's pyramid."""

COLOUR_NOISE = 0.005
"""Mean squared colour error below which two positions look alike; intensities are in [0, 1]."""


def camera_motion(video: np.ndarray) -> tuple[str, dict[str, float]]:
    """The camera motion whose flow field is nearest to the measured one.

    Dense flow between frames `FRAME_GAP` apart (iterative Lucas-Kanade on a pyramid; Le Besnerais and Champagnat
    2005, as implemented in scikit-image) is compared with the exact field of each of the nine motions. The distance
    is the median over textured pixels, so that a moving object and flat regions do not influence it.

    Args:
        video: `[T, H, W, 3]` in [0, 1].

    Returns:
        The name of the motion, and the distance to every motion in pixels.
    """
    grey = rgb2gray(np.clip(video, 0, 1)).astype(np.float32)
    _, height, width = grey.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    points = np.stack([x - (width - 1) / 2, y - (height - 1) / 2, np.ones_like(x)], axis=-1)
    paths = {motion: _homogeneous(camera_path(motion, len(video))) for motion in CAMERA_MOTIONS}
    distances: dict[str, list[float]] = {motion: [] for motion in paths}
    for start in range(0, len(video) - FRAME_GAP, FRAME_GAP):
        end = start + FRAME_GAP
        dy, dx = optical_flow_ilk(grey[start], grey[end], radius=9)
        gradient = np.hypot(*np.gradient(grey[start]))
        textured = gradient >= np.quantile(gradient, 0.6)
        for motion, path in paths.items():
            step = np.linalg.inv(path[end]) @ path[start]
            field = points @ step.T
            error = np.hypot(field[..., 0] - points[..., 0] - dx, field[..., 1] - points[..., 1] - dy)
            distances[motion].append(float(np.median(error[textured])))
    means = {motion: float(np.mean(values)) for motion, values in distances.items()}
    return min(means, key=means.get), means


def _homogeneous(path: np.ndarray) -> np.ndarray:
    bottom = np.broadcast_to(np.array([[[0.0, 0.0, 1.0]]]), (len(path), 1, 3))
    return np.concatenate([path, bottom], axis=1)


def object_displacement(video: np.ndarray, moving_object: MovingObject) -> tuple[float, float]:
    """Displacement of the object between the first and the last frame: (x, y) in pixels.

    Its position in the first frame is known. In the last frame it is the position where the inside of its outline has its
    colour and a ring around the outline has not: the largest contrast of the two mean colour distances. Contrast, not
    difference, because on a background of nearly its own colour the ring differs little.

    Args:
        video: `[T, H, W, 3]` in [0, 1].
        moving_object: the object that the caption names, with its start.
    """
    reach = int(OBJECT_RADIUS_PX) + 5
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    distance = outline_distance(moving_object.shape, x, y, np)
    inside, ring = (distance < -1).astype(float), ((distance > 1) & (distance < 5)).astype(float)
    off_colour = np.square(video[-1] - np.array(COLOUR_RGB[moving_object.colour])).mean(axis=-1)
    # Beyond some distance all other colours are equally wrong.
    off_colour = np.pad(np.minimum(off_colour, 0.08), reach, mode="edge")
    within, around = (
        fftconvolve(off_colour, (area / area.sum())[::-1, ::-1], mode="valid") for area in (inside, ring)
    )
    contrast = (around - within) / (around + within + COLOUR_NOISE)
    row, column = np.unravel_index(np.argmax(contrast), contrast.shape)
    return float(column - moving_object.start_x_px), float(row - moving_object.start_y_px)


def object_moved_as_told(video: np.ndarray, moving_object: MovingObject) -> bool:
    """Whether the object moved in the caption's direction: at least half of the distance, within 45 degrees."""
    dx, dy = object_displacement(video, moving_object)
    step_x, step_y = moving_object.step_px
    along = (dx * step_x + dy * step_y) / OBJECT_PX_PER_FRAME
    across = abs(dx * step_y - dy * step_x) / OBJECT_PX_PER_FRAME
    return along >= 0.5 * OBJECT_PX_PER_FRAME * (len(video) - 1) and across <= along
