"""Any engine from what the user has: a file, or a component of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    from wanlab.convert.engine import Engine

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
        from wanlab.convert.ort import OrtEngine

        return OrtEngine(path, **options)
    if path.suffix == ".so":
        from wanlab.convert.tvm.engine import TvmEngine

        return TvmEngine(path, **options)
    from wanlab.convert.tensorrt.engine import TensorRTEngine

    return TensorRTEngine(path, **options)
