"""The denoising steps before a run: which expert runs each step, and when its weights must be on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pandas as pd
import torch

from wanlab.core.errors import WanlabError
from wanlab.models.networks import skeleton, stored_dtype
from wanlab.models.pipeline import Model, boundary_ratio


@dataclass(frozen=True)
class Prefetch:
    """When an expert is needed, and how much time there is to transfer its weights.

    Attributes:
        component: name of the expert.
        steps: number of steps that it runs.
        first_step: its first step, from 0; None if it runs none.
        hiding_steps: steps of the other expert before its first step; a transfer can overlap with them.
        size_bytes: size of its weights; None for an engine, which keeps its own weights.
    """

    component: str
    steps: int
    first_step: int | None
    hiding_steps: int
    size_bytes: int | None


@dataclass(frozen=True, eq=False)
class ExpertSchedule:
    """The experts of a run, known before it starts.

    Attributes:
        table: step, timestep, sigma, snr, component; from `Model.schedule`.
        boundary_ratio: current value of the pipeline; None with one expert.
        boundary_timestep: the high-noise expert runs at this timestep and above; None with one expert.
        prefetch: one entry per expert, in the order of the model.
        note: a remark for the reader, e.g. that there is only one expert; else empty.
    """

    table: pd.DataFrame
    boundary_ratio: float | None
    boundary_timestep: float | None
    prefetch: tuple[Prefetch, ...]
    note: str

    @property
    def switches(self) -> tuple[int, ...]:
        """Steps at which the other expert takes over."""
        names = self.table["component"].tolist()
        return tuple(i for i in range(1, len(names)) if names[i] != names[i - 1])

    def steps_of(self, component: str) -> int:
        """Number of steps that an expert runs; 0 for one that the model lacks."""
        return int((self.table["component"] == component).sum())

    def __str__(self) -> str:
        switches = ", ".join(map(str, self.switches))
        return self.note or (
            f"another expert takes over at step {switches}" if switches else "one expert runs all steps"
        )

    def frame(self) -> pd.DataFrame:
        """The prefetch plan, one row per expert; columns as in `Prefetch`."""
        frame = pd.DataFrame([asdict(entry) for entry in self.prefetch])
        return frame.astype({"first_step": "Int64", "size_bytes": "Int64"})


def precompute_schedule(model: Model, steps: int | None = None) -> ExpertSchedule:
    """The expert of every step, and when a prefetch must bring which weights, computed before the run.

    Uses the pipeline's own rule (`timestep >= boundary_ratio * training timesteps`) on a copy of its scheduler, so
    the run will follow it exactly.

    Args:
        model: from `wanlab.models.load`.
        steps: denoising steps; the model's default if None.

    Raises:
        WanlabError: `steps` is not a whole number of at least 1.
    """
    table = model.schedule(steps)
    names = table["component"].tolist()
    experts = [name for name in model.spec.components if name.startswith("expert")]
    ratio = boundary_ratio(model.pipeline, model.spec) if len(experts) > 1 else None
    training_steps = model.pipeline.scheduler.config.get("num_train_timesteps", 1000)
    plan = []
    for name in experts:
        first = names.index(name) if name in names else None
        plan.append(Prefetch(name, names.count(name), first, first or 0, _weight_bytes(model, name)))
    note = ""
    if len(experts) == 1:
        note = f"{model.spec.name} has one expert, which runs every step: nothing is switched or prefetched"
    elif len(set(names)) == 1:
        note = f"of {len(names)} steps none crosses the boundary: {names[0]} runs them all"
    return ExpertSchedule(table, ratio, None if ratio is None else ratio * training_steps, tuple(plan), note)


def fewest_steps(model: Model, schedule: ExpertSchedule) -> int:
    """The smallest number of denoising steps that runs every expert of a schedule: enough for a warm-up."""
    experts = set(schedule.table["component"])
    counts = range(min(model.family.fewest_steps, len(schedule.table)), len(schedule.table) + 1)
    return next(n for n in counts if set(model.schedule(n)["component"]) >= experts)


@contextmanager
def boundary_at(model: Model, ratio: float) -> Iterator[None]:
    """Inside the block the experts switch at another share of the training timesteps.

    Only the pipeline's configuration is changed; it is restored afterwards, also after an exception.

    Args:
        model: a model with two experts.
        ratio: 0 (the high-noise expert runs all steps) to 1 (the low-noise expert runs all steps below the top timestep).

    Raises:
        WanlabError: a model with one expert, or a ratio out of range.
    """
    if "expert_low" not in model.spec.components:
        raise WanlabError(f"{model.spec.name} has one expert and no boundary; take a model with two")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise WanlabError(f"boundary must be a share of the timesteps from 0 to 1, not {ratio!r}")
    before = model.pipeline.config.get("boundary_ratio")
    model.pipeline.register_to_config(boundary_ratio=float(ratio))
    try:
        yield
    finally:
        model.pipeline.register_to_config(boundary_ratio=before)


def _weight_bytes(model: Model, component: str) -> int | None:
    network = model.components.get(component)
    if network is None:
        part = model.spec.part(model.spec.part_of(component))
        empty = skeleton(part, model.dtype)
        sizes = ((p.numel(), stored_dtype(empty, key, model.dtype)) for key, p in empty.named_parameters())
        return sum(count * kind.itemsize for count, kind in sizes)
    if not isinstance(network, torch.nn.Module):
        return None
    # An engine has no parameters.
    return sum(parameter.nbytes for parameter in network.parameters()) or None
