"""Solver: fewer denoising steps, by a solver that makes more of each."""

from __future__ import annotations

import copy
import math
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.families import family_of
from wanlab.models.schedulers import is_flow_matching, named_as
from wanlab.models.spec import ModelSpec, component_title
from wanlab.techniques.technique import Bound, Proof, Shares, Technique

if TYPE_CHECKING:
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    from wanlab.models import pipeline
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    diffusers = LazyModule("diffusers")
    torch = LazyModule("torch")
    pipeline = LazyModule("wanlab.models.pipeline")

METHODS = {
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
}
"""Method -> its class in diffusers."""


class SolverSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which solver, and how many steps it makes.

    Attributes:
        method: `"unipc"`, `"dpm++"` (DPM-Solver++, multistep) or `"euler"`, as diffusers has them.
        order: of the first two, 1 to 3; Euler's is 1, whatever stands here.
        steps_percent: percent of the steps that a generation asks for, rounded up, that are made.
    """

    method: Literal["unipc", "dpm++", "euler"] = "unipc"
    order: Annotated[int, msgspec.Meta(ge=1, le=3)] = 2
    steps_percent: Annotated[float, msgspec.Meta(gt=0, le=100)] = 60.0


class Solver(Technique[SolverSettings]):
    """UniPC (arXiv:2302.04867), DPM-Solver++ (arXiv:2211.01095) or Euler's method in place of the model's solver.

    The number of steps stays what a generation asks for, and the technique makes a share of them: so a configuration is
    compared with the original at the same request, and the gain is the technique's own, with a bound and a proof. The noise
    levels are those of the model at the smaller number of steps, also for Euler, whose class in diffusers has others; shift
    and flow prediction are the model's.
    """

    name = "solver"
    does = "makes a share of the steps, by another solver of the differential equation"
    tier = "lossy"
    order = 7
    order_reason = "it changes no network, and sets the steps, which rules around the calls count"
    Settings = SolverSettings

    def __init__(self, settings: SolverSettings | None = None) -> None:
        super().__init__(settings)
        self.before: DiffusionPipeline | None = None

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if family_of(spec.pipeline_class).title != "Wan":
            return (
                "a model of the Wan family, whose noise levels follow from the number of steps alone;"
                f" {spec.name} is of another"
            )
        return ""

    def bound(self, shares: Shares) -> Bound:
        made = fewer(shares.steps, self.settings.steps_percent)
        return Bound(shares.denoising * (1 - made / shares.steps), f"{made} of {shares.steps} steps are made")

    def apply(self, place: Place) -> None:
        self.before = copy.copy(place.model.pipeline)
        place.model.pipeline.scheduler = scheduler_for(self.before.scheduler, self.settings)

    def proof(self, place: Place) -> Proof:
        assert self.before is not None
        calls, scheduler = place.calls, place.model.pipeline.scheduler
        asked, made = scheduler.wanlab_asked, int(calls["step"].nunique())
        now, before = solver_text(scheduler), solver_text(self.before.scheduler)
        wanted = fewer(asked, self.settings.steps_percent)
        if not _is(scheduler, self.settings):
            return Proof(
                False,
                f"{self.name} was to use {METHODS[self.settings.method]}, but {now} made the {made} steps.",
            )
        if made != wanted:
            return Proof(False, f"{self.name} was to make {wanted} of {asked} steps, but {now} made {made}.")
        if made == asked and now == before:
            return Proof(False, f"{self.name} changed nothing: {now} made all {asked} steps without it too.")
        used = {str(row["component"]) for row in pipeline.step_table(self.before, place.model.spec, asked)}
        if idle := sorted(used - set(calls["component"])):
            return Proof(
                False,
                f"{self.name} left no step to the {component_title(idle[0])}: {made} of {asked} steps are too few.",
            )
        parts = [
            f"{len(rows)} of the {component_title(str(name))}"
            for name, rows in calls.groupby("component", sort=False)
        ]
        return Proof(
            True,
            f"{self.name} made {made} of {asked} steps with {now} in place of {before}, in {len(calls)} calls"
            f" ({listed(parts)}).",
        )


def fewer(steps: int, percent: float) -> int:
    """The share of a number of steps that is made, rounded up."""
    return max(1, math.ceil(round(percent / 100 * steps, 6)))


def solver_text(scheduler: Any) -> str:
    """`"UniPCMultistepScheduler of order 2"`: a scheduler's class and order."""
    order = scheduler.config.get("solver_order")
    return type(scheduler).__name__ + (f" of order {order}" if order else "")


def _is(scheduler: Any, settings: SolverSettings) -> bool:
    wanted = None if settings.method == "euler" else settings.order
    found = (type(scheduler).__name__, scheduler.config.get("solver_order"))
    return found == (METHODS[settings.method], wanted)


def scheduler_for(scheduler: Any, settings: SolverSettings) -> Any:
    """A scheduler with the solver of some settings and the flow of another scheduler: its shift and its prediction.

    Raises:
        WanlabError: the other scheduler is not of flow matching.
    """
    config = scheduler.config
    if not is_flow_matching(scheduler):
        raise WanlabError(
            f"solver needs a scheduler of flow matching, and the model has {type(scheduler).__name__} without"
            " use_flow_sigmas"
        )
    flow = {
        "num_train_timesteps": config["num_train_timesteps"],
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": config.get("flow_shift", config.get("shift", 1.0)),
        "solver_order": settings.order,
    }
    if settings.method == "euler":
        made = diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=flow["num_train_timesteps"],
            shift=flow["flow_shift"],  # by name: configurations made from this one's would lose it otherwise
        )
    elif settings.method == "dpm++":
        made = diffusers.DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++")
    else:
        made = diffusers.UniPCMultistepScheduler(**flow)
    made.__class__ = _making_fewer(type(made), settings.steps_percent)
    return made


def _making_fewer(base: Any, percent: float) -> type:
    """A scheduler class that makes a share of the steps, at the noise levels that UniPC has for their number."""

    class FewerSteps(base):
        timesteps: torch.Tensor

        @wraps(base.set_timesteps)
        def set_timesteps(self, num_inference_steps=None, *args, **kwargs):
            if num_inference_steps is None:
                return super().set_timesteps(num_inference_steps, *args, **kwargs)
            made, last = fewer(num_inference_steps, percent), 1 / self.config.num_train_timesteps
            levels = [1 - (1 - last) / made * step for step in range(made)]
            if "FlowMatch" in base.__name__:
                return super().set_timesteps(made, *args, **kwargs, sigmas=levels)  # which it shifts
            result = super().set_timesteps(made, *args, **kwargs)
            shift = self.config.flow_shift
            shifted = torch.tensor([shift * level / (1 + (shift - 1) * level) for level in levels])
            shifted = shifted.clamp(max=1 - 1e-6)  # the logarithm of the signal would be infinite
            self.sigmas = torch.cat([shifted, torch.zeros(1)])
            self.timesteps = (shifted * self.config.num_train_timesteps).to(self.timesteps)
            return result

    return named_as(FewerSteps, base)
