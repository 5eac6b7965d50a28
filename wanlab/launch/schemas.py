"""JSON Schemas of the YAML files that people write: precision plans, configurations, grids of sweeps.

An editor checks and completes a file by them while it is written. Fields, types, limits and descriptions come from the
records that the loaders fill, names of formats, presets, engines and settings from the tables that the loaders ask. What no
schema can say is in `NOT_SAID`: the loaders alone check it.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec

from wanlab.configuration.configuration import DEFAULT, Configuration
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.engines.registry import ENGINES, EngineKind
from wanlab.launch.grid import Grid, Part
from wanlab.models.spec import COMPONENTS
from wanlab.precision.formats import BLOCK_SIZES, FORMATS
from wanlab.precision.plan import AS_LOADED, BLOCKS, FLOATS, KEEP, PRESETS, STEPS, Plan, Rule
from wanlab.techniques.registry import TECHNIQUES
from wanlab.techniques.technique import Technique

Json = dict[str, Any]

KINDS: dict[str, type[msgspec.Struct]] = {"plan": Plan, "configuration": Configuration, "sweep": Grid}
"""Kind of file -> the record that its loader fills."""

NOT_SAID = {
    "plan": "that a step is below num_steps, that a range goes upwards, and that a model has the layers, blocks and roles"
    " that rules name (`wanlab plan show FILE --model NAME`)",
    "configuration": "that the experts' engine applies plans, that techniques go together and with the engines, that"
    " a setting is of an engine in use, and that a plan's file is there (`wanlab config explain FILE --model NAME`)",
    "sweep": "the notebook's parameters and their types, names in only, exclude and baseline, and that files, models and"
    " plans are there (`wanlab sweep FILE --dry-run`)",
}
"""Kind of file -> what its loader checks and its schema does not, with the command that checks it."""


def file_schema(kind: str) -> Json:
    """The JSON Schema (draft 2020-12) of a kind of file.

    Raises:
        WanlabError: `kind` is not in `KINDS`.
    """
    if kind not in KINDS:
        raise WanlabError(
            f"no kind of file {kind!r}{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}"
        )
    (whole,), records = msgspec.json.schema_components((KINDS[kind],), ref_template="#/$defs/{name}")
    for record in (Plan, Rule, Configuration, Grid, Part):
        if record.__name__ in records:
            _describe(records[record.__name__], record)
    if kind == "sweep":
        _complete_grid(records["Grid"], records["Part"])
    else:
        _complete_plan(records["Plan"], records["Rule"])
    if kind == "configuration":
        _complete_configuration(records["Configuration"]["properties"])
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"wanlab {kind}",
        "$comment": f"Written by `wanlab schema {kind}`. Not checked by it: {NOT_SAID[kind]}.",
    }
    return head | whole | {"$defs": records}


def _describe(schema: Json, record: type) -> None:
    """Put the texts of a record's docstring beside the record and its fields."""
    schema["description"], texts = _docstring(record)
    if record is Grid:  # the fields that it does not describe are those of a part
        texts = _docstring(Part)[1] | texts
    for name, field in schema["properties"].items():
        if name in texts:
            schema["properties"][name] = {"description": texts[name]} | field


def _docstring(record: type) -> tuple[str, dict[str, str]]:
    """First paragraph, and field -> text, of a docstring with a list of attributes."""
    about, _, attributes = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    found = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    found = [(names, re.sub(r"\bNone\b", "null", " ".join(text.split()))) for names, text in found]
    return about, {name: text for names, text in found for name in names.split(", ")}


