"""Rows of a table and bootstrap samples, from the parts of one component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from wanlab.precision.sensitivities.parts import Part

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000


def band_rows(
    parts: Sequence[Part], first: int, last: int, weights: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Rows of `Sensitivity.frame` of one component and range of steps."""
    import numpy as np

    picked = calls_between(parts, first, last)
    if not len(picked["velocity"]):
        return
    part = parts[0]
    local = np.sqrt(picked["local"].mean(axis=0))
    velocity = np.sqrt(picked["velocity"].mean(axis=0))
    low, high = interval(picked["velocity"], over_calls(len(picked["velocity"])), np.sqrt)
    samples, groups = effect_samples(parts, first, last, weights)
    effect = samples.mean(axis=0)
    effect_low, effect_high = interval(samples, over_groups(groups))
    for index, layer in enumerate(part.layers):
        _, block, projection = layer.split(".", 2)
        for column, format in enumerate(part.formats):
            at = (index, column)
            yield {
                "component": part.component,
                "layer": layer,
                "block": int(block),
                "projection": projection,
                "format": format,
                "first_step": first,
                "last_step": last,
                "local_error": float(local[at]),
                "velocity_error": float(velocity[at]),
                "low": float(low[at]),
                "high": float(high[at]),
                "effect": float(effect[at]),
                "effect_low": float(effect_low[at]),
                "effect_high": float(effect_high[at]),
                "parameters": part.parameters[index],
                "calls": len(picked["velocity"]),
            }


def calls_between(parts: Sequence[Part], first: int, last: int) -> dict[str, np.ndarray]:
    """`local` and `velocity` of the calls in a range of steps, `[calls, layers, formats]`."""
    import numpy as np

    found: dict[str, list] = {"local": [], "velocity": []}
    for part in parts:
        inside = [i for i, call in enumerate(part.calls) if first <= call["step"] <= last]
        for name, rows in found.items():
            rows.append(getattr(part, name)[inside])
    return {name: np.concatenate(rows) for name, rows in found.items()}


def effect_samples(
    parts: Sequence[Part], first: int, last: int, weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Squared relative change of the final latents, once per example and direction.

    What a layer does in the calls of an example is added along each direction before it is squared. Where only some
    steps of a range were measured they stand for the others, by the weights of the velocities.

    Returns:
        `[samples, layers, formats]`, and the example of each sample.
    """
    import numpy as np

    sums: dict[int, Any] = {}
    steps: dict[int, set[int]] = {}
    coherent = all(part.coherent for part in parts)
    for part in parts:
        for call, paths in zip(part.calls, part.paths, strict=True):
            if first <= call["step"] <= last:
                example = call["example"]
                sums[example] = sums.get(example, 0.0) + (paths if coherent else paths**2)
                steps.setdefault(example, set()).add(call["step"])
    samples, groups = [], []
    size = np.abs(np.asarray(weights, dtype=np.float64)) ** (1 if coherent else 2)
    for example, total in sums.items():
        factor = size[first : last + 1].sum() / max(size[sorted(steps[example])].sum(), 1e-300)
        total = (total * factor) ** 2 if coherent else total * factor
        samples.append(np.moveaxis(total, -1, 0))
        groups += [example] * total.shape[-1]
    return np.concatenate(samples), np.array(groups)


def over_calls(count: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights `[RESAMPLES, count]`: how often each call was drawn, over the number of calls."""
    import numpy as np

    return np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES) / count


def over_groups(groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap weights `[RESAMPLES, samples]`: examples are drawn, then directions within each."""
    import numpy as np

    generator = np.random.default_rng(seed)
    names = np.unique(groups)
    drawn = generator.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    weights = np.zeros((RESAMPLES, len(groups)))
    for column, name in enumerate(names):
        inside = np.flatnonzero(groups == name)
        share = generator.multinomial(len(inside), [1 / len(inside)] * len(inside), size=RESAMPLES)
        weights[:, inside] = drawn[:, column : column + 1] * share / (len(names) * len(inside))
    # By the number of samples, not of examples, as the mean is.
    sizes = np.array([np.sum(groups == name) for name in groups]) / len(groups) * len(names)
    weights = weights * sizes
    return weights / weights.sum(axis=1, keepdims=True)


def interval(samples: np.ndarray, weights: np.ndarray, then=lambda values: values):
    """95 % percentile interval of a mean over the first axis; holds the mean itself. With one sample it is that."""
    import numpy as np

    flat = samples.reshape(len(samples), -1)
    means = then(weights @ flat)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    value = then(flat.mean(axis=0))
    shape = samples.shape[1:]
    return np.minimum(low, value).reshape(shape), np.maximum(high, value).reshape(shape)
