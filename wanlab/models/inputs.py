"""The inputs of a generation besides its prompt: pictures and clips, in the form that pipelines take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.pictures import converted, read_picture
from wanlab.models.families.base import PICTURE


def first_frame(image: Image.Image | str | os.PathLike | np.ndarray, height: int, width: int) -> Image.Image:
    """An RGB image of exactly this size: scaled to cover it (Lanczos), then cropped in the middle.

    Files and PIL images of every mode are converted as `wanlab.core.pictures` says.

    Args:
        image: PIL image, path, or array `[H, W, 3]`, uint8 or float in [0, 1].
        height, width: pixels.

    Raises:
        WanlabError: missing or unreadable file, or an array of another shape or dtype.
    """
    return first_frame_of(image, height, width)[0]


def first_frame_of(
    image: Image.Image | str | os.PathLike | np.ndarray, height: int, width: int
) -> tuple[Image.Image, str]:
    """`first_frame`, and what a reader of the video should know of the image; often nothing, `""`."""
    name, note = "the image", ""
    if isinstance(image, str | os.PathLike):
        name, (image, note) = os.fspath(image), read_picture(image)
    elif isinstance(image, Image.Image):
        image, note = converted(image, name)
    else:
        image = _from_array(image)
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return fitted, note and f"{name} {note}"


def _from_array(array: np.ndarray) -> Image.Image:
    values = np.asarray(array)
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise WanlabError(f"an image array must be [H, W, 3], not {list(values.shape)}")
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise WanlabError(f"an image array must be uint8, or float in [0, 1], not {values.dtype}")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise WanlabError("a float image array must lie in [0, 1]; divide by 255, or give uint8")
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def prepared(
    name: str, needed: Mapping[str, str], given: Mapping[str, Any], size: tuple[int, int, int]
) -> tuple[dict[str, Any], list[str]]:
    """The conditions of a generation as a pipeline takes them, and what a reader of the video should know of them.

    Args:
        name: name of the model.
        needed: argument of the pipeline -> PICTURE or CLIP, for what a generation needs.
        given: argument -> a picture as for `first_frame`, or the frames of a clip: an array `[T, H, W, 3]` or a list of
            pictures; None counts as not given.
        size: frames, height and width of the video. Pictures are cut to it; of a clip as many frames are taken.

    Raises:
        WanlabError: one is missing or not taken, a picture that cannot be read, or a clip that is too short.
    """
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in needed:
            takes = (
                f"it takes {', '.join(needed)}" if needed else f"give {key}=None: it makes a video from text"
            )
            raise WanlabError(f"{name} takes no {key}{did_you_mean(key, needed)}; {takes}")
    missing = [f"{key} ({kind})" for key, kind in needed.items() if key not in given]
    if missing:
        raise WanlabError(
            f"{name} makes a video from {' and '.join(f'{key} ({kind})' for key, kind in needed.items())};"
            f" give {' and '.join(missing)}: a picture is a PIL image, path or array, a clip an array [T, H, W, 3]"
        )
    frames, height, width = size
    values: dict[str, Any] = {}
    notes = []
    for key, kind in needed.items():
        if kind == PICTURE:
            values[key], note = first_frame_of(given[key], height, width)
            notes += [note] * bool(note)
            continue
        clip: Sequence[Any] = given[key]
        if isinstance(clip, str | os.PathLike) or len(clip) < frames:
            have = clip if isinstance(clip, str | os.PathLike) else f"{len(clip)} frames"
            raise WanlabError(f"{name}: {key} must be a clip of at least {frames} frames, not {have}")
        values[key] = [first_frame(frame, height, width) for frame in clip[:frames]]
    return values, notes
