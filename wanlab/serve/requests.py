"""Requests of anyone, checked before anything is spent: their size, fields, prompt, picture and the video they ask for.

A refusal is a `Refused`: one line that says what and how to mend it, with the code of HTTP.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from PIL import Image, UnidentifiedImageError

from wanlab.core.errors import CONTROL, WanlabError, did_you_mean, first_line
from wanlab.core.files import digest
from wanlab.core.limits import SEEDS
from wanlab.core.pictures import converted
from wanlab.models.inputs import first_frame
from wanlab.serve.settings import ModelFacts, ServiceSettings

FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE = "input_reference"
FIELDS = (
    *(
        "model",
        "prompt",
        "negative_prompt",
        "size",
        "seconds",
        "num_frames",
        "fps",
        "seed",
        "num_inference_steps",
    ),
    *("guidance_scale", "output_format", "deadline_s", "user", PICTURE),
)
"""Fields of a request: those of OpenAI's and SGLang's video API, and `output_format` and `deadline_s`."""
OUTPUTS = {"mp4": "video/mp4", "mkv": "video/x-matroska"}
MAX_KEY = 200


class Refused(Exception):
    """A request that is not accepted.

    Args:
        message: one line for the caller. status: code of HTTP. code: the reason as a word.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str = "invalid_request",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = CONTROL.sub("\N{REPLACEMENT CHARACTER}", message)[:500]
        self.status, self.code, self.headers = HTTPStatus(status), code, headers or {}


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request: what a worker makes. Sizes in pixels, `deadline_s` in seconds from its acceptance."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    seed: int
    output_format: str
    deadline_s: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is equal for requests that take the same time, and whose denoising can share calls from first to last."""
        return (self.width, self.height, self.frames, self.steps, self.guidance_scale > 1)

    def settings(self) -> dict[str, Any]:
        """Arguments of `Model.generate` besides the picture and the prompt."""
        names = ("negative_prompt", "width", "height", "frames", "steps", "guidance_scale", "seed")
        return {name: getattr(self, name) for name in names}


def json_fields(body: bytes) -> dict[str, Any]:
    """The fields of a JSON body.

    Raises:
        Refused: it is no JSON object, or one that is too deep or names a field twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Refused("the JSON names a field twice; name each once")
        return found

    def constant(name: str) -> float:
        raise Refused(f"the JSON holds {name}, which is no number of JSON")

    try:
        values = json.loads(body, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"the body is no JSON ({first_line(error, 100)}); send an object with a prompt"
        ) from error
    if not isinstance(values, dict):
        raise Refused("the body is JSON but no object; send an object with a prompt")
    return values


