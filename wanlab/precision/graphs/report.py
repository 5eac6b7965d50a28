"""What came of quantising a graph."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer of a quantised graph.

    Attributes:
        layer: module path.
        format: name of its format.
        nodes: of the graph that compute it.
        activation_amax: largest magnitude that its input's codes reach; None where the input is not quantised.
        activation_scale: of its input, as stored. shared_with: layers that read the same codes.
        weight_bytes: of codes and scales. weight_before_bytes: in the graph that was read.
    """

    layer: str
    format: str
    nodes: int
    activation_amax: float | None
    activation_scale: float | None
    shared_with: tuple[str, ...]
    weight_bytes: int
    weight_before_bytes: int


@dataclass(frozen=True)
class QuantizedReport:
    """What came of quantising a graph; read back from the written file.

    Attributes:
        path, source: the graph written and the graph read.
        model, component: as the source's metadata says; empty where it does not.
        key: hash of source, formats by layer, scales and package version.
        layers: every layer that was asked for.
        quantized: format -> layers of it found in the written file with weight and input as asked.
        layer_set: hash of the set of layers. calibration: key of the calibration; empty without.
        opset_before, opset: of source and result.
        dtype: that the graph computes in outside the codes.
        size_before_bytes, size_bytes: of source and result, weights included.
        weights_file: file of the weights beside the graph; empty when they are in it.
        time_ms: reading, rounding, writing and checking.
    """

    path: str
    source: str
    model: str
    component: str
    key: str
    layers: tuple[QuantizedLayer, ...]
    quantized: dict[str, int]
    layer_set: str
    calibration: str
    opset_before: int
    opset: int
    dtype: str
    size_before_bytes: int
    size_bytes: int
    weights_file: str
    time_ms: float

    @property
    def asked(self) -> dict[str, int]:
        """Format -> layers asked for."""
        return dict(Counter(layer.format for layer in self.layers))

    def frame(self) -> pd.DataFrame:
        """One row per layer, columns as in `QuantizedLayer`."""
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def row(self) -> dict[str, object]:
        """One flat row of a table."""
        return {
            "component": self.component,
            "formats": ", ".join(f"{count} {name}" for name, count in self.quantized.items()),
            "dtype": self.dtype,
            "opset": self.opset,
            "size_before_bytes": self.size_before_bytes,
            "size_bytes": self.size_bytes,
            "calibration": self.calibration[:12],
            "time_ms": self.time_ms,
        }

    def write(self) -> Path:
        """Keep the report beside its file, in one step."""
        path = Path(self.path).with_suffix(".json")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(temporary, path)
        return path


def read_quantized_report(path: str | os.PathLike) -> QuantizedReport | None:
    """The report beside a quantised ONNX file; None when there is none that can be read."""
    try:
        data = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
        data["layers"] = tuple(
            QuantizedLayer(**layer | {"shared_with": tuple(layer["shared_with"])}) for layer in data["layers"]
        )
        return QuantizedReport(**data)
    except (OSError, ValueError, TypeError, KeyError):
        return None
