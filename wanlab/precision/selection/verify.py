"""Verification of a plan by generations of held-out cases: quality loss, divergence, memory, time, effect."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab import heldout
from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss, quality_loss
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.quality import Divergence, divergence
from wanlab.evaluate.scores import Scores
from wanlab.heldout.cases import EXAMINATION, FINAL, Case
from wanlab.measure.in_turn import interleaved
from wanlab.measure.timing import Comparison, compare
from wanlab.models.inputs import first_frame
from wanlab.models.shapes import latent_shape
from wanlab.models.variants import alternate_sdpa, compile_blocks
from wanlab.precision.apply import Applied, apply_plan
from wanlab.precision.check_torch import effect_check
from wanlab.precision.denoiser import drawn_arguments, eager_network, output_of
from wanlab.precision.plan import Plan

TOKENS_AT_ONCE = {"cuda": 40_000, "cpu": 2_000}
"""Device -> largest number of tokens of a batch; a single video may have more."""


@dataclass(frozen=True, eq=False)
class CaseOutput:
    """A generated video `[T, H, W, 3]` in [0, 1] (None if not decoded) and its latents `[C, T, H, W]`, both float32."""

    video: np.ndarray | None
    latents: np.ndarray


class Batched:
    """Cases of one size that a model with any plan generates in batches.

    Noise, image latents and prompts are those of `Model.generate` and computed once, as plans change experts only. Experts
    and decoder then compute batches of cases. Up to rounding the videos are those of `Model.generate`. Other pipelines than
    `WanImageToVideoPipeline` with one timestep per video run one case after the other.

    Attributes:
        requests: arguments of `Model.generate`, one dictionary per case, all of one size.
        settings: height, width, frames, steps and guidance_scale of all cases.
        size: number of videos in a batch. calls: calls of an expert in one generation.
    """

    def __init__(self, model, requests: Sequence[Mapping[str, Any]], *, batch: int | None = None) -> None:
        if not requests:
            raise WanlabError("no case to generate; give at least one")
        self.requests = [dict(each) for each in requests]
        defaults = model.spec.defaults
        names = ("height", "width", "frames", "steps", "guidance_scale")
        settings = [
            {n: getattr(defaults, n) if e.get(n) is None else e[n] for n in names} for e in self.requests
        ]
        if any(each != settings[0] for each in settings):
            raise WanlabError("cases of different sizes or steps cannot be generated together; give one size")
        self.settings = settings[0]
        latent = latent_shape(model.spec, *(self.settings[n] for n in names[:3]))
        tokens = latent.tokens
        self.size = batch or max(1, TOKENS_AT_ONCE[model.device.type] // tokens)
        self.calls = self.settings["steps"] * (2 if self.settings["guidance_scale"] > 1 else 1)
        texts = {"negative_prompt": ""} | self.settings
        said = (note for each in self.requests for note in model.remarks(texts | each, latent))
        model.notes += [note for note in dict.fromkeys(said) if note not in model.notes]
        self._given = (
            [_prepared(model, each, self.settings) for each in self.requests] if _known(model) else None
        )

    def generate(self, model, *, videos: bool = True, bar=None) -> list[CaseOutput]:
        """Generate all cases, in order, with the original model or one with a plan."""
        if self._given is None:
            return [self._alone(model, each, videos, bar) for each in self.requests]
        outputs: list[CaseOutput] = []
        for start in range(0, len(self._given), self.size):
            outputs += _batch(model, self._given[start : start + self.size], self.settings, videos)
            if bar is not None:
                bar.update(len(outputs) - start)
        return outputs

    def _alone(self, model, request: dict, videos: bool, bar) -> CaseOutput:
        latents, video = model.generate(**request, output="latent").video, None
        if videos and model.family.title == "Wan" and type(model.pipeline.vae).__name__ == "AutoencoderKLWan":
            with torch.no_grad():
                video = _decoded(model.pipeline, torch.from_numpy(latents)[None].to(model.device))[0]
        elif videos:
            video = model.generate(**request).video
        if bar is not None:
            bar.update()
        return CaseOutput(video, latents)


@dataclass(frozen=True, eq=False)
class _Given:
    """Inputs of one case: latents and condition `[1, C, T, H, W]`, prompts `[1, S, D]`, negative None without guidance."""

    latents: torch.Tensor
    condition: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor | None


def _known(model) -> bool:
    pipeline = model.pipeline
    experts = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    plain = not model.spec.expand_timesteps and all(
        getattr(e.config, "image_dim", None) is None for e in experts if e
    )
    return (
        type(pipeline).__name__ == "WanImageToVideoPipeline" and plain and all(e is not None for e in experts)
    )


def _prepared(model, request: dict, settings: dict) -> _Given:
    """Inputs of the denoising loop, as `WanImageToVideoPipeline.__call__` computes them."""
    pipeline, size = model.pipeline, (settings["height"], settings["width"])
    longest = getattr(pipeline.tokenizer, "model_max_length", None)
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt(
            prompt=request["prompt"],
            negative_prompt=request.get("negative_prompt", ""),
            do_classifier_free_guidance=settings["guidance_scale"] > 1,
            num_videos_per_prompt=1,
            max_sequence_length=int(min(512, longest or 512)),
            device=model.device,
        )
        picture = first_frame(request["image"], *size)
        image = pipeline.video_processor.preprocess(picture, height=size[0], width=size[1])
        latents, condition = pipeline.prepare_latents(
            image.to(model.device, dtype=torch.float32),
            1,
            pipeline.vae.config.z_dim,
            *size,
            settings["frames"],
            torch.float32,
            model.device,
            torch.Generator("cpu").manual_seed(int(request.get("seed", 0))),
        )
    return _Given(latents, condition, prompt, negative)


def _batch(model, given: list[_Given], settings: dict, videos: bool) -> list[CaseOutput]:
    """The denoising loop of the pipeline, and its decoder."""
    pipeline = model.pipeline
    scheduler, scale = pipeline.scheduler, settings["guidance_scale"]
    size = {name: settings[name] for name in ("height", "width", "frames")}
    experts = model.schedule(settings["steps"], **size)["component"]
    latents, condition = (
        torch.cat([getattr(each, name) for each in given]) for name in ("latents", "condition")
    )
    prompts = [torch.cat([each.prompt for each in given])]
    if scale > 1:
        prompts.append(torch.cat([each.negative for each in given]))
    scheduler.set_timesteps(settings["steps"], device=model.device)
    with torch.no_grad():
        for t, component in zip(scheduler.timesteps, experts, strict=True):
            expert = model.component(component)
            seen = torch.cat([latents, condition], dim=1).to(expert.dtype)
            velocities = [
                expert(
                    hidden_states=seen,
                    timestep=t.expand(len(given)),
                    encoder_hidden_states=prompt.to(expert.dtype),
                    return_dict=False,
                )[0]
                for prompt in prompts
            ]
            velocity = (
                velocities[0]
                if len(velocities) == 1
                else velocities[1] + scale * (velocities[0] - velocities[1])
            )
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        kept = latents.float().cpu().numpy()
        decoded = _decoded(pipeline, latents) if videos else [None] * len(given)
    if not all(map(math.isfinite, (float(kept.min()), float(kept.max())))):
        raise WanlabError(
            f"{model.spec.name} made latents that are not finite: its plan overflows; keep more layers"
        )
    return [CaseOutput(video, latent) for video, latent in zip(decoded, kept, strict=True)]


def _decoded(pipeline, latents: torch.Tensor):
    """`[B, T, H, W, 3]` in [0, 1], float32."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    return (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().float().numpy()


