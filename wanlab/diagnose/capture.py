"""A profile of one generation as a Chrome trace: named ranges, one profiler step per denoising step, bounded size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.diagnose.ranges import ranges
from wanlab.diagnose.trace import SUFFIX
from wanlab.errors import WanlabError
from wanlab.measure.entry_points import standing_in

if TYPE_CHECKING:
    import torch

    from wanlab.models.generate import Model

MOST_EVENTS = 2_000_000
"""About 35 MB compressed, 10 s to read, and the most that Perfetto opens without trouble."""
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
    """Generate once under the profiler and write its trace; times in it are not to be quoted as latency.

    Profiler step 0 is everything up to the end of the first denoising step, the last one everything behind the
    last denoising step. The profiler holds about 1 KiB of host memory per event until the trace is written.

    Args:
        image, prompt, settings: as `Model.generate` takes them. Where all steps do not fit into `most_events`, as many
            are taken as do: all steps of an expert cost the same. The trace says so in its notes.
        folder: gets the file `<host>_<process>.<time>.pt.trace.json.gz`, which TensorBoard, Perfetto and HTA read.
        projections: as in `ranges`.
        shapes: record the operators' input shapes.
        memory: record allocations.
        python: record the Python stack; the file becomes several times larger.
        most_events: record about this many at most.

    Returns:
        The trace file.

    Raises:
        WanlabError: as `Model.generate`, another profiler is running, not even one step of each expert fits, or
            nothing was written.
    """
    import torch
    from torch.profiler import ProfilerAction, ProfilerActivity, profile, tensorboard_trace_handler

    if torch.autograd._profiler_enabled():
        raise WanlabError("another profiler is running; leave its block before capturing a trace")
    factor = (MEMORY_FACTOR if memory else 1.0) * (PYTHON_FACTOR if python else 1.0)
    settings["steps"], asked = _steps(model, settings, factor, most_events)
    folder = Path(folder)
    before = set(folder.glob(f"*{SUFFIX}"))
    activities = [ProfilerActivity.CPU]
    if torch.device(model.device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
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
            # HTA reads the rank of a trace here; of several processes PyTorch writes it, of one it does not.
            profiler.add_metadata_json(
                "distributedInfo", json.dumps({"backend": "none", "rank": 0, "world_size": 1})
            )
        made = model.generate(image, prompt, **settings)
        profiler.add_metadata_json("wanlab", json.dumps(_about(model, made.settings, made.wall_ms, asked)))
    written = sorted(set(folder.glob(f"*{SUFFIX}")) - before)
    if not written:
        raise WanlabError(f"the profiler wrote nothing to {folder}; is there room and may it be written to?")
    return written[-1]


def expected_events(model: Model, *, steps: int, frames: int | None = None, guidance: bool = True) -> int:
    """About how many events a trace of one generation has, without allocations and the Python stack.

    A call of a leaf module makes about `EVENTS_PER_CALL`; the causal VAE runs once per latent frame, an expert once per
    step and branch.
    """
    spec = model.spec
    latent_frames = ((frames or spec.defaults.frames) - 1) // spec.temporal_factor + 1
    branches = 2 if guidance else 1
    calls = 0
    for name, module in model.components.items():
        half = {"vae_encoder": "encoder", "vae_decoder": "decoder"}.get(name)
        leaves = _leaves(getattr(module, half, module) if half else module)
        if name.startswith("expert"):
            calls += leaves * branches * sum(row == name for row in model.schedule(steps)["component"])
        else:
            calls += leaves * (latent_frames if half else branches)
    device = "cuda" if str(model.device).startswith("cuda") else "cpu"
    return calls * EVENTS_PER_CALL[device]


def _leaves(module: Any) -> int:
    import torch

    if not isinstance(module, torch.nn.Module):
        return 0  # an engine is one call
    return sum(1 for part in module.modules() if next(part.children(), None) is None)


def _steps(model: Model, settings: dict, factor: float, most: int) -> tuple[int, int]:
    """The steps to run, as many as fit of those that were asked for, and these."""
    scale = settings.get("guidance_scale")
    guidance = (model.spec.defaults.guidance_scale if scale is None else scale) > 1
    asked = settings.get("steps")
    asked = model.spec.defaults.steps if asked is None else asked

    def events(steps: int) -> float:
        return factor * expected_events(model, steps=steps, frames=settings.get("frames"), guidance=guidance)

    if not isinstance(asked, int) or asked < 1 or events(asked) <= most:
        return asked, asked  # what is no number of steps, `generate` says
    experts = {name for name in model.components if name.startswith("expert")}
    for steps in range(asked - 1, 0, -1):
        if events(steps) <= most and set(model.schedule(steps)["component"]) == experts:
            return steps, asked
    raise WanlabError(
        f"a trace of one step of each expert would have more than most_events={most:,} events: "
        "take fewer frames, leave out memory and python, or raise most_events"
    )


def _about(model: Model, settings: dict, wall_ms: float, asked_steps: int) -> dict[str, Any]:
    """What a reader of the trace wants to know about the generation."""
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
        "weights_bytes": {
            name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in modules.items()
            if hasattr(part, "parameters")
        },
    }


def _after_each_step(pipeline, note: Callable[[], None]):
    """A context in which `note` is called behind every step of the pipeline's scheduler, if it has one."""

    def wrap(call: Callable) -> Callable:
        def step(*args, **kwargs):
            result = call(*args, **kwargs)
            note()
            return result

        return step

    if vars(pipeline).get("scheduler") is None:
        return nullcontext()
    return standing_in(pipeline, {"scheduler": {"step": wrap}})
