"""Where things are: the data that comes with wanlab, and the folder of all runs."""

from __future__ import annotations

from pathlib import Path


def default_outputs() -> Path:
    """`outputs/` of the project around the working folder, else of the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "outputs").is_dir() or (folder / "environment.yml").is_file():
            return folder / "outputs"
    return here / "outputs"
