"""Predicted effects compared with generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.core.stats import interval_text, percentile_interval, resampled
from wanlab.evaluate.metrics import compare_videos
from wanlab.heldout.cases import Case, for_selection
from wanlab.models.variants import alternate_sdpa
from wanlab.precision.quant_linear import fake_quantized
from wanlab.precision.recording import Example, as_examples
from wanlab.precision.sensitivity.result import Sensitivity

KINDS = ("layer", "layer", "block", "projection", "several", "expert")

TRIES = 20
"""Number of draws for a choice that was not drawn before; with few layers and formats some may occur twice."""


@dataclass(frozen=True)
class Choice:
    """Layers of one expert that are rounded to one format in a range of steps.

    Attributes:
        kind: `"layer"`, `"block"`, `"projection"` (one of all blocks), `"several"` or `"expert"` (all of them).
        steps: ranges of steps of the measurement, inclusive.
        predicted: sum of the effects of these layers; neighbouring ranges count as one.
    """

    kind: str
    component: str
    layers: tuple[str, ...]
    format: str
    steps: tuple[tuple[int, int], ...]
    predicted: float


def draw_choices(sensitivity: Sensitivity, samples: int, seed: int = 0) -> list[Choice]:
    """Choices with a wide range of effects: layers evenly over the ranking, blocks, projections, random sets, whole experts.

    Experts, formats and ranges of steps are drawn at random.
    """
    if samples < 3:
        raise WanlabError(f"samples must be at least 3, not {samples}: fewer have no rank correlation")
    generator = np.random.default_rng(seed)
    frame = sensitivity.frame
    # Over all its steps a layer's errors add up before they are squared, as they do within a range.
    joined = sensitivity.with_bands(
        [(bands[0][0], bands[-1][1]) for bands in sensitivity.bands.values()]
    ).frame
    singles = frame.sort_values("effect", ignore_index=True)
    kinds = [KINDS[i % len(KINDS)] for i in range(samples)]
    places = iter((np.arange(count := kinds.count("layer")) + generator.random(count)) / max(count, 1))
    choices: list[Choice] = []
    for kind in kinds:
        if kind == "layer":
            row = singles.iloc[int(next(places) * len(singles))]
            steps: tuple[tuple[int, int], ...] = ((int(row["first_step"]), int(row["last_step"])),)
            choices.append(_choice(frame, kind, row["component"], [row["layer"]], row["format"], steps))
            continue
        for _ in range(TRIES):
            component = str(generator.choice(sensitivity.components))
            format = str(generator.choice(sensitivity.formats))
            names = _layers(kind, frame[frame["component"] == component], generator)
            bands = sensitivity.bands[component]
            one = int(generator.integers(len(bands) + 1))
            steps = tuple(bands) if one == len(bands) else (bands[one],)
            together = len(steps) > 1 and "," not in spell_steps(steps)
            choice = _choice(joined if together else frame, kind, component, names, format, steps)
            if choice not in choices:
                break
        choices.append(choice)
    return choices


@contextmanager
def rounded_in_steps(
    model, choice: Choice, amax: Mapping[str, float], steps: int, **size: int | None
) -> Iterator[None]:
    """Inside the block generations with this number of steps round a choice's layers, in its ranges of steps only; `size` is
    height, width and frames of the video, on which the timesteps of some families depend."""
    network = model.component(choice.component)
    timesteps = model.schedule(steps, **size)["timestep"].to_numpy()
    formats = dict.fromkeys(choice.layers, choice.format)
    stack, on = ExitStack(), False

    def begin(module, args, kwargs) -> None:
        nonlocal on
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        step = int(np.abs(timesteps - float(timestep.max())).argmin())
        inside = any(first <= step <= last for first, last in choice.steps)
        if inside and not on:
            stack.enter_context(fake_quantized(network, formats, amax))
        elif on and not inside:
            stack.close()
        on = inside

    handle = network.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        stack.close()


def spell_steps(ranges: Sequence[tuple[int, int]]) -> str:
    """`((3, 4), (5, 5))` as `"3-5"`, neighbours joined."""
    joined: list[list[int]] = []
    for first, last in sorted(ranges):
        if joined and joined[-1][1] + 1 == first:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in joined)


def ranges_of(sensitivity: Sensitivity, component: str) -> dict[str, float]:
    """Layer -> range of its input in the measurement."""
    part = next(part for part in sensitivity.parts if part.component == component)
    return {name: amax for name, amax in zip(part.layers, part.amax, strict=True) if amax is not None}


def _choice(frame, kind: str, component: str, names: Sequence[str], format: str, steps) -> Choice:
    rows = frame[
        (frame["component"] == component)
        & (frame["format"] == format)
        & frame["layer"].isin(names)
        & frame["first_step"].isin([first for first, _ in steps])
    ]
    return Choice(kind, component, tuple(names), format, tuple(steps), float(rows["effect"].sum()))


def _layers(kind: str, own, generator) -> list[str]:
    names = list(dict.fromkeys(own["layer"]))
    if kind == "expert":
        return names
    if kind == "several":
        size = round(len(names) ** generator.random())
        return sorted(generator.choice(names, max(2, min(size, len(names))), replace=False).tolist())
    value = generator.choice(sorted(set(own[kind])))
    return list(dict.fromkeys(own.loc[own[kind] == value, "layer"]))


RESAMPLES = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95 % bootstrap interval over choices; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    choices: int

    def __str__(self) -> str:
        if self.value is None:
            return f"unknown of {self.choices} choices"
        return f"{self.value:.3f} ({interval_text(self.low, self.high, '.3f')}, {self.choices} choices)"


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted beside true effects.

    Attributes:
        frame: one row per choice: kind, component, layers (count), layer (its name where it is one), format, steps,
            predicted, true (squared relative L2 of the final latents' change, mean over cases), true_low, true_high
            (smallest and largest case), and with `lpips` lpips (mean over cases and frames, against the unrounded
            video).
        floor: effect of another exact attention kernel on the latents of the first case (noise floor). floor_lpips: LPIPS
            of its video. Choices whose true effect is not above the floor mean nothing.
        floor_name: name of that kernel.
        generations: number of generations, the originals and the floor included.
        per_case: true effect of every choice in every case, in the order of `frame`.
    """

    frame: pd.DataFrame
    floor: float
    floor_lpips: float | None
    floor_name: str
    generations: int
    per_case: tuple[tuple[float, ...], ...] = ()

    def correlation(self, truth: str = "true", kind: str | None = None) -> Correlation:
        """Rank correlation of predicted effects with `"true"` or `"lpips"`, of one kind of choices or all.

        Raises:
            WanlabError: LPIPS was not measured.
        """
        if truth not in self.frame or truth not in ("true", "lpips"):
            raise WanlabError(f"no {truth!r} was measured; take 'true', or measure with lpips=True")
        frame = self.frame if kind is None else self.frame[self.frame["kind"] == kind]
        return rank_correlation(frame["predicted"].tolist(), frame[truth].tolist())

    def between_cases(self) -> Correlation:
        """Rank correlation of the true effects in the first case with those in the others, which no prediction
        can exceed by much. Unknown with one case.
        """
        rows = [row for row in self.per_case if len(row) > 1]
        return rank_correlation([row[0] for row in rows], [sum(row[1:]) / (len(row) - 1) for row in rows])

    def row(self) -> dict[str, Any]:
        """Figures: rank_correlation, low, high, layer_rank_correlation, between_cases, scale, floor, generations."""
        whole = self.correlation()
        return {
            "rank_correlation": whole.value,
            "low": whole.low,
            "high": whole.high,
            "layer_rank_correlation": self.correlation(kind="layer").value,
            "between_cases": self.between_cases().value,
            "scale": self.scale,
            "floor": self.floor,
            "generations": self.generations,
        }

    def __str__(self) -> str:
        layers = self.correlation(kind="layer")
        sentence = f"rank correlation with generations {self.correlation()}; of single layers {layers}"
        between = self.between_cases()
        return sentence + (f"; of one case with the others {between}" if between.value is not None else "")

    @property
    def scale(self) -> float:
        """Median of true over predicted; 1 where the prediction is right in size."""
        return float((self.frame["true"] / self.frame["predicted"]).median())


