"""The events of a trace as one table that knows the model: component, step, module, category, shapes, work and bound."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np
import pandas as pd

from wanlab.diagnose.breakdown import (
    CATEGORIES,
    COMPONENTS,
    KINDS,
    OUTSIDE,
    Attribution,
    attribute,
    host_categories,
    kernel_categories,
    stretches,
)
from wanlab.diagnose.operators import ATTENTION, LINEAR, POINTWISE, kind
from wanlab.diagnose.trace import NOTHING, Trace, inherit, launchers
from wanlab.diagnose.trace_events import STEP_PREFIX
from wanlab.measure.ceilings import Ceilings

HOST, GPU = "host", "gpu"
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Lane:
    """A row of the timeline: rows `first` to `last` (not included) of `Events.frame`, at most `depth` inside one another."""

    name: str
    side: str
    first: int
    last: int
    depth: int


@dataclass(frozen=True, eq=False)
class Events:
    """All events of a trace.

    Attributes:
        frame: one row per event, the host's before the GPU's, each lane by start: `name`, `side` ("host" or "gpu"),
            `lane`, `kind` (Kineto's category), `start_us` (as in `Trace.events`), `time_us`, `own_us` (without what is
            inside; on the GPU `time_us`), `component`, `step` (-1 outside of steps), `category` (of the breakdown),
            `operation` (linear, attention, pointwise, allocation, transfer, or "" of a call or range), `module` (path of
            the nearest named range), `shapes` (of the inputs), `format`, `flop` and `moved_bytes` (see below),
            `roofline_us` (least time for that work, NaN where work or ceiling is unknown), `parent` (row of the
            enclosing event, on the GPU of the call that launched it; -1 for none), `depth` (in its lane).
        lanes: the timeline's rows.
        stretches: the wall clock, which its rows add up to: `start_us`, `time_us`, `category`, `component`, `step`.
        side: whose events are the work: "gpu" where there is a GPU.

    The operations of an operator belong to the matrix product or attention inside it, on the GPU to the kernels that it
    launched, in proportion to their time where there are several; the sum over the side of the work is that of the trace,
    except for operators whose kernels are not in it.
    """

    frame: pd.DataFrame
    lanes: tuple[Lane, ...]
    stretches: pd.DataFrame
    side: str

    @property
    def work(self) -> pd.DataFrame:
        """The events that are the work: of the GPU, without one the host's that have own time."""
        frame = self.frame[self.frame["side"] == self.side]
        return frame if self.side == GPU else frame[frame["own_us"] > 0]


def event_table(trace: Trace, ceilings: Ceilings | None = None) -> Events:
    """The events of a trace with everything that is known about each.

    Args:
        ceilings: of the traced device, for `roofline_us`.
    """
    placed = attribute(trace)
    host = trace.host
    kernels = trace.kernels
    order = np.lexsort((kernels["start_us"], kernels["category"].isin(COPIES), kernels["stream"]))
    launch = launchers(host, kernels)
    of_kernel, component_of_kernel = (values[order] for values in kernel_categories(trace, placed))
    kernels, launch = kernels.iloc[order], launch[order]
    near = _nearest_operator(trace, placed)
    flop, moved = _work(trace, placed, kernels, launch, near)
    modules = _modules(trace, placed)
    step = _steps(trace, host["start_us"].to_numpy())
    late = _steps(trace, kernels["start_us"].to_numpy())
    inputs = pd.Categorical.from_codes(
        np.concatenate([host["inputs"].cat.codes, _of(launch, _of(near, host["inputs"].cat.codes))]),
        dtype=host["inputs"].dtype,
    )
    number_format = np.concatenate(
        [placed.format, _of(launch, _of(near, placed.format, ""), "")] if len(host) else [[""] * len(kernels)]
    )
    frame = pd.DataFrame(
        {
            "name": _joined(host["name"], kernels["name"]),
            "side": pd.Categorical.from_codes(np.repeat([0, 1], [len(host), len(kernels)]), [HOST, GPU]),
            "kind": _joined(host["category"], kernels["category"]),
            "start_us": np.concatenate([host["start_us"], kernels["start_us"]]),
            "time_us": np.concatenate([host["time_us"], kernels["time_us"]]),
            "own_us": np.concatenate([own_us(host, placed), kernels["time_us"]]),
            "component": _coded(np.concatenate([placed.component, component_of_kernel]), COMPONENTS, OUTSIDE),
            "step": np.concatenate([step, np.where(launch == NOTHING, late, _of(launch, step))]).astype(
                np.int16
            ),
            "category": _coded(
                np.concatenate([_host_category(trace, placed), of_kernel]), CATEGORIES, "other"
            ),
            "operation": _operations(placed, kernels["name"]),
            "module": _named(np.concatenate([modules, _of(launch, modules)]), host["name"].cat.categories),
            "shapes": _shapes(inputs),
            "format": pd.Categorical(number_format),
            "flop": flop,
            "moved_bytes": moved,
            "parent": np.concatenate([placed.parents, launch]),
        }
    )
    frame["depth"] = _depth(placed, len(frame))
    frame["roofline_us"] = _roofline(frame, ceilings)
    lanes = _lanes(host, kernels, frame["depth"].to_numpy())
    frame["lane"] = pd.Categorical.from_codes(
        np.repeat(np.arange(len(lanes)), [lane.last - lane.first for lane in lanes]),
        [lane.name for lane in lanes],
    )
    return Events(frame, lanes, _stretch_table(trace, placed), GPU if trace.has_gpu else HOST)


