"""Measurement of a component by its candidates: all interleaved in one process, or each in a process of its own, which runs
this module."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from wanlab import measure, models
from wanlab.configuration.component import (
    GIB,
    Candidate,
    Files,
    Opened,
    check_effect,
    component_files,
    needs_model,
    open_candidate,
)
from wanlab.configuration.configuration import load_configuration
from wanlab.core.errors import WanlabError
from wanlab.diagnose import operators
from wanlab.diagnose.operators import call_kernels, count_operations, kernel_table
from wanlab.engines.onnxruntime import node_times
from wanlab.engines.parity import differences
from wanlab.export.components import component_spec, default_shape
from wanlab.measure.in_turn import Ended
from wanlab.measure.memory import in_own_process
from wanlab.measure.timing import AAControl, Samples, control_of
from wanlab.models.device import synchronise
from wanlab.models.networks import skeleton
from wanlab.models.pipeline import Model
from wanlab.precision.plan import KEEP, is_float
from wanlab.precision.selection.costs import product_times

MODULE = "wanlab.configuration.component_process"
ONE, EACH = "one", "each"
PACE_PERCENT = 5.0
"""Limit of the device's change of speed since the baseline, in percent; beyond it a candidate is not compared."""
KERNELS_KEPT, NAME_LENGTH = 60, 160
"""Limits of each candidate's table; names of templates have thousands of characters."""
NODE_KINDS = {
    operators.ATTENTION: re.compile(r"Attention"),
    operators.LINEAR: re.compile(r"MatMul|Gemm|Conv(?!ert)"),
    operators.POINTWISE: re.compile(r""),
}
"""Kind of a node of an ONNX graph -> pattern of its operator."""


class Job:
    """Description of a measurement, from JSON values, for every process that takes part in it."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = dict(order)
        self.component: str = order["component"]
        self.size: dict[str, int] = order["size"]
        self.rounds: int = order["rounds"]
        self.scratch = Path(order["scratch"])
        self.device = torch.device(order["load"]["device"])
        self.candidates = [
            Candidate(each["label"], load_configuration(each["path"]), each["cuda_graph"])
            for each in order["candidates"]
        ]
        torch.set_num_threads(order["threads"])

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def load(self) -> Model:
        return models.load(self.order["model"], components=[self.component], **self.order["load"])

    def tensor(self, name: str, value: Any = None) -> Any:
        """Read a tensor or tensors from the folder that the processes share; with a value write it."""
        path = self.scratch / f"{name}.pt"
        if value is None:
            return torch.load(path, weights_only=True) if path.is_file() else None
        torch.save(value, path)
        return value

    def used_gib(self) -> float:
        """Memory in use in GiB: of the whole GPU, or this process's resident set."""
        if not self.on_gpu:
            return psutil.Process().memory_info().rss / GIB
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / GIB


def fit_together(job: Job, count: int) -> bool:
    """Whether all candidates are likely to fit in memory at once, by the size of the weights."""
    spec = models.get(job.order["model"])
    part = spec.part(spec.part_of(job.component))
    network = skeleton(part, getattr(torch, job.order["load"]["dtype"]))
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    free = torch.cuda.mem_get_info(job.device)[0] if job.on_gpu else psutil.virtual_memory().available
    return 2 * weights * (count + 2) < free


# ---- shared by all candidates


def prepare(job: Job, model: Model) -> dict[str, Any]:
    """Operations, products, ceilings and files, as JSON values; inputs and outputs to compare with go to the folder."""
    spec = component_spec(model, job.component)
    shape = default_shape(model, batch=1, **job.size)
    generator = torch.Generator().manual_seed(job.order["seed"])
    inputs = spec.inputs_for(shape, generator)
    job.tensor("inputs", {name: t.cpu() for name, t in zip(spec.inputs, inputs, strict=True)})
    with torch.no_grad(), _Watched(spec.network) as watched:
        operations, output = count_operations(partial(spec.reference, *inputs))
    job.tensor("reference", output.cpu())
    moved = sum(t.nbytes for t in (*inputs, output))
    del output
    if job.order["float32"] and model.dtype != torch.float32 and _float32_fits(job, spec.network):
        _float32_output(job, model, spec, inputs)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in spec.network.parameters()}
    formats = dict.fromkeys(
        name for each in job.candidates if each.plan is not None for name in _formats(each)
    )
    products = product_times(watched.linear, list(formats)) if formats and job.on_gpu else pd.DataFrame()
    ranges = (
        {} if job.order["dynamic_ranges"] else {name: float(value) for name, value in watched.amax.items()}
    )
    del inputs
    _free(job)
    files = component_files(
        model,
        job.component,
        job.candidates,
        job.order["folder"],
        size=job.size,
        ranges=ranges,
        seed=job.order["seed"],
        progress=job.order["progress"],
    )
    return {
        "operations": asdict(operations),
        "moved_bytes": moved + sum(weights.values()),
        "products": products.to_dict("records"),
        "ceilings": asdict(measure.ceilings(job.device)),
        "files": asdict(files),
        "left_out": files.left_out,
        "notes": list(model.notes),
    }


