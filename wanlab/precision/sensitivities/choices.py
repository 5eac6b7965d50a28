"""Sets of layers, formats and steps to hold predictions against, and a model that computes with one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from wanlab.errors import WanlabError
from wanlab.precision.fake import fake_quantized
from wanlab.precision.sensitivities.result import Sensitivity

KINDS = ("layer", "layer", "block", "projection", "several", "expert")

TRIES = 20
"""Draws for a choice that is not there yet; of few layers and formats some may come twice."""


@dataclass(frozen=True)
class Choice:
    """Layers of one expert that are rounded to one format in a range of steps.

    Attributes:
        kind: `"layer"`, `"block"`, `"projection"` (one of all blocks), `"several"` or `"expert"` (all of them).
        steps: ranges of the measurement, inclusive.
        predicted: sum of the effects of these layers, of neighbouring ranges taken together.
    """

    kind: str
    component: str
    layers: tuple[str, ...]
    format: str
    steps: tuple[tuple[int, int], ...]
    predicted: float


def draw_choices(sensitivity: Sensitivity, samples: int, seed: int = 0) -> list[Choice]:
    """Choices of wide range: single layers evenly over the ranking, blocks, projections, random sets, whole experts.

    Experts, formats and ranges of steps take turns.
    """
    import numpy as np

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
            steps = ((int(row["first_step"]), int(row["last_step"])),)
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
            made = _choice(joined if together else frame, kind, component, names, format, steps)
            if made not in choices:
                break
        choices.append(made)
    return choices


@contextmanager
def rounded_in_steps(model, choice: Choice, amax: Mapping[str, float], steps: int) -> Iterator[None]:
    """Inside the block generations of so many steps compute a choice's layers rounded, in its ranges of steps only."""
    import numpy as np

    network = model.component(choice.component)
    timesteps = model.schedule(steps)["timestep"].to_numpy()
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
    """Layer -> range of its input, as it was measured with."""
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
