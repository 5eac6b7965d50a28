"""Matches the layers of two engines of one network, and compares their times."""

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
    """Match the layers of two engines of one network that differ in precision, version or tool.

    Layers of the same modules are matched first, by kind, type and output shapes, then by kind alone, in the order of
    execution. Layers whose modules the other engine does not have (or without modules) are matched by kind, type and
    shapes. Remaining layers that share modules become one row: they were fused or divided differently.

    Returns:
        Every layer of both is in exactly one row, so the differences add up to the difference of the totals; the largest
        change is first. Columns: status (`"matched"`, `"fused"`, `"only in a"`, `"only in b"`), how (`"modules"`,
        `"shape"`, `"shared modules"` or empty), modules, site, role, kind, type_a, type_b, precision_a, precision_b;
        time_a_ms, time_b_ms and difference_ms (b minus a; a side without the layer counts 0); noise_ms (difference
        between the first and the second half of a side's runs, the larger of both sides; NaN without samples),
        halves_a_ms and halves_b_ms (the same of each side, signed); layers_a and layers_b (their indices), names_a,
        names_b.
    """
    left, right = list(a.layers), list(b.layers)
    rows: list[tuple[str, str, list[Layer], list[Layer]]] = []
    known = [{module for layer in side.layers for module in layer.modules} for side in (a, b)]

    def without_modules_of(layers: Iterable[Layer], modules: set[str]) -> list[Layer]:
        return [layer for layer in layers if not modules.intersection(layer.modules)]

    def of_modules(*more: Callable[[Layer], Hashable]) -> Callable[[Layer], Hashable | None]:
        return lambda layer: (
            (frozenset(layer.modules), *(one(layer) for one in more)) if layer.modules else None
        )

    for key in (of_modules(_kind, _type, _shapes), of_modules(_kind, _shapes), of_modules(_kind)):
        _pair(left, right, key, "modules", rows)
    for key in (lambda x: (_kind(x), _type(x), _shapes(x)), lambda x: (_kind(x), _shapes(x))):
        unshared = without_modules_of(left, known[1]), without_modules_of(right, known[0])
        before = len(rows)
        _pair(*unshared, key, "shape", rows)
        for _, _, layers_a, layers_b in rows[before:]:
            _drop(left, layers_a)
            _drop(right, layers_b)
    for layers_a, layers_b in _shared(left, right):
        rows.append(("fused", "shared modules", layers_a, layers_b))
        _drop(left, layers_a)
        _drop(right, layers_b)
    rows += [("only in a", "", [layer], []) for layer in left]
    rows += [("only in b", "", [], [layer]) for layer in right]
    timed = a.timed and b.timed
    frame = pd.DataFrame([_row(*row, timed=timed) for row in rows], columns=list(COLUMNS))
    order = frame["difference_ms"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
    return frame.loc[order].reset_index(drop=True)


def difference_by(matched: pd.DataFrame, by: str = "role") -> pd.DataFrame:
    """Time of both engines, their difference and its noise by a column of `match_layers`.

    Returns:
        `by`, time_a_ms, time_b_ms, difference_ms, noise_ms, outside_noise (`"yes"`, `"no"`, or `"unknown"` without
        samples); the rows add up to the whole. The noise is computed from the sums, where random differences of layers
        partly cancel.
    """
    columns = ["time_a_ms", "time_b_ms", "difference_ms", "halves_a_ms", "halves_b_ms"]
    sums = matched.groupby(by, sort=False, dropna=False)[columns].sum(min_count=1).reset_index()
    sums["noise_ms"] = sums[["halves_a_ms", "halves_b_ms"]].abs().max(axis=1)
    sums["outside_noise"] = np.select(
        [sums["noise_ms"].isna(), sums["difference_ms"].abs() > sums["noise_ms"]], ["unknown", "yes"], "no"
    )
    order = sums["difference_ms"].abs().sort_values(ascending=False, kind="stable").index
    return sums.loc[order].drop(columns=["halves_a_ms", "halves_b_ms"]).reset_index(drop=True)


def _kind(layer: Layer) -> str:
    return layer.kind


def _type(layer: Layer) -> str:
    return layer.type


def _shapes(layer: Layer) -> tuple:
    return tuple(tensor.shape for tensor in layer.outputs)


def _pair(
    left: list[Layer], right: list[Layer], key: Callable[[Layer], Hashable], how: str, rows: list
) -> None:
    """Match layers with the same key one to one, in order; matched layers are removed from both lists."""
    waiting: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in right:
        waiting[key(layer)].append(layer)
    pairs = []
    for layer in left:
        layer_key = key(layer)
        if layer_key is not None and waiting[layer_key]:
            pairs.append((layer, waiting[layer_key].pop(0)))
    rows += [("matched", how, [layer_a], [layer_b]) for layer_a, layer_b in pairs]
    _drop(left, [layer_a for layer_a, _ in pairs])
    _drop(right, [layer_b for _, layer_b in pairs])


def _drop(layers: list[Layer], matched: list[Layer]) -> None:
    ids = {id(layer) for layer in matched}
    layers[:] = [layer for layer in layers if id(layer) not in ids]


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


def _row(status: str, how: str, layers_a: list[Layer], layers_b: list[Layer], *, timed: bool) -> dict:
    both = [*layers_a, *layers_b]
    times = [total_ms(side) for side in (layers_a, layers_b)]
    # The time of a missing layer is 0; the time of a layer that was not measured is unknown.
    counted = [
        0.0 if not side or (timed and math.isnan(t)) else t
        for side, t in zip((layers_a, layers_b), times, strict=True)
    ]
    roles = dict.fromkeys(layer.role for layer in both)
    halves = [
        math.fsum(layer.halves_ms for layer in side) if side else math.nan for side in (layers_a, layers_b)
    ]
    return {
        "status": status,
        "how": how,
        "modules": ", ".join(dict.fromkeys(module for layer in both for module in layer.modules)),
        "site": ", ".join(dict.fromkeys(layer.site for layer in both if layer.site)),
        "role": next(iter(roles)) if len(roles) == 1 else "several",
        "kind": ", ".join(dict.fromkeys(layer.kind for layer in both)),
        "type_a": ", ".join(dict.fromkeys(layer.type for layer in layers_a)),
        "type_b": ", ".join(dict.fromkeys(layer.type for layer in layers_b)),
        "precision_a": ", ".join(dict.fromkeys(layer.precision for layer in layers_a)),
        "precision_b": ", ".join(dict.fromkeys(layer.precision for layer in layers_b)),
        "time_a_ms": counted[0],
        "time_b_ms": counted[1],
        "difference_ms": counted[1] - counted[0],
        "noise_ms": max((abs(half) for half in halves if not math.isnan(half)), default=math.nan),
        "halves_a_ms": halves[0],
        "halves_b_ms": halves[1],
        "layers_a": tuple(layer.index for layer in layers_a),
        "layers_b": tuple(layer.index for layer in layers_b),
        "names_a": ", ".join(layer.name for layer in layers_a),
        "names_b": ", ".join(layer.name for layer in layers_b),
    }
