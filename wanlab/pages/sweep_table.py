"""What a sweep page shows: runs in order, columns, baselines, clips, values for its script."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, plain
from wanlab.core.words import typed_value
from wanlab.pages.templates import WORDS, duration
from wanlab.plots.style import FORMAT_COLOURS, OTHERS, UNITS, colour, engine_colours
from wanlab.runs.compare import (
    SAME,
    THRESHOLD_PERCENT,
    baselines,
    has_parameters,
    ratio_to,
    resamples_of,
    times_better,
)
from wanlab.runs.folder import RunFolder
from wanlab.runs.results import (
    TIMED,
    MeasuredConfiguration,
    MeasuredConfigurations,
    RunRecord,
    better,
    frame_of,
    is_ratio,
    is_time,
    parameter_cells,
    pooled,
    read_runs,
    read_sweep,
    varied_parameters,
)
from wanlab.runs.same_work import differences

MAIN = 8  # metrics that a table shows without being asked


@dataclass(frozen=True)
class Column:
    """One column of runs, as people read it."""

    name: str  # as in `wanlab.load_runs`: "m.time_per_video_ms"
    title: str  # "time per video"
    unit: str = ""  # "ms"
    better: str | None = None  # "min" or "max", where one is
    about: str = ""  # latency, memory, load or quality
    low: str | None = None  # columns of its interval
    high: str | None = None

    @property
    def ratio(self) -> bool:
        """Whether a quotient of two values means anything: of times and bytes yes, of percentages and decibels no."""
        return self.better is not None and is_ratio(self.name)


# The most important first: (ending of the name, title, unit, what it is about).
KNOWN = (
    ("time_per_video_ms", "time per video", "ms", "latency"),
    ("p95_ms", "95th percentile", "ms", "latency"),
    ("peak_memory_gib", "peak memory", "GiB", "memory"),
    ("weights_gib", "weights", "GiB", "memory"),
    ("load_ms", "load time", "ms", "load"),
    ("quality_loss_percent", "quality loss", "%", "quality"),
    ("divergence_lpips", "divergence", "LPIPS", "quality"),
    ("psnr_db", "PSNR", "dB", "quality"),
    ("time_per_frame_ms", "time per frame", "ms", "latency"),
)
# Numbers that qualify other numbers: in the data, not in the table.
ASIDE = ("divergence_floor_lpips", "noise_percent", "cv_percent", "_low_percent", "_high_percent")
# Endings of names by which any other number is known to have a better and a worse direction.
ABOUT = (
    ("_ms", "latency"),
    ("_s", "latency"),
    ("_per_s", "latency"),
    ("_fps", "latency"),
    ("_gib", "memory"),
    ("_mib", "memory"),
    ("_bytes", "memory"),
    ("lpips", "quality"),
    ("loss_percent", "quality"),
    ("_db", "quality"),
    ("ssim", "quality"),
)


def describe(name: str, having: Sequence[str] = ()) -> Column:
    """Title, unit and direction of a column, by its name alone; `having` are the columns it stands among."""
    bare = name[2:] if name[:2] in ("p.", "m.") else name
    if name.startswith("p."):
        words, unit = _words(bare)
        return Column(name, words, unit)
    for ending, title, unit, about in KNOWN:
        if bare == ending or bare.endswith("." + ending):
            owner = bare[: -len(ending)].rstrip(".").replace("_", " ")
            title = f"{owner}: {title}" if owner else title
            return Column(name, title, unit, better(name), about, *_interval(name, having))
    words, unit = _words(bare)
    about = next((about for ending, about in ABOUT if bare.endswith(ending)), "")
    return Column(name, words, unit, better(name) if about else None, about, *_interval(name, having))


def metrics(frame: Any, show: Sequence[str] | None = None, results: Sequence[str] = ()) -> list[Column]:
    """Metric columns of the table, the most important first.

    Args:
        frame: as `wanlab.load_runs` gives it.
        show: names to show instead, with or without `m.`; those that no run recorded are left out.
        results: names of the numbers in the runs' results; where there are any, other recorded numbers are left out.
    """
    names = [name for name in frame.columns if name.startswith("m.") and _numbers(frame[name]) >= 1]
    if show:
        columns = [_column(each, names) for each in show]
        return [describe(name, list(frame.columns)) for name in dict.fromkeys(filter(None, columns))]
    names = [name for name in names if not name.endswith(ASIDE)]
    own = [name for name in names if name[2:] in results]
    described = [describe(name, list(frame.columns)) for name in own or names]
    ranks = [_rank(column) for column in described]
    order = sorted(range(len(described)), key=lambda i: (ranks[i], -_numbers(frame[described[i].name]), i))
    return [described[i] for i in order][:MAIN]


def _column(short_name: str, names: Sequence[str]) -> str | None:
    """The column of a short name: a number of the result before any other with this ending."""
    for name in (short_name, f"m.{short_name}"):
        if name in names:
            return name
    return next((name for name in names if name.endswith("." + short_name)), None)


def axes(frame: Any, columns: Sequence[Column]) -> list[Column]:
    """Columns that a frontier can be drawn over: a known direction, and numbers in at least two runs."""
    return [c for c in columns if c.better and _numbers(frame[c.name]) >= 2]


def default_axes(columns: Sequence[Column]) -> tuple[str, str] | None:
    """Latency against quality, else against memory, else the first two."""
    if len(columns) < 2:
        return None
    x = next((c for c in columns if c.about == "latency"), columns[0])
    others = [c for c in columns if c is not x]
    for about in ("quality", "memory", "load"):
        for column in others:
            if column.about == about:
                return x.name, column.name
    return x.name, others[0].name


def missing(value: Any) -> bool:
    """None and NaN, which is what pandas puts where a run has no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value: Any) -> float | None:
    """A measured value as a float; None for text, truth values and what is missing."""
    if isinstance(value, bool) or missing(value):
        return None
    try:
        return float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        return None


