"""Memory options: what each saves and costs, measured by a generation with the option applied."""

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

from wanlab.core.answer import MOST_TILES, Answer, answer, step
from wanlab.core.words import size_text
from wanlab.diagnose.capture import capture
from wanlab.diagnose.memory.account import MemoryAccount
from wanlab.diagnose.trace import read_trace
from wanlab.measure.load import metered
from wanlab.models.loading import load
from wanlab.models.pipeline import Generation, Model
from wanlab.models.taps import intercept_calls

GIB = 1 << 30
QUERY_CHUNKS = 4
BFLOAT16 = "bfloat16 weights"
SMALLEST_GIB = 0.0005  # a smaller difference of two equal runs is none


class _Unavailable(Exception):
    """A memory option that this model or machine does not have, with the reason."""


@dataclass(frozen=True)
class _Measured:
    peak_bytes: int
    time_ms: float
    video: Any


def memory_options(
    model: Model, image: Any, prompt: str, *, progress: bool = True, **settings
) -> pd.DataFrame:
    """Apply one memory option after another and generate with each; the model is restored afterwards.

    The unchanged model is measured twice, first and last: the difference of the two is the noise of time and memory, and
    the difference of their videos is the noise floor of the divergence. Time is measured without a profiler.

    Args:
        image, prompt, settings: arguments of `Model.generate`.

    Returns:
        DataFrame: option, state ("baseline", "measured", "not here"), reason, peak_gib (on a GPU the
        allocator's peak, on a CPU the profiler's allocations and the weights), saved_gib, noise_gib, saves (whether the
        saving is above the noise), time_ms, time_ratio (to the unchanged model), noise_percent (of the time), psnr_db (to
        the unchanged model's video; infinity where they are equal), floor_db (the same between the two unchanged runs).

    Raises:
        WanlabError: an error of `Model.generate`.
    """
    take = partial(_take, image=image, prompt=prompt, settings=settings)
    results: dict[str, _Measured | str] = {}
    bar = tqdm([*_OPTIONS.items()], desc="memory options", unit="option", leave=False, disable=not progress)
    take(model)  # warm-up
    with metered(model.device):
        first = take(model)
        for name, option in bar:
            bar.set_postfix_str(name)
            try:
                with option(model, settings) as changed:
                    results[name] = take(changed or model)
            except _Unavailable as reason:
                results[name] = str(reason)
        again = take(model)
    noise = abs(first.peak_bytes - again.peak_bytes) / GIB
    time_ms, floor = (first.time_ms + again.time_ms) / 2, _psnr(first.video, again.video)
    noise_percent = 100 * abs(first.time_ms / again.time_ms - 1)
    base = min(first.peak_bytes, again.peak_bytes)

    def row(name: str, result: _Measured, state: str) -> dict:
        saved = (base - result.peak_bytes) / GIB
        return {
            "option": name, "state": state, "reason": "", "peak_gib": result.peak_bytes / GIB, "saved_gib": saved,
            "noise_gib": noise, "saves": saved > noise, "time_ms": result.time_ms,
            "time_ratio": result.time_ms / time_ms, "noise_percent": noise_percent,
            "psnr_db": _psnr(first.video, result.video), "floor_db": floor,
        }  # fmt: skip

    rows = [row("untouched", first, "baseline"), row("untouched again", again, "baseline")]
    for name, result in results.items():
        missing = {"option": name, "state": "not here", "reason": result, "saves": False}
        rows.append(missing if isinstance(result, str) else row(name, result, "measured"))
    return pd.DataFrame(rows)


def memory_answer(account: MemoryAccount, options: pd.DataFrame | None = None, caveat: str = "") -> Answer:
    """What the peak is made of, and the option that lowers it most.

    Args:
        account: the peak. options: from `memory_options`; None where they were not measured.
        caveat: sentence that stands first below the headline, such as that of `trace_caveat`.
    """
    useful = options[options["saves"]] if options is not None else pd.DataFrame()
    tiles = list(account.tiles)
    if options is None:
        following = step("also measures what each option saves", "14_memory")
        return answer(account.headline, caveat, next=following, tiles=tuple(tiles[:MOST_TILES]))
    noise_gib = float(options["noise_gib"].max())
    apart = f"two equal runs differ by {size_text(noise_gib * GIB)}"
    if noise_gib < SMALLEST_GIB:
        apart = "two equal runs have the same peak"
    if useful.empty:
        head = f"{account.headline} No option that was tried lowers it: {apart}."
        following = step("ranks what to change besides memory", "15_triage")
        return answer(head, caveat, next=following, tiles=tuple(tiles[:MOST_TILES]))
    best = useful.loc[useful["saved_gib"].idxmax()]
    saved = size_text(best["saved_gib"] * GIB)
    head = f"{account.headline} {best['option'][:1].upper()}{best['option'][1:]} would lower it most, by {saved}; {apart}."
    untouched = f"a video takes {best['time_ratio']:.2f} times as long (equal runs differ by {best['noise_percent']:.0f} %)"
    tiles = [tiles[0], (f"saved by {best['option']}", saved, apart), *tiles[1:3]]
    noise = f"of the unchanged model's; noise {best['noise_percent']:.0f} %"
    tiles.append(("time with that", f"{best['time_ratio']:.2f}×", noise))
    return answer(
        head,
        caveat,
        f"With {best['option']} {untouched}. {_cost(best)}",
        next=step("measures what it does to quality", "40_quality", technique="bfloat16")
        if best["option"] == BFLOAT16
        else step("says whether memory is the limit, or time", "15_triage"),
        tiles=tuple(tiles[:MOST_TILES]),
    )


