"""A configuration as data: the engine of each component, the precision plan, techniques. One YAML file, one hash."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from wanlab import techniques
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_text
from wanlab.core.paths import locate, recipes
from wanlab.core.text import read_text
from wanlab.core.yaml_lines import At, Document, compact, read_yaml, write_yaml
from wanlab.engines.registry import EAGER, ENGINES, engine_kind
from wanlab.models.spec import COMPONENTS, EXPERTS
from wanlab.precision.plan import AS_LOADED, PRESETS, Plan, load_plan, plan_at

DEFAULT = "default"
"""The plan that changes nothing: the model as it was loaded."""

FOLDER = "configurations"
"""Folder in `recipes/` of the configurations that come with wanlab."""


class Configuration(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """Engines, precision plan and techniques of a model.

    Attributes:
        name: name in tables and files.
        about: description in one line.
        engines: one name for the whole model: every component that usually runs on this engine and, where the engine
            needs a graph, can be converted; the others eager. Or
            component -> engine, where a component may be a pattern such as `"expert*"` and the last that fits counts;
            components that no pattern fits are eager.
        plan: number formats of the experts' layers; None is the model as it was loaded.
        techniques: switches that make a model faster or smaller (`wanlab techniques`), as a list of names, or as name ->
            settings; a setting that is left out has its default. Their order means nothing: each has its place.
        settings: engine -> setting -> value; each engine has its own (`wanlab.engines.EngineKind.settings`).
    """

    name: str
    about: str = ""
    engines: str | dict[str, str] = EAGER
    plan: Plan | None = None
    techniques: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}

    def engine_of(self, component: str) -> str:
        """The engine that runs a component."""
        if isinstance(self.engines, str):
            return self.engines if engine_kind(self.engines).runs_usually(component) else EAGER
        fitting = [name for pattern, name in self.engines.items() if fnmatch.fnmatchcase(component, pattern)]
        return fitting[-1] if fitting else EAGER

    @property
    def hash(self) -> str:
        """SHA-256 of what the configuration does: its name and `about`, and those of its plan, do not count."""
        facts = {
            "engines": self._resolved(),
            "plan": None if self.plan is None else self.plan.hash,
            "techniques": {
                name: msgspec.to_builtins(techniques.settings_of(name, own))
                for name, own in self.techniques.items()
            }
            or [],  # hashes from before there were techniques stay what they are
            "settings": {name: own for name, own in self.settings.items() if own},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def engine(self) -> str:
        """Names of its engines for tables: `"onnxruntime"`, or `"onnxruntime + streamed_vae"` where components differ."""
        if isinstance(self.engines, str):
            return self.engines
        names = dict.fromkeys(name for name in self._resolved().values() if name != EAGER)
        return " + ".join(name for name in ENGINES if name in names) or EAGER

    @property
    def plan_name(self) -> str:
        """The name of its plan; `"default"` where it has none."""
        return DEFAULT if self.plan is None else self.plan.name

    @property
    def label(self) -> str:
        """Its name; where it was made from an engine and a plan, their names."""
        if self.name != _short_name(self.engine, self.plan):
            return self.name
        return self.engine if self.plan is None else f"{self.engine} {self.plan.name}"

    def to_dict(self) -> dict[str, Any]:
        """As canonical data for JSON and YAML: fields with their default are left out; a preset is its name alone."""
        data = compact(self)
        if self.plan is not None:
            is_preset = PRESETS.get(self.plan.name) == self.plan
            data["plan"] = self.plan.name if is_preset else self.plan.to_dict()
        if self.techniques and not any(self.techniques.values()):
            data["techniques"] = list(self.techniques)
        return data

    def to_yaml(self) -> str:
        """The canonical YAML, which `parse_configuration` reads back."""
        return write_yaml(self.to_dict())

    def check(self) -> Iterator[tuple[At, str]]:
        """Mistakes in the values: place and message of each."""
        if not re.fullmatch(r"[\w.+-]+", self.name):
            yield ("name",), f"{self.name!r} cannot be a file name; use letters, digits and . _ + -"
        mistakes = list(self._check_engines())
        yield from mistakes
        yield from self._check_techniques(engines_known=not mistakes)
        if not mistakes:
            yield from self._check_plan()
            yield from self._check_settings()

    def _check_engines(self) -> Iterator[tuple[At, str]]:
        by_component = {"": self.engines} if isinstance(self.engines, str) else self.engines
        for pattern, name in by_component.items():
            at: At = ("engines",) if isinstance(self.engines, str) else ("engines", pattern)
            try:
                kind = engine_kind(name)
            except WanlabError as error:
                yield at, str(error)
                continue
            if isinstance(self.engines, str):
                continue
            fitting = fnmatch.filter(COMPONENTS, pattern)
            unable = [component for component in fitting if not kind.runs(component)]
            if not fitting:
                hint = did_you_mean(pattern, COMPONENTS)
                yield (
                    at,
                    f"no component {pattern!r}{hint}; there are {', '.join(COMPONENTS)}, and patterns such as expert*",
                )
            elif unable:
                yield at, f"{name} runs {' and '.join(kind.components)}, not {unable[0]}"

    def _check_techniques(self, engines_known: bool) -> Iterator[tuple[At, str]]:
        known = []
        for name, own in self.techniques.items():
            at: At = ("techniques", name)
            try:
                techniques.settings_of(name, own)
            except WanlabError as error:
                yield at, str(error)
                continue
            known.append(name)
            engines = {component: self.engine_of(component) for component in EXPERTS} if engines_known else {}
            if found := techniques.barred(techniques.technique_of(name), engines):
                component, engine, reason = found
                yield at, f"{name} does not go with {engine} on {component}: {reason}"
        for name, other, reason in techniques.conflicts(known):
            yield ("techniques", other), f"{name} and {other} cannot go together: {reason}; leave one out"

    def _check_plan(self) -> Iterator[tuple[At, str]]:
        if self.plan is None:
            return
        for component in EXPERTS:
            rules = any(fnmatch.fnmatchcase(component, rule.component) for rule in self.plan.rules)
            planned = rules or self.plan.default != AS_LOADED
            name = self.engine_of(component)
            if planned and not engine_kind(name).plans:
                able = ", ".join(kind.name for kind in ENGINES.values() if kind.plans)
                yield (
                    ("plan",),
                    f"{name}, which runs {component}, applies no precision plan; run the experts on one of {able}, or leave"
                    " the plan out",
                )
                return

    def _check_settings(self) -> Iterator[tuple[At, str]]:
        used = dict.fromkeys(self._resolved().values())
        for engine, own in self.settings.items():
            if engine not in used:
                near = did_you_mean(engine, used) or f"; its engines are {', '.join(used)}"
                yield ("settings", engine), f"no component runs on {engine!r}{near}"
                continue
            known = engine_kind(engine).settings
            for name, value in own.items():
                at = ("settings", engine, name)
                if name not in known:
                    choices = f"it has {', '.join(known)}" if known else "it has none"
                    yield at, f"{engine} has no setting {name!r}{did_you_mean(name, known)}; {choices}"
                elif not isinstance(value, str | int | float | bool):
                    yield at, f"a setting is text, a number, true or false, not {type(value).__name__}"
                elif fault := engine_kind(engine).setting_fault(name, value):
                    yield at, fault

    def _resolved(self) -> dict[str, str]:
        """Component -> engine; `""` is for components whose name wanlab does not know."""
        return {component: self.engine_of(component) for component in (*COMPONENTS, "")}


def parse_configuration(
    text: str, where: str = "the configuration", folder: str | os.PathLike | None = None
) -> Configuration:
    """A configuration from YAML text.

    Args:
        where: beginning of messages, e.g. the file's path.
        folder: folder in which plan files are looked for before the working folder.

    Raises:
        WanlabError: not YAML; unknown or missing fields; values of another type; engines, components, plans, techniques or
            settings that do not exist or do not go together. The message names the line and the field.
    """
    document = read_yaml(text, where, "the configuration")
    data = document.data
    if not isinstance(data, dict):
        document.refuse((), "a configuration is a mapping with name, engines and plan")
    document.known_fields(data, Configuration)
    plan = _plan_of(document, Path(folder) if folder is not None else None)
    data["plan"] = None
    _name_techniques(document)
    _check_mappings(document)
    configuration = msgspec.structs.replace(document.convert(Configuration), plan=plan)
    for at, mistake in configuration.check():
        document.refuse(at, mistake)
    return configuration


def _plan_of(document: Document, folder: Path | None) -> Plan | None:
    source = document.data.get("plan")
    if source is None or source == DEFAULT:
        return None
    if isinstance(source, dict):
        return plan_at(document, ("plan",))
    if not isinstance(source, str):
        document.refuse(("plan",), "a plan is the name of a preset, a file, or a mapping with name and rules")
    try:
        beside = folder / source if folder is not None else None
        return load_plan(beside if beside is not None and beside.is_file() else source)
    except WanlabError as error:
        document.refuse(("plan",), f"{error}{did_you_mean(source, [DEFAULT])}")


def _name_techniques(document: Document) -> None:
    """Bring techniques, a list of names or name -> settings, into the form of the record."""
    given = document.data.get("techniques")
    if isinstance(given, list):
        for index, name in enumerate(given):
            if not isinstance(name, str):
                document.refuse(("techniques", index), f"a technique is given by its name, not {name!r}")
            if name in given[:index]:
                document.refuse(("techniques", index), f"{name!r} is given twice")
            document.lines[("techniques", name)] = document.lines[("techniques", index)]
        document.data["techniques"] = {name: {} for name in given}
    elif isinstance(given, dict):
        for name, settings in given.items():
            if not isinstance(settings, dict | None):
                document.refuse(("techniques", str(name)), "settings are {setting: value}")
        document.data["techniques"] = {name: settings or {} for name, settings in given.items()}
    elif given is None:
        document.data.pop("techniques", None)


def _check_mappings(document: Document) -> None:
    """Check types inside mappings, whose place msgspec does not name in its messages."""
    engines, settings = document.data.get("engines"), document.data.get("settings")
    for name, value in engines.items() if isinstance(engines, dict) else ():
        if not isinstance(name, str) or not isinstance(value, str):
            document.refuse(
                ("engines", str(name)), f"a component and the name of its engine are text, not {value!r}"
            )
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if not isinstance(name, str) or not isinstance(value, dict):
            document.refuse(("settings", str(name)), "settings are engine: {setting: value}")
        for setting in value:
            if not isinstance(setting, str):
                document.refuse(
                    ("settings", name, str(setting)), f"the name of a setting is text, not {setting!r}"
                )


def save_configuration(configuration: Configuration, path: str | os.PathLike) -> Path:
    """Write a configuration as YAML that `load_configuration` reads back; its folder is made."""
    return write_text(Path(path), configuration.to_yaml())


def configurations() -> dict[str, Configuration]:
    """Name -> configuration, of those that come with wanlab (`recipes/configurations/*.yaml`), by name.

    Raises:
        WanlabError: one of the files has a mistake.
    """
    return {path.stem: _read(path) for path in sorted(recipes(FOLDER).glob("*.yaml"))}


def load_configuration(
    source: str | os.PathLike | Configuration | None = None,
    *,
    engine: str = EAGER,
    plan: str | os.PathLike | Plan = DEFAULT,
) -> Configuration:
    """A configuration by its name, from a file, or from an engine and a plan.

    Args:
        source: name of `configurations()`, YAML file, or configuration. None makes one of `engine` and `plan`.
        engine: one engine for the whole model. plan: `"default"`, name of a preset, file, or plan. Beside a `source` they
            must agree with it, unless they have their defaults.

    Raises:
        WanlabError: no such name or file, as `parse_configuration`, or `engine` or `plan` that differ from the source's.
    """
    short = _from_shorthands(engine, plan)
    if source is None:
        return short
    configuration = source if isinstance(source, Configuration) else _load(source)
    for what, given, own, differs in (
        (
            "engine",
            engine,
            configuration.engine,
            engine != EAGER and short._resolved() != configuration._resolved(),
        ),
        (
            "plan",
            short.plan_name,
            configuration.plan_name,
            short.plan is not None and not _same(short, configuration),
        ),
    ):
        if differs:
            raise WanlabError(
                f"configuration {configuration.name} has {what}={own}, and {what}={given} is given beside it; leave {what}"
                " out, or give another configuration"
            )
    return configuration


def identity(parameters: Mapping[str, Any]) -> dict[str, str] | None:
    """Name and hash of the configuration that a notebook's parameters name; None where it has no parameter `configuration`.

    Raises:
        WanlabError: as `load_configuration`.
    """
    if "configuration" not in parameters:
        return None
    given = {name: parameters[name] for name in ("engine", "plan") if isinstance(parameters.get(name), str)}
    configuration = load_configuration(parameters["configuration"] or None, **given)
    return {"name": configuration.label, "hash": configuration.hash}


def _same(first: Configuration, second: Configuration) -> bool:
    return second.plan is not None and first.plan.hash == second.plan.hash


def _short_name(engine: str, plan: Plan | None) -> str:
    return engine if plan is None else f"{engine}+{plan.name}"


def _from_shorthands(engine: str, plan: str | os.PathLike | Plan) -> Configuration:
    rules = None
    if not (isinstance(plan, str) and plan == DEFAULT):
        try:
            rules = load_plan(plan)
        except WanlabError as error:
            near = did_you_mean(str(plan), [DEFAULT])
            raise WanlabError(f"{error}{near or f'; {DEFAULT!r} is the model as it is'}") from None
    configuration = Configuration(name=_short_name(engine, rules), engines=engine, plan=rules)
    for _, mistake in configuration.check():
        raise WanlabError(mistake)
    return configuration


def _load(source: str | os.PathLike) -> Configuration:
    shipped = recipes(FOLDER, f"{source}.yaml")
    if Path(source).name == str(source) and shipped.is_file():
        return _read(shipped)
    path = locate(source)
    if os.path.isfile(path):
        return _read(path)
    names = sorted(file.stem for file in recipes(FOLDER).glob("*.yaml"))
    what = (
        f"no configuration at {path}"
        if path.suffix.lower() in (".yaml", ".yml")
        else f"no configuration {str(source)!r}"
    )
    raise WanlabError(
        f"{what}{did_you_mean(path.stem, names)}; give a YAML file or one of {', '.join(names)}"
    )


def _read(path: Path) -> Configuration:
    return parse_configuration(read_text(path), str(path), path.parent)
