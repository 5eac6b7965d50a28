"""Procedural clips cut from photographs, so that the true video of every (image, caption) pair is known.

A virtual camera moves over a photograph: it stands still, pans, zooms or rotates, at one fixed speed per motion, with
up to three coloured shapes that move across the picture. The caption states the motion, and names the shapes from front
to back. What the caption does not state (photograph, position, scale, where a shape starts) is drawn from a seed and
visible in the first frame, so the caption and the first frame together determine the clip, except the parts that the
camera uncovers.

A clip has a size. At every size the picture's edge moves at the same speed in pixels per frame: a larger picture zooms
and turns by less per frame, and takes more frames for the same zoom (`natural_frames`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image

from wanlab.core.errors import WanlabError

HEIGHT, WIDTH, FRAMES, FPS = 128, 192, 17, 8
SMALL, LARGE = "small", "large"
SIZES = {SMALL: (HEIGHT, WIDTH, FRAMES), LARGE: (256, 384, 33)}
"""Height, width and frames of the sizes that have names."""

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
"""Over `natural_frames`, at every height."""
ROTATION_DEG_PER_FRAME = 3.0
"""At a height of 128 pixels; inversely proportional to the height."""
OBJECT_PX_PER_FRAME = 4.0
OBJECT_RADIUS_PX = 15.0
"""At a height of 128 pixels; proportional to the height."""
MOST_OBJECTS = 3
OBJECT_MARGIN_PX = 2.0
"""Least distance of a shape's radius from the edge of the picture, over the whole clip."""
CROSSING_SHARE = 0.7
"""Share of the clips with several shapes in which one is made to pass in front of another."""

LONGEST_SIDE_PX = 768
SCALE_RANGE = (0.5, 1.0)
"""Pixels of the photograph per pixel of the clip."""

COLOUR_RGB = {
    "red": (0.87, 0.13, 0.12),
    "green": (0.10, 0.66, 0.22),
    "blue": (0.12, 0.28, 0.86),
    "yellow": (0.96, 0.83, 0.10),
}
MOST_DRAWS, TRIES_PER_DRAW = 50, 64
"""Limits of the search for shapes that lie apart at first and overlap later."""

OVERLAP = 0.8
"""Two shapes overlap clearly where their centres are nearer than this part of the sum of their inner distances."""

_INNER = {"circle": 1.0, "square": 0.9, "triangle": 0.5}
"""Distance from the centre to the nearest point of an outline, in radii."""

_OUTER = {"circle": 1.0, "square": 1.28, "triangle": 1.32}
"""Distance from the centre to the farthest point of an outline, in radii."""

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
    """All values that determine one clip.

    `objects` stand from front to back, as the caption lists them: an earlier shape hides a later one. The height, in
    pixels, sets the camera's speed and the radius of shapes; width and frames are those that the clip was drawn for.
    """

    motion: str
    centre_x_px: float
    centre_y_px: float
    scale: float
    objects: tuple[MovingObject, ...] = ()
    height: int = HEIGHT
    width: int = WIDTH
    frames: int = FRAMES

    @property
    def caption(self) -> str:
        return caption(self.motion, self.objects)


def caption(motion: str, objects: Sequence[MovingObject] = ()) -> str:
    """The caption that wan-nano is trained with, e.g. `"the camera pans left, a red circle moves up"`.

    Shapes are listed from front to back.
    """
    shapes = (f"a {o.colour} {o.shape} moves {o.direction}" for o in objects)
    return ", ".join([CAMERA_MOTIONS[motion], *shapes])


def natural_frames(height: int) -> int:
    """Frames after which the camera has zoomed by `ZOOM_PER_CLIP`: 17 at 128 rows, 33 at 256 rows."""
    return round((FRAMES - 1) * height / HEIGHT) + 1


def object_radius(height: int) -> float:
    """Radius of shapes in a picture of this height, in pixels."""
    return OBJECT_RADIUS_PX * height / HEIGHT


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


