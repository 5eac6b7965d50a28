"""A precision plan as data: ordered rules that give layers a number format; YAML files and presets."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_text
from wanlab.core.formats import PLAN_FLOATS
from wanlab.core.paths import locate
from wanlab.core.text import read_text
from wanlab.core.yaml_lines import At, Document, compact, read_yaml, spell, write_yaml
from wanlab.precision.formats import FORMATS, get_format

FLOATS = PLAN_FLOATS
"""Float format of plans -> its name in PyTorch."""

AS_LOADED = "model"
"""Default of a plan that leaves a network in the dtype in which it was loaded."""

KEEP = "default"
"""Format of a rule that gives layers the plan's default."""

ROLE = "role:"
"""What a pattern of layers begins with that names a role: `role:FFN`."""

IN_BLOCKS = "blocks.*"
"""Pattern of every layer in the blocks, whatever their lists are called."""

BLOCKS = re.compile(r"(\d+)(?:-(\d+))?|(first|last) (\d+)")
STEPS = re.compile(r"(\d+)(?:-(\d+))?")
"""Forms of one choice of blocks and of steps; several stand between commas."""
MOST = 9_999  # no network has more blocks and no generation more steps: a larger number is a slip


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Layers and the format they get.

    Attributes:
        format: `"fp32"`, `"fp16"`, `"bf16"`, one of `FORMATS` (fp8, fp8-channel, int8, int8-weight, int4-weight), or
            `"default"`: that of the plan, to exempt layers from an earlier rule.
        component: glob of `"expert_high"`, `"expert_low"`, or `"expert"` of a model that has one.
        blocks: `"0-2"`, `"7"`, `"first 3"`, `"last 3"`, several of them between commas; None is every layer, also
            outside the blocks. Numbers run over all lists of blocks of the network, in order of use.
        layers: globs of the name inside the block (`"attn1.to_q"`, `"ffn.net.*"`) or of the whole name
            (`"proj_out"`, `"blocks.7.ffn.net.2"`, `"transformer_blocks.7.ff.net.2"`); roles of linear layers
            (`"role:FFN"`, `"role:*attention"`), which mean the same in every family of models; `"blocks.*"` is every
            layer in the blocks. `blocks.7.` begins the names of the layers in block 7 of a network without such a list, too.
        steps: steps of the generation, from 0 and inclusive: `"0-3"`, `"5"`, several between commas; None is every step.
        note: reason, for readers of the plan.
    """

    format: str
    component: str = "*"
    blocks: str | None = None
    layers: tuple[str, ...] = ("*",)
    steps: str | None = None
    note: str = ""

    def block_numbers(self, count: int) -> set[int] | None:
        """The blocks of this rule in a network of `count` blocks; None where the rule names none."""
        if self.blocks is None:
            return None
        chosen: set[int] = set()
        for first, last, end, size in _parts(self.blocks, BLOCKS):
            if end:
                whole = range(count)
                chosen |= set(whole[: int(size)] if end == "first" else whole[max(0, count - int(size)) :])
            else:
                chosen |= set(range(int(first), int(last or first) + 1))
        return chosen

    def named_blocks(self) -> set[int]:
        """The last block of each range that is given by numbers, whatever the network has."""
        if self.blocks is None:
            return set()
        return {int(last or first) for first, last, end, _ in _parts(self.blocks, BLOCKS) if not end}

    def step_numbers(self) -> set[int] | None:
        """The steps of this rule; None is every step."""
        if self.steps is None:
            return None
        return {i for a, b in _parts(self.steps, STEPS) for i in range(int(a), int(b or a) + 1)}

    def __str__(self) -> str:
        parts = [f"{self.component}:" if self.component != "*" else "", ", ".join(self.layers)]
        parts += [
            f"in blocks {self.blocks}" if self.blocks else "",
            f"at steps {self.steps}" if self.steps else "",
        ]
        return f"{' '.join(part for part in parts if part)} -> {self.format}"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What every layer of the experts computes in.

    Attributes:
        name: name in tables and files.
        default: dtype of the whole network: `"bf16"`, `"fp16"`, `"fp32"`, or `"model"`: as the model was loaded. Layers that
            no rule names stay in it, and so does everything that is no linear layer or convolution.
        rules: rules in order; where several fit a layer, the last one counts.
        num_steps: number of steps of the generation that steps in rules are counted in; needed when a rule names steps.
        note: origin of the plan.
        made_for: size of the experts that it was selected for, as `assignment.architecture` writes it; other experts refuse
            it. Empty for plans of any model.
    """

    name: str
    default: str = AS_LOADED
    rules: tuple[Rule, ...] = ()
    num_steps: int | None = None
    note: str = ""
    made_for: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of what the plan does: name, notes and what it was selected for do not count."""
        facts = self.to_dict()
        for field in ("name", "note", "made_for"):
            facts.pop(field, None)
        for rule in facts.get("rules", ()):
            rule.pop("note", None)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON and YAML can hold; what has its default is left out."""
        return {"name": self.name, "default": self.default} | compact(self)

    def check(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Mistakes in the values: place in the plan and message. Empty without a mistake."""
        wrong: list[tuple[tuple[str | int, ...], str]] = []
        if not re.fullmatch(r"[\w.+-]+", self.name):
            wrong.append((("name",), f"{self.name!r} is no name for a file; use letters, digits and . _ + -"))
        if self.default not in (AS_LOADED, *FLOATS):
            known = ", ".join((AS_LOADED, *FLOATS))
            wrong.append((("default",), f"{self.default!r} is no dtype of a network; give {known}"))
        if self.num_steps is not None and self.num_steps < 1:
            wrong.append((("num_steps",), f"{self.num_steps} steps; give 1 or more"))
        for index, rule in enumerate(self.rules):
            for field, message in _rule_faults(rule, self.num_steps):
                wrong.append((("rules", index, field), message))
        return wrong


def make_plan(
    name: str, default: str = AS_LOADED, rules=(), *, num_steps: int | None = None, note: str = ""
) -> Plan:
    """A checked plan; rules may be `Rule`s or dictionaries.

    Raises:
        WanlabError: unknown fields, formats, dtypes; ranges that cannot be read; steps without `num_steps`.
    """
    checked_rules = tuple(rule if isinstance(rule, Rule) else Rule(**rule) for rule in rules)
    plan = Plan(name=name, default=default, rules=checked_rules, num_steps=num_steps, note=note)
    for where, message in plan.check():
        raise WanlabError(f"plan {name}, {spell(where) or 'the plan'}: {message}")
    return plan


def merge_plans(first: Plan, *later: Plan, name: str | None = None) -> Plan:
    """One plan with the rules of several, in order, so that later plans have priority.

    Raises:
        WanlabError: plans with different defaults or numbers of steps.
    """
    plans = (first, *later)
    steps = {plan.num_steps for plan in plans} - {None}
    if len(steps) > 1:
        raise WanlabError(
            f"these plans count {' and '.join(map(str, sorted(steps)))} steps; merge those of equal steps"
        )
    defaults = {plan.default for plan in plans}
    if len(defaults) > 1:
        raise WanlabError(
            f"these plans are over networks in {' and '.join(sorted(defaults))}; give them one default"
        )
    rules = tuple(rule for plan in plans for rule in plan.rules)
    return make_plan(
        name or "+".join(plan.name for plan in plans), first.default, rules, num_steps=next(iter(steps), None)
    )


def check_steps(plan: Plan, num_steps: int) -> None:
    """Raise a `WanlabError` where a plan counts other steps than a generation has."""
    if plan.num_steps is not None and plan.num_steps != num_steps:
        raise WanlabError(
            f"plan {plan.name} is for {plan.num_steps} steps, this generation has {num_steps};"
            f" generate with steps={plan.num_steps} or give a plan without step ranges"
        )


def is_float(format: str) -> bool:
    """Whether a layer in this format computes in floating point with its own weights."""
    return format in FLOATS


def _rule_faults(rule: Rule, num_steps: int | None):
    if rule.format not in (KEEP, *FLOATS):
        try:
            get_format(rule.format)
        except WanlabError:
            known = [*FLOATS, *FORMATS, KEEP]
            yield (
                "format",
                f"no format {rule.format!r}{did_you_mean(rule.format, known)}; give {', '.join(known)}",
            )
    if not rule.layers:
        yield "layers", "no layer is named; give patterns, or leave the line out for all"
    for field, read, form in (
        (
            "blocks",
            lambda: rule.block_numbers(10_000),
            "'0-2', '7', 'first 3', 'last 3', with commas between",
        ),
        ("steps", rule.step_numbers, "'0-3' or '5', with commas between"),
    ):
        try:
            read()
        except ValueError as error:
            yield field, f"{error} is no choice of {field}; write {form}"
            return
    steps = rule.step_numbers()
    if steps is not None and num_steps is None:
        yield "steps", "steps of how many? give the plan num_steps"
    elif steps is not None and max(steps) >= num_steps:
        yield "steps", f"step {max(steps)} of {num_steps}; steps count from 0 to {num_steps - 1}"


def _parts(text: str, form: re.Pattern) -> list[tuple[str, ...]]:
    matches = [(part.strip(), form.fullmatch(part.strip())) for part in str(text).split(",")]
    for part, match in matches:
        numbers = [] if match is None else [int(n) for n in match.groups() if n is not None and n.isdecimal()]
        if match is None or numbers != sorted(numbers) or max(numbers, default=0) > MOST:
            raise ValueError(repr(part))
    return [match.groups() for _, match in matches]


LINEAR = (f"{ROLE}*",)
"""Every linear layer of an expert, embedders and output included."""


def _uniform(format: str) -> Plan:
    rules = [{"format": format, "layers": LINEAR}]
    return make_plan(f"uniform-{format}", rules=rules, note="every linear layer of every expert")


def _blocks(format: str) -> Plan:
    rules = [{"format": format, "layers": (IN_BLOCKS,), "note": "embedders and output are kept"}]
    return make_plan(f"blocks-{format}", rules=rules, note="hand-picked: every block, nothing else")


def inner_blocks(format: str, ends: int = 3) -> Plan:
    """All linear layers of the blocks but the first and last few, which published plans keep in floats.

    Args:
        ends: number of blocks kept at each end; three of a network of thirty or forty is the common choice.
    """
    rules = [
        {"format": format, "layers": (IN_BLOCKS,), "note": "embedders and output are kept"},
        {"format": KEEP, "blocks": f"first {ends}, last {ends}", "note": "first and last blocks are kept"},
    ]
    name = f"inner-{format}" if ends == 3 else f"inner-{ends}-{format}"
    return make_plan(name, rules=rules, note=f"hand-picked: all but the first and last {ends} blocks")


def _ffn(format: str) -> Plan:
    rules = [{"format": format, "layers": (f"{ROLE}FFN",)}]
    return make_plan(f"ffn-{format}", rules=rules, note="hand-picked: feed-forward layers alone")


PRESETS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        *(make_plan(f"all-{name}", name, note=f"everything in {name}") for name in FLOATS),
        *(_uniform(name) for name in ("int8", "fp8", "fp8-channel", "int8-weight")),
        _blocks("int4-weight"),
        *(make(name) for make in (_blocks, inner_blocks, _ffn) for name in ("int8", "fp8")),
    )
}
"""Plans by name, to compare with plans that are chosen by measurement."""


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
    path = locate(source)
    if not os.path.isfile(path):
        if path.suffix.lower() in (".yaml", ".yml"):
            raise WanlabError(f"no plan at {path}; give a YAML file or one of {', '.join(PRESETS)}")
        raise WanlabError(
            f"no plan {str(source)!r}{did_you_mean(str(source), PRESETS)}; give a YAML file or {', '.join(PRESETS)}"
        )
    return parse_plan(read_text(path), str(path))


def parse_plan(text: str, where: str = "the plan") -> Plan:
    """A plan from YAML text. Messages begin with `where`. Raises as `load_plan`."""
    return plan_at(read_yaml(text, where, "the plan"))


def plan_at(document: Document, at: At = ()) -> Plan:
    """The plan at a place of a YAML document. Raises as `load_plan`."""
    data, refuse = document.value(at), document.refuse
    if not isinstance(data, dict):
        refuse(at, "a plan is a mapping with name, default and rules")
    document.known_fields(data, Plan, at)
    for index, rule in enumerate(data["rules"] if isinstance(data.get("rules"), list) else ()):
        if isinstance(rule, dict):
            document.known_fields(rule, Rule, (*at, "rules", index))
            # One pattern, block or step needs no list or quotes.
            if isinstance(rule.get("layers"), str):
                rule["layers"] = [rule["layers"]]
            for field in ("blocks", "steps"):
                if isinstance(rule.get(field), int) and not isinstance(rule[field], bool):
                    rule[field] = str(rule[field])
    plan = document.convert(Plan, at)
    for path, fault in plan.check():
        refuse((*at, *path), fault)
    return plan


def save_plan(plan: Plan, path: str | os.PathLike) -> Path:
    """Write a plan as YAML that `load_plan` reads back; its folder is made."""
    text = write_yaml(plan.to_dict())
    return write_text(path, text)
