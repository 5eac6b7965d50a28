"""Which configuration is the baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from wanlab.errors import WanlabError, did_you_mean
from wanlab.runs.comparison.configurations import Configuration, Configurations, shown

PART = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")


def parse_baseline(text: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, str]:
    """`"engine=eager,plan=default"`, several such, or a mapping, as parameter -> value in words.

    Raises:
        WanlabError: a part without "=".
    """
    if text is None:
        return {}
    if isinstance(text, Mapping):
        return {str(name): shown(value) for name, value in text.items()}
    wanted: dict[str, str] = {}
    for given in [text] if isinstance(text, str) else text:
        for part in PART.split(given):
            name, equals, value = part.partition("=")
            if not equals:
                raise WanlabError(f"baseline {part!r} is not NAME=VALUE, such as plan=default")
            wanted[name.strip().removeprefix("p.")] = value.strip()
    return wanted


def find_baseline(
    found: Configurations, wanted: str | Sequence[str] | Mapping[str, Any] | None
) -> Configuration:
    """The one configuration with these parameters; without any, the sweep's own baseline, else the first.

    Raises:
        WanlabError: an unknown parameter or value, none that fits or several, or nothing finished.
    """
    if not found.rows:
        failed = f": {len(found.failures)} did not finish" if len(found.failures) else ""
        raise WanlabError(f"no finished run in {found.where}{failed}; see `wanlab runs`")
    asked = parse_baseline(wanted if wanted is not None else found.sweep.get("baseline"))
    if not asked:
        return found.rows[0]
    said = ", ".join(f"{name}={value}" for name, value in asked.items())
    names = dict.fromkeys(name for row in found.rows for name in row.parameters)
    for name, value in asked.items():
        if name not in names:
            raise WanlabError(f"baseline {said}: no parameter {name!r}{did_you_mean(name, names)}")
        there = dict.fromkeys(shown(row.parameters[name]) for row in found.rows if name in row.parameters)
        if value not in there:
            failed = found.failures["configuration"].str.contains(f"{name}={value}", regex=False).any()
            more = "; that run did not finish" if failed else did_you_mean(value, there)
            some = ", ".join(list(there)[:8])
            raise WanlabError(f"baseline {said}: no run has {name}={value}{more}; {name} is {some}")
    fitting = [row for row in found.rows if _fits(row, asked)]
    if not fitting:
        raise WanlabError(f"baseline {said}: no finished run has all of it")
    if len(fitting) > 1:
        labels = "; ".join(row.label for row in fitting[:4])
        more = f"; and {len(fitting) - 4} more" if len(fitting) > 4 else ""
        raise WanlabError(f"baseline {said} fits {len(fitting)} configurations, name one: {labels}{more}")
    return fitting[0]


def _fits(row: Configuration, asked: Mapping[str, str]) -> bool:
    return all(
        name in row.parameters and shown(row.parameters[name]) == value for name, value in asked.items()
    )
