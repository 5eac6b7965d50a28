"""Plans as YAML: read with the line of every mistake, written so that people can edit them."""

from __future__ import annotations

import os
from pathlib import Path

from wanlab.errors import WanlabError, did_you_mean
from wanlab.precision.plans.plan import Plan, Rule
from wanlab.precision.plans.presets import PRESETS
from wanlab.yaml_lines import read_yaml


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
    document = read_yaml(text, where, "the plan")
    data, refuse = document.data, document.refuse
    if not isinstance(data, dict):
        refuse((), "a plan is a mapping with name, default and rules")
    document.known_fields(data, Plan)
    for index, rule in enumerate(data["rules"] if isinstance(data.get("rules"), list) else ()):
        if isinstance(rule, dict):
            document.known_fields(rule, Rule, ("rules", index))
            # One pattern, block or step needs no list or quotes.
            if isinstance(rule.get("layers"), str):
                rule["layers"] = [rule["layers"]]
            for field in ("blocks", "steps"):
                if isinstance(rule.get(field), int) and not isinstance(rule[field], bool):
                    rule[field] = str(rule[field])
    plan = document.convert(Plan)
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
