"""Layers of an engine from the log of its builder.

An engine's own inspector needs the GPU that the engine is for. With detailed verbosity the builder writes the same
facts, in the inspector's one-line format, when it has built: this reads them back into the inspector's JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanlab.convert.tensorrt.runtime import Message

LAYERS, TENSORS, ENGINE = "Layers", "I/O Tensors", "Engine Metadata"
TEXTS = (
    "Name",
    "LayerType",
    "TacticName",
    "Datatype",
    "Format",
    "Metadata",
)  # even where they look like numbers
_TOKEN = re.compile(r"([A-Z][\w/ ]*): ")


def layers_from_log(messages: Sequence[Message]) -> dict[str, Any] | None:
    """Layer information that a builder logged, as its inspector would give it; None where there is none.

    Returns:
        `"Layers"`: list of dicts (Name, LayerType, Inputs, Constants, Outputs, TacticName, StreamId, Metadata);
        `"I/O Tensors"`: list of dicts; `"Engine Metadata"`: dict; `"Source"`: `"builder log"`. Free axes are -1.
    """
    text = next((text for _, text in reversed(messages) if text.startswith(f"{LAYERS}:\n")), None)
    if text is None:
        return None
    sections: dict[str, list[str]] = {LAYERS: [], TENSORS: [], ENGINE: []}
    section = LAYERS
    for line in text.splitlines()[1:]:
        if line.rstrip(":") in sections and line.endswith(":"):
            section = line.rstrip(":")
        elif line.strip():
            sections[section].append(line.lstrip())  # an empty last field ends in its blank
    engine = dict(line.split(": ", 1) for line in sections[ENGINE] if ": " in line)
    return {
        LAYERS: [parse_line(line) for line in sections[LAYERS]],
        TENSORS: [parse_line(line) for line in sections[TENSORS]],
        ENGINE: engine,
        "Source": "builder log",
    }


def parse_line(line: str) -> dict[str, Any]:
    """One layer or tensor: `Name: a, Inputs: [ { Name: b, Dimensions: [1,-1] }], Metadata: c`."""
    value, end = _fields(line, 0)
    if end != len(line):
        raise ValueError(f"cannot read {line[end : end + 60]!r}")
    return value


def _fields(text: str, at: int) -> tuple[dict[str, Any], int]:
    """`Key: value, Key: value`, until a closing brace or the end."""
    found: dict[str, Any] = {}
    while match := _TOKEN.match(text, at):
        key = match[1]
        found[key], at = _value(text, match.end(), key)
        if text.startswith(", ", at):
            at += 2
    return found, at


def _value(text: str, at: int, key: str) -> tuple[Any, int]:
    if text.startswith("[ {", at):
        items, at = [], at + 2
        while text.startswith("{", at):
            item, at = _fields(text, at + 2)
            items.append(item)
            at = _skip(text, at, (" }", "}"))
            at = _skip(text, at, (", ",))
        return items, _skip(text, at, ("]", " ]"))
    if key != "Metadata" and (match := re.compile(r"\[([-\d, ]*)\]").match(text, at)):
        numbers = [int(number) for number in match[1].split(",") if number.strip()]
        return numbers, match.end()
    # Names may hold anything but this: the next key after a comma, or the end of the item.
    end = re.compile(r", (?=[A-Z][\w/ ]*: )| }|$").search(text, at)
    stop = len(text) if key == "Metadata" or end is None else end.start()
    word = text[at:stop]
    if key not in TEXTS and re.fullmatch(r"-?\d+", word):
        return int(word), stop
    return {"true": True, "false": False}.get(word, word), stop


def _skip(text: str, at: int, choices: tuple[str, ...]) -> int:
    return next((at + len(choice) for choice in choices if text.startswith(choice, at)), at)


def count_types(information: dict[str, Any]) -> dict[str, int]:
    """Layer type -> how many, most first; of layers that only name themselves, nothing."""
    layers = [layer for layer in information.get(LAYERS, ()) if isinstance(layer, dict)]
    return dict(Counter(layer.get("LayerType", "") for layer in layers).most_common())


def count_datatypes(information: dict[str, Any]) -> dict[str, int]:
    """Datatypes of a layer's inputs, e.g. `"Int8"` or `"Float+Half"` -> how many layers read these, most first."""
    counts: Counter[str] = Counter()
    for layer in information.get(LAYERS, ()):
        inputs = layer.get("Inputs") if isinstance(layer, dict) else None
        kinds = {entry.get("Datatype", "") for entry in inputs or () if isinstance(entry, dict)} - {""}
        if kinds:
            counts["+".join(sorted(kinds))] += 1
    return dict(counts.most_common())


def layers_path(engine: str | os.PathLike) -> Path:
    """Where the layer information of an engine lies."""
    return Path(f"{os.fspath(engine)}.layers.json")


def write_layers(engine: str | os.PathLike, information: dict[str, Any]) -> Path:
    """Write layer information beside its engine."""
    path = layers_path(engine)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(information), encoding="utf-8")
    os.replace(draft, path)
    return path
