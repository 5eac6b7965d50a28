"""Procedural clips cut from photographs, so that the true video of every (image, caption) pair is known.

A virtual camera moves over a photograph for 17 frames: it stands still, pans, zooms or rotates, at one fixed
speed per motion, with or without a coloured shape that moves across the picture. The caption states the motion.
What the caption does not state (photograph, position, scale, the shape's start) is drawn from a seed and visible in
the first frame, so the caption and the first frame together determine the clip, except the parts that the camera uncovers.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image

HEIGHT, WIDTH, FRAMES, FPS = 128, 192, 17, 8

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
CAMERA_MOTIONS = {
    "still": "the camera is still",
    "pan_left": "the camera pans left",
    "pan_right": "the camera pans right",
    "pan_up": "the camera pans up",
    "pan_down": "the camera pans down",
    "zoom_in": "the camera zooms in",
    "zoom_out": "the camera zooms out",
    "rotate_clockwise": "the camera rotates clockwise",
    "rotate_counterclockwise": "the camera rotates counterclockwise",
}
DIRECTIONS = ("left", "right", "up", "down")

TRAINING_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg",
)  # fmt: skip
"""Photographs of the scikit-image package that wan-nano learns from."""

HELD_OUT_PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs of the scikit-image package that no training stage ever sees."""

PAN_PX_PER_FRAME = 4.0
ZOOM_PER_CLIP = 1.8
ROTATION_DEG_PER_FRAME = 3.0
OBJECT_PX_PER_FRAME = 4.0
OBJECT_RADIUS_PX = 15.0
LONGEST_SIDE_PX = 768
SCALE_RANGE = (0.5, 1.0)
"""Pixels of the photograph per pixel of the clip."""

COLOUR_RGB = {
    "red": (0.87, 0.13, 0.12),
    "green": (0.10, 0.66, 0.22),
    "blue": (0.12, 0.28, 0.86),
    "yellow": (0.96, 0.83, 0.10),
}
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class MovingObject:
    """A shape that moves in a straight line; the start is its centre in pixels of the first frame."""

    shape: str
    colour: str
    direction: str
    start_x_px: float
    start_y_px: float

    @property
    def step_px(self) -> tuple[float, float]:
        """Displacement per frame (x, y) in pixels, y downwards."""
        x, y = _STEP[self.direction]
        return x * OBJECT_PX_PER_FRAME, y * OBJECT_PX_PER_FRAME


@dataclasses.dataclass(frozen=True)
class Clip:
    """All values that determine one clip."""

    motion: str
    centre_x_px: float
    centre_y_px: float
    scale: float
    moving_object: MovingObject | None = None

    @property
    def caption(self) -> str:
        return caption(self.motion, self.moving_object)


def caption(motion: str, moving_object: MovingObject | None = None) -> str:
    """The caption that wan-nano is trained with, e.g. `"the camera pans left, a red circle moves up"`."""
    text = CAMERA_MOTIONS[motion]
    if moving_object is not None:
        o = moving_object
        text += f", a {o.colour} {o.shape} moves {o.direction}"
    return text


@lru_cache(maxsize=32)
def photograph(name: str) -> np.ndarray:
    """A photograph of the scikit-image package: float32 `[H, W, 3]` in [0, 1], longest side at most 768."""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as picture:
        return prepare_photograph(picture)


def prepare_photograph(picture) -> np.ndarray:
    """RGB float32 `[H, W, 3]` in [0, 1] of a PIL image, shrunk so that the longest side is at most 768 pixels."""
    picture = picture.convert("RGB")
    shrink = LONGEST_SIDE_PX / max(picture.size)
    if shrink < 1:
        size = (round(picture.width * shrink), round(picture.height * shrink))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / 255.0


def camera_path(motion: str, frames: int = FRAMES) -> np.ndarray:
    """Position of the camera window, relative to the start, as affine maps.

    Returns:
        `[T, 2, 3]` float64: a point (x, y) of frame t, in pixels from the centre of the picture, lies at
        `A[t] @ (x, y, 1)` in the first frame's coordinates (before the clip's own scale and position).
    """
    t = np.arange(frames, dtype=np.float64)
    scale, angle = np.ones(frames), np.zeros(frames)
    pan = np.zeros((frames, 2))
    if motion.startswith("pan_"):
        pan = np.outer(t, _STEP[motion.removeprefix("pan_")]) * PAN_PX_PER_FRAME
    elif motion in ("zoom_in", "zoom_out"):
        sign = -1.0 if motion == "zoom_in" else 1.0
        scale = ZOOM_PER_CLIP ** (sign * t / (FRAMES - 1))
    elif motion in ("rotate_clockwise", "rotate_counterclockwise"):
        # y points down, so a positive angle turns the window clockwise.
        sign = 1.0 if motion == "rotate_clockwise" else -1.0
        angle = sign * np.deg2rad(ROTATION_DEG_PER_FRAME) * t
    elif motion != "still":
        raise KeyError(motion)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.stack(
        [np.stack([cos, -sin, pan[:, 0]], axis=-1), np.stack([sin, cos, pan[:, 1]], axis=-1)], axis=1
    )


