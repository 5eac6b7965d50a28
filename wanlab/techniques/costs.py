"""Measured costs of stacks of techniques, read from the table of another run, such as one at true size on a GPU."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.paths import locate
from wanlab.core.text import parse_json, read_text
from wanlab.core.yaml_lines import read_yaml
from wanlab.measure.timing import Comparison, verdict_of
from wanlab.techniques.candidates import Candidate, Stack, stack_key
from wanlab.techniques.registry import conflicts

SPEEDUPS = ("speedup", "times_faster")
"""Names that the column of the ratio may have: time of the baseline over time of the stack."""


@dataclass(frozen=True)
class Costs:
    """How many times as fast each stack is, as another run measured it.

    Attributes:
        times: `candidates.stack_key` -> speed-up over the baseline. stacks: those that have one, in the table's order.
        source: name of the file. baseline: what the times are read against. model: what was timed, on which device; all as
            the table says, and "" where it does not.
    """

    times: Mapping[str, Comparison]
    stacks: tuple[Stack, ...]
    source: str
    baseline: str = ""
    model: str = ""

    def of(self, chosen: Mapping[str, Mapping[str, Any] | None]) -> Comparison | None:
        """The speed-up of a stack; None where the table has no row of it."""
        return self.times.get(stack_key(chosen))


def read_costs(
    source: str | os.PathLike | None, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Costs | None:
    """A table of costs: JSON (a list of rows, or a mapping with `rows`) or CSV, one row per measured stack. None of None.

    Columns: `techniques`, `speedup` or `times_faster`, and, where known, `low` and `high` (95 % interval), `noise_percent`,
    `baseline`, `model` and `device`. `techniques` is {technique: {setting: value}}, in a CSV the same as text. A table of
    `43_ladder` (variants.csv) names techniques alone, whose settings are those of the configuration that it took apart; one
    of `46_budget` (stacks.csv) has all of it. Rows of stacks that did nothing there are left out.

    Args:
        settings: technique -> its settings, for rows that name techniques alone.

    Raises:
        WanlabError: a file that cannot be read, a row without techniques or a speed-up, settings that are not known, or two
            rows of the same stack.
    """
    if source is None:
        return None
    path = locate(source)
    rows, facts = _rows(path)
    times: dict[str, Comparison] = {}
    stacks: list[Stack] = []
    named: dict[str, set[str]] = {"baseline": set(), "model": set(), "device": set()}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise WanlabError(f"{where}: a row has the fields techniques and speedup, not {row!r}")
        row = facts | dict(row)
        chosen = _chosen(row.get("techniques"), settings, where)
        if not chosen or str(row.get("did_what_it_says")).lower() == "false":
            continue  # the baseline itself, or a stack that was not what it is called
        try:
            key = stack_key(chosen)
        except WanlabError as error:
            raise WanlabError(f"{where}: {error}") from None
        if key in times:
            raise WanlabError(f"{where}: these techniques with these settings have a row already; keep one")
        _refuse_conflicts(chosen, where)
        times[key] = _comparison(row, chosen, where)
        stacks.append(Stack.of(Candidate(name, own) for name, own in chosen.items()))
        for name, values in named.items():
            if _known(row.get(name)):
                values.add(str(row[name]))
    for name, values in named.items():
        if len(values) > 1:
            listing = ", ".join(sorted(values))
            raise WanlabError(f"{path}: rows of more than one {name} ({listing}); keep those of one")
    if not times:
        raise WanlabError(
            f"{path} has no row of a stack of techniques; give rows with techniques and speedup"
        )
    one = {name: next(iter(values), "") for name, values in named.items()}
    model = " on ".join(part for part in (one["model"], one["device"]) if part)
    return Costs(times, tuple(stacks), path.name, one["baseline"], model)


def _refuse_conflicts(chosen: Mapping[str, Any], where: str) -> None:
    for name, other, reason in conflicts(chosen):
        raise WanlabError(f"{where}: {name} and {other} cannot go together: {reason}")


def _rows(path: Path) -> tuple[Iterable[Any], dict[str, Any]]:
    """The rows of a file, and the fields that hold for all of them."""
    text = read_text(path, "json_mib")
    if path.suffix.lower() == ".csv":
        try:
            return pd.read_csv(io.StringIO(text), keep_default_na=True).to_dict("records"), {}
        except (ValueError, pd.errors.ParserError) as error:
            raise WanlabError(f"{path} is no CSV table: {first_line(error)}") from None
    data = parse_json(text, str(path))
    facts: dict[str, Any] = {}
    if isinstance(data, dict):
        facts = {name: value for name, value in data.items() if name != "rows"}
        data = data.get("rows")
    if not isinstance(data, list):
        raise WanlabError(f"{path}: a table of costs is a list of rows, or a mapping with rows")
    return data, facts


def _chosen(
    given: Any, settings: Mapping[str, Mapping[str, Any]] | None, where: str
) -> dict[str, dict[str, Any]]:
    """Technique -> its settings, of the field `techniques`."""
    if isinstance(given, str) and given.lstrip().startswith(("{", "[")):
        given = read_yaml(given, where, "techniques").data
    if isinstance(given, Mapping):
        for name, own in given.items():
            if not isinstance(own, Mapping | None):
                raise WanlabError(f"{where}: settings of {name} are {{setting: value}}, not {own!r}")
        return {str(name): dict(own or {}) for name, own in given.items()}
    if not _known(given):
        raise WanlabError(f"{where}: no techniques; write {{technique: {{setting: value}}}}")
    names = (
        [part.strip() for part in given.split(",")] if isinstance(given, str) else list(map(str, given))
        if isinstance(given, list) else []
    )  # fmt: skip
    if not names:
        raise WanlabError(f"{where}: techniques is {given!r}; write {{technique: {{setting: value}}}}")
    missing = [name for name in names if name not in (settings or {})]
    if missing:
        raise WanlabError(
            f"{where} names {missing[0]} without its settings; write {{{missing[0]}: {{setting: value}}}}, or name the"
            " configuration that the table was measured of"
        )
    return {name: dict((settings or {})[name]) for name in names}


def _comparison(row: Mapping[str, Any], chosen: Mapping[str, Any], where: str) -> Comparison:
    ratio = next((row[name] for name in SPEEDUPS if _known(row.get(name))), None)
    values = {"speedup": ratio} | {name: row.get(name) for name in ("low", "high", "noise_percent")}
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if not _known(value):
            numbers[name] = math.nan
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise WanlabError(f"{where}: {name} is {value!r}; give a number") from None
    speedup = numbers["speedup"]
    if not (math.isfinite(speedup) and speedup > 0):
        raise WanlabError(
            f"{where}: no speedup above 0; give the baseline's time over that of {json.dumps(dict(chosen))}"
        )
    noise = 0.0 if math.isnan(numbers["noise_percent"]) else numbers["noise_percent"]
    low, high = numbers["low"], numbers["high"]
    return Comparison(
        str(row.get("baseline") or "baseline"),
        ", ".join(chosen),
        speedup,
        low,
        high,
        verdict_of(speedup, low, high, noise),
        noise,
    )


def _known(value: Any) -> bool:
    return value is not None and value == value and value != ""