def own_us(host: pd.DataFrame, placed: Attribution) -> np.ndarray:
    """Time of every host event without the events inside it; all add up to the time of the outermost events.

    An event that ends after the one around it (two clocks, rounded) counts up to that end.
    """
    starts = host["start_us"].to_numpy()
    ends = starts + host["time_us"].to_numpy()
    for here in placed.by_depth[1:]:
        ends[here] = np.maximum(np.minimum(ends[here], ends[placed.parents[here]]), starts[here])
    spent = ends - starts
    inside = placed.parents != NOTHING
    return spent - np.bincount(placed.parents[inside], weights=spent[inside], minlength=len(spent))


def _of(rows: np.ndarray, values: np.ndarray, missing: object = NOTHING) -> np.ndarray:
    """`values` at `rows`; `missing` where a row is -1."""
    return np.append(values, missing)[rows]


def _nearest_operator(trace: Trace, placed: Attribution) -> np.ndarray:
    """For every host event the operator it belongs to that recorded its inputs: itself or the nearest around it; or -1."""
    recorded = (trace.host["category"] == "cpu_op").to_numpy() & (trace.host["inputs"] != "").to_numpy()
    return inherit(np.where(recorded, np.arange(len(recorded)), NOTHING), placed.parents, placed.by_depth)


