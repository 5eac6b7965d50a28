"""Conversion: networks as ONNX graphs, checked against PyTorch, and run by ONNX Runtime.

>>> from wanlab import convert
>>> reports = convert.export_all(model, "onnx/wan-nano")
>>> convert.parity(model, "expert_high", reports[2].path)
>>> fast = convert.use(model, convert.load_engines("onnx/wan-nano"))
>>> fast.generate(image, prompt)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanlab.convert.clip import ClipShape
    from wanlab.convert.compare import parity
    from wanlab.convert.isolated import isolated_cost
    from wanlab.convert.onnx_export import export, export_all
    from wanlab.convert.ort import OrtEngine, load_engines
    from wanlab.convert.pipeline import use
    from wanlab.convert.report import ExportReport, report_frame

_HOMES = {
    "ClipShape": "clip",
    "ExportReport": "report",
    "OrtEngine": "ort",
    "export": "onnx_export",
    "export_all": "onnx_export",
    "isolated_cost": "isolated",
    "load_engines": "ort",
    "parity": "compare",
    "report_frame": "report",
    "use": "pipeline",
}
__all__ = [
    "ClipShape",
    "ExportReport",
    "OrtEngine",
    "export",
    "export_all",
    "isolated_cost",
    "load_engines",
    "parity",
    "report_frame",
    "use",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
