"""Exploring a trace: its events with the model in them, selections, questions in SQL, and the bytes that a view draws."""
