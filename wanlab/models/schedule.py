"""The denoising steps of a run, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.models.spec import ModelSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def step_table(pipeline: DiffusionPipeline, spec: ModelSpec, steps: int) -> list[dict[str, object]]:
    """Rows step, timestep, sigma, snr, component; see `Model.schedule`."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps, device="cpu")
    config = scheduler.config
    training_steps = config.get("num_train_timesteps", 1000)
    flow = bool(config.get("use_flow_sigmas")) or "FlowMatch" in type(scheduler).__name__
    timesteps = [float(t) for t in scheduler.timesteps]
    sigmas = getattr(scheduler, "sigmas", None)
    experts = [name for name in spec.components if name.startswith("expert")]
    rows = []
    for step, timestep in enumerate(timesteps):
        sigma = float(sigmas[step]) if sigmas is not None else timestep / training_steps
        low = spec.boundary_ratio is not None and timestep < spec.boundary_ratio * training_steps
        rows.append(
            {
                "step": step,
                "timestep": timestep,
                "sigma": sigma,
                "snr": ((1 - sigma) / sigma if flow else 1 / sigma) ** 2 if sigma else float("inf"),
                "component": experts[-1] if low else experts[0],
            }
        )
    return rows
