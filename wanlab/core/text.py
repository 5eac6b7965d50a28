"""Reads text and JSON files of any origin: their encoding, their size and depth, and the byte at which they are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from wanlab.core import limits
from wanlab.core.errors import WanlabError, first_line

MIB = 2**20


def read_text(path: str | os.PathLike, limit: str = "text_mib") -> str:
    r"""The text of a file: UTF-8, or UTF-16 or UTF-32 that a byte order mark or its zero bytes show; line ends are `\n`.

    Raises:
        WanlabError: the file cannot be read, is over the limit of that name, or is of another encoding. The message names
            the file, the byte and the way to convert it.
    """
    return decode_text(read_bytes(path, limit), str(path))


def read_bytes(path: str | os.PathLike, limit: str) -> bytes:
    """The bytes of a file that is not over a limit. Raises as `read_text`."""
    path = Path(path)
    try:
        limits.check(limit, path.stat().st_size / MIB, str(path))
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise WanlabError(f"cannot read {path}: {reason}") from error


def decode_text(data: bytes, where: str) -> str:
    """Text from bytes, as `read_text`; messages begin with `where`."""
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte, name = data[error.start], encoding.removesuffix("-sig").upper()
        convert = "; save the file as UTF-8"
        if name == "UTF-8":
            convert += f" (if it is Latin-1: iconv -f latin1 -t utf-8, which makes {chr(byte)!r} of it)"
        raise WanlabError(f"{where}, byte {error.start}: 0x{byte:02x} is not {name}{convert}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file, in any encoding of `read_text`.

    Raises:
        WanlabError: the file is missing, unreadable, too large or too deep, or not JSON.
    """
    return parse_json(read_text(path, "json_mib"), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; messages begin with `where`. Raises as `read_json`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if "\n" in text.rstrip() else ""
        raise WanlabError(f"cannot read {where}{at}: not JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise WanlabError(f"cannot read {where}: {first_line(error)}") from None
    except RecursionError:
        raise WanlabError(f"cannot read {where}: lists and objects lie too deep inside one another") from None
    check_depth(value, where)
    if "\\ud" in text.lower():  # an escaped half of a surrogate pair is no text, and cannot be written again
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def check_depth(value: Any, where: str) -> None:
    """Refuse lists and maps that lie deeper inside one another than the limit `depth`."""
    most, depth = limits.limit("depth"), 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        if depth > most:
            limits.check("depth", depth, f"{where}: lists and maps inside one another")
        items = (item for node in level for item in (node.values() if isinstance(node, dict) else node))
        level = [item for item in items if isinstance(item, dict | list)]


WRONG = (msgspec.ValidationError, ValueError, OverflowError, RecursionError, SystemError)
"""What msgspec raises for values of another type; a `SystemError` for an integer that no float can hold."""


def convert(value: Any, kind: Any, where: str, strict: bool = True) -> Any:
    """A value from JSON as a msgspec record or another type; numbers may be text if not `strict`.

    Raises:
        WanlabError: a field is missing or of another type; the message begins with `where` and names the field.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except WRONG as error:
        reason, _, place = first_line(error.__cause__ or error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        raise WanlabError(f"cannot read {where}{f', {field}' if field else ''}: {reason}") from None
