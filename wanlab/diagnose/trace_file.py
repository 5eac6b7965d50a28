"""Reads the file of a trace as events: packed or plain, in any encoding, also with mistakes that profilers make in JSON.

The format is Chrome's trace event format, as an object with `traceEvents` or as an array of events, whose end may be
missing. Some versions of Kineto write paths of Windows with single backslashes, quotes of kernel names without a backslash,
control characters, and NaN; such text is repaired, and a note says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec

from wanlab.core import limits
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.packed import as_utf8, read_unpacked

NONE = msgspec.Raw(b"")
Number = int | float | str | None
Key = int | float | str | None
T = TypeVar("T")


class Args(
    msgspec.Struct,
    gc=False,
    rename={
        "dims": "Input Dims",
        "old_dims": "Input dims",
        "types": "Input type",
        "concrete": "Concrete Inputs",
        "size": "Bytes",
        "copied": "bytes",
        "allocated": "Total Allocated",
        "reserved": "Total Reserved",
        "device_type": "Device Type",
        "device_id": "Device Id",
        "address": "Addr",
    },
):
    """The arguments of an event that wanlab uses. Raw ones are parsed only when they are needed."""

    correlation: Number = 0
    stream: Number = -1
    copied: Number = 0
    dims: msgspec.Raw = NONE
    old_dims: msgspec.Raw = NONE
    types: msgspec.Raw = NONE
    concrete: msgspec.Raw = NONE
    size: Number = None
    allocated: Number = -1
    reserved: Number = -1
    device_type: Number = 0
    device_id: Number = -1
    address: Number = 0
    name: Any = None  # of a process, in the event "process_name"


class _WithoutArgs(msgspec.Struct, gc=False):
    """An event whose arguments are of other types than `Args` has."""

    ph: str = ""
    cat: str | None = ""
    name: str | None = ""
    pid: Key = 0
    tid: Key = 0
    ts: Number = None
    dur: Number = None


class Event(_WithoutArgs, gc=False):
    """One event of a trace file."""

    args: Args | None = None


Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A number that every part of a file counts in; JSON may hold larger ones, which are mistakes."""


class Generation(TypedDict, total=False):
    """The description that `capture` adds to a trace."""

    model: str
    engines: dict[str, str]
    device: str
    dtype: str
    settings: dict[str, Any]
    asked_steps: Whole | None
    wall_ms: float
    weights_bytes: dict[str, Whole]
    joint_attention: bool


class Distributed(TypedDict, total=False):
    """The rank that Kineto writes."""

    rank: Whole | None
    world_size: Whole | None


class Device(TypedDict, total=False):
    """A GPU of the machine, as Kineto describes it."""

    name: str
    totalGlobalMem: Whole


class Trimmed(TypedDict):
    """What `trim` left out."""

    shortest_us: float
    smallest_bytes: float


class _File(msgspec.Struct):
    """The parts of a trace file that wanlab uses."""

    traceEvents: Any
    deviceProperties: Any = ()
    computeProperties: Any = ()  # its name in Kineto before 2021
    distributedInfo: Any = None
    wanlab: Any = None
    trimmed: Any = None


class _EventFile(_File):
    traceEvents: list[Event]


class _RawFile(_File):
    traceEvents: list[msgspec.Raw]


@dataclass(frozen=True, eq=False)
class TraceFile:
    """A trace file.

    Attributes:
        events: its events, in the order of the file; a begin and its end are one complete event.
        devices: GPUs of the machine.
        distributed, generation, trimmed: empty where the file does not have them.
        odd_events: number of events that are left out because a field is of another type.
        notes: how the text was read, if it is not sound JSON in UTF-8.
    """

    events: list[Event]
    devices: tuple[Device, ...]
    distributed: Distributed
    generation: Generation
    trimmed: Trimmed | None
    odd_events: int
    notes: tuple[str, ...]


