"""A trace's table of events as bytes that a browser draws without parsing: a header in JSON, then columns of integers.

Layout: length of the header (uint32, little endian), the header (UTF-8), padding to 8 bytes, then the columns one after
another, each in byte planes (all lowest bytes first), which gzip makes small. A column marked `delta` holds differences to
the value before, modulo its width. Times are nanoseconds in 48 bits (`<name>_low`, 32 bits, and `<name>_high`, 16);
operations, bytes and roofline times are float32.
"""

from __future__ import annotations

import gzip
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from wanlab.core.words import NAMES
from wanlab.diagnose.breakdown import CATEGORIES, COMPONENTS, category_name
from wanlab.diagnose.explorer.view import Exploration

VERSION = 1


def pack(
    view: Exploration, *, colours: dict[str, dict[str, str]] | None = None, compress: bool = True
) -> bytes:
    """The events of a view, and below them those of its second trace, for `explorer.js`.

    Args:
        colours: of `categories` and of `components`, by name.
        compress: as gzip, for a file or page; a browser beside the kernel needs none.
    """
    body: list[bytes] = []
    header: dict[str, Any] = {"version": VERSION, "colours": colours or {}, "traces": [_trace(view, body)]}
    if view.compare is not None:
        header["traces"].append(_trace(view.compare, body))
    text = msgspec.json.encode(header)
    head = len(text).to_bytes(4, "little") + text
    data = b"".join([head, b"\0" * (-len(head) % 8), *body])
    return gzip.compress(data, 6, mtime=0) if compress else data


def _trace(view: Exploration, body: list[bytes]) -> dict[str, Any]:
    events, roof = view.events, view.ceilings
    frame, cut = events.frame, events.stretches
    columns: list[dict[str, Any]] = []

    def put(name: str, values: np.ndarray, kind: str, delta: bool = False) -> None:
        columns.append({"name": name, "type": kind, "count": len(values), "delta": delta})
        body.append(_planes(values, kind, delta))

    for prefix, table in (("", frame), ("stretch_", cut)):
        for name in ("start", "time"):
            times = np.rint(table[f"{name}_us"].to_numpy() * 1e3).astype(np.int64)
            put(f"{prefix}{name}_low", times & 0xFFFFFFFF, "uint32", name == "start")
            put(f"{prefix}{name}_high", times >> 32, "uint16", name == "start")
        for name in ("component", "category"):
            put(f"{prefix}{name}", table[name].cat.codes.to_numpy(), "uint8")
        put(f"{prefix}step", table["step"].to_numpy().astype(np.int64) + 1, "uint16")
    for name in ("name", "module", "shapes"):
        put(name, frame[name].cat.codes.to_numpy(), "uint32")
    put("kind", frame["kind"].cat.codes.to_numpy(), "uint8")
    put("parent", frame["parent"].to_numpy() + 1, "uint32", True)
    for name, values in (("flop", "flop"), ("bytes", "moved_bytes"), ("roofline", "roofline_us")):
        put(name, frame[values].to_numpy(dtype=np.float32).view(np.uint32), "uint32")
    return {
        "title": view.trace.generation.get("model") or view.trace.path.name,
        "device": view.trace.device_name or "CPU",
        "side": events.side,
        "window_us": view.trace.window_us,
        "rows": len(frame),
        "lanes": [
            {
                "name": lane.name,
                "side": lane.side,
                "first": lane.first,
                "last": lane.last,
                "depth": lane.depth,
            }
            for lane in events.lanes
        ],
        "columns": columns,
        "words": {name: _words(frame[name]) for name in ("name", "module", "shapes", "kind")},
        "categories": [[name, category_name(name, view.joint)] for name in CATEGORIES],
        "components": [[name, NAMES.get(name, name)] for name in COMPONENTS],
        "ceilings": {"tflop_per_s": roof.tflop_per_s, "memory_gb_per_s": roof.memory_gb_per_s}
        if roof
        else None,
    }


def _words(column: pd.Series) -> list[str]:
    return [str(word) for word in column.cat.categories]


def _planes(values: np.ndarray, kind: str, delta: bool) -> bytes:
    """A column's bytes, lowest of all values first."""
    given = values.astype(np.int64)
    if delta:
        given = np.diff(given, prepend=0)
    width = np.dtype(kind).itemsize
    whole = (given & (256**width - 1)).astype(kind).astype(f"<u{width}")
    return np.ascontiguousarray(whole.view(np.uint8).reshape(-1, width).T).tobytes()
