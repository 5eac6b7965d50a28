"""Layers that can be quantised, by their names in the network, and choices among them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import torch

DEFAULT_LAYERS = ("blocks.*.attn?.to_[qkv]", "blocks.*.attn?.to_out.0", "blocks.*.ffn.net.*")
"""Linear layers of a Wan expert's blocks: projections of both attentions, and feed-forward."""

REGEX = "re:"
_BLOCK = re.compile(r"(?:^|\.)\w*blocks?\.(\d+)\.")
_TEXT = re.compile(r"(\.attn2\.to_[kv]|text_embedder\.linear_\d)$")
_ONCE = re.compile(r"(time_embedder\.linear_\d|time_proj)$")


def quantizable_layers(
    network: torch.nn.Module, *, tokens: int | None = None, text_tokens: int = 512
) -> pd.DataFrame:
    """Every linear and convolution layer of a network, in the order of their names.

    Args:
        tokens: of the video, to count operations of the linear layers: two per multiply-add, for every token
            (text token for the keys and values of cross-attention, once for the timestep), batch 1.
        text_tokens: of the prompt, with padding.

    Returns:
        DataFrame: layer, kind, shape (weight, outputs first), parameters, block (None outside the blocks),
        projection (the name inside the block); with `tokens` also flop and share_percent.
    """
    import pandas as pd

    rows = []
    for name, module in _layers(network).items():
        block = _BLOCK.search(name)
        rows.append(
            {
                "layer": name,
                "kind": next(kind for kind in ("Linear", "Conv2d", "Conv3d") if _is(module, kind)),
                "shape": tuple(module.weight.shape),
                "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
                "block": int(block[1]) if block else None,
                "projection": name[block.end() :] if block else name,
            }
        )
    frame = pd.DataFrame(rows, columns=["layer", "kind", "shape", "parameters", "block", "projection"])
    frame["block"] = frame["block"].astype("Int64")
    if tokens is not None:
        sizes = zip(frame["layer"], frame["shape"], strict=True)
        frame["flop"] = [operations(layer, shape, tokens, text_tokens) for layer, shape in sizes]
        frame["share_percent"] = 100 * frame["flop"] / frame["flop"].sum()
    return frame


def operations(layer: str, shape: tuple[int, ...], tokens: int, text_tokens: int = 512) -> int:
    """Operations of one layer in one forward of batch 1, counted as `quantizable_layers` does; `shape` is its weight's."""
    return 2 * _count(layer, tokens, text_tokens) * math.prod(shape)


def choose_layers(
    network: torch.nn.Module | Iterable[str],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the layers that patterns choose, sorted with numbers as numbers.

    Args:
        network: or the names to choose from.
        include: names, globs (`blocks.*.ffn.net.2`; `*` crosses dots), or regular expressions after `re:`, which
            must match whole names. None takes `DEFAULT_LAYERS`.
        exclude: the same, taken away afterwards.

    Raises:
        WanlabError: a pattern that matches nothing, or nothing left.
    """
    known = _layers(network) if hasattr(network, "named_modules") else dict.fromkeys(network)
    include = DEFAULT_LAYERS if include is None else include
    chosen = {name for pattern in _list(include) for name in _matches(pattern, known)}
    chosen -= {name for pattern in _list(exclude) for name in _matches(pattern, known)}
    if not chosen:
        raise WanlabError("no layer is left; give patterns that include more or exclude less")
    return tuple(sorted(chosen, key=natural))


def layer_set_key(layers: Iterable[str]) -> str:
    """Hash of a set of layers, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(set(layers))).encode()).hexdigest()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts `blocks.2` before `blocks.10`."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in name.split(".")]


def _layers(network) -> dict[str, torch.nn.Module]:
    found = {
        name: module
        for name, module in network.named_modules()
        if name and any(_is(module, kind) for kind in ("Linear", "Conv2d", "Conv3d"))
    }
    return {name: found[name] for name in sorted(found, key=natural)}


def _is(module, kind: str) -> bool:
    import torch

    return isinstance(module, getattr(torch.nn, kind))


def _count(layer: str, tokens: int, text_tokens: int) -> int:
    return text_tokens if _TEXT.search(layer) else 1 if _ONCE.search(layer) else tokens


def _list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matches(pattern: str, known) -> list[str]:
    if pattern in known:
        return [pattern]
    if pattern.startswith(REGEX):
        try:
            compiled = re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise WanlabError(f"layer pattern {pattern!r} is no regular expression: {error}") from error
        found = [name for name in known if compiled.fullmatch(name)]
    else:
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise WanlabError(
            f"no layer matches {pattern!r}{did_you_mean(pattern, known)};"
            " see wanlab.precision.quantizable_layers for the names"
        )
    return found
