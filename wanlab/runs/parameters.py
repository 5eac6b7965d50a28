"""Reads the `parameters` cell of a notebook without running it, as a typed schema for overrides."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import tokenize
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal, Union

import msgspec

from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.paths import find_notebook
from wanlab.core.text import convert, parse_json, read_text
from wanlab.core.yaml_lines import integer, read_yaml, real

GRAMMAR = "rfc3987_syntax"

_hidden = GRAMMAR not in sys.modules
if _hidden:
    sys.modules[GRAMMAR] = None  # its import is slow; jsonschema works without it
try:
    import nbformat as nbformat
finally:
    if _hidden:
        del sys.modules[GRAMMAR]


SIMPLE = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list,
    "tuple": tuple,
    "None": type(None),
}
ANYTHING = Union[None, bool, int, float, list, str]  # noqa: UP007
"""The type of a parameter that is None and says no type; on a command line a number is a number and a word is text."""
TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Parameter:
    """One line of the cell: `name: type = default  # help`.

    Attributes:
        type: a typing object, e.g. int, Literal["a", "b"], float | None.
        type_text: the type as it is written.
        line: line in the cell, from 1.
    """

    name: str
    type: Any
    type_text: str
    default: Any
    help: str
    line: int
    annotated: bool = True


@dataclass(frozen=True)
class Schema:
    """All parameters of one notebook, in order; `where` is its name in messages."""

    parameters: tuple[Parameter, ...]
    where: str

    def __getitem__(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        hint = did_you_mean(name, self.names) or f"; it has {', '.join(self.names) or 'none'}"
        raise WanlabError(f"unknown parameter {name!r} of {self.where}{hint}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def defaults(self) -> dict[str, Any]:
        return {parameter.name: parameter.default for parameter in self.parameters}

    def resolve(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults with `overrides` on top.

        Raises:
            WanlabError: an unknown name or a value of another type.
        """
        values = self.defaults
        for name, value in overrides.items():
            values[name] = checked(self[name], value, self.where)
        return values

    def parse(self, assignments: typing.Iterable[str]) -> dict[str, Any]:
        """Typed values of `["steps=4", "prompt=a=b"]`; only the first `=` separates name and value."""
        overrides: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals:
                raise WanlabError(f"-p {text!r} is not of the form name=value")
            parameter = self[name.strip()]
            if parameter.name in overrides:
                raise WanlabError(f"parameter {parameter.name!r} was given twice")
            try:
                overrides[parameter.name] = checked(parameter, _from_text(parameter.type, value), self.where)
            except ValueError:
                raise _mismatch(parameter, value, self.where) from None
        return overrides


def read_schema(notebook: Path | str | Any) -> Schema:
    """Schema of a notebook file, or of a notebook already read.

    Raises:
        WanlabError: the file cannot be read, it has more than one `parameters` cell, or a value is no literal.
    """
    where = "the notebook"
    if isinstance(notebook, str | Path):
        where, notebook = str(notebook), read_notebook(notebook)
        check_language(notebook, where)
    cells = [cell for cell in notebook.cells if is_tagged(cell, "parameters")]
    if len(cells) > 1:
        raise WanlabError(f"{where} has {len(cells)} cells tagged 'parameters'; keep one")
    return Schema(parse_cell(cells[0].source, where) if cells else (), where)


def read_notebook(path: Path | str) -> Any:
    """Read a notebook in format 4 of nbformat.

    Args:
        path: path of the file, or the name of a notebook as in `find_notebook`.

    Raises:
        WanlabError: there is no such file, or it is no notebook.
    """
    path = find_notebook(path)
    text = read_text(path, "json_mib")
    form = convert(parse_json(text, f"notebook {path}"), NotebookForm, f"notebook {path}")
    if form.nbformat > 4:
        raise WanlabError(f"{path} has notebook format {form.nbformat}; save it in format 4")
    try:
        notebook = nbformat.from_dict(nbformat.reads(text, as_version=4))
    except Exception as error:  # nbformat raises many kinds
        raise WanlabError(f"cannot read notebook {path}: {first_line(error, 200)}") from error
    convert(notebook, Notebook, f"notebook {path}")
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a notebook without outputs may leave these out
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
    return notebook


class NotebookForm(msgspec.Struct):
    """The version of a notebook file, which decides how the rest is read."""

    nbformat: Annotated[int, msgspec.Meta(ge=1)]


class CellMetadata(msgspec.Struct):
    tags: list[str] = []


