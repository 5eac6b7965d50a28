"""What makes two runs the same run: notebook code, parameters, the package, weights and input files."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wanlab
from wanlab.errors import WanlabError
from wanlab.runs.files import digest, file_digest, plain

WHOLE_FILE_LIMIT_BYTES = 64 * 2**20  # larger weight files are told apart by name and size


def run_id(
    source: str,
    parameters: Mapping[str, Any],
    *,
    plan: str | None = None,
    weights: str | None = None,
    inputs: Mapping[str, str] | None = None,
    repeat: int = 1,
) -> str:
    """12 hex digits that change whenever the result could.

    Args:
        source: notebook source without outputs, see `notebook_source`.
        parameters: all of them, resolved.
        plan: hash of a precision plan, if one is used.
        weights: identity of the model's weights, see `weights_id`.
        inputs: digest of each file that a parameter points to, see `input_digests`.
        repeat: which of several equal runs, from 1.
    """
    values = json.dumps(plain(dict(parameters)), sort_keys=True)
    files = json.dumps(dict(inputs or {}), sort_keys=True)
    parts = [source, values, plan or "", wanlab.__version__, package_digest(), weights or "", files]
    return digest([*parts, str(repeat)] if repeat > 1 else parts, 12)


def notebook_source(notebook: Any) -> str:
    """Cell types, tags and sources of a notebook: what runs, without what came out."""
    cells = [[c.cell_type, sorted(c.metadata.get("tags", [])), c.source] for c in notebook.cells]
    return json.dumps(cells, ensure_ascii=False)


@functools.cache
def package_digest() -> str:
    """Digest of wanlab's own Python files, so that an edited package does not resume old results."""
    root = Path(wanlab.__file__).parent
    parts: list[str | bytes] = []
    for path in sorted(root.rglob("*.py")):
        parts += [path.relative_to(root).as_posix(), path.read_bytes()]
    return digest(parts, 16)


def weights_id(model: Any) -> str | None:
    """Identity of the weights behind a `model` parameter, or None when it names no local folder."""
    if not isinstance(model, str) or not model:
        return None
    from wanlab import models

    if model in models.names():  # never asks the hub: that is for the notebook, where it can be waited for
        try:
            model = models.get(model).source
        except WanlabError:
            return None  # the notebook says it better, where it loads the model
    folder = Path(model)
    return folder_digest(folder) if folder.is_dir() else None


def folder_digest(folder: Path) -> str:
    """Digest over names and contents of a folder's files (over name and size for very large ones)."""
    kinds = (".json", ".safetensors", ".bin")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds)
    found = [(path, path.stat()) for path in files]
    return _digest_of(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found))


@functools.lru_cache(maxsize=16)  # the runs of a sweep name the same weights
def _digest_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    parts: list[str | bytes] = []
    for path, size, _ in files:
        parts += [
            path.relative_to(folder).as_posix(),
            file_digest(path) if size <= WHOLE_FILE_LIMIT_BYTES else str(size),
        ]
    return digest(parts, 16)


def input_digests(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each parameter value that is a file: the same path with new content is another run."""
    found = {}
    for name, value in parameters.items():
        if (
            isinstance(value, str)
            and value
            and len(value) < 4096
            and "\0" not in value
            and os.path.isfile(value)
        ):
            found[name] = file_digest(Path(value))
    return found
