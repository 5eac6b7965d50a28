"""File helpers: atomic writes, JSON, digests, and safe file names."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.core.text import read_json as read_json

_SIGNS = (
    (rb"version https://git-lfs", "a pointer of Git LFS in place of the file (`git lfs pull` fetches it)"),
    (rb"\s*<(!doctype html|html)", "an HTML page in place of the file"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "an SVG drawing"),
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC picture"),
    (rb"....ftyp", "an MP4 or MOV file"),
    (rb"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (rb"v/1\x01", "an OpenEXR picture"),
    (rb"#\?RADIANCE", "a Radiance HDR picture"),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF (of colours in float, or raw?)"),
    (rb"%PDF", "a PDF"),
    (rb"GGUF", "GGUF"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a zip or pickle file (of torch.save?)"),
)


def file_kind(path: str | os.PathLike) -> str:
    """What a file is by its first bytes, for the message when it is read as another: "a HEIC picture"; "" if not known."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {Path(path).readlink()}, which does not exist"
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except (OSError, ValueError):
        return ""
    if not start:
        return "empty"
    return next((kind for sign, kind in _SIGNS if re.match(sign, start, re.DOTALL | re.IGNORECASE)), "")


def now() -> str:
    """The current time in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # several may write to one disk


def _lives(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if os.name != "posix":  # where signal 0 is a signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        pass
    return True


@contextmanager
def atomic_path(path: str | os.PathLike, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary file name beside `path` to write to; at the end of the block the file is moved to `path`.

    For libraries that write a file themselves, and for data that is too large to hold twice: a reader sees the old file
    or the new one, never half of it. The folder is created. After an error the old file is unchanged and the temporary
    one is deleted; that of a process of this machine that was killed is deleted by the next writer of the file.

    Args:
        suffix: suffix of the temporary name, for libraries that choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.name[:60]}.{_MACHINE}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        with suppress(OSError, ValueError):
            if not _lives(int(left.name[len(start) :].partition("-")[0])):
                left.unlink()
    draft = path.with_name(f"{start}{os.getpid()}-{secrets.token_hex(6)}{suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes | memoryview) -> Path:
    """Write `data` so that a reader sees the old file or the new one, never half of it; the folder is created.

    Raises:
        OSError: the write failed; carries `path` as its file name. The old file is unchanged.
    """
    path = Path(path)
    try:
        with atomic_path(path) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise _named(error, path) from error
    return path


def move_into(folder: Path, items: Iterable[Path]) -> None:
    """Move files and folders into another folder of the same disk, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        os.replace(item, folder / item.name)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """`write_bytes` for text in UTF-8; lone surrogates are replaced, so that the file is not lost because of them."""
    return write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """`write_bytes` for indented JSON."""
    return write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Append one line of JSON; see `append_bytes`."""
    append_bytes(path, (json.dumps(plain(value), ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def append_bytes(path: Path, data: bytes) -> None:
    """Append with one write, so that a reader sees all of it, or an incomplete end while it is being written.

    Raises:
        OSError: the write failed; carries `path` as its file name. On a full disk the part that was written is removed.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size, written = os.fstat(handle).st_size, 0
            try:
                while written < len(data):  # a nearly full disk takes only a part
                    written += os.write(handle, data[written:])
            except BaseException:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise _named(error, path) from error


def why(error: OSError) -> str:
    """The reason of a failed write in one line: `no space left on device: outputs/...`."""
    reason = error.strerror or str(error)
    return f"{reason[:1].lower()}{reason[1:]}: {error.filename}" if error.filename else reason


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror or str(error), str(path))


def plain(value: Any) -> Any:
    """`value` as JSON types: NumPy and torch scalars, DataFrames, dataclasses and paths are converted.

    JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan", which `float` reads.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # DataFrame: one row per record
        return [plain(row) for row in value.to_dict(orient="records")]
    if hasattr(value, "row") and callable(value.row):  # timings and memory peaks have a row of their own
        return plain(value.row())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, torch tensors
        return plain(value.tolist())
    if hasattr(value, "item") and callable(value.item):
        return plain(value.item())
    return str(value)


def digest(parts: Iterable[str | bytes], length: int = 64) -> str:
    """SHA-256 over parts and their lengths, so that ("ab", "c") and ("a", "bc") differ."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "replace") if isinstance(part, str) else part
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()[:length]


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_name(name: Any) -> bool:
    """Whether a name is one short path part of letters and digits of any script and `. _ + -`."""
    return (
        isinstance(name, str)
        and name[:1].isalnum()
        and len(name.encode("utf-8", "replace")) <= 150  # file systems allow 255, and a suffix is added
        and ".." not in name
        and all(map(_of_a_name, name))
    )


def _of_a_name(character: str) -> bool:
    # Marks are parts of letters: accents of Latin, vowels of Devanagari.
    return character.isalnum() or character in "._+-" or unicodedata.category(character).startswith("M")


def file_name(text: str) -> str:
    """The most similar name that `is_name` allows: of a notebook `my notes (2)` it is `my-notes-2`."""
    letters = "".join(c if _of_a_name(c) else "-" for c in unicodedata.normalize("NFC", text))
    name = re.sub(r"\.\.+", ".", re.sub(r"-+", "-", letters)).strip("._+-")
    while len(name.encode()) > 150:
        name = name[:-1]
    return name if is_name(name) else digest([text], 8)


def checked_name(name: str, what: str = "name") -> str:
    """`name`, if it is a single path part; a name that could leave its folder is refused."""
    if not is_name(name):
        raise WanlabError(
            f"{what} {name!r} cannot be a file name: use letters, digits, and . _ + - (no '/', no '..')"
        )
    return name


def slug(text: str) -> str:
    """A readable file name made from any text."""
    name = re.sub(r"[^A-Za-z0-9_+-]+", "-", text).strip("-")[:60].lower()
    return name or digest([text], 8)
