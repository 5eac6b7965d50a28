"""What every head of every layer looks at, by denoising step, expert and branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wanlab.diagnose.attention.calls import CROSS, FORWARD, SELF, AttentionCall, attention_calls, wan_blocks
from wanlab.diagnose.attention.result import PLACE, AttentionMap
from wanlab.diagnose.attention.statistics import (
    MOST_BYTES,
    cross_statistics,
    error_name,
    near_window,
    sample_queries,
    self_statistics,
    statistic_names,
    summarise,
)
from wanlab.errors import WanlabError
from wanlab.models.shapes import latent_shape

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.models.generate import Model

TYPE_PERCENT = 50.0
"""Mass that a head's mask must hold; less makes it global."""


def attention_map(
    model: Model,
    image: Any,
    prompt: str,
    *,
    queries: int = 16,
    at_steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    branches: Sequence[str] | None = None,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
    progress: bool = True,
    **settings,
) -> AttentionMap:
    """Generate once and look at the attention of every head on the way.

    Query and key are those that the kernel gets. A sample of queries, the same for all heads, attends in float32 to all
    keys; the kernel then runs as ever, so the generation is not changed. Behind the last asked step it is broken off.

    A head is called spatial when its own frame holds at least half of its mass, temporal when the window of the same
    size in keys around its position, over all frames, does; of both the larger wins, and global is neither. The two kinds
    are those of Sparse VideoGen (Xi et al. 2025, arXiv:2502.01776), which picks between two masks of equal size by the
    error of the output on sampled queries; here the mass under each mask decides, and a head may be neither.

    Args:
        model: from `wanlab.models.load`, a Wan transformer, eager.
        image, prompt, settings: as `Model.generate` takes them; the decoder is left out.
        queries: from every latent frame.
        at_steps: denoising steps to look at, from 0; all if None.
        layers: blocks to look at, from 0; all if None.
        branches: "cond", "uncond"; both if None.
        seed: of the initial noise and of the sample.
        most_bytes: of extra memory on the device, about.
        progress: show a bar over the layers.

    Raises:
        WanlabError: as `attention_calls` and `Model.generate`, a step or layer that there is not, or no queries.
    """
    import torch

    blocks = wan_blocks(model)
    defaults = model.spec.defaults
    settings = settings | {"output": "latent", "seed": seed}
    size = [settings.get(n) or getattr(defaults, n) for n in ("height", "width", "frames")]
    shape = latent_shape(model.spec, *size)
    grid = tuple(
        length // patch
        for length, patch in zip((shape.frames, shape.height, shape.width), model.spec.patch, strict=True)
    )
    if not isinstance(queries, int) or queries < 1:
        raise WanlabError(f"queries is {queries!r}; take at least 1 from every latent frame")
    total = len(model.schedule(settings.get("steps")))
    wanted_steps = _chosen("at_steps", at_steps, total)
    wanted_layers = _chosen("layers", layers, min(len(parts) for parts in blocks.values()), layers is None)
    sampled = sample_queries(grid, queries, seed)
    rows: list[dict[str, Any]] = []
    prompt_tokens: dict[str, int] = {}
    facts: dict[str, Any] = {}
    scale = settings.get("guidance_scale")
    both = 2 if (defaults.guidance_scale if scale is None else scale) > 1 else 1
    both = both if branches is None else min(both, len(branches))
    deepest = max(len(parts) for parts in blocks.values())
    calls = len(wanted_steps) * both * len(wanted_layers or range(deepest))
    tick, close = _bar(calls, progress)

    def look(call: AttentionCall, run: Callable, query: Any = None, key: Any = None) -> Any:
        wanted = call.step in wanted_steps and (branches is None or call.branch in branches)
        if call.kind == FORWARD:
            if wanted and call.branch not in prompt_tokens and call.text is not None:
                prompt_tokens[call.branch] = call.prompt_tokens()
            return run()
        if wanted and (wanted_layers is None or call.layer in wanted_layers):
            rows.append(_rows(call, query, key, grid, sampled, prompt_tokens, most_bytes))
            if call.kind == SELF:
                facts["heads"] = query.shape[2]
                tick()
            elif call.kind == CROSS:
                facts["text_keys"] = key.shape[1]
        return run()

    def enough(step: int) -> None:
        if step >= max(wanted_steps):
            raise _Enough

    try:
        with torch.no_grad(), attention_calls(model, look, after_step=enough):
            model.generate(image, prompt, **settings)
    except _Enough:
        pass
    finally:
        close()
    known = {
        "model": model.spec.name,
        "weights": model.load.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "grid": list(grid),
        "layers": deepest,
        **facts,
        "prompt_tokens": prompt_tokens,
        "queries_per_frame": sampled.shape[1],
        "near_window": list(near_window(grid)),
        "settings": {
            **dict(zip(("height", "width", "frames"), size, strict=True)),
            "steps": total,
            "guidance_scale": defaults.guidance_scale if scale is None else scale,
            "seed": seed,
        },
        "notes": list(model.notes),
    }
    return AttentionMap(_table(rows, model, grid), known)


