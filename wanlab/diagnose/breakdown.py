"""Time breakdown of a trace: rows that add up to the wall clock, with operations, bytes and bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from wanlab.diagnose import operators
from wanlab.diagnose.trace import (
    NOTHING,
    Trace,
    inherit,
    innermost,
    launchers,
    levels,
    nest,
)
from wanlab.diagnose.trace_events import RUNTIME_CATEGORIES, STEP_PREFIX
from wanlab.measure.ceilings import Ceilings
from wanlab.models.spec import ENCODERS

OUTSIDE = "outside"
COMPONENTS = (*ENCODERS, "vae_encoder", "expert", "expert_high", "expert_low", "vae_decoder", OUTSIDE)
EXPERTS = ("expert", "expert_high", "expert_low")
KINDS = (
    operators.LINEAR,
    operators.ATTENTION,
    operators.ALLOCATION,
    operators.TRANSFER,
    operators.POINTWISE,
)
SELF, CROSS = 0, 1
_COMPONENT = re.compile(rf"^({'|'.join(sorted(COMPONENTS[:-1], reverse=True))})(?:\.|$)")
_SELF = re.compile(r"\.(attn1|self_attn|attn)(\.|$)")
_CROSS = re.compile(r"\.(attn2|cross_attn)(\.|$)")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Component, kind and work of every row of `trace.host`, by position; -1 is unknown.

    Attributes:
        parents: position of the enclosing event; by_depth: positions by depth.
        component: index into `COMPONENTS`, from the nearest enclosing range or the event itself; in a trace without named
            ranges every event counts as an expert's, so that kinds of operators can still be separated.
        has_ranges: whether the trace has named ranges.
        attention: SELF or CROSS, where the event is inside an attention module.
        kind: index into `KINDS`, from the outermost enclosing product or attention, else from the nearest operator.
        own_kind: the event's own kind.
        selecting: whether the event runs between the start of a step and the first expert call in it.
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
    """Find the component, kind and work of every host event of a trace."""
    host = trace.host
    parents = nest(host)
    by_depth = levels(parents)
    component = inherit(_by_name(host, _component, "user_annotation"), parents, by_depth)
    has_ranges = bool((component != NOTHING).any())
    attention = _by_name(host, _attention, "user_annotation")
    attention[_crosses(host)] = CROSS
    attention = inherit(attention, parents, by_depth)
    own_kind = _by_name(host, _kind, "cpu_op", *RUNTIME_CATEGORIES)
    # An operator of another library or a compiled one has work, but its name does not tell its kind.
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


def _by_name(host: pd.DataFrame, code: Callable[[str], int], *categories: str) -> np.ndarray:
    """A code per event, computed once per name; -1 for events of other categories."""
    codes = np.array([code(name) for name in host["name"].cat.categories], dtype=np.int64)
    values = codes[host["name"].cat.codes.to_numpy()] if len(codes) else np.zeros(0, np.int64)
    return np.where(host["category"].isin(categories).to_numpy(), values, NOTHING)


def _component(name: str) -> int:
    match = _COMPONENT.match(name)
    return COMPONENTS.index(match[1]) if match else NOTHING


def _attention(name: str) -> int:
    return SELF if _SELF.search(name) else CROSS if _CROSS.search(name) else NOTHING


def _kind(name: str) -> int:
    kind = operators.kind(name)
    return KINDS.index(kind) if kind else NOTHING


def _kinds(own: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Kind of every event: a copy inside a product belongs to the product, elsewhere the nearest operator decides."""
    strong = np.isin(own, (KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)))
    kind = own.copy()
    in_product = strong.copy()
    for here in by_depth[1:]:
        above = parents[here]
        kind[here] = np.where(in_product[above] | (kind[here] == NOTHING), kind[above], kind[here])
        in_product[here] |= in_product[above]
    return kind


