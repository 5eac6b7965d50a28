"""Timeline of the experts in a generation, and the flow of tensors between components."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.words import time_text
from wanlab.measure.load import metered
from wanlab.measure.stages import EXPERTS, stages
from wanlab.models.pipeline import Model
from wanlab.models.schedule import ExpertSchedule, fewest_steps, precompute_schedule
from wanlab.models.spec import component_title
from wanlab.models.taps import component_calls, intercept_calls


def from_one(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """A table for readers, who count denoising steps from 1: its columns of steps, which count from 0, moved by one.

    Ranges of steps in words, such as "0-3", are moved too; a column of numbers named "steps" is how many there are.
    """
    if table is None:
        return None
    moved = {name: table[name] + 1 for name in ("step", "first_step", "last_step") if name in table}
    if "steps" in table and not pd.api.types.is_numeric_dtype(table["steps"]):
        moved["steps"] = [
            re.sub(r"\d+", lambda number: str(int(number[0]) + 1), str(text)) for text in table["steps"]
        ]
    return table.assign(**moved)


@dataclass(frozen=True, eq=False)
class Timeline:
    """The experts of recorded generations, step by step.

    Attributes:
        schedule: the schedule that was computed before the run.
        steps: per step: step, timestep, sigma, snr, component, time_ms (sum of the medians of its branches), one column
            per branch (cond_ms, uncond_ms).
        calls: every expert call with all its samples; columns as in `StageCall`.
        as_planned: whether every step ran the scheduled expert at the scheduled timestep.
    """

    schedule: ExpertSchedule
    steps: pd.DataFrame
    calls: pd.DataFrame
    as_planned: bool

    def forward_ms(self) -> pd.DataFrame:
        """One forward of each expert: component, steps, calls, median_ms, min_ms, max_ms, share_percent of expert time."""
        grouped = self.calls.groupby("component", sort=False)
        frame = grouped["time_ms"].agg(calls="size", median_ms="median", min_ms="min", max_ms="max")
        frame.insert(0, "steps", grouped["step"].nunique())
        frame["share_percent"] = 100 * grouped["time_ms"].sum() / self.calls["time_ms"].sum()
        return frame.reset_index()

    def after_switch(self) -> dict[str, float]:
        """Extra time of the first forward after a switch, compared with later ones of that expert, both in memory.

        Keys excess_ms (median over switches and repeats) and noise_ms (95th percentile of the distance of a single later
        forward from their median); empty if there is no switch or nothing to compare.
        """
        excess, distances = [], []
        for step in self.schedule.switches:
            name = self.schedule.table["component"].iloc[step]
            calls = self.calls[(self.calls["component"] == name) & (self.calls["step"] >= step)]
            first = (calls["step"] == step) & (calls["branch"] == "cond")
            later = calls.loc[~first, "time_ms"]
            if len(later) > 1:
                excess += (calls.loc[first, "time_ms"] - later.median()).tolist()
                distances += (later - later.median()).abs().tolist()
        if not excess:
            return {}
        return {"excess_ms": median(excess), "noise_ms": sorted(distances)[int(0.95 * len(distances))]}

    def row(self) -> dict[str, Any]:
        """Flat record: switches, as_planned, <high|low>_steps, <high|low>_ms (median of a forward), after_switch_..._ms."""
        times = self.calls.groupby("component")["time_ms"].median()
        row: dict[str, Any] = {"switches": len(self.schedule.switches), "as_planned": self.as_planned}
        for entry in self.schedule.prefetch:
            short = entry.component.removeprefix("expert_")
            row |= {f"{short}_steps": entry.steps, f"{short}_ms": times.get(entry.component)}
        return row | {f"after_switch_{key}": value for key, value in self.after_switch().items()}

    @property
    def order(self) -> str:
        """Which expert runs which steps, counted from 1, as a clause."""
        parts: list[str] = []
        for entry in (each for each in self.schedule.prefetch if each.steps):
            first = entry.first_step or 0
            last = first + entry.steps
            steps = f"steps {first + 1} to {last}" if entry.steps > 1 else f"step {last}"
            parts.append(f"{component_title(entry.component)}{'' if parts else ' runs'} {steps}")
        return (
            f"the {', the '.join(parts)}"
            if len(parts) > 1
            else f"one expert runs all {len(self.steps)} steps"
        )

    @property
    def tiles(self) -> tuple[tuple[str, str, str], ...]:
        """Key figures: the steps of each expert and what one of its forwards takes."""
        rows = self.forward_ms().itertuples()
        return tuple(
            (
                component_title(row.component),
                f"{row.steps} step{'s' * (row.steps != 1)}",
                f"{time_text(row.median_ms)} a forward, {row.share_percent:.0f} % of the experts' time",
            )
            for row in rows
        )


def timeline(
    model: Model, image: Any, prompt: str, *, repeats: int = 1, warmup: bool = True, **settings
) -> Timeline:
    """Generate and record every expert call; each step has its own measured time, none is estimated from others.

    Args:
        model: from `wanlab.models.load`.
        image, prompt, settings: arguments of `Model.generate`; the decoder does not run unless `output` is given.
        repeats: number of recorded generations.
        warmup: generate once before, with the smallest number of steps that runs every expert.

    Raises:
        WanlabError: repeats under 1, or an error of `Model.generate`.
    """
    if repeats < 1:
        raise WanlabError(f"repeats is {repeats}; record at least 1 generation")
    settings = {"output": "latent"} | settings
    plan = precompute_schedule(model, settings.get("steps"))
    if warmup:
        model.generate(image, prompt, **settings | {"steps": fewest_steps(model, plan)})
    with metered(model.device), stages(model) as recorder:
        for _ in range(repeats):
            model.generate(image, prompt, **settings)
    calls = recorder.frame()
    calls = calls[calls["component"].isin(EXPERTS)].reset_index(drop=True)
    times = calls.pivot_table("time_ms", "step", "branch", aggfunc="median", sort=False).add_suffix("_ms")
    ran = calls.groupby("step").agg(component=("component", "first"), timestep=("timestep", "first"))
    known = plan.table.set_index("step")
    same = known["component"].tolist() == ran["component"].tolist()
    # Tolerance of half a percent: timesteps in half precision are coarse.
    near = (known["timestep"] - ran["timestep"].astype(float)).abs() <= 5e-3 * (1 + known["timestep"])
    measured = ran[["component"]].assign(time_ms=times.sum(axis="columns"), **times).reset_index()
    steps = plan.table.drop(columns="component").merge(measured, on="step")
    return Timeline(plan, steps, calls, same and bool(near.all()))


@dataclass(frozen=True, eq=False)
class DataFlow:
    """The parts of a loaded model and the tensors that flow between them.

    Attributes:
        nodes: node, kind ("input", "network", "decision", "scheduler", "output"), class_name, parameters, size_bytes, dtype,
            device (of the weights: empty for an engine, separate for each half of a VAE), steps (of an expert).
        edges: source, target, tensor, shape (e.g. "1x16x5x16x24"), dtype; recorded in a generation.
        schedule: the schedule that selects the expert.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    schedule: ExpertSchedule