def _formats(candidate: Candidate) -> list[str]:
    return [rule.format for rule in candidate.plan.rules if not is_float(rule.format) and rule.format != KEEP]


class _Watched:
    """Inside the block every layer's input is recorded: its number of rows, and its largest magnitude."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.linear: dict[str, tuple[int, torch.nn.Linear]] = {}
        self.amax: dict[str, torch.Tensor] = {}

    def __enter__(self) -> _Watched:
        self.stack = ExitStack()
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        for name, module in self.network.named_modules():
            if isinstance(module, kinds):
                handle = module.register_forward_pre_hook(
                    lambda m, args, name=name: self._note(name, m, args[0])
                )
                self.stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _note(self, name: str, module: torch.nn.Module, values: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            self.linear[name] = (values.numel() // values.shape[-1], module)
        self.amax[name] = torch.maximum(values.abs().amax(), self.amax.get(name, values.new_zeros(())))


def _float32_fits(job: Job, network: torch.nn.Module) -> bool:
    """Whether a copy in float32 fits beside the network, with the same again for what a call adds."""
    copied = 4 * sum(parameter.numel() for parameter in network.parameters())
    free = torch.cuda.mem_get_info(job.device)[0] if job.on_gpu else psutil.virtual_memory().available
    return 2 * copied < free


def _float32_output(job: Job, model: Model, spec: Any, inputs: Sequence[torch.Tensor]) -> None:
    """The component in float32 on the same weights and inputs; left out where memory does not suffice."""
    try:
        network = torch.nn.Module.to(copy.deepcopy(spec.network), torch.float32)
        exact = component_spec(model, job.component, network=network)
        given = [t.float() if t.is_floating_point() else t for t in inputs]
        with torch.no_grad():
            job.tensor("float32", exact.reference(*given).cpu())
    except torch.cuda.OutOfMemoryError:
        (job.scratch / "float32.pt").unlink(missing_ok=True)


def _free(job: Job) -> None:
    gc.collect()
    if job.on_gpu:
        torch.cuda.empty_cache()


# ---- one candidate


def _measure(job: Job, opened: Opened, before_gib: float | None) -> tuple[Callable[[], None], dict[str, Any]]:
    """The call of a candidate over fixed memory, and the facts of its first calls.

    Args:
        before_gib: memory in use before it was opened; None where its own share is not known.
    """
    engine, inputs = opened.engine, job.tensor("inputs")
    feeds = {
        name: inputs[name].to(engine.device, getattr(torch, dtype)).contiguous()
        for name, (dtype, _) in engine.inputs.items()
    }
    counters = torch._dynamo.utils.counters["stats"]
    graphs = counters["unique_graphs"]
    _free(job)
    with measure.peak_memory(job.device) as first:
        begin = time.perf_counter()
        with opened.at(), torch.no_grad():
            outputs = engine.run(feeds)
        synchronise(job.device)
        first_call_ms = (time.perf_counter() - begin) * 1e3
    expected = {name: tensor.to("cpu", copy=True) for name, tensor in outputs.items()}
    with opened.at():
        bound = engine.bind(feeds, outputs, cuda_graph=opened.candidate.cuda_graph)
    for tensor in outputs.values():
        tensor.zero_()  # so that what is not written is seen

    def call() -> None:
        with opened.at():
            bound()

    call()
    synchronise(job.device)
    measure.check_bound(opened.label, expected, outputs)
    effect, proof = check_effect(opened, counters["unique_graphs"] - graphs)
    weights_gib, forward_gib, peak_gib = opened.weight_bytes / GIB, None, None
    if (
        job.on_gpu and engine.path is None
    ):  # PyTorch's own allocator is exact, and the first call also compiles
        _free(job)
        before_call_gib = torch.cuda.memory_allocated(job.device) / GIB
        with measure.peak_memory(job.device) as memory:
            call()
        forward_gib = memory.allocated_gib - before_call_gib
        peak_gib = weights_gib + forward_gib
    elif before_gib is not None:  # an engine keeps the memory of its first call
        forward_gib = first.increase_gib
        peak_gib = first.peak_gib - before_gib
    output = next(iter(outputs.values()))
    facts = {
        "engine": opened.candidate.kind(job.component).name,
        "plan": opened.plan,
        "configuration": opened.candidate.configuration.name,
        "cuda_graph": opened.candidate.cuda_graph,
        "effect": effect,
        "proof": proof,
        "kernels": opened.kernels,
        "load_ms": opened.load_ms,
        "build_ms": engine.build_ms,
        "first_call_ms": first_call_ms,
        "size_bytes": engine.size_bytes,
        "weights_gib": weights_gib,
        "forward_gib": forward_gib,
        "peak_memory_gib": peak_gib,
        "formats": opened.formats,
    }
    facts |= _distances(job, output)
    return call, facts


def _distances(job: Job, output: torch.Tensor) -> dict[str, float]:
    """Distances to eager in the component's dtype, and to eager in float32 where that was computed."""
    distances: dict[str, float] = {}
    for name, prefix in (("reference", ""), ("float32", "float32_")):
        expected = job.tensor(name)
        if expected is not None:
            distance = differences(expected, output.to(torch.float32))
            distances |= {f"{prefix}{key}": distance[key] for key in ("relative_l2", "cosine", "psnr_db")}
    return distances


