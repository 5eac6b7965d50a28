"""Manifests: records beside files of what they were made from, so that files are reused only if nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
from msgspec.structs import replace

from wanlab import __version__
from wanlab.core.contents import content_digest
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import write_text
from wanlab.core.text import WRONG


class NoManifest(WanlabError):
    """There is no manifest: the files do not exist yet, or wanlab did not make them."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Record of what a file or a folder was made from, as JSON beside the file or in the folder.

    A subclass adds fields, and defines `KIND` (its name in messages), `FORMAT` (version of the form) and `AGAIN` (how to
    make the files again). Tuples, records and number keys are restored from the types of the fields.

    Attributes:
        path: path of the file or folder. Only its name is stored, so that both can be moved.
        facts: facts that the files depend on, by name. The files are out of date when one fact differs.
        wanlab_version: version of wanlab that made the files.
        cached: whether the files existed and were current. Not stored.
    """

    KIND: ClassVar[str] = "manifest"
    FORMAT: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "make it again"
    NONE: ClassVar[str] = (
        "{name} has no {kind} {file} beside it, so nothing says what it was made from; {again}"
    )
    NOT_KEPT: ClassVar[tuple[str, ...]] = ("cached",)

    path: str
    facts: dict[str, Any] = {}
    wanlab_version: str = __version__
    cached: bool = False

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """Path of the manifest of a file: `<path>.json`. Subclasses may use another."""
        return Path(f"{os.fspath(path)}.json")

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "facts", plain_facts(self.facts))

    @property
    def key(self) -> str:
        """SHA-256 of the facts."""
        return key_of(self.facts)

    def write(self) -> Path:
        """Write the manifest atomically; returns its path."""
        fields = msgspec.to_builtins(self, str_keys=True)
        stored = {name: value for name, value in fields.items() if name not in self.NOT_KEPT}
        stored["path"] = Path(self.path).name
        data = {"format": self.FORMAT, "sha256": _digest(stored), **stored}
        return write_text(self.file(self.path), json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The manifest of a file or folder.

        Raises:
            NoManifest: there is none.
            WanlabError: it is broken, was changed, or has the form of another version of wanlab. The message says how to
                make the files again.
        """
        file = cls.file(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "format" not in data:
                raise ValueError("it has no format number, as those of an older wanlab")
            if data.pop("format") != cls.FORMAT:
                raise WanlabError(f"{file} is of another wanlab; {cls.AGAIN}")
            if data.pop("sha256", None) != _digest(data):
                raise ValueError("it was changed after it was written")
            return msgspec.convert(data | {"path": os.fspath(path)}, cls, str_keys=True)
        except FileNotFoundError:
            words = {"name": Path(path).name, "path": path, "kind": cls.KIND, "file": file.name}
            raise NoManifest(cls.NONE.format(**words, again=cls.AGAIN)) from None
        except (OSError, *WRONG) as error:
            raise WanlabError(f"{file} cannot be read ({first_line(error)}); {cls.AGAIN}") from error

    @classmethod
    def find(cls, path: str | os.PathLike) -> Self | None:
        """The manifest of a file or folder; None if it is missing or cannot be read."""
        try:
            return cls.read(path)
        except WanlabError:
            return None

    @classmethod
    def current(cls, path: str | os.PathLike, facts: Mapping[str, Any]) -> tuple[Self | None, str]:
        """The manifest of files that are undamaged and not out of date; else None, and the reason as text.

        The reason is empty where there is no manifest.

        Args:
            facts: current values of the facts.
        """
        try:
            manifest = cls.read(path)
        except NoManifest:
            return None, ""
        except WanlabError:
            return None, f"the {cls.KIND} cannot be read"
        reason = manifest.changed(facts) or manifest.damage()
        return (None, reason) if reason else (replace(manifest, cached=True), "")

    def changed(self, facts: Mapping[str, Any]) -> str:
        """The first fact that differs, as text; empty when the files are not out of date."""
        return next(iter(differences(self.facts, facts)), "")

    def damage(self) -> str:
        """A short description of damage to the files; empty without damage. Subclasses define which files to check."""
        return ""


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they are after JSON: tuples become lists, other objects become text."""
    return json.loads(json.dumps(facts, default=str))


def key_of(facts: Any) -> str:
    """SHA-256 of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Facts that differ, as text: `"steps was 20, is 40"`; of a mapping only the first entry that differs."""
    before, now = plain_facts(before), plain_facts(now)
    words = []
    for name, value in now.items():
        was, part = before.get(name), ""
        if was == value:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            first = next(key for key in (*value, *was) if was.get(key) != value.get(key))
            was, value, part = was.get(first), value.get(first), f": {first}"
        words.append(f"{name.replace('_', ' ')}{part} was {_short(was)}, is {_short(value)}")
    return words


def file_damage(path: Path, sha256: str | None, size_bytes: int) -> str:
    """A short description of damage to a file; empty without damage.

    Args:
        sha256: digest of the file when it was written; None checks only the size.
        size_bytes: size of the file when it was written.
    """
    if not path.is_file():
        return f"{path.name} is gone"
    if path.stat().st_size != size_bytes:
        return f"{path.name} has {path.stat().st_size:,} bytes, it was written with {size_bytes:,}"
    if sha256 is not None and content_digest(path) != sha256:
        return f"{path.name} was changed"
    return ""


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
