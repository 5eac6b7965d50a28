"""What every host event of a trace belongs to: component, kind of attention, kind of operator, and its work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.diagnose import operators
from wanlab.diagnose.stacks import NOTHING, inherit, launchers, levels, nest
from wanlab.diagnose.trace import RUNTIME_CATEGORIES, STEP_PREFIX

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wanlab.diagnose.trace import Trace

OUTSIDE = "outside"
COMPONENTS = ("text_encoder", "vae_encoder", "expert", "expert_high", "expert_low", "vae_decoder", OUTSIDE)
EXPERTS = ("expert", "expert_high", "expert_low")
KINDS = (
    operators.LINEAR,
    operators.ATTENTION,
    operators.ALLOCATION,
    operators.TRANSFER,
    operators.POINTWISE,
)
SELF, CROSS = 0, 1
_COMPONENT = re.compile(r"^(text_encoder|vae_encoder|vae_decoder|expert(?:_high|_low)?)(?:\.|$)")
_SELF = re.compile(r"\.(attn1|self_attn|attn)(\.|$)")
_CROSS = re.compile(r"\.(attn2|cross_attn)(\.|$)")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Of every row of `trace.host`, by position; -1 is unknown.

    Attributes:
        parents: the enclosing event; by_depth: positions by depth.
        component: index into `COMPONENTS`, of the nearest range above or the event itself; in a trace without any named
            ranges every event counts as an expert's, so that at least kinds of operators can be told apart.
        has_ranges: whether the trace has named ranges.
        attention: SELF or CROSS, where the event is inside an attention module.
        kind: index into `KINDS`, of the outermost product or attention above, else of the nearest operator.
        own_kind: the event's own kind.
        selecting: the event runs between the begin of a step and the first call of an expert in it.
        flop, moved_bytes: work of the event, counted once in a stack; format: number format of its inputs.
    """

    parents: np.ndarray
    by_depth: list[np.ndarray]
    component: np.ndarray
    has_ranges: bool
    attention: np.ndarray
    kind: np.ndarray
    own_kind: np.ndarray
    selecting: np.ndarray
    flop: np.ndarray
    moved_bytes: np.ndarray
    format: np.ndarray


def attribute(trace: Trace) -> Attribution:
    """Place every host event of a trace."""
    import numpy as np

    host = trace.host
    parents = nest(host)
    by_depth = levels(parents)
    component = inherit(_by_name(host, _component, "user_annotation"), parents, by_depth)
    has_ranges = bool((component != NOTHING).any())
    attention = _by_name(host, _attention, "user_annotation")
    attention[_crosses(host)] = CROSS
    attention = inherit(attention, parents, by_depth)
    own_kind = _by_name(host, _kind, "cpu_op", *RUNTIME_CATEGORIES)
    # An operator of another library or a compiled one has work of its own, of a kind that its name does not tell.
    unknown = (own_kind == NOTHING) & (host["category"] == "cpu_op").to_numpy()
    own_kind[unknown] = KINDS.index(operators.POINTWISE)
    flop, moved, number_format = _work(host)
    flop = np.where(_inside(flop > 0, parents, by_depth), 0.0, flop)
    moved = np.where(_movers(trace, moved > 0, parents, by_depth), moved, 0.0)
    return Attribution(
        parents,
        by_depth,
        component if has_ranges else np.full(len(host), COMPONENTS.index("expert")),
        has_ranges,
        attention,
        _kinds(own_kind, parents, by_depth),
        own_kind,
        _selecting(trace, host),
        flop,
        moved,
        number_format,
    )


def _by_name(host: pd.DataFrame, code: object, *categories: str) -> np.ndarray:
    """A code per event from its name, asked once per name; -1 for events of other categories."""
    import numpy as np

    codes = np.array([code(name) for name in host["name"].cat.categories], dtype=np.int64)
    found = codes[host["name"].cat.codes.to_numpy()] if len(codes) else np.zeros(0, np.int64)
    return np.where(host["category"].isin(categories).to_numpy(), found, NOTHING)


def _component(name: str) -> int:
    match = _COMPONENT.match(name)
    return COMPONENTS.index(match[1]) if match else NOTHING


