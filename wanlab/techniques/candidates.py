"""Techniques with a few settings each, and the stacks that can be made of them: what a search chooses from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.paths import locate
from wanlab.core.yaml_lines import Document, load_yaml, read_yaml
from wanlab.techniques.registry import conflicts, settings_of, technique_of
from wanlab.techniques.technique import TIERS, setting_text

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "easy_cache": [{"threshold": 0.05}, {"threshold": 0.1}],
    "solver": [{"steps_percent": 60}],
    "guidance_interval": [{"low": 0.3}],
    "batched_guidance": [{}],
}
"""Technique -> settings from mild to strong: a small set that runs on every machine."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One technique with settings; two that do the same are equal.

    Attributes:
        technique: its name. settings: those that are given; the others have their defaults.
    """

    technique: str
    settings: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """`stack_key` of it alone."""
        return stack_key({self.technique: self.settings})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def tier(self) -> str:
        """What it does to a video: exact, numeric or lossy."""
        return technique_of(self.technique)(settings_of(self.technique, self.settings)).tier

    @property
    def title(self) -> str:
        """`"easy cache 0.05"`; of several settings each with its name."""
        name = self.technique.replace("_", " ")
        given = {setting.replace("_", " "): setting_text(value) for setting, value in self.settings.items()}
        if len(given) == 1:
            return f"{name} {next(iter(given.values()))}"
        return " ".join([name, *(f"{setting} {value}" for setting, value in given.items())])


@dataclass(frozen=True)
class Stack:
    """Techniques that are switched on together, in the order in which they are applied."""

    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> Stack:
        """A stack of candidates in any order."""
        ordered = sorted(candidates, key=lambda each: (technique_of(each.technique).order, each.technique))
        return cls(tuple(ordered))

    @property
    def chosen(self) -> dict[str, dict[str, Any]]:
        """Technique -> the settings that are given, as in a configuration."""
        return {each.technique: dict(each.settings) for each in self.candidates}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.technique for each in self.candidates)

    @property
    def label(self) -> str:
        """`"easy cache 0.05 + solver 60"`."""
        return " + ".join(each.title for each in self.candidates)

    @property
    def tier(self) -> str:
        """The loosest of its techniques."""
        return max((each.tier for each in self.candidates), key=list(TIERS).index)

    @cached_property
    def key(self) -> str:
        """The same text for the same techniques with the same settings, however they are written."""
        return stack_key(self.chosen)

    def extended(self, candidate: Candidate) -> Stack | None:
        """The stack with one technique more; None where it has the technique or cannot go with it."""
        if candidate.technique in self.names or conflicts([*self.names, candidate.technique]):
            return None
        return Stack.of([*self.candidates, candidate])

    def parts(self) -> list[Stack]:
        """The stacks that are left where one technique is taken out."""
        count = len(self.candidates)
        if count < 2:
            return []
        return [Stack(self.candidates[:out] + self.candidates[out + 1 :]) for out in range(count)]


def stack_key(chosen: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Techniques with all their settings as one text, which is equal for what does the same.

    Raises:
        WanlabError: as `settings_of`.
    """
    full = {name: msgspec.to_builtins(settings_of(name, given)) for name, given in chosen.items()}
    return json.dumps(full, sort_keys=True)


def make_candidates(given: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[Candidate]:
    """Candidates of a table, each once, in its order.

    Args:
        given: technique -> its settings, from mild to strong; `[{}]` for the defaults alone.

    Raises:
        WanlabError: none at all, a technique without settings, or as `settings_of`.
    """
    found: dict[str, Candidate] = {}
    for name, ladder in given.items():
        technique_of(name)
        if not isinstance(ladder, list | tuple) or not ladder:
            raise WanlabError(
                f"{name} needs a list of settings, such as [{{}}] for its defaults, not {ladder!r}"
            )
        for settings in ladder:
            if not isinstance(settings, Mapping | None):
                raise WanlabError(f"settings of {name} are {{setting: value}}, not {settings!r}")
            candidate = Candidate(name, dict(settings or {}))
            found.setdefault(candidate.key, candidate)
    if not found:
        raise WanlabError("there are no candidates; give at least one technique with a list of settings")
    return list(found.values())


def read_candidates(source: str | os.PathLike | None) -> list[Candidate] | None:
    """Candidates of a YAML file or text, technique -> list of settings; None of None, which `space_of` has defaults for.

    Args:
        source: path of a file that ends in .yaml or .yml, or text such as
            `{easy_cache: [{threshold: 0.05}, {threshold: 0.1}], text_keys: [{}]}`.

    Raises:
        WanlabError: a file that cannot be read, not YAML, or as `make_candidates`; the message names the line.
    """
    if source is None:
        return None
    what = "the candidates"
    if str(source).lower().endswith((".yaml", ".yml")):
        document = load_yaml(locate(source), what)
    else:
        document = read_yaml(str(source), "candidates", what)
    if not isinstance(document.data, dict):
        document.refuse(
            (), "candidates are {technique: [settings, ...]}, such as {easy_cache: [{threshold: 0.05}]}"
        )
    _check_each(document)
    return make_candidates(document.data)


def _check_each(document: Document) -> None:
    for name, ladder in document.data.items():
        rows = ladder if isinstance(ladder, list) and ladder else [ladder]
        for index, settings in enumerate(rows):
            try:
                make_candidates({name: [settings] if isinstance(ladder, list) and ladder else ladder})
            except WanlabError as error:
                document.refuse((name, index) if isinstance(ladder, list) else (name,), str(error))
