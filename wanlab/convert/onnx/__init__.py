"""Networks as ONNX graphs: forms that export well, tracing, folding, simplification, check, receipts."""
