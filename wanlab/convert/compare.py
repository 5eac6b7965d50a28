"""How far an engine's outputs are from PyTorch's, component by component."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from wanlab.convert.clip import ClipShape, default_shape
from wanlab.convert.components import recipe
from wanlab.convert.ort import OrtEngine

if TYPE_CHECKING:
    import pandas as pd
    import torch


def parity(
    model,
    component: str,
    onnx_path: str | os.PathLike | OrtEngine,
    *,
    shapes: Sequence[ClipShape] | None = None,
    provider: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Compare a converted component with the network as the pipeline runs it, on random inputs.

    The reference is the original forward (for the VAE the chunked one), not the form that was traced.

    Args:
        model: eager, the one that was exported.
        onnx_path: file, or an engine that is open already.
        shapes: clips to compare at; None takes the model's default clip and, as far as the graph's axes
            are free, a smaller clip with another batch.
        provider: as in `OrtEngine`.
        seed: of the inputs.

    Returns:
        One row per shape and output: component, shape, output, elements, max_abs, mean_abs, relative_l2
        (||a - b|| / ||a||), cosine, psnr_db (peak = range of the reference; inf when equal).

    Raises:
        WanlabError: as `recipe` and `OrtEngine`, or a shape that the graph does not take.
    """
    import pandas as pd
    import torch

    plan = recipe(model, component)
    engine = onnx_path if isinstance(onnx_path, OrtEngine) else OrtEngine(onnx_path, provider=provider)
    rows = []
    for shape in _shapes(model, plan, engine) if shapes is None else shapes:
        inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
        plan_training = plan.network.training
        plan.network.eval()
        try:
            with torch.no_grad():
                expected = plan.reference(*inputs)
        finally:
            plan.network.train(plan_training)
        made = engine.run(dict(zip(plan.inputs, inputs, strict=True)))[plan.output]
        rows.append(
            {"component": component, "shape": str(shape), "output": plan.output} | differences(expected, made)
        )
    return pd.DataFrame(rows)


def differences(expected: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    """Distances between two tensors of one shape, computed in float64; keys as in `parity`."""
    import torch

    a, b = (tensor.detach().to("cpu", torch.float64).flatten() for tensor in (expected, made))
    error = b - a
    peak = (a.max() - a.min()).item()
    mean_square = error.square().mean().item()
    return {
        "elements": a.numel(),
        "max_abs": error.abs().max().item(),
        "mean_abs": error.abs().mean().item(),
        "relative_l2": (error.norm() / a.norm()).item() if a.norm() > 0 else math.inf if error.any() else 0.0,
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        "psnr_db": 10 * math.log10(peak**2 / mean_square)
        if mean_square and peak
        else math.inf
        if not mean_square
        else -math.inf,
    }


def _shapes(model, plan, engine: OrtEngine) -> list[ClipShape]:
    """The default clip, and a smaller one when the graph takes other sizes than that it was traced with."""
    from wanlab.convert.onnx.report import read_report

    report = read_report(engine.path)
    first = default_shape(model) if report is None else report.shape
    free = all(
        isinstance(engine.inputs[name][1][axis], str) for name, axes in plan.inputs.items() for axis in axes
    )
    if not free:
        return [first]
    config = model.pipeline.vae.config
    step = config.scale_factor_spatial * 2
    smaller = {
        "batch": 1,
        "height": max(first.height // 2 // step, 2) * step,
        "width": max(first.width // 4 // step, 2) * step,
        "frames": max((first.frames - 1) // config.scale_factor_temporal // 2, 2)
        * config.scale_factor_temporal
        + 1,
        "text_tokens": max(first.text_tokens // 2, 2),
    }
    return [first, ClipShape(**(asdict(first) | smaller))]