def draw_clip(
    size_px: tuple[int, int],
    generator: np.random.Generator,
    *,
    motion: str | None = None,
    with_object: bool | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
    frames: int = FRAMES,
) -> Clip:
    """Draw a random clip whose camera stays inside a photograph of the given (height, width)."""
    motion = motion or str(generator.choice(list(CAMERA_MOTIONS)))
    path = camera_path(motion, frames)
    corners = np.array([[sx * width / 2, sy * height / 2, 1.0] for sx in (-1, 1) for sy in (-1, 1)])
    reach = np.einsum("tij,cj->tci", path, corners).reshape(-1, 2)
    low, high = reach.min(axis=0), reach.max(axis=0)
    available = np.array([size_px[1] - 1, size_px[0] - 1], dtype=np.float64)
    # The widest view of the clip limits the scale: zooming out must not pass the upper end of the range.
    widest = max(1.0, float(np.abs(path[:, 0, 0]).max()) if motion == "zoom_out" else 1.0)
    largest = min(SCALE_RANGE[1] / widest, float((available / (high - low)).min()))
    smallest = min(SCALE_RANGE[0] * (ZOOM_PER_CLIP if motion == "zoom_in" else 1.0), largest)
    scale = float(generator.uniform(smallest, largest))
    centre = [float(generator.uniform(-low[i] * scale, available[i] - high[i] * scale)) for i in (0, 1)]
    if with_object is None:
        with_object = bool(generator.random() < 0.5)
    moving_object = _draw_object(generator, height, width, frames) if with_object else None
    return Clip(motion, centre[0], centre[1], scale, moving_object)


def _draw_object(generator, height: int, width: int, frames: int) -> MovingObject:
    direction = str(generator.choice(DIRECTIONS))
    travel = OBJECT_PX_PER_FRAME * (frames - 1)
    span = []
    for axis, extent in enumerate((width, height)):
        low, high = OBJECT_RADIUS_PX + 2.0, extent - OBJECT_RADIUS_PX - 2.0
        move = _STEP[direction][axis] * travel
        span.append(float(generator.uniform(low - min(move, 0.0), high - max(move, 0.0))))
    return MovingObject(
        str(generator.choice(SHAPES)), str(generator.choice(COLOURS)), direction, span[0], span[1]
    )


def render(
    image: torch.Tensor, clips: list[Clip], *, height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES
) -> torch.Tensor:
    """Render clips of one photograph on the device of `image`.

    Args:
        image: photograph, `[3, H, W]` in [0, 1].
        clips: clips to render.

    Returns:
        `[B, 3, T, height, width]` float32 in [0, 1].
    """
    device = image.device
    paths = np.stack([camera_path(clip.motion, frames) for clip in clips])
    scale = np.array([clip.scale for clip in clips])[:, None, None, None]
    matrix = paths * scale
    matrix[..., 2] += np.array([[clip.centre_x_px, clip.centre_y_px] for clip in clips])[:, None]
    matrix = torch.as_tensor(matrix, dtype=torch.float32, device=device)  # [B, T, 2, 3]
    y, x = torch.meshgrid(
        torch.arange(height, device=device) - (height - 1) / 2,
        torch.arange(width, device=device) - (width - 1) / 2,
        indexing="ij",
    )
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [h, w, 3]
    source = torch.einsum("btij,hwj->bthwi", matrix, points)
    extent = torch.tensor([image.shape[2] - 1, image.shape[1] - 1], device=device)
    grid = (source / extent * 2 - 1).flatten(0, 1)
    picture = image[None].float().expand(len(grid), -1, -1, -1)
    video = F.grid_sample(picture, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
    video = video.clamp(0, 1).unflatten(0, (len(clips), frames)).transpose(1, 2)
    return _overlay_objects(video, [clip.moving_object for clip in clips])


def outline_distance(shape: str, dx, dy, xp):
    """Signed distance in pixels to the outline of a shape, negative inside, for offsets from its centre.

    `xp` is the array module of the offsets, `torch` or `numpy`.
    """
    if shape == "circle":
        return xp.hypot(dx, dy) - OBJECT_RADIUS_PX
    if shape == "square":
        return xp.maximum(abs(dx), abs(dy)) - OBJECT_RADIUS_PX * 0.9
    # A triangle, apex up: two slanted sides and a base, each a half-plane.
    side = abs(dx) * (math.sqrt(3) / 2) - (dy + OBJECT_RADIUS_PX) * 0.5
    return xp.maximum(side, dy - OBJECT_RADIUS_PX * 0.8)


def _overlay_objects(video: torch.Tensor, objects: list[MovingObject | None]) -> torch.Tensor:
    chosen = [i for i, moving_object in enumerate(objects) if moving_object is not None]
    if not chosen:
        return video
    _, _, frames, height, width = video.shape
    device = video.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device).float(), torch.arange(width, device=device).float(), indexing="ij"
    )
    t = torch.arange(frames, device=device).view(-1, 1, 1).float()
    for i in chosen:
        o = objects[i]
        dx, dy = x - (o.start_x_px + o.step_px[0] * t), y - (o.start_y_px + o.step_px[1] * t)
        distance = outline_distance(o.shape, dx, dy, torch)
        # One pixel of linear coverage at the edge is the antialiasing.
        alpha = (0.5 - distance).clamp(0, 1)
        colour = torch.tensor(COLOUR_RGB[o.colour], device=device).view(3, 1, 1, 1)
        video[i] = video[i] * (1 - alpha) + colour * alpha
    return video
