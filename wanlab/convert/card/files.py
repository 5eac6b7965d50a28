"""JSON files, plain or compressed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError


def read_json(path: str | os.PathLike) -> Any:
    """The content of a `.json` or `.json.gz` file.

    Raises:
        WanlabError: no such file, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise WanlabError(f"no file at {path}")
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return json.loads(text)
    except (OSError, EOFError, ValueError) as error:
        raise WanlabError(f"{path} is not JSON: {str(error).splitlines()[0]}") from error
