"""A profiler's Chrome trace file, read fast into columns, with what is wrong with it said.

The format is the Trace Event Format (Google, 2016) as PyTorch's Kineto writes it: complete events (`ph` "X") with
microseconds, category, thread and arguments; instant events named "[memory]" for allocations. msgspec decodes only
the fields named here and makes no objects of the rest.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

NONE = msgspec.Raw(b"")
DEVICE_TYPES = {0: "cpu", 1: "cuda"}
"""c10::DeviceType, as "[memory]" events give it."""


class Args(
    msgspec.Struct,
    gc=False,
    rename={
        "dims": "Input Dims",
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
    """The arguments of an event that are read. Raw ones stay text until somebody asks for them."""

    correlation: int | float | None = 0
    stream: int | str | None = -1
    copied: int | float | None = 0
    dims: msgspec.Raw = NONE
    types: msgspec.Raw = NONE
    concrete: msgspec.Raw = NONE
    size: int | float | None = None
    allocated: int | float | None = -1
    reserved: int | float | None = -1
    device_type: int | None = 0
    device_id: int | None = -1
    address: int | str | None = 0


class Event(msgspec.Struct, gc=False):
    """One event."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float | str | None = None
    dur: float | None = None
    args: Args | None = None


class File(msgspec.Struct):
    """The parts of a trace file that are read."""

    traceEvents: list[Event]
    deviceProperties: list[dict] = []
    distributedInfo: dict | None = None
    wanlab: dict | None = None
    trimmed: dict | None = None


NO_ARGS = Args()


def decode(path: Path) -> File:
    """Read a trace file, `.json` or `.json.gz`.

    Raises:
        WanlabError: no such file, a truncated or empty file, or one that is no profiler trace.
    """
    raw = unpack(path)
    try:
        return msgspec.json.decode(raw, type=File, strict=False)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{path} is not a profiler trace: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WanlabError(f"{path} is cut off or not JSON: {error}") from error


def unpack(path: Path) -> bytes:
    """The JSON text of a trace file; errors as `decode`."""
    if not path.is_file():
        raise WanlabError(f"no trace {path}; give a .json or .json.gz file of torch.profiler")
    raw = path.read_bytes()
    if not raw:
        raise WanlabError(f"{path} is empty; was the profiler stopped before it wrote?")
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise WanlabError(f"{path} is cut off or damaged ({error}); copy it again") from error


def tables(events: list[Event]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The complete events and the allocations as `Trace.events` and `Trace.memory` describe them."""
    import numpy as np
    import pandas as pd

    kept = [e for e in events if e.ph == "X" and e.ts is not None and e.dur is not None]
    blocks = [e for e in events if e.name == "[memory]" and e.args is not None and e.args.size is not None]
    start = np.array([float(e.ts) for e in kept])
    origin = start.min() if len(start) else 0.0
    thread, process, where = _places(kept)
    args = [e.args or NO_ARGS for e in kept]
    table = pd.DataFrame(
        {
            "name": pd.Categorical([e.name for e in kept]),
            "category": pd.Categorical([e.cat for e in kept]),
            "process": process,
            "thread": thread,
            "start_us": start - origin,
            "time_us": np.array([e.dur for e in kept], dtype=float),
            "correlation": np.array([a.correlation or 0 for a in args], dtype=np.int64),
            "stream": np.array([a.stream if isinstance(a.stream, int) else -1 for a in args], dtype=np.int64),
            "size_bytes": np.array([a.copied or 0 for a in args], dtype=np.int64),
            "inputs": pd.Categorical(
                [_inputs(e.name, a) if a.dims is not NONE else "" for e, a in zip(kept, args, strict=True)]
            ),
        }
    )
    order = np.lexsort((-table["time_us"], table["start_us"], table["thread"]))
    return table.iloc[order].reset_index(drop=True), _memory(blocks, origin, where)


def _places(events: list[Event]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Codes of thread and process of each event, and {(pid, tid): codes}."""
    import numpy as np

    threads: dict[tuple, tuple[int, int]] = {}
    processes: dict[int | str, int] = {}
    codes = np.empty((len(events), 2), dtype=np.int64)
    for i, e in enumerate(events):
        key = (e.pid, e.tid)
        code = threads.get(key)
        if code is None:
            code = threads[key] = (len(threads), processes.setdefault(e.pid, len(processes)))
        codes[i] = code
    return codes[:, 0], codes[:, 1], threads


def _inputs(name: str, args: Args) -> str:
    """Shapes, types and, where strides and padding matter, values of an operator's inputs, as JSON."""
    values = bytes(args.concrete).decode() if "conv" in name and args.concrete is not NONE else "[]"
    types = bytes(args.types).decode() if args.types is not NONE else "[]"
    return f"[{bytes(args.dims).decode()},{types},{values}]"


def _memory(blocks: list[Event], origin: float, where: dict) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    args = [e.args for e in blocks]
    unknown = (-1, -1)
    table = pd.DataFrame(
        {
            "time_us": np.array([float(e.ts or 0) for e in blocks]) - origin,
            "size_bytes": np.array([a.size for a in args], dtype=np.int64),
            "allocated_bytes": np.array([-1 if a.allocated is None else a.allocated for a in args], np.int64),
            "reserved_bytes": np.array([-1 if a.reserved is None else a.reserved for a in args], np.int64),
            "device": pd.Categorical([_device(a) for a in args]),
            "address": np.array([_address(a.address) for a in args], dtype=np.uint64),
            "thread": np.array([where.get((e.pid, e.tid), unknown)[0] for e in blocks], dtype=np.int64),
            "process": np.array([where.get((e.pid, e.tid), unknown)[1] for e in blocks], dtype=np.int64),
        }
    )
    return table.sort_values("time_us", kind="stable").reset_index(drop=True)


def _device(args: Args) -> str:
    kind = DEVICE_TYPES.get(args.device_type or 0, f"device type {args.device_type}")
    return kind if kind == "cpu" else f"{kind}:{max(args.device_id or 0, 0)}"


def _address(value: int | str | None) -> int:
    """Kineto writes a number, older files text in hexadecimal."""
    try:
        return int(value, 0) if isinstance(value, str) else int(value or 0)
    except ValueError:
        return 0
