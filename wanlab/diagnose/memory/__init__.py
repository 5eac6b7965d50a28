"""Memory of a generation: what the peak consists of, use over time per component, and what each memory option saves."""
