from __future__ import annotations

import json
from typing import Literal

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab.core.errors import WanlabError
from wanlab.runs.parameters import Schema, parse_cell, read_schema
from wanlab.runs.prepare import literal

CELL = """
from typing import Literal

steps: int = 10  # denoising steps
scale: float = 2  # guidance scale, 1 is off
fast: bool = False  # skip the slow part
prompt: str = "a = b # c"  # what happens
mode: Literal["eager", "compiled", 3] = "eager"  # engine
limit: float | None = None  # GiB
sizes: list[int] = [1, 2]  # pixels
shape: tuple[int, int] = (3, 4)
names: tuple[str, ...] = ()  # any number
"""


@pytest.fixture
def schema() -> Schema:
    return Schema(parse_cell(CELL, "nb.ipynb"), "nb.ipynb")


def test_cell_is_read(schema):
    assert schema.names == ("steps", "scale", "fast", "prompt", "mode", "limit", "sizes", "shape", "names")
    assert schema.defaults["scale"] == 2.0
    assert isinstance(schema.defaults["scale"], float)
    assert schema["prompt"].help == "what happens"
    assert schema["prompt"].default == "a = b # c"
    assert schema["mode"].type == Literal["eager", "compiled", 3]
    assert schema["shape"].help == ""
    assert schema["steps"].line == 4


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("steps=4", "steps", 4),
        ("scale=3", "scale", 3.0),
        ("scale=1e-3", "scale", 1e-3),
        ("fast=yes", "fast", True),
        ("fast=False", "fast", False),
        ("prompt=x=y=z", "prompt", "x=y=z"),
        ("prompt=", "prompt", ""),
        ("prompt=None", "prompt", "None"),
        ("mode=compiled", "mode", "compiled"),
        ("mode=3", "mode", 3),
        ("limit=none", "limit", None),
        ("limit=2.5", "limit", 2.5),
        ("sizes=7,8,9", "sizes", [7, 8, 9]),
        ("sizes=[7]", "sizes", [7]),
        ("sizes=", "sizes", []),
        ("shape=(5, 6)", "shape", (5, 6)),
        ("shape=5,6", "shape", (5, 6)),
        ("names=a,b", "names", ("a", "b")),
    ],
)
def test_command_line_values_are_read_by_declared_type(schema, text, name, value):
    found = schema.parse([text])
    assert found == {name: value}
    assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps=ten", "parameter 'steps' wants int, got 'ten' (nb.ipynb, parameters cell line 4)"),
        ("steps=1.5", "wants int"),
        ("scale=x", "wants float"),
        ("fast=maybe", "wants bool"),
        ("mode=eagre", "did you mean 'eager'?"),
        ("shape=1,2,3", "wants tuple[int, int]"),
        ("sizes=1,b", "wants list[int]"),
        ("sizes=[__import__('os')]", "wants list[int]"),
        ("limit=much", "wants float | None"),
        ("stepz=3", "unknown parameter 'stepz' of nb.ipynb (did you mean 'steps'?)"),
        ("steps", "not of the form name=value"),
    ],
)
def test_wrong_values_are_refused_in_one_line(schema, text, said):
    with pytest.raises(WanlabError) as caught:
        schema.parse([text])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        (".inf", float("inf")),
        ("-inf", float("-inf")),
        ("0x10", 16.0),
        ("010", 10.0),
    ],
)
def test_numbers_of_a_command_line_are_those_of_yaml_1_2(schema, text, value):
    if "x" not in text:
        assert schema.parse([f"scale={text}"]) == {"scale": value}
    if value.is_integer():
        assert schema.parse([f"steps={text}"]) == {"steps": value}


