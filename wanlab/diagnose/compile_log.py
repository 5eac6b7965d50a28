"""What torch.compile compiled: graph breaks and recompilations with their source lines, from the log of TORCH_TRACE.

`TORCH_TRACE=folder python program.py` makes PyTorch write its structured log (`torch._logging`, which tlparse reads too): a
line of JSON a record, the lines of its payload below it after a tab. Inductor names the range of a graph in a profile by the
key of the graph in its cache, which the log has: that joins a compilation to its kernels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core import limits
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.words import counted, time_text
from wanlab.diagnose.trace import NOTHING, Trace, inherit, launchers, levels, nest

RECORD = re.compile(r"[A-Z]\d{4} \S+ \d+ \S+:\d+\] (?P<json>\{.*\})\s*$")
BREAK = re.compile(r"Graph break in user code at (?P<source>.+:\d+)$", re.MULTILINE)
EXPLAINED = re.compile(r"^\s*Explanation: (?P<text>.+)$", re.MULTILINE)
HINT = re.compile(r"^\s*Hint: (?P<text>.+)$", re.MULTILINE)
GRAPH = re.compile(r"CompiledFxGraph (?P<key>\w+)")
MIB = 1 << 20
METRICS, BREAKS, AGAIN, CACHE = (
    "compilation_metrics",
    "dynamo_graph_break_reason",
    "recompile_reasons",
    "fx_graph_cache_",
)
WANTED = (*(f'"{name}"' for name in (METRICS, BREAKS, AGAIN)), f'"{CACHE}')
"""Text of the lines whose records are read; the others, which are most, are passed over."""
COMPILED = [
    "compile_id",
    "function",
    "source",
    "operators",
    "compile_s",
    "recompiled_because",
    "failed_because",
    "graph",
]
BROKEN = ["source", "reason", "hint", "compilations"]


@dataclass(frozen=True, eq=False)
class CompileLog:
    """What torch.compile did.

    Attributes:
        compilations: one row each, in their order: compile_id ("0/1": frame 0, its second compilation), function, source
            (file and line of the function), operators (in its graph), compile_s, recompiled_because (the guard that
            failed, "" of a first compilation), failed_because ("" where it did not fail), graph (key in Inductor's cache).
        breaks: source lines at which a graph ended, most compilations first: source, reason, hint, compilations.
    """

    compilations: pd.DataFrame
    breaks: pd.DataFrame

    @property
    def sentence(self) -> str:
        """What it comes to, for a reader of a report."""
        table = self.compilations
        again = int((table["recompiled_because"] != "").sum())
        failed = int((table["failed_because"] != "").sum())
        said = (
            f"torch.compile made {counted(len(table), 'compilation')}, in"
            f" {time_text(1e3 * table['compile_s'].sum())}; {again:,} of them again because a guard failed."
            f" Graphs break at {counted(len(self.breaks), 'source line')}."
        )
        return said + (
            f" {counted(failed, 'compilation')} failed and run{'s' * (failed == 1)} eagerly."
            if failed
            else ""
        )

    def table(self, trace: Trace) -> pd.DataFrame:
        """Everything in one table, for a report: what happened at which source line, and what it costs in a profile.

        Returns:
            what ("graph break", "compiled", "compiled again", "failed"), source, why, times (compilations that it happened
            in), compile_s, kernels and time_ms (in the trace, NaN where the graph does not run in it); breaks first.
        """
        breaks = self.breaks.assign(
            what="graph break", why=self.breaks["reason"], times=self.breaks["compilations"]
        )
        made = self.compilations.merge(graph_ranges(trace), on="graph", how="left")
        again, failed = made["recompiled_because"], made["failed_because"]
        made["what"] = np.select([failed != "", again != ""], ["failed", "compiled again"], "compiled")
        made["why"] = failed.where(failed != "", again)
        made = made.assign(times=1).sort_values("time_ms", ascending=False, kind="stable")
        columns = ["what", "source", "why", "times", "compile_s", "kernels", "time_ms"]
        return pd.concat([breaks.reindex(columns=columns), made[columns]], ignore_index=True)

    def kernels(self, trace: Trace) -> pd.DataFrame:
        """The work of every compiled graph in a profile of the same program.

        Returns:
            compile_id, function, source, calls, kernels, time_ms (of its kernels, on a CPU of its calls); most time first.
            Graphs that did not run in the trace are left out.
        """
        ranges = graph_ranges(trace)
        table = self.compilations.merge(ranges, on="graph")
        columns = ["compile_id", "function", "source", "calls", "kernels", "time_ms"]
        return table.sort_values("time_ms", ascending=False, kind="stable")[columns].reset_index(drop=True)


def graph_ranges(trace: Trace) -> pd.DataFrame:
    """Calls of Inductor's graphs in a trace: graph (its key), calls, kernels, time_ms."""
    host = trace.host
    codes = host["name"].cat.codes.to_numpy()
    found = [GRAPH.search(name) for name in host["name"].cat.categories]
    keys = np.array([match["key"] if match else "" for match in found] + [""], dtype=object)
    graph = keys[codes]
    is_range = graph != ""
    parents = nest(host)
    owner = inherit(np.where(is_range, np.arange(len(host)), NOTHING), parents, levels(parents))
    outermost = is_range & (np.append(owner, NOTHING)[parents] == NOTHING)
    calls = pd.Series(graph[outermost]).value_counts(sort=False)
    if trace.has_gpu:
        launch = launchers(host, trace.kernels)
        mine = np.append(owner, NOTHING)[launch]
        known = (launch != NOTHING) & (mine != NOTHING)
        spent = pd.DataFrame({"graph": graph[mine[known]], "us": trace.kernels["time_us"].to_numpy()[known]})
    else:
        spent = pd.DataFrame({"graph": graph[outermost], "us": host["time_us"].to_numpy()[outermost]})
    sums = spent.groupby("graph")["us"].agg(kernels="size", us="sum")
    table = pd.DataFrame({"calls": calls}).join(sums, how="left").fillna(0)
    kernels = table["kernels"].astype(int) if trace.has_gpu else 0
    return pd.DataFrame(
        {
            "graph": table.index.astype(object),
            "calls": table["calls"].to_numpy(),
            "kernels": kernels,
            "time_ms": table["us"].to_numpy() / 1e3,
        }
    ).reset_index(drop=True)


def read_compile_log(path: str | os.PathLike) -> CompileLog:
    """Read the log of a program that ran with `TORCH_TRACE=folder`.

    Args:
        path: the folder, of which all logs are read, or one log.

    Raises:
        WanlabError: no such file or folder, one without logs, or a file that is no such log.
    """
    path = Path(path)
    files = sorted(path.glob("*.log")) if path.is_dir() else [path]
    if not files:
        raise WanlabError(f"no log (.log) in {path}; run the program with TORCH_TRACE={path}")
    compiled, again, graphs, broken = {}, {}, {}, []
    for number, file in enumerate(files):
        for record, payload in _records(file):
            key = (number, _compile_id(record))
            artifact = str((record.get("artifact") or {}).get("name", ""))
            if isinstance(metrics := record.get(METRICS), dict):
                compiled[key] = metrics
            elif artifact == BREAKS:
                broken.append(_break(payload))
            elif artifact == AGAIN:
                again[key] = _reasons(payload)
            elif artifact.startswith(CACHE) and (found := re.search(r'"key": "(\w+)"', payload)):
                graphs[key] = found[1]
    rows = [
        _row(key[1], metrics, again.get(key, ""), graphs.get(key, "")) for key, metrics in compiled.items()
    ]
    breaks = pd.DataFrame(broken, columns=BROKEN[:3]).groupby("source", sort=False)
    table = breaks.agg(reason=("reason", "first"), hint=("hint", "first"), compilations=("reason", "size"))
    table = table.sort_values("compilations", ascending=False, kind="stable").reset_index()
    return CompileLog(pd.DataFrame(rows, columns=COMPILED), table[BROKEN])


def compiler_table(path: str | os.PathLike | None, trace: Trace) -> pd.DataFrame | None:
    """`CompileLog.table` of a log; None without a log."""
    return None if path is None else read_compile_log(path).table(trace)


def _records(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a log that are wanted, each with its payload."""
    try:
        limits.check("trace_mib", file.stat().st_size / MIB, str(file))
        with open(file, encoding="utf-8", errors="replace") as lines:
            yield from _wanted(file, lines)
    except OSError as error:
        raise WanlabError(f"cannot read {file}: {error.strerror or first_line(error)}") from error


def _wanted(file: Path, lines: Iterable[str]) -> Iterator[tuple[dict[str, Any], str]]:
    record: dict[str, Any] | None = None
    payload: list[str] = []
    sound = False
    for line in lines:
        if line.startswith("\t"):
            if record is not None:
                payload.append(line[1:])
            continue
        if record is not None:
            yield record, "".join(payload)
        record, payload = None, []
        match = RECORD.match(line)
        sound = sound or match is not None
        if match and any(text in line for text in WANTED):
            record = _json(match["json"])
    if record is not None:
        yield record, "".join(payload)
    if not sound:
        raise WanlabError(f"{file} is no log of torch.compile; run the program with TORCH_TRACE=FOLDER")


def _json(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _compile_id(record: dict[str, Any]) -> str:
    return f"{record.get('frame_id', '?')}/{record.get('frame_compile_id', '?')}"


def _row(compile_id: str, metrics: dict[str, Any], again: str, graph: str) -> dict[str, Any]:
    name, line = metrics.get("co_filename"), metrics.get("co_firstlineno")
    failed = str(metrics.get("fail_reason") or metrics.get("fail_type") or "")
    seconds, operators = metrics.get("entire_frame_compile_time_s"), metrics.get("graph_op_count")
    return {
        "compile_id": compile_id,
        "function": str(metrics.get("co_name") or ""),
        "source": source_text(f"{name}:{line}") if name else "",
        "operators": operators if isinstance(operators, int) else 0,
        "compile_s": float(seconds) if isinstance(seconds, int | float) else np.nan,
        "recompiled_because": again,
        "failed_because": _first(failed),
        "graph": graph,
    }


def _break(payload: str) -> tuple[str, str, str]:
    """Source line, reason and hint of a graph break."""
    where, why, hint = BREAK.search(payload), EXPLAINED.search(payload), HINT.search(payload)
    reason = why["text"] if why else _first(payload.partition("Graph Break Reason:")[2])
    return source_text(where["source"]) if where else "", reason, hint["text"] if hint else ""


def _reasons(payload: str) -> str:
    """The guard that failed for the newest of the earlier compilations: "tensor 'x' size mismatch ..."."""
    try:
        reasons = json.loads(payload)
    except ValueError:
        reasons = payload
    first = str(reasons[0]) if isinstance(reasons, list) and reasons else str(reasons)
    return re.sub(r"^\d+/\d+: ", "", _first(first))


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def source_text(source: str) -> str:
    """A file and line as a reader finds it: below the packages, or by its last two names."""
    parts = re.split(r"[\\/]", source)
    for packages in ("site-packages", "dist-packages"):
        if packages in parts:
            return "/".join(parts[parts.index(packages) + 1 :])
    return "/".join(parts[-2:])