def _cost(best: pd.Series) -> str:
    """What an option does to the video."""
    if best["psnr_db"] == float("inf"):
        return "It gives the same video, bit by bit."
    return f"It changes the video: PSNR {best['psnr_db']:.0f} dB to the unchanged model's."


def _take(model: Model, *, image: Any, prompt: str, settings: dict) -> _Measured:
    """Measure peak, time and video of a generation."""
    generation, peak = _with_peak(model, lambda: model.generate(image, prompt, **settings))
    if peak is None:
        with tempfile.TemporaryDirectory() as folder:
            path = capture(model, image, prompt, folder, memory=True, shapes=False, **settings)
            sizes = read_trace(path).memory["size_bytes"]
        peak = _weights_bytes(model) + int(max(0, sizes.cumsum().max()))
    return _Measured(peak, generation.wall_ms, generation.video)


def _with_peak(model: Model, generate: Callable[[], Generation]) -> tuple[Generation, int | None]:
    """A generation and the CUDA allocator's peak in it, without the memory of other models; no peak on a CPU."""
    if model.device.type != "cuda":
        return generate(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    others = torch.cuda.memory_allocated(model.device) - _weights_bytes(model, model.device)
    generation = generate()
    return generation, torch.cuda.max_memory_allocated(model.device) - max(0, others)


def _weights_bytes(model: Model, device: Any = None) -> int:
    """Weights of a model in bytes, on one device if given; shared weights count once."""
    tensors = {
        tensor.data_ptr(): tensor
        for part in model.components.values()
        if hasattr(part, "parameters")
        for tensor in [*part.parameters(), *part.buffers()]
        if device is None or tensor.device == device
    }
    return sum(tensor.nbytes for tensor in tensors.values())


def _psnr(first: Any, second: Any) -> float:
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


@contextmanager
def _half_precision(model: Model, settings: dict) -> Iterator[Model]:
    if model.dtype != torch.float32:
        raise _Unavailable(f"the weights are {str(model.dtype).removeprefix('torch.')} already")
    if any(engine != "eager" for engine in model.engines.values()):
        raise _Unavailable("an engine keeps its own precision")
    yield load(model.spec, device=model.device, dtype="bfloat16", weights=model.load.weights)


@contextmanager
def _vae_tiling(model: Model, settings: dict) -> Iterator[None]:
    vae = getattr(model.pipeline, "vae", None)
    if not hasattr(vae, "enable_tiling") or not hasattr(vae, "tile_sample_min_height"):
        raise _Unavailable("its VAE has no tiles")
    names = ("use_tiling", *(f"tile_sample_{k}_{d}" for k in ("min", "stride") for d in ("height", "width")))
    before = {name: getattr(vae, name) for name in names}
    sides = {d: settings.get(d) or getattr(model.spec.defaults, d) for d in ("height", "width")}
    if all(sides[d] <= before[f"tile_sample_min_{d}"] for d in sides):
        # The usual tile covers the whole video, so it is cut to half of it, with an overlap of a quarter.
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
    """Keep the expert that is not running on the host."""
    if "expert_low" not in model.spec.components:
        raise _Unavailable("one expert: it is needed at every step")
    if model.device.type == "cpu":
        raise _Unavailable("without a GPU everything is on the host already")
    parts = {name: model.component(name) for name in ("expert_high", "expert_low")}
    if not all(isinstance(part, torch.nn.Module) for part in parts.values()):
        raise _Unavailable("an expert is an engine that owns its weights")

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
    """Compute attention for a quarter of the queries at a time: the same sums, smaller workspaces."""
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


def _unavailable(reason: str) -> Callable:
    @contextmanager
    def option(model: Model, settings: dict) -> Iterator[None]:
        raise _Unavailable(reason)
        yield

    return option


_OPTIONS: dict[str, Callable] = {
    BFLOAT16: _half_precision,
    "VAE tiling": _vae_tiling,
    "expert offload": _offload_experts,
    "attention in query slices": _sliced_attention,
    "VAE slicing": _unavailable("it divides a batch, and there is one video"),
    "guidance branches one by one": _unavailable("the pipeline runs them one after the other already"),
}
