"""Whether a video moves as its caption says: the camera by optical flow, each shape by its colour and outline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import fftconvolve
from skimage.color import rgb2gray
from skimage.registration import optical_flow_ilk

from wanlab.heldout.clips import (
    CAMERA_MOTIONS,
    COLOUR_RGB,
    HEIGHT,
    OBJECT_PX_PER_FRAME,
    Clip,
    MovingObject,
    camera_path,
    object_radius,
    outline_distance,
)

FRAME_GAP = 2
"""Frames between the two ends of a flow field at 128 rows: 8 pixels of pan, within the range of the flow's pyramid."""

FLOW_RADIUS = 9
"""Half the side of the window, in pixels, over which the flow is taken to be the same."""

COLOUR_NOISE = 0.005
"""Mean squared colour error below which two positions look alike; intensities are in [0, 1]."""

MOSTLY_VISIBLE = 0.8
"""Share of a shape from which its position can be measured."""


def follows_caption(video: np.ndarray, clip: Clip) -> bool:
    """Whether the camera and all shapes of a video `[T, H, W, 3]` in [0, 1] do what the clip's caption says."""
    return camera_follows(video, clip) and all(objects_follow(video, clip))


def camera_follows(video: np.ndarray, clip: Clip) -> bool:
    """Whether the camera of a video `[T, H, W, 3]` in [0, 1] moves as the clip's caption says."""
    return camera_motion(video, clip.height, clip.objects)[0] == clip.motion


def objects_follow(video: np.ndarray, clip: Clip) -> list[bool]:
    """Whether each shape of a clip, from front to back, moves in a video `[T, H, W, 3]` as the caption says.

    A shape is looked for in the last frame in which, in the true video, at least 80 % of it are visible: one that has
    gone behind another is no mistake. It must have moved at least half of the distance that it moves by then, within
    45 degrees of the caption's direction.
    """
    shares = visible_shares(clip, len(video))
    followed = []
    for moving_object, visible in zip(clip.objects, shares, strict=True):
        frame = int(np.flatnonzero(visible >= MOSTLY_VISIBLE)[-1])
        dx, dy = object_displacement(video[frame], moving_object, object_radius(clip.height))
        step_x, step_y = moving_object.step_px
        along = (dx * step_x + dy * step_y) / OBJECT_PX_PER_FRAME
        across = abs(dx * step_y - dy * step_x) / OBJECT_PX_PER_FRAME
        followed.append(along >= 0.5 * OBJECT_PX_PER_FRAME * frame and across <= along)
    return followed


def visible_shares(clip: Clip, frames: int) -> np.ndarray:
    """Share of each shape of a clip that no shape before it hides, `[shapes, frames]`, by the true positions."""
    radius = object_radius(clip.height)
    reach = int(1.4 * radius) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    t = np.arange(frames)[:, None]
    centres = [np.array([o.start_x_px, o.start_y_px]) + t * np.array(o.step_px) for o in clip.objects]
    shares = np.ones((len(clip.objects), frames))
    for i, back in enumerate(clip.objects):
        inside = outline_distance(back.shape, x, y, np, radius) < 0
        hidden = np.zeros((frames, *inside.shape), dtype=bool)
        for front, centre in zip(clip.objects[:i], centres[:i], strict=True):
            shift_x, shift_y = (centres[i] - centre).T[..., None, None]
            hidden |= outline_distance(front.shape, x + shift_x, y + shift_y, np, radius) < 0
        shares[i] = 1 - (hidden & inside).sum(axis=(1, 2)) / inside.sum()
    return shares


