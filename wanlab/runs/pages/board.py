"""What an index page knows: the runs of a folder in the order of their sweep, named, compared, with their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wanlab.errors import WanlabError
from wanlab.runs.files import read_json
from wanlab.runs.folder import RunFolder
from wanlab.runs.pages import columns as wanted
from wanlab.runs.pages.shell import WORDS, duration, shown
from wanlab.runs.store import load_runs

UNMEASURED = ("pending", "running")
FILES = (
    ".yaml",
    ".yml",
    ".ipynb",
    ".json",
    ".png",
    ".jpg",
    ".mp4",
)  # a value that names one is shown by its stem


@dataclass
class Entry:
    """One run as the page shows it; the paths are inside the folder, or None."""

    run_id: str
    label: str  # as the sweep calls it
    title: str  # short: values alone where they speak for themselves
    state: str
    baseline: bool = False
    repeat: int = 1
    machine: str | None = None  # "shared" or "alone"
    folder: Path | None = None
    where: str | None = None
    reason: str | None = None
    clips: dict[str, Path] = field(default_factory=dict)  # "video", "original", "truth"

    @property
    def failed(self) -> bool:
        return self.state not in ("finished", *UNMEASURED)


@dataclass
class Board:
    """All of it. `frame` has one row per entry, in the same order."""

    root: Path
    title: str
    sweep: dict[str, Any]
    entries: list[Entry]
    frame: Any
    axes: list[str]  # names of the varying parameters, "p.<name>"
    metrics: list[wanted.Column]
    problems: list[str]

    @property
    def measured(self) -> list[bool]:
        return [entry.state == "finished" for entry in self.entries]


def gather(folder: str | Path) -> Board:
    """Read a sweep's folder, or any folder of runs.

    Raises:
        WanlabError: no such folder, or no run in it.
    """
    root = Path(folder).resolve()
    frame = load_runs(root)
    problems: list[str] = []
    sweep = _sweep(root, problems)
    listed = [run for run in sweep.get("runs") or [] if isinstance(run, Mapping)]
    if not listed and frame.empty:
        raise WanlabError(f"no runs in {folder}; `wanlab run NOTEBOOK` or `wanlab sweep GRID` makes some")
    if listed:
        frame, others = _in_order(frame, listed, root)
        if others:
            lie = "1 more run lies" if others == 1 else f"{others} more runs lie"
            problems.append(f"{lie} in this folder, not part of the sweep")
    rows = frame.to_dict(orient="records")
    axes = [str(name) for name in sweep.get("axes") or []]
    varying = wanted.varied(frame, axes)
    titles = _titles(rows, listed, varying)
    baseline = sweep.get("baseline") if isinstance(sweep.get("baseline"), dict) else None
    entries = []
    for i, row in enumerate(rows):
        told = listed[i] if listed else {}
        entry = Entry(
            run_id=str(row["run_id"]),
            label=str(told.get("label") or titles[i]),
            title=titles[i],
            state=str(row["state"]),
            baseline=bool(baseline) and _fits(row, told, baseline),
            repeat=told.get("repeat") if isinstance(told.get("repeat"), int) else 1,
            machine=told.get("machine"),
            folder=Path(row["folder"]) if not wanted.missing(row["folder"]) else None,
            reason=None if wanted.missing(row["reason"]) else str(row["reason"]),
        )
        if entry.folder is not None:
            entry.clips = _clips(entry.folder, root)
            entry.where = _where(entry) if entry.failed else None
        entries.append(entry)
    show = sweep.get("show") if isinstance(sweep.get("show"), list) else None
    finished = frame[[entry.state == "finished" for entry in entries]]
    return Board(
        root,
        str(sweep.get("title") or sweep.get("name") or root.name),
        sweep,
        entries,
        frame,
        varying,
        wanted.metrics(finished, [str(name) for name in show] if show else None),
        problems,
    )


def verdict(board: Board) -> str:
    """One sentence: how many finished, how the others ended, where, and how long it took."""
    counts = Counter(entry.state for entry in board.entries)
    total, done = len(board.entries), counts.pop("finished", 0)
    head = f"{done} of {total} runs finished" if done != total else f"All {total} runs finished"
    if total == 1:
        head = "The run finished" if done else "The run did not finish"
    order = [state for state in WORDS if state in counts] + [state for state in counts if state not in WORDS]
    ends = ", ".join(f"{counts[state]} {WORDS.get(state, state)}" for state in order)
    seconds = board.sweep.get("seconds")
    whole = isinstance(seconds, int | float)
    took = duration(seconds if whole else float(board.frame["seconds"].sum()))
    where = machine(board)
    on = f" on {where}" if where else ""
    spent = f" in {took}{on}" if whole else f"{on}, {took} in all"
    return f"{head}{spent}{f'; {ends}' if ends else ''}."


def machine(board: Board) -> str:
    """The GPU or else the CPU of the runs; several are counted."""
    found = [
        str(gpu if not wanted.missing(gpu) else cpu)
        for gpu, cpu in zip(board.frame["gpu"], board.frame["cpu"], strict=True)
        if not (wanted.missing(gpu) and wanted.missing(cpu))
    ]
    kinds = list(dict.fromkeys(found))
    return " and ".join(kinds) if len(kinds) <= 2 else f"{len(kinds)} kinds of machine"


def href(path: Path | None, root: Path) -> str | None:
    """Relative address of a file that really lies inside `root`, else None; a link that leads out is none."""
    if path is None or not path.is_file() or not path.resolve().is_relative_to(root):
        return None
    # "./" first: a name with a colon would be read as a scheme.
    return "./" + quote(path.absolute().relative_to(root).as_posix())


def _sweep(root: Path, problems: list[str]) -> dict[str, Any]:
    path = root / "sweep.json"
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
        if isinstance(found, dict):
            return found
        problems.append(f"cannot read {path.name}: not a JSON object")
    except WanlabError as error:
        problems.append(str(error).replace(str(root) + "/", ""))
    return {}


def _in_order(frame: Any, listed: Sequence[Mapping], root: Path) -> tuple[Any, int]:
    """Rows in the order of the sweep, one for each of its runs, whether it has a folder or not; and how many others."""
    import pandas as pd

    have = {Path(folder).name: i for i, folder in enumerate(frame["folder"]) if Path(folder).parent == root}
    rows = []
    for run in listed:
        at = have.pop(str(run.get("run_id")), None)
        row = (
            frame.iloc[at].to_dict()
            if at is not None
            else {"run_id": run.get("run_id"), "state": run.get("state")}
        )
        if at is None and row["state"] not in WORDS:
            row["state"] = "pending"
        for name, value in (run.get("parameters") or {}).items():
            if wanted.missing(row.get(f"p.{name}")):
                row[f"p.{name}"] = tuple(value) if isinstance(value, list) else value
        rows.append(row)
    columns = [*frame.columns, *dict.fromkeys(key for row in rows for key in row if key not in frame.columns)]
    return pd.DataFrame(rows, columns=columns), len(frame) - (
        len(listed) - sum("folder" not in row for row in rows)
    )


def _titles(rows: Sequence[Mapping], listed: Sequence[Mapping], varying: Sequence[str]) -> list[str]:
    """A short name of each run; where two would be the same, the full one."""
    several = len({run.get("notebook") for run in listed} or {row.get("name") for row in rows}) > 1
    found, full = [], []
    for i, row in enumerate(rows):
        told = listed[i] if listed else {}
        if listed:
            values = dict(told.get("parameters") or {})
            owner = Path(str(told.get("notebook"))).stem
        else:
            values = {name[2:]: row[name] for name in varying if not wanted.missing(row.get(name))}
            owner = str(row.get("name"))
        repeat = told.get("repeat")
        words = [owner] if several or not values else []
        words += [_spoken(name, value) for name, value in list(values.items())[:5]]
        words += [f"#{repeat}"] if isinstance(repeat, int) and repeat > 1 else []
        found.append(" · ".join(words))
        full.append(str(told.get("label") or f"{found[-1]} · {str(row['run_id'])[:6]}"))
    twice = Counter(found)
    return [full[i] if twice[name] > 1 else name for i, name in enumerate(found)]


def _spoken(name: str, value: Any) -> str:
    text = shown(list(value) if isinstance(value, tuple) else value)
    if not isinstance(value, str):
        return f"{name}={text}"
    return Path(text).stem if text.lower().endswith(FILES) else text


def _fits(row: Mapping, told: Mapping, baseline: Mapping) -> bool:
    have = {**{k[2:]: v for k, v in row.items() if str(k).startswith("p.")}, **(told.get("parameters") or {})}
    return all(name in have and shown(have[name]) == shown(value) for name, value in baseline.items())


def _where(entry: Entry) -> str | None:
    try:
        return RunFolder(entry.folder).status().get("title")
    except (WanlabError, AttributeError):
        return None


def _clips(folder: Path, root: Path) -> dict[str, Path]:
    """The clip that a run made, and what it is read against."""
    have = {path.stem: path for path in sorted((folder / "artifacts").glob("*.mp4")) if href(path, root)}
    found = {name: have.pop(name) for name in ("video", "original", "truth") if name in have}
    if "video" not in found and have:
        found["video"] = next(iter(have.values()))
    return found