def data_flow(model: Model, image: Any, prompt: str, **settings) -> DataFlow:
    """Record the inputs and outputs of each part in one generation, with the fewest steps that run every expert.

    Args:
        image, prompt, settings: arguments of `Model.generate`; `steps` is the number of steps in the schedule. Without
            guidance unless `guidance_scale` is given.
    """
    plan = precompute_schedule(model, settings.get("steps"))
    stated = {name: value for name, value in settings.items() if value is not None}
    short = {"guidance_scale": 1.0} | stated | {"steps": fewest_steps(model, plan)}
    tensors: dict[str, dict[str, tuple]] = {}

    def seeing(node: str) -> Callable:
        def wrap(call: Callable) -> Callable:
            def called(*args, **kwargs):
                result = call(*args, **kwargs)
                named = {str(i): value for i, value in enumerate(args)} | kwargs
                tensors.setdefault(
                    node, {key: _form(value) for key, value in (named | {"out": result}).items()}
                )
                return result

            return called

        return wrap

    points = component_calls(model.pipeline) | {"scheduler": {"step": "scheduler"}}
    wrap = {part: {method: seeing(node) for method, node in calls.items()} for part, calls in points.items()}
    with intercept_calls(model.pipeline, wrap):
        model.generate(image, prompt, **short)
    experts = [entry.component for entry in plan.prefetch if entry.component in tensors]
    router = "boundary" if plan.boundary_ratio is not None else experts[0]
    links = [
        ("prompt", "text_encoder", "tokens", "text_encoder", "0"),
        ("image", "vae_encoder", "frames", "vae_encoder", "0"),
        ("text_encoder", router, "text", experts[0], "encoder_hidden_states"),
        ("vae_encoder", router, "condition", "vae_encoder", "out"),
        ("noise", router, "latents", "scheduler", "2"),
        *((router, name, "latents, condition", name, "hidden_states") for name in experts if router != name),
        *((name, "scheduler", "prediction", name, "out") for name in experts),
        ("scheduler", router, "next latents", "scheduler", "out"),
        ("scheduler", "vae_decoder", "latents", "vae_decoder", "0"),
        ("vae_decoder", "video", "frames", "vae_decoder", "out"),
    ]
    edges = [(*ends, *form) for *ends, of, key in links if (form := tensors.get(of, {}).get(key))]
    ends = {name for edge in edges for name in edge[:2]}
    kinds = {"boundary": "decision", "scheduler": "scheduler", "video": "output"}
    nodes: list[dict[str, Any]] = [
        {"node": name, "kind": kinds.get(name, "input")} for name in ("prompt", "image", "noise")
    ]
    for name in (*tensors, "boundary", "video"):
        network = model.components.get(name, getattr(model.pipeline, name, None))
        nodes.append({"node": name, "kind": kinds.get(name, "network")} | _facts(name, network))
        nodes[-1]["steps"] = plan.steps_of(name) if name in experts else None
    frame = pd.DataFrame([node for node in nodes if node["node"] in ends])
    frame = frame.astype({"parameters": "Int64", "size_bytes": "Int64", "steps": "Int64"})
    columns = ["source", "target", "tensor", "shape", "dtype"]
    return DataFlow(frame, pd.DataFrame(edges, columns=columns), plan)


