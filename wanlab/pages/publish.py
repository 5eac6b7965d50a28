"""`wanlab publish`: the pages of runs as a folder that any static server can serve, and nothing else of them."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.core.files import atomic_path, now, read_json, write_bytes, write_json, write_text
from wanlab.pages import report, sweep_page, templates
from wanlab.pages.sweep_table import SweepTable, gather, missing
from wanlab.pages.templates import shown

PLOTLY = "plotly.min.js"
MARK = ".wanlab-published.json"
DATA = ("*.csv", "*.plotly.json")  # tables and figures that a notebook saved


def publish(folder: str | Path, to: str | Path, *, notebooks: bool = False) -> Path:
    """Write index.html, runs.csv, and of each run its report, clips and the data of its figures; returns index.html.

    A folder that an earlier call made is brought up to date: files that it wrote and that are gone are removed. Links
    are relative. Symbolic links that lead out of `folder` are left out.

    Args:
        folder: a sweep's folder, or any folder of runs.
        to: where to; new, empty, or made by this function.
        notebooks: copy executed.ipynb too, which holds all code and output.

    Raises:
        WanlabError: no runs, or `to` holds something else or overlaps `folder`.
    """
    root, target = Path(folder).resolve(), Path(to).absolute()
    board = gather(root)
    before = _claim(target, root)
    written: list[str] = []

    def put(name: str, data: bytes | str) -> None:
        path = target / name
        if not path.parent.resolve().is_relative_to(target.resolve()):
            raise WanlabError(f"{path.parent} leads out of {to}; remove that link")
        if isinstance(data, str):
            write_text(path, data)
        else:
            write_bytes(path, data)
        written.append(name)

    wanted = {"report.html"} | ({"executed.ipynb"} if notebooks else set())
    for page in _boards(board):
        where = page.root.relative_to(root)
        text, _ = sweep_page.page_of(page, lambda path: path.name in wanted)
        put((where / "index.html").as_posix(), text)
        put((where / "runs.csv").as_posix(), table(page))
    for run in filter(None, (entry.folder for entry in board.entries)):
        if not (run / "report.html").exists() and run.resolve().is_relative_to(root):
            report.render(run)
    for source in _files(board, wanted):
        name = source.relative_to(root).as_posix()
        if source.name == "report.html":
            text, lighter = _lighter(source.read_text("utf-8", "replace"), name.count("/"))
            put(name, text)
            if lighter and PLOTLY not in written:
                put(PLOTLY, templates.plotly_script())
        else:
            written.append(name)
            _copy(source, target / name, target)
    for name in set(before) - set(written):
        _remove(target, name)
    write_json(target / MARK, {"made_by": "wanlab publish", "when": now(), "files": sorted(written)})
    return target / "index.html"


def _lighter(text: str, depth: int) -> tuple[str, bool]:
    """A report that takes plotly.js from one file for all reports: 4.8 MB less for each."""
    whole, scripts = f'<script id="plotly">{templates.plotly_script()}</script>', "script-src 'unsafe-inline'"
    if whole not in text:
        return text, False
    shared = f'<script id="plotly" src="{"../" * depth}{PLOTLY}"></script>'
    return text.replace(whole, shared, 1).replace(scripts, f"{scripts} 'self'", 1), True


def table(board: SweepTable) -> str:
    """runs.csv: one row per run with everything that was asked and measured; text cannot start a formula."""
    out = io.StringIO()
    names = [n for n in board.frame.columns if n not in ("folder", "run_id", "state")]
    write = csv.writer(out)
    write.writerow(["label", "run_id", "state", "baseline", *map(_cell, names)])
    for entry, row in zip(board.entries, board.frame.to_dict(orient="records"), strict=True):
        write.writerow(
            [
                _cell(entry.label),
                _cell(entry.run_id),
                entry.state,
                entry.baseline,
                *(_cell(row[name]) for name in names),
            ]
        )
    return out.getvalue()


def _cell(value: Any) -> Any:
    if missing(value) or value != value:  # NaT is not equal to itself
        return ""
    if isinstance(value, bool | int | float):
        return value
    text = shown(list(value) if isinstance(value, tuple) else value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _boards(board: SweepTable) -> Iterator[SweepTable]:
    """The folder's own page, and that of each sweep inside it."""
    yield board
    for path in sorted(board.root.glob("*/sweep.json")):
        if path.parent.is_symlink():
            continue
        try:
            yield gather(path.parent)
        except WanlabError:
            continue  # a sweep that has no runs yet


def _files(board: SweepTable, wanted: set[str]) -> Iterator[Path]:
    for entry in board.entries:
        if entry.folder is None:
            continue
        artifacts = entry.folder / "artifacts"
        found = [entry.folder / name for name in sorted(wanted)]
        found += entry.clips.values()
        found += [path for pattern in DATA for path in sorted(artifacts.glob(pattern))]
        for path in found:
            if path.is_file() and path.resolve().is_relative_to(board.root):
                yield path


def _claim(target: Path, root: Path) -> list[str]:
    """Make sure that `target` is ours to write; returns what an earlier call wrote there."""
    real = target.resolve()
    if real.is_relative_to(root) or root.is_relative_to(real):
        raise WanlabError(f"{target} and {root} lie in one another; publish to a folder outside of the runs")
    if target.exists() and not target.is_dir():
        raise WanlabError(f"{target} is a file; name a folder")
    mark = target / MARK
    if mark.is_file():
        record = read_json(mark)
        files = record.get("files") if isinstance(record, dict) else None
        return [str(name) for name in files or []]
    if target.is_dir() and any(target.iterdir()):
        raise WanlabError(
            f"{target} holds files that `wanlab publish` did not make; name a new folder, or empty it first"
        )
    return []


def _copy(source: Path, to: Path, target: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.parent.resolve().is_relative_to(target.resolve()):
        raise WanlabError(f"{to.parent} leads out of {target}; remove that link")
    with atomic_path(to) as draft:
        shutil.copyfile(source, draft)


def _remove(target: Path, name: str) -> None:
    """Delete a file of an earlier call, and folders that it leaves empty."""
    path = target / name
    if (
        ".." in Path(name).parts
        or Path(name).is_absolute()
        or not path.parent.resolve().is_relative_to(target.resolve())
    ):
        return
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == target or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()
