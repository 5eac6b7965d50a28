"""Measures the layers of a component in ONNX Runtime on this machine."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanlab import measure, models
from wanlab.core.errors import WanlabError
from wanlab.engine_report.from_onnx import read_onnx
from wanlab.engine_report.from_onnxruntime import MARK, merged, optimised_graph, read_ort_profile
from wanlab.engine_report.layers import EngineLayers
from wanlab.engines.onnxruntime import OrtEngine, choose_provider
from wanlab.export.components import component_spec, random_feeds
from wanlab.export.export import export
from wanlab.export.graph import file_bytes
from wanlab.measure.memory import in_own_process

LARGE_BYTES = 4 * 2**30
"""Size of weights above which the optimised graph is not written; the exported graph is used instead."""


def profile_levels(
    folder: str | os.PathLike,
    model: str,
    component: str | None = None,
    *,
    levels: Sequence[str] = ("basic", "all"),
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "pretrained",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    runs: int = 10,
    seed: int = 0,
) -> tuple[EngineLayers, EngineLayers, EngineLayers | None]:
    """One network of a model at one size, as a graph and in ONNX Runtime at one or two levels of optimisation.

    The network is loaded, exported (current files are reused) and freed before the timing. Two levels are profiled
    alternately, forwards and backwards, so that a drift of the machine affects both equally and shows as noise.

    Args:
        folder: folder for a folder with the model's name, with graphs and profiles (the last of each level).
        model, device, dtype, weights: as in `models.load`.
        component: name of the component; None takes the first expert.
        levels: one or two levels of optimisation as in `OrtEngine`.
        height, width, frames: size of the clip; the model's default where None.
        runs: number of timed runs of each level.
        seed: seed of weights and inputs.

    Returns:
        The graph as exported, and the engine of each level; None in place of a second level that was not requested.

    Raises:
        WanlabError: as `models.load`, `export` and `OrtEngine`, or another number of levels.
    """
    if not 1 <= len(levels) <= 2:
        raise WanlabError(f"{len(levels)} levels of optimisation were given; give one, or two to compare")
    spec = models.get(model)
    component = component or next(name for name in spec.components if name.startswith("expert"))
    loaded = models.load(spec, device=device, dtype=dtype, weights=weights, seed=seed, components=[component])
    provider = "cuda" if loaded.device.type == "cuda" else "cpu"
    kind = str(component_spec(loaded, component).network.dtype).removeprefix("torch.")
    folder = Path(folder) / spec.name
    path = folder / f"{component}.{kind}.onnx"
    export(loaded, component, path, dynamic=False, height=height, width=width, frames=frames)
    del loaded
    gc.collect()
    if provider == "cuda":
        torch.cuda.empty_cache()  # memory that PyTorch caches is not available to ONNX Runtime
    source = read_onnx(path, name=f"{component} as exported")
    order = [*levels, *reversed(levels)] if len(levels) > 1 else list(levels)
    settings: dict[str, Any] = {
        "provider": provider,
        "runs": max(runs * len(levels) // len(order), 2),
        "seed": seed,
    }
    profiles: dict[str, EngineLayers] = {}
    for level in order:
        layers = profile_engine(path, folder / f"{component}.{kind}", optimization=level, **settings)
        profiles[level] = merged(profiles[level], layers) if level in profiles else layers
    return source, profiles[levels[0]], profiles[levels[1]] if len(levels) > 1 else None


def profile_engine(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    provider: str = "auto",
    optimization: str = "all",
    threads: int | None = None,
    runs: int = 10,
    warmup: int = 2,
    seed: int = 0,
    **size: int | None,
) -> EngineLayers:
    """Run a graph in ONNX Runtime with its profiler, and again without it for the time of the whole engine.

    On CUDA the profile is taken in another process with `CUDA_LAUNCH_BLOCKING=1`: otherwise the times of nodes would be
    times of launches. The whole engine is timed without the profiler and without this setting.

    Args:
        path: graph from `wanlab.export.export`.
        folder: folder for `<optimization>.profile.json` and `<optimization>.onnx`, the graph as ONNX Runtime optimised it
            (unless it is over 4 GiB).
        provider, optimization, threads: as in `OrtEngine`.
        runs: number of timed runs.
        warmup: number of runs before them.
        seed: seed of the inputs.
        size: batch, height, width, frames, text_tokens of the inputs.

    Raises:
        WanlabError: as `OrtEngine` and `random_feeds`, or the process failed.
    """
    folder, provider = Path(folder), choose_provider(provider)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{optimization}.profile.json"
    order: dict[str, Any] = {
        "path": str(path), "record": str(record), "provider": provider, "optimization": optimization, "seed": seed,
        "threads": threads, "runs": runs + warmup, "size": size, "graph": "",
    }  # fmt: skip
    if file_bytes(Path(path)) <= LARGE_BYTES:
        order["graph"] = str(folder / f"{optimization}.onnx")
    if provider == "cuda":
        blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
        in_own_process("wanlab.engine_report.profile", order, Path(path).name, environment=blocking)
    else:
        capture(order)
    engine = OrtEngine(
        path, provider=provider, optimization=optimization, threads=threads, allow_cpu_fallback=True
    )
    feeds = {
        name: value.to(engine.device)
        for name, value in random_feeds(engine, seed=seed, shapes=None, **size).items()
    }
    whole = measure.time_ms(
        lambda: engine.run(feeds),
        warmup=warmup,
        iterations=runs,
        device=engine.device,
        progress=False,
        label=engine.name,
    )
    layers = read_ort_profile(
        record,
        order["graph"] or path,
        name=f"{engine.name} {optimization}",
        # `OrtEngine.profile` has one warm-up run of its own.
        warmup=warmup + 1,
    )
    return layers.with_latency(whole.median)


def capture(order: dict[str, Any]) -> None:
    """Write a profile, and the optimised graph if `order["graph"]` has its path."""
    engine = OrtEngine(
        order["path"],
        provider=order["provider"],
        optimization=order["optimization"],
        threads=order["threads"],
        allow_cpu_fallback=True,
    )
    feeds = random_feeds(engine, seed=order["seed"], **order["size"])
    record = engine.profile(feeds, order["record"], runs=order["runs"])
    events = json.loads(record.read_text(encoding="utf-8"))
    settings = {
        "launch_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", "0"),
        "optimization": order["optimization"],
    }
    events.append({"cat": MARK, "name": MARK, "ph": "i", "ts": 0, "args": settings})
    record.write_text(json.dumps(events), encoding="utf-8")
    if order["graph"]:
        optimised_graph(
            order["path"], order["graph"], provider=order["provider"], optimization=order["optimization"]
        )


if __name__ == "__main__":
    capture(json.load(sys.stdin))
    print("{}")  # no result besides the files