def read_request(
    fields: Mapping[str, Any], facts: ModelFacts, settings: ServiceSettings
) -> tuple[Order, bytes | None, str]:
    """The order, the picture cut to the video as PNG, and a digest of what was sent.

    Args:
        fields: field -> its value: JSON values, texts of a form, or the bytes of an uploaded picture.

    Raises:
        Refused: a field is unknown, missing, of a wrong type, or beyond a limit; a picture cannot be read.
    """
    for name in fields:
        if name not in FIELDS:
            raise Refused(
                f"unknown field {str(name)[:80]!r}{did_you_mean(str(name)[:80], FIELDS)}; there are {', '.join(FIELDS)}"
            )
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    model = given.get("model", facts.name)
    if model != facts.name:
        raise Refused(
            f"model {str(model)[:80]!r} is not served here; this service has {facts.name!r}",
            404,
            "model_not_found",
        )
    if "user" in given:
        _text(given, "user", 500)
    prompt = _text(given, "prompt", settings.max_prompt)
    if not prompt.strip():
        raise Refused("prompt is missing; say what happens in the video")
    width, height, frames = _size(given, facts, settings)
    order = Order(
        prompt=prompt,
        negative_prompt=_text(given, "negative_prompt", settings.max_prompt),
        width=width,
        height=height,
        frames=frames,
        steps=_whole(given, "num_inference_steps", facts.steps, facts.fewest_steps, settings.max_steps),
        guidance_scale=_number(given, "guidance_scale", facts.guidance_scale, 0.0, 100.0),
        seed=_whole(given, "seed", 0, 0, SEEDS[1] // 2),
        output_format=_choice(given, "output_format", tuple(OUTPUTS)),
        deadline_s=_number(given, "deadline_s", settings.deadline_s, 0.001, settings.deadline_s),
    )
    picture = given.get(PICTURE)
    if facts.needs and picture is None:
        raise Refused(
            f"{facts.name} makes a video from a picture; give {PICTURE}, a file of a form or a data URL"
        )
    if not facts.needs and picture is not None:
        raise Refused(f"{facts.name} makes a video from text and takes no {PICTURE}; leave it out")
    content = None if picture is None else _picture_bytes(picture)
    png = None if content is None else fitted_picture(content, width, height, settings.max_picture_pixels)
    sent = json.dumps(msgspec.to_builtins(order), sort_keys=True)
    return order, png, digest([sent, content or b""])


def fitted_picture(content: bytes, width: int, height: int, max_pixels: int) -> bytes:
    """A picture as the model's pipeline gets it, exactly as `Model.generate` cuts it, as PNG.

    Raises:
        Refused: it is none of the formats, states more pixels than are read, or is damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:  # of the header: nothing is unpacked yet
                raise Refused(
                    f"{PICTURE} states {picture.width}x{picture.height} pixels; {max_pixels:,} are read: make it smaller",
                    413,
                    "too_large",
                )
            image, _ = converted(picture, PICTURE)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(
            f"{PICTURE} states too many pixels; {max_pixels:,} are read: make it smaller", 413, "too_large"
        ) from error
    except UnidentifiedImageError as error:
        raise Refused(f"{PICTURE} is no picture in {', '.join(FORMATS)}; convert it") from error
    except WanlabError as error:
        raise Refused(str(error)) from error
    except Exception as error:  # what Pillow raises for damaged files is open-ended
        raise Refused(
            f"{PICTURE} cannot be read ({first_line(error, 80)}); send a complete PNG or JPEG"
        ) from error
    packed = io.BytesIO()
    first_frame(image, height, width).save(packed, "PNG", compress_level=1)
    return packed.getvalue()


def idempotency_key(value: str | None) -> str | None:
    """The key of a header.

    Raises:
        Refused: it is empty, too long, or has other than printable characters.
    """
    if value is None:
        return None
    if not 1 <= len(value) <= MAX_KEY or not value.isprintable():
        raise Refused(f"Idempotency-Key has {len(value)} characters; give 1 to {MAX_KEY} printable ones")
    return value


def _picture_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if set(value) != {"image_url"}:
            raise Refused(f"{PICTURE} as an object has one field, image_url, with a data URL")
        value = value["image_url"]
    if not isinstance(value, str):
        raise Refused(f"{PICTURE} must be a file of a form, or a data URL, not {type(value).__name__}")
    if value.startswith(("http://", "https://", "file:")):
        raise Refused(f"{PICTURE} is an address, which this service does not fetch; send the picture itself")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            f"{PICTURE} is no base64 ({first_line(error, 80)}); send data:image/png;base64,..."
        ) from error


def _size(given: Mapping[str, Any], facts: ModelFacts, settings: ServiceSettings) -> tuple[int, int, int]:
    width, height, frames = facts.sizes[0]
    if "size" in given:
        text = given["size"]
        parts = text.lower().split("x") if isinstance(text, str) else []
        if len(parts) != 2 or not all(
            part.isascii() and part.isdecimal() and len(part) <= 5 for part in parts
        ):
            raise Refused(f"size must be WIDTHxHEIGHT in pixels, as '{width}x{height}', not {_shown(text)}")
        width, height = map(int, parts)
        frames = next((size[2] for size in facts.sizes if size[:2] == (width, height)), frames)
    fps = _number(given, "fps", facts.fps, 0.0, 1000.0)
    if fps != facts.fps:
        raise Refused(f"{facts.name} makes {facts.fps} frames per second, not {fps:g}; leave fps out")
    if "num_frames" in given:
        frames = _whole(given, "num_frames", frames, 1, 100_000)
    elif "seconds" in given:
        count = _number(given, "seconds", 1.0, 0.0, 10_000.0) * facts.fps
        frames = max(0, round((count - 1) / facts.frame_step)) * facts.frame_step + 1
    if (width, height, frames) in facts.sizes:
        return width, height, frames
    served = ", ".join(f"{w}x{h} with {f} frames" for w, h, f in facts.sizes)
    if not facts.any_size:
        raise Refused(
            f"{width}x{height} with {frames} frames is not served; there is {served}", code="size_not_served"
        )
    step_h, step_w = facts.size_step
    if width < 1 or height < 1 or width % step_w or height % step_h or (frames - 1) % facts.frame_step:
        raise Refused(
            f"{width}x{height} with {frames} frames is not legal: multiples of {step_w} and {step_h} pixels, and"
            f" {facts.frame_step}k+1 frames are",
            code="size_not_served",
        )
    if width * height * frames > settings.max_pixels:
        raise Refused(
            f"{width}x{height} with {frames} frames is over the limit of {settings.max_pixels:,} pixels",
            413,
            "too_large",
        )
    return width, height, frames


def _text(given: Mapping[str, Any], name: str, most: int) -> str:
    value = given.get(name, "")
    if isinstance(value, bytes) or not isinstance(value, str):
        raise Refused(f"{name} must be text, not {type(value).__name__}")
    if len(value) > most:
        raise Refused(f"{name} has {len(value):,} characters; {most:,} are read", 413, "too_large")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{name} holds half of a surrogate pair at character {error.start}; send UTF-8"
        ) from error
    if "\0" in value:
        raise Refused(f"{name} holds a character of code 0; leave it out")
    return value


def _number(given: Mapping[str, Any], name: str, otherwise: float, least: float, most: float) -> float:
    value = given.get(name, otherwise)
    if isinstance(value, str):
        try:
            value = float(value) if len(value) <= 50 and "_" not in value else None
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{name} must be a number, not {_shown(given[name])}")
    if not (least <= value <= most and math.isfinite(value)):
        raise Refused(f"{name} must be from {least:g} to {most:g}, not {_shown(given.get(name))}")
    return float(value)


def _whole(given: Mapping[str, Any], name: str, otherwise: int, least: int, most: int) -> int:
    value = given.get(name, otherwise)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{name} must be a whole number, not {_shown(value)}")
    if not least <= value <= most:
        raise Refused(f"{name} must be from {least:,} to {most:,}, not {_shown(value)}")
    return value


def _choice(given: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = given.get(name, known[0])
    if value not in known:
        raise Refused(f"{name} must be {' or '.join(known)}, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return "a file"
    try:
        return repr(value)[:60]
    except ValueError:  # a number of more digits than Python writes
        return f"a number of {value.bit_length()} bits"