def read_file(path: Path) -> TraceFile:
    """Read a trace file: JSON, plain, as gzip or in a zip.

    Raises:
        WanlabError: no such file; one that is damaged, too large or too deep; or not a profiler trace.
    """
    if path.suffix in (".nsys-rep", ".qdrep") and path.is_file():
        raise WanlabError(
            f"{path} is a report of Nsight Systems; export it: nsys export --type sqlite {path.name}"
        )
    if not path.is_file():
        raise WanlabError(f"no trace {path}; give a .json or .json.gz file of torch.profiler")
    notes: list[str] = []
    text = as_utf8(read_unpacked(path), notes.append)
    limits.check("json_objects", text.count(b"{"), f"{path}: objects of JSON")
    try:
        file, odd_events = _decoded(text, notes)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{path} is not a profiler trace: {first_line(error)}") from error
    except RecursionError as error:
        raise WanlabError(f"{path} is not a profiler trace: its JSON is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WanlabError(f"{path} is cut off or not JSON: {first_line(error)}") from error
    return TraceFile(
        _joined_pairs(file.traceEvents),
        _of_type(file.deviceProperties or file.computeProperties, tuple[Device, ...], (), "GPUs", notes),
        _of_type(file.distributedInfo, Distributed, Distributed(), "distributedInfo", notes),
        _of_type(file.wanlab, Generation, Generation(), "description by wanlab", notes),
        _of_type(file.trimmed, Trimmed, None, "note of trimming", notes),
        odd_events,
        tuple(notes),
    )


def begins_and_ends(marks: Iterable[tuple[str, Hashable, float]]) -> list[tuple[int, int | None]]:
    """Positions of the events that begin (phase B), each with that of its end (phase E), None without one.

    Args:
        marks: phase, thread and time of each event of a file.
    """
    ordered = [(time, place, phase, i) for i, (phase, place, time) in enumerate(marks) if phase in ("B", "E")]
    ordered.sort(key=lambda mark: mark[0])  # events of one time stay in the order of the file
    pairs: list[tuple[int, int | None]] = []
    opened: dict[Hashable, list[int]] = {}
    for _, place, phase, i in ordered:
        stack = opened.setdefault(place, [])
        if phase == "B":
            stack.append(i)
        elif stack:
            pairs.append((stack.pop(), i))
    return pairs + [(i, None) for stack in opened.values() for i in stack]


def _joined_pairs(events: list[Event]) -> list[Event]:
    """The events, where a pair of begin and end is one complete event; one without an end has no duration."""
    if not any(event.ph == "B" for event in events):
        return events
    marks = [(e.ph, (e.pid, e.tid), as_float(e.ts)) for e in events]
    for begin, end in begins_and_ends(marks):
        events[begin].ph = "X"
        if end is not None:
            events[begin].dur = marks[end][2] - marks[begin][2]
            events[begin].args = events[begin].args or events[end].args
    return events


def as_float(value: object) -> float:
    """A number, NaN where there is none."""
    if isinstance(value, float):
        return value
    try:
        return float(value) if isinstance(value, int | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _decoded(text: bytes, notes: list[str]) -> tuple[_EventFile, int]:
    """The file from its text, which is repaired only where it cannot be read as it is; and the number of odd events."""
    is_array = text.lstrip()[:1] == b"["
    try:
        return _typed(text, is_array)
    except (msgspec.ValidationError, RecursionError):
        raise
    except msgspec.DecodeError:
        repaired = repair(text, is_array)
        decoded = _typed(repaired, is_array)
        if repaired.rstrip(b"]") != text.rstrip(b" \r\n\t,"):
            notes.append(
                "its JSON has mistakes that were repaired (backslashes, quotes, control characters, NaN)"
            )
        return decoded


def _typed(text: bytes, is_array: bool) -> tuple[_EventFile, int]:
    """The file from sound JSON; single events of other types are left out and counted."""
    try:
        if is_array:
            return _EventFile(msgspec.json.decode(text, type=list[Event], strict=False)), 0
        return msgspec.json.decode(text, type=_EventFile, strict=False), 0
    except msgspec.ValidationError as error:
        if is_array:
            raw = _RawFile(msgspec.json.decode(text, type=list[msgspec.Raw]))
        else:
            raw = msgspec.json.decode(text, type=_RawFile, strict=False)
        events = [event for item in raw.traceEvents if (event := _event(item)) is not None]
        if not any(event.ph for event in events):
            raise error
        parts = {name: getattr(raw, name) for name in _File.__struct_fields__}
        return _EventFile(**parts | {"traceEvents": events}), len(raw.traceEvents) - len(events)


def _event(item: msgspec.Raw) -> Event | None:
    """An event; without its arguments, if they are of another type; None if other fields are."""
    try:
        return msgspec.json.decode(item, type=Event, strict=False)
    except msgspec.ValidationError:
        pass
    try:
        return Event(**msgspec.structs.asdict(msgspec.json.decode(item, type=_WithoutArgs, strict=False)))
    except msgspec.ValidationError:
        return None


def _of_type(value: Any, kind: type[T], missing: T, what: str, notes: list[str]) -> T:
    """A part of the file as its type; a part of another type counts as missing, and a note says so."""
    if not value:
        return missing
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        notes.append(f"its {what} cannot be read: {first_line(error)}")
        return missing


_TOKEN = re.compile(
    rb"""
    " (?P<string> (?: [^"\\]++ | \\. | "(?! \s* (?: [}\]:] | , \s* ["{\[] | \Z ) ) )*+ ) (?: "| \\? \Z )
    | (?P<constant> -?\b (?: NaN | nan | Infinity | inf )\b )
    """,
    re.VERBOSE | re.DOTALL,
)
"""A string, up to a quote after which JSON goes on, or a number that JSON does not have."""
_INVALID_ESCAPE = re.compile(rb'(?<!\\)(?:\\\\)*\\(?:[^"\\/bfnrtu]|u(?![0-9A-Fa-f]{4}))')
_PYTHON_FUNCTION = re.compile(rb"\.py\(\d+\)")
_CONTROL = re.compile(rb'[\x00-\x1f]|(?<!\\)(?:\\\\)*"')


def repair(text: bytes, is_array: bool = False) -> bytes:
    """JSON with the mistakes of profilers repaired.

    In a string with a backslash that escapes nothing every backslash stands for itself; quotes and control characters get
    one; NaN and infinities become null. An array that does not end gets its end, as Chrome's format allows.
    """
    text = _TOKEN.sub(_repaired, text)
    if is_array:
        text = text.rstrip().rstrip(b",")
        if not text.endswith(b"]"):
            text += b"]"
    return text


def _repaired(match: re.Match[bytes]) -> bytes:
    if match["constant"] is not None:
        return b"null"
    string = match["string"]
    if _INVALID_ESCAPE.search(string) or (b"\\" in string and _PYTHON_FUNCTION.search(string)):
        string = re.sub(rb'\\(?!")', rb"\\\\", string) if b"\\\\" not in string else _escaped_once(string)
    if b'"' in string or any(byte < 32 for byte in string):
        string = _CONTROL.sub(lambda found: _escaped(found[0]), string)
    return b'"' + string + b'"'


def _escaped_once(string: bytes) -> bytes:
    """Backslashes doubled, except those that are doubled already."""
    return re.sub(rb'\\\\|\\(?!")', rb"\\\\", string)


def _escaped(found: bytes) -> bytes:
    return found[:-1] + b'\\"' if found.endswith(b'"') else b"\\u%04x" % found[0]