def _form(value: Any) -> tuple[str, str] | None:
    """Shape and dtype of a tensor, or of the first tensor in a component's output."""
    if hasattr(value, "latent_dist"):
        value = value.latent_dist.mode()
    for name in ("last_hidden_state", "sample", "prev_sample"):
        value = getattr(value, name, value)
    value = value[0] if isinstance(value, tuple) else value
    if not hasattr(value, "shape"):
        return None
    return "x".join(map(str, value.shape)), str(value.dtype).removeprefix("torch.")


def _facts(node: str, part: Any) -> dict[str, Any]:
    """Class, size and device of a part; each half of a VAE has only the weights that it uses alone."""
    if part is None:
        return {}
    weights = dict(part.named_parameters()) if hasattr(part, "named_parameters") else {}
    decoding = ("decoder.", "post_quant_conv.")
    if node.startswith("vae"):
        weights = {k: p for k, p in weights.items() if k.startswith(decoding) == (node == "vae_decoder")}
    facts: dict[str, Any] = {"class_name": type(part).__name__}
    if weights:
        facts["parameters"] = sum(p.numel() for p in weights.values())
        facts["size_bytes"] = sum(p.nbytes for p in weights.values())
        facts["dtype"] = str(max(weights.values(), key=lambda p: p.nbytes).dtype).removeprefix("torch.")
        facts["device"] = str(next(iter(weights.values())).device)
    return facts
