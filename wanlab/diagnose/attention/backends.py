"""Benchmark of the kernels for a model's self-attention, at its shape: time, rate, error and bound of each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.profiler import ProfilerActivity, profile

from wanlab.core.answer import ratio_text
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.formats import element_name
from wanlab.diagnose.attention.calls import attention_heads
from wanlab.measure.ceilings import Ceilings
from wanlab.measure.timing import AAControl, Samples, aa_control, compare, time_ms
from wanlab.models.loading import resolve
from wanlab.models.pipeline import Model
from wanlab.models.shapes import LatentShape, latent_shape
from wanlab.models.spec import Part
from wanlab.models.weights import GIB, free_bytes

BLOCK = 128
"""Tokens per side of the blocks that flex_attention computes or skips."""


def pair_share(latent_frames: int, window_frames: int, text_share: float = 0.0) -> float:
    """Share of the pairs of query and key that are inside the window, or of which one is text.

    Args:
        text_share: share of the tokens that are text.
    """
    near = [
        min(n + window_frames, latent_frames - 1) - max(n - window_frames, 0) + 1
        for n in range(latent_frames)
    ]
    inside = sum(near) / latent_frames**2
    return inside + (1 - inside) * (1 - (1 - text_share) ** 2)


def window_mask(
    tokens: int, latent_frames: int, window_frames: int, device: Any = "cpu", text_tokens: int = 0
) -> BlockMask:
    """A flex_attention mask in which a query attends to its own latent frame and some frames on each side, and to the text;
    the text attends to everything.

    Built from blocks, because `create_block_mask` allocates tokens x tokens booleans unless it is compiled.

    Args:
        tokens: number of tokens; those of the video, divisible by latent_frames, then those of the text.
        window_frames: frames on each side.
        text_tokens: tokens of the text among them.
    """
    video = tokens - text_tokens
    per_frame = video // latent_frames

    def near(batch, head, query, key):
        inside = (query // per_frame - key // per_frame).abs() <= window_frames
        return inside | (query >= video) | (key >= video)

    first = torch.arange(0, tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp_max(tokens - 1)
    low, high = (ends.clamp_max(video - 1) // per_frame for ends in (first, last))
    nearest = torch.maximum(low[None] - high[:, None], low[:, None] - high[None])
    farthest = torch.maximum(high[None] - low[:, None], high[:, None] - low[None])
    some, only = last >= video, first >= video  # text in the block, and nothing else in it
    whole = last - first == BLOCK - 1  # a block that crosses the end of the window must be masked
    full = (farthest <= window_frames) | only[None] | only[:, None]
    full &= whole[None] & whole[:, None]
    partial = ((nearest <= window_frames) | some[None] | some[:, None]) & ~full

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
        return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(tokens, tokens)
    )


BASELINE = "SDPA default"
SDPA = {
    "SDPA flash": "FLASH_ATTENTION",
    "SDPA cuDNN": "CUDNN_ATTENTION",
    "SDPA memory-efficient": "EFFICIENT_ATTENTION",
    "SDPA math": "MATH",
}
_TOOK = (
    ("flash", "scaled_dot_product_flash_attention"),
    ("cuDNN", "scaled_dot_product_cudnn_attention"),
    ("memory-efficient", "scaled_dot_product_efficient_attention"),
    ("fused", "scaled_dot_product_fused_attention"),
    ("math", "scaled_dot_product_attention_math"),
)


@dataclass(frozen=True, eq=False)
class AttentionKernels:
    """Comparison of attention kernels.

    Attributes:
        table: kernel, took (backend in a profile of one call, and on a GPU its longest kernel), time_ms (median),
            tflop_per_s (of the products of query, key and value inside the mask), ceiling_tflop_per_s (of a matrix
            product), of_ceiling_percent, speedup (over the default; low and high are its 95 % interval), verdict,
            relative_error, density_percent (pairs of query and key that are computed), reason (why there is no time).
        control: A/A control of the default.
        default_took: backend that PyTorch chose as default.
        facts: tokens, heads, dim, latent_frames, window_frames, text_tokens (among the tokens, in joint attention), dtype,
            device.
    """

    table: pd.DataFrame
    control: AAControl
    default_took: str
    facts: dict[str, Any]

    def fastest(self, dense: bool = True) -> dict[str, Any]:
        """The fastest row; with `dense`, among the kernels that compute all pairs, else among all."""
        rows = self.table[self.table["time_ms"].notna()]
        rows = rows[rows["density_percent"] == 100] if dense else rows
        return rows.loc[rows["time_ms"].idxmin()].to_dict()

    @property
    def sentence(self) -> str:
        """Whether a kernel that does all of the work is faster than PyTorch's default."""
        best = self.fastest()
        if best["kernel"] == BASELINE or best["verdict"] != "faster":
            return f"No kernel for all keys is faster than PyTorch's default here ({self.default_took})."
        default = f"PyTorch's default, {self.default_took}"
        return f"For all keys {best['kernel']} is {ratio_text(best['speedup'], best['low'], best['high'], beside=default)}."

    def row(self) -> dict[str, Any]:
        """Flat record: the fastest kernel that computes all pairs, default_took, noise_percent."""
        return self.fastest() | {
            "default_took": self.default_took,
            "noise_percent": self.control.noise_percent,
        }


