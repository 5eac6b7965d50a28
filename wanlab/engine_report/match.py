"""Two engines laid over one another: which layer of one is which of the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

import numpy as np
import pandas as pd

from wanlab.engine_report.layers import EngineLayers, Layer
from wanlab.engine_report.rules import total_ms

COLUMNS = (
    "status", "how", "modules", "site", "role", "kind", "type_a", "type_b", "precision_a", "precision_b",
    "time_a_ms", "time_b_ms", "difference_ms", "noise_ms", "halves_a_ms", "halves_b_ms", "layers_a", "layers_b",
    "names_a", "names_b",
)  # fmt: skip


def match_layers(a: EngineLayers, b: EngineLayers) -> pd.DataFrame:
    """Match the layers of two engines of one network: of other precision, version or tool.

    Layers of the same modules are matched first, by kind, type and output shapes, then by kind alone, in the order they
    run. Layers whose modules the other engine does not have (or that have none) are matched by kind, type and shapes.
    What is left of the modules that both sides still have is one row: layers were fused, or divided, differently.

    Returns:
        Every layer of both is in exactly one row, so the differences add up to the difference of the totals; ordered by
        how much time changed. Columns: status (`"matched"`, `"fused"`, `"only in a"`, `"only in b"`), how
        (`"modules"`, `"shape"`, `"shared modules"` or empty), modules, site, role, kind, type_a, type_b, precision_a,
        precision_b; time_a_ms, time_b_ms and difference_ms (b less a; a side without the layer counts 0); noise_ms (how
        far the first half of a side's runs is from the second, the larger side; NaN without samples), halves_a_ms and
        halves_b_ms (the same, signed); layers_a and layers_b (their indices), names_a, names_b.
    """
    left, right = list(a.layers), list(b.layers)
    rows: list[tuple[str, str, list[Layer], list[Layer]]] = []
    known = [{module for layer in side.layers for module in layer.modules} for side in (a, b)]

    def strangers(layers: Iterable[Layer], others: set[str]) -> list[Layer]:
        return [layer for layer in layers if not others.intersection(layer.modules)]

    def of_modules(*more: Callable[[Layer], Hashable]) -> Callable[[Layer], Hashable | None]:
        return lambda layer: (
            (frozenset(layer.modules), *(one(layer) for one in more)) if layer.modules else None
        )

    for key in (of_modules(_kind, _type, _shapes), of_modules(_kind, _shapes), of_modules(_kind)):
        _pair(left, right, key, "modules", rows)
    for key in (lambda x: (_kind(x), _type(x), _shapes(x)), lambda x: (_kind(x), _shapes(x))):
        lone = strangers(left, known[1]), strangers(right, known[0])
        before = len(rows)
        _pair(*lone, key, "shape", rows)
        for _, _, mine, theirs in rows[before:]:
            _drop(left, mine)
            _drop(right, theirs)
    for mine, theirs in _shared(left, right):
        rows.append(("fused", "shared modules", mine, theirs))
        _drop(left, mine)
        _drop(right, theirs)
    rows += [("only in a", "", [layer], []) for layer in left]
    rows += [("only in b", "", [], [layer]) for layer in right]
    timed = a.timed and b.timed
    frame = pd.DataFrame([_row(*row, timed=timed) for row in rows], columns=list(COLUMNS))
    order = frame["difference_ms"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
    return frame.loc[order].reset_index(drop=True)


def difference_by(matched: pd.DataFrame, by: str = "role") -> pd.DataFrame:
    """Time of both engines, their difference and its noise by a column of `match_layers`.

    Returns:
        `by`, time_a_ms, time_b_ms, difference_ms, noise_ms, told (`"yes"`, `"within noise"`, `"no noise known"`); the
        rows add up to the whole. Layers that differ by chance in both directions cancel, so noise is found anew.
    """
    columns = ["time_a_ms", "time_b_ms", "difference_ms", "halves_a_ms", "halves_b_ms"]
    made = matched.groupby(by, sort=False, dropna=False)[columns].sum(min_count=1).reset_index()
    made["noise_ms"] = made[["halves_a_ms", "halves_b_ms"]].abs().max(axis=1)
    made["told"] = np.select(
        [made["noise_ms"].isna(), made["difference_ms"].abs() > made["noise_ms"]],
        ["no noise known", "yes"],
        "within noise",
    )
    order = made["difference_ms"].abs().sort_values(ascending=False, kind="stable").index
    return made.loc[order].drop(columns=["halves_a_ms", "halves_b_ms"]).reset_index(drop=True)


def _kind(layer: Layer) -> str:
    return layer.kind


def _type(layer: Layer) -> str:
    return layer.type


def _shapes(layer: Layer) -> tuple:
    return tuple(tensor.shape for tensor in layer.outputs)


def _pair(
    left: list[Layer], right: list[Layer], key: Callable[[Layer], Hashable], how: str, rows: list
) -> None:
    """Match one to one, in order, what has the same key; matched layers leave both lists."""
    waiting: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in right:
        waiting[key(layer)].append(layer)
    pairs = []
    for layer in left:
        found = key(layer)
        if found is not None and waiting[found]:
            pairs.append((layer, waiting[found].pop(0)))
    rows += [("matched", how, [mine], [theirs]) for mine, theirs in pairs]
    _drop(left, [mine for mine, _ in pairs])
    _drop(right, [theirs for _, theirs in pairs])


def _drop(layers: list[Layer], taken: list[Layer]) -> None:
    gone = {id(layer) for layer in taken}
    layers[:] = [layer for layer in layers if id(layer) not in gone]


def _shared(left: list[Layer], right: list[Layer]) -> list[tuple[list[Layer], list[Layer]]]:
    """Groups of layers that are connected by modules that both sides have."""
    parent: dict[str, str] = {}

    def root(module: str) -> str:
        parent.setdefault(module, module)
        while parent[module] != module:
            parent[module] = parent[parent[module]]
            module = parent[module]
        return module

    for layer in (*left, *right):
        for module in layer.modules[1:]:
            parent[root(module)] = root(layer.modules[0])
    groups: dict[str, tuple[list[Layer], list[Layer]]] = {}
    for side, layers in enumerate((left, right)):
        for layer in layers:
            if layer.modules:
                groups.setdefault(root(layer.modules[0]), ([], []))[side].append(layer)
    return [group for group in groups.values() if all(group)]


def _row(status: str, how: str, mine: list[Layer], theirs: list[Layer], *, timed: bool) -> dict:
    both = [*mine, *theirs]
    times = [total_ms(side) for side in (mine, theirs)]
    # A layer that is not there takes no time; one that was not measured takes an unknown one.
    counted = [
        0.0 if not side or (timed and math.isnan(t)) else t
        for side, t in zip((mine, theirs), times, strict=True)
    ]
    roles = dict.fromkeys(layer.role for layer in both)
    halves = [math.fsum(layer.halves_ms for layer in side) if side else math.nan for side in (mine, theirs)]
    return {
        "status": status,
        "how": how,
        "modules": ", ".join(dict.fromkeys(module for layer in both for module in layer.modules)),
        "site": ", ".join(dict.fromkeys(layer.site for layer in both if layer.site)),
        "role": next(iter(roles)) if len(roles) == 1 else "several",
        "kind": ", ".join(dict.fromkeys(layer.kind for layer in both)),
        "type_a": ", ".join(dict.fromkeys(layer.type for layer in mine)),
        "type_b": ", ".join(dict.fromkeys(layer.type for layer in theirs)),
        "precision_a": ", ".join(dict.fromkeys(layer.precision for layer in mine)),
        "precision_b": ", ".join(dict.fromkeys(layer.precision for layer in theirs)),
        "time_a_ms": counted[0],
        "time_b_ms": counted[1],
        "difference_ms": counted[1] - counted[0],
        "noise_ms": max((abs(half) for half in halves if not math.isnan(half)), default=math.nan),
        "halves_a_ms": halves[0],
        "halves_b_ms": halves[1],
        "layers_a": tuple(layer.index for layer in mine),
        "layers_b": tuple(layer.index for layer in theirs),
        "names_a": ", ".join(layer.name for layer in mine),
        "names_b": ", ".join(layer.name for layer in theirs),
    }
