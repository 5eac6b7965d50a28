"""Plans as explicit Q/DQ graphs for ONNX Runtime and TensorRT."""
