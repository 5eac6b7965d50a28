"""Precision as data: rules, files, presets, and what they come to on a model."""
