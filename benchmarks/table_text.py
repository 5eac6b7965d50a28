"""What every table needs: the recorded results, Markdown, and the machine in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from new_records import read_kept

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


def read(name: str, rows_as: Callable[[Path], dict] | None = None) -> dict:
    """A recorded result by its name.

    Args:
        rows_as: makes it of the typed rows of a run of 42_component, where those were kept in its place.
    """
    rows = RESULTS / f"{name}.jsonl"
    if rows_as is not None and rows.is_file():
        return rows_as(rows)
    return read_kept(json.loads((RESULTS / f"{name}.json").read_text()))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(environment: dict) -> str:
    """One line: what it ran on."""
    gpu, packages, threads = environment.get("gpu"), environment["packages"], environment["threads"]
    where = gpu["name"] if gpu else f"{environment['cpu']}, {threads} thread{'s' * (threads > 1)}"
    parts = [where, *([f"Python {environment['python']}"] if environment["python"] else [])]
    parts += [f"{name} {packages[name]}" for name in ("torch", "diffusers") if name in packages]
    runtime = packages.get("onnxruntime-gpu") or packages.get("onnxruntime")
    return ", ".join(parts + ([f"ONNX Runtime {runtime}"] if runtime else []))
