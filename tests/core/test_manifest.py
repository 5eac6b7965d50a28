"""What files were made from is kept beside them, and read only while it is whole and of this form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from msgspec.structs import replace

from wanlab.core.errors import WanlabError
from wanlab.core.files import file_digest
from wanlab.core.manifest import Manifest, NoManifest, file_damage


@dataclass(frozen=True)
class Shape:
    height: int
    axes: tuple[int, ...]


class Made(Manifest, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "birth certificate"
    FORMAT: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "make it with make()"

    shape: Shape
    names: dict[str, dict[int, str]]
    ranges: tuple[tuple[int | None, str], ...]
    content: tuple[str, int]

    def damage(self) -> str:
        return file_damage(Path(self.path), *self.content)


FACTS = {"weights": "a" * 64, "settings": {"steps": 4, "size": (64, 96)}}


@pytest.fixture
def made(tmp_path) -> Made:
    path = tmp_path / "model.bin"
    path.write_bytes(b"content")
    made = Made(
        path=str(path),
        facts=FACTS,
        shape=Shape(64, (1, 2)),
        names={"x": {0: "batch"}},
        ranges=((None, "all"), (3, "some")),
        content=(file_digest(path), 7),
    )
    made.write()
    return made


def test_types_come_back_as_they_were(made, tmp_path):
    assert Made.read(made.path) == made
    assert Made.find(tmp_path / "other.bin") is None
    assert made.key == replace(made, cached=True).key != replace(made, facts={}).key


def test_files_are_current_until_a_fact_or_the_file_changes(made):
    known, reason = Made.current(made.path, FACTS)
    assert (known, reason) == (replace(made, cached=True), "")
    for facts, reason in (
        (FACTS | {"weights": "b" * 64}, "weights was aaaaaaaaaaaa, is bbbbbbbbbbbb"),
        (FACTS | {"settings": {"steps": 5, "size": (64, 96)}}, "settings: steps was 4, is 5"),
        (FACTS | {"new": 1}, "new was None, is 1"),
    ):
        assert Made.current(made.path, facts) == (None, reason)
    Path(made.path).write_bytes(b"CONTENT")
    assert Made.current(made.path, FACTS) == (None, "model.bin was changed")
    Path(made.path).write_bytes(b"more than that")
    assert Made.current(made.path, FACTS) == (None, "model.bin has 14 bytes, it was written with 7")
    Path(made.path).unlink()
    assert Made.current(made.path, FACTS) == (None, "model.bin is gone")


def test_a_folder_can_be_moved_with_its_manifest(made, tmp_path):
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved")) / "model.bin"
    assert Made.read(moved) == replace(made, path=str(moved))
    assert str(tmp_path) not in Made.file(moved).read_text()
    assert Made.current(moved, FACTS)[0] is not None


def edited(text: str) -> str:
    return json.dumps(json.loads(text) | {"ranges": []})


def incomplete(text: str) -> str:
    return json.dumps({"format": 3, "path": "model.bin"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-20], r"model\.bin\.json cannot be read \(.*\); make it with make\(\)"),
        (lambda text: "[]", "cannot be read .*no format number"),
        (lambda text: json.dumps({"path": "model.bin"}), "cannot be read .*no format number"),
        (lambda text: json.dumps(json.loads(text) | {"format": 2}), r"is of another wanlab; make it with"),
        (edited, r"cannot be read \(it was changed after it was written\)"),
        (incomplete, "cannot be read"),
    ],
)
def test_what_cannot_be_trusted_is_refused_in_one_line(made, change, said):
    file = Made.file(made.path)
    file.write_text(change(file.read_text()))
    with pytest.raises(WanlabError, match=said) as refusal:
        Made.read(made.path)
    assert "\n" not in str(refusal.value)
    assert "make it with make()" in str(refusal.value)
    assert Made.find(made.path) is None
    assert Made.current(made.path, FACTS) == (None, "the birth certificate cannot be read")


def test_no_manifest_is_no_reason(tmp_path):
    assert Made.current(tmp_path / "model.bin", FACTS) == (None, "")
    with pytest.raises(NoManifest, match=r"model\.bin has no birth certificate model\.bin\.json beside it"):
        Made.read(tmp_path / "model.bin")
