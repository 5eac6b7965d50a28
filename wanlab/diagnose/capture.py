"""Captures a profile of one generation as a Chrome trace: named ranges, one step per denoising step, limited size."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, tensorboard_trace_handler

from wanlab.core.errors import WanlabError
from wanlab.core.packed import as_utf8, read_unpacked
from wanlab.diagnose.trace import NOTHING, SUFFIX, read_trace
from wanlab.diagnose.trace_events import (
    HOST_CATEGORIES,
    KERNEL_CATEGORIES,
    RUNTIME_CATEGORIES,
    meaning,
    plausible,
)
from wanlab.diagnose.trace_file import as_float, begins_and_ends, repair
from wanlab.measure.load import metered
from wanlab.models.families.base import SEQUENTIAL
from wanlab.models.pipeline import Model
from wanlab.models.taps import component_calls, intercept_calls

DEEPEST = 3
"""Depth of modules below a block that get a range: `blocks.0.ffn.net.0` has depth three."""

_VAE_HALVES = {
    "encoder": "vae_encoder",
    "quant_conv": "vae_encoder.quant_conv",
    "decoder": "vae_decoder",
    "post_quant_conv": "vae_decoder.post_quant_conv",
}
_BLOCK = re.compile(r"^\w*blocks\.\d+")


@contextmanager
def ranges(model: Model, *, projections: bool = True) -> Iterator[list[str]]:
    """Inside the block every profile has named ranges for the parts of a model.

    Every component gets a range, whatever engine runs it; modules inside it get one if the component is a PyTorch module.

    Args:
        model: from `wanlab.models.load`.
        projections: also name the modules inside the blocks: attentions, linear layers, norms.

    Yields:
        The names of the ranges.
    """
    hooks = _Hooks(_named_modules(model.pipeline, projections))
    points = component_calls(model.pipeline)
    wrapped = {
        attribute: {method: _ranged(component, hooks) for method, component in methods.items()}
        for attribute, methods in points.items()
    }
    components = [component for methods in points.values() for component in methods.values()]
    try:
        with intercept_calls(model.pipeline, wrapped):
            yield [*components, *hooks.modules]
    finally:
        hooks.remove()


def _named_modules(pipeline, projections: bool) -> dict[str, torch.nn.Module]:
    """Range -> module, inside the components that are PyTorch modules."""
    modules = {}
    for attribute, methods in component_calls(pipeline).items():
        network = vars(pipeline)[attribute]
        if isinstance(network, torch.nn.Module):
            for path, module in _reachable(network):
                name = _name(methods.get("__call__"), path)
                if name and _wanted(path, projections):
                    modules[name] = module
    return modules


def _reachable(network: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules by path, without compiled ones and their contents: a hook there would be compiled too."""
    if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
        return
    yield path, network
    for name, module in network.named_children():
        yield from _reachable(module, f"{path}.{name}" if path else name)


def _name(component: str | None, path: str) -> str | None:
    """Range of a module inside a component; None for the component itself, whose call is the range."""
    if not path:
        return None
    if component is not None:
        return f"{component}.{path}"
    head, _, rest = path.partition(".")
    half = _VAE_HALVES.get(head)
    return f"{half}.{rest}" if half and rest else half if half and "." in half else None


def _wanted(path: str, projections: bool) -> bool:
    path = path.removeprefix("encoder.").removeprefix("decoder.")
    block = _BLOCK.match(path)
    if block is None:
        return "." not in path
    inside = path[block.end() :].count(".")
    return inside == 0 or (projections and inside <= DEEPEST)