def _attention(name: str) -> int:
    return SELF if _SELF.search(name) else CROSS if _CROSS.search(name) else NOTHING


def _kind(name: str) -> int:
    kind = operators.kind(name)
    return KINDS.index(kind) if kind else NOTHING


def _kinds(own: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """A copy inside a product belongs to the product; elsewhere the nearest operator says what it is."""
    import numpy as np

    strong = np.isin(own, (KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)))
    kind = own.copy()
    held = strong.copy()
    for here in by_depth[1:]:
        above = parents[here]
        kind[here] = np.where(held[above] | (kind[here] == NOTHING), kind[above], kind[here])
        held[here] |= held[above]
    return kind


def _inside(marked: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Whether any event above is marked."""
    import numpy as np

    inside = np.zeros(len(marked), dtype=bool)
    for here in by_depth[1:]:
        inside[here] = inside[parents[here]] | marked[parents[here]]
    return inside


def _movers(trace: Trace, can: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """The operators that move data themselves: those that launched a kernel, on a CPU those that call no other mover.

    A copy between host and GPU is not among them: its bytes are known from the copy.
    """
    import numpy as np

    host = trace.host
    operator = (host["category"] == "cpu_op").to_numpy()
    if not trace.has_gpu:
        calls_mover = np.zeros(len(host), dtype=bool)
        calls_mover[parents[can & (parents != NOTHING)]] = True
        return can & ~calls_mover
    nearest = inherit(np.where(operator, np.arange(len(host)), NOTHING), parents, by_depth)
    launch = launchers(host, trace.kernels)
    copies = trace.kernels["category"].isin(["gpu_memcpy"]).to_numpy()
    movers = np.zeros(len(host) + 1, dtype=bool)
    movers[nearest[launch[(launch != NOTHING) & ~copies]]] = True  # -1 falls on the spare last entry
    return movers[:-1] & can


def _crosses(host: pd.DataFrame) -> list[int]:
    """Attention over other keys than its own: told by shapes where no module is named, as in compiled regions."""
    names = host["name"].cat.categories
    suspects = host.index[host["name"].isin([name for name in names if "scaled_dot_product" in name])]
    return [
        i
        for i, name, inputs in zip(suspects, host["name"][suspects], host["inputs"][suspects], strict=True)
        if operators.is_cross_attention(name, inputs)
    ]


def _work(host: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operations, bytes and number format, worked out once per operator and shape."""
    import numpy as np

    names, inputs = host["name"].cat, host["inputs"].cat
    both = names.codes.to_numpy().astype(np.int64) * (len(inputs.categories) + 1) + inputs.codes.to_numpy()
    unique, place = np.unique(both, return_inverse=True)
    pairs = [
        (
            names.categories[i // (len(inputs.categories) + 1)],
            inputs.categories[i % (len(inputs.categories) + 1)],
        )
        for i in unique.tolist()
    ]
    columns = (
        [operators.flop(*pair) for pair in pairs],
        [operators.moved_bytes(*pair) for pair in pairs],
        [operators.number_format(text) for _, text in pairs],
    )
    return tuple(
        np.array(column, dtype=kind)[place]
        for column, kind in zip(columns, (float, float, object), strict=True)
    )


def _selecting(trace: Trace, host: pd.DataFrame) -> np.ndarray:
    """Events between the begin of a profiler step and the first expert call in it (the scheduler's step is behind the
    last one). Step 0 begins with the encoders and is left out."""
    import numpy as np

    starts = host["start_us"].to_numpy()
    selecting = np.zeros(len(host), dtype=bool)
    names = host["name"].cat.categories
    calls = np.sort(starts[host["name"].isin([name for name in EXPERTS if name in names]).to_numpy()])
    for step in trace.steps.itertuples():
        first = np.searchsorted(calls, step.start_us)
        if step.step > 0 and first < len(calls) and calls[first] < step.start_us + step.time_us:
            selecting |= (starts >= step.start_us) & (starts < calls[first])
    names = host["name"].cat.categories
    steps = names[names.str.startswith(STEP_PREFIX)]
    return selecting & ~host["name"].isin(steps).to_numpy()