def _numbers(series: Any) -> int:
    return sum(value is not None and math.isfinite(value) for value in map(number, series))


def _rank(column: Column) -> int:
    bare = column.name.rsplit(".", 1)[-1]
    return next((i for i, row in enumerate(KNOWN) if row[0] == bare), len(KNOWN))


def _interval(name: str, having: Sequence[str]) -> tuple[str | None, str | None]:
    """`quality_loss_percent` has its interval in `quality_loss_low_percent` and `quality_loss_high_percent`."""
    stem, _, unit = name.rpartition("_")
    low, high = f"{stem}_low_{unit}", f"{stem}_high_{unit}"
    return (low, high) if low in having and high in having else (None, None)


def _words(name: str) -> tuple[str, str]:
    """A name as words and its unit: "peak_memory_gib" -> ("peak memory", "GiB")."""
    owner, _, last = name.rpartition(".")
    words = last.split("_")
    unit = ""
    if len(words) > 2 and words[-2:] == ["per", "s"]:
        words, unit = words[:-3] or words[:1], f"{words[-3]}/s"
    elif len(words) > 1 and words[-1] in UNITS:
        unit = UNITS[words.pop()]
    title = " ".join(words)
    return (f"{owner.replace('_', ' ').replace('.', ': ')}: {title}" if owner else title), unit


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
class RunRow:
    """One run as the page shows it; the paths are inside the folder, or None."""

    run_id: str
    label: str  # as the sweep calls it
    title: str  # short: values, with the parameter's name only where the value is no word
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
class SweepTable:
    """All runs of a page. `frame` and `records` have one row per entry, in the same order."""

    root: Path
    title: str
    sweep: dict[str, Any]
    entries: list[RunRow]
    records: list[RunRecord]
    frame: Any
    axes: list[str]  # names of the varying parameters, "p.<name>"
    metrics: list[Column]
    problems: list[str]

    @property
    def measured(self) -> list[bool]:
        return [entry.state == "finished" for entry in self.entries]

    @cached_property
    def configurations(self) -> MeasuredConfigurations:
        """The same runs with their repeats pooled, as `compare` takes them."""
        runs = [record for record, entry in zip(self.records, self.entries, strict=True) if entry.folder]
        return pooled(runs, self.sweep, str(self.root))


