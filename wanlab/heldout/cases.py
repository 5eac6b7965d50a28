"""Held-out test cases of wan-nano: photographs outside the training set, with the true clip known for every case.

Two sets are fixed in files. `selection` is for every choice: which layers, which format, which plan. `final` is for the
numbers that are reported once the choice is made; its photographs, order of captions and seeds are others, and code
that chooses refuses it (`for_selection`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.signal import fftconvolve
from skimage.color import rgb2gray
from skimage.registration import optical_flow_ilk

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.paths import data, existing
from wanlab.heldout import clips
from wanlab.heldout.clips import (
    CAMERA_MOTIONS,
    COLOUR_RGB,
    OBJECT_PX_PER_FRAME,
    OBJECT_RADIUS_PX,
    MovingObject,
    camera_path,
    outline_distance,
)
from wanlab.heldout.textures import texture

SMALLEST_TEXTURE = 0.01
"""Least mean absolute gradient of a first frame, in intensity per pixel; on flatter pictures motion cannot be measured."""

MOST_DRAWS = 200
"""Number of tries to draw a clip of one photograph whose first frame has enough texture."""

FOLDER = data("heldout")
FINAL_PHOTOGRAPHS = ("china.jpg", "flower.jpg", "grace_hopper.jpg")
"""Photographs of `data/heldout/photographs`, which no required package contains; only the set `final` shows them."""

SETS = {"selection": (7301, clips.HELD_OUT_PHOTOGRAPHS), "final": (9127, FINAL_PHOTOGRAPHS)}
"""Name of a fixed set -> the seed that it was drawn with, and its photographs."""

SET_SIZE = 72
TEXTURE = "texture:"
"""What the name of a texture begins with; its seed follows."""

EXAMINATION, SELECTION, FINAL = "examination", "selection", "final"


@dataclasses.dataclass(frozen=True)
class Case:
    """One test case: a photograph, a clip of it (which fixes the caption), and the seed of the noise.

    `purpose` is the set of the case: "selection", "final", or "examination" for cases that belong to no fixed set.
    """

    photograph: str
    clip: clips.Clip
    seed: int
    purpose: str = EXAMINATION

    @property
    def caption(self) -> str:
        return self.clip.caption

    def truth(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """The true video, float32 `[T, H, W, 3]` in [0, 1]; its first frame is the model's input.

        It has the clip's own size where None. A smaller size shows the middle of the clip, at the same scale.
        """
        return render_clip(self.photograph, self.clip, frames, height, width)


def render_clip(
    photograph: str,
    clip: clips.Clip,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """A clip of a photograph, float32 `[T, H, W, 3]` in [0, 1], of the clip's own size where None."""
    image = torch.from_numpy(picture(photograph)).permute(2, 0, 1)
    videos = clips.render(image, [clip], frames=frames, height=height, width=width)
    return videos[0].permute(1, 2, 3, 0).numpy()


@lru_cache(maxsize=8)
def picture(name: str) -> np.ndarray:
    """A photograph by name, from `data/heldout` or from the scikit-image package, as `clips.photograph`; or a texture.

    `texture:7` is the regular picture that `textures.texture` draws from the seed 7.

    Raises:
        WanlabError: a photograph of the final set is missing, or the seed of a texture is no number.
    """
    if name.startswith(TEXTURE):
        seed = name.removeprefix(TEXTURE)
        if not seed.isdecimal():
            raise WanlabError(f"{name!r} is no texture; name one by a number, such as {TEXTURE}7")
        return texture(np.random.default_rng(int(seed))).permute(1, 2, 0).numpy()
    if name not in FINAL_PHOTOGRAPHS:
        return clips.photograph(name)
    with Image.open(existing(FOLDER / "photographs" / name)) as opened:
        return clips.prepare_photograph(opened)


def is_held_out(photograph: str) -> bool:
    """Whether a photograph is used to judge quality, so that nothing may be trained or calibrated on it."""
    return any(photograph in photographs for _, photographs in SETS.values())


def draw_cases(
    count: int = 72, *, seed: int = 2026, photographs=clips.HELD_OUT_PHOTOGRAPHS, purpose: str = EXAMINATION
) -> list[Case]:
    """Cases that cycle through motions and photographs; every other round has a moving object.

    72 cases of three photographs show each motion about three times on each photograph, half of them with an object.
    """
    generator, cases, motions = np.random.default_rng(seed), [], list(CAMERA_MOTIONS)
    for i in range(count):
        motion, round_ = motions[i % len(motions)], i // len(motions)
        name = photographs[(i + round_) % len(photographs)]
        size = picture(name).shape[:2]
        for _ in range(MOST_DRAWS):
            clip = clips.draw_clip(size, generator, motion=motion, objects=round_ % 2)
            still = render_clip(name, dataclasses.replace(clip, motion="still", objects=()), 1)[0]
            if has_texture(still):
                break
        else:
            raise WanlabError(f"{name} is too flat for cases: no part of it shows how it moves; leave it out")
        cases.append(Case(name, clip, seed * 1000 + i, purpose))
    return cases


