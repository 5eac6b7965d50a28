"""Effect of the boundary between the experts, difference of their predictions, and a summary of all their measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.answer import Answer, answer
from wanlab.core.errors import WanlabError
from wanlab.core.stats import interval_text
from wanlab.core.words import percent_text, sentence, time_text
from wanlab.diagnose.experts.switching import SwitchCost
from wanlab.diagnose.experts.timeline import Timeline
from wanlab.evaluate.loss import quality_loss
from wanlab.evaluate.metrics import compare_videos
from wanlab.heldout.cases import Case, inputs
from wanlab.measure.stages import EXPERTS, stages
from wanlab.models.pipeline import Model
from wanlab.models.schedule import boundary_at, precompute_schedule
from wanlab.models.taps import intercept_calls
from wanlab.models.variants import alternate_sdpa


@dataclass(frozen=True, eq=False)
class Disagreement:
    """Difference of the two experts' predictions on the same inputs.

    Attributes:
        steps: per requested step: step, timestep, sigma, snr, component (the expert that ran it), other, relative_l2
            (norm of the difference over the norm of the running expert's prediction), cosine, and relative_l2 of two
            noise floors: again_l2 (the same expert called twice), kernel_l2 (with another exact attention kernel).
        boundary_timestep: timestep at which the experts switch.
        kernel: name of the other attention kernel.
    """

    steps: pd.DataFrame
    boundary_timestep: float
    kernel: str

    def at_boundary(self) -> dict[str, Any]:
        """The requested step nearest to the boundary as a record, with floor_l2, the larger noise floor."""
        nearest = (self.steps["timestep"] - self.boundary_timestep).abs().idxmin()
        row = self.steps.loc[nearest].to_dict()
        return row | {"floor_l2": max(row["again_l2"], row["kernel_l2"])}

    def row(self) -> dict[str, float]:
        """Flat record: disagreement and disagreement_floor (relative L2) at disagreement_timestep, nearest the boundary."""
        near = self.at_boundary()
        named = {"": "relative_l2", "_floor": "floor_l2", "_timestep": "timestep", "_cosine": "cosine"}
        return {f"disagreement{key}": float(near[column]) for key, column in named.items()}

    def percents(self) -> tuple[str, str]:
        """How far the experts differ nearest to the boundary, and how far equal calls do, as text."""
        near = self.at_boundary()
        return percent_text(100 * near["relative_l2"]), percent_text(100 * near["floor_l2"])


def disagreement(
    model: Model, image: Any, prompt: str, *, at_steps: Sequence[int] | None = None, **settings
) -> Disagreement:
    """Run both experts at steps of a real generation, which continues with the prediction of the scheduled expert.

    Teacher-forced: latents, timestep and text are those of the generation at that step. Only the branch with the prompt
    is compared. Each step costs three more forwards, one of them with an attention kernel that may be slow.

    Args:
        image, prompt, settings: arguments of `Model.generate`.
        at_steps: steps to compare; all if None.

    Raises:
        WanlabError: a model with one expert, a step that the run does not have, or an error of `Model.generate`.
    """
    if "expert_low" not in model.spec.components:
        raise WanlabError(f"{model.spec.name} has one expert; two are needed to disagree")
    table = precompute_schedule(model, settings.get("steps"))
    known = table.table.set_index("step")
    steps = set(known.index if at_steps is None else at_steps)
    if not steps or steps - set(known.index):
        raise WanlabError(
            f"at_steps is {list(at_steps)}; choose from steps 0 to {len(known) - 1}, at least one"
        )
    networks = {name: model.component(name) for name in ("expert_high", "expert_low")}
    rows: list[dict] = []
    at: dict[str, Any] = {"step": 0, "kernel": ""}

    def asking(name: str) -> Callable:
        other = next(key for key in networks if key != name)

        def wrap(call: Callable) -> Callable:
            def asked(*args, **kwargs):
                ran = call(*args, **kwargs)
                step = at["step"]
                if step in steps and not any(row["step"] == step for row in rows):
                    other_prediction, again = networks[other](*args, **kwargs)[0], call(*args, **kwargs)[0]
                    with alternate_sdpa(model.device) as at["kernel"]:
                        kernel = call(*args, **kwargs)[0]
                    prediction = ran[0]
                    distance, cosine = _apart(prediction, other_prediction)
                    rows.append(
                        {"step": step, **known.loc[step].to_dict(), "component": name, "other": other}
                        | {"relative_l2": distance, "cosine": cosine}
                        | {
                            "again_l2": _apart(prediction, again)[0],
                            "kernel_l2": _apart(prediction, kernel)[0],
                        }
                    )
                return ran

            return asked

        return wrap

    def counted(call: Callable) -> Callable:
        def step(*args, **kwargs):
            at["step"] += 1
            return call(*args, **kwargs)

        return step

    wrappers = {model.spec.part_of(name): {"__call__": asking(name)} for name in networks}
    with intercept_calls(model.pipeline, wrappers | {"scheduler": {"step": counted}}):
        model.generate(image, prompt, **{"output": "latent"} | settings)
    return Disagreement(pd.DataFrame(rows), table.boundary_timestep, at["kernel"])


def _apart(prediction: torch.Tensor, other_prediction: torch.Tensor) -> tuple[float, float]:
    """Relative L2 distance and cosine, in double precision, because nearly equal predictions differ in the last digits."""
    a, b = prediction.double().flatten(), other_prediction.double().flatten()
    length = torch.linalg.vector_norm(a)
    if not length:
        return float("nan"), float("nan")
    distance = torch.linalg.vector_norm(a - b) / length
    return float(distance), float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True, eq=False)
class BoundarySweep:
    """Effect of the boundary's position on time and quality.

    Attributes:
        frame: per boundary: boundary, own (whether it is the model's), high_steps, low_steps, cases, denoising_ms (experts'
            time of one video, median over cases), and with quality: lpips and psnr_db against the truth (means over
            cases), change_percent of LPIPS relative to the model's own boundary, and its 95 % interval over cases
            low_percent, high_percent.
        videos: the same per boundary and case, with high_ms and low_ms (medians of one forward).
        noise_percent: noise of the time: the largest distance of a case's denoising_ms from the median over cases,
            at the model's own boundary; None with one case.
        floor_percent: change of the first case's LPIPS with another attention kernel only; None without quality.
        note: what was not measured, and why; empty if nothing.
    """

    frame: pd.DataFrame
    videos: pd.DataFrame
    noise_percent: float | None
    floor_percent: float | None
    note: str

    def row(self) -> dict[str, Any]:
        """Flat record: boundary_best (lowest LPIPS; None without quality), boundary_noise_percent, boundary_floor_..."""
        best = self.frame.loc[self.frame["lpips"].idxmin(), "boundary"] if "lpips" in self.frame else None
        noise = {"boundary_noise_percent": self.noise_percent, "boundary_floor_percent": self.floor_percent}
        return {"boundary_best": best} | noise

    def __str__(self) -> str:
        if self.note:
            return self.note
        scores = [f"{row.lpips:.4f} at {row.boundary:g}" for row in self.frame.itertuples()]
        cases = int(self.frame["cases"].iloc[0])
        return (
            f"LPIPS to the true video (lower is better) with the boundary moved, {cases} case{'s' * (cases != 1)}:"
            f" {', '.join(scores)}; another exact attention kernel alone changes it by {percent_text(self.floor_percent)}"
        )

    @property
    def better(self) -> float | None:
        """A boundary that is better than the model's own beyond noise; None without any, or without an interval."""
        if self.note:
            return None
        best = self.frame.loc[self.frame["change_percent"].idxmin()]
        high = best["high_percent"]  # there is none with two cases
        certain = not best["own"] and not pd.isna(high) and high < 0
        return (
            float(best["boundary"])
            if certain and -best["change_percent"] > (self.floor_percent or 0.0)
            else None
        )

    @property
    def sentence(self) -> str:
        """Whether another boundary is better than the model's own, with its interval; the note without quality."""
        if self.note:
            return sentence(f"whether another boundary is better is not known: {self.note}")
        own = self.frame[self.frame["own"]].iloc[0]
        best = self.frame.loc[self.frame["change_percent"].idxmin()]
        tried = ", ".join(f"{value:g}" for value in self.frame.loc[~self.frame["own"], "boundary"])
        if best["own"]:
            return f"The model's own boundary, {own['boundary']:g}, gives the best quality of those tried (others: {tried})."
        known = interval_text(best["low_percent"], best["high_percent"], "+.2f")
        cases = int(best["cases"])
        holds = "is better" if self.better is not None else "cannot be told from the model's own"
        return (
            f"A boundary at {best['boundary']:g} {holds}: LPIPS to the true video {best['change_percent']:+.2f} % against"
            f" {own['boundary']:g} ({known}, {cases} case{'s' * (cases != 1)})."
        )


def boundary_sweep(
    model: Model,
    boundaries: Sequence[float],
    cases: Sequence[Case],
    *,
    scored_frames: int | None = None,
    quality: bool = True,
    progress: bool = True,
    **settings,
) -> BoundarySweep:
    """Generate held-out cases with several positions of the boundary, always including the model's own.

    Args:
        boundaries: shares of the training timesteps, 0 to 1.
        cases: cases with a known true video, from `wanlab.heldout.cases.draw_cases`.
        scored_frames: number of first frames that are decoded and scored; all if None. They equal those of the whole
            video, because the VAE is causal in time; rounded down to whole latent frames.
        quality: score against the truth, if the video has its size and the weights are trained.
        settings: as for `Model.generate`, without image, prompt and seed.

    Raises:
        WanlabError: a model with one expert, no case, a boundary out of range, or an error of `Model.generate`.
    """
    if not cases:
        raise WanlabError("boundary_sweep of no case; give at least one")
    own = precompute_schedule(model, settings.get("steps")).boundary_ratio
    for boundary in (own, *boundaries):
        with boundary_at(model, boundary):
            pass  # a wrong boundary is refused before the first video
    note = "" if quality else "quality was not asked for"
    size = [settings.get(k) or getattr(model.spec.defaults, k) for k in ("frames", "height", "width")]
    if quality and "image" not in model.conditions:
        note = "quality is unknown: a prompt alone has no true video"
    elif quality and model.load.weights == "random":
        note = "quality is unknown: the weights are random"
    elif quality and (have := list(cases[0].truth().shape[:3])) != size:
        note = f"quality is unknown: the truth is {have[2]}x{have[1]}x{have[0]}, the video {size[2]}x{size[1]}x{size[0]}"
    settings["output"] = "latent" if note else "np"
    places = [own, *dict.fromkeys(float(b) for b in boundaries if float(b) != own)]
    # Case by case, because the encoded image is cached for one case.
    runs = [(b, case, False) for case in range(len(cases)) for b in places]
    if not note:
        runs.insert(len(places), (own, 0, True))
    cache: dict[int, Any] = {}
    rows = []
    for boundary, number, control in tqdm(
        runs, "boundaries", unit="video", leave=False, disable=not progress
    ):
        with boundary_at(model, boundary):
            result = _swept(model, cases[number], scored_frames, control, cache, settings)
        rows.append(
            {"boundary": boundary, "own": boundary == own, "control": control, "case": number} | result
        )
    return _summarised(pd.DataFrame(rows), note)


def _swept(
    model: Model, case: Case, frames: int | None, other: bool, cache: dict, asked: dict
) -> dict[str, Any]:
    """One video of a sweep: its expert times, and its scores if it is decoded; `cache` keeps the encoded image."""

    def once(encode: Callable) -> Callable:
        def encoded(*args, **kwargs):
            if case.seed not in cache:
                cache.clear()
                cache[case.seed] = encode(*args, **kwargs)
            return cache[case.seed]

        return encoded

    def prefix(decode: Callable) -> Callable:
        latents = None if frames is None else (max(frames, 1) - 1) // model.spec.temporal_factor + 1
        return lambda z, *args, **kwargs: decode(z[:, :, :latents], *args, **kwargs)

    truth = case.truth()
    with (
        alternate_sdpa(model.device) if other else nullcontext(),
        stages(model) as recorder,
        intercept_calls(model.pipeline, {"vae": {"encode": once, "decode": prefix}}),
    ):
        given = inputs(model.conditions, asked.get("frames") or model.spec.defaults.frames, case)
        generation = model.generate(prompt=case.caption, **given, **asked | {"seed": case.seed})
    calls = [call for call in recorder.calls if call.component in EXPERTS]
    row: dict[str, Any] = {"denoising_ms": sum(call.time_ms for call in calls)}
    for side in ("high", "low"):
        expert_calls = [call for call in calls if call.component == f"expert_{side}"]
        row[f"{side}_steps"] = len({call.step for call in expert_calls})
        row[f"{side}_ms"] = median(call.time_ms for call in expert_calls) if expert_calls else float("nan")
    if asked["output"] == "np":
        truth_frames = truth[: len(generation.video)]
        scores = compare_videos(truth_frames, generation.video, metrics=("lpips", "psnr"), progress=False)
        row |= {"lpips": scores.mean("lpips"), "psnr_db": scores.mean("psnr")}
    return row


def _summarised(videos: pd.DataFrame, note: str) -> BoundarySweep:
    plain, again = videos[~videos["control"]], videos[videos["control"]]
    own = plain[plain["own"]]
    rows = []
    for boundary, group in plain.groupby("boundary"):
        row = {"boundary": boundary, "own": bool(group["own"].all()), "cases": len(group)}
        row |= group[["high_steps", "low_steps"]].iloc[0].to_dict()
        row["denoising_ms"] = group["denoising_ms"].median()
        if "lpips" in group:
            loss = quality_loss(group["lpips"].tolist(), own["lpips"].tolist())
            row |= group[["lpips", "psnr_db"]].mean().to_dict() | {"change_percent": loss.percent}
            row |= {"low_percent": loss.low_percent, "high_percent": loss.high_percent}
        rows.append(row)
    work = own["denoising_ms"]
    noise = 100 * float((work / work.median() - 1).abs().max()) if len(work) > 1 else None
    floor = None
    if len(again):
        ratios = again.set_index("case")["lpips"] / own.set_index("case")["lpips"]
        floor = 100 * float((ratios - 1).abs().max())
    return BoundarySweep(pd.DataFrame(rows), videos, noise, floor, note)


@dataclass(frozen=True, eq=False)
class ExpertSummary:
    """When each expert ran, the cost of a switch, the difference of predictions, and the effect of the boundary.

    Attributes:
        timeline, switch: the measurements.
        disagreement, boundaries: None with one expert, or if no other boundary was measured.
    """

    timeline: Timeline
    switch: SwitchCost
    disagreement: Disagreement | None = None
    boundaries: BoundarySweep | None = None

    def row(self) -> dict[str, Any]:
        """One flat record of all measurements."""
        parts = (self.timeline, self.switch, self.disagreement, self.boundaries)
        return {key: value for part in parts if part is not None for key, value in part.row().items()}

    def answer(self, name: str, caveat: str = "") -> Answer:
        """When each expert of the model `name` runs, whether a switch costs time, and whether the choice matters.

        Args:
            caveat: sentence about a profile that is shown beside the measurements.
        """
        first, switch = self.timeline.after_switch(), "Nothing is switched."
        if first:
            same = abs(first["excess_ms"]) <= first["noise_ms"]
            takes = "no time that can be told from noise" if same else time_text(first["excess_ms"])
            switch = f"A switch between them takes {takes}."
        elif self.timeline.schedule.switches:
            switch = "What a switch takes was not measured: too few forwards."
        tiles, apart = list(self.timeline.tiles), ""
        if not self.timeline.schedule.switches:
            tiles.append(("switches between experts", "none", "no time is lost on one"))
        if first:
            noise = f"single forwards vary by {time_text(first['noise_ms'])}"
            more = f"{'+' * (first['excess_ms'] > 0)}{time_text(first['excess_ms'])}"
            value = "within noise" if abs(first["excess_ms"]) <= first["noise_ms"] else more
            tiles.append(("extra time of a switch", value, f"{more}; {noise}"))
        if self.disagreement is not None:
            differ, noise = self.disagreement.percents()
            near = self.disagreement.at_boundary()
            apart = f" The choice matters: their predictions differ by {differ}, equal calls by {noise}."
            if near["relative_l2"] <= near["floor_l2"]:
                apart = (
                    f" The choice does not matter: their predictions differ by {differ}, as equal calls do."
                )
            tiles.append(("experts differ by", differ, f"equal calls: {noise}"))
        if self.boundaries is not None and not self.boundaries.note:
            own = self.boundaries.frame.loc[self.boundaries.frame["own"], "boundary"].iloc[0]
            better, beside = self.boundaries.better, "the model's own; no other is better beyond noise"
            if better is not None:
                beside = f"better than the model's own, {own:g}"
            tiles.append(("best boundary", f"{own if better is None else better:g}", beside))
        measured = "" if self.boundaries is None else self.boundaries.sentence
        return answer(
            f"{sentence(self.timeline.order)} {switch}{apart}",
            f"{caveat}Measured with {name}. {measured}",
            sentence(self.switch.sentence),
            "Next: 14_memory shows whether both experts fit into memory, 42_component what an engine gains on one.",
            tiles=tuple(tiles),
        )