class Cell(msgspec.Struct):
    """What wanlab takes of a cell."""

    cell_type: str
    source: str
    metadata: CellMetadata
    outputs: list[dict[str, Any]] = []


class Notebook(msgspec.Struct):
    """What wanlab takes of a notebook in format 4."""

    cells: list[Cell]
    metadata: dict[str, Any]


def is_tagged(cell: Any, tag: str) -> bool:
    return cell.cell_type == "code" and tag in cell.metadata.get("tags", [])


# Kernels that do not say their language, by the beginning of their name.
KERNELS = {"ir": "R", "julia": "Julia", "bash": "Bash", "xcpp": "C++", "deno": "JavaScript", "scala": "Scala"}


def check_language(notebook: Any, where: str) -> None:
    """Refuse a notebook that is not in Python, by its metadata.

    Raises:
        WanlabError: it names another language.
    """
    kernel, info = ({} if not isinstance(notebook.metadata.get(key), dict) else notebook.metadata[key]
                    for key in ("kernelspec", "language_info"))  # fmt: skip
    named = re.match("[a-z]*", str(kernel.get("name", "")).lower())[0]
    language = info.get("name") or kernel.get("language") or KERNELS.get(named, "python")
    if "python" not in str(language).lower():
        raise WanlabError(f"{where} is a notebook in {language}; wanlab runs notebooks in Python")


