"""Python files of a user that add to a registry, named by an environment variable."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import traceback
from pathlib import Path

from wanlab.core.errors import WanlabError, first_line


def run_files(names: str, variable: str, prefix: str) -> None:
    """Run Python files, which register what they add.

    Args:
        names: their paths, separated by commas: the value of an environment variable. variable: its name, for messages.
        prefix: beginning of the names of their modules.

    Raises:
        WanlabError: there is no such file, or it does not run; the message names the line.
    """
    for name in filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        if not path.is_file():
            raise WanlabError(
                f"{variable} names {name}, where there is no file; give the path of a Python file"
            )
        loader = importlib.machinery.SourceFileLoader(f"{prefix}_{path.stem}", str(path))
        spec = importlib.machinery.ModuleSpec(loader.name, loader, origin=str(path))
        spec.has_location = True
        try:
            loader.exec_module(importlib.util.module_from_spec(spec))
        except WanlabError:
            raise
        except (Exception, SystemExit) as error:  # whatever a file of someone else's raises
            line = traceback.extract_tb(error.__traceback__)[-1]
            at = getattr(error, "lineno", None) or (line.lineno if line.filename == str(path) else None)
            place = f"line {at}: " if at else ""
            reason = f"{type(error).__name__}: {first_line(error) or error}"
            raise WanlabError(f"{variable} names {name}, which does not run: {place}{reason}") from error