def gather(folder: str | Path) -> SweepTable:
    """Read a sweep's folder, or any folder of runs; each file of a run is opened once.

    Raises:
        WanlabError: no such folder, or no run in it.
    """
    root = Path(folder).resolve()
    records = sorted(read_runs(root), key=lambda run: str(run.row.get("started") or ""))
    problems: list[str] = []
    try:
        sweep = read_sweep(root)
    except WanlabError as error:
        sweep = {}
        problems.append(str(error).replace(str(root) + "/", ""))
    listed = [run for run in sweep.get("runs") or [] if isinstance(run, Mapping)]
    if not listed and not records:
        raise WanlabError(f"no runs in {folder}; `wanlab run NOTEBOOK` or `wanlab sweep GRID` makes some")
    if listed:
        count = len(records)
        records = _in_order(records, listed, root)
        if others := count - sum("folder" in run.row for run in records):
            lie = "1 more run lies" if others == 1 else f"{others} more runs lie"
            problems.append(f"{lie} in this folder, not part of the sweep")
    frame = frame_of(records)
    varying = varied_parameters(records, sweep)
    titles = _titles(records, listed, varying)
    baseline = sweep.get("baseline") if isinstance(sweep.get("baseline"), dict) else None
    entries = []
    for i, record in enumerate(records):
        line, row = listed[i] if listed else {}, record.row
        entry = RunRow(
            run_id=str(row["run_id"]),
            label=str(line.get("label") or titles[i]),
            title=titles[i],
            state=record.state,
            baseline=bool(baseline) and has_parameters(record.parameters, baseline),
            repeat=line.get("repeat") if isinstance(line.get("repeat"), int) else 1,
            machine=line.get("machine"),
            folder=Path(row["folder"]) if row.get("folder") else None,
            reason=str(row["reason"]) if row.get("reason") else None,
        )
        if entry.folder is not None:
            entry.clips = _clips(entry.folder, root)
            entry.where = _where(entry) if entry.failed else None
        entries.append(entry)
    show = sweep.get("show") if isinstance(sweep.get("show"), list) else None
    finished = frame[[entry.state == "finished" for entry in entries]]
    own = dict.fromkeys(name for run in records if run.result for name in run.result.row())
    return SweepTable(
        root,
        str(sweep.get("title") or sweep.get("name") or root.name),
        sweep,
        entries,
        records,
        frame,
        [f"p.{name}" for name in varying],
        metrics(finished, [str(name) for name in show] if show else None, list(own)),
        problems,
    )


def verdict(table: SweepTable) -> str:
    """One sentence: how many finished, how the others ended, where, and how long it took."""
    counts = Counter(entry.state for entry in table.entries)
    total, done = len(table.entries), counts.pop("finished", 0)
    head = f"{done} of {total} runs finished" if done != total else f"All {total} runs finished"
    if total == 1:
        head = "The run finished" if done else "The run did not finish"
    order = [state for state in WORDS if state in counts] + [state for state in counts if state not in WORDS]
    ends = ", ".join(f"{counts[state]} {WORDS.get(state, state)}" for state in order)
    seconds = table.sweep.get("seconds")
    whole = isinstance(seconds, int | float)
    took = duration(seconds if whole else float(table.frame["seconds"].sum()))
    where = machine(table)
    on = f" on {where}" if where else ""
    spent = f" in {took}{on}" if whole else f"{on}, {took} in all"
    return f"{head}{spent}{f'; {ends}' if ends else ''}."


def machine(table: SweepTable) -> str:
    """The GPU or else the CPU of the runs; several are counted."""
    names = [
        str(gpu if not missing(gpu) else cpu)
        for gpu, cpu in zip(table.frame["gpu"], table.frame["cpu"], strict=True)
        if not (missing(gpu) and missing(cpu))
    ]
    kinds = list(dict.fromkeys(names))
    return " and ".join(kinds) if len(kinds) <= 2 else f"{len(kinds)} kinds of machine"


def href(path: Path | None, root: Path) -> str | None:
    """Relative address of a file inside `root`, else None; a symbolic link that leads out of it has none."""
    if path is None or not path.is_file() or not path.resolve().is_relative_to(root):
        return None
    # "./" first: a name with a colon would be read as a scheme.
    return "./" + quote(path.absolute().relative_to(root).as_posix())


def _in_order(records: Sequence[RunRecord], listed: Sequence[Mapping], root: Path) -> list[RunRecord]:
    """Runs in the order of the sweep, one for each that it lists, whether it has a folder or not."""
    have = {run.folder.name: run for run in records if run.folder.parent == root}
    ordered = []
    for entry in listed:
        run = have.pop(str(entry.get("run_id")), None)
        if run is None:
            state = entry.get("state") if entry.get("state") in WORDS else "pending"
            parameters = dict(entry.get("parameters") or {})
            row = {"run_id": entry.get("run_id"), "state": state} | parameter_cells(parameters)
            run = RunRecord(row, {"parameters": parameters})
        ordered.append(run)
    return ordered


