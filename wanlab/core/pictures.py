"""Pictures as their owner sees them: read from files, and converted from every mode of Pillow to 8-bit RGB.

Orientation (EXIF) is applied, a colour profile (ICC) is converted to sRGB, 16-bit and float values are scaled to 8 bits, and
transparent pixels are laid over `BACKGROUND`.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import file_kind
from wanlab.core.limits import limit, over

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white, as in a browser."""

FULL_SCALE = (255, 65535)
"""Largest values of 8-bit and 16-bit pictures."""

ROUNDING = 2
"""Levels by which the profiles of sRGB that are in use differ from one another."""

TRANSPARENT = "is transparent in places, which is laid over white"

OTHER_VIEWS = ("MPO", "ICO", "ICNS")
"""Formats of Pillow whose further pictures are the same in another size or from another lens."""

_SCALED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_COLOURS = np.stack(np.meshgrid(*[np.arange(0, 256, 17, np.uint8)] * 3), -1).reshape(16, 256, 3)
_PHOTOMETRIC, _PLANES, _BITS = 262, 284, 258  # numbers of TIFF tags
# What Pillow raises for damaged files.
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error),
)


def read_picture(path: str | os.PathLike) -> tuple[Image.Image, str]:
    """The first picture of a file as `converted` makes it: 8-bit RGB, and what a reader should know of the conversion.

    Raises:
        WanlabError: the file is missing, over the limit `picture_pixels`, damaged, or no picture.
    """
    with opened_picture(path) as picture:
        count = 1 if picture.format in OTHER_VIEWS else getattr(picture, "n_frames", 1)
        several = f"has {count} pictures, of which the first is read" if count > 1 else ""
        image, note = converted(picture, os.fspath(path))
        return image, " and ".join(filter(None, (several, note)))