def attention_kernels(
    shape: Model | tuple[int, int, int],
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    latent_frames: int = 1,
    window_frames: int = 1,
    device: Any = "auto",
    dtype: Any = "auto",
    iterations: int = 5,
    queries: int = 64,
    flex: bool | None = None,
    ceilings: Ceilings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AttentionKernels:
    """Time every kernel for dense self-attention, and one with a local window, on normally distributed random tensors.

    Tensors have the memory layout of diffusers, `[1, tokens, heads, dim]` with tokens and heads transposed. The error is the
    norm of the difference over the norm, on sampled queries, relative to the same attention in float32 (for the window:
    with the same window; the loss of quality by a window is not measured here). A kernel that cannot run has a reason.

    Args:
        shape: a model (its device, dtype and heads; sizes as for `Model.generate`) or (tokens, heads, dim). Tokens of joint
            attention include those of the text with its padding, which a window leaves in. No mask is given; one over the
            padding, as HunyuanVideo's, rules out flash kernels.
        height, width, frames: size of the video, for a model.
        latent_frames: latent frames that the tokens belong to, for a shape; with 1 no window is measured.
        window_frames: latent frames in the window on each side of the query's own frame.
        device, dtype: used with a shape; as for `models.load`.
        iterations: samples of each kernel; twice as many of the default, as an A/A control.
        queries: number of queries on which the error is computed.
        flex: also measure flex_attention, compiled (Dong et al. 2024, arXiv:2412.05496); by default on a GPU only, since
            compilation takes about half a minute on a CPU.
        ceilings: ceilings of the device, for ceiling_tflop_per_s.
        seed: seed of the random tensors.

    Raises:
        WanlabError: an illegal shape, or tokens that are not a multiple of the frames.
    """
    tokens, heads, dim, latent_frames, text, place, kind = _resolved(
        shape, height, width, frames, latent_frames, device, dtype
    )
    draw = torch.Generator(place).manual_seed(seed)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=draw, device=place, dtype=kind).permute(0, 2, 1, 3)
        for _ in range(3)
    )
    picked = (
        torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:queries].sort()[0].to(place)
    )
    dense = _reference(q, k, v, picked)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    flop, name = 4 * tokens**2 * heads * dim, str(kind).removeprefix("torch.")
    top = ceilings.tflop_per_s.get(element_name(name) or name) if ceilings else None
    with torch.no_grad():
        control = aa_control(
            lambda: sdpa(q, k, v),
            warmup=2,
            iterations=iterations,
            device=place,
            progress=progress,
            label=BASELINE,
        )
    both = control.first.values_ms + control.second.values_ms
    first = control.first
    baseline = Samples(BASELINE, both, first.device, first.clock, first.load)
    rows: list[dict[str, Any]] = []

    def add(
        label: str, call: Callable | None, reason: str = "", reference=dense, pairs: float = 1.0, samples=None
    ):
        row: dict[str, Any] = {"kernel": label, "density_percent": 100 * pairs, "reason": reason}
        if call is not None:
            try:
                with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    row |= _measured(call, reference, picked, samples, label, iterations, place, progress)
            except Exception as error:  # compilers and drivers raise exceptions of any class
                row["reason"] = _reason(error, caught)
            else:
                row["tflop_per_s"] = pairs * flop / row["time_ms"] / 1e9
                versus = compare(baseline, row.pop("samples"), control.noise_percent)
                row |= {
                    "speedup": versus.speedup,
                    "low": versus.low,
                    "high": versus.high,
                    "verdict": versus.verdict,
                }
        rows.append(row)

    add(BASELINE, lambda: sdpa(q, k, v), samples=baseline)
    for label, backend in SDPA.items():
        add(label, *_sdpa_call(backend, sdpa, q, k, v))
    measure_flex = place.type == "cuda" if flex is None else flex
    _add_flex(add, q, k, v, picked, latent_frames, window_frames, text, measure_flex)
    rows[0] |= {"verdict": "baseline"}
    columns = [
        "kernel", "took", "time_ms", "tflop_per_s", "speedup", "low", "high", "verdict", "relative_error",
        "density_percent", "reason",
    ]  # fmt: skip
    table = pd.DataFrame(rows).reindex(columns=columns)
    table.insert(4, "ceiling_tflop_per_s", top if top else float("nan"))
    table.insert(5, "of_ceiling_percent", 100 * table["tflop_per_s"] / table["ceiling_tflop_per_s"])
    facts = {
        "tokens": tokens, "heads": heads, "dim": dim, "latent_frames": latent_frames, "window_frames": window_frames,
        "text_tokens": text, "dtype": name, "device": baseline.device,
    }  # fmt: skip
    return AttentionKernels(table, control, str(rows[0].get("took", "")), facts)


