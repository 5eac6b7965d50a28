"""One component on several engines: benchmarks, interleaved timing, forms of the graph, and cost of profiler ranges."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.core.stats import interval_text
from wanlab.diagnose.capture import ranges
from wanlab.engines.base import Engine
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.engines.parity import differences
from wanlab.engines.registry import EAGER, ENGINES, engine_kind, open_component
from wanlab.engines.torch import TorchEngine
from wanlab.export.components import (
    FUSED_OPSET,
    check_components,
    component_spec,
    components_of,
    default_shape,
    usual_batch,
)
from wanlab.export.export import TRACED_BATCH, export
from wanlab.export.trace import BFLOAT16_OPSET, DEFAULT_OPSET
from wanlab.measure.timing import NOT_DISTINGUISHABLE, Samples


def bench_components(
    model,
    engines: Mapping[str, Engine],
    components: Sequence[str] | None = None,
    *,
    iterations: int = 10,
    duration_ms: float = 1000.0,
    warmup_ms: float = 200.0,
    transfers: bool = True,
    seed: int = 0,
    progress: bool = True,
    **size: int | None,
) -> pd.DataFrame:
    """`measure.bench` of eager PyTorch and of an engine, component by component.

    Args:
        model: a model from `wanlab.models.load` whose components are eager.
        engines: component -> engine.
        components: components to measure; None takes the experts of `engines`.
        iterations, duration_ms, warmup_ms, transfers: as in `measure.bench`.
        seed: seed of the inputs.
        size: batch (default 1), height, width, frames, text_tokens; the model's default where None.

    Returns:
        component, and the columns of `measure.bench_table`; eager is the baseline of each component.

    Raises:
        WanlabError: a component that the model does not have, or as `measure.bench`.
    """
    names = [n for n in engines if n.startswith("expert")] if components is None else list(components)
    check_components(model, names)
    shape = default_shape(model, **size | {"batch": size.get("batch") or 1})
    settings: dict[str, Any] = {
        "iterations": iterations,
        "duration_ms": duration_ms,
        "warmup_ms": warmup_ms,
        "transfers": transfers,
        "progress": progress,
    }
    tables = []
    for name in names:
        plan = component_spec(model, name)
        fixed = [
            shape[0] for _, shape in engines[name].inputs.values() if shape and isinstance(shape[0], int)
        ]
        clip = dataclasses.replace(shape, batch=fixed[0]) if fixed else shape
        inputs = plan.inputs_for(clip, torch.Generator().manual_seed(seed))
        feeds = dict(zip(plan.inputs, inputs, strict=True))
        eager = measure.bench(TorchEngine(model, name), feeds, **settings)
        table = measure.bench_table([eager, measure.bench(engines[name], feeds, **settings)])
        table.insert(0, "component", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def provider_table(engines: Mapping[str, OrtEngine]) -> pd.DataFrame:
    """Providers on which the nodes of ONNX Runtime engines run.

    Args:
        engines: component -> `OrtEngine`.

    Returns:
        component, provider, nodes, share_percent of the component's nodes, operators (the three with most nodes).
    """
    rows = []
    for component, engine in engines.items():
        counts = engine.nodes_by_provider()
        total = counts["nodes"].sum()
        for provider, part in counts.groupby("provider"):
            first = ", ".join(f"{row.nodes} {row.operator}" for row in part.head(3).itertuples())
            rows.append(
                {
                    "component": component,
                    "provider": provider,
                    "nodes": int(part["nodes"].sum()),
                    "share_percent": 100 * part["nodes"].sum() / total,
                    "operators": first,
                }
            )
    return pd.DataFrame(rows)


SMALL_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class EngineCalls:
    """Calls of one component on the same inputs.

    Attributes:
        component: name of the component.
        size: height, width and frames of the clip.
        precision: dtype of the eager weights.
        calls: engine name (`"eager"`, `"onnxruntime-cpu"`, `"tvm-llvm"`) -> function that runs one forward.
        facts: engine name -> load_ms, size_bytes, build_ms (None if nothing is built) and relative_l2, the distance of
            its output from eager's.
        left_out: engine -> reason why it has no call, in one line.
    """

    component: str
    size: dict[str, int]
    precision: str
    calls: dict[str, Callable[[], object]]
    facts: dict[str, dict[str, float | None]]
    left_out: dict[str, str]

    def table(self, samples: Mapping[str, Samples]) -> pd.DataFrame:
        """One row per engine: engine, its facts, and the row of its samples."""
        return pd.DataFrame(
            [{"engine": name, **self.facts[name], **timing.row()} for name, timing in samples.items()]
        )


def engine_calls(
    model,
    component: str | None,
    folder: str | os.PathLike,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    **size: int | None,
) -> EngineCalls:
    """Open one component at one size, batch 1, in several engines, and check each of them against eager.

    An engine that cannot run on this machine is left out, with the reason; eager is always first.

    Args:
        model: a model from `wanlab.models.load` whose components are eager.
        component: name of the component; None takes the first expert.
        folder: folder of graphs and built files, which are reused while they are current.
        engines: names in `wanlab.engines.registry.ENGINES`; None takes the default engines if the weights are under
            1 GiB, else only eager, because the export of a large network takes long.
        threads: number of CPU threads of every engine; None is `torch.get_num_threads()`.
        seed: seed of the inputs.
        size: height, width, frames, text_tokens; the model's default where not given.

    Raises:
        WanlabError: an unknown engine or component, or a size that is not legal.
    """
    component = component or next(name for name in components_of(model) if name.startswith("expert"))
    by_default = [kind for kind in ENGINES.values() if kind.by_default and kind.runs(component)]
    kinds = by_default if engines is None else [engine_kind(name) for name in engines]
    others = [kind for kind in kinds if kind.name != EAGER]
    plan = component_spec(model, component)
    shape = default_shape(model, batch=1, **size)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def eager() -> torch.Tensor:
        return plan.reference(*inputs)

    expected, weights = eager(), sum(parameter.nbytes for parameter in plan.network.parameters())
    calls: dict[str, Callable[[], object]] = {EAGER: eager}
    facts: dict[str, dict[str, Any]] = {EAGER: _facts(None, weights, None, 0.0)}
    left_out: dict[str, str] = {}
    if engines is None and weights > SMALL_BYTES:
        reason = f"{component} has {weights / 2**30:.1f} GiB of weights: name it in `engines` to export and build it"
        left_out, others = {kind.name: reason for kind in others}, []
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    for kind in others:
        settings: dict[str, Any] = {"threads": threads} if "threads" in kind.open_settings else {}
        try:
            engine = open_component(kind.name, model, component, folder, size=size, **settings)
            output = engine.run(feeds)[plan.output]
        except WanlabError as error:
            left_out[kind.name] = str(error)
            continue
        calls[engine.name] = functools.partial(engine.run, feeds)
        distance = differences(expected, output)["relative_l2"]
        facts[engine.name] = _facts(engine.load_ms, engine.size_bytes, engine.build_ms, distance)
    clip = {"height": shape.height, "width": shape.width, "frames": shape.frames}
    precision = str(plan.network.dtype).removeprefix("torch.")
    return EngineCalls(component, clip, precision, calls, facts, left_out)


def _facts(load_ms, size_bytes, build_ms, relative_l2) -> dict[str, float | None]:
    return {
        "load_ms": load_ms,
        "size_bytes": size_bytes,
        "build_ms": build_ms,
        "relative_l2": relative_l2,
    }


COUNTED = (
    "ScatterND",
    "ReduceMean",
    "RMSNormalization",
    "Softmax",
    "Attention",
    "RotaryEmbedding",
    "Transpose",
)


def compare_forms(
    model,
    component: str,
    folder: str | os.PathLike,
    *,
    provider: str = "auto",
    rounds: int = 5,
    seed: int = 0,
    progress: bool = True,
    **size: int | None,
) -> pd.DataFrame:
    """Export a component in its original form, in friendly forms, and with fused operators; time all of them interleaved.

    Of a network for which there are no friendly forms, only its original form; of one whose graph has the sizes of one
    clip, no fused one.

    Sizes are fixed, because the export is then several times faster and the original form exports best.

    Args:
        model: model whose component is eager.
        folder: folder of the graphs.
        provider: provider of ONNX Runtime.
        size: height, width and frames of the timed clip, of batch 1; the model's default where not given.
        rounds: number of rounds; each gives two interleaved samples of every row.

    Returns:
        A row for `eager` and for each graph: form, opset, nodes, nodes of the operators in `COUNTED`, notes
        (findings of `export.graph.lint`), relative_l2 to eager, time_ms (median), low and high of the ratio to `original`,
        ratio, verdict, noise_percent (A/A of `original`), samples_ms.
    """
    plan = component_spec(model, component)
    kind = str(plan.network.dtype).removeprefix("torch.")
    # A graph of one clip is that of the export, whose trace it shares; some have no free batch.
    fixed = not plan.sized
    free = any(plan.inputs.values())
    batch = 1 if free else usual_batch(model, component)
    if fixed and free and plan.rewritten:  # its original form may have no free batch: that of the export
        batch = TRACED_BATCH
    shape = default_shape(model, **{"batch": batch} | size)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    clip = size if fixed else asdict(shape)
    plain = BFLOAT16_OPSET if kind == "bfloat16" else DEFAULT_OPSET
    variants = {
        "original": (plain, "original" if plan.rewritten else "friendly"),
        "friendly": (plain, "friendly"),
        "fused": (FUSED_OPSET, "friendly"),
    }
    if fixed:
        del variants["fused"]
    if not plan.rewritten:
        del variants["friendly"]
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        expected = plan.reference(*inputs)
        for label, (opset, forms) in variants.items():
            path = Path(folder) / f"{component}.{kind}.{label}.onnx"
            report = export(model, component, path, opset=opset, forms=forms, dynamic=fixed, **clip)
            engine = OrtEngine(path, provider=provider)
            output = engine.run(feeds)[plan.output].to(expected.device)
            calls[label] = functools.partial(engine.run, feeds)
            rows.append(
                {"form": label, "opset": opset, "nodes": report.nodes_after}
                | {name: report.operators.get(name, 0) for name in COUNTED}
                | {"notes": "; ".join(report.notes)}
                | {"relative_l2": ((output - expected).norm() / expected.norm()).item()}
            )
        calls[EAGER] = lambda: plan.reference(*inputs)
        rows.append({"form": EAGER})
        device = plan.network.device
        samples, control = measure.interleaved(
            calls, warmup=2, rounds=rounds, device=device, progress=progress
        )
    base = samples["original"]
    for row in rows:
        timing = samples[row["form"]]
        gain = measure.compare(base, timing, control.noise_percent)
        row |= {"time_ms": timing.median, "ratio": gain.speedup, "low": gain.low, "high": gain.high}
        row["verdict"] = "baseline" if timing is base else gain.verdict
        row |= {"noise_percent": control.noise_percent, "samples_ms": timing.values_ms}
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class RangeCost:
    """Time that the profiler's ranges add to a call of an expert while no profiler runs.

    Attributes:
        samples: samples of `"bare"` and `"with ranges"`, interleaved.
        control: A/A control of the bare calls.
        ranges: number of ranges.
    """

    samples: dict[str, measure.Samples]
    control: measure.AAControl
    ranges: int

    @property
    def percent(self) -> tuple[float, float, float]:
        """Slow-down by the ranges in percent, and its 95 % interval."""
        without, within = self.samples.values()
        gain = measure.compare(without, within, self.control.noise_percent)
        middle, low, high = (100 * (1 / ratio - 1) for ratio in (gain.speedup, gain.high, gain.low))
        return middle, low, high

    def row(self) -> dict[str, float]:
        """Flat record: cost_percent with its interval, control_percent, ranges, and the medians."""
        middle, low, high = self.percent
        return {
            "cost_percent": middle,
            "cost_low_percent": low,
            "cost_high_percent": high,
            "control_percent": 100 * (1 / self.control.ratio - 1),
            "noise_percent": self.control.noise_percent,
            "ranges": self.ranges,
        } | {f"{name.replace(' ', '_')}_ms": samples.median for name, samples in self.samples.items()}

    def __str__(self) -> str:
        middle, low, high = self.percent
        without, within = self.samples.values()
        verdict = measure.compare(without, within, self.control.noise_percent).verdict
        effect = (
            "cost nothing that can be told from noise" if verdict == NOT_DISTINGUISHABLE else f"are {verdict}"
        )
        return f"{self.ranges} ranges {effect} ({middle:+.2f} %, {interval_text(low, high, '+.2f')})"


def range_cost(
    model,
    component: str,
    *,
    rounds: int = 100,
    seed: int = 0,
    progress: bool = True,
    **size: int | None,
) -> RangeCost:
    """Time an expert as the pipeline calls it, bare and with the ranges of `diagnose.ranges`, interleaved.

    Args:
        model: a model from `wanlab.models.load`; only the expert has to be loaded.
        component: name of an expert.
        rounds: number of rounds; each has two calls of both.
        seed: seed of the inputs.
        size: height, width and frames of the clip; the model's default where not given.

    Raises:
        WanlabError: the component is no expert.
    """
    if not component.startswith("expert"):
        raise WanlabError(
            f"ranges are timed around experts, which the pipeline calls as networks, not {component}"
        )
    spec = component_spec(model, component)
    inputs = spec.inputs_for(default_shape(model, batch=1, **size), torch.Generator().manual_seed(seed))
    with ranges(model) as names, torch.no_grad():
        ranged = getattr(model.pipeline, model.spec.part_of(component))
        samples, control = measure.interleaved(
            {
                "bare": lambda: spec.network(*inputs, return_dict=False),
                "with ranges": lambda: ranged(*inputs, return_dict=False),
            },
            rounds=rounds,
            device=model.device,
            progress=progress,
        )
    return RangeCost(samples, control, len(names))
