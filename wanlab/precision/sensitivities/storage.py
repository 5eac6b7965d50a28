"""A measurement's folder: finished parts and what they belong to. The folder is the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.precision.sensitivities.parts import Part, read_part, write_part
from wanlab.precision.sensitivities.result import Sensitivity
from wanlab.precision.sensitivities.work import digest

SUFFIX = ".sensitivity.json"


def save_sensitivity(sensitivity: Sensitivity, folder: str | os.PathLike) -> Path:
    """Write a measurement into a folder, beside what is there, so that `read_sensitivity` finds it. Returns the folder."""
    folder = Path(folder)
    for part in sensitivity.parts:
        write_part(part_file(folder, sensitivity.settings, part.component, part.unit, part.key), part)
    keys = {part.component: part.key for part in sensitivity.parts}
    write_manifest(folder, sensitivity.settings, sensitivity.bands, sensitivity.wanted, keys)
    return folder


def read_sensitivity(folder: str | os.PathLike, *, key: str | None = None) -> Sensitivity:
    """A measurement from its folder, all shards and components that are finished.

    Args:
        key: of the settings, where the folder holds measurements with several.

    Raises:
        WanlabError: there is none, or several and no key, or a broken file.
    """
    folder = Path(folder)
    found = sorted(folder.glob(f"{key or '*'}{SUFFIX}"))
    if not found:
        raise WanlabError(
            f"no sensitivity in {folder}; measure it with wanlab.precision.sensitivity(..., folder=...)"
        )
    if len(found) > 1:
        keys = ", ".join(path.name.removesuffix(SUFFIX) for path in found)
        raise WanlabError(f"{folder} holds measurements with different settings; give key= one of {keys}")
    try:
        data = json.loads(found[0].read_text(encoding="utf-8"))
        settings, keys, wanted = data["settings"], data["keys"], tuple(data["wanted"])
        bands = {name: [tuple(band) for band in ranges] for name, ranges in data["bands"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise WanlabError(f"{found[0]} cannot be read ({error}); delete it and measure again") from error
    parts = []
    for component, part_key in keys.items():
        pattern = part_file(folder, settings, component, "*", part_key).name
        parts += [read_part(path) for path in sorted(folder.glob(pattern))]
    return Sensitivity(settings, tuple(parts), bands, wanted, reused=len({part.unit for part in parts}))


def merge_sensitivity(shards: Sequence[Sensitivity | str | os.PathLike]) -> Sensitivity:
    """Shards of one measurement as one: other components, other shards, or other examples of the same recording.

    Args:
        shards: measurements or their folders.

    Raises:
        WanlabError: nothing, other settings, or one component with different weights, ranges or recordings.
    """
    loaded = [each if isinstance(each, Sensitivity) else read_sensitivity(each) for each in shards]
    if not loaded:
        raise WanlabError("no shard to merge; give at least one")
    first = loaded[0]
    parts: dict[tuple[str, str], Part] = {}
    for shard in loaded:
        for name, value in shard.settings.items():
            if value != first.settings.get(name):
                raise WanlabError(
                    f"these shards differ in {name}: {first.settings.get(name)} and {value}; merge shards of one measurement"
                )
        for part in shard.parts:
            parts.setdefault((part.component, part.unit), part)
    keys: dict[str, str] = {}
    for part in (part for shard in loaded for part in shard.parts):
        if keys.setdefault(part.component, part.key) != part.key:
            raise WanlabError(
                f"these shards of {part.component} have other weights, ranges, layers or recordings; measure one again"
            )
    wanted = tuple(dict.fromkeys(name for shard in loaded for name in shard.wanted))
    return replace(first, parts=tuple(parts.values()), wanted=wanted, reused=0)


def settings_key(settings: dict[str, Any]) -> str:
    """Short hash of settings: the beginning of the names of all files."""
    return digest(settings)[:12]


def part_file(folder: Path, settings: dict[str, Any], component: str, unit: str, key: str) -> Path:
    """Where a part lies."""
    return folder / f"{settings_key(settings)}-{component}-{unit}-{key[:12]}.npz"


def write_manifest(
    folder: Path, settings: dict[str, Any], bands: dict, wanted: Sequence[str], keys: dict[str, str]
) -> None:
    """Say what the parts belong to; keys of components that another shard measures stay."""
    path = folder / f"{settings_key(settings)}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
    data = {
        "settings": settings,
        "bands": bands,
        "wanted": list(dict.fromkeys([*before.get("wanted", ()), *wanted])),
        "keys": before.get("keys", {}) | keys,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    os.replace(temporary, path)