def _work(
    trace: Trace, placed: Attribution, kernels: pd.DataFrame, launch: np.ndarray, near: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Operations and bytes of every event, host and GPU; see `Events`."""
    rows = np.arange(len(trace.host))
    whole = inherit(np.where(placed.flop > 0, rows, NOTHING), placed.parents, placed.by_depth)
    if not trace.has_gpu:
        strong = np.isin(placed.own_kind, (KINDS.index(LINEAR), KINDS.index(ATTENTION)))
        spent = own_us(trace.host, placed)
        return _shared(placed.flop, whole, strong, spent), placed.moved_bytes.copy()
    names = kernels["name"].cat
    products = np.array([kind(name) in (LINEAR, ATTENTION) for name in names.categories], dtype=bool)
    strong = products[names.codes] if len(products) else np.zeros(0, dtype=bool)
    spent, copied = kernels["time_us"].to_numpy(), kernels["category"].isin(["gpu_memcpy"]).to_numpy()
    flop = _shared(placed.flop, _of(launch, whole), strong & ~copied, spent)
    operator = inherit(
        np.where((trace.host["category"] == "cpu_op").to_numpy(), rows, NOTHING),
        placed.parents,
        placed.by_depth,
    )
    mover = np.where(copied, NOTHING, _of(launch, operator))
    moved = _shared(placed.moved_bytes, mover, ~copied, spent)
    moved = np.where(copied, kernels["size_bytes"].to_numpy(), moved)
    return np.concatenate([placed.flop, flop]), np.concatenate([placed.moved_bytes, moved])


def _shared(amount: np.ndarray, owner: np.ndarray, first: np.ndarray, spent_us: np.ndarray) -> np.ndarray:
    """The amount of every owner, given to its events in proportion to their time: to those of `first` where it has some.

    Args:
        amount: [owners]. owner: [events], row of the owner or -1. first, spent_us: [events].
    """
    owned = owner != NOTHING
    weight = spent_us + 1e-9  # events of no length share alike
    has_first = np.bincount(owner[owned & first], minlength=len(amount)) > 0
    weight = np.where(owned & (first | ~np.append(has_first, False)[owner]), weight, 0.0)
    total = np.bincount(owner[owned], weights=weight[owned], minlength=len(amount))
    of_owner = np.append(total, 1.0)[owner]
    share = np.divide(weight, of_owner, out=np.zeros(len(owner)), where=of_owner > 0)
    return share * np.append(amount, 0.0)[owner]


def _modules(trace: Trace, placed: Attribution) -> np.ndarray:
    """For every host event the code of the name of the nearest range around it that is no step; -1 for none."""
    names = trace.host["name"].cat
    is_step = np.array([name.startswith(STEP_PREFIX) for name in names.categories], dtype=bool)
    ranges = (trace.host["category"] == "user_annotation").to_numpy()
    codes = names.codes.to_numpy().astype(np.int64)
    marked = np.where(ranges & ~np.append(is_step, True)[codes], codes, NOTHING)
    return inherit(marked, placed.parents, placed.by_depth)


def _operations(placed: Attribution, names: pd.Series) -> pd.Categorical:
    """The own kind of every event; a kernel that is no product, attention or copy is pointwise."""
    of_name = [kind(name) or POINTWISE for name in names.cat.categories]
    codes = np.array([KINDS.index(each) for each in of_name], dtype=np.int64)
    own = np.concatenate([placed.own_kind, codes[names.cat.codes] if len(codes) else np.zeros(0, np.int64)])
    return pd.Categorical.from_codes(own + 1, ["", *KINDS])


def _steps(trace: Trace, starts: np.ndarray) -> np.ndarray:
    """The step in which each moment lies, -1 for none."""
    steps = trace.steps
    if steps.empty:
        return np.full(len(starts), NOTHING)
    place = np.searchsorted(steps["start_us"].to_numpy(), starts, side="right") - 1
    inside = starts < _of(place, (steps["start_us"] + steps["time_us"]).to_numpy(), -np.inf)
    return np.where(inside, _of(place, steps["step"].to_numpy()), NOTHING)


def _host_category(trace: Trace, placed: Attribution) -> np.ndarray:
    """Category of the host's events; of a range or call without work of its own it is launch and idle."""
    return host_categories(trace, placed) if len(trace.host) else np.zeros(0, dtype=np.int64)


def _stretch_table(trace: Trace, placed: Attribution) -> pd.DataFrame:
    """The wall clock in stretches, neighbours of one category, component and step joined."""
    cut = stretches(trace, placed)
    starts = cut.marks_us[:-1]
    step = _steps(trace, starts)
    if trace.has_gpu:  # the host is ahead: the step is that of the last kernel that began
        begins = trace.kernels["start_us"].to_numpy()
        order = np.argsort(begins, kind="stable")
        launch = launchers(trace.host, trace.kernels)[order]
        of_kernel = np.where(
            launch == NOTHING,
            _steps(trace, begins[order]),
            _of(launch, _steps(trace, trace.host["start_us"].to_numpy())),
        )
        place = np.searchsorted(begins[order], starts, side="right") - 1
        step = np.where(place >= 0, _of(place, of_kernel), step)
    key = (cut.category * len(COMPONENTS) + cut.component) * 2**16 + step
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    ends = np.append(starts[first[1:]], cut.marks_us[-1])
    return pd.DataFrame(
        {
            "start_us": starts[first],
            "time_us": ends - starts[first],
            "category": _coded(cut.category[first], CATEGORIES, "other"),
            "component": _coded(cut.component[first], COMPONENTS, OUTSIDE),
            "step": step[first].astype(np.int16),
        }
    )


def _depth(placed: Attribution, rows: int) -> np.ndarray:
    depth = np.zeros(rows, dtype=np.int16)
    for level, here in enumerate(placed.by_depth):
        depth[here] = level
    return depth


def _lanes(host: pd.DataFrame, kernels: pd.DataFrame, depth: np.ndarray) -> tuple[Lane, ...]:
    """Threads of the host, the one with the most events first among names; then streams, each with its copies below."""
    lanes = []
    threads = host["thread"].to_numpy()
    edges = (
        [*np.flatnonzero(np.append(True, threads[1:] != threads[:-1])).tolist(), len(host)]
        if len(host)
        else [0]
    )
    most = max(np.diff(edges), default=0)
    for number, (first, last) in enumerate(pairwise(edges)):
        name = "main thread" if last - first == most else f"thread {number}"
        most = -1 if last - first == most else most
        lanes.append(Lane(name, HOST, first, last, int(depth[first:last].max()) + 1))
    keys = kernels["stream"].to_numpy() * 2 + kernels["category"].isin(COPIES).to_numpy()
    edges = (
        [*np.flatnonzero(np.append(True, keys[1:] != keys[:-1])).tolist(), len(keys)] if len(keys) else [0]
    )
    for first, last in pairwise(edges):
        stream, copies = divmod(int(keys[first]), 2)
        name = f"copies of stream {stream}" if copies else f"stream {stream}"
        lanes.append(Lane(name, GPU, first + len(host), last + len(host), 1))
    return tuple(lanes)


def _roofline(frame: pd.DataFrame, ceilings: Ceilings | None) -> np.ndarray:
    """Least time of every event's work: the larger of operations over rate and bytes over bandwidth."""
    if ceilings is None:
        return np.full(len(frame), np.nan)
    rate = frame["format"].astype(object).map(ceilings.tflop_per_s).astype(float).to_numpy()
    link = ceilings.copy_gb_per_s.get("pinned", np.nan)
    crossing = (frame["category"] == "host_device_transfer").to_numpy()
    bandwidth = np.where(
        crossing & (frame["kind"] == "gpu_memcpy").to_numpy(), link, ceilings.memory_gb_per_s
    )
    flop, moved = frame["flop"].to_numpy(), frame["moved_bytes"].to_numpy()
    arithmetic = np.where(flop > 0, flop / rate / 1e6, np.nan)
    return np.fmax(arithmetic, np.where(moved > 0, moved / bandwidth / 1e3, np.nan))


def _joined(host: pd.Series, kernels: pd.Series) -> pd.Categorical:
    """Names of both sides, which the tables of a trace take from one list."""
    codes = np.concatenate([host.cat.codes, kernels.cat.codes])
    return pd.Categorical.from_codes(codes, dtype=host.dtype).remove_unused_categories()


def _named(codes: np.ndarray, names: pd.Index) -> pd.Categorical:
    """Codes of names as a category, "" for -1."""
    rest = [name or "(unnamed)" for name in names]
    return pd.Categorical.from_codes(codes + 1, ["", *rest]).remove_unused_categories()


def _coded(codes: np.ndarray, names: tuple[str, ...], missing: str) -> pd.Categorical:
    return pd.Categorical.from_codes(np.where(codes == NOTHING, names.index(missing), codes), list(names))


def _shapes(inputs: pd.Categorical) -> pd.Categorical:
    """Shapes of inputs as text: "3600×5120, 5120×5120"."""
    texts = [shape_text(text) for text in inputs.categories]
    unique = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
    codes = np.array([unique[text] for text in texts] + [unique[""]])
    return pd.Categorical.from_codes(codes[inputs.codes], list(unique))


def shape_text(inputs: str) -> str:
    """The shapes in an event's `inputs`, without those of plain numbers: "3600×5120, 5120×5120"; "" where unknown."""
    try:
        shapes = msgspec.json.decode(inputs)[0] if inputs else []
    except (msgspec.DecodeError, IndexError, KeyError, TypeError):
        return ""
    return ", ".join(filter(None, map(_shape, shapes))) if isinstance(shapes, list) else ""


def _shape(shape: object) -> str:
    if not isinstance(shape, list) or not shape:
        return ""
    if isinstance(shape[0], list):
        return f"[{', '.join(filter(None, map(_shape, shape)))}]"
    return "×".join(map(str, shape))
