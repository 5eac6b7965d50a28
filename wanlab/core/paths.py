"""Where things are: the data that comes with wanlab, and the folder of all runs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent


def data(*parts: str) -> Path:
    """A path below the data that comes with wanlab: wan-nano, held-out clips, recorded results, small traces."""
    return CHECKOUT.joinpath("data", *parts)


def default_outputs() -> Path:
    """`outputs/` of the project around the working folder, else of the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "outputs").is_dir() or (folder / "environment.yml").is_file():
            return folder / "outputs"
    return here / "outputs"
