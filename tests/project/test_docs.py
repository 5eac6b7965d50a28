"""Pages of docs: every notebook has one, links and pictures are there, and commands are those that wanlab has."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from wanlab.cli import main as cli
from wanlab.launch.grid import load_grid
from wanlab.runs.parameters import read_schema

ROOT = Path(__file__).parents[2]
QUESTIONS = sorted((ROOT / "docs" / "questions").glob("*.md"))
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(path for folder in ("data", "recipes", "training") for path in sorted((ROOT / folder).rglob("*.md"))),
]
PICTURE_BYTES, PICTURES_BYTES = 60_000, 1_200_000
WORDS = 260  # of a page of a question, without its commands: about a minute
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def targets(path: Path) -> list[str]:
    """What a page links to in the project: paths with anchors."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text("utf-8")))
    return [unquote(link) for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def test_every_notebook_has_a_page_and_every_page_a_notebook():
    notebooks = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    assert [path.stem for path in QUESTIONS] == notebooks


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_a_page_of_a_question_is_short_and_has_what_a_reader_needs(path):
    text = path.read_text("utf-8")
    title = text.partition("\n")[0]
    assert title.startswith("# ")
    assert title.endswith("?")
    assert f"../pictures/{path.stem}.webp" in text
    for part in ("How to read it", "What it can say", "What it cannot say", "Next"):
        assert f"**{part}.**" in text
    assert 2 <= len(commands(path)) <= 4
    prose = re.sub(r"!\[.*?\]\(.*?\)|<!--.*?-->", "", FENCED.sub("", text))
    assert len(prose.split()) <= WORDS


def test_pictures_are_small_and_each_is_shown():
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    sizes = {path.name: path.stat().st_size for path in pictures}
    assert not {path: size for path, size in sizes.items() if size > PICTURE_BYTES}
    assert sum(sizes.values()) <= PICTURES_BYTES
    shown = {(page.parent / target).resolve() for page in PAGES for target in targets(page)}
    assert {path.name for path in pictures} == {path.name for path in pictures if path in shown}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    lost = []
    for target in targets(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert not lost


def commands(path: Path) -> list[list[str]]:
    """The `wanlab` commands in the fenced blocks of a page, as words."""
    lines = "\n".join(FENCED.findall(path.read_text("utf-8"))).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\$ )?wanlab ", line)]


@pytest.mark.parametrize("path", [page for page in PAGES if commands(page)], ids=name)
def test_commands_are_those_that_wanlab_has(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, *words in commands(path):
        parser = argparse.ArgumentParser(prog=f"wanlab {command}", exit_on_error=False)
        cli.load(command).add_arguments(parser)
        options = parser.parse_args(words)
        if command == "run":
            read_schema(options.notebook).parse(options.parameter)
        if command == "sweep" and options.grid.parts[0] == "recipes":
            load_grid(options.grid)


def test_the_tour_starts(tmp_path, monkeypatch, capsys):
    """Its commands in an empty folder, without running a notebook."""
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    walked = []
    for command, *words in commands(ROOT / "docs" / "tour.md"):
        walked.append(command)
        if dry := {"run": "--estimate", "sweep": "--dry-run"}.get(command):
            assert cli.main([command, *words, dry]) == 0, capsys.readouterr().err
    assert walked == ["run"] * 5 + ["sweep", "publish"]
    assert not list((tmp_path / "outputs").iterdir())