def _titles(records: Sequence[RunRecord], listed: Sequence[Mapping], varying: Sequence[str]) -> list[str]:
    """A short name of each run; where two would be the same, the full one."""
    notebooks = {run.get("notebook") for run in listed} or {run.row.get("name") for run in records}
    short, full = [], []
    for i, run in enumerate(records):
        line = listed[i] if listed else {}
        owner = Path(str(line.get("notebook"))).stem if listed else str(run.row.get("name"))
        values = {name: run.parameters[name] for name in varying if run.parameters.get(name) is not None}
        values = dict(line.get("parameters") or {}) if listed else values
        repeat = line.get("repeat")
        words = [owner] if len(notebooks) > 1 or not values else []
        words += [_value_text(name, value) for name, value in list(values.items())[:5]]
        words += [f"#{repeat}"] if isinstance(repeat, int) and repeat > 1 else []
        short.append(" · ".join(words))
        full.append(str(line.get("label") or f"{short[-1]} · {str(run.row['run_id'])[:6]}"))
    twice = Counter(short)
    return [full[i] if twice[name] > 1 else name for i, name in enumerate(short)]


def _value_text(name: str, value: Any) -> str:
    text = typed_value(value)
    if not isinstance(value, str):
        return f"{name}={text}"
    return Path(text).stem if text.lower().endswith(FILES) else text


def _where(entry: RunRow) -> str | None:
    try:
        return RunFolder(entry.folder).status().get("title")
    except (WanlabError, AttributeError):
        return None


def _clips(folder: Path, root: Path) -> dict[str, Path]:
    """The clip of a run, and the clips it is compared with."""
    have = {path.stem: path for path in sorted((folder / "artifacts").glob("*.mp4")) if href(path, root)}
    clips: dict[str, Path] = {name: have.pop(name) for name in ("video", "original", "truth") if name in have}
    if "video" not in clips and have:
        clips["video"] = next(iter(have.values()))
    return clips


@dataclass
class BesideBaseline:
    """A run beside its baseline.

    Attributes:
        baseline: the configuration that agrees with it on all axes that the sweep's baseline leaves open; None without one.
        other: fields in which its work or machine is not the baseline's; it has no ratio then.
        same: whether its time cannot be told from the baseline's.
    """

    baseline: MeasuredConfiguration | None = None
    other: tuple[str, ...] = ()
    same: bool = False


def beside_baselines(table: SweepTable) -> list[BesideBaseline]:
    """For each run of the page its baseline, by the rules of `wanlab compare`."""
    asked = table.sweep.get("baseline") or {}
    rows = table.configurations.rows
    left_open = [name[2:] for name in table.axes if name[2:] not in asked]

    def key(row: MeasuredConfiguration) -> tuple:
        return tuple(repr(row.parameters.get(name)) for name in left_open)

    candidates = [row for row in rows if asked and has_parameters(row.parameters, asked)]
    of_run: dict[Path, BesideBaseline] = {}
    for row, base in zip(rows, baselines(rows, candidates, key), strict=True):
        other = tuple(name for name, *_ in differences(row, base)) if base else ()
        by = next((name for name in TIMED if name in row.results), None)
        same = False
        if base and by and not other:
            ratio = ratio_to(base, row, by, THRESHOLD_PERCENT, resamples=resamples_of(len(rows)))
            same = ratio.verdict == SAME
        of_run |= {run.folder: BesideBaseline(base, other, same) for run in row.runs}
    return [of_run.get(entry.folder, BesideBaseline()) for entry in table.entries]


def mixed(table: SweepTable) -> list[str]:
    """Fields in which the runs that finished differ from one another."""
    done = [run for run, measured in zip(table.records, table.measured, strict=True) if measured]
    return list(dict.fromkeys(name for run in done[1:] for name, *_ in differences(run, done[0])))