def _resolved(shape, height, width, frames, latent_frames, device, dtype) -> tuple:
    """The values tokens, heads, dim, latent frames, tokens of text, device, dtype, from a model or a shape."""
    if isinstance(shape, tuple):
        sizes = (*shape, latent_frames)
        if (
            len(shape) != 3
            or not all(isinstance(n, int) and n >= 1 for n in sizes)
            or shape[0] % latent_frames
        ):
            raise WanlabError(
                f"shape {shape} with {latent_frames} latent frames is not possible; give (tokens, heads, dim), whole"
                " numbers, the tokens a multiple of the frames"
            )
        return *sizes, 0, *resolve(device, dtype)
    defaults = shape.spec.defaults
    latent = latent_shape(
        shape.spec, height or defaults.height, width or defaults.width, frames or defaults.frames
    )
    part = next(part for part in shape.spec.parts if part.name.startswith("transformer"))
    named = tuple(part.config.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    seen = named if all(isinstance(number, int) and number for number in named) else attention_heads(shape)
    if seen is None:
        raise WanlabError(f"{shape.spec.name}: {part.class_name} names no heads; give (tokens, heads, dim)")
    of_frames = shape.spec.patch[0]
    per_frame = latent.tokens // -(-latent.frames // of_frames)
    planes = -(-_frames_of_call(shape, part, latent) // of_frames)
    text = 0 if shape.family.text_first is None else shape.text_tokens
    return planes * per_frame + text, *seen, planes, text, shape.device, shape.dtype


def _frames_of_call(model: Model, part: Part, latent: LatentShape) -> int:
    """Latent frames that the denoiser is called with; more than the video's in Wan Animate and, padded, in CogVideoX 1.5."""
    shape = (latent.channels, latent.frames, latent.height, latent.width)
    inputs = model.family.denoiser_inputs(model.spec, part, shape, latent.tokens, model.text_tokens)
    states, channels = inputs.get("hidden_states"), part.config.get("in_channels")
    if states is None or len(states.shape) != 5 or not channels:
        return latent.frames
    return (
        states.shape[1] * states.shape[2] // channels
    )  # [1, C, T, H, W], or with C and T the other way round


def _sdpa_call(backend: str, sdpa: Callable, q, k, v) -> tuple[Callable | None, str]:
    """A call of an SDPA backend, or the reason why there is none."""
    if q.device.type == "cpu" and backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        return None, "needs a GPU"
    if backend == "MATH":
        # Scores and their softmax are in float32 for any input.
        needed, free = 8 * q.shape[1] * q.shape[2] ** 2, free_bytes(q.device)
        if needed > 0.9 * free:
            return None, f"tokens x tokens takes {needed / GIB:,.0f} GiB, {free / GIB:,.0f} are free"

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v)

    return call, ""


def _add_flex(
    add: Callable, q, k, v, picked, latent_frames: int, window_frames: int, text: int, measure_flex: bool
) -> None:
    window = f"flex, window of ±{window_frames} frames"
    if not measure_flex:
        for label in ("flex", window):
            add(label, None, "compiling takes long on a CPU; ask for it with flex=True")
        return
    run = torch.compile(flex_attention, dynamic=False)
    add("flex", lambda: run(q, k, v))
    if latent_frames - 1 <= window_frames:
        add(window, None, f"holds all {latent_frames} latent frames; take fewer")
        return
    mask = window_mask(q.shape[2], latent_frames, window_frames, q.device, text)
    video = q.shape[2] - text
    pairs = pair_share(latent_frames, window_frames, text / q.shape[2])
    windowed = _reference(q, k, v, picked, video, video // latent_frames, window_frames)
    add(window, lambda: run(q, k, v, block_mask=mask), "", windowed, pairs)


def _measured(call, reference, picked, samples, label, iterations, device, progress) -> dict[str, Any]:
    output = call()[0, :, picked].float()
    error = float((output - reference).norm() / reference.norm())
    del output
    if samples is None:
        samples = time_ms(
            call, warmup=2, iterations=iterations, device=device, progress=progress, label=label
        )
    return {
        "samples": samples,
        "time_ms": samples.median,
        "relative_error": error,
        "took": kernel_of(call, device),
    }


def _reference(
    q, k, v, picked, video: int = 0, per_frame: int = 1, window_frames: int | None = None
) -> torch.Tensor:
    """Attention of some queries in float32, head by head: `[heads, queries, dim]`."""
    outside = None
    if window_frames is not None:
        token = torch.arange(k.shape[2], device=k.device)
        frame, shown = token // per_frame, token < video
        outside = (frame[picked][:, None] - frame).abs() > window_frames
        outside &= shown[picked][:, None] & shown
    outputs = []
    for head in range(q.shape[1]):
        scores = q[0, head, picked].float() @ k[0, head].float().t() * q.shape[3] ** -0.5
        if outside is not None:
            scores.masked_fill_(outside, float("-inf"))
        outputs.append(scores.softmax(-1) @ v[0, head].float())
    return torch.stack(outputs)


def kernel_of(call: Callable, device: Any) -> str:
    """Backend and longest kernel of one call of attention, from a profile of it; `""` inside another profile."""
    if torch.autograd._profiler_enabled():
        return ""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events()
    names = {event.name for event in events}
    backend = next((short for short, part in _TOOK if any(part in name for name in names)), "")
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = max(kernels, key=lambda event: event.time_range.elapsed_us(), default=None)
    return ", ".join(part for part in (backend, longest.name[:60] if longest else "") if part)


def _reason(error: Exception, caught: list) -> str:
    """A short reason why a kernel did not run."""
    text = first_line(error)
    if re.match(r"No (viable|available)", text):
        # The exception only says that no kernel is available; the reason is in PyTorch's warnings.
        lines = [first_line(str(warning.message)) for warning in caught]
        explanations = [line for line in lines if not re.search(r"not used because|disabled", line)]
        text = explanations[0] if explanations else "not available for this shape, dtype or device"
    return re.sub(r"\s*\(Triggered internally.*", "", text)[:100]