@contextmanager
def opened_picture(path: str | os.PathLike, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """A file opened by Pillow, of a size within the limit; errors of decoding inside the block become one line.

    Args:
        formats: names of Pillow's formats that are tried; None tries all.

    Raises:
        WanlabError: as `read_picture`.
    """
    name = os.fspath(path)
    if os.path.exists(name) and not os.path.isfile(name):
        raise WanlabError(f"{name} is not a file; give one image")
    try:
        with _open(path, formats) as picture:
            yield picture
    except FileNotFoundError as error:
        raise WanlabError(f"no image {name}; check the path") from error
    except Image.DecompressionBombError as error:
        stated = int(re.findall(r"\d+", str(error))[0])  # "Image size (3600000000 pixels) exceeds limit ..."
        raise WanlabError(f"{name} states too many pixels: {over('picture_pixels', stated)}") from error
    except UnidentifiedImageError as error:
        kind = file_kind(name)
        words = f"is {kind} and cannot be" if kind else "cannot be"
        raise WanlabError(f"{name} {words} read as an image; give a PNG or JPEG") from error
    except _DAMAGE as error:
        raise WanlabError(
            f"{name} cannot be read as an image ({first_line(error, 120)}); give a complete PNG or JPEG"
        ) from error


def _open(path: str | os.PathLike, formats: tuple[str, ...] | None) -> Image.Image:
    """`Image.open` with our limit of pixels in place of Pillow's, and without its warnings of odd metadata."""
    # Pillow refuses twice this number. Some of its readers take the memory when they open a file.
    pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, int(limit("picture_pixels")) // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path, formats=formats)
    finally:
        Image.MAX_IMAGE_PIXELS = pillows


def converted(picture: Image.Image, name: str) -> tuple[Image.Image, str]:
    """A picture of any mode as 8-bit RGB, and what a reader should know of the conversion (often nothing, `""`).

    16-bit values are divided by 257. Float values are taken as 0 to 1, 0 to 255 or 0 to 65535, whichever is the smallest
    that holds them. Transparent pixels are laid over `BACKGROUND`.

    Raises:
        WanlabError: values that fit no scale, or that are not finite, or an arrangement that Pillow reads wrongly.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8:
        raise WanlabError(
            f"{name} has its colours in separate planes of {max(tags[_BITS])} bits, which Pillow reads wrongly; save it with"
            " 8 bits, or interleaved"
        )
    picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile")
    if picture.mode in _SCALED_MODES:
        image, note = _scaled(picture, name, profile, white_is_0=tags.get(_PHOTOMETRIC) == 0)
        clear = picture.info.get("transparency")
        if clear is None:
            return image, note
        alpha = Image.fromarray(np.where(np.asarray(picture) == clear, 0, 255).astype(np.uint8))
    elif not picture.has_transparency_data:
        return _srgb(picture, profile), ""
    else:
        layered = picture.convert("RGBA")
        alpha = layered.getchannel("A")
        image = _srgb(
            picture.convert("L") if picture.mode in ("L", "LA") else layered.convert("RGB"), profile
        )
    if alpha.getextrema()[0] == 255:
        return image, ""
    ground = Image.new("RGB", image.size, BACKGROUND)
    ground.paste(image, mask=alpha)
    return ground, TRANSPARENT


def _scaled(
    picture: Image.Image, name: str, profile: bytes | None, *, white_is_0: bool
) -> tuple[Image.Image, str]:
    """A grey picture of 16-bit, 32-bit or float values as RGB, and a note where its scale was guessed."""
    values = np.asarray(picture)
    if white_is_0 and picture.mode.startswith("I;16"):  # Pillow inverts those of 8 bits only
        values = 65535 - values
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= -1e-3):  # an extreme is NaN where a value is
        raise WanlabError(
            f"{name} has values from {low:g} to {high:g}; give an image with values of 0 or more"
        )
    if picture.mode != "F":
        scale = 65535 if high <= 65535 else 2**32 - 1 if high > 2**31 - 1 else 2**31 - 1
    elif high <= 1 + 1e-3:
        scale = 1
    else:
        scale = next((full for full in FULL_SCALE if full / 16 < high <= full), 0)
        if not scale:
            raise WanlabError(
                f"{name} has float values up to {high:g}, which are neither 0 to 1, 0 to 255 nor 0 to 65535; bring them"
                " to 0 to 1 (tone mapping), or save it with 8 or 16 bits"
            )
    note = f"has float values, taken as 0 to {scale}" if picture.mode == "F" and scale > 1 else ""
    grey = np.clip(values / scale, 0, 1) * 255
    if profile:  # by its curve, so that dark values keep their steps
        levels = np.arange(256, dtype=np.uint8)
        curve = np.asarray(_srgb(Image.fromarray(levels[None]), profile).convert("L"))[0]
        grey = np.interp(grey, levels, curve)
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB"), note


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture as RGB in sRGB; one without a profile, or with one that cannot be used, is taken as sRGB."""
    if picture.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if profile:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            base = picture if picture.mode in ("RGB", "L", "CMYK", "LAB") else picture.convert("RGB")
            if base.mode == "L":  # its optimised transform is some levels off in the dark
                exact = ImageCms.buildTransform(source, target, "L", "RGB", flags=ImageCms.Flags.NOOPTIMIZE)
                curve = ImageCms.applyTransform(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), exact)
                return Image.fromarray(np.asarray(curve)[0][np.asarray(base)])
            form = ImageCms.buildTransform(source, target, base.mode, "RGB")
            if base.mode != "RGB" or _changes(form):
                shown = ImageCms.applyTransform(base, form)
                return picture.convert("RGB") if shown is None else shown
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a profile of another colour space than the picture's, or a damaged one
    return picture.convert("RGB")


def _changes(form: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform to sRGB does more than round; the names of profiles do not tell ("Linear sRGB")."""
    shown = ImageCms.applyTransform(Image.fromarray(_COLOURS), form)
    return shown is not None and np.abs(np.asarray(shown) - _COLOURS.astype(np.int16)).max() > ROUNDING