def _complete_plan(plan: Json, rule: Json) -> None:
    sized = [f"int4-weight-{size}" for size in BLOCK_SIZES]
    plan["properties"]["name"] |= _NAME
    plan["properties"]["default"] |= {"enum": [AS_LOADED, *FLOATS]}
    plan["properties"]["num_steps"]["anyOf"][0]["minimum"] = 1
    rule["properties"]["format"] |= {"enum": [*FLOATS, *FORMATS, *sized, KEEP]}
    # One pattern, block or step needs no list or quotes.
    layers = rule["properties"]["layers"]
    several = {"type": "array", "items": layers.pop("items"), "minItems": 1}
    del layers["type"]
    layers["anyOf"] = [{"type": "string"}, several]
    for name, form in (("blocks", BLOCKS), ("steps", STEPS)):
        choice = rf"\s*(?:{form.pattern})\s*"
        text = {"type": "string", "pattern": f"^{choice}(?:,{choice})*$"}
        rule["properties"][name]["anyOf"] = [text, {"type": "integer", "minimum": 0}, {"type": "null"}]
    named = {"required": ["steps"], "properties": {"steps": {"not": {"type": "null"}}}}
    plan["if"] = {"required": ["rules"], "properties": {"rules": {"contains": named}}}
    plan["then"] = {"required": ["num_steps"]}


def _complete_configuration(fields: Json) -> None:
    fields["name"] |= _NAME
    engines = {"enum": list(ENGINES)}
    by_component = {
        component: {"enum": [name for name, kind in ENGINES.items() if kind.runs(component)]}
        for component in COMPONENTS
    }
    fields["engines"]["anyOf"] = [
        engines,
        {"type": "object", "properties": by_component, "additionalProperties": engines},
    ]
    preset = {"enum": [DEFAULT, *PRESETS], "description": "a plan of `wanlab plan list`"}
    file = {"type": "string", "pattern": r"[./\\]", "description": "a plan's file, relative to this one"}
    fields["plan"]["anyOf"] = [preset, file, {"$ref": "#/$defs/Plan"}, {"type": "null"}]
    named = {name: _technique(kind) for name, kind in TECHNIQUES.items()}
    listed = {"type": "array", "items": {"enum": list(named)}, "uniqueItems": True}
    fields["techniques"]["anyOf"] = [
        listed,
        {"type": "object", "properties": named, "additionalProperties": False},
    ]
    for key in ("type", "additionalProperties"):
        fields["techniques"].pop(key, None)
    fields["settings"] |= {
        "properties": {name: _settings(kind) for name, kind in ENGINES.items()},
        "additionalProperties": False,
    }


def _settings(kind: EngineKind) -> Json:
    """The settings of an engine with the types that it states."""
    described = {
        name: {"description": text}
        | msgspec.json.schema(kind.setting_types.get(name, str | int | float | bool))
        for name, text in kind.settings.items()
    }
    return {"type": "object", "properties": described, "additionalProperties": False}


def _technique(kind: type[Technique]) -> Json:
    """The settings of a technique; null takes the defaults."""
    own = msgspec.json.schema(kind.Settings)["$defs"][kind.Settings.__name__]
    about = _docstring(kind.Settings)[1]
    for name, field in own.get("properties", {}).items():
        field["description"] = about[name]
    settings = {"type": "object", "properties": own.get("properties", {}), "additionalProperties": False}
    return {"description": kind.does, "anyOf": [settings, {"type": "null"}]}


def _complete_grid(grid: Json, part: Json) -> None:
    grid["properties"]["name"] |= _NAME
    grid["oneOf"] = [{"required": ["notebook"]}, {"required": ["notebooks"]}]
    grid["properties"]["axes"] |= {"additionalProperties": _AXIS}
    part["properties"]["axes"]["anyOf"][0] |= {"additionalProperties": _AXIS}


_NAME: Json = {"pattern": r"^[^\s/\\]+$"}

_RANGE: Json = {
    "type": "object",
    "description": "numbers with both ends",
    "properties": {
        "from": {"type": "number"},
        "to": {"type": "number"},
        "by": {"type": "number", "exclusiveMinimum": 0, "default": 1},
    },
    "required": ["from", "to"],
    "additionalProperties": False,
}
_FILES: Json = {
    "type": "object",
    "description": "files that fit a pattern, such as recipes/*.yaml",
    "properties": {"files": {"type": "string"}},
    "required": ["files"],
    "additionalProperties": False,
}
_VALUE: Json = {"anyOf": [{"not": {"type": "object"}}, _RANGE, _FILES]}
_AXIS: Json = {"anyOf": [{"type": "array", "items": _VALUE, "minItems": 1}, _RANGE, _FILES]}
