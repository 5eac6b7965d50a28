"""Parity of an expert block by block, so that nobody needs the whole model twice."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.clip import ClipShape, default_shape
from wanlab.convert.compare import differences
from wanlab.convert.components import recipe
from wanlab.convert.onnx.pieces import cut, piece_file
from wanlab.convert.ort import OrtEngine
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd
    import torch


def blockwise_parity(
    model,
    component: str,
    onnx_path: str | os.PathLike,
    *,
    shape: ClipShape | None = None,
    feeds: Mapping[str, torch.Tensor] | None = None,
    reference_dtype: str = "float32",
    provider: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare every transformer block of an exported expert with the same block of PyTorch.

    The graph is cut where one block ends and the next begins. What comes before the first block (patches,
    timestep and text embedding, rotary tables) runs once in the engine. Then each block runs alone on the hidden
    states that PyTorch computed in `reference_dtype`, so that errors do not add up; at any time one block is in
    memory in the reference dtype and one in the engine. Where the network is in the graph's dtype, its own block
    is compared with the reference as well: that error is rounding, which no engine can avoid.

    Args:
        model: eager, the one that was exported. component: an expert of it.
        onnx_path: from `wanlab.convert.export`.
        shape: clip of the random inputs; None takes the model's default with batch 1.
        feeds: inputs to use instead, by name.
        reference_dtype: of PyTorch's blocks; `"float32"` or `"float64"`.
        provider: as in `OrtEngine`.

    Returns:
        A row per piece (`blocks.0` …, `after`): piece, relative_l2 (||a - b|| / ||a||), max_abs, mean_abs, cosine of its
        output; update_relative_l2 of what the block adds to its input; eager_relative_l2, the same network's in
        the graph's dtype (NaN where it is in another).

    Raises:
        WanlabError: no expert, or a graph that cannot be cut into blocks.
    """
    import onnx_ir
    import pandas as pd
    import torch
    from tqdm.auto import tqdm

    plan = recipe(model, component)
    if not hasattr(plan.network, "blocks"):
        raise WanlabError(
            f"{component} has no transformer blocks; compare it whole with wanlab.convert.parity"
        )
    path = Path(onnx_path)
    if feeds is None:
        drawn = plan.inputs_for(shape or default_shape(model, batch=1), torch.Generator().manual_seed(seed))
        feeds = dict(zip(plan.inputs, drawn, strict=True))
    kind = getattr(torch, reference_dtype)
    graph = onnx_ir.load(path)
    before, *pieces = cut(graph)
    with piece_file(graph, before, path.parent) as file:
        made = OrtEngine(file, provider=provider).run({name: feeds[name] for name in before.inputs})
    made |= dict(feeds)
    rows = []
    with torch.no_grad():
        shell = _Shell(plan.network, kind)
        state, *others = shell.enter(*(feeds[name].to(plan.network.device) for name in plan.inputs))
        rows.append({"piece": "before"} | differences(state, made[pieces[0].state]))
        for index, piece in enumerate(
            tqdm(pieces, desc="blocks", unit="block", leave=False, disable=not progress)
        ):
            given = {name: state if name == piece.state else made[name] for name in piece.inputs}
            with piece_file(graph, piece, path.parent) as file:
                engine = OrtEngine(file, provider=provider)
                result = engine.run(given)
            if piece is pieces[-1]:
                rows.append({"piece": piece.name} | differences(shell.leave(state), result[plan.output]))
                break
            block = plan.network.blocks[index]
            expected = torch.nn.Module.to(copy.deepcopy(block), kind)(state, *others)
            got = result[pieces[index + 1].state].to(state.device)
            row = {"piece": piece.name} | differences(expected, got)
            row["update_relative_l2"] = differences(expected - state, got.to(kind) - state)["relative_l2"]
            dtype = engine.inputs[piece.state][0]
            if plan.network.dtype == getattr(torch, dtype):
                eager = block(*_cast((state, *others), plan.network.dtype))
                row["eager_relative_l2"] = differences(expected, eager)["relative_l2"]
            rows.append(row)
            state = expected
    return pd.DataFrame(rows).drop(columns=["elements", "psnr_db"])


class _Shell:
    """What an expert computes around its blocks, in another dtype; the blocks themselves are not copied."""

    def __init__(self, network, dtype) -> None:
        import torch

        class Door(torch.nn.Module):
            """Stands for all blocks: takes down what they are given, and hands on what it is told."""

            given, answer = None, None

            def forward(self, state, *others):
                self.given = (state, *others)
                return state if self.answer is None else self.answer

        self.door, self.dtype, self.inputs = Door(), dtype, ()
        stand_in = torch.nn.ModuleList([self.door])
        shell = copy.deepcopy(network, {id(network.blocks): stand_in})
        self.network = torch.nn.Module.to(shell, dtype)  # diffusers' own warns of modules kept in float32

    def enter(self, *inputs) -> tuple:
        """What the first block is given."""
        self.inputs = _cast(inputs, self.dtype)
        self.network(*self.inputs, return_dict=False)
        return self.door.given

    def leave(self, state):
        """The output of the expert for the hidden states after the last block."""
        self.door.answer = state
        return self.network(*self.inputs, return_dict=False)[0]


def _cast(values: tuple, dtype) -> tuple:
    """Tensors in another dtype; rotary tables, a tuple of their own, stay in float32, as the network has them."""
    return tuple(value if isinstance(value, tuple) else value.to(dtype) for value in values)