def camera_path(motion: str, frames: int = FRAMES, height: int = HEIGHT) -> np.ndarray:
    """Position of the camera window, relative to the start, as affine maps.

    The path of fewer frames is the beginning of a longer one. The picture's edge moves at the same speed at every height.

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
        scale = ZOOM_PER_CLIP ** (sign * t / ((FRAMES - 1) * height / HEIGHT))
    elif motion in ("rotate_clockwise", "rotate_counterclockwise"):
        # y points down, so a positive angle turns the window clockwise.
        sign = 1.0 if motion == "rotate_clockwise" else -1.0
        angle = sign * np.deg2rad(ROTATION_DEG_PER_FRAME * HEIGHT / height) * t
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
    objects: int | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
    frames: int = FRAMES,
) -> Clip:
    """Draw a random clip whose camera stays inside a photograph of the given (height, width).

    Args:
        motion: the camera's motion; random where None.
        objects: number of shapes, 0 to 3; none or one at random where None. Several differ in colour and lie apart in
            the first frame; in most such clips one passes in front of another later.
        height, width, frames: size of the clip.

    Raises:
        WanlabError: shapes have no room to move in so small or so long a clip.
    """
    motion = motion or str(generator.choice(list(CAMERA_MOTIONS)))
    path = camera_path(motion, frames, height)
    corners = np.array([[sx * width / 2, sy * height / 2, 1.0] for sx in (-1, 1) for sy in (-1, 1)])
    reach = np.einsum("tij,cj->tci", path, corners).reshape(-1, 2)
    low, high = reach.min(axis=0), reach.max(axis=0)
    available = np.array([size_px[1] - 1, size_px[0] - 1], dtype=np.float64)
    # The widest view of the clip limits the scale: zooming out must not pass the upper end of the range.
    widest = max(1.0, float(np.abs(path[:, 0, 0]).max()) if motion == "zoom_out" else 1.0)
    largest = min(SCALE_RANGE[1] / widest, float((available / (high - low)).min()))
    smallest = min(SCALE_RANGE[0] * (ZOOM_PER_CLIP if motion == "zoom_in" else 1.0), largest)
    scale = float(generator.uniform(smallest, largest))
    # At the largest scale the ends of an axis may cross by a rounding.
    ends = [(-low[i] * scale, available[i] - high[i] * scale) for i in (0, 1)]
    centre = [float(generator.uniform(least, max(least, most))) for least, most in ends]
    if objects is None:
        objects = int(generator.random() < 0.5)
    drawn = _draw_objects(generator, objects, height, width, frames) if objects else ()
    return Clip(motion, centre[0], centre[1], scale, drawn, height, width, frames)


def _draw_objects(
    generator: np.random.Generator, count: int, height: int, width: int, frames: int
) -> tuple[MovingObject, ...]:
    lows, highs = _start_ranges(height, width, frames)
    directions = [i for i in range(len(DIRECTIONS)) if (lows[i] <= highs[i]).all()]
    if not directions:
        raise WanlabError(
            f"in {frames} frames of {height}x{width} shapes leave the picture; take fewer frames"
        )
    if count == 1:
        chosen = DIRECTIONS.index(str(generator.choice([DIRECTIONS[i] for i in directions])))
        x, y = (float(generator.uniform(lows[chosen][axis], highs[chosen][axis])) for axis in (0, 1))
        shape, colour = str(generator.choice(SHAPES)), str(generator.choice(COLOURS))
        return (MovingObject(shape, colour, DIRECTIONS[chosen], x, y),)
    shapes = [str(shape) for shape in generator.choice(SHAPES, count)]
    colours = [str(colour) for colour in generator.choice(COLOURS, count, replace=False)]
    crossing = bool(generator.random() < CROSSING_SHARE)
    for _ in range(MOST_DRAWS):
        tries = generator.choice(directions, (TRIES_PER_DRAW, count))
        starts = generator.uniform(lows[tries], highs[tries])  # [tries, count, 2]
        steps = np.array([_STEP[name] for name in DIRECTIONS])[tries] * OBJECT_PX_PER_FRAME
        fit = np.flatnonzero(_fit(shapes, starts, steps, crossing, height, frames))
        if len(fit):
            return tuple(
                MovingObject(shape, colour, DIRECTIONS[direction], float(x), float(y))
                for shape, colour, direction, (x, y) in zip(
                    shapes, colours, tries[fit[0]], starts[fit[0]], strict=True
                )
            )
    raise WanlabError(f"{count} shapes find no room in {frames} frames of {height}x{width}; draw fewer")


def _start_ranges(height: int, width: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest start (x, y) of a shape that stays in the picture, `[4, 2]` each, by direction."""
    travel, margin = OBJECT_PX_PER_FRAME * (frames - 1), object_radius(height) + OBJECT_MARGIN_PX
    moves = np.array([_STEP[name] for name in DIRECTIONS]) * travel
    return margin - np.minimum(moves, 0.0), np.array([width, height]) - margin - np.maximum(moves, 0.0)


