"""One thing that is wrong with an engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wanlab.convert.card.layers import Layer


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where.

    Attributes:
        rule: which check found it, the same words in every engine.
        hazard: what is wrong here, with its number. mitigation: what to do. help: why it matters, or where to read on.
        layers: that it concerns. size_bytes: that it costs, 0 where that is not the point.
    """

    rule: str
    hazard: str
    mitigation: str
    help: str
    layers: tuple[Layer, ...]
    size_bytes: int = 0

    @property
    def time_ms(self) -> float:
        """Of its layers; NaN without times."""
        return total_ms(self.layers)

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        return {
            "hazard": self.hazard,
            "mitigation": self.mitigation,
            "help": self.help,
            "layers": len(self.layers),
            "time_ms": self.time_ms,
            "size_bytes": self.size_bytes,
            "example": self.layers[0].name if self.layers else "",
        }


def total_ms(layers: Iterable[Layer]) -> float:
    """Sum of the times that are known; NaN when none is."""
    times = [layer.time_ms for layer in layers if not math.isnan(layer.time_ms)]
    return math.fsum(times) if times else math.nan


def counted(layers: Iterable[Layer], most: int = 6) -> str:
    """`24 Cast, 2 Transpose and 3 others`."""
    counts = Counter(layer.type for layer in layers).most_common()
    others = sum(n for _, n in counts[most:])
    return ", ".join(f"{n} {name}" for name, n in counts[:most]) + (f" and {others} others" if others else "")


def mib(size_bytes: float) -> str:
    """Bytes as text with a fitting unit."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size_bytes >= size:
            return f"{size_bytes / size:,.1f} {unit}"
    return f"{size_bytes / 2**10:,.1f} KiB"
