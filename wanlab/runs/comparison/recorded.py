"""Sweeps that are part of the project: recorded runs that its notebooks read where no other folder is given."""

from __future__ import annotations

import os
from pathlib import Path

from wanlab.errors import WanlabError

SWEEPS = Path(__file__).resolve().parents[3] / "data" / "sweeps"


def sweep_folder(given: str | os.PathLike | None, recorded: str) -> Path:
    """The folder of a sweep that was given, else of a recorded one.

    Raises:
        WanlabError: it is not there.
    """
    if given is not None:
        path = Path(given)
        if not path.is_dir():
            raise WanlabError(f"no folder of a sweep at {path}; give the folder that holds its sweep.json")
        return path
    path = SWEEPS / recorded
    if not (path / "sweep.json").is_file():
        raise WanlabError(
            f"the recorded sweep {recorded} is not in data/sweeps; work in a source checkout, or give the folder of a sweep"
            " (sweep=outputs/<name>, made by `wanlab sweep`)"
        )
    return path


def built_records(folder: str | os.PathLike | None, sweep: Path):
    """Receipts of engines that were only built, from a folder.

    None looks for `built/` beside the sweep's runs, and for a sweep of the project in its recorded results.

    Raises:
        WanlabError: the folder that was given is not there.
    """
    from wanlab.measure import RESULTS, read_platforms

    own = RESULTS if sweep.parent == SWEEPS else sweep / "built"
    path = own if folder is None else Path(folder)
    if folder is not None and not path.is_dir():
        raise WanlabError(
            f"no folder of build receipts at {path}; 22_tensorrt leaves them beside its engines"
        )
    return (
        [record for record in read_platforms([path])[0] if record.state == "built only"]
        if path.is_dir()
        else []
    )
