"""The notebook contract of every notebook that is shipped."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import nbformat
import pytest
from support.contract import breaches

from wanlab.runs.parameters import is_tagged, read_schema

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NOT_A_RUN = {"index"}  # it lists notebooks and runs: nothing is measured, so there is no answer to keep


def test_every_tracked_notebook_is_held_to_the_contract():
    listed = subprocess.run(
        ["git", "ls-files", "notebooks/*.ipynb"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git repository here: an unpacked archive has no list of tracked files")
    names = {Path(line).name for line in listed.stdout.splitlines()}
    assert len(names) >= 19
    assert names == {path.name for path in NOTEBOOKS}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


@pytest.fixture
def sources(cells):
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_format_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


def test_opens_with_the_question_it_answers(cells):
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "?" in cells[0].source


def test_has_one_parameters_cell_of_explained_literals(path, cells):
    assert sum(is_tagged(cell, "parameters") for cell in cells) == 1
    schema = read_schema(path)
    assert schema.parameters
    for parameter in schema.parameters:
        assert parameter.annotated, f"{parameter.name} has no type"
        assert parameter.help, f"{parameter.name} has no comment"


def test_starts_and_finishes_a_run_of_its_own_name(path, sources):
    calls = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    if path.stem in NOT_A_RUN:
        assert "wanlab.start" not in names
        return
    assert names.count("wanlab.start") == 1
    start = calls[names.index("wanlab.start")]
    assert [ast.literal_eval(argument) for argument in start.args[:1]] == [path.stem]
    assert names.count("run.verdict") == 1
    assert names.count("run.finish") == 1
    assert sources[-1].strip().endswith("run.finish()")


def test_verdict_is_made_from_measured_values(sources):
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.verdict":
                assert not isinstance(node.args[0], ast.Constant)


def test_one_cell_has_the_main_output(path, cells):
    """The report shows it at the top; the index has no report."""
    assert sum(is_tagged(cell, "main") for cell in cells) == (path.stem not in NOT_A_RUN)


def test_is_thin(sources):
    assert breaches(sources) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f():\n    pass", "defines a function"),
        ("f = lambda: 1", "defines a function"),
        ("import argparse", "argparse is imported"),
        ("from argparse import Namespace", "argparse is imported"),
        ("x = 1\n" * 61, "61 statements, 60 at most"),
        ("if x:\n" + "    y = 1\n" * 60, "61 statements, 60 at most"),
        ("x = " + "1" * 107, "111 characters, 110 at most"),
        ("show(x) if x else None", "only a conditional expression: show(x) if x else None"),
        ("y = a if b else c", "only a conditional expression: y = a if b else c"),
    ],
)
def test_a_breach_of_each_rule_is_found(source, said):
    (found,) = breaches([source])
    assert said in found


def test_what_the_rules_allow_is_no_breach():
    assert breaches(["x = 1\n" * 59, "# " + "-" * 100, "show(a if b else c)"]) == []


def test_carries_no_outputs(cells):
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