METRICS = ("lpips", "ssim", "psnr")
LOSS, DIVERGENCE = "quality loss", "divergence (LPIPS to the original, in percent)"
"""What a plan is judged by: the loss where the truth is known, else the divergence."""


@dataclass(frozen=True, eq=False)
class Originals:
    """Cases, their truths, and the videos of the unchanged model.

    Attributes:
        purpose: set of the cases; `"final"` is for verification and never for choosing.
        names: names of the cases, for tables.
        truths: true videos; empty where none is known.
        outputs: videos and latents of the unchanged model. to_truth: their scores against the truths.
        floor: name -> scores of each case generated again by the unchanged model with other arithmetic (the noise floor).
            floor_effect: the same of the latents, mean squared relative change.
        batched: generates the same cases with other plans.
        generations: number of generations, the floor's included. backbone: backbone of LPIPS.
    """

    purpose: str
    names: tuple[str, ...]
    truths: tuple[np.ndarray, ...]
    outputs: tuple[CaseOutput, ...]
    to_truth: tuple[Scores, ...]
    floor: dict[str, tuple[Scores, ...]]
    floor_effect: float | None
    batched: Batched
    generations: int
    backbone: str

    @property
    def forwards(self) -> int:
        """Number of calls of an expert, where each case of a batch counts."""
        return self.generations * self.batched.calls


