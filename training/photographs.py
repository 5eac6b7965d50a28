"""Many free photographs from packages that Debian publishes. None is contained in the repository.

    python -m training.photographs --to outputs/photographs

`photographs.json` beside this module is the list: the packages and their releases, and for each photograph its file,
licence, author and perceptual hash. It was chosen by eye: no drawings, gradients or logos. The held-out photographs go
into the folder `heldout`; no other picture of their packages may be learned from.

Needs Debian's apt and dpkg.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import shlex
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wanlab.core.errors import WanlabError
from wanlab.core.files import write_bytes, write_json

LIST = Path(__file__).with_suffix(".json")
HELD_OUT_SOURCES = frozenset(
    {
        "scikit-image", "scikit-learn", "matplotlib",  # wanlab's own held-out clips are cut from these
        "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "palapeli-data",
    }
)  # fmt: skip
"""Packages that no stage of training learns from."""

SHORT_SIDE_PX = 640
QUALITY = 92
HASH_SIDE = 16
SAME_PICTURE_BITS = 40
"""Hashes of one picture, scaled or compressed again, differ in fewer of their 256 bits; of two pictures, in more."""


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One row of the list. `file` is a path in the package; behind a colon, a path in that Qt resource file."""

    name: str
    package: str
    file: str
    licence: str
    author: str
    hash: str
    held_out: bool = False

    @property
    def path(self) -> Path:
        """Where the photograph lies in the folder that the command writes."""
        return Path("heldout" if self.held_out else "", f"{self.name}.jpg")


def perceptual_hash(image: Image.Image) -> str:
    """256 bits as hexadecimal: whether brightness rises from one cell of a 16x16 grid to the next (difference hash)."""
    cells = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(cells, dtype=np.int16)
    return np.packbits(values[:, 1:] > values[:, :-1]).tobytes().hex()