def draw_set(name: str) -> list[Case]:
    """Draw a fixed set again: the same cases as in its file, which a test checks.

    The order is shuffled, so that the first cases of a set already show several motions, photographs and objects.

    Raises:
        WanlabError: no such set.
    """
    seed, photographs = SETS[_set_name(name)]
    cases = draw_cases(SET_SIZE, seed=seed, photographs=photographs, purpose=name)
    return [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]


def load_cases(name: str, count: int | None = None) -> list[Case]:
    """The first `count` cases of a fixed set, from `data/heldout/<name>.json`; None takes all.

    Raises:
        WanlabError: no such set, more cases than it has, or a missing or damaged file.
    """
    path = existing(FOLDER / f"{_set_name(name)}.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
        cases = [_case(row, name) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise WanlabError(
            f"{path} holds no cases; make it again with wanlab.heldout.cases.write_sets"
        ) from error
    if count is not None and not 1 <= count <= len(cases):
        raise WanlabError(f"set {name} has {len(cases)} cases; ask for 1 to {len(cases)}, not {count}")
    return cases[:count]


def for_selection(cases: Iterable[Case]) -> list[Case]:
    """The same cases, after a check that they may be used for a choice: code that chooses a plan calls this first.

    Raises:
        WanlabError: a case belongs to the final set, or shows one of its photographs.
    """
    cases = list(cases)
    for case in cases:
        if case.purpose == FINAL or case.photograph in FINAL_PHOTOGRAPHS:
            raise WanlabError(
                f"{case.photograph} ({case.caption}) is of the final set, which nothing may be chosen by; take"
                ' wanlab.heldout.cases.load_cases("selection")'
            )
    return cases


def write_sets(folder: Path = FOLDER) -> list[Path]:
    """Write the files of the fixed sets; returns their paths."""
    paths = []
    for name, (seed, photographs) in SETS.items():
        cases = [dataclasses.asdict(case) | {"caption": case.caption} for case in draw_set(name)]
        for case in cases:
            del case["purpose"]
        content = {"set": name, "drawn_with_seed": seed, "photographs": list(photographs), "cases": cases}
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return paths


def _set_name(name: str) -> str:
    if name not in SETS:
        raise WanlabError(f"no held-out set {name!r}{did_you_mean(name, SETS)}; known: {', '.join(SETS)}")
    return name


def _case(row: dict, purpose: str) -> Case:
    values = dict(row["clip"])
    values["objects"] = tuple(clips.MovingObject(**each) for each in values["objects"])
    return Case(row["photograph"], clips.Clip(**values), row["seed"], purpose)


def example_case() -> Case:
    """The case of the demonstrations: the camera pans over a spoon beside a cup of coffee."""
    cases = draw_cases()
    return next(c for c in cases if (c.clip.motion, c.photograph) == ("pan_right", "coffee.png"))


def requests(cases: Iterable[Case], truths: Iterable[np.ndarray], **settings: Any) -> list[dict[str, Any]]:
    """Arguments of `Model.generate` that ask for the clips of some cases, one dict per case.

    Args:
        truths: the true video of each case, `[T, H, W, 3]`; its first frame is the model's input.
        settings: settings for all cases, such as frames and steps.
    """
    return [
        {"image": truth[0], "prompt": case.caption, "seed": case.seed} | settings
        for case, truth in zip(cases, truths, strict=True)
    ]


def has_texture(image: np.ndarray) -> bool:
    """Whether a picture `[H, W, 3]` in [0, 1] has enough texture to measure motion on it."""
    return _texture(image) >= SMALLEST_TEXTURE


def _texture(frame: np.ndarray) -> float:
    grey = frame.mean(axis=-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def follows_caption(video: np.ndarray, case: Case) -> bool:
    """Whether the camera, and the object if there is one, do what the caption says."""
    shown_motion, _ = camera_motion(video)
    if shown_motion != case.clip.motion:
        return False
    return all(object_follows_caption(video, each) for each in case.clip.objects)


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


def object_follows_caption(video: np.ndarray, moving_object: MovingObject) -> bool:
    """Whether the object moved in the caption's direction: at least half of the distance, within 45 degrees."""
    dx, dy = object_displacement(video, moving_object)
    step_x, step_y = moving_object.step_px
    along = (dx * step_x + dy * step_y) / OBJECT_PX_PER_FRAME
    across = abs(dx * step_y - dy * step_x) / OBJECT_PX_PER_FRAME
    return along >= 0.5 * OBJECT_PX_PER_FRAME * (len(video) - 1) and across <= along
