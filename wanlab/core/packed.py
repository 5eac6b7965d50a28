"""The bytes of a file that may be packed (gzip, or one file in a zip), limited in size, and their text as UTF-8."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from wanlab.core import limits
from wanlab.core.errors import WanlabError, first_line

MIB = 1 << 20
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError)  # damaged, unknown method, encrypted
SUSPECT = 256 * MIB
"""Size above which the ratio of unpacked to packed bytes is limited too: JSON packs to a tenth, a bomb to a thousandth."""


def read_unpacked(path: str | os.PathLike, limit: str = "trace_mib") -> bytes:
    """The content of a plain file, a gzip file, or of the only JSON file in a zip.

    Args:
        limit: name of the limit on the unpacked size, in `core.limits`.

    Raises:
        WanlabError: unreadable, empty, damaged or too large file, or a zip with no or several JSON files.
    """
    path = Path(path)
    try:
        limits.check(limit, path.stat().st_size / MIB, str(path))
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise WanlabError(f"cannot read {path}: {reason}") from error
    if not raw:
        raise WanlabError(f"{path} is empty; was the profiler stopped before it wrote?")
    try:
        return _unpack(raw, str(path), limit)
    except (EOFError, OSError, ValueError, zlib.error, *_ZIP_ERRORS) as error:
        raise WanlabError(f"{path} is cut off or damaged ({first_line(error)}); copy it again") from error


def _unpack(raw: bytes, where: str, limit: str) -> bytes:
    if raw[:4] == ZIP:
        raw = _from_zip(raw, where, limit)
    return _joined(_gunzip(raw), len(raw), where, limit) if raw[:2] == GZIP else raw


def _gunzip(raw: bytes) -> Iterator[bytes]:
    """Parts of a gzip file of one or several members; zero bytes after the last are padding."""
    rest: bytes = raw
    while rest.strip(b"\0"):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            part = member.decompress(rest, MIB)
            if not part and not member.eof and not member.unconsumed_tail:
                raise EOFError("the end of the compressed data is missing")
            rest = member.unconsumed_tail
            yield part
        rest = member.unused_data


def _from_zip(raw: bytes, where: str, limit: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = [name for name in archive.namelist() if _is_json(name)]
        if len(names) != 1:
            listed = ", ".join(names[:5]) or ", ".join(archive.namelist()[:5]) or "nothing"
            raise WanlabError(
                f"{where} is to hold one .json or .json.gz, not {len(names)}: {listed}; unpack it and name one"
            )
        size = archive.getinfo(names[0]).compress_size
        with archive.open(names[0]) as file:
            return _joined(iter(lambda: file.read(MIB), b""), size, where, limit)


def _is_json(name: str) -> bool:
    path = PurePosixPath(name)  # macOS adds __MACOSX/._<name>
    return not path.name.startswith("._") and path.name.lower().endswith((".json", ".json.gz"))


def _joined(parts: Iterator[bytes], packed: int, where: str, limit: str) -> bytes:
    """The parts together, unless their size, or from `SUSPECT` on its ratio to the packed size, is over its limit."""
    data = bytearray()
    for part in parts:
        data += part
        limits.check(limit, len(data) / MIB, f"{where}, unpacked")
        if len(data) > SUSPECT:
            ratio = len(data) / max(packed, 1)
            limits.check("packed_ratio", ratio, f"{where} unpacks to many times its size")
    return bytes(data)


def as_utf8(data: bytes, note: Callable[[str], None] = lambda text: None) -> bytes:
    """Text of a JSON file in UTF-8 without a byte order mark: from UTF-8, UTF-16, UTF-32, else from Latin-1.

    Args:
        note: is told where the text was read as Latin-1, because it is not of another encoding.
    """
    encoding = json.detect_encoding(data)
    if encoding == "utf-8" and data.isascii():
        return data
    try:
        return data.decode(encoding).encode("utf-8", "replace")
    except UnicodeDecodeError as error:
        note(f"byte {error.start} is not {encoding.removesuffix('-sig').upper()}: text is read as Latin-1")
        return data.decode("latin-1").encode()
