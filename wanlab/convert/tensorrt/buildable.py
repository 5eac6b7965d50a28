"""Which GPUs a graph can be built for, and what is in the way."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.plan import CAPABILITIES, Refused, make_plan, target_gpus
from wanlab.convert.tensorrt.profile import PixelProfile, Range, network_shapes
from wanlab.convert.tensorrt.runtime import open_runtime
from wanlab.convert.tensorrt.source import read_source

if TYPE_CHECKING:
    import pandas as pd


def buildable(
    onnx_path: str | os.PathLike[str],
    capabilities: Sequence[str] = ("7.5", "8.0", *CAPABILITIES, "12.1"),
    *,
    profile: PixelProfile | Mapping[str, Range] | None = None,
    level: int | None = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Try which GPUs TensorRT for RTX builds a graph for; nothing is written and nothing is run.

    Args:
        capabilities: compute capabilities, each built for alone.
        profile, level: as in `build_tensorrt`.

    Returns:
        A row per capability: capability, built (bool), time_ms, size_bytes (of the engine), node, operator, reason
        (of the first node that was refused; empty when it was built).

    Raises:
        WanlabError: as `build_tensorrt`, but for a builder that refuses.
    """
    import pandas as pd

    runtime, source = open_runtime("tensorrt-rtx"), read_source(onnx_path)
    shapes = network_shapes(source, profile)
    settings: dict[str, Any] = {"level": level, "workspace_gib": None, "tf32": True}
    rows = []
    for target in target_gpus(runtime, capabilities)[0]:
        begin = time.perf_counter()
        row: dict[str, Any] = {"capability": target, "built": True}
        with runtime.messages() as log:
            try:
                plan = make_plan(runtime, source, shapes, (target,), settings, None, log, progress)
                row |= {"size_bytes": memoryview(plan).nbytes, "node": "", "operator": "", "reason": ""}
            except Refused as error:
                found = error.refusal
                row |= {"built": False, "size_bytes": None}
                row |= {"node": found.node, "operator": found.operator, "reason": found.reason}
        rows.append(row | {"time_ms": (time.perf_counter() - begin) * 1e3})
    columns = ["capability", "built", "time_ms", "size_bytes", "node", "operator", "reason"]
    return pd.DataFrame(rows, columns=columns)
