"""The layers of a component in ONNX Runtime, measured here and now."""

from __future__ import annotations

import gc
import json
import os
import subprocess
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

LARGE_BYTES = 4 * 2**30
"""Above this the optimised graph, weights and all, is not written: the graph that was read serves instead."""


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

    The network is loaded, exported (kept files that are still true are used again) and let go before anything is timed.
    Two levels are profiled in turn, forwards and backwards, so that a drift of the machine falls on both alike and shows
    as noise.

    Args:
        folder: of graphs and profiles (the last of each level); a folder of the model's name is made in it.
        model, device, dtype, weights: as `models.load`. component: None takes the first expert.
        levels: of `OrtEngine`'s optimisation, one or two. runs: that count, of each.

    Returns:
        The graph as exported, and the engine of each level; None where only one was asked for.

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
        torch.cuda.empty_cache()  # what PyTorch keeps, ONNX Runtime cannot have
    source = read_onnx(path, name=f"{component} as exported")
    order = [*levels, *reversed(levels)] if len(levels) > 1 else list(levels)
    settings: dict[str, Any] = {
        "provider": provider,
        "runs": max(runs * len(levels) // len(order), 2),
        "seed": seed,
    }
    found: dict[str, EngineLayers] = {}
    for level in order:
        made = profile_engine(path, folder / f"{component}.{kind}", optimization=level, **settings)
        found[level] = merged(found[level], made) if level in found else made
    return source, found[levels[0]], found[levels[1]] if len(levels) > 1 else None


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
    """Run a graph in ONNX Runtime under its own profiler, and once more without for the time of the whole.

    On CUDA the profile is taken in a process of its own with `CUDA_LAUNCH_BLOCKING=1`: otherwise the times of nodes are
    those of launches. The whole engine is timed without either.

    Args:
        path: graph made by `wanlab.export.export`.
        folder: for `<optimization>.profile.json` and `<optimization>.onnx`, the graph as ONNX Runtime optimised it
            (unless it is over 4 GiB).
        provider, optimization, threads: as in `OrtEngine`.
        runs: that count, after `warmup`. size: batch, height, width, frames, text_tokens of the inputs.

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
    _blocking(order) if provider == "cuda" else capture(order)
    engine = OrtEngine(
        path, provider=provider, optimization=optimization, threads=threads, allow_cpu_fallback=True
    )
    feeds = {name: value.to(engine.device) for name, value in random_feeds(engine, seed=seed, **size).items()}
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
        # `OrtEngine.profile` warms up once itself.
        warmup=warmup + 1,
    )
    return layers.with_latency(whole.median)


def capture(order: dict[str, Any]) -> None:
    """Take a profile, and write the optimised graph where one is asked for."""
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
    how = {
        "launch_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", "0"),
        "optimization": order["optimization"],
    }
    events.append({"cat": MARK, "name": MARK, "ph": "i", "ts": 0, "args": how})
    record.write_text(json.dumps(events), encoding="utf-8")
    if order["graph"]:
        optimised_graph(
            order["path"], order["graph"], provider=order["provider"], optimization=order["optimization"]
        )


def _blocking(order: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanlab.engine_report.profile"],
        input=json.dumps(order),
        env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise WanlabError(f"profiling {Path(order['path']).name} in a process of its own failed: {last}")


if __name__ == "__main__":
    capture(json.load(sys.stdin))
