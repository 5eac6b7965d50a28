"""The answer of a notebook: a headline, sentences below it and key figures, for a reader who has never seen wanlab."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from wanlab.core.stats import interval_text
from wanlab.core.words import NAMES

LONGEST = 240
"""Characters of a headline: four lines of a phone."""
MOST_DETAILS = 4
MOST_TILES = 5
SMALLEST_PERCENT = 0.01
"""A smaller quality loss is not shown as 0.00."""
SMALLEST = 1e-4
"""A smaller figure is shown as "< 0.0001": nobody reads a power of ten on a phone."""


class Tile(NamedTuple):
    """A key figure: what it is, its value with the unit, and its interval or what it is read against."""

    title: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Answer:
    """What a notebook found, for a reader who has ten seconds; `Run.verdict` shows it.

    Attributes:
        headline: one or two plain sentences: what holds, its figure, and how sure it is; at most `LONGEST` characters, no
            name of a file or a column.
        details: sentences that explain or limit it, at most `MOST_DETAILS`; what to do next is the last.
        tiles: key figures, the most important first; at most `MOST_TILES`.
    """

    headline: str
    details: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.headline, *self.details])


def answer(headline: str, *details: str, tiles: tuple[tuple[str, str, str] | None, ...] = ()) -> Answer:
    """An answer without its empty details and without tiles that are None."""
    shown = tuple(detail.strip() for detail in details if detail.strip())
    return Answer(headline, shown, tuple(Tile(*tile) for tile in tiles if tile is not None))


def component_text(name: str) -> str:
    """A component's name for readers: "expert_high" as "high-noise expert"."""
    return NAMES.get(name, str(name).replace("_", " "))


def shown(value: float | None, unit: str = "") -> str:
    """A figure with its unit in three significant digits, never as a power of ten; "unknown" for None and NaN.

    Args:
        unit: "ms" becomes seconds from 1,000 on, "bytes" becomes KiB, MiB or GiB.
    """
    if value is None or math.isnan(value):
        return "unknown"
    if unit == "ms" and abs(value) >= 999.5:
        value, unit = value / 1e3, "s"
    if unit == "bytes":
        size = next((size for size in (30, 20) if abs(value) >= 2**size), 10)
        value, unit = value / 2**size, {30: "GiB", 20: "MiB", 10: "KiB"}[size]
    if 0 < abs(value) < SMALLEST:
        text = f"< {SMALLEST:.4f}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.4f}"
    return f"{text} {unit}".rstrip()


def time_text(time_ms: float) -> str:
    """A time with its unit, in three digits: `"1,234 s"`, `"56.8 s"`, `"0.12 ms"`."""
    return shown(time_ms, "ms")


def size_text(size_bytes: float) -> str:
    """A size with its unit, in three digits: `"1.25 GiB"`, `"310 MiB"`."""
    return shown(size_bytes, "bytes")


def percent_text(percent: float, smallest: float = SMALLEST_PERCENT) -> str:
    """A share in three digits; one that is smaller than `smallest` is said to be so, and is no row of zeros."""
    return shown(percent, "%") if not 0 < abs(percent) < smallest else f"less than {smallest:g} %"


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


def between_text(low: float | None, high: float | None) -> str:
    """A 95 % interval as `shown` writes figures: "95 % interval 72.4 to 347", or "95 % interval unknown"."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return interval_text(None, None)
    return f"95 % interval {shown(low)} to {shown(high)}"


def apart_text(relative: float) -> str:
    """A relative distance in percent: 0.0047 as "0.47 %"."""
    return shown(float(f"{100 * relative:.2g}"), "%")


def speed_text(
    ratio: float,
    low: float = math.nan,
    high: float = math.nan,
    *,
    candidate: str,
    baseline: str,
    same: bool = False,
    noise_percent: float = math.nan,
    how: str = "as fast",
) -> str:
    """How fast one is beside another, in a clause with its interval.

    Args:
        ratio, low, high: speed-up of the candidate with its 95 % interval, NaN where it is unknown.
        same: whether it cannot be told from noise.
        noise_percent: noise that it was read against.
        how: words after "2.00 times".
    """
    if same:
        noise = f", noise {noise_percent:.0f} %" if noise_percent >= 1 else ""
        return (
            f"{candidate} cannot be told from {baseline} in time: {ratio:.2f} times {how}"
            f" ({interval_text(low, high)}{noise})"
        )
    slower = f"slower than {baseline}: {ratio:.2f} times {how}"
    faster = f"{ratio:.2f} times {how} as {baseline}"
    return f"{candidate} is {slower if ratio < 1 else faster} ({interval_text(low, high)})"


def capital(text: str) -> str:
    """A clause with a capital letter at its beginning; names of products keep theirs."""
    return f"{text[:1].upper()}{text[1:]}"


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(number: int, word: str) -> str:
    """A number with its noun: "1 case", "2 cases"."""
    return f"{number:,} {word}{'s' * (number != 1)}"
