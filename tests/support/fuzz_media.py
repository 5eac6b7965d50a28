"""Readers of pictures and videos, with small files to mutate: each decodes all that a file holds."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from support.fuzz_traces import Parser
from wanlab import evaluate
from wanlab.core.pictures import read_picture


def picture(path: Path) -> object:
    return np.asarray(read_picture(path)[0]).mean()


def video(path: Path) -> object:
    found = evaluate.open_video(path)
    return sum(frames.mean() for frames in found.batches(2))


def _clip(frames: int = 4, height: int = 24, width: int = 32) -> np.ndarray:
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([(9 * x + 20 * t) % 256, (7 * y + x) % 256, 60 * t], -1).astype(np.uint8)


def _pictures() -> tuple[bytes, ...]:
    first = Image.fromarray(_clip()[0])
    alpha = first.copy()
    alpha.putalpha(first.convert("L"))
    grey = Image.fromarray(np.asarray(first.convert("L")).astype(np.uint16) * 257)
    forms = [(first, "PNG"), (first, "JPEG"), (first, "WEBP"), (first, "BMP"), (first.convert("P"), "GIF")]
    forms += [(alpha, "PNG"), (grey, "PNG"), (grey, "TIFF"), (first.convert("CMYK"), "TIFF")]
    return tuple(_saved(image, form) for image, form in forms)


def _animations() -> tuple[bytes, ...]:
    first, *others = map(Image.fromarray, _clip())
    return tuple(
        _saved(first, form, save_all=True, append_images=others, duration=40)
        for form in ("GIF", "PNG", "WEBP")
    )


def _saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _videos() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            evaluate.write_video(Path(folder) / name, _clip(), 8) for name in ("a.mp4", "a.mov", "a.mkv")
        ]
        paths.append(evaluate.write_video(Path(folder) / "b.mkv", _clip(), 8, lossless=True))
        return tuple(path.read_bytes() for path in paths)


PARSERS: dict[str, Parser] = {
    "picture": Parser(picture, _pictures(), ".png"),
    "animation": Parser(video, _animations(), ".gif"),
    "video": Parser(video, _videos(), ".mp4"),
}
