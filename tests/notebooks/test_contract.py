"""The notebook contract of every notebook that is shipped."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from wanlab.runs.parameters import is_tagged, read_schema

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STATEMENTS = 60  # in all code cells, those of the parameters included
LINE_LENGTH = 110
NOT_A_RUN = {"index"}  # it lists notebooks and runs: nothing is measured, so there is no answer to keep


def test_there_are_notebooks():
    assert {
        "00_quickstart",
        "10_baseline",
        "11_flame_graph",
        "12_experts",
        "13_attention",
        "14_memory",
        "15_triage",
        "20_export_onnx",
        "21_onnxruntime",
        "22_tensorrt",
        "23_engine_report",
        "40_quality",
        "51_platforms",
        "index",
    } <= {p.stem for p in NOTEBOOKS}


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


def test_is_thin(sources):
    trees = [ast.parse(source) for source in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= STATEMENTS
    assert not [line for source in sources for line in source.splitlines() if len(line) > LINE_LENGTH]
    assert not [n for n in nodes if isinstance(n, ast.Expr | ast.Assign) and isinstance(n.value, ast.IfExp)]
    for source in sources:
        nodes = list(ast.walk(ast.parse(source)))
        assert not [
            n
            for n in nodes
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        ]
        assert not [
            n for n in nodes if isinstance(n, ast.Import) and any(a.name == "argparse" for a in n.names)
        ]


def test_carries_no_outputs(cells):
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
