"""ONNX Runtime as an engine."""

from wanlab.convert.ort.engine import OrtEngine, load_engines

__all__ = ["OrtEngine", "load_engines"]
