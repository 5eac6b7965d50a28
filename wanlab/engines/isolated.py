"""Memory and load time of one variant in a process of its own.

Two variants in one process share libraries, allocator and each other's leftovers, so their peaks cannot be told
apart there. A fresh process loads the model (and its engines), makes one video, and reports.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wanlab import measure, models
from wanlab.core.child import in_own_process
from wanlab.engines.onnxruntime import load_engines
from wanlab.engines.pipeline import use
from wanlab.models.loading import resolve


def measure_isolated(
    model: str,
    image,
    prompt: str,
    *,
    engines: str | os.PathLike | None = None,
    device: str = "auto",
    **settings,
) -> dict[str, float]:
    """Load and generate once in a fresh Python process.

    Args:
        model: registry name or folder.
        image: first frame, float `[H, W, 3]` in [0, 1].
        prompt, settings: as `Model.generate` takes them; JSON values only.
        engines: folder of converted networks; None runs eager PyTorch.
        device: as `models.load` takes it.

    Returns:
        `peak_memory_gib` (whole device on a GPU, resident set on the CPU), `load_ms` (weights, then engines),
        `first_video_ms` (with everything that happens only once).

    Raises:
        WanlabError: the process failed; its last line is the reason.
    """
    with tempfile.TemporaryDirectory(prefix="wanlab-isolated-") as folder:
        np.save(Path(folder) / "image.npy", np.asarray(image))
        order = {
            "model": str(model),
            "image": str(Path(folder) / "image.npy"),
            "prompt": prompt,
            "engines": None if engines is None else str(engines),
            "device": str(device),
            "settings": settings,
        }
        return in_own_process("wanlab.engines.isolated", order, str(model))


def _measure(order: dict) -> dict[str, float]:
    with measure.peak_memory(resolve(order["device"], "auto")[0]) as memory:
        loaded = models.load(order["model"], device=order["device"])
        load_ms = loaded.load.time_ms
        if order["engines"]:
            start = time.perf_counter()
            loaded = use(loaded, load_engines(order["engines"]))
            load_ms += (time.perf_counter() - start) * 1e3
        image = np.load(order["image"], allow_pickle=False)
        generation = loaded.generate(image, order["prompt"], **order["settings"])
    return {
        "peak_memory_gib": memory.peak_gib,
        "load_ms": load_ms,
        "first_video_ms": generation.wall_ms,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
