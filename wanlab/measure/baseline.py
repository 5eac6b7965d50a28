"""A model's baseline, and two models compared on the same work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.measure.memory import PeakMemory, peak_memory
from wanlab.measure.stages import COMPONENTS, OTHER, stages
from wanlab.measure.timing import AAControl, Comparison, Samples, aa_control, compare
from wanlab.models.pipeline import Generation, Model


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """Whole generations of several variants, taken in turn.

    Attributes:
        control: the first variant as if it were two; its spread is the noise floor.
        samples: every whole generation of each variant.
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
        """Both halves of the first variant, then the others: what a figure of all samples shows."""
        return [self.control.first, self.control.second, *list(self.samples.values())[1:]]

    @property
    def times(self) -> pd.DataFrame:
        """A line per variant: variant, time_per_video_ms (median), time_per_frame_ms."""
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
    variants: Mapping[str, Model], image, prompt: str, *, rounds: int = 1, progress: bool = True, **settings
) -> ModelComparison:
    """Time variants of a model against each other, then record where each one's time goes.

    A round takes every variant twice, in one order and then in its reverse, and then all of this backwards:
    four generations of each. Warm the variants up before, with one generation each.

    Args:
        variants: label -> model; the first is what the others are compared with.
        image, prompt, settings: as `Model.generate` takes them.
        rounds: at least 1.
        progress: show a progress bar.

    Raises:
        WanlabError: no variant, no round, or whatever `Model.generate` refuses.
    """
    if not variants or rounds < 1:
        raise WanlabError(
            f"side_by_side of {len(variants)} variants in {rounds} rounds; give at least one of each"
        )
    halves: dict[tuple[str, int], list[float]] = {(label, half): [] for label in variants for half in (0, 1)}
    there = [(label, 0) for label in variants] + [(label, 1) for label in reversed(list(variants))]
    order = (there + there[::-1]) * rounds
    for label, half in tqdm(order, desc="in turn", unit="video", leave=False, disable=not progress):
        made = variants[label].generate(image, prompt, **settings)
        halves[label, half].append(made.wall_ms)
    where = {label: str(getattr(model, "device", "")) for label, model in variants.items()}
    samples = {
        label: Samples(label, (*halves[label, 0], *halves[label, 1]), where[label]) for label in variants
    }
    control = _control(
        *(Samples(label, tuple(values), where[label]) for (label, _), values in list(halves.items())[:2])
    )
    base, *others = samples
    tables, generations = [], {}
    for label, model in variants.items():
        with stages(model) as recorder:  # after the timing, as recording waits for the device
            generations[label] = model.generate(image, prompt, **settings)
        table = recorder.breakdown(generations[label].wall_ms).set_index("component")
        tables.append(
            table[["time_ms", "share_percent"]].set_axis([f"{label}_ms", f"{label}_percent"], axis="columns")
        )
    return ModelComparison(
        control=control,
        samples=samples,
        comparisons={
            label: compare(samples[base], samples[label], control.noise_percent, allow_different_devices=True)
            for label in others
        },
        breakdown=_joined(tables),
        generations=generations,
    )


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One table, components in the order of their use; a component that a variant lacks is left empty."""
    joined = pd.concat(tables, axis="columns", sort=False)
    order = [name for name in (*COMPONENTS, OTHER) if name in joined.index]
    return joined.loc[order].rename_axis("component").reset_index()


def _control(first: Samples, second: Samples) -> AAControl:
    apart = compare(first, second)
    ends = [abs(value - 1) for value in (apart.speedup, apart.low, apart.high) if math.isfinite(value)]
    again = Samples(f"{second.label} (again)", second.values_ms, second.device)
    return AAControl(first, again, apart.speedup, 100 * max(ends))


@dataclass(frozen=True, eq=False)
class Baseline:
    """What one generation costs.

    Attributes:
        label: name of the row, e.g. "eager".
        control: whole generations measured twice over, interleaved; their spread is the noise floor.
        memory: peak during those generations.
        breakdown: time per component of one more, recorded generation; adds up to its wall clock.
        calls: every component call of that generation, with step, timestep and branch.
        generation: the recorded generation, with its video.
        again: the last of the timed ones: the same thing made again, which is the floor of any divergence.
        load_ms: how long loading took, None when it is not known.
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
        return Samples(self.label, both, self.control.first.device, self.control.first.clock)

    @property
    def row(self) -> dict[str, float | str | None]:
        """The row of a before/after table; medians, units in the names."""
        samples, frames = self.samples, self.generation.settings["frames"]
        return {
            "variant": self.label,
            "time_per_video_ms": samples.median,
            "time_per_frame_ms": samples.median / frames,
            "throughput_frames_per_s": 1e3 * frames / samples.median,
            "peak_memory_gib": self.memory.peak_gib,
            "load_ms": self.load_ms,
        }

    def __str__(self) -> str:
        done, top = self.generation.settings, self.breakdown.loc[self.breakdown["share_percent"].idxmax()]
        size = f"{done['width']}x{done['height']}, {done['frames']} frames, {done['steps']} steps"
        return (
            f"one video ({size}) takes {self.samples.median / 1e3:.2f} s, of which {top['component']} takes"
            f" {top['share_percent']:.0f} %. Noise {self.control.noise_percent:.1f} %; peak memory"
            f" {self.memory.peak_gib:.2f} GiB"
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

    Timing comes first and undisturbed: warm-up, then 2 x `iterations` generations as an A/A control with peak
    memory beside them, then one generation with every component call recorded (which synchronises the device).

    Args:
        model: from `wanlab.models.load` or `wanlab.engines.use`.
        image, prompt, settings: as `Model.generate` takes them.
        label: name of the row.
        iterations: generations on each side of the A/A control.
        warmup: generations before the clock starts.
        load_ms: time of loading, to be shown in the row; the model's own load report by default.
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


def before_after(rows: list[dict], **more: list[str]) -> pd.DataFrame:
    """The before/after table: a line per measure, a column per variant, and the ratio of each to the first.

    Args:
        rows: as `Baseline.row` gives them; the first is the original.
        more: further lines of text, one entry per variant, e.g. `divergence_lpips=["0", "1e-6"]`.

    Returns:
        DataFrame: measure, one column per variant, and `<variant> ratio` per later variant, above 1 where the variant
        is better (a time or size that shrank, a throughput that grew); empty where there is nothing to divide.
    """
    names = [str(row["variant"]) for row in rows]
    lines = []
    for measure in [key for key in rows[0] if key != "variant"]:
        values = [row.get(measure) for row in rows]
        line = {"measure": measure} | {
            n: "" if v is None else f"{v:,.2f}" for n, v in zip(names, values, strict=True)
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
