"""How far videos are from one another."""

from __future__ import annotations

import numpy as np


def far(video: np.ndarray, other: np.ndarray) -> float:
    """Distance of two arrays, as a part of the size of the second."""
    return float(np.linalg.norm(video - other) / np.linalg.norm(other))
