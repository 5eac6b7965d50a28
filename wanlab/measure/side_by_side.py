"""Variants of one model measured in turn: a drift of the machine falls on all of them alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.measure.samples import AAControl, Comparison, Samples, compare
from wanlab.measure.stages import COMPONENTS, OTHER, stages

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.models.generate import Generation, Model


@dataclass(frozen=True, eq=False)
class SideBySide:
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
        import pandas as pd

        rows = [
            {
                "variant": label,
                "time_per_video_ms": samples.median,
                "time_per_frame_ms": samples.median / self.generations[label].settings["frames"],
            }
            for label, samples in self.samples.items()
        ]
        return pd.DataFrame(rows)


def side_by_side(
    variants: Mapping[str, Model], image, prompt: str, *, rounds: int = 1, progress: bool = True, **settings
) -> SideBySide:
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
    from tqdm.auto import tqdm

    if not variants or rounds < 1:
        raise WanlabError(
            f"side_by_side of {len(variants)} variants in {rounds} rounds; give at least one of each"
        )
    halves = {(label, half): [] for label in variants for half in (0, 1)}
    there = [(label, 0) for label in variants] + [(label, 1) for label in reversed(variants)]
    order = (there + there[::-1]) * rounds
    for label, half in tqdm(order, desc="in turn", unit="video", leave=False, disable=not progress):
        made = variants[label].generate(image, prompt, **settings)
        halves[label, half].append(made.wall_ms)
    where = {label: str(getattr(model, "device", "")) for label, model in variants.items()}
    samples = {
        label: Samples(label, (*halves[label, 0], *halves[label, 1]), where[label]) for label in variants
    }
    control = _control(
        *(Samples(label, values, where[label]) for (label, _), values in list(halves.items())[:2])
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
    return SideBySide(
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
    import pandas as pd

    joined = pd.concat(tables, axis="columns", sort=False)
    order = [name for name in (*COMPONENTS, OTHER) if name in joined.index]
    return joined.loc[order].rename_axis("component").reset_index()


def _control(first: Samples, second: Samples) -> AAControl:
    apart = compare(first, second)
    ends = [abs(value - 1) for value in (apart.speedup, apart.low, apart.high) if math.isfinite(value)]
    again = Samples(f"{second.label} (again)", second.values_ms, second.device)
    return AAControl(first, again, apart.speedup, 100 * max(ends))
