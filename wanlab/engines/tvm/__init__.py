"""Apache TVM as an engine: a graph compiled operator by operator for this processor, or for an NVIDIA GPU."""
