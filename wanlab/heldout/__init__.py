"""Held-out clips whose truth is known: photographs that nothing was trained on, moved by a known camera."""
