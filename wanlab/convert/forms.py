"""What writing a network in export-friendly forms buys: nodes, operators that engines run badly, time."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab import measure
from wanlab.convert.clip import ClipShape, default_shape
from wanlab.convert.components import FUSED_OPSET, recipe
from wanlab.convert.onnx.export import export
from wanlab.convert.onnx.settings import BFLOAT16_OPSET, DEFAULT_OPSET
from wanlab.convert.ort import OrtEngine

if TYPE_CHECKING:
    import pandas as pd

COUNTED = (
    "ScatterND",
    "ReduceMean",
    "RMSNormalization",
    "Softmax",
    "Attention",
    "RotaryEmbedding",
    "Transpose",
)


def compare_forms(
    model,
    component: str,
    folder: str | os.PathLike,
    *,
    shape: ClipShape | None = None,
    provider: str = "auto",
    rounds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Export a component as it is, in friendly forms, and with fused operators; run all of them in turn.

    Sizes are fixed, which exports several times faster and is the kindest to the network as it is.

    Args:
        model: eager. folder: where the graphs are kept.
        shape: clip of the timed inputs; None takes the model's default with batch 1.
        provider: of ONNX Runtime. rounds: each gives two samples a row, interleaved.

    Returns:
        A row for `eager` and for each graph: form, opset, nodes, nodes of the operators in `COUNTED`, notes (what
        `onnx.graph.lint` finds), relative_l2 to eager, time_ms (median), low and high of the ratio to `original`,
        ratio, verdict, noise_percent (A/A of `original`), samples_ms.
    """
    import pandas as pd
    import torch

    plan = recipe(model, component)
    kind = str(plan.network.dtype).removeprefix("torch.")
    shape = shape or default_shape(model, batch=1)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    plain = BFLOAT16_OPSET if kind == "bfloat16" else DEFAULT_OPSET
    variants = {
        "original": (plain, "original"),
        "friendly": (plain, "friendly"),
        "fused": (FUSED_OPSET, "friendly"),
    }
    rows, calls = [], {}
    with torch.no_grad():
        expected = plan.reference(*inputs)
        for label, (opset, forms) in variants.items():
            path = Path(folder) / f"{component}.{kind}.{label}.onnx"
            report = export(model, component, path, opset=opset, forms=forms, dynamic=False, **asdict(shape))
            engine = OrtEngine(path, provider=provider)
            made = engine.run(feeds)[plan.output].to(expected.device)
            calls[label] = lambda engine=engine: engine.run(feeds)
            rows.append(
                {"form": label, "opset": opset, "nodes": report.nodes_after}
                | {name: report.operators.get(name, 0) for name in COUNTED}
                | {"notes": "; ".join(report.notes)}
                | {"relative_l2": ((made - expected).norm() / expected.norm()).item()}
            )
        calls["eager"] = lambda: plan.reference(*inputs)
        rows.append({"form": "eager"})
        device = plan.network.device
        samples, control = measure.in_turn(calls, warmup=2, rounds=rounds, device=device, progress=progress)
    base = samples["original"]
    for row in rows:
        mine = samples[row["form"]]
        gain = measure.compare(base, mine, control.noise_percent)
        row |= {"time_ms": mine.median, "ratio": gain.speedup, "low": gain.low, "high": gain.high}
        row["verdict"] = "baseline" if mine is base else gain.verdict
        row |= {"noise_percent": control.noise_percent, "samples_ms": mine.values_ms}
    return pd.DataFrame(rows)