def _inside(marked: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Whether any enclosing event is marked."""
    inside = np.zeros(len(marked), dtype=bool)
    for here in by_depth[1:]:
        inside[here] = inside[parents[here]] | marked[parents[here]]
    return inside


def _movers(trace: Trace, can: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """The operators that move data themselves: on a GPU those that launched a kernel, on a CPU those without a mover inside.

    Copies between host and GPU are excluded: their bytes are known from the copy event.
    """
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
    movers[nearest[launch[(launch != NOTHING) & ~copies]]] = True  # -1 sets the unused last entry
    return movers[:-1] & can


def _crosses(host: pd.DataFrame) -> list[int]:
    """Cross-attention found by the number of keys, where no module is named, as in compiled regions."""
    names = host["name"].cat.categories
    suspects = host.index[host["name"].isin([name for name in names if "scaled_dot_product" in name])]
    return [
        i
        for i, name, inputs in zip(suspects, host["name"][suspects], host["inputs"][suspects], strict=True)
        if operators.is_cross_attention(name, inputs)
    ]


def _work(host: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operations, bytes and number format, computed once per operator and shape."""
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
    """Events between the start of a profiler step and the first expert call in it (the scheduler's step comes after the
    last call). Step 0 begins with the encoders and is left out."""
    starts = host["start_us"].to_numpy()
    selecting = np.zeros(len(host), dtype=bool)
    names = host["name"].cat.categories
    calls = np.sort(starts[host["name"].isin([name for name in EXPERTS if name in names]).to_numpy()])
    for row in trace.steps.itertuples():
        first = np.searchsorted(calls, row.start_us)
        if row.step > 0 and first < len(calls) and calls[first] < row.start_us + row.time_us:
            selecting |= (starts >= row.start_us) & (starts < calls[first])
    names = host["name"].cat.categories
    steps = names[names.str.startswith(STEP_PREFIX)]
    return selecting & ~host["name"].isin(steps).to_numpy()


CATEGORIES = (
    "self_attention",
    "cross_attention",
    "linear",
    "norm_modulation_rotary",
    "expert_switching",
    "vae_encoder",
    "vae_decoder",
    "text_encoder",
    "communication",
    "other",
    "host_device_transfer",
    "memory_allocation",
    "launch_and_idle",
)
"""Order of priority where kernels of several categories run at the same time."""
WEIGHTS_BYTES = 1 << 20
"""A copy of at least this size inside an expert swaps in weights: activations stay on the GPU there."""
INDEX = {name: i for i, name in enumerate(CATEGORIES)}


def category_of(component: np.ndarray, attention: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Category of operators that do work, by their component, attention module and kind."""
    inside = np.select(
        [kind == KINDS.index(operators.ATTENTION), kind == KINDS.index(operators.LINEAR)],
        [
            np.where(np.maximum(attention, SELF) == SELF, INDEX["self_attention"], INDEX["cross_attention"]),
            INDEX["linear"],
        ],
        INDEX["norm_modulation_rotary"],
    )
    whole = dict.fromkeys(ENCODERS, "text_encoder") | {
        "vae_encoder": "vae_encoder",
        "vae_decoder": "vae_decoder",
        OUTSIDE: "other",
    }
    by_component = np.array(
        [INDEX[whole[name]] if name in whole else NOTHING for name in COMPONENTS]
        + [INDEX["other"]]  # component -1
    )
    categories = by_component[component]
    return np.where(categories == NOTHING, inside, categories)


def host_categories(trace: Trace, placed: Attribution) -> np.ndarray:
    """Category of every host event for the time in which it is the innermost."""
    categories = category_of(placed.component, placed.attention, placed.kind)
    runtime = trace.host["category"].isin(RUNTIME_CATEGORIES).to_numpy()
    own = placed.own_kind
    # Python between operators, and calls that only launch work on the GPU.
    categories[own == NOTHING] = INDEX["launch_and_idle"]
    categories[placed.selecting] = INDEX["expert_switching"]
    categories[own == KINDS.index(operators.ALLOCATION)] = INDEX["memory_allocation"]
    categories[runtime & (own == KINDS.index(operators.TRANSFER))] = INDEX["host_device_transfer"]
    return categories


def waiting_categories(host_category: np.ndarray) -> np.ndarray:
    """Categories for the time in which the GPU waits: any operator on the host is then launch overhead."""
    unchanged = [INDEX[name] for name in ("expert_switching", "host_device_transfer", "memory_allocation")]
    return np.where(np.isin(host_category, unchanged), host_category, INDEX["launch_and_idle"])


def kernel_categories(trace: Trace, placed: Attribution) -> tuple[np.ndarray, np.ndarray]:
    """Category and component of every kernel."""
    kernels = trace.kernels
    launch = launchers(trace.host, kernels)
    known = launch != NOTHING

    def of_launch(values: np.ndarray) -> np.ndarray:
        return np.where(known, np.append(values, NOTHING)[launch], NOTHING)

    names = kernels["name"].cat

    def named(pattern: str) -> np.ndarray:
        return np.array([bool(re.search(pattern, name)) for name in names.categories], dtype=bool)[
            names.codes
        ]

    kind_of_name = np.array([_kind_of_kernel(name) for name in names.categories], dtype=np.int64)[names.codes]
    kind = of_launch(placed.kind)
    # In a compiled region or a graph no operator gives the kind of a kernel; its own name does.
    by_name = np.isin(kind, (KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)))
    kind = np.where(by_name, kind, kind_of_name)
    component = of_launch(placed.component)
    if not placed.has_ranges:
        component[:] = COMPONENTS.index("expert")
    category = category_of(component, of_launch(placed.attention), kind)
    category[of_launch(placed.selecting.astype(np.int64)) == 1] = INDEX["expert_switching"]
    copies = named(operators.COPIES)
    expert = np.isin(component, [COMPONENTS.index(name) for name in EXPERTS])
    category[copies] = INDEX["host_device_transfer"]
    category[copies & expert & (kernels["size_bytes"].to_numpy() >= WEIGHTS_BYTES)] = INDEX[
        "expert_switching"
    ]
    category[named(r"nccl|rccl|oneccl|Memcpy ?(PtoP|P2P)")] = INDEX["communication"]
    return category, component


def _kind_of_kernel(name: str) -> int:
    kind = operators.kind(name)
    return KINDS.index(kind if kind in (operators.LINEAR, operators.ATTENTION) else operators.POINTWISE)


CATEGORY_NAMES = {
    "self_attention": "self-attention",
    "cross_attention": "cross-attention",
    "linear": "linear layers",
    "norm_modulation_rotary": "norm, modulation, rotary",
    "expert_switching": "switching of experts",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
    "text_encoder": "text encoder",
    "communication": "between GPUs",
    "host_device_transfer": "copies to and from the GPU",
    "memory_allocation": "memory allocation",
    "launch_and_idle": "Python and waiting",
    "other": "everything else",
}
"""Category -> its name in text, figures and tables."""


def category_name(category: str, joint: bool = False) -> str:
    """Name of a category in text; `joint`: self-attention of this model is joint attention of video and text."""
    return (
        "joint attention"
        if joint and category == "self_attention"
        else CATEGORY_NAMES.get(category, category)
    )


GAP_US = 10.0


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Time breakdown of a trace.

    Attributes:
        frame: one row per category with time, largest first: `category`, `time_ms` (wall clock assigned to it alone; all
            rows add up to `wall_ms`), `share_percent`, `hidden_ms` (its other GPU time, concurrent with another row's),
            `calls` (kernels, on a CPU operators), `tflop` and `moved_gb` (from recorded shapes; 0 where unknown),
            `format` (number format of most of that work), `tflop_per_s`, `gb_per_s`, `amdahl_bound` (speed-up of the whole
            if this row cost nothing).
        parts: component x category: `component`, `category`, `time_ms`, `tflop`.
        wall_ms: length of the trace's window.
        recorded_ms: wall clock of the generation, measured by the capture; None if the file does not have it.
        gpu: `busy_percent`, `kernels`, `launch_gaps` (over 10 µs), `launch_gap_median_us`, `launch_gap_ms` (all);
            empty without a GPU.
        host_busy_percent: share of the wall clock in which the main thread was in an operator or runtime call.
        notes: distinctions that the trace does not allow; cautions: as `Trace.cautions`.
        joint: whether the model's self-attention is joint attention of video and text, as the capture states.
        codes: category x code: `category`, `code` (name of an operator, on a GPU of a kernel), `time_ms` of its own.
    """

    frame: pd.DataFrame
    parts: pd.DataFrame
    wall_ms: float
    recorded_ms: float | None
    gpu: dict[str, float]
    host_busy_percent: float
    notes: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    joint: bool = False
    codes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["category", "code", "time_ms"]))

    def name_of(self, category: str) -> str:
        """Name of a category in text."""
        return category_name(category, self.joint)

    @property
    def residual_percent(self) -> float:
        """Difference of the rows' sum to the wall clock: of the generation where it was recorded, else of the trace."""
        wall = self.recorded_ms or self.wall_ms
        return 100 * (self.frame["time_ms"].sum() / wall - 1)

    def named(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table with the names of its categories as figures and text have them."""
        return table.assign(category=[self.name_of(name) for name in table["category"]])

    def share_percent(self, category: str) -> float:
        """Share of a category; 0 if it took no time."""
        row = self.frame[self.frame["category"] == category]
        return float(row["share_percent"].iloc[0]) if len(row) else 0.0

    def experts(self) -> pd.DataFrame:
        """Each expert's own time and work: component, category, time_ms, tflop, share_percent (of the component's
        time), flop_percent (of its operations)."""
        table = self.parts[self.parts["component"].isin(EXPERTS)].copy()
        whole = table.groupby("component")[["time_ms", "tflop"]].transform("sum")
        table["share_percent"] = 100 * table["time_ms"] / whole["time_ms"]
        table["flop_percent"] = 100 * table["tflop"] / whole["tflop"]
        return table.reset_index(drop=True)

    def row(self) -> dict[str, float]:
        """All figures as a flat record: wall_ms, <category>_percent, gpu_busy_percent, host_busy_percent, kernels..."""
        shares = {f"{name}_percent": self.share_percent(name) for name in CATEGORIES}
        gpu = {f"gpu_{name}" if name == "busy_percent" else name: value for name, value in self.gpu.items()}
        return {
            "wall_ms": self.wall_ms,
            "residual_percent": self.residual_percent,
            "host_busy_percent": self.host_busy_percent,
            **gpu,
            **shares,
        }


def breakdown(trace: Trace) -> Breakdown:
    """Assign the wall clock of a trace to categories; see `Breakdown`.

    A VAE or text encoder is one row with all its operators; inside experts the kind of an operator and the attention module
    around it decide. In a trace without named ranges everything counts as an expert's.
    """
    placed = attribute(trace)
    cut = stretches(trace, placed)
    stretch_us = np.diff(cut.marks_us)
    busy = np.append(placed.own_kind != NOTHING, False)[cut.event]
    of_kernel, _ = kernel_categories(trace, placed)
    table_us = np.zeros((len(COMPONENTS), len(CATEGORIES)))
    np.add.at(table_us, (cut.component, cut.category), stretch_us)
    alone_us = np.bincount(cut.running + 1, weights=stretch_us, minlength=len(CATEGORIES) + 1)[1:]
    work = category_of(placed.component, placed.attention, placed.kind)
    work[placed.selecting] = INDEX["expert_switching"]
    notes = list(trace.notes)
    if not placed.has_ranges:
        notes.append("no named ranges: components, and self- from cross-attention, cannot be separated")
    return Breakdown(
        _frame(trace, placed, work, table_us.sum(axis=0), alone_us, of_kernel),
        _parts(table_us, placed, work),
        trace.wall_us / 1e3,
        trace.generation.get("wall_ms"),
        _gpu(*_spans(trace), trace.wall_us) if trace.has_gpu else {},
        100 * float(stretch_us[busy].sum()) / trace.wall_us,
        tuple(notes),
        trace.cautions,
        bool(trace.generation.get("joint_attention")),
        _codes(trace, cut.category, stretch_us, cut.event, of_kernel),
    )


def _codes(
    trace: Trace, category: np.ndarray, stretch_us: np.ndarray, event: np.ndarray, of_kernel: np.ndarray
) -> pd.DataFrame:
    """The table `Breakdown.codes`: of kernels where there is a GPU, else of the host's innermost operators.

    Args:
        category, stretch_us, event: of every stretch of the wall clock, with the innermost host event (-1 for none).
        of_kernel: category of every kernel.
    """
    if trace.has_gpu:
        kernels = trace.kernels
        table = pd.DataFrame(
            {
                "category": of_kernel,
                "code": kernels["name"].astype(str).to_numpy(),
                "us": kernels["time_us"].to_numpy(),
            }
        )
    else:
        names = np.append(trace.host["name"].astype(str).to_numpy(), "")
        table = pd.DataFrame({"category": category, "code": names[event], "us": stretch_us})
    sums = table[table["code"] != ""].groupby(["category", "code"], sort=False)["us"].sum().reset_index()
    return pd.DataFrame(
        {
            "category": [CATEGORIES[i] for i in sums["category"]],
            "code": sums["code"],
            "time_ms": sums["us"] / 1e3,
        }
    )


@dataclass(frozen=True, eq=False)
class Stretches:
    """The window of a trace, cut wherever an event begins or ends.

    Attributes:
        marks_us: [n + 1] times of the cuts, as `start_us`.
        category, component: [n] what each stretch belongs to, as indices into `CATEGORIES` and `COMPONENTS`.
        running: [n] category of the GPU's work, -1 where it waits.
        event: [n] innermost event of the main thread, as a row of `trace.host`; -1 for none.
    """

    marks_us: np.ndarray
    category: np.ndarray
    component: np.ndarray
    running: np.ndarray
    event: np.ndarray


def stretches(trace: Trace, placed: Attribution) -> Stretches:
    """Cut the window of a trace so that every stretch belongs to one category; see `Stretches`."""
    window, (begins, ends) = trace.window_us, _spans(trace)
    times, inner = _main_thread(trace, placed)
    marks = np.unique(np.concatenate([window, np.clip(times, *window), begins, ends]))
    event = _at(marks[:-1], times, inner)
    category = np.append(host_categories(trace, placed), INDEX["launch_and_idle"])[event]
    component = np.append(placed.component, NOTHING)[event]
    running = np.full(len(event), NOTHING)
    if trace.has_gpu:
        running, which = _running(marks, begins, ends, *kernel_categories(trace, placed))
        category = np.where(running != NOTHING, running, waiting_categories(category))
        component = np.where(running != NOTHING, which, component)
    component = np.where(component == NOTHING, COMPONENTS.index(OUTSIDE), component)
    return Stretches(marks, category, component, running, event)


def _spans(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of all kernels, inside the window."""
    begins = trace.kernels["start_us"].to_numpy()
    ends = begins + trace.kernels["time_us"].to_numpy()
    return np.clip(begins, *trace.window_us), np.clip(ends, *trace.window_us)


