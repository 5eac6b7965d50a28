"""Names, figures and colours of bars that a phone has room for, and that can be read in a light and in a dark page."""

from __future__ import annotations

import textwrap

NAME_LETTERS = 18
"""Letters of a line of a bar's name: on a phone more leave no room for the bars."""
BESIDE = 1.62
"""An axis is so many times as long as its longest bar, so that "5.43 s · 50 %" has room beside it on a phone."""
DARK, LIGHT = "#14171a", "#ffffff"


def name_lines(name: str, letters: int = NAME_LETTERS) -> str:
    """A bar's name in lines that a phone has room for."""
    return "<br>".join(textwrap.wrap(name, letters, break_long_words=False)) or name


def text_on(fill: str) -> str:
    """The colour, almost black or white, in which text on this fill (#rrggbb) is read best."""
    channels = [int(fill[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    brightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # relative luminance of WCAG 2
    return DARK if (brightness + 0.05) ** 2 > 0.05 * 1.05 else LIGHT
