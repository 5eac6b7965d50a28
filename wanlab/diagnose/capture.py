"""A profile of one generation as a Chrome trace: named ranges, one profiler step per denoising step."""

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
    from wanlab.models.generate import Model


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
    **settings,
) -> Path:
    """Generate once under the profiler and write its trace; times in it are not to be quoted as latency.

    Profiler step 0 is everything up to the end of the first denoising step, the last one everything behind the
    last denoising step.

    Args:
        image, prompt, settings: as `Model.generate` takes them.
        folder: gets the file `<host>_<process>.<time>.pt.trace.json.gz`, which TensorBoard, Perfetto and HTA read.
        projections: as in `ranges`.
        shapes: record the operators' input shapes.
        memory: record allocations.
        python: record the Python stack; the file becomes several times larger.

    Returns:
        The trace file.

    Raises:
        WanlabError: as `Model.generate`, another profiler is running, or nothing was written.
    """
    import torch
    from torch.profiler import ProfilerAction, ProfilerActivity, profile, tensorboard_trace_handler

    if torch.autograd._profiler_enabled():
        raise WanlabError("another profiler is running; leave its block before capturing a trace")
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
        # HTA reads the rank of a trace here, and a single process writes none.
        profiler.add_metadata_json(
            "distributedInfo", json.dumps({"backend": "none", "rank": 0, "world_size": 1})
        )
        model.generate(image, prompt, **settings)
    written = sorted(set(folder.glob(f"*{SUFFIX}")) - before)
    if not written:
        raise WanlabError(f"the profiler wrote nothing to {folder}; is there room and may it be written to?")
    return written[-1]


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