def make_originals(
    model,
    cases: Sequence[Any],
    *,
    floor: bool = True,
    backbone: str = "auto",
    batch: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Originals:
    """Generate cases by the unchanged model, score them against the truth, and measure the noise floor.

    Args:
        model: model from `wanlab.models.load`, its experts as loaded.
        cases: cases of `wanlab.heldout.cases`, or dictionaries for `Model.generate` (then no truth is known).
        floor: whether every case is generated again with another exact attention kernel.
        backbone: backbone of LPIPS. batch: number of videos in a batch; None takes what suits the device.
        settings: height, width, frames, steps, guidance_scale of `Model.generate`.

    Raises:
        WanlabError: no case, cases of several sets, or as `Model.generate` and `compare_videos`.
    """
    held_out = [case for case in cases if isinstance(case, Case)]
    if held_out and len(held_out) < len(cases):
        raise WanlabError("some cases have a truth and some none; give cases of one kind")
    purposes = {case.purpose for case in held_out}
    if len(purposes) > 1:
        raise WanlabError(
            f"cases of the sets {' and '.join(sorted(purposes))} are mixed; give those of one set"
        )
    defaults = model.spec.defaults
    size = {n: settings.get(n) or getattr(defaults, n) for n in ("frames", "height", "width")}
    truths = tuple(case.truth(**size) for case in held_out)
    requests = heldout.requests(held_out, truths, needed=model.conditions) or [dict(case) for case in cases]
    truths = tuple(heldout.known_truths(truths, model.conditions))
    batched = Batched(
        model, [each | {k: v for k, v in settings.items() if v is not None} for each in requests], batch=batch
    )
    with tqdm(
        total=len(requests) * (1 + floor), desc="originals", unit="video", leave=False, disable=not progress
    ) as bar:
        outputs = batched.generate(model, bar=bar)
        floors, floor_effect = {}, None
        if floor:
            with alternate_sdpa(model.device) as name:
                again = batched.generate(model, bar=bar)
            floors[name] = tuple(_scores(outputs, again, METRICS, backbone, model.device))
            floor_effect = mean_effect(outputs, again)
    to_truth = tuple(_against(truths, [each.video for each in outputs], ("lpips",), backbone, model.device))
    return Originals(
        purpose=next(iter(purposes), EXAMINATION),
        names=tuple(f"{case.photograph} {case.clip.motion}" for case in held_out)
        or tuple(map(str, range(len(requests)))),
        truths=truths,
        outputs=tuple(outputs),
        to_truth=to_truth,
        floor=floors,
        floor_effect=floor_effect,
        batched=batched,
        generations=len(requests) * (1 + floor),
        backbone=backbone,
    )


def for_choosing(originals: Originals) -> Originals:
    """The originals, where a plan may be chosen by their cases.

    Raises:
        WanlabError: they are of the final set.
    """
    if originals.purpose == FINAL:
        raise WanlabError(
            "these cases are of the final set, which nothing may be chosen by; take"
            ' wanlab.heldout.cases.load_cases("selection")'
        )
    return originals


def mean_effect(originals: Sequence[CaseOutput], others: Sequence[CaseOutput]) -> float:
    """Squared relative change of the final latents, mean over cases: the quantity that sensitivities predict."""
    pairs = [(a.latents.astype(np.float64), b.latents) for a, b in zip(originals, others, strict=True)]
    return float(np.mean([((b - a) ** 2).sum() / (a**2).sum() for a, b in pairs]))


def _scores(outputs, others, metrics, backbone: str, device) -> list[Scores]:
    return _against(
        [each.video for each in outputs], [each.video for each in others], metrics, backbone, device
    )


def _against(references, videos, metrics, backbone: str, device) -> list[Scores]:
    return (
        [
            compare_videos(reference, video, metrics, backbone, device, progress=False)
            for reference, video in zip(references, videos, strict=True)
        ]
        if len(references)
        else []
    )


MIB = 2**20


@dataclass(frozen=True, eq=False)
class Verification:
    """Measurements of a plan on some cases.

    Attributes:
        plan: plan that was applied.
        quality: quality loss with its interval; unknown without truths.
        divergence: divergence from the unchanged model, beside the noise floor.
        effect: squared relative change of the final latents, mean over cases, which the sensitivity predicts.
        frame: one row per case: case, lpips (to the original), lpips_truth, loss_percent (NaN without truth), effect.
        weight_bytes, before_bytes: size of all linear layers of the experts, with the plan and as loaded.
        bits_per_weight: mean bits of a linear weight. share_8bit: share of linear weights in at most 8 bits.
        kernels: name of what multiplied, in a sentence. took_effect: sentence of the effect check.
        times: component -> time of its forward beside the unchanged one's; empty where not measured.
        purpose: set of the cases. generations: number of generations.
    """

    plan: Plan
    quality: QualityLoss
    divergence: Divergence
    effect: float
    frame: pd.DataFrame
    weight_bytes: int
    before_bytes: int
    bits_per_weight: float
    share_8bit: float
    kernels: str
    took_effect: str
    times: dict[str, Comparison]
    purpose: str
    generations: int

    @property
    def upper_percent(self) -> float | None:
        """Upper end of the interval of the quality loss, or the worst case where fewer than three give no interval; without
        truths the same of the divergence, LPIPS in percent."""
        if not self.quality.known:
            lpips = self.divergence.frame.set_index("metric").loc["lpips"]
            return 100 * float(lpips["worst"] if math.isnan(lpips["high"]) else lpips["high"])
        if self.quality.high_percent is not None:
            return self.quality.high_percent
        return max(self.quality.per_case_percent, default=self.quality.percent)

    @property
    def judged(self) -> str:
        """What is held against a limit."""
        return LOSS if self.quality.known else DIVERGENCE

    def holds(self, limit_percent: float) -> bool:
        """Whether the whole interval of the quality loss (without truths of the divergence) is within a limit; False without
        one, which proves nothing."""
        if not self.quality.known:
            lpips = self.divergence.frame.set_index("metric").loc["lpips"]
            return 100 * float(lpips["high"]) <= limit_percent
        return self.quality.within(limit_percent) == "yes"

    def row(self) -> dict[str, Any]:
        """One table row."""
        lpips = self.divergence.frame.set_index("metric").loc["lpips"]
        return {
            "plan": self.plan.name,
            "loss_percent": self.quality.percent,
            "loss_low_percent": self.quality.low_percent,
            "loss_high_percent": self.quality.high_percent,
            "lpips": float(lpips["mean"]),
            "lpips_low": float(lpips["low"]),
            "lpips_high": float(lpips["high"]),
            "lpips_floor": float(lpips["floor"]),
            "effect": self.effect,
            "bits_per_weight": self.bits_per_weight,
            "share_8bit_percent": 100 * self.share_8bit,
            "weight_mib": self.weight_bytes / MIB,
            "cases": len(self.frame),
            **{f"{name}_speedup": each.speedup for name, each in self.times.items()},
        }

    def __str__(self) -> str:
        return (
            f"{self.plan.name}: quality loss {self.quality}; {self.divergence}; {self.weight_bytes / MIB:.2f} MiB of linear"
            f" weights instead of {self.before_bytes / MIB:.2f}"
        )


def verify_plans(
    model, plans: Iterable[Plan | str | os.PathLike], cases: Sequence[Any] | Originals, **settings: Any
) -> list[Verification]:
    """`verify_plan` of several plans; forwards are timed where there is a GPU, as a CPU only simulates plans."""
    timed = model.device.type == "cuda"
    return [verify_plan(model, plan, cases, timed=timed, **settings) for plan in plans]


def verify_plan(
    model,
    plan: Plan | str | os.PathLike,
    cases: Sequence[Any] | Originals,
    *,
    calibrations: Mapping[str, Any] | None = None,
    timed: bool = False,
    rounds: int = 5,
    check: bool = True,
    progress: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Verification:
    """Apply a plan, prove that it took effect, and generate held-out cases with it.

    Args:
        model: model from `wanlab.models.load`, its experts as loaded; it is not changed.
        plan: plan, name of a preset, or file.
        cases: cases of `wanlab.heldout.cases`, or their `Originals`, which then are not generated again.
        calibrations: calibrations as `apply_plan` takes them.
        timed: whether one forward of every expert is timed interleaved with the unchanged one, with an A/A control, both
            compiled on a GPU; useful where the plan has kernels.
        rounds: number of rounds of these timings.
        check: whether `effect_check` runs; a plan that changes nothing fails it.
        settings: settings of `make_originals`, where `cases` are cases.

    Raises:
        WanlabError: a plan that does not fit or has no effect, or as `make_originals`.
    """
    if isinstance(cases, Originals) and settings:
        raise WanlabError(
            f"the originals have their own {next(iter(settings))}; give cases instead, or leave it out"
        )
    originals = (
        cases if isinstance(cases, Originals) else make_originals(model, cases, progress=progress, **settings)
    )
    applied = apply_plan(model, plan, calibrations)
    effect_sentence = str(effect_check(model, applied)) if check else "not checked"
    name = applied.assignment.plan.name
    with tqdm(
        total=len(originals.outputs), desc=f"verify {name}", unit="video", leave=False, disable=not progress
    ) as bar:
        outputs = originals.batched.generate(applied.model, bar=bar)
    options = {"backbone": originals.backbone, "device": model.device, "progress": False}
    from_original = divergence(
        [each.video for each in originals.outputs],
        [each.video for each in outputs],
        originals.floor or None,
        metrics=METRICS,
        seed=seed,
        **options,
    )
    to_truth = [
        compare_videos(truth, each.video, "lpips", **options)
        for truth, each in zip(originals.truths, outputs, strict=bool(originals.truths))
    ]
    loss = quality_loss(to_truth or None, list(originals.to_truth) or None, seed=seed)
    frame = pd.DataFrame(
        {
            "case": originals.names,
            "lpips": [scores.mean("lpips") for scores in from_original.scores],
            "lpips_truth": [scores.mean("lpips") for scores in to_truth] or np.nan,
            "loss_percent": loss.per_case_percent or np.nan,
            "effect": [mean_effect([a], [b]) for a, b in zip(originals.outputs, outputs, strict=True)],
        }
    )
    linear = applied.frame[applied.frame["kind"] == "Linear"]
    by_format = linear.drop_duplicates(["component", "layer", "format"])
    whole = linear.drop_duplicates(["component", "layer"])
    elements = weights_of(applied)
    return Verification(
        plan=applied.assignment.plan,
        quality=loss,
        divergence=from_original,
        effect=float(frame["effect"].mean()),
        frame=frame,
        weight_bytes=int(by_format["weight_bytes"].sum()),
        before_bytes=int(whole["weight_before_bytes"].sum()),
        bits_per_weight=8 * float(by_format["weight_bytes"].sum()) / elements,
        share_8bit=applied.assignment.share(8),
        kernels=applied.kernels,
        took_effect=effect_sentence,
        times=_times(model, applied, originals, rounds) if timed else {},
        purpose=originals.purpose,
        generations=len(outputs),
    )


def weights_of(applied: Applied) -> int:
    """Number of elements of all linear weights."""
    rows = applied.assignment.frame
    rows = rows[rows["kind"] == "Linear"].drop_duplicates(["component", "layer"])
    return int(rows["shape"].map(lambda shape: shape[0] * shape[1]).sum())


def measured_effect(
    model,
    plan: Plan | str,
    originals: Originals,
    *,
    calibrations: Mapping[str, Any] | None = None,
    cases: int | None = None,
    progress: bool = True,
) -> float:
    """The measured effect of a plan on the final latents of some cases; no video is decoded.

    Args:
        cases: number of the originals' cases; all if not given.
    """
    for_choosing(originals)
    applied = apply_plan(model, plan, calibrations)
    batched = copy.copy(originals.batched)
    count = min(cases or len(originals.outputs), len(originals.outputs))
    batched.requests, batched._given = batched.requests[:count], batched._given and batched._given[:count]
    with tqdm(total=count, desc="effect", unit="generation", leave=False, disable=not progress) as bar:
        outputs = batched.generate(applied.model, videos=False, bar=bar)
    return mean_effect(originals.outputs[:count], outputs)


def _times(model, applied: Applied, originals: Originals, rounds: int) -> dict[str, Comparison]:
    """Interleaved forwards of every expert at the size of the cases, unchanged and with the plan."""
    after = applied.model
    if model.device.type == "cuda":  # in eager PyTorch rounding of inputs takes more than products save
        model, after = compile_blocks(model), compile_blocks(after)
    settings, comparisons = originals.batched.settings, {}
    size = {name: settings[name] for name in ("height", "width", "frames")}
    with torch.no_grad(), applied.at(0):
        for component in applied.assignment.components:
            inputs = drawn_arguments(model, component, latent_shape(model.spec, **size))
            if not inputs:
                continue  # of a family whose calls are not known
            networks = {
                "as loaded": eager_network(model, component),
                applied.assignment.plan.name: eager_network(after, component),
            }
            calls = {
                name: lambda network=network, i=inputs: output_of(network, i)
                for name, network in networks.items()
            }
            samples, control = interleaved(
                calls, warmup=2, rounds=rounds, device=model.device, progress=False
            )
            loaded_ms, planned_ms = samples.values()
            comparisons[component] = compare(loaded_ms, planned_ms, control.noise_percent)
    return comparisons
