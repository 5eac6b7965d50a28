"""Engines that were built, run where this machine's GPU can: distance to PyTorch, and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.engine import TensorRTEngine
from wanlab.convert.tensorrt.receipt import EngineReceipt
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["component", "numbers", "executed", "reason", "clip", "relative_l2"]


def try_engines(
    model: Any,
    receipts: Sequence[EngineReceipt],
    *,
    iterations: int = 10,
    duration_ms: float = 1000.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Open every engine, compare it with PyTorch at the clip it was optimised for, and benchmark both.

    Args:
        model: from `wanlab.models.load`, eager, on the GPU where there is one.
        receipts: from `build_tensorrt` or `build_engines`.
        iterations, duration_ms: as in `measure.bench`. seed: of the inputs.

    Returns:
        A row per engine: component, numbers, executed (bool), reason (why it was not), clip, relative_l2; and for those
        that were, the columns of `measure.bench_table` against eager PyTorch.
    """
    import pandas as pd
    import torch

    from wanlab.convert.compare import parity
    from wanlab.convert.component_bench import bench_components

    rows: list[dict[str, Any]] = []
    for receipt in receipts:
        row: dict[str, Any] = {"component": receipt.component, "numbers": receipt.numbers}
        rows.append(row)
        if not torch.cuda.is_available():
            targets = ", ".join(receipt.compute_capabilities)
            row |= {
                "executed": False,
                "reason": f"no GPU is seen here; it runs on compute capability {targets}",
            }
            continue
        try:
            engine = TensorRTEngine(receipt.path)
        except WanlabError as error:
            row |= {"executed": False, "reason": str(error)}
            continue
        clip = receipt.clip()
        compared = parity(model, receipt.component, engine, shapes=[clip], seed=seed)
        size = {name: getattr(clip, name) for name in ("batch", "height", "width", "frames", "text_tokens")}
        table = bench_components(
            model,
            {receipt.component: engine},
            [receipt.component],
            iterations=iterations,
            duration_ms=duration_ms,
            seed=seed,
            progress=progress,
            **size,
        )
        row |= {"executed": True, "reason": "", "clip": str(clip)}
        row |= {"relative_l2": compared["relative_l2"].max()} | dict(table.iloc[-1].drop("component"))
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*COLUMNS, *(name for name in frame if name not in COLUMNS)])
