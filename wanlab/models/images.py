"""The image a video starts from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def first_frame(image: Image.Image | str | os.PathLike | np.ndarray, height: int, width: int) -> Image.Image:
    """An RGB image of exactly this size: scaled to cover it (Lanczos), then cropped in the middle.

    Args:
        image: PIL image, path, or array `[H, W, 3]`, uint8 or float in [0, 1].
        height, width: pixels.

    Raises:
        WanlabError: missing or unreadable file, or an array of another form.
    """
    from PIL import Image, ImageOps

    if isinstance(image, str | os.PathLike):
        image = _opened(image)
    elif not isinstance(image, Image.Image):
        image = _from_array(image)
    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def _opened(path: str | os.PathLike) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise WanlabError(f"no image {os.fspath(path)}; check the path") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise WanlabError(f"{os.fspath(path)} cannot be read as an image; give a PNG or JPEG") from error


def _from_array(array: np.ndarray) -> Image.Image:
    import numpy as np
    from PIL import Image

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
