"""Memory and load time of one configuration in a process of its own, which holds nothing else."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlab import engines, measure, models
from wanlab.core.child import in_own_process
from wanlab.models.loading import resolve
from wanlab.precision.apply import apply_plan
from wanlab.precision.calibration import read_calibration
from wanlab.precision.configure import Configured
from wanlab.precision.plan import save_plan
from wanlab.precision.plan_engines import load_plan_engines


def measure_configured(configured: Configured, image, prompt: str, **settings: Any) -> dict[str, float]:
    """Come to a configuration from its files in a fresh process, and generate once.

    Args:
        configured: from `configure`. Its model's name, device, dtype and weights are used again.
        image: first frame, `[H, W, 3]` in [0, 1].
        prompt, settings: as `Model.generate` takes them.

    Returns:
        `peak_memory_gib` during the generation (on a GPU what this process added to the device, on the CPU its resident
        set), `load_ms` (the networks alone: weights into PyTorch and the plan applied, or files into sessions),
        `first_video_ms` (with all that happens only once, such as compiling).

    Raises:
        WanlabError: the process failed; its last line is the reason.
    """
    model = configured.original
    with tempfile.TemporaryDirectory(prefix="wanlab-alone-") as folder:
        np.save(Path(folder) / "image.npy", np.asarray(image))
        plan = None
        if configured.rules is not None:
            plan = str(save_plan(configured.rules, Path(folder) / "plan.yaml"))
        order = {
            "model": model.spec.name if model.spec.name in models.names() else str(model.spec.source),
            "load": {
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "weights": model.load.weights,
            },
            "engine": configured.engine,
            "plan": plan,
            "files": configured.files,
            "image": str(Path(folder) / "image.npy"),
            "prompt": prompt,
            "settings": {name: value for name, value in settings.items() if value is not None},
        }
        return in_own_process("wanlab.precision.isolated", order, configured.label)


def _measure(order: dict) -> dict[str, float]:
    device = resolve(order["load"]["device"], "auto")[0]
    image = np.load(order["image"], allow_pickle=False)
    with measure.peak_memory(device) as whole:
        model, load_ms = _opened(models.load(order["model"], **order["load"]), order)
        gc.collect()  # what an engine stands for is let go
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with measure.peak_memory(device) as memory:
            generation = model.generate(image, order["prompt"], **order["settings"])
    # A GPU may hold other processes, which were there before.
    before = whole.start_gib if device.type == "cuda" else 0.0
    return {
        "peak_memory_gib": memory.peak_gib - before,
        "load_ms": load_ms,
        "first_video_ms": generation.wall_ms,
    }


def _opened(model, order: dict):
    """The configuration from its files, and the milliseconds from files to networks that can run."""
    files, begin = order["files"], time.perf_counter()
    if order["engine"] == "onnxruntime":
        provider = "cuda" if model.device.type == "cuda" else "cpu"
        opened = engines.load_engines(files["graphs"], files["plain"], provider=provider)
        if files["plan_graphs"]:
            opened |= load_plan_engines(files["plan_graphs"], provider)
        return engines.use(model, opened), sum(engine.load_ms for engine in opened.values())
    load_ms = sum(part.time_ms for part in model.load.parts)
    if order["plan"]:
        ranges = {name: read_calibration(path) for name, path in files["calibrations"].items()}
        model = apply_plan(model, order["plan"], ranges, in_place=True).model
        load_ms += (time.perf_counter() - begin) * 1e3
    return (models.compile_blocks(model) if order["engine"] == "compiled" else model), load_ms


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