def _kernels(job: Job, opened: Opened, call: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernels on a GPU, operators on the CPU, profiled after timing; empty for engines that report neither."""
    engine = opened.engine
    if job.on_gpu or engine.path is None:
        with torch.no_grad():
            table = call_kernels(call, job.device)
    elif hasattr(engine, "profile"):
        nodes = node_times(engine.profile(job.tensor("inputs"), job.scratch / "profile.json"))
        by = nodes.groupby("operator", as_index=False).agg(calls=("node", "size"), time_ms=("time_ms", "sum"))
        table = kernel_table(by.rename(columns={"operator": "name"}), _kind_of_node)
    else:
        return []
    others = table[KERNELS_KEPT:]
    table = table.head(KERNELS_KEPT).assign(name=lambda rows: rows["name"].str[:NAME_LENGTH])
    rows = table.to_dict("records")
    for kind, part in others.groupby("kind"):  # so that the kinds add up
        sums = part[["calls", "time_ms", "share_percent"]].sum().to_dict()
        rows.append({"name": f"{len(part)} others", "kind": kind} | sums)
    return rows


def _kind_of_node(name: str) -> str | None:
    return next(kind for kind, pattern in NODE_KINDS.items() if pattern.search(name))


# ---- all interleaved in this process, or each in its own

Outcome = tuple[list[dict[str, Any]], dict[str, Samples], AAControl | None, Ended | None, dict[str, Any]]


def interleaved(job: Job) -> Outcome:
    """Measure all candidates interleaved, in this process."""
    model = job.load()
    prepared = prepare(job, model)
    files = Files(**prepared["files"])
    calls: dict[str, Callable[[], None]] = {}
    opened: dict[str, Opened] = {}
    rows: list[dict[str, Any]] = []
    alone = (
        {} if job.on_gpu else _alone(job, prepared)
    )  # the parts of one process's resident set cannot be told apart
    for candidate in job.candidates:
        if candidate.label in prepared["left_out"]:
            continue
        _free(job)
        before_gib = job.used_gib() if job.on_gpu else None
        try:
            for each in open_candidate(model, job.component, candidate, files, job.device):
                call, facts = _measure(job, each, before_gib)
                facts |= alone.get(each.label, {})
                calls[each.label], opened[each.label] = call, each
                facts["prepare_ms"] = files.prepare_ms[candidate.label]
                rows.append({"label": each.label, "processes": ONE} | facts)
        except (WanlabError, torch.cuda.OutOfMemoryError) as error:
            prepared["left_out"][candidate.label] = _reason(error)
    if not calls:
        return [], {}, None, None, prepared
    with torch.no_grad():
        timed = measure.until_told(
            calls, rounds=job.rounds, device=job.device, progress=job.order["progress"], **job.order["until"]
        )
    for row in rows:
        row["kernel_rows"] = _kernels(job, opened[row["label"]], calls[row["label"]])
    return rows, timed.samples, next(iter(timed.controls.values())), timed.ended, prepared


ALONE = ("load_ms", "weights_gib", "forward_gib", "peak_memory_gib")


def _alone(job: Job, prepared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Label -> memory and load time, from a process that holds this candidate alone."""
    by_label: dict[str, dict[str, Any]] = {}
    for index, candidate in enumerate(job.candidates):
        if candidate.label not in prepared["left_out"]:
            try:
                rows = _child(job, prepared, index, rounds=0)["rows"]
            except WanlabError as error:
                prepared["left_out"][candidate.label] = _reason(error)
                continue
            by_label |= {row["label"]: {name: row[name] for name in ALONE} for row in rows}
    return by_label


def in_processes(job: Job) -> Outcome:
    """Measure the candidates one after the other, each in a process of its own, and the baseline again at the end."""
    prepared: dict[str, Any] = in_own_process(MODULE, job.order, f"the inputs of {job.component}")
    rows: list[dict[str, Any]] = []
    order = [*range(len(job.candidates)), 0]  # the baseline once more, at the end
    for index in order:
        candidate = job.candidates[index]
        if candidate.label in prepared["left_out"]:
            continue
        try:
            child_rows = _child(job, prepared, index, rounds=job.rounds)["rows"]
        except WanlabError as error:
            prepared["left_out"][candidate.label] = _reason(error)
            continue
        rows += [row | {"prepare_ms": prepared["files"]["prepare_ms"][candidate.label]} for row in child_rows]
    if not rows:
        return [], {}, None, None, prepared
    samples: dict[str, Samples] = {}
    again = None
    for row in rows:
        samples_of_row = Samples.from_dict(row.pop("samples"))
        if row["label"] in samples:
            again = samples_of_row
        else:
            samples[row["label"]] = samples_of_row
    first = next(iter(samples.values()))
    control = (
        AAControl(first, first, 1.0, rows[0]["noise_percent"]) if again is None else control_of(first, again)
    )
    kept = {row["label"]: row for row in reversed(rows)}
    ordered = [kept[label] for label in samples]
    for row in ordered:
        change = 100 * (row["pace_ms"] / ordered[0]["pace_ms"] - 1)
        if abs(change) > PACE_PERCENT:
            row["not_compared"] = f"a fixed product took {change:+.0f} % longer than with {first.label}"
    ended = Ended("rounds", 2 * job.rounds, sum(sum(each.values_ms) for each in samples.values()) / 1e3)
    return ordered, samples, control, ended, prepared


def _reason(error: Exception) -> str:
    """Reason of a failure in one line; of another process that process's reason."""
    return str(error).splitlines()[0].rpartition("WanlabError: ")[2]


def _child(job: Job, prepared: Mapping[str, Any], index: int, *, rounds: int) -> dict[str, Any]:
    order = job.order | {"only": index, "files": prepared["files"], "rounds": rounds, "progress": False}
    return in_own_process(MODULE, order, job.candidates[index].label)


def _measure_only(job: Job) -> dict[str, Any]:
    """One candidate, in a process that holds nothing else."""
    candidate, files = job.candidates[job.order["only"]], Files(**job.order["files"])
    if job.on_gpu:
        synchronise(job.device)  # the driver takes its own memory before the measurement
    before_gib = job.used_gib()
    model = job.load() if needs_model(job.component, candidate, files) else None
    rows = []
    for opened in open_candidate(model, job.component, candidate, files, job.device):
        call, facts = _measure(job, opened, before_gib)
        row = {"label": opened.label, "processes": EACH} | facts
        if job.rounds:
            with torch.no_grad():
                control = measure.aa_control(
                    call,
                    warmup=1,
                    iterations=job.rounds,
                    device=job.device,
                    progress=False,
                    label=opened.label,
                )
            row["pace_ms"] = _pace_ms(job)  # at once, while the GPU is as warm as in the measurement
            values_ms = (*control.first.values_ms, *control.second.values_ms)
            first = control.first
            samples = Samples(opened.label, values_ms, first.device, first.clock, first.load)
            row |= {"samples": samples.to_dict(), "noise_percent": control.noise_percent}
            row["kernel_rows"] = _kernels(job, opened, call)
        rows.append(row)
    return {"rows": rows}


def _pace_ms(job: Job) -> float:
    """Median time in ms of one large product, always the same, once the clocks are stable: the speed of the device."""
    side, warmup = (8192, 200) if job.on_gpu else (256, 2)
    generator = torch.Generator(job.device).manual_seed(0)
    one = torch.randn(side, side, device=job.device, dtype=torch.bfloat16, generator=generator)
    return measure.time_ms(
        lambda: one @ one, warmup=warmup, iterations=50, device=job.device, progress=False
    ).median


if __name__ == "__main__":
    job = Job(json.load(sys.stdin))
    answer = _measure_only(job) if "only" in job.order else prepare(job, job.load())
    print(json.dumps(answer))
