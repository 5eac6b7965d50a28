"""Cost of one component by each candidate: time, memory, kernels, bounds, distance to eager, effect check.

All candidates are timed interleaved in one process where they fit in memory together, else each in a process of its own, the
baseline once more at the end.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from wanlab import models
from wanlab.configuration.component import Candidate, component_candidates
from wanlab.configuration.component_process import EACH, Job, fit_together, in_processes, interleaved
from wanlab.configuration.configuration import configurations, save_configuration
from wanlab.core.answer import IDLE, Answer, Step, Tile, answer, step
from wanlab.core.effects import NOT_APPLIED
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.words import apart_text, capital, component_text, shown
from wanlab.diagnose import operators
from wanlab.diagnose.operators import COLUMNS as KERNEL_COLUMNS
from wanlab.diagnose.operators import Operations
from wanlab.engines.component_bench import RangeCost, range_cost
from wanlab.engines.registry import ENGINES, engine_text
from wanlab.measure.ceilings import Ceilings
from wanlab.measure.in_turn import Ended, compared, timed_text
from wanlab.measure.timing import AAControl, Comparison, Samples
from wanlab.models.loading import resolve
from wanlab.precision.plan import PRESETS
from wanlab.precision.selection.bound import product_bound
from wanlab.precision.selection.select import PlansByTime, plans_by_time

SHORT_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, eq=False)
class ComponentCost:
    """Measurements of a component by several candidates, of which the first is the baseline.

    Attributes:
        model, component, dtype, device: names of what was measured. size: height, width and frames of the clip.
        processes: `"one"` or `"each"`, see `measure_component`.
        samples: label -> all times of a call. control: A/A control: the baseline measured twice.
        ended: how often they were timed and what ended that.
        facts: label -> facts beside the times: engine, plan, configuration, cuda_graph, effect, proof, kernels,
            load_ms, prepare_ms, build_ms, first_call_ms, size_bytes, weights_gib, forward_gib (what one call adds to the
            memory), peak_memory_gib (both), relative_l2, cosine and psnr_db to eager in the baseline's dtype,
            float32_relative_l2, float32_cosine and float32_psnr_db to eager in float32 (None where it does not fit),
            linear_share_percent (of the time in kernels), product_kernel, roofline_ms, of_roofline_percent,
            bound_speedup (Amdahl's, over the baseline), planned_percent, product_speedup, not_compared.
        kernels: longest first: candidate, name, kind, calls, time_ms, share_percent. From a profile after timing.
        products: linear layers timed alone, from `precision.selection.costs.product_times`.
        operations: operations of one call. ceilings: ceilings of the device.
        left_out: label -> reason in one line why it was not measured.
        selected: plans that were selected by time, ranges: cost of the profiler's ranges; None where not measured.
        notes: what was read from the model's files in another form than its network has it.
        lora: LoRAs of the component, see `ModelSpec.lora_identity`.
    """

    model: str
    component: str
    dtype: str
    device: str
    size: dict[str, int]
    processes: str
    samples: dict[str, Samples]
    control: AAControl
    ended: Ended
    facts: dict[str, dict[str, Any]]
    kernels: pd.DataFrame
    products: pd.DataFrame
    operations: Operations
    ceilings: Ceilings
    left_out: dict[str, str] = field(default_factory=dict)
    selected: PlansByTime | None = None
    ranges: RangeCost | None = None
    notes: tuple[str, ...] = ()
    lora: str | None = None

    @property
    def baseline(self) -> str:
        return next(iter(self.samples))

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Label -> comparison with the baseline, of those that may be compared."""
        base = self.samples[self.baseline]
        return {
            label: compared(base, samples, self._noise_percent(label), self.ended)
            for label, samples in self.samples.items()
            if label != self.baseline and not self.facts[label].get("not_compared")
        }

    def _noise_percent(self, label: str) -> float:
        """Noise of a comparison in percent; in processes of their own each candidate has a noise of its own."""
        own = (self.facts[name].get("noise_percent") or 0.0 for name in (label, self.baseline))
        return max(self.control.noise_percent, *own)

    @property
    def table(self) -> pd.DataFrame:
        """A row per candidate: its time, the ratio to the baseline with its interval and verdict, and the facts."""
        gains, rows = self.comparisons, []
        for label, samples in self.samples.items():
            row = {"candidate": label, "time_ms": samples.median, "cv_percent": samples.cv_percent}
            gain = gains.get(label)
            row |= {
                "noise_percent": self._noise_percent(label),
                "speedup": 1.0 if gain is None else gain.speedup,
            }
            row |= {"low": gain.low, "high": gain.high} if gain else {}
            facts = {name: value for name, value in self.facts[label].items() if name not in row}
            verdict = "baseline" if label == self.baseline else facts.get("not_compared") or gain.verdict
            if label != self.baseline and gain is None:
                row["speedup"] = math.nan
            rows.append(row | {"verdict": verdict} | facts)
        return pd.DataFrame(rows)

    @property
    def kinds(self) -> pd.DataFrame:
        """Time in kernels by kind: candidate, kind, time_ms, share_percent."""
        by = self.kernels.groupby(["candidate", "kind"], sort=False, as_index=False)
        return by[["time_ms", "share_percent"]].sum()

    def result_facts(self) -> dict[str, dict[str, Any]]:
        """Label -> fields of a `wanlab.runs.Result`, as `runs.call_results` takes them."""
        named = ("engine", "plan", "effect", "kernels", "load_ms", "prepare_ms", "build_ms", "size_bytes",
                 "weights_gib", "peak_memory_gib")  # fmt: skip
        results: dict[str, dict[str, Any]] = {}
        times = self.kinds.set_index("candidate")
        gains = self.comparisons
        for label, facts in self.facts.items():
            row = {name: facts.get(name) for name in named}
            row |= {"techniques": ("CUDA graph",) if facts["cuda_graph"] else (), "dtype": self.dtype}
            row["noise_percent"] = self._noise_percent(label)
            figures = {
                name: value for name, value in facts.items() if name not in {*row, "cuda_graph", "proof"}
            }
            if label in gains:
                gain = gains[label]
                figures |= {"speedup": gain.speedup, "speedup_low": gain.low, "speedup_high": gain.high}
                figures["verdict"] = gain.verdict
            if label in times.index:
                own = times.loc[[label]]
                figures |= {
                    f"kernel_{kind}_ms": ms for kind, ms in zip(own["kind"], own["time_ms"], strict=True)
                }
            row["figures"] = {name: value for name, value in figures.items() if value is not None}
            results[label] = row
        return results

    @property
    def answer(self) -> Answer:
        """The fastest candidate beside the baseline, what it rounds, what bounds it, and what was not measured."""
        gains, base, network = self.comparisons, self.baseline, component_text(self.component)
        timed = {name: gain for name, gain in gains.items() if self.facts[name]["effect"] != NOT_APPLIED}
        best = max(timed, key=lambda name: timed[name].speedup, default=None)
        before = self.samples[base].median
        if best is None:
            took = f"{self._name(base)} takes {shown(before, 'ms')} for one call of the {network}"
            headline = f"{capital(took)}; no other candidate can be compared with it."
        else:
            headline = f"{capital(network)}: {timed[best].clause(self._name(best), self._name(base))}."
        shape = "x".join(str(self.size[name]) for name in ("frames", "height", "width"))
        wrong = [f"{label} was not applied, so its figures are not its own." for label, facts in self.facts.items()
                 if facts["effect"] == NOT_APPLIED]  # fmt: skip
        wrong += [f"{label} was not compared: {facts['not_compared']}." for label, facts in self.facts.items()
                  if facts.get("not_compared")]  # fmt: skip
        wrong += [f"{label} was not measured: {line.rstrip('.')}." for label, line in self.left_out.items()]
        details = [" ".join(wrong), f"{self.model} at {shape} in {self.dtype} on {self.device}."]
        details.append(timed_text([timed[best]]) if best else "")
        return answer(headline, *details, tiles=self._tiles(best or base), next=self._next(best or base))

    def _next(self, label: str) -> Step:
        """Whole videos with a candidate; without a command where its plan or configuration is a file of its own."""
        name, engine, plan = (self.facts[label].get(key) for key in ("configuration", "engine", "plan"))
        if (gain := self.comparisons.get(label)) and gain.direction_only:
            return IDLE._replace(notebook="42_component")
        why = "measures whole videos and their quality with it"
        if name in configurations():
            return step(why, "41_configuration", configuration=name)
        changed = plan not in (None, "default")
        if label.split()[0] not in ENGINES or (changed and plan not in PRESETS):
            return step(f"Give its file to 41_configuration, which {why}")
        return step(why, "41_configuration", engine=engine, **({"plan": plan} if changed else {}))

    def _name(self, label: str) -> str:
        """A candidate for readers: "eager ffn-int8" as "eager PyTorch with ffn-int8"."""
        engine, _, plan = label.partition(" ")
        return f"{engine_text(engine)} with {plan}" if plan else engine_text(engine)

    def _tiles(self, label: str) -> tuple[Tile, ...]:
        """The key figures of one candidate, each beside the baseline's."""
        facts, base, gain = self.facts[label], self.facts[self.baseline], self.comparisons.get(label)
        before, time_ms = self.samples[self.baseline].median, self.samples[label].median
        noise = f"noise {self._noise_percent(label):.0f} %"
        first = self._name(self.baseline)
        tiles = [
            Tile(
                "time of a call", shown(time_ms, "ms"), f"{shown(before, 'ms')} in {first}" if gain else noise
            )
        ]
        if gain:
            tiles.insert(0, gain.tile())
        if (reached := facts.get("of_roofline_percent")) is not None:
            tiles.append(Tile("of the device's bound", shown(reached, "%"), "100 % is the roofline"))
        if (memory := facts.get("peak_memory_gib")) is not None:
            before_gib = base.get("peak_memory_gib")
            known = gain is not None and before_gib is not None
            beside = f"{shown(before_gib * 2**30, 'bytes')} in {first}" if known else ""
            tiles.append(Tile("peak memory", shown(memory * 2**30, "bytes"), beside))
        if gain and (far := facts.get("relative_l2")) is not None:
            tiles.append(Tile("distance of the output", apart_text(far), f"to {first}"))
        return tuple(tiles)


def measure_component(
    model: str,
    component: str | None,
    folder: str | os.PathLike,
    *,
    engines: Sequence[str] = ("eager",),
    plans: Sequence[Any] = ("default",),
    configurations: Sequence[Any] = (),
    cuda_graphs: bool = False,
    weights: str = "pretrained",
    device: str = "auto",
    dtype: str = "auto",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    select_by_time: bool = False,
    profiler_ranges: bool = False,
    rounds: int = 5,
    precision: float | None = None,
    limit_s: float | None = None,
    processes: Literal["auto", "one", "each"] = "auto",
    dynamic_ranges: bool = False,
    float32: bool = True,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ComponentCost:
    """Measure one component of a model by every engine and plan, at one size and batch 1.

    Args:
        model: registry name or folder.
        component: wanlab's name of it; None takes the first expert. Only its network is loaded.
        folder: folder of converted networks; current files are reused.
        engines, plans, configurations, cuda_graphs: the candidates, see `component_candidates`; the first is the baseline.
        weights, device, dtype: as `models.load` takes them.
        height, width, frames: size of the clip; the model's defaults if not given.
        select_by_time: whether two plans that are selected by time are measured too, see `precision.plans_by_time`.
        profiler_ranges: whether the cost of the profiler's ranges is measured too, see `engines.range_cost`.
        rounds: number of rounds, each with two times of every candidate; with `precision` the fewest.
        precision, limit_s: in one process, go on until every ratio is known to so many percent, or time is up; see
            `measure.take_in_turn`. In processes of their own the rounds are taken.
        processes: `"one"` measures all interleaved in this process; `"each"` one after the other in processes of their own,
            the baseline again at the end; `"auto"` decides by the memory that is free.
        dynamic_ranges: whether plans in PyTorch scale every input by its own range; else by ranges of one call.
        float32: whether eager in float32 on the same weights is compared too, where a copy of them fits.
        threads: number of threads of the CPU; PyTorch's own number if not given.
        seed: seed of random weights and of the inputs.

    Raises:
        WanlabError: an unknown component, engine, plan or size; nothing could be measured.
    """
    place, kind = resolve(device, dtype)
    known = models.get(model)
    component = component or next(name for name in known.components if name.startswith("expert"))
    if component not in known.components:
        names = ", ".join(known.components)
        raise WanlabError(
            f"{known.name} has no component {component!r}{did_you_mean(component, known.components)}; it has {names}"
        )
    defaults = known.defaults
    given = {"height": height, "width": width, "frames": frames}
    size: dict[str, Any] = {
        name: getattr(defaults, name) if value is None else value for name, value in given.items()
    }
    selected, ranges = None, None
    if select_by_time or profiler_ranges:
        loaded = models.load(
            known, components=[component], device=place, dtype=kind, weights=weights, seed=seed
        )
        if profiler_ranges:
            ranges = range_cost(loaded, component, rounds=rounds, seed=seed, progress=progress, **size)
        if select_by_time:
            selected = plans_by_time(loaded, component, progress=progress, **size)
            plans = [*plans, *selected.plans.values()]
        del loaded
        gc.collect()
    candidates, left_out = component_candidates(
        component,
        engines,
        plans,
        configurations,
        cuda_graphs=cuda_graphs and place.type == "cuda",
        device=place,
    )
    with tempfile.TemporaryDirectory(prefix="wanlab-component-") as scratch:
        order: dict[str, Any] = {
            "model": model,
            "load": {
                "device": str(place),
                "dtype": str(kind).removeprefix("torch."),
                "weights": weights,
                "seed": seed,
            },
            "component": component,
            "size": size,
            "rounds": rounds,
            "until": {"precision": precision, "limit_s": limit_s},
            "dynamic_ranges": dynamic_ranges,
            "float32": float32,
            "threads": threads or torch.get_num_threads(),
            "seed": seed,
            "progress": progress,
            "folder": str(Path(folder).resolve()),
            "scratch": scratch,
            "candidates": _written(candidates, Path(scratch)),
        }
        job = Job(order)
        if processes == EACH or (processes == "auto" and not fit_together(job, len(candidates))):
            measured = in_processes(job)
        else:
            measured = interleaved(job)
    rows, samples, control, ended, prepared = measured
    left_out = left_out | prepared["left_out"]
    if not rows:
        raise WanlabError(f"nothing of {component} could be measured: {'; '.join(left_out.values())}")
    facts, kernels = _with_bounds(rows, samples, prepared, order["load"]["dtype"])
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "the CPU"
    return ComponentCost(
        model=known.name,
        component=component,
        dtype=order["load"]["dtype"],
        device=name,
        size=size,
        processes=rows[0]["processes"],
        samples=samples,
        control=control,
        ended=ended,
        facts=facts,
        kernels=kernels,
        products=pd.DataFrame(prepared["products"]),
        operations=Operations(**prepared["operations"]),
        ceilings=Ceilings(**prepared["ceilings"]),
        left_out=left_out,
        selected=selected,
        ranges=ranges,
        notes=tuple(prepared["notes"]),
        lora=known.lora_identity(component),
    )


def _written(candidates: Sequence[Candidate], folder: Path) -> list[dict[str, Any]]:
    """Candidates as JSON values, their configurations as files."""
    written = []
    for index, candidate in enumerate(candidates):
        path = save_configuration(candidate.configuration, folder / f"candidate-{index}.yaml")
        written.append({"label": candidate.label, "path": str(path), "cuda_graph": candidate.cuda_graph})
    return written


def _with_bounds(
    rows: Sequence[dict[str, Any]], samples: Mapping[str, Samples], prepared: Mapping[str, Any], dtype: str
) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """Label -> facts with the roofline and Amdahl's bound; and the kernels of all."""
    tables = [pd.DataFrame(row["kernel_rows"], columns=KERNEL_COLUMNS) for row in rows]
    for row, table in zip(rows, tables, strict=True):
        table.insert(0, "candidate", row["label"])
    shares = [_linear_share(table) for table in tables]
    products = pd.DataFrame(prepared["products"])
    facts: dict[str, dict[str, Any]] = {}
    for row, table, share in zip(rows, tables, shares, strict=True):
        own = {
            name: value
            for name, value in row.items()
            if name not in ("label", "kernel_rows", "processes", "formats")
        }
        own |= {"linear_share_percent": share, "product_kernel": _product_kernel(table)}
        roofline = roofline_ms(
            Operations(**prepared["operations"]), prepared["moved_bytes"], prepared["ceilings"], dtype
        )
        if roofline is not None:
            own["roofline_ms"] = roofline
            own["of_roofline_percent"] = 100 * roofline / samples[row["label"]].median
        if len(products) and row.get("formats") and shares[0] is not None:
            own |= product_bound(products, row["formats"], shares[0]) or {}
        facts[row["label"]] = own
    kernels = pd.concat(tables, ignore_index=True)
    return facts, kernels


def roofline_ms(
    operations: Operations, moved_bytes: float, ceilings: Mapping[str, Any], dtype: str
) -> float | None:
    """Roofline of one call in ms; None where the device's best rate in this dtype is not known.

    It is the time of its operations at that rate, or of moving its weights, inputs and output once, whichever is longer.

    Plans compute on codes, which may be faster than this.
    """
    rate = ceilings["tflop_per_s"].get(SHORT_TYPES.get(dtype, dtype))
    if not rate:
        return None
    return max(operations.flop / rate / 1e9, moved_bytes / ceilings["memory_gb_per_s"] / 1e6)


def _linear_share(table: pd.DataFrame) -> float | None:
    """Percent of the time in kernels that matrix products take; None without kernels."""
    if not len(table):
        return None
    return float(table.loc[table["kind"] == operators.LINEAR, "share_percent"].sum())


def _product_kernel(table: pd.DataFrame) -> str | None:
    """Name of the product kernel that took most time."""
    names = table.loc[table["kind"] == operators.LINEAR, "name"]
    return names.iloc[0] if len(names) else None
