"""Reads a report of Nsight Systems, exported by `nsys export --type sqlite`, as the events that a trace file has.

Tables are those of the SQLite export schema in NVIDIA's Nsight Systems user guide; a table or column that a version or
a recording does not have counts as empty. Times are nanoseconds. Ranges are the push/pop ranges of NVTX's default domain:
they nest, as modules do. Inside `torch.autograd.profiler.emit_nvtx(record_shapes=True)` PyTorch writes its operators as
ranges, with their shapes.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from wanlab.core import limits
from wanlab.core.errors import WanlabError, first_line
from wanlab.diagnose.trace_file import NONE, Args, Device, Distributed, Event, Generation, TraceFile

MAGIC = b"SQLite format 3\0"
MIB = 1 << 20
PUSH_POP, START_END, DOMAIN = 59, 60, 75
"""ENUM_NSYS_EVENT_TYPE of NVTX events: nested ranges, ranges that need not nest, names of domains."""
OPERATOR = re.compile(
    r"(?P<name>\w+::[\w.]+)(?:, seq = \d+)?(?:, op_id = \d+)?(?:, sizes = (?P<sizes>\[.*?\]))?(?:, input_op_ids = .*)?"
)
"""An operator of PyTorch, as emit_nvtx names it (`getNvtxStr` in torch/csrc/profiler/util.cpp)."""
MARKED = re.compile(r"(?P<name>.+?)(?:, seq = \d+)?, op_id = \d+(?:, sizes = .*)?(?:, input_op_ids = .*)?")
"""A range of `record_function`, as emit_nvtx names it."""
VERSION = re.compile(r"_v\d+(_ptsz)?$")
"""End of the name of a call of CUDA: "cudaLaunchKernel_v7000"."""
COPIES = {
    1: "HtoD",
    2: "DtoH",
    3: "HtoA",
    4: "AtoH",
    5: "AtoA",
    6: "AtoD",
    7: "DtoA",
    8: "DtoD",
    9: "HtoH",
    10: "PtoP",
}
"""CUpti_ActivityMemcpyKind -> its word in the names of Kineto's copies."""
THREAD_BITS = (1 << 24) - 1
"""Of a globalTid; above them stands the process."""


