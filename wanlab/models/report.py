"""What a load cost, and whether the files were already in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COLD_BELOW, WARM_ABOVE = 0.05, 0.95


@dataclass(frozen=True)
class PartLoad:
    """Load of one part: bytes in its files, bytes on the device, and the share that was cached before."""

    part: str
    time_ms: float
    read_bytes: int
    memory_bytes: int
    cached_fraction: float | None

    @property
    def gb_per_s(self) -> float | None:
        """Bytes of the files per second, in 1e9; None when no file was read."""
        return self.read_bytes / self.time_ms / 1e6 if self.read_bytes and self.time_ms else None


@dataclass(frozen=True)
class LoadReport:
    """Load of a model: `weights` "pretrained" or "random", `time_ms` to a ready pipeline."""

    weights: str
    time_ms: float
    parts: tuple[PartLoad, ...]
    cached_fraction: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights and buffers on the device."""
        return sum(part.memory_bytes for part in self.parts)

    @property
    def gb_per_s(self) -> float | None:
        """Bytes of the files per second of the whole load, in 1e9; None when no file was read."""
        return self.read_bytes / self.time_ms / 1e6 if self.read_bytes and self.time_ms else None

    @property
    def state(self) -> str:
        """ "cold", "warm" or "partly cached", by what the page cache held before; "unknown"; "no files"."""
        if not self.read_bytes:
            return "no files"
        if self.cached_fraction is None:
            return "unknown"
        if self.cached_fraction < COLD_BELOW:
            return "cold"
        return "warm" if self.cached_fraction > WARM_ABOVE else "partly cached"

    def frame(self) -> pd.DataFrame:
        """One row per part and a row "total": time_ms, read_bytes, memory_bytes, gb_per_s, cached_percent.

        The total also counts tokenizer, scheduler and checks, so it is more than the sum; imports of packages
        are not counted.
        """
        import pandas as pd

        rows = [_row(part.part, part) for part in self.parts] + [_row("total", self)]
        return pd.DataFrame(rows)


def _row(name: str, load: PartLoad | LoadReport) -> dict[str, object]:
    cached = load.cached_fraction
    unknown = float("nan")
    return {
        "part": name,
        "time_ms": load.time_ms,
        "read_bytes": load.read_bytes,
        "memory_bytes": load.memory_bytes,
        "gb_per_s": unknown if load.gb_per_s is None else load.gb_per_s,
        "cached_percent": unknown if cached is None else 100 * cached,
    }
