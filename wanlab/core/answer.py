"""The answer of a notebook: a headline, sentences below it, and key figures; and figures as a reader says them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanlab.core.stats import interval_text

LONGEST = 240
"""Characters of a headline: four lines of a phone."""
MOST_DETAILS = 4
MOST_TILES = 5
SMALLEST_PERCENT = 0.01
"""A smaller quality loss is not shown as 0.00."""


@dataclass(frozen=True)
class Answer:
    """What a notebook found, for a reader who has ten seconds.

    Attributes:
        headline: one or two plain sentences: what holds, its figure, and how sure it is; at most `LONGEST` characters, no
            name of a file or a column.
        details: sentences that explain or limit it, at most `MOST_DETAILS`; what to do next is the last.
        tiles: key figures: title, value with its unit, and what it is read against; at most `MOST_TILES`.
    """

    headline: str
    details: tuple[str, ...] = ()
    tiles: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.headline, *self.details])


def answer(headline: str, *details: str, tiles: tuple[tuple[str, str, str] | None, ...] = ()) -> Answer:
    """An answer without its empty details and without tiles that are None."""
    shown = tuple(detail.strip() for detail in details if detail.strip())
    return Answer(headline, shown, tuple(tile for tile in tiles if tile is not None))


def time_text(time_ms: float) -> str:
    """A time with its unit, in three digits: `"1,234 s"`, `"56.8 s"`, `"0.12 ms"`."""
    return f"{_digits(time_ms / 1e3)} s" if abs(time_ms) >= 999.5 else f"{_digits(time_ms)} ms"


def size_text(size_bytes: float) -> str:
    """A size with its unit, in three digits: `"1.25 GiB"`, `"310 MiB"`."""
    large = abs(size_bytes) >= 0.9995 * 2**30
    return f"{_digits(size_bytes / 2**30)} GiB" if large else f"{_digits(size_bytes / 2**20)} MiB"


def percent_text(percent: float, smallest: float = 0.01) -> str:
    """A share in three digits; one that is smaller than `smallest` is said to be so, and is no row of zeros."""
    return f"{_digits(percent)} %" if not 0 < abs(percent) < smallest else f"less than {smallest:g} %"


def ratio_text(ratio: float, low: float | None = None, high: float | None = None, *, beside: str = "") -> str:
    """How fast one is beside another: `"1.73 times as fast as eager (95 % interval 1.70 to 1.77)"`; without an interval
    where there is none."""
    known = not any(end is None or math.isnan(end) for end in (low, high))
    against = f" as {beside}" if beside else ""
    return f"{ratio:.2f} times as fast{against}" + (f" ({interval_text(low, high)})" if known else "")


def loss_texts(percent: float, low: float | None, high: float | None) -> tuple[str, str]:
    """A quality loss and its interval, for a key figure; what is below 0.01 % is said to be so."""
    ends = [abs(value) for value in (percent, low, high) if value is not None and value == value]
    if len(ends) == 3 and max(ends) < SMALLEST_PERCENT:
        return f"< {SMALLEST_PERCENT:g} %", f"95 % interval within ±{SMALLEST_PERCENT:g} %"
    value = f"{percent:+.2f} %" if abs(percent) >= SMALLEST_PERCENT else f"< {SMALLEST_PERCENT:g} %"
    return value, interval_text(low, high, "+.2f")


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop; "" stays empty."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1:] in '.!?' else '.'}" if text else ""


def _digits(value: float) -> str:
    if 0 < abs(value) < 1e-3:  # in words, not as 4.7e-05
        return "below 0.001"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.3g}"