class _Hooks:
    """Hooks of many modules, which can be added and removed."""

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        self.modules = modules
        self._handles: list = []

    def put(self) -> None:
        if not self._handles:
            self._handles = [
                handle for name, module in self.modules.items() for handle in _hook(module, name)
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _ranged(component: str, hooks: _Hooks) -> Callable:
    def wrap(call: Callable) -> Callable:
        profiled = torch.autograd._profiler_enabled

        def ranged(*args, **kwargs):
            if not profiled():
                hooks.remove()
                return call(*args, **kwargs)
            hooks.put()
            with torch.profiler.record_function(component):
                return call(*args, **kwargs)

        return ranged

    return wrap


def _hook(module: torch.nn.Module, name: str) -> list:
    """Add a range around a module's forward."""
    opened: list = []

    def enter(*_) -> None:
        opened.append(torch.profiler.record_function(name).__enter__())

    def leave(*_) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    # always_call: the range is closed also when the forward raises.
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


_KEPT_ARGS = {
    "cpu_op": ("Input Dims", "Input type"),
    "kernel": ("correlation", "stream", "device"),
    "gpu_memcpy": ("correlation", "stream", "device", "bytes"),
    "gpu_memset": ("correlation", "stream", "device", "bytes"),
    "cuda_runtime": ("correlation",),
    "cuda_driver": ("correlation",),
    "cpu_instant_event": ("Total Reserved", "Total Allocated", "Bytes", "Device Id", "Device Type", "Addr"),
}


def trim(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    shortest_us: float = 20.0,
    smallest_bytes: int = 1 << 20,
) -> Path:
    """Write a smaller trace with the same kernels, launches, ranges, steps and times.

    It leaves out host events that launched nothing and took less than `shortest_us` (their time becomes own time of the
    enclosing event), allocations below `smallest_bytes` (the totals of the other allocations still count them), flow arrows,
    GPU annotations, the profiler's own overhead, and arguments that wanlab does not read.

    Args:
        source, target: files with suffix `.json` or `.json.gz`.

    Raises:
        WanlabError: as for `read_trace`.
    """
    path = read_trace(source).path  # refuses what is no trace
    text = as_utf8(read_unpacked(path))
    is_array = text.lstrip()[:1] == b"["
    try:
        content = json.loads(text)
    except ValueError:
        content = json.loads(repair(text, is_array))
    events = _sound(content if is_array else content["traceEvents"])
    origin = min(event["ts"] for event in events if event["ph"] == "X")
    slim_events = [_slim(event, origin) for event in _kept(events, shortest_us, smallest_bytes)]
    content = {} if is_array else content
    content = {key: value for key, value in content.items() if key not in ("traceEvents", "traceName")}
    content["trimmed"] = {"shortest_us": shortest_us, "smallest_bytes": smallest_bytes}
    small = json.dumps(content | {"traceEvents": slim_events}, separators=(",", ":")).encode()
    target = Path(target)
    # Without a time stamp, so that the same trace gives the same file.
    target.write_bytes(gzip.compress(small, 9, mtime=0) if target.suffix == ".gz" else small)
    return target


def _sound(events: list) -> list[dict]:
    """Events with numbers for times and the categories of Kineto today, without those whose times cannot be."""
    events = [event for event in events if isinstance(event, dict) and isinstance(event.get("ph"), str)]
    marks = [(e["ph"], (str(e.get("pid")), str(e.get("tid"))), as_float(e.get("ts"))) for e in events]
    for begin, end in begins_and_ends(marks):
        events[begin]["ph"] = "X"
        if end is not None:
            events[begin]["dur"] = marks[end][2] - marks[begin][2]
            events[begin]["args"] = events[begin].get("args") or events[end].get("args")
    for event in events:
        event["name"] = str(event.get("name", ""))
        label = str(event.get("cat") or (event.get("pid") if event["ph"] == "X" else "") or "")
        event["cat"] = meaning(label, event["name"]) or label
        event["args"] = event["args"] if isinstance(event.get("args"), dict) else {}
        if not isinstance(event["args"].get("correlation"), int | float | str | None):
            del event["args"]["correlation"]
        event |= {key: as_float(event[key]) for key in ("ts", "dur") if key in event}
    complete = [event for event in events if event["ph"] == "X"]
    times = (np.array([event.get(key, np.nan) for event in complete], dtype=float) for key in ("ts", "dur"))
    sound, _ = plausible(*times)
    left_out = {id(event) for event, good in zip(complete, sound.tolist(), strict=True) if not good}
    return [event for event in events if id(event) not in left_out]


def _kept(events: list[dict], shortest_us: float, smallest_bytes: int) -> list[dict]:
    launched = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in KERNEL_CATEGORIES and "correlation" in event.get("args", {})
    }
    needed = _needed(events, launched, shortest_us)
    kept_events = []
    for i, event in enumerate(events):
        phase, category = event.get("ph"), event.get("cat")
        if phase == "X" and category in HOST_CATEGORIES:
            keep = i in needed
        elif event.get("name") == "[memory]":
            keep = abs(as_float(event["args"].get("Bytes"))) >= smallest_bytes
        else:
            keep = phase == "M" or category in KERNEL_CATEGORIES
        if keep:
            kept_events.append(event)
    return kept_events


