"""The rules that the code of a notebook and the first screen of its report keep, as a list of what breaks them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup

from wanlab.core.answer import LONGEST, MOST_DETAILS, MOST_TILES

STATEMENTS = 60
"""In all code cells, those inside other statements and those of the parameters included."""

LINE_LENGTH = 110
FEWEST_TILES = 3
LOAD = " Timed while "  # begins the sentence that `run.verdict` adds to a headline on a busy machine
UNREADABLE = {
    r"\b[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+\b": "a name of code",
    r"\d(?:\.\d+)?[eE][+-]?\d": "scientific notation",
    r"\b\w+\.(?:ipynb|jsonl?|ya?ml|py|onnx|csv)\b": "a name of a file",
    r"\b(?:A/A|noise floor|floor|tier|as asked)\b": "a word of this project",
    r"\b(?:nan|None|inf)\b": "a value that is not known",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def code_cells(path: Path) -> list[str]:
    """The sources of a notebook's code cells."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def breaches(sources: Iterable[str]) -> list[str]:
    """What in these code cells breaks the rules: one line each, empty when they are kept.

    At most `STATEMENTS` statements and `LINE_LENGTH` characters a line, no function or class, no command line, no statement
    or assignment that is nothing but `x if y else z`.
    """
    sources = list(sources)
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    found = [f"{statements} statements, {STATEMENTS} at most"] if statements > STATEMENTS else []
    for node in nodes:
        if isinstance(node, FUNCTIONS):
            found.append(f"line {node.lineno} of a cell defines a function or class")
        if "argparse" in _imported(node):
            found.append("argparse is imported")
        if isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.IfExp):
            found.append(f"a statement that is only a conditional expression: {ast.unparse(node)[:60]}")
    lines = [line for source in sources for line in source.splitlines()]
    found += [
        f"{len(line)} characters, {LINE_LENGTH} at most: {line.strip()[:60]}..."
        for line in lines
        if len(line) > LINE_LENGTH
    ]
    return found


def _imported(node: ast.AST) -> set[str]:
    """Top-level names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return set()


def unreadable(record: Mapping[str, Any], page: BeautifulSoup) -> list[str]:
    """What keeps a reader from the answer on the first screen: one line each, empty when nothing does.

    A headline of at most `LONGEST` characters in plain words, at most `MOST_DETAILS` details, three to five key figures, and
    one main output below them.

    Args:
        record: run.json. page: the report.
    """
    headline = str(record.get("verdict") or "").partition(LOAD)[0]
    found = [f"{len(headline)} characters, {LONGEST} at most: {headline}"] * (len(headline) > LONGEST)
    if not headline.endswith((".", "!", "?")):
        found.append(f"no sentence: {headline!r}")
    found += [
        f"{what} in the headline: {match[0]}"
        for pattern, what in UNREADABLE.items()
        for match in re.finditer(pattern, headline)
    ]
    details = record.get("details") or ()
    if len(details) > MOST_DETAILS:
        found.append(f"{len(details)} details, {MOST_DETAILS} at most")
    if not (record.get("next") or {}).get("why"):
        found.append("nothing says what to do next")
    tiles = [tile.dd.get_text() for tile in page.select(".tiles > div")]
    if not FEWEST_TILES <= len(tiles) <= MOST_TILES:
        found.append(f"{len(tiles)} key figures, {FEWEST_TILES} to {MOST_TILES} wanted: {tiles}")
    if len(page.select("header .main")) != 1:
        found.append(f"{len(page.select('header .main'))} main outputs")
    return found
