"""Baseline of one model, and comparison of several models on the same work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from wanlab.core.answer import Answer, answer, more_videos, step
from wanlab.core.errors import WanlabError
from wanlab.core.words import sentence, time_text
from wanlab.measure.in_turn import InTurn, in_turn, take_in_turn, until_told
from wanlab.measure.load import LoadMeter, withdraw
from wanlab.measure.memory import PeakMemory, peak_memory
from wanlab.measure.stages import COMPONENTS, OTHER, stages
from wanlab.measure.timing import AAControl, Comparison, Samples, aa_control, control_of
from wanlab.models.pipeline import Generation, Model
from wanlab.models.spec import component_title


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """Times of whole generations of several variants, measured interleaved.

    Attributes:
        control: A/A control of the first variant, whose samples are split in two; its spread is the noise floor.
        samples: samples of whole generations, per variant.
        comparisons: later variant -> its speed-up over the first.
        breakdown: component, `<variant>_ms` and `<variant>_percent` of one more, recorded generation; each
            variant's times add up to the wall clock of its recorded generation.
        generations: variant -> the recorded generation, with its video.
    """

    control: AAControl
    samples: dict[str, Samples]
    comparisons: dict[str, Comparison]
    breakdown: pd.DataFrame
    generations: dict[str, Generation]

    @property
    def timings(self) -> list[Samples]:
        """Both halves of the first variant, then the other variants: the series that a plot of all samples shows."""
        return [self.control.first, self.control.second, *list(self.samples.values())[1:]]

    @property
    def times(self) -> pd.DataFrame:
        """One row per variant: variant, time_per_video_ms (median), time_per_frame_ms."""
        rows = [
            {
                "variant": label,
                "time_per_video_ms": samples.median,
                "time_per_frame_ms": samples.median / self.generations[label].settings["frames"],
            }
            for label, samples in self.samples.items()
        ]
        return pd.DataFrame(rows)


def compare_models(
    variants: Mapping[str, Model],
    image,
    prompt: str,
    *,
    rounds: int = 3,
    precision: float | None = None,
    limit_s: float | None = None,
    progress: bool = True,
    **settings,
) -> ModelComparison:
    """Compare the times of several variants of a model, then record where the time of each goes.

    A round runs every variant twice: in the given order and in its reverse.
    Warm the variants up before, with one generation each.

    Args:
        variants: label -> model; the others are compared with the first.
        image, prompt, settings: arguments of `Model.generate`.
        rounds: number of rounds, at least 1; with `precision` the fewest.
        precision, limit_s: go on until every ratio is known to so many percent, or time is up; see `take_in_turn`.
        progress: show a progress bar.

    Raises:
        WanlabError: no variant, no round, or an error of `Model.generate`.
    """
    if not variants or rounds < 1:
        raise WanlabError(
            f"compare_models of {len(variants)} variants in {rounds} rounds; give at least one of each"
        )
    timed = _in_turn(
        variants,
        lambda label: variants[label].generate(image, prompt, **settings).wall_ms,
        rounds=rounds,
        precision=precision,
        limit_s=limit_s,
        progress=progress,
    )
    tables, generations = [], {}
    for label, model in variants.items():
        with stages(model) as recorder:  # after the timing, because recording synchronises the device
            generations[label] = model.generate(image, prompt, **settings)
        table = recorder.breakdown(generations[label].wall_ms).set_index("component")
        tables.append(
            table[["time_ms", "share_percent"]].set_axis([f"{label}_ms", f"{label}_percent"], axis="columns")
        )
    return ModelComparison(
        control=next(iter(timed.controls.values())),
        samples=timed.samples,
        comparisons=timed.comparisons,
        breakdown=_joined(tables),
        generations=generations,
    )


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One table, components in the order of their use; a component that a variant lacks is left empty."""
    joined = pd.concat(tables, axis="columns", sort=False)
    order = [name for name in (*COMPONENTS, OTHER) if name in joined.index]
    return joined.loc[order].rename_axis("component").reset_index()


