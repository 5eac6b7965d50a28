"""Attention statistics from sampled queries; memory grows with the number of tokens, not with its square."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

LEVELS_PERCENT = (90, 95, 99)
BLOCK_KEYS = 64
"""Neighbouring keys that a block-sparse kernel computes or skips together."""
MOST_BYTES = 2 << 30
BYTES_PER_PRODUCT = 20
"""Bytes in use at the same time per query and key: probability, mask, masked copy, and a reserve for the allocator."""
BISECTIONS = 20
REACHES_FRAMES = (1, 2, 4)
"""Latent frames on each side of a query's own within which its mass is added up."""
_WHOLE = "whole"
ROUNDING = 1e-6
TEXT_PERCENT = "text_percent"
"""Of joint attention alone: mass on the text, of the mass on video and text."""
Grid = tuple[int, int, int]


def statistic_names(kind: str) -> tuple[str, ...]:
    """Columns of a kind of attention, each name with its unit."""
    common = ("entropy_nats", *(f"density{level}_percent" for level in LEVELS_PERCENT))
    if kind == "self":
        places = (
            "own_frame_percent",
            "other_frames_percent",
            "first_frame_percent",
            "same_position_percent",
            "near_position_percent",
            *(within_name(reach) for reach in REACHES_FRAMES),
        )
        return (*common, "block_density95_percent", *places, TEXT_PERCENT)
    return (*common, "prompt_percent", "padding_percent") if kind == "cross" else common


def within_name(reach_frames: int) -> str:
    """Column of the mass within some latent frames on each side: 2 -> "within2_frames_percent"."""
    return f"within{reach_frames}_frames_percent"


def error_name(statistic: str) -> str:
    """Column of a statistic's standard error: "density95_percent" -> "density95_se_percent"."""
    stem, _, unit = statistic.rpartition("_")
    return f"{stem}_se_{unit}"


def sample_queries(grid: Grid, per_frame: int, seed: int) -> torch.Tensor:
    """Sampled tokens without replacement, the same number from every latent frame: `[frames, n]`, int64, sorted.

    Args:
        grid: tokens along `[frames, height, width]`.
        per_frame: tokens per frame; all of a frame if it has fewer.
    """
    frames, positions = grid[0], grid[1] * grid[2]
    count = min(per_frame, positions)
    drawn = [
        np.sort(np.random.default_rng([seed, frame]).choice(positions, count, replace=False))
        + frame * positions
        for frame in range(frames)
    ]
    return torch.from_numpy(np.stack(drawn).astype(np.int64))


def near_window(grid: Grid) -> tuple[int, int]:
    """Height and width of a window around a position that has, over all frames, about as many keys as one frame."""
    frames, height, width = grid
    side = math.sqrt(height * width / frames)
    odd = max(1, 2 * round((side - 1) / 2) + 1)
    return min(odd, height - 1 + height % 2), min(odd, width - 1 + width % 2)


