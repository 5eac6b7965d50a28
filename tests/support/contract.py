"""The rules that the code of a notebook keeps, as a list of what breaks them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import nbformat

STATEMENTS = 60
"""In all code cells, those inside other statements and those of the parameters included."""

LINE_LENGTH = 110
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