def _in_turn(variants: Mapping[str, Model], sample: Callable[[str], float], **until: Any) -> InTurn:
    """Videos of several variants, timed in turn; `until` as in `take_in_turn`."""
    where = {label: str(getattr(model, "device", "")) for label, model in variants.items()}
    meter = LoadMeter(gpu=any("cuda" in device for device in where.values()))
    halves, ended = take_in_turn(list(variants), sample, **until)
    load = meter.load()

    def of(label: str, *parts: int, again: str = "") -> Samples:
        values = [value for half in parts for value in halves[label, half]]
        return Samples(f"{label}{again}", tuple(values), where[label], load=load)

    samples = {label: of(label, 0, 1) for label in variants}
    controls = {label: control_of(of(label, 0), of(label, 1, again=" (again)")) for label in variants}
    return in_turn(samples, controls, ended)


MOST_NOISE_PERCENT = 10.0
"""Noise above which a baseline is worth more samples before anything is compared with it."""
RECORDED_PERCENT = 10.0
"""A recorded generation that differs by more from the timed ones is said: its times are not parts of theirs."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """Cost of one generation: time, memory, and time per component.

    Attributes:
        label: name of the row, e.g. "eager".
        control: A/A control: whole generations in two interleaved series; their spread is the noise floor.
        memory: peak during those generations.
        breakdown: time per component of one more, recorded generation; adds up to its wall clock.
        calls: every component call of that generation, with step, timestep and branch.
        generation: the recorded generation, with its video.
        again: the last timed generation: a repeat with the same inputs, for the noise floor of any divergence.
        load_ms: time of loading, None when it is not known.
    """

    label: str
    control: AAControl
    memory: PeakMemory
    breakdown: pd.DataFrame
    calls: pd.DataFrame
    generation: Generation
    again: Generation
    load_ms: float | None

    @property
    def samples(self) -> Samples:
        """Both sides of the control together: every whole generation that was timed."""
        both = self.control.first.values_ms + self.control.second.values_ms
        first = self.control.first
        return Samples(self.label, both, first.device, first.clock, first.load)

    @property
    def row(self) -> dict[str, float | str | None]:
        """The row of a before/after table: medians, with units in the names."""
        samples, frames = self.samples, self.generation.settings["frames"]
        return {
            "variant": self.label,
            "time_per_video_ms": samples.median,
            "time_per_frame_ms": samples.median / frames,
            "throughput_frames_per_s": 1e3 * frames / samples.median,
            "peak_memory_gib": self.memory.peak_gib,
            "load_ms": self.load_ms,
        }

    @property
    def recorded_percent(self) -> float:
        """How much longer the recorded generation took than the median of the timed ones, in percent.

        The breakdown adds up to the recorded one. Recording itself costs little, so a large difference is the machine's.
        """
        return 100 * (float(self.breakdown["time_ms"].sum()) / self.samples.median - 1)

    @property
    def caveat(self) -> str:
        """A sentence where times of the components and of the video do not go together; else ""."""
        longer = self.recorded_percent
        if abs(longer) <= RECORDED_PERCENT:
            return ""
        recorded, word = time_text(self.breakdown["time_ms"].sum()), "more" if longer > 0 else "less"
        return (
            f"the components add up to {recorded}, {abs(longer):.0f} % {word} than the timed videos: they are"
            " of one more generation, recorded while the machine ran at another speed; read their shares"
        )

    def answer(self, name: str) -> Answer:
        """What one video of the model `name` costs, how much that varies, and which component takes most of it."""
        settings, top = self.generation.settings, self.breakdown.loc[self.breakdown["share_percent"].idxmax()]
        first, second = (len(side.values_ms) for side in (self.control.first, self.control.second))
        where = (
            "the host's own work" if top["component"] == OTHER else f"the {component_title(top['component'])}"
        )
        following = step("shows which code takes that time", "11_flame_graph")
        noise = self.control.noise_percent
        if noise > MOST_NOISE_PERCENT:
            following = more_videos(max(5, 2 * first))
        return answer(
            f"{name} makes one video in {time_text(self.samples.median)}, and {where} takes"
            f" {top['share_percent']:.0f} % of that. Equal videos differ by up to"
            f" {noise:.{0 if noise >= 10 else 1}f} %, so a smaller change cannot be seen.",
            f"The video has {settings['width']} x {settings['height']} pixels and {settings['frames']} frames, made in"
            f" {settings['steps']} steps; {first} + {second} of them were timed.",
            sentence(self.caveat),
            next=following,
        )

    def forward_ms(self) -> pd.DataFrame:
        """Median time of one expert forward: component, calls, median_ms, min_ms, max_ms."""
        experts = self.calls[self.calls["component"].str.startswith("expert")]
        grouped = experts.groupby("component", sort=False)["time_ms"]
        frame = grouped.agg(calls="size", median_ms="median", min_ms="min", max_ms="max")
        return frame.reset_index()


def baseline(
    model: Model,
    image,
    prompt: str,
    *,
    label: str = "eager",
    iterations: int = 2,
    warmup: int = 1,
    load_ms: float | None = None,
    progress: bool = True,
    **settings,
) -> Baseline:
    """Measure whole generations, then record the stages of one more.

    Timing comes first, without recording: warm-up, then 2 x `iterations` generations as an A/A control with their peak
    memory. Then one generation with every component call recorded (which synchronises the device).

    Args:
        model: from `wanlab.models.load` or `wanlab.engines.use`.
        image, prompt, settings: arguments of `Model.generate`.
        label: name of the row.
        iterations: generations on each side of the A/A control.
        warmup: generations before the first sample.
        load_ms: time of loading, shown in the row; from the model's own load report by default.
    """

    last: list[Generation] = []

    def generate() -> Generation:
        last[:] = [model.generate(image, prompt, **settings)]
        return last[0]

    with peak_memory(model.device) as memory:
        control = aa_control(
            generate,
            warmup=warmup,
            iterations=iterations,
            device=model.device,
            progress=progress,
            label=label,
        )
    again = last[0]
    with stages(model) as recorder:
        generation = generate()
    return Baseline(
        label=label,
        control=control,
        memory=memory,
        breakdown=recorder.breakdown(generation.wall_ms),
        calls=recorder.frame(),
        generation=generation,
        again=again,
        load_ms=model.load.time_ms if load_ms is None else load_ms,
    )


def versus(
    original: tuple[Baseline, Model],
    candidate: tuple[Baseline, Model],
    image,
    prompt: str,
    *,
    precision: float | None = 5.0,
    limit_s: float | None = None,
    rounds: int = 3,
    progress: bool = True,
    **settings,
) -> tuple[Baseline, Baseline, Comparison]:
    """Time two models that have their baselines in turn, until the ratio of their times can be told.

    Both models are warm from their baselines. Arguments as in `compare_models`.

    Returns:
        Both baselines with the new times and their A/A controls in place of their own, and the comparison.
    """
    labels = [baseline.label for baseline, _ in (original, candidate)]
    if labels[0] == labels[1]:
        raise WanlabError(f"both are labelled {labels[0]!r}; give the baselines two labels")
    calls = {
        cost.label: functools.partial(model.generate, image, prompt, **settings)
        for cost, model in (original, candidate)
    }
    timed = until_told(
        calls,
        warmup=0,
        rounds=rounds,
        precision=precision,
        limit_s=limit_s,
        device=original[1].device,
        progress=progress,
    )
    withdraw(cost.control.first.load for cost, _ in (original, candidate))
    before, after = (replace(each, control=timed.controls[each.label]) for each, _ in (original, candidate))
    return before, after, timed.comparisons[after.label]


def before_after(rows: list[dict], **more: list[str]) -> pd.DataFrame:
    """The before/after table: one row per measure, one column per variant, and the ratio of each to the first.

    Args:
        rows: rows from `Baseline.row`; the first is the original.
        more: further rows of text, one entry per variant, e.g. `divergence_lpips=["0", "1e-6"]`.

    Returns:
        DataFrame: measure, one column per variant, and `<variant> ratio` per later variant, above 1 where the variant
        is better (less time or memory, more throughput); empty where no ratio exists.
    """
    names = [str(row["variant"]) for row in rows]
    lines = []
    for measure in [key for key in rows[0] if key != "variant"]:
        values = [row.get(measure) for row in rows]
        line = {"measure": measure} | {
            n: "" if v is None else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
            for n, v in zip(names, values, strict=True)
        }
        for name, value in zip(names[1:], values[1:], strict=True):
            known = values[0] and value
            gain = (value / values[0] if "throughput" in measure else values[0] / value) if known else None
            line[f"{name} ratio"] = f"{gain:.2f}x" if gain else ""
        lines.append(line)
    for measure, texts in more.items():
        line = {"measure": measure} | dict(zip(names, texts, strict=True))
        lines.append(line | {f"{name} ratio": "" for name in names[1:]})
    return pd.DataFrame(lines)
