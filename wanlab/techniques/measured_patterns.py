"""What each head of a model loses by sparse patterns, measured on its own queries, keys and values; the choice of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.diagnose.attention.statistics import probabilities, sample_queries
from wanlab.models.pipeline import Model
from wanlab.precision.recording import nano_examples
from wanlab.techniques.attention.blocks import BlockTable, block_means, block_sizes, pattern_table
from wanlab.techniques.attention.sites import Site, add_layer
from wanlab.techniques.head_patterns import DENSE, HeadPattern, HeadPatterns, Pattern
from wanlab.techniques.place import Place
from wanlab.techniques.wan import only_wan

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Losses:
    """What patterns lose in calls of the attention of one block, `[calls, patterns, heads]` each.

    Attributes:
        kept: part of the attention's mass on the blocks that are computed, mean over the sampled queries.
        error: distance of the output to the dense one, relative to that. error_added: the same where the means of what is
            left out are added.
    """

    kept: np.ndarray
    error: np.ndarray
    error_added: np.ndarray


@dataclass(frozen=True, eq=False)
class PatternMeasurement:
    """What every head of a model loses by every pattern, at one size of video.

    Attributes:
        model: its name. grid: tokens of the video. block: tokens of a block.
        patterns: those that were tried, from the sparsest to the dense one.
        densities: part of the blocks that each computes.
        losses: (expert, block) -> what they lose, in calls of the same steps and examples.
    """

    model: str
    grid: Grid
    block: int
    patterns: tuple[Pattern, ...]
    densities: tuple[float, ...]
    losses: Mapping[tuple[str, int], Losses]

    def choose(
        self, kept_percent: float | None = 90.0, most_error: float | None = None, add_means: bool = True
    ) -> HeadPatterns:
        """The pattern of each head that computes least and keeps enough in every call that was looked at; the dense one
        keeps all.

        Args:
            kept_percent: percent of the attention's mass that each head keeps at least; None asks for nothing.
            most_error: relative error of its output at most; None asks for nothing. Means then count as what they compute,
                a key for each block, so that a head adds them only where the blocks that they spare are more.
            add_means: whether heads may add the means of what they leave out. Without `most_error` those do whose error
                becomes lower by a tenth at least.

        Raises:
            WanlabError: nothing is asked, or a share that is not between 0 and 100.
        """
        if kept_percent is None and most_error is None:
            raise WanlabError("nothing is asked of the patterns; give kept_percent or most_error")
        if kept_percent is not None and not 0 < kept_percent <= 100:
            raise WanlabError(f"kept_percent is {kept_percent:g}; give a share above 0, at most 100")
        if most_error is not None and not most_error >= 0:
            raise WanlabError(f"most_error is {most_error:g}; give 0 or more")
        rows = []
        for (component, block), losses in self.losses.items():
            kept = losses.kept.min(0)
            for head in range(kept.shape[1]):
                errors = {False: losses.error.max(0)[:, head]}
                if add_means:
                    errors[True] = losses.error_added.max(0)[:, head]
                index, added = self._best(kept[:, head], errors, kept_percent, most_error)
                rows.append(
                    HeadPattern(
                        component,
                        block,
                        head,
                        self.patterns[index],
                        added,
                        self.densities[index],
                        min(1.0, float(kept[index, head])),
                        float(errors[added][index]),
                    )
                )
        rows.sort(key=lambda row: (row.component, row.block, row.head))
        least = None if kept_percent is None else kept_percent / 100
        return HeadPatterns(self.model, self.grid, self.block, least, most_error, tuple(rows))

    def _best(
        self,
        kept: np.ndarray,
        errors: Mapping[bool, np.ndarray],
        kept_percent: float | None,
        most_error: float | None,
    ) -> tuple[int, bool]:
        """Number of the pattern of a head, and whether means are added; kept and errors are of each pattern."""
        dense = len(kept) - 1
        enough = {
            index for index in range(dense) if kept_percent is None or 100 * kept[index] >= kept_percent
        }
        if most_error is None:
            index = min({*enough, dense}, key=lambda index: (self.densities[index], -kept[index]))
            with_means = errors.get(True, errors[False])[index]
            return index, bool(index != dense and with_means < LOWER * errors[False][index])
        options = [
            (self.densities[index] + added / self.block, error[index], index, added)
            for added, error in errors.items()
            for index in enough
            if error[index] <= most_error
        ]
        _, _, index, added = min([*options, (1.0, 0.0, dense, False)])
        return index, added


LOWER = 0.9
"""Part of its error to which means bring that of a head that adds them for this reason alone."""


def tried_patterns(grid: Grid, block: int) -> list[tuple[Pattern, BlockTable]]:
    """Patterns of all kinds and sizes with their tables, from the sparsest to the dense one; of those with the same blocks
    the first.

    Args:
        grid: tokens of the video, (frames, height, width). block: tokens of a block.
    """
    frames, height, width = grid
    patterns: list[Pattern] = []
    for picture in (False, True):
        windows = [(near, rows) for near in _reaches(frames) for rows in _reaches(height)]
        patterns += [Pattern("window", size, picture) for size in windows]
        places = [round(height * width / 2 ** (step / 2)) for step in range(20)]
        patterns += [Pattern("same_place", (reach,), picture) for reach in (0, *dict.fromkeys(places))]
        decays = [frames * 2.0 ** (1 - step) for step in range(10)]
        patterns += [Pattern("radial", (decay,), picture) for decay in decays]
    tables: dict[bytes, tuple[Pattern, BlockTable]] = {}
    for pattern in patterns:
        table = pattern_table(pattern, grid, block)
        tables.setdefault(table.kept.numpy().tobytes(), (pattern, table))
    sparse = sorted(
        (pair for pair in tables.values() if pair[1].density < 1), key=lambda pair: pair[1].density
    )
    dense = Pattern(DENSE)
    return [*sparse, (dense, pattern_table(dense, grid, block))]


def _reaches(length: int) -> list[int]:
    """Reaches of a window along an axis: 0, 1, 2, 3, 4, 6, 8, 12, ... and all of it."""
    known = {0, *(round(2 ** (step / 2)) for step in range(20)), 3}
    return sorted({min(reach, length - 1) for reach in known})


def pattern_losses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: Sequence[BlockTable],
    queries: torch.Tensor,
) -> Losses:
    """What tables lose in one call, in float32, on some queries.

    Args:
        query, key, value: `[B, L, H, D]`. tables: of one size and block. queries: numbers of some tokens.

    Returns:
        Losses, with a call for each of the batch.
    """
    block, device = tables[0].block, query.device
    masks = (
        torch.stack([table.kept[queries.cpu() // block] for table in tables]).float().to(device)
    )  # [C, N, K]
    calls = [_losses(*each, masks, queries.to(device), block) for each in zip(query, key, value, strict=True)]
    kept, error, added = (np.stack(parts) for parts in zip(*calls, strict=True))
    return Losses(kept, error, added)


def _losses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: torch.Tensor,
    queries: torch.Tensor,
    block: int,
) -> tuple[np.ndarray, ...]:
    """Mass, error, and error with means of one call, `[patterns, heads]` each, from `[L, H, D]`."""
    tokens, heads, size = key.shape
    keys, values = (block_means(each[None].float(), block)[0] for each in (key, value))  # [K, H, D]
    numbers = block_sizes(tokens, block).to(query.device).float().log()
    short = len(numbers) * block - tokens
    parts = torch.nn.functional.pad(value.float(), (0, 0, 0, 0, 0, short)).unflatten(
        0, (-1, block)
    )  # [K, b, H, D]
    sums = torch.zeros(4, len(masks), heads, dtype=torch.float64, device=query.device)
    start = end = 0
    for first, rows, weights, whole in probabilities(query, key, queries):
        start = end if first else start
        end = start + len(weights)
        shown = masks[:, rows].transpose(0, 1)  # [n, C, K]
        padded = torch.nn.functional.pad(weights, (0, short)).unflatten(2, (-1, block))  # [h, n, K, b]
        for number, own in enumerate(padded):
            head = start + number
            outputs = (own.transpose(0, 1) @ parts[:, :, head]).transpose(0, 1)  # [n, K, D]
            mass = own.sum(2)  # [n, K]
            dense = outputs.sum(1, keepdim=True)  # [n, 1, D]
            above, below = shown @ outputs, shown @ mass[:, :, None]  # [n, C, D], [n, C, 1]
            scores = query[queries[rows], head].float() @ keys[:, head].T * size**-0.5
            guess = (scores + numbers - whole[number][:, None]).exp()  # of the mass of each block, [n, K]
            above_added = above + (1 - shown) @ (guess[:, :, None] * values[:, head])
            below_added = below + (1 - shown) @ guess[:, :, None]
            sums[0, :, head] += below[..., 0].sum(0)
            sums[1, :, head] += (above / below - dense).square().sum((0, 2))
            sums[2, :, head] += (above_added / below_added - dense).square().sum((0, 2))
            sums[3, :, head] += dense.square().sum()
    mass, error, added, norm = sums.cpu().numpy()
    return mass / len(queries), np.sqrt(error / norm), np.sqrt(added / norm)


def steps_to_look_at(model: Model, steps: int | None, calls: int) -> set[int]:
    """Some steps of each expert, evenly spread over those that it runs."""
    schedule = model.schedule(steps)
    chosen: set[int] = set()
    for _, own in schedule.groupby("component", sort=False):
        numbers = own["step"].to_numpy()
        chosen |= {int(numbers[round(place)]) for place in np.linspace(0, len(numbers) - 1, calls + 2)[1:-1]}
    return chosen


Seen = Callable[[Site, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Looking:
    """A layer of attention that answers no call, and shows those at some steps."""

    name = "look"

    def __init__(self, at_steps: set[int], seen: Seen) -> None:
        self.at_steps, self.seen = at_steps, seen

    def __call__(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if site.denoising.step in self.at_steps:
            self.seen(site, query, key, value)


def look(model: Model, request: Mapping[str, Any], at_steps: set[int], seen: Seen) -> None:
    """Generate latents, and show the queries, keys and values of every self-attention at some steps; the model stays as it
    is.

    Args:
        model: eager model. request: arguments of `Model.generate`.
        seen: called with the site and three tensors, `[B, L, H, D]`, before the attention itself.
    """
    place = Place(model)
    add_layer(place, Looking(at_steps, seen))
    place.finish(place.model).generate(**(dict(request) | {"output": "latent"}))


def measure_patterns(
    model: Model,
    requests: Sequence[Mapping[str, Any]] | None = None,
    *,
    block: int = 128,
    calls: int = 2,
    queries: int = 16,
    examples: int = 2,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> PatternMeasurement:
    """Measure what each head of each block of each expert loses by static patterns, in a few calls of some generations.

    Mass and error are of a sample of queries, the same number from every latent frame, that attend to all keys in float32,
    as in `diagnose.attention_map`.

    Args:
        model: eager model of the Wan family; it stays as it is.
        requests: arguments of `Model.generate` of each generation; examples that are not held out if None.
        block: tokens of a block; 128 for kernels on GPUs.
        calls: steps of each expert that are looked at, each with all its branches of guidance.
        queries: sampled queries of each latent frame. examples: number of examples, where no requests are given.
        seed: of the sample.
        settings: height, width, frames, steps and guidance_scale of the examples.

    Raises:
        WanlabError: a model of another family, or as `Model.generate`; a video of one block.
    """
    if reason := only_wan(model.spec):
        raise WanlabError(f"patterns are measured on the attention of Wan's denoisers: it takes {reason}")
    if requests is None:
        frames = settings.get("frames")
        requests = [
            example.inputs(model, frames) | {"prompt": example.prompt, "seed": example.seed}
            for example in nano_examples(examples)
        ]
    asked = [{**settings, **request} for request in requests]
    tried: list[tuple[Pattern, BlockTable]] = []
    grids: list[Grid] = []
    found: dict[tuple[str, int], list[Losses]] = {}

    def seen(site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if not tried:
            tried.extend(tried_patterns(site.grid, block))
            grids.append(site.grid)
            if tried[0][1].density == 1:
                raise WanlabError(
                    f"a video of {math.prod(site.grid)} tokens has no blocks of {block} to leave out; take smaller blocks or"
                    " a larger video"
                )
        tables = [table for _, table in tried]
        sampled = sample_queries(site.grid, queries, seed).flatten()
        found.setdefault((site.component, site.block), []).append(
            pattern_losses(query, key, value, tables, sampled)
        )

    for request in tqdm(asked, desc="patterns", unit="video", disable=not progress):
        look(model, request, steps_to_look_at(model, request.get("steps"), calls), seen)
    losses = {
        where: Losses(
            *(
                np.concatenate([getattr(each, name) for each in own])
                for name in ("kept", "error", "error_added")
            )
        )
        for where, own in found.items()
    }
    return PatternMeasurement(
        model.spec.name,
        grids[0],
        block,
        tuple(pattern for pattern, _ in tried),
        tuple(table.density for _, table in tried),
        losses,
    )


def head_losses(
    model: Model,
    patterns: HeadPatterns,
    requests: Sequence[Mapping[str, Any]],
    *,
    calls: int = 2,
    queries: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """What each head loses by its pattern in generations that the patterns were not chosen by.

    Args:
        model, calls, queries, seed: as `measure_patterns`. requests: arguments of `Model.generate`.

    Returns:
        DataFrame: `HeadPatterns.frame` with kept_percent and relative_error of these calls, means over them, and
        relative_error_without_means, where no head adds means.
    """
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    tables: dict[Pattern, BlockTable] = {}

    def seen(site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        patterns.check_size(site.grid, "the plan")
        rows = patterns.of(site.component, site.block)
        own = list(dict.fromkeys(row.pattern for row in rows))
        for each in own:
            if each not in tables:
                tables[each] = pattern_table(each, site.grid, patterns.block)
        sampled = sample_queries(site.grid, queries, seed).flatten()
        losses = pattern_losses(query, key, value, [tables[each] for each in own], sampled)
        places = [own.index(row.pattern) for row in rows]
        heads = np.arange(len(rows))
        kept, without, added = (
            values[:, places, heads] for values in (losses.kept, losses.error, losses.error_added)
        )
        error = np.where([row.added for row in rows], added, without)
        found.setdefault((site.component, site.block), []).append(np.stack([kept, error, without]))

    for request in requests:
        look(model, request, steps_to_look_at(model, request.get("steps"), calls), seen)
    means = {where: np.concatenate(own, 1).mean(1) for where, own in found.items()}  # [3, heads]
    frame = patterns.frame()
    values = np.array([means[row.component, row.block][:, row.head] for row in patterns.heads])
    frame["kept_percent"], frame["relative_error"] = 100 * values[:, 0], values[:, 1]
    frame["relative_error_without_means"] = values[:, 2]
    return frame
