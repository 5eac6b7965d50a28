"""Memory and load time of one configuration in a process of its own, which holds nothing else.

Two configurations in one process share libraries, allocator and each other's leftovers, so that their peaks cannot be
told apart there.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlab import measure, models
from wanlab.configuration.configuration import load_configuration, save_configuration
from wanlab.configuration.configure import Configured, open_files
from wanlab.measure.memory import in_own_process
from wanlab.models.loading import resolve


def measure_isolated(configured: Configured, image: Any, prompt: str, **settings: Any) -> dict[str, float]:
    """Open a configuration from its files in a fresh process, and generate once.

    Args:
        configured: from `configure`. Its model's name, device, dtype and weights are used again.
        image: first frame, `[H, W, 3]` in [0, 1].
        prompt, settings: as `Model.generate` takes them; JSON values only.

    Returns:
        `peak_memory_gib` during the generation (on a GPU what this process added to the device, on the CPU its resident
        set), `load_ms` (the networks alone: weights into PyTorch and the plan applied, or files into sessions),
        `first_video_ms` (with all that happens only once, such as compiling).

    Raises:
        WanlabError: the process failed; its last line is the reason.
    """
    model = configured.original
    with tempfile.TemporaryDirectory(prefix="wanlab-isolated-") as folder:
        np.save(Path(folder) / "image.npy", np.asarray(image))
        order = {
            "model": model.spec.name if model.spec.name in models.names() else str(model.spec.source),
            "load": {
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "weights": model.load.weights,
            },
            "configuration": str(
                save_configuration(configured.configuration, Path(folder) / "configuration.yaml")
            ),
            "files": configured.files,
            "image": str(Path(folder) / "image.npy"),
            "prompt": prompt,
            "settings": {name: value for name, value in settings.items() if value is not None},
        }
        return in_own_process("wanlab.configuration.isolated", order, configured.label)


def _measure(order: dict[str, Any]) -> dict[str, float]:
    device = resolve(order["load"]["device"], "auto")[0]
    image = np.load(order["image"], allow_pickle=False)
    configuration = load_configuration(order["configuration"])
    with measure.peak_memory(device) as whole:
        model = models.load(order["model"], **order["load"])
        opened = open_files(model, configuration, order["files"], in_place=True)
        used, load_ms = opened.model, opened.load_ms
        del model, opened
        gc.collect()  # networks that engines replaced are freed
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with measure.peak_memory(device) as memory:
            generation = used.generate(image, order["prompt"], **order["settings"])
    # A GPU may hold other processes, which were there before.
    before = whole.start_gib if device.type == "cuda" else 0.0
    return {
        "peak_memory_gib": memory.peak_gib - before,
        "load_ms": load_ms,
        "first_video_ms": generation.wall_ms,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
