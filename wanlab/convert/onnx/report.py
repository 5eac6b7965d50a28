"""What came of an export, kept beside its file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.clip import ClipShape

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ExportReport:
    """What came of one export.

    Attributes:
        path: the ONNX file; a `.json` with this report lies beside it, and `weights_file` if any.
        key: hash of everything that the file depends on; the file is reused while it stays the same.
        nodes_before: nodes as traced, without any folding.
        nodes_after: nodes in the file.
        operators: operator -> how many nodes of it are in the file.
        dtype: that the graph computes in. stored_dtype: that its large weights have in the file.
        forms: `"friendly"`, or `"original"` where the network was traced as it is.
        dynamic_axes: input -> {axis: name} of the axes that may vary.
        fixed_axes: input -> {axis: size} of the axes that were asked to vary and do not.
        ranges: axis name -> sizes it was traced for, e.g. `"4*k + 1, k >= 1"`.
        shape: the clip that the example inputs were made for.
        size_bytes: the graph and the weights that it uses. weights_file: their file, empty when they are in the
            graph; other graphs may use it too. weights_written_bytes: of it by this export.
        time_ms: the whole export, or looking it up when `cached`.
        simplified: whether onnxsim went over the graph.
        cached: the file was there already and still true.
        shared_trace: the graph of an equal network was taken, with this one's weights.
        notes: what a reader should know, each one line.
    """

    path: str
    component: str
    key: str
    opset: int
    nodes_before: int
    nodes_after: int
    operators: dict[str, int]
    dtype: str
    stored_dtype: str
    forms: str
    dynamic_axes: dict[str, dict[int, str]]
    fixed_axes: dict[str, dict[int, int]]
    ranges: dict[str, str]
    shape: ClipShape
    size_bytes: int
    time_ms: float
    weights_file: str
    weights_written_bytes: int
    simplified: bool
    cached: bool = False
    shared_trace: bool = False
    notes: tuple[str, ...] = ()

    @property
    def external_data(self) -> bool:
        """Whether the weights are in a file of their own."""
        return bool(self.weights_file)

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        axes = sorted({name for axes in self.dynamic_axes.values() for name in axes.values()})
        fixed = sorted(
            {
                f"{name}[{axis}]={size}"
                for name, axes in self.fixed_axes.items()
                for axis, size in axes.items()
            }
        )
        return {
            "component": self.component,
            "opset": self.opset,
            "dtype": self.dtype,
            "stored_dtype": self.stored_dtype,
            "forms": self.forms,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "dynamic_axes": ", ".join(axes),
            "fixed_axes": ", ".join(fixed),
            "size_bytes": self.size_bytes,
            "time_ms": self.time_ms,
            "simplified": self.simplified,
            "external_data": self.external_data,
            "cached": self.cached,
            "shared_trace": self.shared_trace,
            "notes": "; ".join(self.notes),
        }


def report_frame(reports: list[ExportReport]) -> pd.DataFrame:
    """One row per export, the columns of `ExportReport.row`."""
    import pandas as pd

    return pd.DataFrame([report.row() for report in reports])


def read_report(path: str | os.PathLike) -> ExportReport | None:
    """The report beside an ONNX file; None when there is none that can be read."""
    try:
        data = json.loads(sidecar(Path(path)).read_text(encoding="utf-8"))
        data["shape"] = ClipShape(**data["shape"])
        data["notes"] = tuple(data["notes"])
        for name in ("dynamic_axes", "fixed_axes"):
            data[name] = {k: {int(axis): v for axis, v in axes.items()} for k, axes in data[name].items()}
        return ExportReport(**data)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_report(report: ExportReport) -> None:
    """Write the report beside its file, in one step."""
    path = sidecar(Path(report.path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    os.replace(temporary, path)


def sidecar(path: Path) -> Path:
    """Where the report of an ONNX file lies."""
    return path.with_suffix(".json")
