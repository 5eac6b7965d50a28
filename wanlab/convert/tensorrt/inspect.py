"""Layer information from an engine's own inspector, which needs a GPU that the engine is for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.layers import LAYERS
from wanlab.convert.tensorrt.runtime import Runtime

if TYPE_CHECKING:
    import tensorrt as trt


def inspect_plan(runtime: Runtime, plan: Any) -> dict[str, Any] | None:
    """Open a serialised engine for a look; None where it cannot be opened here.

    Args:
        plan: bytes, or what the builder gave.
    """
    opener: trt.Runtime | None = runtime.module.Runtime(runtime.logger)
    engine = opener.deserialize_cuda_engine(plan) if opener else None
    return None if engine is None else inspect_engine(runtime, engine)


def inspect_engine(
    runtime: Runtime, engine: trt.ICudaEngine, context: trt.IExecutionContext | None = None
) -> dict[str, Any] | None:
    """What the inspector says, as a dict with `"Layers"`; None where it says nothing that can be read.

    Args:
        context: with its input shapes set, tells the shapes of free axes too.
    """
    inspector = engine.create_engine_inspector()
    if context is not None:
        inspector.execution_context = context
    try:
        found = json.loads(
            inspector.get_engine_information(runtime.module.LayerInformationFormat.JSON), strict=False
        )
    except ValueError:
        return None
    return found | {"Source": "inspector"} if isinstance(found, dict) and found.get(LAYERS) else None
