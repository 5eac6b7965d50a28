"""`wanlab publish`: the pages of runs as a folder that any static server can serve."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.core.files import atomic_path, now, read_json, write_bytes, write_json, write_text
from wanlab.core.words import typed_value
from wanlab.pages import report, sweep_page, templates
from wanlab.pages.sweep_table import SweepTable, gather, missing

PLOTLY, INDEX, CSV = "plotly.min.js", "index.html", "runs.csv"
MARK = ".wanlab-published.json"
DATA = ("*.csv", "*.plotly.json")  # tables and figures that a notebook saved


def publish(folder: str | Path, to: str | Path, *, notebooks: bool = False) -> Path:
    """Write index.html, runs.csv, and of each run its report, clips and the data of its figures; returns index.html.

    A folder that an earlier call made is brought up to date: files that it wrote and that are gone are removed. Links
    are relative. Symbolic links that lead out of `folder` are left out.

    Args:
        folder: folder of a sweep, or any folder of runs.
        to: target folder; new, empty, or written by this function before.
        notebooks: whether executed.ipynb is copied too, which has all code and output.

    Raises:
        WanlabError: no runs, or `to` has other files or overlaps `folder`.
    """
    root, target = Path(folder).resolve(), Path(to).absolute()
    sweep_table = gather(root)
    earlier = _claim(target, root)
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

    names = {"report.html"} | ({"executed.ipynb"} if notebooks else set())
    for run in filter(None, (entry.folder for entry in sweep_table.entries)):
        if not (run / "report.html").exists() and run.resolve().is_relative_to(root):
            report.render(run)
    pages, sources = list(_tables(sweep_table)), list(_files(sweep_table, names))
    planned = {PLOTLY, *(source.relative_to(root).as_posix() for source in sources)}
    for page in pages:
        planned |= {(page.root.relative_to(root) / name).as_posix() for name in (INDEX, CSV)}
    _mark(target, {*earlier, *planned})  # first, so that a call that was killed can be made again

    for page in pages:
        where = page.root.relative_to(root)
        text, _ = sweep_page.page_of(page, lambda path: path.name in names)
        put((where / INDEX).as_posix(), text)
        put((where / CSV).as_posix(), runs_csv(page))
    for source in sources:
        name = source.relative_to(root).as_posix()
        if source.name == "report.html":
            text, shared = _with_shared_plotly(source.read_text("utf-8", "replace"), name.count("/"))
            put(name, text)
            if shared and PLOTLY not in written:
                put(PLOTLY, templates.plotly_script())
        else:
            written.append(name)
            _copy(source, target / name, target)
    for name in set(earlier) - set(written):
        _remove(target, name)
    _mark(target, written)
    return target / INDEX


def _with_shared_plotly(text: str, depth: int) -> tuple[str, bool]:
    """A report that loads plotly.js from one file for all reports, which saves 4.8 MB in each; whether it was changed."""
    inline, scripts = (
        f'<script id="plotly">{templates.plotly_script()}</script>',
        "script-src 'unsafe-inline'",
    )
    if inline not in text:
        return text, False
    shared = f'<script id="plotly" src="{"../" * depth}{PLOTLY}"></script>'
    return text.replace(inline, shared, 1).replace(scripts, f"{scripts} 'self'", 1), True


def runs_csv(sweep_table: SweepTable) -> str:
    """runs.csv: one row per run with all its parameters and numbers; text cannot start a formula."""
    out = io.StringIO()
    names = [n for n in sweep_table.frame.columns if n not in ("folder", "run_id", "state")]
    write = csv.writer(out)
    write.writerow(["label", "run_id", "state", "baseline", *map(_cell, names)])
    for entry, row in zip(sweep_table.entries, sweep_table.frame.to_dict(orient="records"), strict=True):
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
    text = typed_value(list(value) if isinstance(value, tuple) else value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _tables(sweep_table: SweepTable) -> Iterator[SweepTable]:
    """The folder's own page, and that of each sweep inside it."""
    yield sweep_table
    for path in sorted(sweep_table.root.glob("*/sweep.json")):
        if path.parent.is_symlink():
            continue
        try:
            yield gather(path.parent)
        except WanlabError:
            continue  # a sweep without runs


def _files(sweep_table: SweepTable, names: set[str]) -> Iterator[Path]:
    for entry in sweep_table.entries:
        if entry.folder is None:
            continue
        artifacts = entry.folder / "artifacts"
        paths = [entry.folder / name for name in sorted(names)]
        paths += entry.clips.values()
        paths += [path for pattern in DATA for path in sorted(artifacts.glob(pattern))]
        for path in paths:
            if path.is_file() and path.resolve().is_relative_to(sweep_table.root):
                yield path


def _claim(target: Path, root: Path) -> list[str]:
    """Check that `target` may be written; returns the files that an earlier call wrote there."""
    real = target.resolve()
    if real.is_relative_to(root) or root.is_relative_to(real):
        raise WanlabError(f"{target} and {root} overlap; publish to a folder outside the runs")
    if target.exists() and not target.is_dir():
        raise WanlabError(f"{target} is a file; name a folder")
    mark = target / MARK
    if mark.is_file():
        record = read_json(mark)
        files = record.get("files") if isinstance(record, dict) else None
        return [str(name) for name in files or []]
    if target.is_dir() and any(target.iterdir()):
        raise WanlabError(
            f"{target} has files that `wanlab publish` did not write; name a new folder, or empty it first"
        )
    return []


def _mark(target: Path, files: Iterable[str]) -> None:
    write_json(target / MARK, {"made_by": "wanlab publish", "when": now(), "files": sorted(files)})


def _copy(source: Path, to: Path, target: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.parent.resolve().is_relative_to(target.resolve()):
        raise WanlabError(f"{to.parent} leads out of {target}; remove that link")
    with atomic_path(to) as draft:
        shutil.copyfile(source, draft)


def _remove(target: Path, name: str) -> None:
    """Delete a file of an earlier call, and the folders that are empty after it."""
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