def _fit(
    shapes: list[str], starts: np.ndarray, steps: np.ndarray, crossing: bool, height: int, frames: int
) -> np.ndarray:
    """Which tries `[N, count, 2]` keep all shapes apart in the first frame and, if asked, let two overlap later."""
    inner, outer = (
        object_radius(height) * np.array([radii[shape] for shape in shapes]) for radii in (_INNER, _OUTER)
    )
    t = np.arange(frames)[:, None, None, None]
    centres = starts + t * steps  # [T, N, count, 2]
    apart, overlap = np.ones(len(starts), bool), np.zeros(len(starts), bool)
    for i, j in itertools.combinations(range(len(shapes)), 2):
        distance = np.linalg.norm(centres[:, :, i] - centres[:, :, j], axis=-1)
        apart &= distance[0] > outer[i] + outer[j]
        overlap |= distance.min(axis=0) < OVERLAP * (inner[i] + inner[j])
    return apart & overlap if crossing else apart


def render(
    pictures: torch.Tensor | Sequence[torch.Tensor],
    clips: Sequence[Clip],
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> torch.Tensor:
    """Render clips on the device of their pictures, all at one size.

    Args:
        pictures: the photograph of all clips, or one photograph per clip, `[3, H, W]` in [0, 1] each.
        clips: clips to render.
        height, width, frames: size of the videos; that of the first clip where None. A smaller picture shows the middle
            of what the camera sees, fewer frames the beginning.

    Returns:
        `[B, 3, T, height, width]` float32 in [0, 1].

    Raises:
        ValueError: clips were drawn for pictures of different heights.
    """
    if len({clip.height for clip in clips}) > 1:
        raise ValueError("clips of different heights differ in speed and shapes; render each height alone")
    height, width, frames = height or clips[0].height, width or clips[0].width, frames or clips[0].frames
    images = [pictures] * len(clips) if isinstance(pictures, torch.Tensor) else list(pictures)
    device = images[0].device
    paths = np.stack([camera_path(clip.motion, frames, clip.height) for clip in clips])
    scale = np.array([clip.scale for clip in clips])[:, None, None, None]
    matrix = paths * scale
    matrix[..., 2] += np.array([[clip.centre_x_px, clip.centre_y_px] for clip in clips])[:, None]
    matrix = torch.as_tensor(matrix, dtype=torch.float32, device=device)  # [B, T, 2, 3]
    x, y = (torch.arange(extent, device=device) - (extent - 1) / 2 for extent in (width, height))
    # Not a matrix product: on a GPU that may round to TF32, which moves the camera by a part of a pixel.
    across, down, shift = matrix[..., None, None].unbind(dim=3)  # [B, T, 2, 1, 1]
    source = (torch.addcmul(across * x, down, y[:, None]) + shift).movedim(2, -1)  # [B, T, h, w, 2]
    extent = torch.tensor([[image.shape[2] - 1, image.shape[1] - 1] for image in images], device=device)
    grid = source / extent.view(-1, 1, 1, 1, 2) * 2 - 1
    parts, start = [], 0
    # Pictures differ in size: one call for each picture, with all of its clips.
    for _, same in itertools.groupby(images, key=id):
        end = start + len(list(same))
        rows = grid[start:end].flatten(0, 1)
        picture = images[start][None].float().expand(len(rows), -1, -1, -1)
        part = F.grid_sample(picture, rows, mode="bicubic", padding_mode="reflection", align_corners=True)
        parts.append(part.clamp(0, 1).unflatten(0, (end - start, frames)))
        start = end
    video = torch.cat(parts).transpose(1, 2)
    _draw_shapes(video, clips)
    return video


def outline_distance(shape: str, dx, dy, xp, radius: float = OBJECT_RADIUS_PX):
    """Signed distance in pixels to the outline of a shape, negative inside, for offsets from its centre.

    `xp` is the array module of the offsets, `torch` or `numpy`; `radius` is `object_radius` of the picture's height.
    """
    if shape == "circle":
        return xp.hypot(dx, dy) - radius
    if shape == "square":
        return xp.maximum(abs(dx), abs(dy)) - radius * 0.9
    # A triangle, apex up: two slanted sides and a base, each a half-plane.
    side = abs(dx) * (math.sqrt(3) / 2) - (dy + radius) * 0.5
    return xp.maximum(side, dy - radius * 0.8)


def _draw_shapes(video: torch.Tensor, clips: Sequence[Clip]) -> None:
    """Draw the shapes of clips into `[B, 3, T, H, W]`, from back to front: one step for each place in the order."""
    for place in reversed(range(max(len(clip.objects) for clip in clips))):
        rows = [i for i, clip in enumerate(clips) if len(clip.objects) > place]
        _draw_one_shape(video, rows, [clips[i].objects[place] for i in rows], clips[0].height)


def _draw_one_shape(
    video: torch.Tensor, rows: list[int], objects: list[MovingObject], picture_height: int
) -> None:
    """Draw one shape into each of some clips; only the pixels of a square around it are touched."""
    _, _, frames, height, width = video.shape
    device, radius = video.device, object_radius(picture_height)
    starts, steps, colours = (
        torch.tensor(values, dtype=torch.float32, device=device)
        for values in (
            [(o.start_x_px, o.start_y_px) for o in objects],
            [o.step_px for o in objects],
            [COLOUR_RGB[o.colour] for o in objects],
        )
    )
    t = torch.arange(frames, device=device)
    centres = starts[:, None] + steps[:, None] * t.view(-1, 1).float()  # [N, T, 2]
    reach = math.ceil(_OUTER["triangle"] * radius) + 1
    x, y = (
        _window(centres[..., axis], reach, extent) for axis, extent in enumerate((width, height))
    )  # [N, T, K]
    x, y = x[:, :, None, :], y[:, :, :, None]
    dx, dy = x - centres[..., 0, None, None], y - centres[..., 1, None, None]
    distances = torch.stack([outline_distance(shape, dx, dy, torch, radius) for shape in SHAPES])
    number = torch.arange(len(objects), device=device)
    kinds = torch.tensor([SHAPES.index(o.shape) for o in objects], device=device)
    # One pixel of linear coverage at the edge is the antialiasing.
    alpha = (0.5 - distances[kinds, number]).clamp(0, 1)[..., None]  # [N, T, Ky, Kx, 1]
    clip = torch.tensor(rows, device=device).view(-1, 1, 1, 1)
    frame = t.view(1, -1, 1, 1)
    behind = video[clip, :, frame, y, x]
    video[clip, :, frame, y, x] = behind * (1 - alpha) + colours[:, None, None, None] * alpha


def _window(centres: torch.Tensor, reach: int, extent: int) -> torch.Tensor:
    """Pixels around centres `[N, T]` that lie in the picture, `[N, T, K]`: K is the same for all."""
    size = min(2 * reach + 1, extent)
    start = (centres.round().long() - reach).clamp(0, extent - size)
    return start[..., None] + torch.arange(size, device=centres.device)
