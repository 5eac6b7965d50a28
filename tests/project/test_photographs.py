"""The photographs wan-nano learns from: what the list may hold, and the way from a package to an array."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from training import photographs
from training.photographs import Packages, Photograph, distance, perceptual_hash
from wanlab.core import paths
from wanlab.core.errors import WanlabError


def picture(seed: int, width: int = 960, height: int = 720) -> Image.Image:
    """Coloured patches with soft edges."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def photograph(name: str, seed: int, package: str = "some-wallpapers", file: str = "") -> Photograph:
    return Photograph(
        name, package, file or f"{name}.png", "CC0-1.0", "somebody", perceptual_hash(picture(seed)),
        held_out=package in photographs.HELD_OUT_SOURCES,
    )  # fmt: skip


def resource_file(name: str, content: bytes) -> bytes:
    """A Qt resource file, version 1: a root, a folder `a`, and in it one file that is not compressed."""
    header, node = struct.Struct(">4sIIII"), struct.Struct(">IHII")
    texts = [struct.pack(">HI", len(text), 0) + text.encode("utf-16-be") for text in ("a", name)]
    nodes = [node.pack(0, 2, 1, 1), node.pack(0, 2, 1, 2), node.pack(len(texts[0]), 0, 0, 0)]
    names_at = header.size + len(nodes) * node.size
    contents_at = names_at + sum(map(len, texts))
    parts = [header.pack(b"qres", 1, header.size, contents_at, names_at), *nodes, *texts]
    return b"".join([*parts, struct.pack(">I", len(content)), content])


def test_the_list_that_is_committed_holds():
    sources, listed = photographs.read_list()
    training = [row for row in listed if not row.held_out]
    assert len(training) >= 150
    assert len(listed) - len(training) >= 12
    assert {row.package for row in listed} == set(sources)
    assert not {row.package for row in training} & photographs.HELD_OUT_SOURCES
    assert all(row.licence for row in listed)


def test_no_listed_photograph_is_one_that_wanlab_holds_out_already():
    _, listed = photographs.read_list()
    files = [
        *(Path(skimage.__file__).parent / "data").iterdir(),
        *paths.data("heldout/photographs").iterdir(),
    ]
    known = {
        file.name: perceptual_hash(Image.open(file)) for file in files if file.suffix in (".png", ".jpg")
    }
    assert {"chelsea.png", "china.jpg"} <= set(known)
    for name, known_hash in known.items():
        closest = min(listed, key=lambda row: distance(row.hash, known_hash))
        assert distance(closest.hash, known_hash) >= photographs.SAME_PICTURE_BITS, (name, closest.name)


def test_a_picture_scaled_and_compressed_again_is_the_same_and_another_is_not():
    data = io.BytesIO()
    picture(1).resize((320, 240)).save(data, "JPEG", quality=60)
    again = perceptual_hash(Image.open(data))
    assert distance(again, perceptual_hash(picture(1))) < photographs.SAME_PICTURE_BITS
    assert distance(again, perceptual_hash(picture(2))) >= photographs.SAME_PICTURE_BITS


@pytest.mark.parametrize("package", ["scikit-image", "scikit-learn", "matplotlib", "palapeli-data"])
def test_a_held_out_source_is_refused_for_training(package):
    row = dataclasses.replace(photograph("cat", 1, package), held_out=False)
    with pytest.raises(WanlabError, match="must not be trained on"):
        photographs.check([row])


def test_a_picture_listed_twice_is_refused_also_across_training_and_held_out():
    with pytest.raises(WanlabError, match="one picture"):
        photographs.check([photograph("a", 1), photograph("b", 1, "palapeli-data")])
    with pytest.raises(WanlabError, match="two photographs are called a"):
        photographs.check([photograph("a", 1), photograph("a", 2)])


def test_photographs_come_out_of_packages_as_arrays(tmp_path):
    packages = tmp_path / "packages"
    for package in ("some-wallpapers", "palapeli-data"):
        (packages / package).mkdir(parents=True)
    picture(1).save(packages / "some-wallpapers" / "cat.png")
    picture(2).save(packages / "palapeli-data" / "bee.png")
    data = io.BytesIO()
    picture(3, 300, 200).save(data, "PNG")
    (packages / "some-wallpapers" / "all.rcc").write_bytes(resource_file("dog.png", data.getvalue()))
    rows = [
        photograph("cat", 1),
        photograph("dog", 3, file="all.rcc:a/dog.png"),
        photograph("bee", 2, "palapeli-data"),
    ]
    out = tmp_path / "out"
    photographs.write(Packages(packages), {}, rows, out)
    training, held_out = photographs.load(out), photographs.load(out, held_out=True)
    assert [array.shape for array in training] == [(640, 853, 3), (200, 300, 3)]
    assert [array.shape for array in held_out] == [(640, 853, 3)]
    assert training[0].dtype == np.uint8
    assert np.abs(training[1].astype(int) - np.asarray(picture(3, 300, 200))).mean() < 4

    index = json.loads((out / "index.json").read_text())
    index["photographs"][2]["held_out"] = False
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(WanlabError, match="palapeli-data is held out"):
        photographs.load(out)


def test_another_picture_under_the_same_name_is_refused(tmp_path):
    (tmp_path / "some-wallpapers").mkdir()
    picture(5).save(tmp_path / "some-wallpapers" / "cat.png")
    with pytest.raises(WanlabError, match="another picture now"):
        photographs.write(Packages(tmp_path), {}, [photograph("cat", 1)], tmp_path / "out")
    with pytest.raises(WanlabError, match="has no photographs"):
        photographs.load(tmp_path / "out")
