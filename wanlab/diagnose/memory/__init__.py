"""Memory of a generation: the peak explained, what each part holds over time, and what each option would save."""
