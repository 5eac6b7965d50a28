"""Names and figures of bars that a phone has room for."""

from __future__ import annotations

import textwrap

NAME_LETTERS = 18
"""Letters of a line of a bar's name: on a phone more leave no room for the bars."""
BESIDE = 1.62
"""An axis is so many times as long as its longest bar, so that "5.43 s · 50 %" has room beside it on a phone."""


def name_lines(name: str, letters: int = NAME_LETTERS) -> str:
    """A bar's name in lines that a phone has room for."""
    return "<br>".join(textwrap.wrap(name, letters, break_long_words=False)) or name