def sensitivity_record(sensitivity: Sensitivity, agreement: Agreement | None = None) -> dict[str, Any]:
    """Flat record: the most sensitive row, and the numbers of the agreement where it was measured."""
    names = ["component", "layer", "format", "first_step", "last_step", "effect", "effect_low", "effect_high"]
    top = sensitivity.ranked(1)[names].iloc[0].to_dict()
    return top | (agreement.row() if agreement is not None else {})


def end_to_end_agreement(
    model,
    sensitivity: Sensitivity,
    cases: Sequence,
    *,
    samples: int = 24,
    lpips: bool = False,
    backbone: str = "auto",
    progress: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Agreement:
    """Generate with drawn sets of layers rounded, and compare true with predicted effects.

    Args:
        model: model that was measured. cases: `Example`s or (image, prompt) pairs, e.g. those of the recording, or cases of
            `wanlab.heldout.cases` to select on; never those of the final examination.
        samples: number of choices of layers, format and steps; each takes one generation per case.
        lpips: whether videos are decoded and compared too.
        settings: settings of `Model.generate`; by default those of the recording. The number of steps cannot differ.

    Raises:
        WanlabError: no case, too few samples, another model or number of steps.
    """
    if sensitivity.settings["model"] != model.spec.name:
        raise WanlabError(
            f"sensitivity is of {sensitivity.settings['model']}, this model is {model.spec.name}"
        )
    generation = dict(sensitivity.settings["generation"])
    if settings.get("steps", generation["steps"]) != generation["steps"]:
        raise WanlabError(f"sensitivity is of {generation['steps']} steps; generate with as many")
    generation |= settings
    size = {name: generation.get(name) for name in ("height", "width", "frames")}
    examples = _examples(cases)
    choices = draw_choices(sensitivity, samples, seed)
    judge = _Judge(model, generation, lpips, backbone)
    bar = tqdm(
        total=(1 + len(choices)) * len(examples) + 1,
        desc="end to end",
        unit="generation",
        leave=False,
        disable=not progress,
    )
    with bar:
        originals = [judge.generate(example, bar) for example in examples]
        with alternate_sdpa(model.device) as floor_name:
            floor, floor_lpips = judge.distances(originals[0], judge.generate(examples[0], bar))
        rows, truths = [], []
        for choice in choices:
            amax = ranges_of(sensitivity, choice.component)
            with rounded_in_steps(model, choice, amax, generation["steps"], **size):
                outputs = [judge.generate(example, bar) for example in examples]
            distances = [judge.distances(*pair) for pair in zip(originals, outputs, strict=True)]
            changes = [latent for latent, _ in distances]
            truths.append(changes)
            row = {
                "kind": choice.kind,
                "component": choice.component,
                "layers": len(choice.layers),
                "layer": choice.layers[0] if len(choice.layers) == 1 else "",
                "format": choice.format,
                "steps": spell_steps(choice.steps),
                "predicted": choice.predicted,
                "true": sum(changes) / len(changes),
                "true_low": min(changes),
                "true_high": max(changes),
            }
            if lpips:
                row["lpips"] = sum(score for _, score in distances) / len(distances)
            rows.append(row)
    frame = pd.DataFrame(rows).sort_values("true", ascending=False)
    return Agreement(
        frame=frame.reset_index(drop=True),
        floor=floor,
        floor_lpips=floor_lpips,
        floor_name=floor_name,
        generations=(1 + len(choices)) * len(examples) + 1,
        per_case=tuple(tuple(truths[index]) for index in frame.index),
    )


def rank_correlation(predicted: Sequence[float], true: Sequence[float], seed: int = 0) -> Correlation:
    """Spearman's rank correlation (Spearman 1904), ties at their mean rank, with a percentile bootstrap over pairs."""

    def of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of every row of `[rows, choices]`; NaN where one side does not vary."""
        sides = [pd.DataFrame(side).rank(axis=1).to_numpy() for side in (a, b)]
        sides = [side - side.mean(axis=1, keepdims=True) for side in sides]
        spread = np.sqrt((sides[0] ** 2).sum(axis=1) * (sides[1] ** 2).sum(axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sides[0] * sides[1]).sum(axis=1) / spread

    first, second = np.asarray(predicted, float), np.asarray(true, float)
    count = len(first)
    value = float(of(first[None], second[None])[0]) if count >= 3 else float("nan")
    if value != value:
        return Correlation(None, None, None, count)
    (values,) = resampled(
        [np.arange(count)],
        lambda drawn: of(first[drawn], second[drawn]),
        np.random.default_rng(seed),
        RESAMPLES,
    )
    return Correlation(value, *percentile_interval(values, value), count)


class _Judge:
    """Generates latents and, with `lpips`, videos, and measures the distance of two."""

    def __init__(self, model, generation: dict[str, Any], lpips: bool, backbone: str) -> None:
        self._model, self._generation, self._lpips, self._backbone = model, generation, lpips, backbone

    def generate(self, example: Example, bar) -> tuple:
        """Latents, and the video or None."""
        generation = self._model.generate(
            prompt=example.prompt,
            negative_prompt=example.negative_prompt,
            seed=example.seed,
            output="latent",
            **example.inputs(self._model, self._generation.get("frames")),
            **self._generation,
        )
        bar.update()
        return generation.video, self._video(example, generation.video) if self._lpips else None

    def _video(self, example: Example, latents: np.ndarray) -> np.ndarray:
        """The video of the latents; of other families than Wan of the same generation again."""
        if (
            type(self._model.pipeline.vae).__name__ == "AutoencoderKLWan"
            and self._model.family.title == "Wan"
        ):
            return self._decode(latents)
        return self._model.generate(
            prompt=example.prompt,
            negative_prompt=example.negative_prompt,
            seed=example.seed,
            **example.inputs(self._model, self._generation.get("frames")),
            **self._generation,
        ).video

    def distances(self, original: tuple, other: tuple) -> tuple[float, float | None]:
        """Squared relative distance of the latents, and LPIPS of the videos or None."""
        latent = float(((other[0] - original[0]) ** 2).sum() / (original[0] ** 2).sum())
        if not self._lpips:
            return latent, None
        scores = compare_videos(
            original[1], other[1], "lpips", self._backbone, self._model.device, progress=False
        )
        return latent, float(scores.mean("lpips"))

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """The video of latents, as the pipeline makes it: `[T, H, W, 3]` in [0, 1]."""
        vae = self._model.pipeline.vae
        given = torch.from_numpy(latents)[None].to(self._model.device, vae.dtype)
        shape = (1, -1, 1, 1, 1)
        std, mean = (
            torch.tensor(values, device=given.device, dtype=given.dtype).view(shape)
            for values in (vae.config.latents_std, vae.config.latents_mean)
        )
        with torch.no_grad():
            video = vae.decode(given * std + mean, return_dict=False)[0]
        return ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy()


def _examples(cases: Sequence) -> list[Example]:
    """Examples from cases to select by, on which nothing is calibrated here; those of the final set are refused."""
    for_selection(case for case in cases if isinstance(case, Case))
    return as_examples(
        Example(case.truth()[0], case.caption, case.seed, adapts=True) if isinstance(case, Case) else case
        for case in cases
    )
