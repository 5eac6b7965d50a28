"""Plans as YAML: read with the line of every mistake, written so that people can edit them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from wanlab.errors import WanlabError, did_you_mean
from wanlab.precision.plan import Plan, Rule, spell
from wanlab.precision.presets import PRESETS


def load_plan(source: str | os.PathLike | Plan) -> Plan:
    """A plan from a YAML file, or a preset by its name.

    Raises:
        WanlabError: no such file or preset; YAML that cannot be read; unknown or missing fields, values of another type,
            formats or ranges that do not exist. The message names the line.
    """
    if isinstance(source, Plan):
        return source
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise WanlabError(f"no plan at {path}; give a YAML file or one of {', '.join(PRESETS)}")
        raise WanlabError(
            f"no plan {str(source)!r}{did_you_mean(str(source), PRESETS)}; give a YAML file or {', '.join(PRESETS)}"
        )
    return parse_plan(path.read_text(encoding="utf-8"), str(path))


def parse_plan(text: str, where: str = "the plan") -> Plan:
    """A plan from YAML text; `where` begins the messages. Raises as `load_plan`."""
    data, lines = _read(text, where)

    def refuse(path: tuple[str | int, ...], said: str):
        known = path
        while known and known not in lines:
            known = known[:-1]
        raise WanlabError(f"{where}, line {lines.get(known, 1)}, {spell(path)}: {said}")

    if not isinstance(data, dict):
        refuse((), "a plan is a mapping with name, default and rules")
    _known_fields(data, Plan, (), refuse)
    for index, rule in enumerate(data["rules"] if isinstance(data.get("rules"), list) else ()):
        if isinstance(rule, dict):
            _known_fields(rule, Rule, ("rules", index), refuse)
            # One pattern, block or step needs no list or quotes.
            if isinstance(rule.get("layers"), str):
                rule["layers"] = [rule["layers"]]
            for field in ("blocks", "steps"):
                if isinstance(rule.get(field), int) and not isinstance(rule[field], bool):
                    rule[field] = str(rule[field])
    try:
        plan = msgspec.convert(data, Plan)
    except msgspec.ValidationError as error:
        said, _, at = str(error).partition(" - at `$")
        path = tuple(int(n) if n else name for n, name in re.findall(r"\[(\d+)\]|\.(\w+)", at))
        refuse(path, said)
    for path, said in plan.check():
        refuse(path, said)
    return plan


def save_plan(plan: Plan, path: str | os.PathLike) -> Path:
    """Write a plan as YAML that `load_plan` reads back; its folder is made."""
    import yaml

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True, width=110)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _known_fields(data: dict, kind: type, path: tuple, refuse) -> None:
    fields = kind.__struct_fields__
    for name in data:
        if name not in fields:
            refuse(
                (*path, str(name)),
                f"no field {str(name)!r}{did_you_mean(str(name), fields)}; there are {', '.join(fields)}",
            )


def _read(text: str, where: str) -> tuple[Any, dict[tuple, int]]:
    """The data, and the line of every value by its path."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise WanlabError(f"{where}{line}: {getattr(error, 'problem', None) or error}") from error
    lines: dict[tuple, int] = {}

    def walk(node, path: tuple) -> None:
        if node is None:
            return
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    raise WanlabError(
                        f"{where}, line {key.start_mark.line + 1}: {key.value!r} is given twice"
                    )
                seen.add(key.value)
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, index))

    walk(root, ())
    return data, lines
