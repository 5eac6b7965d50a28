"""The table of `load_runs` as one file: CSV for spreadsheets, Parquet for everything that keeps types."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from wanlab.errors import require
from wanlab.runs.files import plain, write_bytes


def to_csv(runs: Any, path: str | os.PathLike) -> Path:
    """Write one line per run, UTF-8; times as ISO 8601 in UTC, lists and mixed columns as JSON."""
    text = flat(runs).to_csv(index=False, date_format="%Y-%m-%dT%H:%M:%SZ")
    return write_bytes(Path(path), text.encode("utf-8", "replace"))


def to_parquet(runs: Any, path: str | os.PathLike) -> Path:
    """Write one row per run with the type of every column kept.

    Raises:
        WanlabError: pyarrow is not installed.
    """
    require("pyarrow", '"wanlab[parquet]"')
    buffer = io.BytesIO()
    flat(runs).to_parquet(buffer, engine="pyarrow", index=False)
    return write_bytes(Path(path), buffer.getvalue())


def flat(runs: Any) -> Any:
    """`runs` with one type per column, which files of columns need.

    Numbers, times, text and truth values stay what they are, gaps included. A column of anything else (lists, or a
    parameter that is a number in one notebook and text in another) becomes JSON text.
    """
    return runs.assign(**{name: _one_type(runs[name]) for name in runs.columns})


def _one_type(column: Any) -> Any:
    import pandas as pd

    if column.dtype != object:
        return column
    kinds = {type(value) for value in column if not _missing(value)}
    if kinds == {bool}:
        return column.map(lambda value: pd.NA if _missing(value) else value).astype("boolean")
    text = str if kinds <= {str} else _json
    return column.map(lambda value: None if _missing(value) else text(value)).astype("string")


def _json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
