"""How far an engine's outputs are from PyTorch's, component by component."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wanlab.convert.clip import ClipShape, default_shape
from wanlab.convert.components import recipe
from wanlab.convert.ort import OrtEngine
from wanlab.models.shapes import size_step

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from wanlab.convert.engine import Engine
    from wanlab.convert.onnx.report import ExportReport


def parity(
    model,
    component: str,
    onnx_path: str | os.PathLike | Engine,
    *,
    shapes: Sequence[ClipShape] | None = None,
    cases: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    provider: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Compare a converted component with the network as the pipeline runs it.

    The reference is the original forward (for the VAE the chunked one), in the network's own dtype, not the form
    that was traced.

    Args:
        model: eager, the one that was exported.
        onnx_path: file, or an engine that is open already.
        shapes: clips to compare at; None takes the traced one and, as far as the graph's axes are free, one on its
            side and a smaller one, both shorter and with batch 1.
        provider: as in `OrtEngine`.
        cases: label -> inputs by name, e.g. recorded from a generation at some step; replaces the random inputs.
        seed: of the random inputs.

    Returns:
        One row per shape or label and output: component, shape, output, elements, max_abs, mean_abs, relative_l2
        (||a - b|| / ||a||), cosine, psnr_db (peak = range of the reference; inf when equal).

    Raises:
        WanlabError: as `recipe` and `OrtEngine`, or a shape that the graph does not take.
    """
    import pandas as pd
    import torch

    plan = recipe(model, component)
    engine = onnx_path if hasattr(onnx_path, "run") else OrtEngine(onnx_path, provider=provider)
    rows = []
    if cases is None:
        drawn = _shapes(model, plan, engine) if shapes is None else shapes
        cases = {str(shape): _random(plan, shape, seed) for shape in drawn}
    training = plan.network.training
    plan.network.eval()
    try:
        for label, inputs in cases.items():
            given = [inputs[name].to(plan.network.device) for name in plan.inputs]
            with torch.no_grad():
                expected = plan.reference(*given)
            made = engine.run(inputs)[plan.output]
            row = {"component": component, "shape": label, "output": plan.output}
            rows.append(row | differences(expected, made))
    finally:
        plan.network.train(training)
    return pd.DataFrame(rows)


def parity_all(
    model,
    reports: Sequence[ExportReport],
    *,
    cases: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]] | None = None,
    provider: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """`parity` of several exports, on random inputs and on recorded ones.

    Args:
        reports: from `export_all`.
        cases: component -> label -> inputs by name; compared besides the random inputs.

    Returns:
        The rows of `parity`, with `inputs` (`"random"` or `"recorded"`).
    """
    import pandas as pd

    tables = []
    for report in reports:
        engine = OrtEngine(report.path, provider=provider)
        table = parity(model, report.component, engine, seed=seed)
        tables.append(table.assign(inputs="random"))
        recorded = (cases or {}).get(report.component)
        if recorded:
            table = parity(model, report.component, engine, cases=recorded)
            tables.append(table.assign(inputs="recorded"))
    return pd.concat(tables, ignore_index=True)


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


def _random(plan, shape: ClipShape, seed: int) -> dict[str, torch.Tensor]:
    import torch

    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
    return dict(zip(plan.inputs, inputs, strict=True))


def _shapes(model, plan, engine: Engine) -> list[ClipShape]:
    """The traced clip, and when the graph takes other sizes too, one on its side and a smaller one."""
    from wanlab.convert.onnx.report import read_report

    report = read_report(engine.path) if hasattr(engine, "path") else None
    first = default_shape(model) if report is None else report.shape
    free = all(
        isinstance(engine.inputs[name][1][axis], str) for name, axes in plan.inputs.items() for axis in axes
    )
    if not free:
        return [first]
    spec = model.spec
    step_h, step_w = size_step(spec)
    few = max((first.frames - 1) // spec.temporal_factor // 2, 2) * spec.temporal_factor + 1
    turned = replace(first, batch=1, height=first.width, width=first.height, frames=few)
    smaller = ClipShape(
        batch=1,
        height=max(first.height // 2 // step_h, 2) * step_h,
        width=max(first.width // 4 // step_w, 2) * step_w,
        frames=few,
        text_tokens=max(first.text_tokens // 2, 2),
    )
    return [first, turned, smaller]
