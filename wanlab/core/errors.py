"""Exceptions: one for mistakes of the user, one for faults of wanlab; and other errors as one line of text."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class WanlabError(Exception):
    """A mistake that the user can mend: one line that says what, where and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


class InternalError(AssertionError):
    """A fault of wanlab, which the user cannot mend: the command line shows it with its traceback."""


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of a text or of an error's message, cut to `limit` characters; the error's class if it is empty."""
    text = str(error).strip() or ("no message" if isinstance(error, str) else type(error).__name__)
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