def ratios(table: SweepTable, beside: Sequence[BesideBaseline]) -> dict[str, list[float | None]]:
    """Times better than its baseline for each metric and run; none for other work and for the baseline itself."""
    if not any(each.baseline for each in beside):
        return {}

    def times(column: Column, entry: RunRow, each: BesideBaseline, value: Any) -> float | None:
        if each.baseline is None or each.other or entry.baseline:
            return None
        ratio = times_better(column.name, number(value), each.baseline.results.get(column.name[2:]))
        return ratio if math.isfinite(ratio) else None

    return {
        column.name: [
            times(column, *row) for row in zip(table.entries, beside, table.frame[column.name], strict=True)
        ]
        for column in table.metrics
        if column.ratio
    }


def indistinguishable(table: SweepTable, beside: Sequence[BesideBaseline]) -> dict[str, list[bool]]:
    """Whether a ratio of times is one that cannot be told from noise."""
    return {column.name: [each.same for each in beside] for column in table.metrics if is_time(column.name)}


FEW = 12  # a parameter with more values is searched for, not picked from a list
ALWAYS = ("name", "notebook", "state", "reason", "started", "seconds", "gpu", "cpu", "wanlab", "verdict")


def columns_of(table: SweepTable, axes: list[Column]) -> list[dict[str, Any]]:
    """Columns of the table: what was varied, then what was measured; few values get a colour and a filter each."""
    several = len(set(table.frame["name"])) > 1
    named = (["name"] if several else []) + table.axes
    columns: list[dict[str, Any]] = []
    for name in named:
        column = Column("name", "notebook") if name == "name" else describe(name)
        values = list(dict.fromkeys(_text(v) for v in table.frame[name] if not missing(v)))
        few = values if len(values) <= FEW else None
        columns.append(
            {
                "key": name,
                "title": column.title,
                "unit": column.unit,
                "kind": "parameter",
                "few": few,
                "colours": _colours(values) if few else None,
            }
        )
    measured = {column.name for column in axes}
    for column in table.metrics:
        columns.append(
            {
                "key": column.name,
                "title": column.title,
                "unit": column.unit,
                "kind": "metric",
                "better": column.better,
                "about": column.about,
                "axis": column.name in measured,
                "low": column.low,
                "high": column.high,
                "signed": column.unit == "%" and column.about == "quality",
            }
        )
    return columns


def _colours(values: list[Any]) -> list[str]:
    """The colours of the engines or formats, where every value has its own; else the colours of `OTHERS` in turn."""
    known = engine_colours() | FORMAT_COLOURS
    own = [colour(str(value)) for value in values]
    if len(set(own)) == len(own) and all(
        any(word in known for word in (str(value), *_parts(str(value)))) for value in values
    ):
        return own
    return [OTHERS[i % len(OTHERS)] for i in range(len(values))]


def _parts(value: str) -> list[str]:
    return value.lower().replace("_", "-").replace(" ", "-").split("-")


def _text(value: Any) -> Any:
    """A cell for the page: numbers stay numbers, everything else is text."""
    if missing(value):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return plain(value)  # infinity has no number in JSON; the page reads "inf"
    return typed_value(list(value) if isinstance(value, tuple) else plain(value))


def table_of(table: SweepTable) -> dict[str, list[Any]]:
    """Every column, for the page and for its CSV."""
    names = [*ALWAYS, *(name for name in table.frame.columns if name[:2] in ("p.", "m."))]
    return {name: [_text(value) for value in table.frame[name]] for name in names}


BUDGET_CHARS = 8 * 2**20  # of base64, in one page


class ClipEmbedder:
    """Clips by the hash of their bytes; small ones are embedded, the page plays the others from their files.

    Attributes:
        inside: hash -> base64, embedded in the page.
        outside: files that the page plays from their relative address.
    """

    def __init__(self, root: Path, budget_chars: int = BUDGET_CHARS):
        self.root, self.left = root, budget_chars
        self.inside: dict[str, str] = {}
        self.outside: list[Path] = []

    def put(self, path: Path) -> dict[str, str]:
        """Where the page finds a clip: `{"clip": hash}` or `{"href": "./..."}`."""
        if 4 * path.stat().st_size / 3 <= self.left:
            data = path.read_bytes()
            name = digest([data], 16)
            if name not in self.inside:
                self.inside[name] = base64.b64encode(data).decode()
                self.left -= len(self.inside[name])
            return {"clip": name}
        self.outside.append(path)
        return {"href": href(path, self.root) or ""}
