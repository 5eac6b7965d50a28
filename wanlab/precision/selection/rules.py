"""A table of formats written as few readable rules that give every layer exactly its format."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from wanlab.errors import WanlabError
from wanlab.precision.layers import natural
from wanlab.precision.plans.plan import Plan, Rule, make_plan
from wanlab.precision.selection.costs import DEFAULT


@dataclass(frozen=True)
class Layer:
    """One linear layer and what it is to compute in.

    Attributes:
        formats: (first_step, last_step, format), in order; one with None, None where the step does not matter.
    """

    component: str
    layer: str
    block: int | None
    projection: str
    formats: tuple[tuple[int | None, int | None, str], ...]


@dataclass(frozen=True)
class _Area:
    """Layers that get the same formats: blocks (None is all), patterns, and what they get."""

    blocks: tuple[int, ...] | None
    layers: tuple[str, ...]
    formats: tuple[tuple[int | None, int | None, str], ...]
    component: str = "*"


def compress(
    layers: Iterable[Layer],
    *,
    name: str,
    default: str = "model",
    num_steps: int | None = None,
    note: str = "",
) -> Plan:
    """The shortest list of rules that was found, checked layer by layer.

    A format for the most, others for whole projections or blocks, then exceptions; what every expert shares is said once.

    Args:
        layers: of all experts; what is in none of them the rules do not touch.
        num_steps: needed where formats change with the step.

    Raises:
        WanlabError: a layer twice, or formats by steps without their number.
    """
    layers = list(layers)
    parts: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        parts[layer.component].append(layer)
    if len({(each.component, each.layer) for each in layers}) < len(layers):
        raise WanlabError("a layer has two formats; give every layer once")
    for written in (_joined({c: _areas(own) for c, own in parts.items()}), _one_by_one(layers)):
        plan = make_plan(
            name,
            default,
            [r for area in written for r in _rules(area)],
            num_steps=_needed(layers, num_steps),
            note=note,
        )
        if _gives(plan, parts):
            return plan
    raise WanlabError("these layers' names cannot be written as rules; they have the signs * ? [ in them")


def _needed(layers: Sequence[Layer], num_steps: int | None) -> int | None:
    return num_steps if any(first is not None for each in layers for first, _, _ in each.formats) else None


def _areas(layers: Sequence[Layer]) -> list[_Area]:
    """Rules of one expert, in order."""
    cells = {(each.block, each.projection): each.formats for each in layers if each.block is not None}
    written = min(_attempts(cells), key=lambda areas: (sum(len(a.formats) for a in areas), len(str(areas))))
    outside = defaultdict(list)
    for each in layers:
        if each.block is None and each.formats != _KEPT:
            outside[each.formats].append(each.layer)
    alone = [each.layer for each in layers if each.block is None]
    return written + [_Area(None, _globs(names, alone), formats) for formats, names in outside.items()]


_KEPT = ((None, None, DEFAULT),)


def _attempts(cells: dict):
    """Ways to write the layers of the blocks."""
    if not cells:
        yield []
        return
    common = [formats for formats, _ in Counter(cells.values()).most_common()]
    names = sorted({projection for _, projection in cells}, key=natural)
    for base in dict.fromkeys([*common[:4], _KEPT]):
        start = [] if base == _KEPT else [_Area(None, ("blocks.*",), base)]
        for nested in (None, 0, 1):
            middle, current = _lines(cells, base, nested, names)
            left = {place: formats for place, formats in cells.items() if formats != current[place]}
            for axis in (0, 1):
                yield start + middle + _exceptions(left, axis, names)


def _lines(cells: dict, base, axis: int | None, names: list[str]) -> tuple[list[_Area], dict]:
    """Rules for whole blocks (axis 0) or projections (1) whose most layers differ from the base."""
    current = dict.fromkeys(cells, base)
    if axis is None:
        return [], current
    lines: dict = defaultdict(list)
    for place, formats in cells.items():
        lines[place[axis]].append(formats)
    wanted = {line: Counter(found).most_common(1)[0][0] for line, found in lines.items()}
    together: dict = defaultdict(list)
    for line, formats in wanted.items():
        if formats != base:
            together[formats].append(line)
    areas = [
        _Area(tuple(sorted(found)), ("*",), formats)
        if axis == 0
        else _Area(None, _globs(found, names), formats)
        for formats, found in together.items()
    ]
    return areas, {place: wanted[place[axis]] for place in cells}


def _exceptions(left: dict, axis: int, names: list[str]) -> list[_Area]:
    """Single places, those together that share their blocks (axis 1) or their projections (axis 0)."""
    lines: dict = defaultdict(set)
    for place, formats in left.items():
        lines[place[axis], formats].add(place[1 - axis])
    together: dict = defaultdict(list)
    for (line, formats), others in lines.items():
        together[frozenset(others), formats].append(line)
    areas = []
    for (others, formats), found in together.items():
        blocks, projections = (found, others) if axis == 0 else (others, found)
        areas.append(_Area(tuple(sorted(blocks)), _globs(projections, names), formats))
    return sorted(areas, key=lambda area: (str(area.formats), area.blocks, area.layers))


def _globs(found: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names, with `attn1.*` for all that begin so."""
    found, made = set(found), []
    for prefix in dict.fromkeys(name.split(".")[0] for name in known):
        own = {name for name in known if name.split(".")[0] == prefix}
        if len(own) > 1 and own <= found:
            made.append(f"{prefix}.*")
            found -= own
    return tuple(sorted([*made, *found], key=natural))


def _joined(parts: dict[str, list[_Area]]) -> list[_Area]:
    """Rules of all experts as one list; what stands in every list, in the same order, is said once."""
    names = list(parts)
    if len(names) == 1:
        return parts[names[0]]
    first, second = (parts[name] for name in names[:2])
    if len(names) > 2:
        return [replace(area, component=name) for name in names for area in parts[name]]
    made: list[_Area] = []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            made += first[a:b]
        else:
            made += [replace(area, component=names[0]) for area in first[a:b]]
            made += [replace(area, component=names[1]) for area in second[c:d]]
    return made


def _one_by_one(layers: Sequence[Layer]) -> list[_Area]:
    return [
        _Area(None, (each.layer,), each.formats, each.component) for each in layers if each.formats != _KEPT
    ]


def _rules(area: _Area):
    blocks = None if area.blocks is None else _spans(area.blocks)
    for first, last, format in area.formats:
        steps = None if first is None else _spans(range(first, last + 1))
        yield Rule(format=format, component=area.component, blocks=blocks, layers=area.layers, steps=steps)


def _spans(numbers: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` as `"0-2, 5"`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)


def _gives(plan: Plan, parts: dict[str, list[Layer]]) -> bool:
    """Whether the rules give every layer its formats at every step, matched as `assign` does it."""
    for component, layers in parts.items():
        count = max((each.block + 1 for each in layers if each.block is not None), default=0)
        chosen = [
            (rule, rule.block_numbers(count), rule.step_numbers())
            for rule in plan.rules
            if fnmatch.fnmatchcase(component, rule.component)
        ]
        for each in layers:
            fits = [
                (rule.format, steps)
                for rule, blocks, steps in chosen
                if (blocks is None or each.block in blocks)
                and any(fnmatch.fnmatchcase(n, g) for g in rule.layers for n in (each.layer, each.projection))
            ]
            for first, last, wanted in each.formats:
                whole = range(plan.num_steps or 1)
                for step in whole if first is None else whole[first : last + 1]:
                    found = [format for format, steps in fits if steps is None or step in steps]
                    if (found[-1] if found else DEFAULT) != wanted:
                        return False
    return True
