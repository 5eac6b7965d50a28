"""Reads hand-written YAML into a typed record; every error names the line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import yaml

from wanlab.core.errors import WanlabError, did_you_mean, first_line

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
        except msgspec.ValidationError as error:
            reason, _, place = str(error).partition(" - at `$")
            inside = tuple(int(n) if n else name for n, name in re.findall(r"\[(\d+)\]|\.(\w+)", place))
            self.refuse((*at, *inside), reason)


class _Dumper(yaml.SafeDumper):
    """Writes text that has one of YAML's rarer line breaks with escapes, as they would be read back as spaces."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


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


def read_yaml(text: str, where: str, what: str) -> Document:
    """The data of a YAML text, and the line of every value.

    Raises:
        WanlabError: the text is not YAML, or a key is given twice.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise WanlabError(f"{where}{line}: {getattr(error, 'problem', None) or first_line(error)}") from error
    except (ValueError, OverflowError) as error:  # a date or a number that cannot be, such as 2026-02-30
        raise WanlabError(f"{where}: {first_line(error)}; quote it where text is meant") from error
    except RecursionError as error:
        raise WanlabError(f"{where}: lists and maps lie too deep inside one another") from error
    lines: dict[At, int] = {}

    def walk(node: Any, at: At) -> None:
        if node is None:
            return
        lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    raise WanlabError(
                        f"{where}, line {key.start_mark.line + 1}: {key.value!r} is given twice"
                    )
                seen.add(key.value)
                lines[(*at, key.value)] = key.start_mark.line + 1
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*at, index))

    try:
        walk(root, ())
    except RecursionError as error:
        raise WanlabError(f"{where}: a value contains itself by an alias (`*name`); write it out") from error
    return Document(data, lines, where, what)
