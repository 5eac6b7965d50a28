"""The answer of a notebook: a headline, sentences below it and key figures, for a reader who has never seen wanlab."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from wanlab.core.stats import interval_text

COMPONENT_NAMES = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
    "image_encoder": "image encoder",
    "vae_encoder": "VAE encoder",
    "expert": "expert",
    "expert_high": "high-noise expert",
    "expert_low": "low-noise expert",
    "vae_decoder": "VAE decoder",
    "other": "other",
}
"""Name of a component -> its name for readers."""

SMALLEST = 1e-4
"""A smaller figure is shown as "< 0.0001": nobody reads a power of ten on a phone."""


class Tile(NamedTuple):
    """A key figure: what it is, its value with the unit, and its interval or what it is read against."""

    title: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Answer:
    """What a notebook found, for `Run.verdict`.

    Attributes:
        headline: the answer in one or two plain sentences, with its figure and how sure it is; at most 240 characters.
        details: sentences that explain or limit it, the next step among them; at most four.
        tiles: the key figures, the most important first; at most five.
    """

    headline: str
    details: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()


def component_text(name: str) -> str:
    """A component's name for readers: "expert_high" as "high-noise expert"."""
    return COMPONENT_NAMES.get(name, str(name).replace("_", " "))


def shown(value: float | None, unit: str = "") -> str:
    """A figure with its unit in three significant digits, never as a power of ten; "unknown" for None and NaN.

    Args:
        unit: "ms" becomes seconds from 1,000 on, "bytes" becomes KiB, MiB or GiB.
    """
    if value is None or math.isnan(value):
        return "unknown"
    if unit == "ms" and abs(value) >= 1e3:
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
