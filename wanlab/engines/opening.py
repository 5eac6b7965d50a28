"""Any engine from what the user has: a file, or a component of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.engines.base import Engine
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.engines.tensorrt.engine import TensorRTEngine
from wanlab.engines.tvm.engine import TvmEngine

SUFFIXES = {".onnx": "ONNX Runtime", ".engine": "TensorRT", ".plan": "TensorRT", ".so": "TVM"}


def open_engine(path: str | os.PathLike, **options: Any) -> Engine:
    """The engine of a file, by its suffix.

    Args:
        path: `.onnx` (ONNX Runtime), `.engine` or `.plan` (TensorRT), `.so` (TVM).
        options: of `OrtEngine`, `TensorRTEngine` or `TvmEngine`.

    Raises:
        WanlabError: no such file, a suffix that no engine has, or as the engine itself.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        raise WanlabError(f"{path} is no engine; give a file that ends in {known}")
    if not path.is_file():
        raise WanlabError(f"no file at {path}")
    if path.suffix == ".onnx":
        return OrtEngine(path, **options)
    if path.suffix == ".so":
        return TvmEngine(path, **options)
    return TensorRTEngine(path, **options)
