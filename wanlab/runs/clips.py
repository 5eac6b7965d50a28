"""Clips side by side in one HTML fragment that contains the videos and plays them in step."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, slug
from wanlab.core.pictures import read_picture
from wanlab.evaluate.video import write_video

# For a notebook. The report removes it and has its own script, which also changes the speed.
PLAY_IN_STEP = """
(() => {
  const group = document.getElementById(ID), all = [...group.querySelectorAll("video")];
  const restart = () => all.every(v => v.ended) && all.forEach(v => { v.currentTime = 0; v.play(); });
  all.forEach(v => { v.loop = false; v.addEventListener("ended", restart); });
  group.addEventListener("click", () => {
    const paused = all.every(v => v.paused);
    all.forEach(v => paused ? v.play() : v.pause());
  });
})();
"""


class Html:
    """HTML for a notebook, with a short text for a terminal."""

    def __init__(self, html_text: str, text: str):
        self.html, self.text = html_text, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def sentence(text: str) -> Html:
    """A sentence in place of a figure or table."""
    return Html(f"<p>{html.escape(text)}</p>", text)


def side_by_side(items: Mapping[str, Any], folder: Path, fps: float | None = None) -> Html:
    """Labelled clips and pictures in one row.

    Args:
        items: label -> clip (a path, an object with `.video` or `.frames` and `.fps`, or an array [T, H, W, 3]) or picture
            (a path, a PIL image, or an array [H, W, 3]).
        folder: folder into which clips that are not files are written, as `<label>.mp4`.
        fps: frame rate of arrays.

    Raises:
        WanlabError: no item, a file that does not exist or is no picture, mp4 or webm, or an array without a frame rate.
    """
    if not items:
        raise WanlabError("show_videos needs at least one clip")
    cells = [_figure(label, item, folder, fps) for label, item in items.items()]
    group = "clips-" + digest(cells, 10)
    script = f"<script>{PLAY_IN_STEP.replace('ID', repr(group))}</script>"
    style = "display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;max-width:1100px"
    body = f'<div class="wl-clips" id="{group}" style="{style}">{"".join(cells)}</div>{script}'
    return Html(body, "clips side by side: " + ", ".join(items))


def _figure(label: str, item: Any, folder: Path, fps: float | None) -> str:
    caption = f'<figcaption style="font-size:90%;padding-top:4px">{html.escape(str(label))}</figcaption>'
    kind, data = _media(label, item, folder, fps)
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind.startswith("video/"):
        media = (
            f'<video src="{source}" autoplay loop muted playsinline style="width:100%;display:block"></video>'
        )
    else:
        words = html.escape(str(label), quote=True)
        media = f'<img src="{source}" alt="{words}" style="width:100%;display:block">'
    return f'<figure style="margin:0">{media}{caption}</figure>'


def _media(label: str, item: Any, folder: Path, fps: float | None) -> tuple[str, bytes]:
    if isinstance(item, str | Path):
        path = Path(item)
        kinds = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg"}
        if not path.is_file():
            raise WanlabError(f"show_videos: {path} is not a file; check the path")
        if kind := kinds.get(path.suffix.lower().replace(".jpeg", ".jpg")):
            return kind, path.read_bytes()
        return "image/png", _png(read_picture(path)[0])  # browsers do not show all that Pillow reads
    if hasattr(item, "save") and hasattr(item, "mode"):  # PIL image
        return "image/png", _png(item)
    frames = item
    if not hasattr(item, "batches"):  # a video that is read as it is encoded
        frames = getattr(item, "video", None)
        frames = getattr(item, "frames", item) if frames is None else frames
    if getattr(frames, "ndim", 0) == 3:
        return "image/png", _png(_image(frames))
    rate = getattr(item, "fps", fps)
    if rate is None:
        raise WanlabError(f"show_videos: give fps= for {label!r}, an array has no frame rate")
    path = folder / f"{slug(str(label))}.mp4"
    write_video(path, frames, rate)
    return "video/mp4", path.read_bytes()


def _image(frame: Any) -> Any:
    array = np.asarray(frame)
    if array.dtype != np.uint8:
        array = (np.clip(array, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Image.fromarray(array)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
