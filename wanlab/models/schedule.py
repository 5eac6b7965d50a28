"""The denoising steps of a run before it runs: which expert each one takes, and when its weights must be there."""

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
    """When an expert is needed, and how long there is to bring it in.

    Attributes:
        component: name of the expert.
        steps: how many it runs.
        first_step: the first of them, from 0; None if it runs none.
        hiding_steps: steps of the other expert before that one: the time behind which a transfer can hide.
        size_bytes: of its weights; None for an engine, whose bytes are its own.
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
        table: step, timestep, sigma, snr, component; as `Model.schedule` gives it.
        boundary_ratio: as the pipeline has it now; None with one expert.
        boundary_timestep: from this timestep on upwards the high-noise expert runs; None with one expert.
        prefetch: one entry per expert, in the order of the model.
        note: what a reader should know, e.g. that there is only one expert; empty if nothing.
    """

    table: pd.DataFrame
    boundary_ratio: float | None
    boundary_timestep: float | None
    prefetch: tuple[Prefetch, ...]
    note: str

    @property
    def switches(self) -> tuple[int, ...]:
        """Steps at which another expert takes over from the one before."""
        names = self.table["component"].tolist()
        return tuple(i for i in range(1, len(names)) if names[i] != names[i - 1])

    def steps_of(self, component: str) -> int:
        """Steps that an expert runs; 0 for one that the model lacks."""
        return int((self.table["component"] == component).sum())

    def __str__(self) -> str:
        switches = ", ".join(map(str, self.switches))
        return self.note or (
            f"another expert takes over at step {switches}" if switches else "one expert runs all steps"
        )

    def frame(self) -> pd.DataFrame:
        """The plan for a prefetch, one row per expert; columns as in `Prefetch`."""
        frame = pd.DataFrame([asdict(entry) for entry in self.prefetch])
        return frame.astype({"first_step": "Int64", "size_bytes": "Int64"})


def precompute_schedule(model: Model, steps: int | None = None) -> ExpertSchedule:
    """The expert of every step, and what a prefetch has to bring when, before the run starts.

    The rule is the pipeline's own (`timestep >= boundary_ratio * training timesteps`) on a copy of its scheduler, so
    that it is what will run.

    Args:
        model: from `wanlab.models.load`.
        steps: denoising steps; the model's default if None.

    Raises:
        WanlabError: steps is no whole number of at least 1.
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
    """The fewest denoising steps that run every expert of a schedule: enough for a warm-up."""
    wanted = set(schedule.table["component"])
    counts = range(1, len(schedule.table) + 1)
    return next(n for n in counts if set(model.schedule(n)["component"]) >= wanted)


@contextmanager
def boundary_at(model: Model, ratio: float) -> Iterator[None]:
    """Inside the block the experts change over at another share of the training timesteps.

    Only the pipeline's configuration is changed, and put back, also after an exception.

    Args:
        model: has two experts.
        ratio: 0 (the high-noise expert runs all steps) to 1 (the low-noise one all whose timestep is under the top).

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
    # An engine has no parameters of its own.
    return sum(parameter.nbytes for parameter in network.parameters()) or None