def _needed(events: list[dict], launched: set, shortest_us: float) -> set[int]:
    """Positions of the host events that are long, are ranges, or enclose a launch."""
    host = [i for i, e in enumerate(events) if e.get("ph") == "X" and e.get("cat") in HOST_CATEGORIES]
    host.sort(
        key=lambda i: (
            str(events[i].get("pid")), str(events[i].get("tid")), events[i]["ts"], -events[i]["dur"]
        )
    )  # fmt: skip
    needed: set[int] = set()
    stack: list[int] = []
    thread: Any = NOTHING
    for i in host:
        event = events[i]
        if (event.get("pid"), event.get("tid")) != thread:
            thread = (event.get("pid"), event.get("tid"))
            stack.clear()
        while stack and events[stack[-1]]["ts"] + events[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        stack.append(i)
        launches = event["cat"] in RUNTIME_CATEGORIES and event.get("args", {}).get("correlation") in launched
        if launches or event["cat"] == "user_annotation" or event["dur"] >= shortest_us:
            needed.update(stack)
    return needed


def _slim(event: dict, origin: float) -> dict:
    event = {key: value for key, value in event.items() if key not in ("id", "s", "bp")}
    if "ts" in event:
        event["ts"] = round(float(event["ts"]) - origin, 2)
    if "dur" in event:
        event["dur"] = round(event["dur"], 2)
    kept_names = _KEPT_ARGS.get(event.get("cat", ""))
    if "args" in event and event.get("ph") != "M":
        names = (kept_names or ()) + (("Concrete Inputs",) if "conv" in event["name"] else ())
        event["args"] = {key: event["args"][key] for key in names if key in event["args"]}
    return event


MOST_EVENTS = 2_000_000
"""About 35 MB compressed, 10 s to read, and the largest that Perfetto opens without problems."""
EVENTS_PER_CALL = {"cpu": 23, "cuda": 33}
"""Events per call of a leaf module, counted in traces of Wan models: operators, ranges, on a GPU launches and kernels."""
MEMORY_FACTOR, PYTHON_FACTOR = 1.5, 6.0


def capture(
    model: Model,
    image: Any,
    prompt: str,
    folder: str | os.PathLike,
    *,
    projections: bool = True,
    shapes: bool = True,
    memory: bool = False,
    python: bool = False,
    most_events: int = MOST_EVENTS,
    **settings,
) -> Path:
    """Generate once under the profiler and write its trace; times in it must not be reported as latency.

    Profiler step 0 includes everything up to the end of the first denoising step, the last one everything after the
    last denoising step. The profiler needs about 1 KiB of host memory per event until the trace is written.

    Args:
        image, prompt, settings: arguments of `Model.generate`. If all steps do not fit into `most_events`, fewer
            are run: all steps of an expert cost the same. The notes of the trace say so.
        folder: folder of the new file `<host>_<process>.<time>.pt.trace.json.gz`, for TensorBoard, Perfetto and HTA.
        projections: as in `ranges`.
        shapes: record the operators' input shapes.
        memory: record allocations.
        python: record the Python stack; the file becomes several times larger.
        most_events: approximate limit of recorded events.

    Returns:
        The trace file.

    Raises:
        WanlabError: as for `Model.generate`, another profiler is running, one step of each expert does not fit, or
            nothing was written.
    """
    if torch.autograd._profiler_enabled():
        raise WanlabError("another profiler is running; leave its block before capturing a trace")
    factor = (MEMORY_FACTOR if memory else 1.0) * (PYTHON_FACTOR if python else 1.0)
    settings["steps"], asked_steps = _steps(model, settings, factor, most_events)
    folder = Path(folder)
    before = set(folder.glob(f"*{SUFFIX}"))
    activities = [ProfilerActivity.CPU]
    if torch.device(model.device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        metered(model.device),
        ranges(model, projections=projections),
        profile(
            activities=activities,
            schedule=lambda step: ProfilerAction.RECORD,
            on_trace_ready=tensorboard_trace_handler(str(folder), use_gzip=True),
            record_shapes=shapes,
            profile_memory=memory,
            with_stack=python,
        ) as profiler,
        _after_each_step(model.pipeline, profiler.step),
    ):
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            # HTA reads the rank from this entry, which PyTorch writes only in a run of several processes.
            profiler.add_metadata_json(
                "distributedInfo", json.dumps({"backend": "none", "rank": 0, "world_size": 1})
            )
        generation = model.generate(image, prompt, **settings)
        profiler.add_metadata_json(
            "wanlab", json.dumps(_about(model, generation.settings, generation.wall_ms, asked_steps))
        )
    written = sorted(set(folder.glob(f"*{SUFFIX}")) - before)
    if not written:
        raise WanlabError(f"the profiler wrote nothing to {folder}; is there room and may it be written to?")
    return written[-1]


def expected_events(model: Model, *, steps: int, frames: int | None = None, guidance: bool = True) -> int:
    """Approximate number of events in a trace of one generation, without allocations and the Python stack.

    A call of a leaf module has about `EVENTS_PER_CALL`; the causal VAE runs once per latent frame, an expert once per
    step and branch.
    """
    spec = model.spec
    latent_frames = ((frames or spec.defaults.frames) - 1) // spec.temporal_factor + 1
    branches = 2 if guidance else 1
    forwards = branches if model.family.guidance == SEQUENTIAL else 1
    calls = 0
    for name, module in model.components.items():
        half = {"vae_encoder": "encoder", "vae_decoder": "decoder"}.get(name)
        leaves = _leaves(getattr(module, half, module) if half else module)
        if name.startswith("expert"):
            calls += leaves * forwards * sum(row == name for row in model.schedule(steps)["component"])
        else:
            calls += leaves * (latent_frames if half else branches)
    device = "cuda" if str(model.device).startswith("cuda") else "cpu"
    return calls * EVENTS_PER_CALL[device]


def _leaves(module: Any) -> int:
    if not isinstance(module, torch.nn.Module):
        return 0  # an engine is one call
    return sum(1 for part in module.modules() if next(part.children(), None) is None)


def _steps(model: Model, settings: dict, factor: float, most: int) -> tuple[int, int]:
    """The number of steps to run, limited by the number of events, and the number that was requested."""
    scale = settings.get("guidance_scale")
    guidance = (model.spec.defaults.guidance_scale if scale is None else scale) > 1
    requested = settings.get("steps")
    requested = model.spec.defaults.steps if requested is None else requested

    def events(steps: int) -> float:
        return factor * expected_events(model, steps=steps, frames=settings.get("frames"), guidance=guidance)

    if not isinstance(requested, int) or requested < 1 or events(requested) <= most:
        return requested, requested  # `generate` refuses a number of steps that is not legal
    experts = {name for name in model.components if name.startswith("expert")}
    for steps in range(requested - 1, model.family.fewest_steps - 1, -1):
        if events(steps) <= most and set(model.schedule(steps)["component"]) == experts:
            return steps, requested
    raise WanlabError(
        f"a trace of one step of each expert would have more than most_events={most:,} events: "
        "take fewer frames, leave out memory and python, or raise most_events"
    )


def _about(model: Model, settings: dict, wall_ms: float, asked_steps: int) -> dict[str, Any]:
    """Description of the generation that is stored in the trace."""
    modules: dict[str, torch.nn.Module] = {
        model.spec.part_of(name): part for name, part in model.components.items()
    }
    return {
        "model": model.spec.name,
        "engines": model.engines,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": {key: value for key, value in settings.items() if not isinstance(value, str)},
        "asked_steps": asked_steps,
        "wall_ms": wall_ms,
        "joint_attention": model.family.text_first is not None,
        "weights_bytes": {
            name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in modules.items()
            if hasattr(part, "parameters")
        },
    }


def _after_each_step(pipeline, note: Callable[[], None]):
    """A context in which `note` is called after every step of the pipeline's scheduler, if it has one."""

    def wrap(call: Callable) -> Callable:
        def step(*args, **kwargs):
            result = call(*args, **kwargs)
            note()
            return result

        return step

    if vars(pipeline).get("scheduler") is None:
        return nullcontext()
    return intercept_calls(pipeline, {"scheduler": {"step": wrap}})