def test_seeds_beyond_64_bits_are_numbers(schema):
    assert schema.parse([f"steps={2**64}"]) == {"steps": 2**64}
    for text in (f"steps={'9' * 5000}", f"steps=0x{'f' * 5000}"):
        with pytest.raises(WanlabError, match="parameter 'steps' wants int"):
            schema.parse([text])
    with pytest.raises(WanlabError, match="parameter 'scale' wants float"):
        schema.resolve({"scale": 10**400})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hello", "hello"),
        ("3", 3),
        ("1e-3", 0.001),
        ("none", None),
        ("true", True),
        ("[1, a]", [1, "a"]),
        ("", ""),
        ("a: b", "a: b"),
    ],
)
def test_a_parameter_that_is_none_takes_anything(text, value):
    open_schema = Schema(parse_cell("msg = None", "nb.ipynb"), "nb.ipynb")
    assert open_schema.defaults == {"msg": None}
    assert open_schema.parse([f"msg={text}"]) == {"msg": value}
    assert open_schema.resolve({"msg": value}) == {"msg": value}


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ('"int"', int),
        ("'float | None'", float | None),
        ('list["int"]', list[int]),
        ("Optional['str']", str | None),
        ("Union[int, str]", int | str),
        ("typing.List[float]", list[float]),
        ("Tuple[int, ...]", tuple[int, ...]),
    ],
)
def test_types_may_be_text_or_of_typing(written, kind):
    default = {int: "1", str: "'a'"}.get(
        kind, "[1]" if "list" in str(kind) else "(1,)" if "tuple" in str(kind) else "None"
    )
    default = "1" if kind == int | str else default
    (parameter,) = parse_cell(f"x: {written} = {default}")
    assert parameter.type == kind


def written(tmp_path, notebook, **dump):
    path = tmp_path / "nb.ipynb"
    text = notebook if isinstance(notebook, str) else json.dumps(notebook, **dump)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(dump.pop("encoding", "utf-8")))
    return path


def notebook_of(source="steps: int = 4  # number", **fields) -> dict:
    cell = {
        "cell_type": "code",
        "metadata": {"tags": ["parameters"]},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }
    return {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5} | fields


def test_notebooks_of_older_formats_and_other_encodings_are_read(tmp_path):
    old = nbformat.v3.new_notebook(
        worksheets=[
            nbformat.v3.new_worksheet(
                cells=[
                    nbformat.v3.new_heading_cell("Title"),
                    nbformat.v3.new_code_cell(input="steps: int = 4", metadata={"tags": ["parameters"]}),
                ]
            )
        ]
    )
    texts = [nbformat.v3.writes_json(old).encode()]
    texts += [json.dumps(notebook_of()).encode(code) for code in ("utf-8-sig", "utf-16", "utf-8")]
    for text in texts:
        (tmp_path / "nb.ipynb").write_bytes(text)
        assert read_schema(tmp_path / "nb.ipynb").defaults == {"steps": 4}


WILD = {
    "of another language": (
        notebook_of("x <- 3", metadata={"kernelspec": {"name": "ir", "language": "R"}}),
        "nb.ipynb is a notebook in R; wanlab runs notebooks in Python",
    ),
    "of a kernel that says no language": (
        notebook_of("x = 3", metadata={"kernelspec": {"name": "julia-1.10"}}),
        "is a notebook in Julia",
    ),
    "of a later format": (notebook_of(nbformat=5), "has notebook format 5; save it in format 4"),
    "no notebook": ([1], "Expected `object`, got `array`"),
    "without a format": ({"cells": []}, "missing required field `nbformat`"),
    "cells that are no list": (notebook_of(cells=3), "nb.ipynb"),
    "a cell that is no cell": (notebook_of(cells=[1]), "nb.ipynb"),
    "a source that is no text": (notebook_of(3), "nb.ipynb"),
    "tags that are no list": (
        notebook_of(cells=[{**notebook_of()["cells"][0], "metadata": {"tags": 1}}]),
        "nb.ipynb",
    ),
    "zero bytes in a cell": (notebook_of("x = 1\0"), "null bytes"),
    "half a surrogate pair": (notebook_of("x = '\ud800' + y"), "surrogates not allowed"),
    "a deep value": (notebook_of("x = " + "[" * 500), "parameters cell"),
    "a key that cannot be": (notebook_of("x = {[]: 1}"), "must be a literal"),
    "a number of thousands of digits": (notebook_of("x = 0x" + "f" * 5000), "must be a literal"),
    "a type that is none": (notebook_of("x: 'int |' = 1"), "'int |' is no type"),
    "a type of odd values": (notebook_of("x: Literal[[1]] = 1"), "is not one of int"),
}