def parse_cell(source: str, where: str = "the notebook") -> tuple[Parameter, ...]:
    """Parameters in the source of a cell. Nothing is executed: values are literals."""
    try:
        tree, comments = ast.parse(source), _comments(source)
    except SyntaxError as error:
        raise WanlabError(f"parameters cell of {where}, line {error.lineno}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise WanlabError(f"parameters cell of {where}: {first_line(error)}") from None
    parameters: dict[str, Parameter] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module in ("typing", "__future__"):
            continue  # names for annotations
        if isinstance(statement, ast.Import) and [name.name for name in statement.names] == ["typing"]:
            continue
        place = f"parameters cell of {where}, line {statement.lineno}"
        target: ast.expr | None = None
        value: ast.expr | None = None
        annotation: ast.expr | None = None
        if isinstance(statement, ast.AnnAssign):
            target, value, annotation = statement.target, statement.value, statement.annotation
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        if not isinstance(target, ast.Name) or value is None:
            raise WanlabError(f"{place}: write `name: type = literal  # unit or help`, nothing else")
        try:
            default = ast.literal_eval(value)
            repr(default)  # a ValueError for an integer of thousands of digits
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise WanlabError(f"{place}: the value of {target.id!r} must be a literal") from None
        if annotation is not None:
            annotation = _unquoted(annotation, place)
            kind, text = _type_of(annotation, place), ast.unparse(annotation)
        elif default is None:
            kind, text = ANYTHING, "None | bool | int | float | list | str"
        else:
            kind, text = type(default), type(default).__name__
        lines = range(statement.lineno, statement.end_lineno + 1)
        note = next((comments[line] for line in reversed(lines) if line in comments), "")
        if target.id in parameters:
            raise WanlabError(f"{place}: {target.id!r} is set twice")
        parameter = Parameter(target.id, kind, text, default, note, statement.lineno, annotation is not None)
        parameters[target.id] = replace(parameter, default=checked(parameter, default, where))
    return tuple(parameters.values())


def checked(parameter: Parameter, value: Any, where: str = "the notebook") -> Any:
    """`value` in its declared type: an int may be a float and a list a tuple; any other type is refused."""
    if not _matches(parameter.type, value):
        raise _mismatch(parameter, value, where)
    try:
        return _converted(parameter.type, value)
    except OverflowError:  # an integer that no float can be
        raise _mismatch(parameter, value, where) from None


def read_value(parameter: Parameter, value: Any, where: str = "the notebook") -> Any:
    """`checked`, for a value from a file: text for a parameter that takes none is read as on the command line.

    So `yes` is a bool and `1_000` a number where the notebook asks for one, and text where it asks for text.
    """
    if isinstance(value, str) and not _matches(parameter.type, value):
        with contextlib.suppress(ValueError):
            value = _from_text(parameter.type, value)
    return checked(parameter, value, where)


def _mismatch(parameter: Parameter, value: Any, where: str) -> WanlabError:
    options = typing.get_args(parameter.type) if typing.get_origin(parameter.type) is Literal else ()
    hint = did_you_mean(value, [o for o in options if isinstance(o, str)]) if isinstance(value, str) else ""
    return WanlabError(
        f"parameter {parameter.name!r} wants {parameter.type_text}, got {_short(value)}{hint}"
        f" ({where}, parameters cell line {parameter.line})"
    )


def _matches(kind: Any, value: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_matches(arg, value) for arg in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is list:
        return isinstance(value, list) and all(_matches(args[0], item) for item in value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(args[0], item) for item in value)
        return len(value) == len(args) and all(map(_matches, args, value))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (list, tuple) if kind is tuple else kind)


def _converted(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        exact = [arg for arg in args if _matches(arg, value) and _converted(arg, value) is value]
        return _converted(exact[0] if exact else next(arg for arg in args if _matches(arg, value)), value)
    if kind is float:
        return float(value)
    if origin is list:
        return [_converted(args[0], item) for item in value]
    if origin is tuple:
        kinds = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(map(_converted, kinds, value))
    return tuple(value) if kind is tuple else value


def _from_text(kind: Any, text: str) -> Any:
    """A value on the command line in its declared type; raises `ValueError` where it is none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind == ANYTHING:
        return _guessed(text)
    if origin in (Union, types.UnionType):
        # Text is the last resort: "4" given to `int | str` is the number.
        for arg in sorted(args, key=lambda arg: (arg is str, arg is not type(None))):
            try:
                return _from_text(arg, text)
            except ValueError:
                continue
        raise ValueError(text)
    if kind is str:
        return text
    word = text.strip()
    if origin is Literal:
        for option in args:
            if word == str(option):
                return option
        return text  # `checked` raises, with the options
    if kind is type(None):
        if word.lower() in ("none", "null"):
            return None
        raise ValueError(text)
    if kind is bool:
        if word.lower() in TRUE | FALSE:
            return word.lower() in TRUE
        raise ValueError(text)
    if kind is int:
        return integer(word)
    if kind is float:
        return real(word)
    if word.startswith(("[", "(")):
        try:
            return _sequence(kind, ast.literal_eval(word))
        except (SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(text) from None
    items = [item.strip() for item in word.split(",")] if word else []
    kinds = (args[:1] if origin is list or Ellipsis in args else args) or (str,)
    if len(kinds) == 1:
        kinds = kinds * len(items)
    if len(kinds) != len(items):
        raise ValueError(text)
    return _sequence(kind, map(_from_text, kinds, items))


def _guessed(text: str) -> Any:
    """A value as YAML reads it: `3` is a number, `[a, b]` a list, `hello` text; `none` is None."""
    try:
        value = read_yaml(text, "", "").data
    except WanlabError:
        return text
    if text.strip().lower() == "none":
        return None
    return value if text.strip() and _matches(ANYTHING, value) else text


def _sequence(kind: Any, items: Any) -> list | tuple:
    return (tuple if (typing.get_origin(kind) or kind) is tuple else list)(items)


def _unquoted(node: ast.expr, place: str) -> ast.expr:
    """A type that is written as text, such as `"int | None"`, as the type."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return node
    try:
        return ast.parse(node.value.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise WanlabError(f"{place}: {_short(node.value)} is no type") from None


def _type_of(node: ast.expr, place: str) -> Any:
    node = _unquoted(node, place)
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name) and node.id in SIMPLE:
        return SIMPLE[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type_of(node.left, place), _type_of(node.right, place)]  # noqa: UP007
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name | ast.Attribute):
        name = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal" and all(isinstance(item, ast.Constant | ast.UnaryOp) for item in inner):
            with contextlib.suppress(ValueError, TypeError):
                return Literal[tuple(ast.literal_eval(item) for item in inner)]
        if name == "Optional" and len(inner) == 1:
            return Union[_type_of(inner[0], place), None]  # noqa: UP007
        if name == "Union" and inner:
            return Union[tuple(_type_of(item, place) for item in inner)]  # noqa: UP007
        if name in ("list", "List") and len(inner) == 1:
            return GenericAlias(list, (_type_of(inner[0], place),))
        if name in ("tuple", "Tuple"):
            dots = [isinstance(item, ast.Constant) and item.value is Ellipsis for item in inner]
            kinds = tuple(
                ... if dot else _type_of(item, place) for item, dot in zip(inner, dots, strict=True)
            )
            return GenericAlias(tuple, kinds)
    raise WanlabError(
        f"{place}: type {ast.unparse(node)!r} is not one of int, float, bool, str, Literal[...], X | None, "
        "list[...], tuple[...]"
    )


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