def distance(a: str, b: str) -> int:
    """Bits in which two hashes differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def check(photographs: list[Photograph]) -> None:
    """Refuse a name or a picture that is there twice, and a source that is held out in one place and not in the other.

    Raises:
        WanlabError: names the rows.
    """
    for photograph in photographs:
        if photograph.held_out != (photograph.package in HELD_OUT_SOURCES):
            wanted = "held out: it must not be trained on" if not photograph.held_out else "not held out"
            raise WanlabError(f"{photograph.name}: its source {photograph.package} is {wanted}")
    for a, b in itertools.combinations(photographs, 2):
        if a.name == b.name:
            raise WanlabError(f"two photographs are called {a.name}: rename one")
        bits = distance(a.hash, b.hash)
        if bits < SAME_PICTURE_BITS:
            raise WanlabError(f"{a.name} and {b.name} are one picture ({bits} bits apart): remove one")


def read_list(file: Path = LIST) -> tuple[dict[str, dict[str, str]], list[Photograph]]:
    """Sources (package -> its `release` and `version`) and photographs, checked."""
    content = json.loads(file.read_text(encoding="utf-8"))
    photographs = [Photograph(**row) for row in content["photographs"]]
    check(photographs)
    return content["sources"], photographs


def load(folder: Path, held_out: bool = False) -> list[np.ndarray]:
    """The photographs that the command wrote, in the order of its index: uint8 `[H, W, 3]`, short side at most 640.

    Raises:
        WanlabError: the folder has no index, or its index lists a held-out source for training.
    """
    index = folder / "index.json"
    if not index.is_file():
        raise WanlabError(f"{folder} has no photographs: python -m training.photographs --to {folder}")
    _, photographs = read_list(index)
    chosen = [folder / p.path for p in photographs if p.held_out == held_out]
    return [np.asarray(Image.open(path).convert("RGB")) for path in chosen]


def fetch(sources: dict[str, dict[str, str]], folder: Path) -> None:
    """Download the packages and unpack each into `folder/<package>`.

    apt gets a state of its own in the folder, so that packages of several releases can be had and the machine's
    settings stay as they are. The mirror is the one that the machine uses.
    """
    if shutil.which("apt-get") is None:
        raise WanlabError("the photographs come through apt, which is not here: run on Debian")
    query = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Origin: Debian"]
    targets = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    mirrors = [site for site, release in map(str.split, targets) if "-" not in release]
    if not mirrors:
        raise WanlabError("apt knows no Debian mirror: run on Debian, after apt-get update")
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True)
    releases = sorted({source["release"] for source in sources.values()})
    lines = [f"deb {mirrors[0]} {release} main\n" for release in releases]
    (state / "sources.list").write_text("".join(lines), encoding="utf-8")
    (state / "status").touch()
    places = {
        "State::lists": state / "lists", "State::status": state / "status", "Cache": state / "cache",
        "Etc::sourcelist": state / "sources.list", "Etc::sourceparts": "-", "Etc::preferencesparts": "-",
    }  # fmt: skip
    apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
    apt += itertools.chain.from_iterable(("-o", f"Dir::{name}={place}") for name, place in places.items())
    packages = folder / "packages"
    packages.mkdir()
    wanted = [f"{package}/{source['release']}" for package, source in sources.items()]
    for command in (["update"], ["download", *wanted]):
        done = subprocess.run([*apt, *command], cwd=packages, capture_output=True, text=True)
        if done.returncode:
            raise WanlabError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    for archive in packages.glob("*.deb"):
        package, version, _ = archive.name.replace("%3a", ":").split("_")
        if version != sources[package]["version"]:
            print(f"{package} is {version} now, the list was made with {sources[package]['version']}")
        subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        archive.unlink()


def resource_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents in a Qt resource file (`.rcc`), which is a tree of nodes, a block of data and one of names."""
    magic, version, nodes, contents, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres":
        raise WanlabError("not a Qt resource file: it does not begin with 'qres'")
    node_bytes = 22 if version >= 2 else 14

    def walk(index: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name, flags, *children = struct.unpack_from(">IHII", data, nodes + index * node_bytes)
        (letters,) = struct.unpack_from(">H", data, names + name)
        path = parent
        if index:  # the root has no name
            path += "/" + data[names + name + 6 : names + name + 6 + 2 * letters].decode("utf-16-be")
        if flags & 2:
            count, first = children
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (offset,) = struct.unpack_from(">I", data, nodes + index * node_bytes + 10)
        (size,) = struct.unpack_from(">I", data, contents + offset)
        content = data[contents + offset + 4 : contents + offset + 4 + size]
        yield path.removeprefix("/"), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


class Packages:
    """Files of unpacked packages, `folder/<package>/...`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inside: dict[Path, dict[str, bytes]] = {}

    def image(self, package: str, file: str) -> Image.Image:
        """A picture in RGB, upright, shrunk so that the short side is at most 640 pixels."""
        outer, _, inner = file.partition(":")
        path = self.folder / package / outer
        if inner and path not in self._inside:
            self._inside[path] = dict(resource_files(path.read_bytes()))
        with Image.open(io.BytesIO(self._inside[path][inner]) if inner else path) as picture:
            image = ImageOps.exif_transpose(picture).convert("RGB")
        shrink = SHORT_SIDE_PX / min(image.size)
        if shrink < 1:
            size = (round(image.width * shrink), round(image.height * shrink))
            image = image.resize(size, Image.Resampling.LANCZOS)
        return image


def write(packages: Packages, sources: dict, photographs: list[Photograph], folder: Path) -> None:
    """Write the photographs as JPEG, then `index.json`: a folder without it is not finished.

    Raises:
        WanlabError: a file of the package is another picture than when the list was made.
    """
    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    for photograph in photographs:
        image = packages.image(photograph.package, photograph.file)
        bits = distance(perceptual_hash(image), photograph.hash)
        if bits >= SAME_PICTURE_BITS:
            raise WanlabError(
                f"{photograph.name}: {photograph.package} has another picture now ({bits} bits apart)"
            )
        data = io.BytesIO()
        image.save(data, "JPEG", quality=QUALITY)
        write_bytes(folder / photograph.path, data.getvalue())
    rows = [dataclasses.asdict(photograph) for photograph in photographs]
    write_json(folder / "index.json", {"sources": sources, "photographs": rows})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", type=Path, default=Path("outputs/photographs"), help="folder of the photographs"
    )
    parser.add_argument("--packages", type=Path, help="folder of packages that are unpacked already")
    args = parser.parse_args(argv)
    sources, photographs = read_list()
    with tempfile.TemporaryDirectory() as temporary:
        if args.packages is None:
            fetch(sources, Path(temporary))
        write(Packages(args.packages or Path(temporary)), sources, photographs, args.to)
    total = sum(file.stat().st_size for file in args.to.rglob("*.jpg"))
    held_out = sum(photograph.held_out for photograph in photographs)
    print(f"{args.to}: {len(photographs) - held_out} photographs, {held_out} held out, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