@pytest.mark.parametrize(("notebook", "said"), WILD.values(), ids=WILD)
def test_wild_notebooks_are_one_line(tmp_path, notebook, said):
    with pytest.raises(WanlabError) as error:
        read_schema(written(tmp_path, notebook))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_given_twice_is_refused(schema):
    with pytest.raises(WanlabError, match="given twice"):
        schema.parse(["steps=1", "steps=2"])


@pytest.mark.parametrize(
    ("name", "value"), [("steps", True), ("steps", 2.0), ("scale", True), ("prompt", 3), ("fast", 1)]
)
def test_types_are_not_mixed_up(schema, name, value):
    with pytest.raises(WanlabError, match=f"parameter '{name}' wants"):
        schema.resolve({name: value})


def test_resolve_keeps_defaults_and_order(schema):
    assert list(schema.resolve({"fast": True})) == list(schema.names)
    assert schema.resolve({"limit": 1})["limit"] == 1.0
    assert isinstance(schema.resolve({"limit": 1})["limit"], float)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x: int = open('f')", "must be a literal"),
        ("x: int = 1\nprint(x)", "line 2: write `name: type = literal"),
        ("x: Path = 'a'", "type 'Path' is not one of"),
        ("x: int = 'a'", "wants int, got 'a'"),
        ("x: int = 1\nx: int = 2", "set twice"),
        ("x: int =", "line 1"),
        ("import os", "write `name: type"),
        ("x: int", "write `name: type"),
    ],
)
def test_cells_that_are_more_than_literals_are_refused(source, said):
    with pytest.raises(WanlabError) as caught:
        parse_cell(source, "nb.ipynb")
    assert said in str(caught.value)


def test_nothing_in_the_cell_is_executed(tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(WanlabError):
        parse_cell(f"x: str = open({str(mark)!r}, 'w').name")
    assert not mark.exists()


def test_two_parameters_cells_are_refused(tmp_path):
    cells = [nbformat.v4.new_code_cell("x: int = 1", metadata={"tags": ["parameters"]}) for _ in range(2)]
    path = tmp_path / "two.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(WanlabError, match="2 cells tagged 'parameters'"):
        read_schema(path)


def test_missing_and_broken_notebooks_are_named(tmp_path):
    (tmp_path / "10_baseline.ipynb").write_text("{")
    with pytest.raises(WanlabError, match=r"did you mean '10_baseline\.ipynb'"):
        read_schema(tmp_path / "10_basline.ipynb")
    with pytest.raises(WanlabError, match="cannot read notebook"):
        read_schema(tmp_path / "10_baseline.ipynb")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)


@given(values)
def test_injected_literals_are_exact(value):
    found = eval(literal(value), {"float": float})
    assert found == value
    assert type(found) is type(value)


@given(st.text(), st.text())
def test_text_survives_the_command_line(name_value, prompt):
    schema = Schema(parse_cell('prompt: str = "x"  # text'), "nb")
    assert schema.parse([f"prompt={prompt}"]) == {"prompt": prompt}


@given(st.text(max_size=80))
def test_any_source_is_read_or_refused(source):
    try:
        found = parse_cell(source)
    except WanlabError as error:
        said = str(error)
    else:
        said = ""
        assert all(p.name.isidentifier() for p in found)
    assert "\n" not in said


def test_typing_may_be_imported_as_a_module_too():
    (parameter,) = parse_cell("import typing\na: typing.Optional[int] = None")
    assert parameter.type == int | None
