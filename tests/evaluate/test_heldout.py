"""The two fixed held-out sets: what their files say is what the code draws, and they share nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.heldout import clips

SETS = tuple(heldout.SETS)


@pytest.mark.parametrize("name", SETS)
def test_the_file_is_what_is_drawn(name, tmp_path):
    loaded, drawn = heldout.load_cases(name), heldout.draw_set(name)
    assert len(loaded) == heldout.SET_SIZE
    # Numbers of another machine may round differently in their last digit.
    for one, two in zip(loaded, drawn, strict=True):
        assert (one.photograph, one.caption, one.seed, one.purpose) == (
            two.photograph, two.caption, two.seed, name,
        )  # fmt: skip
        for field in ("centre_x_px", "centre_y_px", "scale"):
            assert getattr(one.clip, field) == pytest.approx(getattr(two.clip, field))
        assert (one.clip.height, one.clip.width, one.clip.frames) == (128, 192, 17)
    written = json.loads((heldout.FOLDER / f"{name}.json").read_text())
    assert [row["caption"] for row in written["cases"]] == [case.caption for case in loaded]
    assert written["photographs"] == list(heldout.SETS[name][1])


def test_written_sets_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "SET_SIZE", 4)
    paths = heldout.write_sets(tmp_path)
    assert [path.name for path in paths] == ["selection.json", "final.json"]
    expected = heldout.draw_set("selection")
    monkeypatch.setattr(heldout, "FOLDER", tmp_path)
    assert heldout.load_cases("selection") == expected
    paths[0].write_text('{"cases": [{}]}')
    with pytest.raises(WanlabError, match="holds no cases"):
        heldout.load_cases("selection")
    paths[0].unlink()
    with pytest.raises(WanlabError, match=r"selection\.json is missing"):
        heldout.load_cases("selection")


def test_the_sets_of_the_large_size_are_written_beside_and_share_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "SET_SIZE", 36)
    paths = heldout.write_sets(tmp_path, sizes=("large",))
    assert [path.name for path in paths] == ["selection_large.json", "final_large.json"]
    drawn = heldout.draw_set("final", "large")
    monkeypatch.setattr(heldout, "FOLDER", tmp_path)
    first, second = (heldout.load_cases(name, size="large") for name in SETS)
    assert second == drawn
    for cases in (first, second):
        assert {(c.clip.height, c.clip.width, c.clip.frames) for c in cases} == {(256, 384, 33)}
        assert {len(case.clip.objects) for case in cases} == {0, 1, 2, 3}
        assert 4 <= sum(case.photograph.startswith(heldout.TEXTURE) for case in cases) <= 16
    for kind in ("photograph", "seed", "clip"):
        assert not {getattr(case, kind) for case in first} & {getattr(case, kind) for case in second}
    with pytest.raises(WanlabError, match="did you mean 'large'"):
        heldout.draw_set("final", "larg")


def test_the_sets_share_nothing_and_nothing_was_trained_on():
    first, second = (heldout.load_cases(name) for name in SETS)
    for kind in ("photograph", "seed", "clip"):
        assert not {getattr(case, kind) for case in first} & {getattr(case, kind) for case in second}
    shown = {case.photograph for case in [*first, *second]}
    assert not shown & set(clips.TRAINING_PHOTOGRAPHS)
    assert all(heldout.is_held_out(name) for name in shown)
    assert not any(heldout.is_held_out(name) for name in clips.TRAINING_PHOTOGRAPHS)
    # Nor under another name.
    trained = [small(clips.photograph(name)) for name in clips.TRAINING_PHOTOGRAPHS]
    for name in shown:
        assert max(np.corrcoef(small(heldout.picture(name)), each)[0, 1] for each in trained) < 0.9


def small(picture):
    grey = Image.fromarray((picture.mean(-1) * 255).astype(np.uint8))
    return np.asarray(grey.resize((16, 16)), dtype=float).ravel()


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_balanced_and_so_are_its_first_cases(name):
    cases = heldout.load_cases(name)
    motions = [case.clip.motion for case in cases]
    assert {motions.count(motion) for motion in set(motions)} == {8}
    assert len(set(motions)) == 9
    objects = [len(case.clip.objects) for case in cases]
    assert sum(objects) == len(cases) / 2
    few = heldout.load_cases(name, 12)
    assert few == cases[:12]
    assert len({case.clip.motion for case in few}) >= 5
    assert len({case.photograph for case in few}) == 3
    assert 3 <= sum(len(case.clip.objects) for case in few) <= 9
    assert max(objects) == 1


@pytest.mark.parametrize("name", SETS)
def test_truths_are_clips_of_the_size_asked_for(name):
    case = heldout.load_cases(name, 1)[0]
    truth = case.truth()
    assert truth.shape == (17, 128, 192, 3)
    assert 0 <= truth.min() < truth.max() <= 1
    short = case.truth(5, 64, 96)
    assert short.shape == (5, 64, 96, 3)
    inside = slice(40, -40), slice(50, -50)
    np.testing.assert_allclose(case.truth(5)[0][inside], truth[0][inside], atol=1e-6)


def test_what_chooses_refuses_the_final_set():
    chosen = heldout.load_cases("selection", 3)
    assert heldout.for_selection(chosen) == chosen
    with pytest.raises(WanlabError, match=r"of the final set.*load_cases\(\"selection\"\)"):
        heldout.for_selection([*chosen, heldout.load_cases("final", 1)[0]])
    # Its photographs are refused too, however the case was made.
    drawn = heldout.draw_cases(1, photographs=heldout.FINAL_PHOTOGRAPHS)
    assert drawn[0].purpose == "examination"
    with pytest.raises(WanlabError, match="final set"):
        heldout.for_selection(drawn)


def test_photographs_are_small_and_their_licences_are_named(root):
    folder = heldout.FOLDER
    assert folder == root / "data" / "heldout"
    text = (folder / "README.md").read_text()
    files = sorted((folder / "photographs").iterdir())
    assert [path.name for path in files] == sorted(heldout.FINAL_PHOTOGRAPHS)
    for path in files:
        assert path.stat().st_size < 400_000
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{path.name}`")]
        assert "CC BY" in row or "public domain" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("finale",), "did you mean 'final'"), (("final", 0), "1 to 72"), (("final", 73), "1 to 72")],
)
def test_wrong_names_and_counts_are_refused(arguments, message):
    with pytest.raises(WanlabError, match=message):
        heldout.load_cases(*arguments)