def is_report(path: Path) -> bool:
    """Whether a file is an SQLite database."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_report(path: Path) -> TraceFile:
    """Read an exported report; copies and calls of CUDA have the names that Kineto gives them.

    Raises:
        WanlabError: a damaged or too large file, or a database that is no report of Nsight Systems.
    """
    limits.check("trace_mib", path.stat().st_size / MIB, str(path))
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            return _Report(path, connection).read()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise WanlabError(
            f"{path} is damaged, or no export of Nsight Systems ({first_line(error)}); export it again:"
            " nsys export --type sqlite REPORT.nsys-rep"
        ) from error


class _Report:
    """One database, opened for reading."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self.connection = path, connection
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self.tables = {str(name): self._columns(str(name)) for (name,) in names}
        self.processes: dict[Any, int] = {}
        self.notes: list[str] = []

    def _columns(self, table: str) -> set[str]:
        quoted = table.replace('"', '""')
        return {row[1] for row in self.connection.execute(f'PRAGMA table_info("{quoted}")')}

    def rows(self, table: str, *columns: str) -> Iterator[tuple]:
        """Columns of a table, None where it does not have one; no rows where there is no such table."""
        if table not in self.tables:
            return iter(())
        chosen = ", ".join(f'"{name}"' if name in self.tables[table] else "NULL" for name in columns)
        return iter(self.connection.execute(f'SELECT {chosen} FROM "{table}"'))

    def read(self) -> TraceFile:
        if not self.tables.keys() & {
            "CUPTI_ACTIVITY_KIND_KERNEL",
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            "NVTX_EVENTS",
        }:
            raise WanlabError(
                f"{self.path} has no kernels, calls of CUDA or ranges; record them: nsys profile --trace=cuda,nvtx, and"
                " export the report: nsys export --type sqlite REPORT.nsys-rep"
            )
        counted = [name for name in self.tables if name.startswith(("CUPTI_ACTIVITY_KIND_", "NVTX_EVENTS"))]
        most = sum(
            self.connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in counted
        )
        limits.check("json_objects", most, f"{self.path}: events")
        self.words = dict(self.rows("StringIds", "id", "value"))
        events = [*self._ranges(), *self._calls(), *self._kernels(), *self._copies()]
        if len(self.processes) > 1:
            self.notes.append(
                f"{len(self.processes)} processes in one report: what they did lies over one another"
            )
        return TraceFile(events, self._devices(), Distributed(), Generation(), None, 0, tuple(self.notes))

    def _process(self, identifier: Any) -> int:
        """Number of a process, from a globalPid or a globalTid: both have it above the bits of the thread."""
        whole = identifier & ~THREAD_BITS if isinstance(identifier, int) else identifier
        return self.processes.setdefault(whole, len(self.processes))

    def _linked(self, identifier: Any, correlation: Any) -> int:
        """A correlation id, which is told apart from that of another process."""
        return (
            (self._process(identifier) << 40) + correlation
            if isinstance(correlation, int) and correlation > 0
            else 0
        )

    def _ranges(self) -> Iterator[Event]:
        columns = ("start", "end", "eventType", "text", "textId", "globalTid", "domainId")
        domains = {
            domain: text or self.words.get(name)
            for _, _, kind, text, name, _, domain in self.rows("NVTX_EVENTS", *columns)
            if kind == DOMAIN
        }
        of_libraries: dict[str, int] = {}
        crossing = 0
        for start, end, kind, text, name, thread, domain in self.rows("NVTX_EVENTS", *columns):
            if kind == START_END:
                crossing += 1
            if kind != PUSH_POP:
                continue
            if domain:
                library = str(domains.get(domain) or f"domain {domain}")
                of_libraries[library] = of_libraries.get(library, 0) + 1
                continue
            yield self._range(str(text or self.words.get(name) or ""), start, end, thread)
        if of_libraries:
            counts = ", ".join(f"{count:,} of {name}" for name, count in sorted(of_libraries.items()))
            self.notes.append(f"ranges of libraries are left out: {counts}")
        if crossing:
            self.notes.append(f"ranges that need not nest (nvtxRangeStart) are left out: {crossing:,}")

    def _range(self, text: str, start: Any, end: Any, thread: Any) -> Event:
        args, category, name = None, "user_annotation", text
        if "::" in text and (operator := OPERATOR.fullmatch(text)):
            category, name = "cpu_op", operator["name"]
            args = Args(dims=_shapes(operator["sizes"]))
        elif ", op_id = " in text and (marked := MARKED.fullmatch(text)):
            name = marked["name"]
        return self._event(category, name, start, end, self._process(thread), thread, args)

    def _calls(self) -> Iterator[Event]:
        columns = ("start", "end", "globalTid", "correlationId", "nameId")
        for start, end, thread, correlation, name in self.rows("CUPTI_ACTIVITY_KIND_RUNTIME", *columns):
            text = VERSION.sub("", str(self.words.get(name, "call of CUDA")))
            category = "cuda_runtime" if text.startswith("cuda") else "cuda_driver"
            linked = Args(correlation=self._linked(thread, correlation))
            yield self._event(category, text, start, end, self._process(thread), thread, linked)

    def _kernels(self) -> Iterator[Event]:
        columns = (
            "start",
            "end",
            "deviceId",
            "streamId",
            "correlationId",
            "globalPid",
            "demangledName",
            "shortName",
        )
        for start, end, device, stream, correlation, process, name, short in self.rows(
            "CUPTI_ACTIVITY_KIND_KERNEL", *columns
        ):
            text = str(self.words.get(name) or self.words.get(short) or "kernel")
            yield self._on_gpu("kernel", text, start, end, device, stream, process, correlation)
        graphs = 0
        for start, end, device, stream, correlation, process, graph in self.rows(
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", *columns[:6], "graphId"
        ):
            graphs += 1
            yield self._on_gpu(
                "kernel", f"CUDA graph {graph}", start, end, device, stream, process, correlation
            )
        if graphs:
            self.notes.append(
                f"CUDA graphs are recorded as a whole, {graphs:,} launches; nsys profile --cuda-graph-trace=node"
                " records their kernels"
            )

    def _copies(self) -> Iterator[Event]:
        places = dict(self.rows("ENUM_CUDA_MEM_KIND", "id", "label"))
        columns = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid", "bytes")
        for start, end, device, stream, correlation, process, size, kind, source, target in self.rows(
            "CUPTI_ACTIVITY_KIND_MEMCPY", *columns, "copyKind", "srcKind", "dstKind"
        ):
            between = (
                f" ({places[source]} -> {places[target]})" if source in places and target in places else ""
            )
            name = f"Memcpy {COPIES.get(kind, 'of unknown direction')}{between}"
            yield self._on_gpu("gpu_memcpy", name, start, end, device, stream, process, correlation, size)
        for start, end, device, stream, correlation, process, size, place in self.rows(
            "CUPTI_ACTIVITY_KIND_MEMSET", *columns, "memKind"
        ):
            name = f"Memset ({places.get(place, 'Unknown')})"
            yield self._on_gpu("gpu_memset", name, start, end, device, stream, process, correlation, size)

    def _on_gpu(
        self, category: str, name: str, start: Any, end: Any, device: Any, stream: Any, process: Any,
        correlation: Any, size: Any = 0,
    ) -> Event:  # fmt: skip
        args = Args(
            correlation=self._linked(process, correlation),
            stream=_number(stream, -1),
            copied=_number(size, 0),
        )
        return self._event(category, name, start, end, f"GPU {device}", stream, args)

    def _event(
        self, category: str, name: str, start: Any, end: Any, process: Any, thread: Any, args: Args | None
    ) -> Event:
        begins, ends = _number(start, None), _number(end, None)
        lasts = (ends - begins) / 1e3 if begins is not None and ends is not None else None
        at = begins / 1e3 if begins is not None else None
        return Event(
            ph="X", cat=category, name=name, pid=process, tid=_key(thread), ts=at, dur=lasts, args=args
        )

    def _devices(self) -> tuple[Device, ...]:
        found = []
        for name, size in self.rows("TARGET_INFO_GPU", "name", "totalMemory"):
            device = Device(name=str(name))
            if isinstance(size, int) and size > 0:
                device["totalGlobalMem"] = size
            found.append(device)
        return tuple(found)


def _number(value: Any, missing: Any) -> Any:
    return value if isinstance(value, int | float) else missing


def _key(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _shapes(text: str | None) -> msgspec.Raw:
    """Shapes of an operator's inputs as JSON, nothing where they are not recorded or cut off."""
    try:
        return msgspec.Raw(json.dumps(json.loads(text)).encode()) if text else NONE
    except (ValueError, RecursionError):
        return NONE
