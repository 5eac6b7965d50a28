"""Exceptions: one for mistakes of the user, one for faults of wanlab; and text that is safe to show, in one line."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

ESCAPE = re.compile(
    r"""
    (?:\x1b\[|\x9b) [0-?]* [ -/]* [@-~]                        # colours, cursor, clearing
    | (?:\x1b\]|\x9d) [^\x07\x1b\x9c]* (?:\x07|\x1b\\|\x9c)?  # titles, links, clipboard
    | (?:\x1b[PX^_]|[\x90\x98\x9e\x9f]) [^\x1b\x9c]* (?:\x1b\\|\x9c)?  # strings to the device
    | \x1b [ -/]* [0-~]                                        # other short ones
    """,
    re.VERBOSE,
)
"""Escape sequences of a terminal; source: ECMA-48."""
# Control characters, halves of surrogate pairs, and characters that turn the direction of the text after them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


# As CONTROL without line end and tab: most text, which can be megabytes, has none and is done.
SUSPECT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def clean(text: object, keep: str = "\n\t", *, colours: bool = False) -> str:
    """Text from a file, a run or an exception, without what a terminal would obey and a page would hide.

    Escape sequences are removed, other control characters become U+FFFD. Every way out uses it: the terminal, run.json,
    status.json, logs, the report and the pages.

    Args:
        keep: control characters that stay.
        colours: whether colours stay, for the report, which shows them.
    """
    if colours:
        parts = COLOUR.split(str(text))
        return "".join(part if index % 2 else clean(part, keep) for index, part in enumerate(parts))
    words = str(text)
    if keep == "\n\t" and not SUSPECT.search(words):
        return words
    words = ESCAPE.sub("", words)
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else "\N{REPLACEMENT CHARACTER}", words)


def cleaned(value: Any) -> Any:
    """`clean` of every text inside lists and dicts."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return [*map(cleaned, value)] if isinstance(value, list | tuple) else value


class WanlabError(Exception):
    """A mistake that the user can mend: one line that says what, where and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __str__(self) -> str:
        return clean(" ".join(super().__str__().splitlines()), keep="\t")


class InternalError(AssertionError):
    """A fault of wanlab, which the user cannot mend: the command line shows it with its traceback."""


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of a text or of an error's message, cut to `limit` characters; the error's class if it is empty."""
    text = clean(error).strip() or ("no message" if isinstance(error, str) else type(error).__name__)
    return text.splitlines()[0][:limit]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'steps'?)"`, or an empty string when no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def require(module: str, install: str) -> ModuleType:
    """Import an optional package, or say in one line how to get it.

    Args:
        module: import name, e.g. `"onnxruntime"`.
        install: name of the package for pip, e.g. `"onnxruntime-gpu"`.

    Raises:
        WanlabError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A broken dependency of an installed package must not be mistaken for a missing package.
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise WanlabError(f"{module} is not installed; add it with: pip install {install}") from error
