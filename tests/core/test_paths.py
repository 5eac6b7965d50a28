"""Where files that come with wanlab are found: in the working folder, in a checkout, in an installed package."""

from __future__ import annotations

import pytest

from wanlab.core import paths
from wanlab.core.errors import WanlabError

TRACE = "data/traces/wan2.2-ti2v-5b.pt.trace.json.gz"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package without a checkout around it, in an empty working folder."""
    package = tmp_path / "site-packages" / "wanlab"
    (package / "_notebooks").mkdir(parents=True)
    (package / "_notebooks" / "00_quickstart.ipynb").write_text("{}")
    (package / "_recipes" / "sweeps").mkdir(parents=True)
    for name in ("b.yaml", "a.yaml", "sweeps/c.yaml"):
        (package / "_recipes" / name).write_text("")
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.setattr(paths, "CHECKOUT", paths._checkout())
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return package


def test_a_checkout_wins(root):
    assert root == paths.CHECKOUT
    assert paths.data("wan-nano") == root / "data" / "wan-nano"
    assert paths.notebooks() == root / "notebooks"
    assert paths.recipes("sweeps") == root / "recipes" / "sweeps"


def test_an_installed_package_has_its_own_copies(installed):
    assert paths.CHECKOUT is None
    assert paths.notebooks("00_quickstart.ipynb") == installed / "_notebooks" / "00_quickstart.ipynb"
    assert paths.locate("recipes/a.yaml") == installed / "_recipes" / "a.yaml"
    assert paths.find_notebook("00_quickstart") == installed / "_notebooks" / "00_quickstart.ipynb"
    assert paths.find_notebook("notebooks/00_quickstart.ipynb").is_file()


def test_what_is_nowhere_is_one_message_in_both_cases(installed, root, monkeypatch):
    with pytest.raises(
        WanlabError, match=r"wan-nano is missing, though it comes with wanlab; install wanlab again"
    ):
        paths.existing(paths.data("wan-nano"))
    monkeypatch.setattr(paths, "CHECKOUT", root)
    with pytest.raises(
        WanlabError, match=r"none is missing, though it comes with wanlab; work in a full clone"
    ):
        paths.existing(paths.data("none"))


def test_a_path_from_the_working_folder_wins_and_one_that_is_nowhere_stays(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert paths.locate(TRACE) == root / TRACE
    mine = tmp_path / TRACE
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert paths.locate(TRACE).read_text() == "mine"
    for other in ("data/none", "elsewhere/x", "data/../README.md", str(tmp_path / "none"), "", "x" * 5000):
        assert str(paths.locate(other)) == (other or ".")


def test_files_that_fit_a_pattern_are_named_as_they_are_given(installed):
    assert paths.locate_all("recipes/*.yaml") == ["recipes/a.yaml", "recipes/b.yaml"]
    assert (
        paths.locate_all("recipes/../*")
        == paths.locate_all("plans/*.yaml")
        == paths.locate_all("recipes")
        == []
    )


def test_a_notebook_is_found_by_its_name_nearest_first(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert paths.find_notebook("60_sweep") == root / "notebooks" / "60_sweep.ipynb"
    assert paths.find_notebook("60_sweep.ipynb") == root / "notebooks" / "60_sweep.ipynb"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "60_sweep.ipynb").write_text("{}")
    assert paths.find_notebook("60_sweep").resolve() == tmp_path / "notebooks" / "60_sweep.ipynb"
    (tmp_path / "60_sweep.ipynb").write_text("{}")
    assert paths.find_notebook("60_sweep").resolve() == tmp_path / "60_sweep.ipynb"
    with pytest.raises(WanlabError, match=r"no notebook at 60_swep \(did you mean '60_sweep'\?\)"):
        paths.find_notebook("60_swep")
    with pytest.raises(WanlabError, match=r"no notebook at zzz, .*wanlab notebooks"):
        paths.find_notebook("zzz")
    with pytest.raises(WanlabError, match=r"no notebook at sub/60_sweep\.ipynb$"):
        paths.find_notebook("sub/60_sweep.ipynb")


def test_a_user_without_a_home_folder_has_a_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")  # as of a user id without an entry

    for name in ("WANLAB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(paths.Path, "home", no_home)
    assert paths.cache("x").parts[-3:] == (".cache", "wanlab", "x")