def camera_motion(
    video: np.ndarray, height: int = HEIGHT, objects: Sequence[MovingObject] = ()
) -> tuple[str, dict[str, float]]:
    """The camera motion whose flow field is nearest to the measured one.

    Dense flow between frames (iterative Lucas-Kanade on a pyramid; Le Besnerais and Champagnat 2005, as implemented in
    scikit-image) is compared with the exact field of each of the nine motions. The distance is the median over textured
    pixels, so that flat regions do not influence it, and moving shapes little. Larger pictures are shrunk to 128 rows,
    and frames farther apart are compared, which gives the same fields at every size.

    Args:
        video: `[T, H, W, 3]` in [0, 1].
        height: the height, in pixels, that the clip was drawn for, which sets the camera's speed.
        objects: shapes that move in the truth; what lies near them is left out.

    Returns:
        The name of the motion, and the distance to every motion in pixels, of the shrunk picture.
    """
    shrink = max(height / HEIGHT, 1.0)
    gap = max(1, min(round(FRAME_GAP * height / HEIGHT), len(video) - 1))
    grey = _shrunk(rgb2gray(np.clip(video, 0, 1)).astype(np.float32), shrink)
    _, rows, columns = grey.shape
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    points = np.stack([x - (columns - 1) / 2, y - (rows - 1) / 2, np.ones_like(x)], axis=-1)
    paths = {
        motion: _homogeneous(camera_path(motion, len(video), height), shrink) for motion in CAMERA_MOTIONS
    }
    distances: dict[str, list[float]] = {motion: [] for motion in paths}

    def near_shapes(frame: int) -> np.ndarray:
        near = np.zeros((rows, columns), dtype=bool)
        for o in objects:
            dx, dy = (
                (axis + 0.5) * shrink - 0.5 - first - frame * step
                for axis, first, step in zip((x, y), (o.start_x_px, o.start_y_px), o.step_px, strict=True)
            )
            near |= outline_distance(o.shape, dx, dy, np, object_radius(height)) < (FLOW_RADIUS + 1) * shrink
        return near

    for start in range(0, len(video) - gap, gap):
        end = start + gap
        dy, dx = optical_flow_ilk(grey[start], grey[end], radius=FLOW_RADIUS)
        gradient = np.hypot(*np.gradient(grey[start]))
        free = ~(near_shapes(start) | near_shapes(end))
        textured = free & (gradient >= np.quantile(gradient[free], 0.6))
        for motion, path in paths.items():
            step = np.linalg.inv(path[end]) @ path[start]
            field = points @ step.T
            error = np.hypot(field[..., 0] - points[..., 0] - dx, field[..., 1] - points[..., 1] - dy)
            distances[motion].append(float(np.median(error[textured])))
    means = {motion: float(np.mean(values)) for motion, values in distances.items()}
    return min(means, key=means.get), means


def _shrunk(grey: np.ndarray, factor: float) -> np.ndarray:
    """Frames `[T, H, W]` at a smaller size."""
    if factor == 1.0:
        return grey
    size = [round(extent / factor) for extent in grey.shape[1:]]
    return F.interpolate(torch.from_numpy(grey)[None], size=size, mode="bilinear", antialias=True)[0].numpy()


def _homogeneous(path: np.ndarray, shrink: float) -> np.ndarray:
    """Affine maps `[T, 2, 3]` of a picture as `[T, 3, 3]` of the shrunk one."""
    path = path.copy()
    path[..., 2] /= shrink
    bottom = np.broadcast_to(np.array([[[0.0, 0.0, 1.0]]]), (len(path), 1, 3))
    return np.concatenate([path, bottom], axis=1)


def object_displacement(frame: np.ndarray, moving_object: MovingObject, radius: float) -> tuple[float, float]:
    """Displacement of a shape between the first frame and a later one: (x, y) in pixels.

    Its position in the first frame is known. In the later frame it is the position where the inside of its outline has its
    colour and a ring around the outline has not: the largest contrast of the two mean colour distances. Contrast, not
    difference, because on a background of nearly its own colour the ring differs little.

    Args:
        frame: the later frame, `[H, W, 3]` in [0, 1].
        moving_object: the shape that the caption names, with its start.
        radius: `object_radius` of the clip's height, in pixels.
    """
    reach = int(radius) + 5
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    distance = outline_distance(moving_object.shape, x, y, np, radius)
    inside, ring = (distance < -1).astype(float), ((distance > 1) & (distance < 5)).astype(float)
    off_colour = np.square(frame - np.array(COLOUR_RGB[moving_object.colour])).mean(axis=-1)
    # Beyond some distance all other colours are equally wrong.
    off_colour = np.pad(np.minimum(off_colour, 0.08), reach, mode="edge")
    within, around = (
        fftconvolve(off_colour, (area / area.sum())[::-1, ::-1], mode="valid") for area in (inside, ring)
    )
    contrast = (around - within) / (around + within + COLOUR_NOISE)
    row, column = np.unravel_index(np.argmax(contrast), contrast.shape)
    return float(column - moving_object.start_x_px), float(row - moving_object.start_y_px)
