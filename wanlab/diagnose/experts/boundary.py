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

from wanlab.core.answer import Answer, Step, answer, step
from wanlab.core.errors import WanlabError
from wanlab.core.stats import interval_text
from wanlab.core.words import counted, listed, percent_text, sentence, time_text
from wanlab.diagnose.experts.switching import SwitchCost
from wanlab.diagnose.experts.timeline import Timeline
from wanlab.evaluate.loss import quality_loss
from wanlab.evaluate.metrics import compare_videos
from wanlab.heldout.cases import Case, inputs
from wanlab.measure.load import metered
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

    def percents(self) -> tuple[str, str, str]:
        """How far the experts differ nearest to the boundary, at most at any step, and how far equal calls do, as text."""
        near, most = self.at_boundary(), float(self.steps["relative_l2"].max())
        return _percent_text(near["relative_l2"]), _percent_text(most), _percent_text(near["floor_l2"])


def _percent_text(relative: float) -> str:
    """A relative distance in percent, in two digits: 0.0895 as "9.0 %"."""
    return percent_text(float(f"{100 * relative:.2g}"))


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
        timesteps: training timesteps, of which a boundary is a share.
    """

    frame: pd.DataFrame
    videos: pd.DataFrame
    noise_percent: float | None
    floor_percent: float | None
    note: str
    timesteps: float = 1000.0

    def row(self) -> dict[str, Any]:
        """Flat record: boundary_best (that of the lowest LPIPS; None where it cannot be told, or without quality),
        boundary_noise_percent, boundary_floor_percent."""
        own = float(self.own["boundary"])
        best = self.better if self.better is not None else own if self.own_is_best else None
        noise = {"boundary_noise_percent": self.noise_percent, "boundary_floor_percent": self.floor_percent}
        return {"boundary_best": best} | noise

    def __str__(self) -> str:
        return self.sentence

    def title(self, boundary: float) -> str:
        """A boundary as all texts and figures name it: "timestep 900"."""
        return f"timestep {boundary * self.timesteps:g}"

    @property
    def shown(self) -> pd.DataFrame:
        """The table with its boundaries named as in texts and figures."""
        return self.frame.assign(boundary=self.frame["boundary"].map(self.title))

    @property
    def own(self) -> pd.Series:
        """The row of the model's own boundary."""
        return self.frame[self.frame["own"]].iloc[0]

    @property
    def tried(self) -> pd.DataFrame:
        """The rows of the other boundaries."""
        return self.frame[~self.frame["own"]]

    @property
    def better(self) -> float | None:
        """A boundary that is better than the model's own beyond noise; None without any, or without an interval."""
        if self.note or self.tried.empty:
            return None
        best = self.tried.loc[self.tried["change_percent"].idxmin()]
        high = best["high_percent"]  # there is none with two cases
        certain = not pd.isna(high) and high < 0
        return (
            float(best["boundary"])
            if certain and -best["change_percent"] > (self.floor_percent or 0.0)
            else None
        )

    @property
    def own_is_best(self) -> bool:
        """Whether every other boundary that was tried is worse than the model's own, beyond noise."""
        if self.note or self.tried.empty:
            return False
        least = max(self.floor_percent or 0.0, 0.0)
        return bool((self.tried["low_percent"] > 0).all() and (self.tried["change_percent"] > least).all())

    @property
    def undecided(self) -> bool:
        """Whether more cases could tell if another boundary is better."""
        return not self.note and self.better is None and not self.own_is_best

    @property
    def extent(self) -> str:
        """How much was tried: "2 cases, 2 other boundaries"."""
        others = len(self.tried)
        return f"{counted(int(self.own['cases']), 'case')}, {others} other boundar{'ies' if others != 1 else 'y'}"

    @property
    def sentence(self) -> str:
        """Whether another boundary is better than the model's own, with its interval; the note without quality."""
        if self.note:
            return sentence(f"whether another boundary is better is not known: {self.note}")
        changes = [
            f"{row.change_percent:+.2f} % at {self.title(row.boundary)}"
            f" ({interval_text(row.low_percent, row.high_percent, '+.2f')})"
            for row in self.tried.itertuples()
        ]
        own = f"the model's own, {self.title(self.own['boundary'])}"
        if self.better is not None:
            holds = f"A boundary at {self.title(self.better)} is better than {own}"
        elif self.own_is_best:
            holds = f"Every other boundary that was tried is worse than {own}"
        else:
            holds = f"Whether another boundary is better than {own}, is undecided"
        return (
            f"{holds} ({self.extent}): LPIPS to the true video changes by {listed(changes)}; more is worse."
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
    schedule = precompute_schedule(model, settings.get("steps"))
    own = schedule.boundary_ratio
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
    said = list(model.notes)
    bar = tqdm(runs, "boundaries", unit="video", leave=False, disable=not progress)
    with metered(model.device):
        for boundary, number, control in bar:
            with boundary_at(model, boundary):
                result = _swept(model, cases[number], scored_frames, control, cache, settings)
            rows.append(
                {"boundary": boundary, "own": boundary == own, "control": control, "case": number} | result
            )
    # That an expert runs in no step is true of a moved boundary only, and would be read as a remark on the model's own.
    model.notes[:] = said
    timesteps = schedule.boundary_timestep / own if own else 1000.0
    return _summarised(pd.DataFrame(rows), note, timesteps)


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


def _summarised(videos: pd.DataFrame, note: str, timesteps: float) -> BoundarySweep:
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
    return BoundarySweep(pd.DataFrame(rows), videos, noise, floor, note, timesteps)


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
        tiles = [*self.timeline.tiles]
        if not self.timeline.schedule.switches:
            tiles.append(("switches between experts", "none", "no time is lost on one"))
        if first := self.timeline.after_switch():
            noise = f"single forwards vary by {time_text(first['noise_ms'])}"
            more = f"{'+' * (first['excess_ms'] > 0)}{time_text(first['excess_ms'])}"
            value = "within noise" if abs(first["excess_ms"]) <= first["noise_ms"] else more
            tiles.append(("extra time of a switch", value, f"{more}; {noise}"))
        if self.disagreement is not None:
            differ, most, noise = self.disagreement.percents()
            tiles.append(
                ("experts differ by", f"{differ} to {most}", f"of the prediction; equal calls: {noise}")
            )
        if (sweep := self.boundaries) is not None and not sweep.note:
            own = sweep.title(sweep.own["boundary"])
            better = "undecided" if sweep.undecided else "no"
            if sweep.better is not None:
                better = sweep.title(sweep.better)
            tiles.append(("better boundary", better, f"own: {own}; {sweep.extent}"))
        return answer(
            f"{sentence(self.timeline.order)} {self._switch}{self._apart}",
            caveat,
            f"Measured with {name} in one generation. {'' if sweep is None else sweep.sentence}",
            sentence(self.switch.sentence),
            tiles=tuple(tiles),
            next=self._next,
        )

    @property
    def _switch(self) -> str:
        """What a switch costs here, as a sentence."""
        if not (first := self.timeline.after_switch()):
            known = "What a switch takes was not measured: too few forwards."
            return known if self.timeline.schedule.switches else "Nothing is switched."
        if abs(first["excess_ms"]) <= first["noise_ms"]:
            return "A switch adds no time that can be told from noise."
        word = "adds" if first["excess_ms"] > 0 else "saves"
        return f"A switch {word} {time_text(abs(first['excess_ms']))}."

    @property
    def _apart(self) -> str:
        """How far the experts' predictions differ, and so whether the choice matters, as a sentence."""
        if self.disagreement is None:
            return ""
        near = self.disagreement.at_boundary()
        differ, most, _ = self.disagreement.percents()
        if near["relative_l2"] <= near["floor_l2"]:
            return f" The choice does not matter at the boundary: predictions differ by {differ}, as equal calls do."
        far = f", and by up to {most} at other steps" if most != differ else ""
        return f" The choice matters: their predictions differ by {differ} at the boundary{far}."

    @property
    def _next(self) -> Step:
        """What to do next: more cases where they can decide on the boundary, else what acts on the experts."""
        sweep = self.boundaries
        if sweep is not None and sweep.undecided and len(sweep.tried):
            cases = max(8, 2 * int(sweep.own["cases"]))
            return step("can decide whether another boundary is better", cases=cases)
        if self.timeline.schedule.switches:
            return step(
                "shows whether both experts fit into memory, so that a switch stays free", "14_memory"
            )
        return step("times the expert with another engine", "42_component")
