"""What each lever on memory saves, and what it costs: measured by pulling it and generating again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from wanlab.diagnose.capture import capture
from wanlab.diagnose.trace import read_trace
from wanlab.models.loading import load
from wanlab.models.pipeline import Generation, Model
from wanlab.models.taps import intercept_calls

GIB = 1 << 30
QUERY_CHUNKS = 4


class _NotHere(Exception):
    """A lever that this model or machine lacks, with the reason."""


@dataclass(frozen=True)
class _Taken:
    peak_bytes: int
    time_ms: float
    video: Any


def memory_options(
    model: Model, image: Any, prompt: str, *, progress: bool = True, **settings
) -> pd.DataFrame:
    """Pull one lever after the other and generate each time; the model is afterwards as it was.

    The untouched model is measured twice, first and last: how far these lie apart is the noise of time and memory, and
    how far their videos do the floor of the divergence. Time is taken without a profiler.

    Args:
        image, prompt, settings: as `Model.generate` takes them.

    Returns:
        DataFrame: lever, state ("baseline", "measured", "not here"), reason, peak_gib (on a GPU the allocator's peak, on a
        CPU the profiler's allocations and the weights), saved_gib, noise_gib, saves (whether it is beyond the noise),
        time_ms, time_ratio (to the untouched model), noise_percent (of the time), psnr_db (of the video against the
        untouched one's; infinity where they are equal), floor_db (the same between the two untouched).

    Raises:
        WanlabError: what `Model.generate` refuses.
    """
    take = partial(_take, image=image, prompt=prompt, settings=settings)
    found: dict[str, _Taken | str] = {}
    bar = tqdm([*_LEVERS.items()], desc="levers", unit="lever", leave=False, disable=not progress)
    take(model)  # warm
    first = take(model)
    for name, lever in bar:
        bar.set_postfix_str(name)
        try:
            with lever(model, settings) as pulled:
                found[name] = take(pulled or model)
        except _NotHere as reason:
            found[name] = str(reason)
    again = take(model)
    noise = abs(first.peak_bytes - again.peak_bytes) / GIB
    time_ms, floor = (first.time_ms + again.time_ms) / 2, _psnr(first.video, again.video)
    noise_percent = 100 * abs(first.time_ms / again.time_ms - 1)
    base = min(first.peak_bytes, again.peak_bytes)

    def row(name: str, taken: _Taken, state: str) -> dict:
        saved = (base - taken.peak_bytes) / GIB
        return {
            "lever": name, "state": state, "reason": "", "peak_gib": taken.peak_bytes / GIB, "saved_gib": saved,
            "noise_gib": noise, "saves": saved > noise, "time_ms": taken.time_ms,
            "time_ratio": taken.time_ms / time_ms, "noise_percent": noise_percent,
            "psnr_db": _psnr(first.video, taken.video), "floor_db": floor,
        }  # fmt: skip

    rows = [row("untouched", first, "baseline"), row("untouched again", again, "baseline")]
    for name, taken in found.items():
        missing = {"lever": name, "state": "not here", "reason": taken, "saves": False}
        rows.append(missing if isinstance(taken, str) else row(name, taken, "measured"))
    return pd.DataFrame(rows)


def memory_advice(options: pd.DataFrame | None) -> str:
    """The option that saves most, as a sentence; empty where none was applied, or none saves more than the noise."""
    useful = options[options["saves"]] if options is not None else pd.DataFrame()
    if useful.empty:
        return ""
    best = useful.loc[useful["saved_gib"].idxmax()]
    return f"Most is saved by {best['lever']}: {best['saved_gib']:.2f} GiB at {best['time_ratio']:.2f}x the time."


def _take(model: Model, *, image: Any, prompt: str, settings: dict) -> _Taken:
    """Peak, time and video of a generation."""
    made, peak = _with_peak(model, lambda: model.generate(image, prompt, **settings))
    if peak is None:
        with tempfile.TemporaryDirectory() as folder:
            path = capture(model, image, prompt, folder, memory=True, shapes=False, **settings)
            sizes = read_trace(path).memory["size_bytes"]
        peak = _weights_bytes(model) + int(max(0, sizes.cumsum().max()))
    return _Taken(peak, made.wall_ms, made.video)


def _with_peak(model: Model, generate: Callable[[], Generation]) -> tuple[Generation, int | None]:
    """A generation and the CUDA allocator's peak in it, less what it held for other models; no peak on a CPU."""
    if model.device.type != "cuda":
        return generate(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    others = torch.cuda.memory_allocated(model.device) - _weights_bytes(model, model.device)
    made = generate()
    return made, torch.cuda.max_memory_allocated(model.device) - max(0, others)


def _weights_bytes(model: Model, device: Any = None) -> int:
    """Weights of a model, those on one device if asked; shared ones once."""
    tensors = {
        tensor.data_ptr(): tensor
        for part in model.components.values()
        if hasattr(part, "parameters")
        for tensor in [*part.parameters(), *part.buffers()]
        if device is None or tensor.device == device
    }
    return sum(tensor.nbytes for tensor in tensors.values())


def _psnr(ours: Any, theirs: Any) -> float:
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


@contextmanager
def _half_precision(model: Model, settings: dict) -> Iterator[Model]:
    if model.dtype != torch.float32:
        raise _NotHere(f"the weights are {str(model.dtype).removeprefix('torch.')} already")
    if any(engine != "eager" for engine in model.engines.values()):
        raise _NotHere("an engine keeps its own precision")
    yield load(model.spec, device=model.device, dtype="bfloat16", weights=model.load.weights)


@contextmanager
def _vae_tiling(model: Model, settings: dict) -> Iterator[None]:
    vae = getattr(model.pipeline, "vae", None)
    if not hasattr(vae, "enable_tiling") or not hasattr(vae, "tile_sample_min_height"):
        raise _NotHere("its VAE has no tiles")
    names = ("use_tiling", *(f"tile_sample_{k}_{d}" for k in ("min", "stride") for d in ("height", "width")))
    before = {name: getattr(vae, name) for name in names}
    sides = {d: settings.get(d) or getattr(model.spec.defaults, d) for d in ("height", "width")}
    if all(sides[d] <= before[f"tile_sample_min_{d}"] for d in sides):
        # The usual tile covers this video: half of it, with an overlap of a quarter.
        sizes = {f"tile_sample_min_{d}": max(32, sides[d] // 2 // 16 * 16) for d in sides}
        sizes |= {f"tile_sample_stride_{d}": sizes[f"tile_sample_min_{d}"] * 3 // 4 // 8 * 8 for d in sides}
        vae.enable_tiling(**sizes)
    else:
        vae.enable_tiling()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def _offload_experts(model: Model, settings: dict) -> Iterator[None]:
    """The expert whose turn it is not lies on the host."""
    if "expert_low" not in model.spec.components:
        raise _NotHere("one expert: it is needed at every step")
    if model.device.type == "cpu":
        raise _NotHere("without a GPU everything is on the host already")
    parts = {name: model.component(name) for name in ("expert_high", "expert_low")}
    if not all(isinstance(part, torch.nn.Module) for part in parts.values()):
        raise _NotHere("an expert is an engine that owns its weights")

    def bringing(name: str) -> Callable:
        def wrap(call: Callable) -> Callable:
            def called(*args, **kwargs):
                for other, part in parts.items():
                    if other != name:
                        part.to("cpu")
                parts[name].to(model.device)
                return call(*args, **kwargs)

            return called

        return wrap

    parts["expert_low"].to("cpu")
    try:
        with intercept_calls(
            model.pipeline, {model.spec.part_of(name): {"__call__": bringing(name)} for name in parts}
        ):
            yield
    finally:
        for part in parts.values():
            part.to(model.device)


@contextmanager
def _sliced_attention(model: Model, settings: dict) -> Iterator[None]:
    """Attention over a quarter of the queries at a time: the same sums, smaller workspaces."""
    whole = functional.scaled_dot_product_attention

    def sliced(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None or kwargs.get("is_causal"):
            return whole(query, key, value, attn_mask=attn_mask, **kwargs)
        chunks = query.chunk(QUERY_CHUNKS, dim=-2)
        return torch.cat([whole(chunk, key, value, **kwargs) for chunk in chunks], dim=-2)

    functional.scaled_dot_product_attention = sliced
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = whole


def _only_said(reason: str) -> Callable:
    @contextmanager
    def lever(model: Model, settings: dict) -> Iterator[None]:
        raise _NotHere(reason)
        yield

    return lever


_LEVERS: dict[str, Callable] = {
    "bfloat16 weights": _half_precision,
    "VAE tiling": _vae_tiling,
    "expert offload": _offload_experts,
    "attention in query slices": _sliced_attention,
    "VAE slicing": _only_said("it divides a batch, and there is one video"),
    "guidance branches one by one": _only_said("the pipeline runs them one after the other already"),
}
