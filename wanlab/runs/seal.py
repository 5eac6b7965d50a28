"""The seal of a finished run: digests of its files, by which a record that was changed after the run ended is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from msgspec.structs import replace

from wanlab.core.contents import content_digest, content_digests
from wanlab.core.errors import WanlabError
from wanlab.core.manifest import Manifest, NoManifest
from wanlab.runs.folder import RunFolder

FILES = ("run.json", "results.jsonl", "metrics.jsonl", "executed.ipynb")
FOLDERS = ("artifacts", "traces")


class Seal(Manifest, frozen=True, kw_only=True):
    """Digests of the files of a finished run, in `seal.json` of its folder.

    Attributes:
        files: name inside the folder -> SHA-256.
        report: SHA-256 of report.html, which can be rendered again; empty before it is written.
    """

    KIND: ClassVar[str] = "seal"
    AGAIN: ClassVar[str] = "run the notebook again"

    files: dict[str, str]
    report: str = ""

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        return Path(path) / "seal.json"

    def damage(self) -> str:
        """What was changed since the run ended: `"results.jsonl was changed"`; empty where nothing was."""
        now = _digests(Path(self.path))
        for name in (*self.files, *now):
            before, after = self.files.get(name), now.get(name)
            if before != after:
                how = "removed" if after is None else "added" if before is None else "changed"
                return f"{name} was {how}"
        report = RunFolder(Path(self.path)).report
        edited = self.report and report.is_file() and content_digest(report) != self.report
        return "report.html was changed" if edited else ""


def seal(folder: RunFolder) -> None:
    """Seal the files of a run, which nothing may change from now on."""
    Seal(path=str(folder.path), files=_digests(folder.path)).write()


def seal_report(folder: RunFolder) -> None:
    """Note a report that was rendered from sealed files; a run without a seal is left as it is."""
    if found := Seal.find(folder.path):
        replace(found, report=content_digest(folder.report)).write()


def broken(folder: RunFolder, record: Mapping[str, Any], report: bool = True) -> str:
    """Why the files of a finished run are not those that it ended with; empty where they are.

    A run of an older wanlab, whose record promises no seal, has none and is not checked.

    Args:
        record: run.json.
        report: whether report.html counts.
    """
    try:
        found = Seal.read(folder.path)
        damage = (found if report else replace(found, report="")).damage()
    except NoManifest:
        damage = "seal.json was removed" if record.get("sealed") else ""
    except (WanlabError, OSError):
        damage = "seal.json was changed"
    again = "`wanlab report` writes it again" if damage.startswith("report.html") else "run it again"
    return f"{damage} after the run ended; {again}" if damage else ""


def _digests(folder: Path) -> dict[str, str]:
    paths = list(_sealed(folder))
    names = (path.relative_to(folder).as_posix() for path in paths)
    return dict(zip(names, content_digests(paths), strict=True))


def _sealed(folder: Path) -> Iterator[Path]:
    yield from (path for name in FILES if (path := folder / name).is_file())
    for path in sorted(path for name in FOLDERS for path in (folder / name).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path
