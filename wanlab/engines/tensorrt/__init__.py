"""TensorRT and TensorRT for RTX: ONNX graphs built into engines, and engines run."""