def _at(moments: np.ndarray, times: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The innermost event at each moment, -1 for none."""
    if not len(times):
        return np.full(len(moments), NOTHING)
    place = np.searchsorted(times, moments, side="right") - 1
    return np.where(place >= 0, inner[np.maximum(place, 0)], NOTHING)


def _main_thread(trace: Trace, placed: Attribution) -> tuple[np.ndarray, np.ndarray]:
    """Innermost events of the busiest host thread, as from `innermost`, with rows of `trace.host`."""
    host = trace.host
    if host.empty:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    outer = placed.parents == NOTHING
    per_thread = host[outer].groupby("thread")["time_us"].sum()
    rows = np.flatnonzero((host["thread"] == per_thread.idxmax()).to_numpy())
    offset = rows[0]  # the rows of a thread are contiguous
    parents = np.where(placed.parents[rows] == NOTHING, NOTHING, placed.parents[rows] - offset)
    times, which = innermost(host.iloc[rows], parents, levels(parents))
    return times, np.where(which == NOTHING, NOTHING, which + offset)


def _running(marks, begins, ends, category, component) -> tuple[np.ndarray, np.ndarray]:
    """Category and component of the GPU's work in each interval between marks, -1 where it waits."""
    component = np.where(component == NOTHING, COMPONENTS.index(OUTSIDE), component)
    pairs, code = np.unique(category * len(COMPONENTS) + component, return_inverse=True)
    running = np.full(len(marks) - 1, NOTHING)
    which = np.full(len(marks) - 1, NOTHING)
    first, last = np.searchsorted(marks, begins), np.searchsorted(marks, ends)
    for i in range(len(pairs) - 1, -1, -1):  # categories of higher priority are written last
        member = code == i
        change = np.zeros(len(marks), dtype=np.int64)
        np.add.at(change, first[member], 1)
        np.add.at(change, last[member], -1)
        active = np.cumsum(change)[:-1] > 0
        running[active], which[active] = divmod(int(pairs[i]), len(COMPONENTS))
    return running, which


def _frame(
    trace: Trace,
    placed: Attribution,
    work: np.ndarray,
    time_us: np.ndarray,
    alone_us: np.ndarray,
    of_kernel: np.ndarray,
) -> pd.DataFrame:
    """The rows of `Breakdown.frame`.

    Args:
        work: category of the work of every host event.
        time_us, alone_us: wall clock per category, and the part of it in which its kernels ran.
        of_kernel: category of every kernel.
    """
    n, wall_us = len(CATEGORIES), trace.wall_us
    if trace.has_gpu:
        spent_us = np.bincount(of_kernel, weights=trace.kernels["time_us"].to_numpy(), minlength=n)
        calls = np.bincount(of_kernel, minlength=n)
        hidden_us = np.maximum(spent_us - alone_us, 0.0)
    else:
        spent_us, hidden_us = time_us, np.zeros(n)
        calls = np.bincount(host_categories(trace, placed)[placed.own_kind != NOTHING], minlength=n)
    flop = np.bincount(work, weights=placed.flop, minlength=n)
    moved = np.bincount(work, weights=placed.moved_bytes, minlength=n)
    if trace.has_gpu:  # the bytes of a copy are recorded
        copied = (
            trace.kernels["size_bytes"].to_numpy() * (trace.kernels["category"] == "gpu_memcpy").to_numpy()
        )
        moved = moved + np.bincount(of_kernel, weights=copied, minlength=n)
    rows = []
    for i, name in enumerate(CATEGORIES):
        if time_us[i] <= 0 and hidden_us[i] <= 0:
            continue
        seconds = spent_us[i] / 1e6
        rows.append(
            {
                "category": name,
                "time_ms": time_us[i] / 1e3,
                "share_percent": 100 * time_us[i] / wall_us,
                "hidden_ms": hidden_us[i] / 1e3,
                "calls": int(calls[i]),
                "tflop": flop[i] / 1e12,
                "moved_gb": moved[i] / 1e9,
                "format": _format(placed, work == i),
                "tflop_per_s": flop[i] / 1e12 / seconds if seconds and flop[i] else np.nan,
                "gb_per_s": moved[i] / 1e9 / seconds if seconds and moved[i] else np.nan,
                "amdahl_bound": wall_us / (wall_us - time_us[i]) if time_us[i] < wall_us else np.inf,
            }
        )
    return pd.DataFrame(rows).sort_values("time_ms", ascending=False, kind="stable").reset_index(drop=True)


def _format(placed: Attribution, selected: np.ndarray) -> str:
    """Number format of most of the operations, or of most of the bytes where there are no operations."""
    weight = placed.flop if placed.flop[selected].any() else placed.moved_bytes
    totals = pd.Series(weight[selected]).groupby(placed.format[selected]).sum()
    totals = totals[(totals > 0) & (totals.index != "")]
    return str(totals.idxmax()) if len(totals) else ""


def _parts(table_us: np.ndarray, placed: Attribution, work: np.ndarray) -> pd.DataFrame:
    flop = np.zeros_like(table_us)
    component = np.where(placed.component == NOTHING, COMPONENTS.index(OUTSIDE), placed.component)
    np.add.at(flop, (component, work), placed.flop)
    rows = [
        {"component": name, "category": category, "time_ms": table_us[i, j] / 1e3, "tflop": flop[i, j] / 1e12}
        for i, name in enumerate(COMPONENTS)
        for j, category in enumerate(CATEGORIES)
        if table_us[i, j] > 0
    ]
    return pd.DataFrame(rows)


def _gpu(begins: np.ndarray, ends: np.ndarray, wall_us: float) -> dict[str, float]:
    """Utilisation of the GPU: any kernel, copy or fill on any stream counts."""
    order = np.argsort(begins, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    gaps = np.maximum(begins[order][1:] - reached[:-1], 0.0)
    busy = reached[-1] - begins.min() - gaps.sum()
    waits = gaps[gaps > GAP_US]
    return {
        "busy_percent": 100 * float(busy) / wall_us,
        "kernels": len(begins),
        "launch_gaps": len(waits),
        "launch_gap_median_us": float(np.median(gaps)) if len(gaps) else 0.0,
        "launch_gap_ms": float(gaps.sum()) / 1e3,
    }


def bounds(breakdown: Breakdown, ceilings: Ceilings | None) -> pd.DataFrame:
    """The rows of a breakdown with their roofline and Amdahl bounds.

    Args:
        ceilings: ceilings of the traced device; None leaves the columns that need them empty.

    Returns:
        DataFrame: category, time_ms, share_percent, tflop_per_s, gb_per_s, of_roofline_percent (roofline_ms over the
        measured time), amdahl_bound (speed-up of the whole if the row cost nothing), roofline_ms (the larger of work over
        rate and bytes over bandwidth: no exact implementation of the same operators with recorded shapes is faster),
        ceiling_tflop_per_s, ceiling_gb_per_s, hidden_ms, calls.
    """
    table = breakdown.frame.copy()
    rates = ceilings.tflop_per_s if ceilings else {}
    table["ceiling_tflop_per_s"] = table["format"].map(rates).astype(float).where(table["tflop"] > 0)
    memory = ceilings.memory_gb_per_s if ceilings else np.nan
    link = ceilings.copy_gb_per_s.get("pinned", np.nan) if ceilings else np.nan
    bandwidth = np.where(table["category"] == "host_device_transfer", link, memory)
    table["ceiling_gb_per_s"] = np.where(table["moved_gb"] > 0, bandwidth, np.nan)
    arithmetic = table["tflop"] / table["ceiling_tflop_per_s"]
    traffic = table["moved_gb"] / table["ceiling_gb_per_s"]
    table["roofline_ms"] = 1e3 * np.fmax(arithmetic, traffic)
    spent = table["time_ms"] + table["hidden_ms"]
    table["of_roofline_percent"] = 100 * table["roofline_ms"] / spent
    columns = [
        "category", "time_ms", "share_percent", "tflop_per_s", "gb_per_s", "of_roofline_percent", "amdahl_bound",
        "roofline_ms", "ceiling_tflop_per_s", "ceiling_gb_per_s", "hidden_ms", "calls",
    ]  # fmt: skip
    return table[columns]
