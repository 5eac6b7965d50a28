"""Folders of the files that come with wanlab (data, notebooks, recipes), of runs, and of what can be made again.

In a checkout these folders are at the top; a wheel carries copies of them inside the package (`setup.py`). The checkout
has priority. All code that opens one of these files gets its path here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import digest

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGED = {"data": "_data", "notebooks": "_notebooks", "recipes": "_recipes"}
"""Folder at the top of a checkout -> folder of its copy inside an installed package."""


def _checkout() -> Path | None:
    top = PACKAGE.parent
    return top if (top / "pyproject.toml").is_file() and (top / "notebooks").is_dir() else None


CHECKOUT = _checkout()
"""The source tree that wanlab is imported from; None where a wheel was installed."""


def data(*parts: str) -> Path:
    """A path below `data/`: wan-nano, held-out clips, recorded results and sweeps, small traces."""
    return _shipped("data").joinpath(*parts)


def notebooks(*parts: str) -> Path:
    """A path below `notebooks/`: the notebooks that come with wanlab."""
    return _shipped("notebooks").joinpath(*parts)


def recipes(*parts: str) -> Path:
    """A path below `recipes/`: precision plans, configurations, and grids of sweeps."""
    return _shipped("recipes").joinpath(*parts)


def _shipped(folder: str) -> Path:
    return PACKAGE / PACKAGED[folder] if CHECKOUT is None else CHECKOUT / folder


def existing(path: Path) -> Path:
    """`path`, one of `data()`, `notebooks()` or `recipes()`, after a check that it exists.

    Raises:
        WanlabError: it does not exist; the message is the same for all files that come with wanlab.
    """
    if path.exists():
        return path
    mend = "install wanlab again" if CHECKOUT is None else "work in a full clone of the repository"
    raise WanlabError(f"{path} is missing, though it comes with wanlab; {mend}")


def locate(path: str | os.PathLike) -> Path:
    """Find a path from the working folder or, if it does not exist there, among the files that come with wanlab.

    `data/traces/x.json.gz`, `recipes/plan.yaml` and `notebooks/00_quickstart.ipynb` are found from any working folder. A
    path that exists nowhere is returned unchanged, so that its reader reports what is missing.
    """
    path = Path(path)
    if not path.parts or path.parts[0] not in PACKAGED or ".." in path.parts or os.path.exists(path):
        return path
    shipped = _shipped(path.parts[0]).joinpath(*path.parts[1:])
    return shipped if os.path.exists(shipped) else path


def locate_all(pattern: str) -> list[str]:
    """Files that come with wanlab and match a pattern such as `recipes/*.yaml`, as sorted names for `locate`."""
    folder, _, rest = pattern.partition("/")
    if folder not in PACKAGED or not rest or ".." in Path(rest).parts:
        return []
    top = _shipped(folder)
    return sorted(f"{folder}/{p.relative_to(top).as_posix()}" for p in top.glob(rest) if p.is_file())


def find_notebook(name: str | os.PathLike) -> Path:
    """The file of a notebook, from a path or only its name, such as `00_quickstart`.

    A file in the working folder has priority, then one in its `notebooks/`, then the one that comes with wanlab.

    Raises:
        WanlabError: there is no such notebook; the message suggests the most similar name.
    """
    path = locate(name)
    if os.path.isfile(path):
        return path
    folders = [path.parent]
    if len(path.parts) == 1:
        folders = [Path(), Path("notebooks"), notebooks()]
        file = path.name if path.suffix == ".ipynb" else f"{path.name}.ipynb"
        for folder in folders:
            if os.path.isfile(folder / file):
                return folder / file
    known = [
        file.stem if path.suffix != ".ipynb" else file.name for folder in folders for file in _in(folder)
    ]
    begun = [name for name in dict.fromkeys(known) if name.startswith(path.stem)]
    hint = did_you_mean(begun[0] if len(begun) == 1 else path.name, dict.fromkeys(known))
    if not hint and len(path.parts) == 1:
        hint = ", and none that comes with wanlab has this name; `wanlab notebooks` lists those"
    raise WanlabError(f"no notebook at {path}{hint}")


def _in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ipynb")) if folder.is_dir() else []


def from_here(path: Path) -> str:
    """`path` relative to the working folder; unchanged where it lies outside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def source_digest(*packages: str) -> str:
    """Digest of wanlab's own Python files, or of those of some of its packages, such as `"export"`.

    A checkout and a wheel made from it have the same digest.
    """
    parts: list[str | bytes] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] in packages or (not packages and name.parts[0] not in PACKAGED.values()):
            parts += [name.as_posix(), path.read_bytes()]
    return digest(parts, 16)


def cache(*parts: str) -> Path:
    """A path in the folder of what can be made again: `$WANLAB_CACHE`, or `wanlab` in the user's folder of caches."""
    chosen = os.environ.get("WANLAB_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return (Path(chosen) if chosen else user / "wanlab").joinpath(*parts)


def _home() -> Path:
    """The user's folder; in a container without HOME and without an entry for the user, one for temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"wanlab-{os.getuid()}"


def default_outputs() -> Path:
    """`outputs/` of the project that contains the working folder, else of the working folder itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "outputs").is_dir() or (folder / "environment.yml").is_file():
            return folder / "outputs"
    return here / "outputs"
