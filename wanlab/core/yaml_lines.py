"""Reads hand-written YAML into a typed record; every error names the line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import msgspec
import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.cyaml import CParser
from yaml.resolver import Resolver

from wanlab.core import limits
from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.text import WRONG, read_text

At = tuple[str | int, ...]  # path of a value in the document: ("rules", 2, "format")


@dataclass(frozen=True)
class Document:
    """The data of a YAML text, and the line on which each value stands."""

    data: Any
    lines: dict[At, int]
    where: str  # file name or other origin; every message begins with it
    what: str  # name of the whole document in messages: "the plan"

    def refuse(self, at: At, reason: str) -> NoReturn:
        """Raise `WanlabError` with the line of the value at `at`, or of the nearest one around it."""
        known = at
        while known and known not in self.lines:
            known = known[:-1]
        place = spell(at) or self.what
        raise WanlabError(f"{self.where}, line {self.lines.get(known, 1)}, {place}: {reason}")

    def known_fields(self, data: dict, kind: type | Iterable[str], at: At = ()) -> None:
        """Refuse a key that is not a field of the record `kind` (or not in the list of names)."""
        fields = (
            [field.encode_name for field in msgspec.structs.fields(kind)]
            if isinstance(kind, type)
            else [*kind]
        )
        for name in data:
            if name not in fields:
                hint = did_you_mean(str(name), fields)
                self.refuse((*at, str(name)), f"no field {str(name)!r}{hint}; there are {', '.join(fields)}")

    def value(self, at: At) -> Any:
        """The value at a path."""
        value = self.data
        for part in at:
            value = value[part]
        return value

    def convert(self, kind: type, at: At = ()) -> Any:
        """The data at a path as the msgspec record `kind`."""
        try:
            return msgspec.convert(self.value(at), kind)
        except WRONG as error:
            reason, _, place = first_line(error.__cause__ or error).partition(" - at `$")
            inside = tuple(int(n) if n else name for n, name in re.findall(r"\[(\d+)\]|\.(\w+)", place))
            self.refuse((*at, *inside), reason)


PREFIX = "tag:yaml.org,2002:"
CORE = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Words that are no text, by type: pattern, and first characters. The core schema of YAML 1.2.2, section 10.3.2:
`1e-3` is a number and `010` is ten; `yes`, `12:30` and `2026-01-31` are text."""


def integer(text: str) -> int:
    """The number of `10`, `010`, `0o12` or `0xa`; `ValueError` for other text."""
    value = int(text, 0) if re.match(r"0[xo]", text) else int(text)
    str(value)  # Python writes no number of more than 4,300 digits
    return value


def real(text: str) -> float:
    """The number of `1e-3`, `.5`, `.inf` or `.nan`, or of Python's `inf` and `nan`; `ValueError` for other text."""
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": integer,
    "float": real,
    "str": str,
}


