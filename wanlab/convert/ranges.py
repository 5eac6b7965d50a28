"""The largest value of every tensor of a graph on real inputs: what would overflow in half precision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.ort import OrtEngine
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx_ir
    import pandas as pd
    import torch

FLOAT16_MAX = 65504.0
NEAR_SHARE = 0.25  # within a factor of four: another prompt may overflow


def value_ranges(
    onnx_path: str | os.PathLike,
    inputs: Iterable[Mapping[str, torch.Tensor]],
    *,
    provider: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Largest magnitude of every floating-point tensor that a graph computes.

    Every tensor gets a maximum beside it, and the graph runs as it is otherwise. Take the float32 graph to see
    what float16 would not hold (above 65,504); the float16 graph itself shows where it does overflow.

    Args:
        onnx_path: a graph of `wanlab.convert.export`.
        inputs: feeds by name, best recorded from real generations; the largest of all is kept.

    Returns:
        One row per tensor, largest first: node (wanlab's name), operator, tensor, max_abs (inf where it overflowed),
        float16_share (max_abs / 65,504), state (`"overflows"`, `"near"` above a quarter, or `"fits"`).

    Raises:
        WanlabError: no inputs, or as `OrtEngine`.
    """
    import math

    import onnx_ir
    import pandas as pd
    from tqdm.auto import tqdm

    path = Path(onnx_path)
    model = onnx_ir.load(path)
    watched = _watch(model.graph)
    draft = path.with_name(f".{path.stem}.ranges.{os.getpid()}.onnx")
    largest = dict.fromkeys(watched, -1.0)
    try:
        onnx_ir.save(model, draft)
        engine = OrtEngine(draft, provider=provider)
        for feeds in tqdm(inputs, desc="ranges", unit="input", leave=False, disable=not progress):
            made = engine.run(feeds)
            for name in watched:
                value = float(made[name])
                largest[name] = max(largest[name], math.inf if math.isnan(value) else value)
    finally:
        draft.unlink(missing_ok=True)
    if any(value < 0 for value in largest.values()):
        raise WanlabError("no inputs to take ranges on; give at least one set of feeds")
    rows = [
        {
            "node": node.name,
            "operator": node.op_type,
            "tensor": name.removesuffix(_SUFFIX),
            "max_abs": largest[name],
            "float16_share": largest[name] / FLOAT16_MAX,
            "state": _state(largest[name]),
        }
        for name, node in watched.items()
    ]
    return pd.DataFrame(rows).sort_values("max_abs", ascending=False, kind="stable", ignore_index=True)


_SUFFIX = "/max_abs"


def _watch(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Node]:
    """Add the largest magnitude of every floating-point tensor as an output; output -> node it belongs to."""
    import onnx_ir

    watched = {}
    for node in list(graph):
        for value in node.outputs:
            if value.dtype is None or not value.dtype.is_floating_point() or not value.uses():
                continue
            size = onnx_ir.node("Abs", [value])
            peak = onnx_ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
            peak.outputs[0].name = f"{value.name}{_SUFFIX}"
            peak.outputs[0].type = onnx_ir.TensorType(value.dtype)
            peak.outputs[0].shape = onnx_ir.Shape([])
            graph.extend([size, peak])
            graph.outputs.append(peak.outputs[0])
            watched[peak.outputs[0].name] = node
    return watched


def _state(value: float) -> str:
    share = value / FLOAT16_MAX
    return "overflows" if share > 1 else "near" if share > NEAR_SHARE else "fits"