def self_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sampled: torch.Tensor,
    *,
    text: torch.Tensor | None = None,
    scale: float | None = None,
    most_bytes: int = MOST_BYTES,
) -> dict[str, torch.Tensor]:
    """Statistics of sampled queries of a self-attention over a video, softmax in float32.

    Masses are percent of a query's attention: own_frame, other_frames, first_frame (of queries in later frames; NaN for
    those in the first), same_position (the same height and width in other frames), near_position (a window of
    `near_window` around it, in all frames), withinN_frames (its own frame and N on each side). densityL is the smallest
    share of keys that holds L % of the mass; block_density95 is the same in blocks of `BLOCK_KEYS` neighbouring keys.
    entropy is in nats, at most log(tokens).

    Args:
        query, key: `[tokens, heads, dim]`, tokens in the order frame, height, width.
        sampled: from `sample_queries`.
        text: of joint attention, the keys of the text, `[text tokens, heads, dim]`. All masses are then percent of the mass
            on the video, and text is the percentage of the whole mass that lies on the text.
        most_bytes: approximate limit of memory for intermediate results.

    Returns:
        Statistic -> `[heads, frames, n]`, float32.
    """
    frames, height, width = grid
    positions = height * width
    tokens = sampled.flatten().to(query.device)
    place = torch.arange(positions, device=query.device)
    window_height, window_width = near_window(grid)

    def of_rows(p: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        here = tokens[rows]
        frame, position = here // positions, here % positions
        by_cell = p.view(*p.shape[:2], frames, positions)
        by_frame, by_position = by_cell.sum(3), by_cell.sum(2)
        own = _take(by_frame, frame)
        near = ((place // width - (position // width)[:, None]).abs() <= window_height // 2) & (
            (place % width - (position % width)[:, None]).abs() <= window_width // 2
        )
        first = by_frame[..., 0].masked_fill(frame == 0, math.nan)
        blocks = _in_blocks(p)
        apart = (torch.arange(frames, device=query.device) - frame[:, None]).abs()
        within = {within_name(n): 100 * (by_frame * (apart <= n)).sum(2) for n in REACHES_FRAMES}
        return {
            "own_frame_percent": 100 * own,
            "other_frames_percent": 100 * (by_frame.sum(2) - own),
            "first_frame_percent": 100 * first,
            "same_position_percent": 100 * (_take(by_position, position) - _take(p, here)),
            "near_position_percent": 100 * (by_position * near).sum(2),
            "block_density95_percent": 100 * keys_needed(blocks, 0.95) / blocks.shape[-1],
            **within,
        }

    statistics, on_video = _statistics(query, key, tokens, of_rows, scale, most_bytes)
    if text is not None and not len(text):
        statistics[TEXT_PERCENT] = torch.zeros_like(on_video)
    elif text is not None:
        _, on_text = _statistics(query, text, tokens, None, scale, most_bytes)
        # The share of the text in one softmax over all keys.
        statistics[TEXT_PERCENT] = 100 * torch.sigmoid(on_text - on_video)
    return {name: values.view(-1, *sampled.shape) for name, values in statistics.items()}


def cross_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    prompt_tokens: int | None,
    sampled: torch.Tensor,
    *,
    scale: float | None = None,
    most_bytes: int = MOST_BYTES,
) -> dict[str, torch.Tensor]:
    """Statistics of sampled queries on text: entropy, densities, and the mass on prompt tokens and on padding.

    Args:
        query: `[tokens, heads, dim]`. key: `[text tokens, heads, dim]`.
        prompt_tokens: number of text tokens that are not padding; None where the keys are not text.

    Returns:
        Statistic -> `[heads, frames, n]`, float32.
    """

    def of_rows(p: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        if prompt_tokens is None:
            return {}
        prompt = 100 * p[..., :prompt_tokens].sum(-1)
        return {"prompt_percent": prompt, "padding_percent": 100 * p[..., prompt_tokens:].sum(-1)}

    tokens = sampled.flatten().to(query.device)
    statistics, _ = _statistics(query, key, tokens, of_rows, scale, most_bytes)
    return {name: values.view(-1, *sampled.shape) for name, values in statistics.items()}


def summarise(values: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over all tokens and its standard error, from a stratified sample without replacement.

    Frames are the strata: variance of the mean = sum over frames of (1 - n / N) s^2 / n, over the squared number of frames
    (Cochran 1977, Sampling Techniques, section 5.4). With one query per frame s is computed over the frames and is too
    large. Where a few queries differ much from the others, a small sample may miss them, and the error is then too small.

    Args:
        values: `[heads, frames, n]`; a frame whose queries have no value is left out.
        positions: tokens per frame (N).

    Returns:
        Mean and standard error, `[heads]`, float64.
    """
    valid = values[:, ~values[0].isnan().any(-1)].double()
    heads, frames, n = valid.shape
    if frames == 0:
        nothing = torch.full((heads,), math.nan, dtype=torch.float64)
        return nothing, nothing
    mean = valid.mean((1, 2))
    if n == positions:
        return mean, torch.zeros_like(mean)
    if n > 1:
        variance = valid.var(2).mean(1)
    elif frames > 1:
        variance = valid[..., 0].var(1)
    else:
        return mean, torch.full_like(mean, math.nan)
    return mean, ((1 - n / positions) * variance / (n * frames)).sqrt()


def keys_needed(p: torch.Tensor, share: float) -> torch.Tensor:
    """The smallest number of keys that hold a share of the mass, `[...]` from probabilities `[..., keys]`.

    Sorting takes several times the memory and time. Instead the probability of the last needed key is found by bisection
    between (1 - share) / keys (all keys below it together hold too little mass to matter) and the largest probability; keys
    between the last two bounds count with their mean.
    """
    total = p.sum(-1)
    target = share * total
    low = (1 - share) * total / p.shape[-1]
    high = p.amax(-1) * (1 + 1e-5)
    for _ in range(BISECTIONS):
        middle = (low * high).sqrt()
        enough = torch.where(p >= middle[..., None], p, 0).sum(-1) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, between = p >= high[..., None], (p >= low[..., None]) & (p < high[..., None])
    mass = torch.where(above, p, 0).sum(-1)
    count = between.sum(-1).clamp_min(1)
    each = (torch.where(between, p, 0).sum(-1) / count).clamp_min(torch.finfo(p.dtype).tiny)
    # Sums have rounding errors; a key that is needed only because of them is not counted.
    more = torch.ceil((target - mass - ROUNDING * total) / each).clamp_min(0)
    return (above.sum(-1) + torch.minimum(more, count.to(more.dtype))).clamp_min(1)


def _statistics(
    query, key, tokens, of_rows, scale, most_bytes
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Statistics of all kinds of attention and those of `of_rows`, each `[heads, queries]`, and the logarithms of the
    denominators; without `of_rows` these alone."""
    parts: dict[str, list[list[torch.Tensor]]] = {}
    for first, rows, p, whole in probabilities(query, key, tokens, scale, most_bytes):
        columns = {_WHOLE: whole}
        if of_rows is not None:
            columns |= {"entropy_nats": -torch.xlogy(p, p).sum(-1)}
            columns |= {
                f"density{level}_percent": 100 * keys_needed(p, level / 100) / p.shape[-1]
                for level in LEVELS_PERCENT
            }
            columns |= of_rows(p, rows)
        for name, values in columns.items():
            lists = parts.setdefault(name, [])
            if first:
                lists.append([])
            lists[-1].append(values)
    found = {name: torch.cat([torch.cat(row, 1) for row in lists]) for name, lists in parts.items()}
    return found, found.pop(_WHOLE)


def probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    scale: float | None = None,
    most_bytes: int = MOST_BYTES,
) -> Iterator[tuple[bool, slice, torch.Tensor, torch.Tensor]]:
    """Softmax of some queries over all keys, in float32 and in pieces.

    Args:
        query, key: `[tokens, heads, dim]`. tokens: numbers of the queries.
        scale, most_bytes: as `self_statistics`.

    Yields:
        Whether a new group of heads begins, slice of the queries, `[heads, queries, keys]`, and the logarithm of its
        denominator, `[heads, queries]`.
    """
    keys, heads, dim = key.shape
    scale = dim**-0.5 if scale is None else scale
    at_once = max(1, most_bytes // (BYTES_PER_PRODUCT * keys))
    queries_at_once = min(len(tokens), at_once)
    heads_at_once = max(1, at_once // queries_at_once)
    queries = query[tokens]
    for head in range(0, heads, heads_at_once):
        some = slice(head, head + heads_at_once)
        q = queries[:, some].permute(1, 0, 2).float()
        k = key[:, some].permute(1, 2, 0).float()
        for start in range(0, len(tokens), queries_at_once):
            rows = slice(start, start + queries_at_once)
            # Scaled after the product, so that its factors are exact also where products run in TF32.
            p = torch.matmul(q[:, rows], k).mul_(scale)
            whole = p.logsumexp(-1, keepdim=True)
            p.sub_(whole).exp_()
            yield start == 0, rows, p, whole[..., 0]


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One value per query, `[heads, queries]` from `[heads, queries, any]`."""
    return values.gather(2, index.expand(values.shape[0], -1)[..., None])[..., 0]


def _in_blocks(p: torch.Tensor) -> torch.Tensor:
    """Mass of blocks of neighbouring keys; the last block may be smaller."""
    whole = p.shape[-1] // BLOCK_KEYS * BLOCK_KEYS
    blocks = p[..., :whole].unflatten(-1, (-1, BLOCK_KEYS)).sum(-1)
    return blocks if whole == p.shape[-1] else torch.cat([blocks, p[..., whole:].sum(-1, keepdim=True)], -1)
