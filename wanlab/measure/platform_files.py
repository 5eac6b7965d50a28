"""Platform records out of what other runs left: run folders, recorded results, benchmark exports, build receipts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.platform_forms import of_file, of_run
from wanlab.measure.platform_records import PlatformRecord

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"


def read_platforms(paths: Iterable[str | os.PathLike]) -> tuple[list[PlatformRecord], pd.DataFrame]:
    """Every record that can be found in files and folders.

    Understood are run folders of 10_baseline, 21_onnxruntime and 51_platforms, JSON under `data/results/` of
    those and of the engine benchmarks, the JSON of `wanlab bench`, and receipts of engine builds.

    Args:
        paths: run folders, JSON files, or folders of JSON files.

    Returns:
        The records in the order of the paths, and a DataFrame of what holds none: source, reason.
    """
    import pandas as pd

    found, nothing = [], []
    for path in _files(paths):
        try:
            records = read_platform(path)
        except WanlabError as error:
            nothing.append({"source": path.name, "reason": str(error)})
            continue
        found += records
    return found, pd.DataFrame(nothing, columns=["source", "reason"])


def read_platform(path: str | os.PathLike) -> list[PlatformRecord]:
    """Records of one run folder or JSON file.

    Raises:
        WanlabError: it cannot be read, or no latency of an engine and no built engine is in it.
    """
    path = Path(path)
    if path.is_dir():
        run = _json(path / "run.json") | {"metrics": _metrics(path / "metrics.jsonl")}
        records = of_run(f"{path.parent.name}/{path.name}", run)
    else:
        records = of_file(path.name, _json(path))
    if not records:
        raise WanlabError(f"{path.name} holds no latency of an engine on a machine")
    return records


def _files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        inside = path.is_dir() and not (path / "run.json").is_file()
        files += sorted(path.glob("*.json")) if inside else [path]
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WanlabError(f"cannot read {path.name}: {error}") from error
    if not isinstance(found, dict):
        raise WanlabError(f"{path.name} is not a JSON object")
    return found


def _metrics(path: Path) -> dict[str, Any]:
    """The last value of each name in a metrics.jsonl; a torn last line is skipped."""
    found: dict[str, Any] = {}
    for line in path.read_text("utf-8", "replace").split("\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry["name"]] = entry["value"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