def _resolve_core(kind: Any) -> None:
    for name, (pattern, first) in CORE.items():
        kind.add_implicit_resolver(PREFIX + name, re.compile(f"(?:{pattern})\\Z"), [*first, ""])


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """Reads YAML 1.2 with the types of JSON; refuses what is too deep or too large while it reads.

    Events of libyaml come ten times as fast as those of Python; nodes are made in Python, where nothing overflows the stack.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {}

    def __init__(self, text: str, where: str):
        CParser.__init__(self, text)
        for kind in (Composer, SafeConstructor, Resolver):
            kind.__init__(self)
        self.where, self.depth, self.count = where, 0, 0
        self.most_deep, self.most = limits.limit("depth"), limits.limit("yaml_values")

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.count = self.depth + 1, self.count + 1
        line = f"{self.where}, line {self.peek_event().start_mark.line + 1}"
        if self.depth > self.most_deep:
            limits.check("depth", self.depth, f"{line}: lists and maps inside one another")
        if self.count > self.most:
            limits.check("yaml_values", self.count, f"{line}: number of values")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def scalar(self, node: yaml.Node) -> Any:
        text, name = self.construct_scalar(node), node.tag.removeprefix(PREFIX)
        try:
            return READERS[name](text)
        except (KeyError, ValueError):
            long = name == "int" and re.fullmatch(CORE["int"][0], text)
            reason = f"{len(text):,} digits are no number" if long else f"{text[:60]!r} is no {name}"
            raise ConstructorError(
                None, None, f"{reason}; quote it where text is meant", node.start_mark
            ) from None


_resolve_core(_Loader)
_Loader.add_implicit_resolver(f"{PREFIX}merge", re.compile(r"<<\Z"), ["<"])
for _name in (*CORE, "str"):
    _Loader.add_constructor(PREFIX + _name, _Loader.scalar)
_Loader.add_constructor(f"{PREFIX}seq", SafeConstructor.construct_yaml_seq)
_Loader.add_constructor(f"{PREFIX}map", SafeConstructor.construct_yaml_map)
_Loader.add_constructor(None, SafeConstructor.construct_undefined)


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes that YAML 1.1 or 1.2 would read as something else, and with escapes where it has one of YAML's
    rarer line breaks, as they would be read back as spaces."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_resolve_core(_Dumper)
_Dumper.add_representer(str, _write_text)


def write_yaml(data: Any) -> str:
    """Data as YAML text, which `read_yaml` reads back: in the order of the data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def compact(record: Any) -> Any:
    """A msgspec record as data for YAML, in the order of its fields, without fields that equal their default.

    `omit_defaults` of msgspec compares by identity, so a default value that is written out in a file would stay.
    """
    if isinstance(record, msgspec.Struct):
        fields = msgspec.structs.fields(record)
        values = {field.encode_name: (getattr(record, field.name), field) for field in fields}
        return {
            name: compact(value)
            for name, (value, field) in values.items()
            if field.required or value != _default(field)
        }
    if isinstance(record, dict):
        return {key: compact(value) for key, value in record.items()}
    return [compact(value) for value in record] if isinstance(record, list | tuple) else record


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def spell(at: At) -> str:
    """The path of a value as text: `rules[2].format`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def load_yaml(path: str | os.PathLike, what: str) -> Document:
    """`read_yaml` of a file, in any encoding of `read_text`.

    Raises:
        WanlabError: the file cannot be read, or as `read_yaml`.
    """
    return read_yaml(read_text(path), str(path), what)


def read_yaml(text: str, where: str, what: str) -> Document:
    """The data of a YAML text, and the line of every value: YAML 1.2 with the types of JSON.

    Raises:
        WanlabError: the text is not YAML, a key is given twice or is no text, a value contains itself, or there are more or
            deeper values than the limits allow.
    """
    try:
        loader = _Loader(text.removeprefix("\ufeff"), where)
        root = loader.get_single_node()
        lines = _lines(root, where)
        return Document(None if root is None else loader.construct_document(root), lines, where, what)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # The mark of an early end can be on the line after the last.
        last = text.count("\n")
        line = f", line {min(mark.line, last) + 1}" if mark else ""
        raise WanlabError(f"{where}{line}: {getattr(error, 'problem', None) or first_line(error)}") from error
    except RecursionError as error:  # the limit of depth was raised further than Python goes
        raise WanlabError(f"{where}: lists and maps lie too deep inside one another") from error
    except ValueError as error:  # half of a surrogate pair
        raise WanlabError(f"{where}: {first_line(error)}") from error


def _lines(root: yaml.Node | None, where: str) -> dict[At, int]:
    """Line of each value, from 1."""
    lines: dict[At, int] = {}
    most, around = limits.limit("yaml_values"), set()

    def walk(node: yaml.Node, at: At) -> None:
        line = f"{where}, line {node.start_mark.line + 1}"
        lines.setdefault(at, node.start_mark.line + 1)
        if len(lines) > most:
            limits.check(
                "yaml_values", len(lines), f"{line}: number of values, with those that aliases repeat"
            )
        if isinstance(node, yaml.ScalarNode):
            return
        if id(node) in around:
            raise WanlabError(f"{line}: a value contains itself by an alias (`*name`); write it out")
        around.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*at, index))
        else:
            seen = set()
            for key, value in node.value:
                line = f"{where}, line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise WanlabError(f"{line}: a key is a list or a map; write a word")
                if key.value in seen:
                    raise WanlabError(f"{line}: {key.value!r} is given twice")
                seen.add(key.value)
                lines[(*at, key.value)] = key.start_mark.line + 1
                walk(value, (*at, key.value))
        around.remove(id(node))

    if root is not None:
        walk(root, ())
    return lines