class _Enough(Exception):
    """All asked steps were seen."""


def _rows(call, query, key, grid, sampled, prompt_tokens, most_bytes) -> dict[str, Any]:
    """Columns of one call: scalars of its place, arrays over the heads."""
    q, k = query[0], key[0]  # one video is made at a time
    if q.shape[0] != grid[0] * grid[1] * grid[2]:
        raise WanlabError(
            f"{call.component} attends from {q.shape[0]} tokens, not {grid[0]} frames of {grid[1]}x{grid[2]};"
            " its token order is not known, take a Wan image-to-video or text-to-video model"
        )
    if call.kind == SELF:
        found = self_statistics(q, k, grid, sampled, scale=call.scale, most_bytes=most_bytes)
    else:
        tokens = prompt_tokens.get(call.branch) if call.kind == CROSS else None
        found = cross_statistics(q, k, tokens, sampled, scale=call.scale, most_bytes=most_bytes)
    columns: dict[str, Any] = {name: getattr(call, name) for name in PLACE[:-1]}
    columns["head"] = range(q.shape[1])
    for name, values in found.items():
        mean, error = summarise(values, grid[1] * grid[2])
        columns[name], columns[error_name(name)] = mean.cpu().numpy(), error.cpu().numpy()
    return columns


def _table(rows: list[dict[str, Any]], model: Model, grid: tuple[int, ...]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    if not rows:
        raise WanlabError(
            f"{model.spec.name}: no attention was seen at these steps, layers and branches; ask for others"
        )
    table = pd.concat([pd.DataFrame(columns) for columns in rows], ignore_index=True)
    for name in dict.fromkeys((*statistic_names(SELF), *statistic_names(CROSS))):
        for column in (name, error_name(name)):
            if column not in table:
                table[column] = np.nan
    spatial, temporal = table["own_frame_percent"], table["near_position_percent"]
    kind = np.where(temporal > spatial, "temporal", "spatial")
    kind = np.where(np.fmax(spatial, temporal) >= TYPE_PERCENT, kind, "global")
    # A single frame has no time to look along.
    kind = np.where(grid[0] > 1, kind, "global")
    table.insert(len(PLACE), "type", np.where(table["kind"] == SELF, kind, ""))
    return table


def _chosen(name: str, asked: Sequence[int] | None, count: int, everything: bool = False) -> set[int] | None:
    """Numbers under `count`; all of them, or None for `everything`, when none is asked for."""
    if asked is None:
        return None if everything else set(range(count))
    wrong = [n for n in asked if not hasattr(n, "__index__") or isinstance(n, bool) or not 0 <= n < count]
    if wrong or not len(asked):
        shown = repr(wrong[0]) if wrong else "empty"
        raise WanlabError(f"{name} has {shown}; give whole numbers from 0 to {count - 1}")
    return {int(n) for n in asked}


def _bar(total: int, progress: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    if not progress:
        return (lambda: None), (lambda: None)
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc="attention", unit="layer", leave=False)
    return bar.update, bar.close
