"""ONNX exports that the modules and processes of a session share: each kind is traced once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from wanlab import export
from wanlab.core.digests import weights_key
from wanlab.export import ExportReport
from wanlab.export.components import PARTS


def exported(
    cache: Path,
    model: Any,
    components: str | Sequence[str],
    folder: Path | None = None,
    *,
    dynamic: bool | Collection[str] = True,
    **settings: Any,
) -> list[ExportReport]:
    """Reports of `export_all(model, folder, components, dynamic=dynamic, **settings)`, from the cache where it has them.

    What is missing is exported into the cache; the product's own lock and check of keys decide what is current there.

    Args:
        cache: the folder that the session shares.
        components: one name, or several in the order of the reports.
        folder: where the files are copied, for tests that write beside them; None gives those of the cache, to read only.
        dynamic: as in `export_all`.
    """
    names = [components] if isinstance(components, str) else list(components)
    free = names if dynamic is True else [] if dynamic is False else list(dynamic)
    reports: dict[str, ExportReport] = {}
    for chosen in ([name for name in names if name in free], [name for name in names if name not in free]):
        if not chosen:
            continue
        source = cache / _key(model, chosen[0] in free, settings)
        how = {"dynamic": chosen[0] in free, "progress": False} | settings
        made = export.export_all(model, source, tuple(chosen), **how)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                if file.name.partition(".")[0] in chosen:
                    shutil.copy(file, folder)
            made = export.export_all(model, folder, tuple(chosen), **how)
        reports |= {report.component: report for report in made}
    return [reports[name] for name in names]


def _key(model: Any, dynamic: bool, settings: dict[str, Any]) -> str:
    """Name of the folder of one model's exports with one set of settings."""
    networks = {part: getattr(model.pipeline, part, None) for part in sorted(set(PARTS.values()))}
    weights = {part: weights_key(network) for part, network in networks.items() if network is not None}
    facts = [model.spec.name, weights, dynamic, sorted(settings.items())]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
