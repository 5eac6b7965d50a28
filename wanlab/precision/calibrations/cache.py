"""Calibrations on disk: read back only for what they are true for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    from wanlab.precision.calibrations.calibration import Calibration, Identity

FORMAT = 1
MEND = "delete it, give another path, or calibrate with force=True"

# Fields of `Identity` in the order in which a difference is told, and what they are called then.
_PARTS = {
    "model": "model",
    "component": "component",
    "weights": "weights",
    "layers": "layer set",
    "data": "data",
    "method": "method",
    "elements": "number of counted values",
    "version": "wanlab version",
}


def check(path: Path, found: Calibration, wanted: Identity, layers: Sequence[str]) -> None:
    """Raise a `WanlabError` that names every part in which a cached calibration is not what is wanted."""
    differing = [name for name in _PARTS if getattr(found.identity, name) != getattr(wanted, name)]
    if differing:
        reasons = "; ".join(_reason(name, found, wanted, layers) for name in differing)
        raise WanlabError(f"calibration cache {path} does not fit: {reasons}; {MEND}")


def _reason(name: str, found: Calibration, wanted: Identity, layers: Sequence[str]) -> str:
    what, had, want = _PARTS[name], getattr(found.identity, name), getattr(wanted, name)
    if name == "layers":
        more, fewer = set(layers) - set(found.layers), set(found.layers) - set(layers)
        parts = [f"{len(more)} more, e.g. {min(more)}"] if more else []
        parts += [f"{len(fewer)} fewer, e.g. without {min(fewer)}"] if fewer else []
        return f"another {what} ({', '.join(parts)})"
    if name in ("weights", "data"):
        return f"other {what} ({had[:8]} there, {want[:8]} here)"
    return f"another {what} ({_said(had)} there, {_said(want)} here)"


def _said(value) -> str:
    return ", ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def write(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON and, beside it, its histograms as safetensors; whole or not at all."""
    import torch
    from safetensors.torch import save

    if path.suffix != ".json":
        raise WanlabError(f"{path} does not end in .json; a calibration cache does")
    histograms = list(calibration.histograms.values())
    tensors = save(
        {
            "counts": torch.stack([histogram.counts for histogram in histograms]),
            "call_amax": torch.tensor(list(calibration.call_amax.values()), dtype=torch.float64),
        }
    )
    data = {
        "format": FORMAT,
        "key": calibration.key,
        "identity": vars(calibration.identity),
        "tensors": hashlib.sha256(tensors).hexdigest(),
        "layers": [
            {"layer": layer, "amax": amax, "max": histogram.amax, "exponent": histogram.exponent}
            for (layer, amax), histogram in zip(calibration.amax.items(), histograms, strict=True)
        ],
        "calls": calibration.calls,
    }
    data["sha256"] = _digest(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The JSON comes last: until it is there, and says their hash, the tensors count for nothing.
    _replace(path.with_suffix(".safetensors"), tensors)
    _replace(path, json.dumps(data, indent=1).encode())


def read(path: Path) -> Calibration:
    """A calibration from its files.

    Raises:
        WanlabError: missing, truncated or changed since they were written.
    """
    from safetensors.torch import load

    from wanlab.precision.calibrations.calibration import Calibration, Identity
    from wanlab.precision.calibrations.observers import Histogram

    if not path.is_file():
        raise WanlabError(
            f"no calibration cache at {path}; make it with wanlab.precision.calibrate(cache=...)"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise WanlabError(f"calibration cache {path} is of another wanlab; {MEND}")
        identity = Identity(**data["identity"])
        tensors = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(tensors).hexdigest() != data["tensors"]:
            raise ValueError(f"{path.with_suffix('.safetensors').name} is not the file that was written")
        if data.pop("sha256") != _digest(data):
            raise ValueError("it was changed since it was written")
        held = load(tensors)
        layers = [entry["layer"] for entry in data["layers"]]
        return Calibration(
            identity=identity,
            amax={entry["layer"]: float(entry["amax"]) for entry in data["layers"]},
            histograms={
                entry["layer"]: Histogram(counts, int(entry["exponent"]), float(entry["max"]))
                for entry, counts in zip(data["layers"], held["counts"], strict=True)
            },
            calls=tuple(data["calls"]),
            call_amax={
                layer: tuple(values) for layer, values in zip(layers, held["call_amax"].tolist(), strict=True)
            },
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        missing = isinstance(error, KeyError) and f"no {error}"
        reason = missing or (str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise WanlabError(f"calibration cache {path} is broken ({reason}); {MEND}") from error


def _digest(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
