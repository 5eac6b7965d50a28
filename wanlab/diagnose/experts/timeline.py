"""Which expert runs when, and for how long: measured step by step, none prorated."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.stages import EXPERTS, stages
from wanlab.models.schedule import ExpertSchedule, fewest_steps, precompute_schedule

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.models.generate import Model


@dataclass(frozen=True, eq=False)
class Timeline:
    """The experts of recorded generations, step by step.

    Attributes:
        schedule: what was known beforehand.
        steps: per step: step, timestep, sigma, snr, component, time_ms (medians of its branches added up), one column
            per branch (cond_ms, uncond_ms).
        calls: every expert call with all its samples; columns as in `StageCall`.
        as_planned: whether every step ran the expert that the schedule had named, at its timestep.
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
        """What the first forward after a switch takes more than later ones of that expert, both in memory.

        Keys excess_ms (median over switches and repeats) and noise_ms (95th percentile of how far a single later
        forward lies from their median); empty where nothing is switched or compared.
        """
        excess, apart = [], []
        for step in self.schedule.switches:
            name = self.schedule.table["component"].iloc[step]
            mine = self.calls[(self.calls["component"] == name) & (self.calls["step"] >= step)]
            first = (mine["step"] == step) & (mine["branch"] == "cond")
            later = mine.loc[~first, "time_ms"]
            if len(later) > 1:
                excess += (mine.loc[first, "time_ms"] - later.median()).tolist()
                apart += (later - later.median()).abs().tolist()
        if not excess:
            return {}
        return {"excess_ms": median(excess), "noise_ms": sorted(apart)[int(0.95 * len(apart))]}

    def row(self) -> dict[str, Any]:
        """Flat record: switches, as_planned, <high|low>_steps, <high|low>_ms (median of a forward), after_switch_..._ms."""
        times = self.calls.groupby("component")["time_ms"].median()
        row: dict[str, Any] = {"switches": len(self.schedule.switches), "as_planned": self.as_planned}
        for entry in self.schedule.prefetch:
            short = entry.component.removeprefix("expert_")
            row |= {f"{short}_steps": entry.steps, f"{short}_ms": times.get(entry.component)}
        return row | {f"after_switch_{key}": value for key, value in self.after_switch().items()}

    def __str__(self) -> str:
        row, switches = self.row(), len(self.schedule.switches)
        names = {"high": "the high-noise expert", "low": "the low-noise expert", "expert": "the one expert"}
        ran = [key for key in names if row.get(f"{key}_steps")]
        each = "{} steps on {} ({:,.1f} ms a forward)"
        parts = [each.format(row[f"{key}_steps"], names[key], row[f"{key}_ms"]) for key in ran]
        return f"{', '.join(parts)}, {switches} switch{'es' * (switches != 1)}"


def timeline(
    model: Model, image: Any, prompt: str, *, repeats: int = 1, warmup: bool = True, **settings
) -> Timeline:
    """Generate with every expert call recorded; each step has its own measured time, none is prorated.

    Args:
        model: from `wanlab.models.load`.
        image, prompt, settings: as `Model.generate` takes them; the decoder is left out unless `output` is given.
        repeats: generations that are recorded.
        warmup: generate once before, with the fewest steps that reach every expert.

    Raises:
        WanlabError: repeats under 1, or what `Model.generate` refuses.
    """
    if repeats < 1:
        raise WanlabError(f"repeats is {repeats}; record at least 1 generation")
    settings = {"output": "latent"} | settings
    plan = precompute_schedule(model, settings.get("steps"))
    if warmup:
        model.generate(image, prompt, **settings | {"steps": fewest_steps(model, plan)})
    with stages(model) as recorder:
        for _ in range(repeats):
            model.generate(image, prompt, **settings)
    calls = recorder.frame()
    calls = calls[calls["component"].isin(EXPERTS)].reset_index(drop=True)
    times = calls.pivot_table("time_ms", "step", "branch", aggfunc="median", sort=False).add_suffix("_ms")
    ran = calls.groupby("step").agg(component=("component", "first"), timestep=("timestep", "first"))
    known = plan.table.set_index("step")
    same = known["component"].tolist() == ran["component"].tolist()
    # Half a percent: half-precision timesteps are coarse.
    near = (known["timestep"] - ran["timestep"].astype(float)).abs() <= 5e-3 * (1 + known["timestep"])
    measured = ran[["component"]].assign(time_ms=times.sum(axis="columns"), **times).reset_index()
    steps = plan.table.drop(columns="component").merge(measured, on="step")
    return Timeline(plan, steps, calls, same and bool(near.all()))
