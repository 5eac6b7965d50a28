"""From an engine's bytes to an engine that can make contexts, or the reason why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.runtime import Runtime
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import tensorrt as trt

SPECIALIZATIONS = ("lazy", "eager", "none")


def deserialize(runtime: Runtime, path: Path) -> trt.ICudaEngine:
    """Open an engine file.

    Raises:
        WanlabError: the GPU or its driver cannot run it, or the file is broken; in TensorRT's words.
    """
    plan = path.read_bytes()
    with runtime.messages() as log:
        opener = runtime.module.Runtime(runtime.logger)
        if not opener:
            raise WanlabError(
                f"{runtime.name} cannot run here: {runtime.last_error(log) or 'no GPU is seen'}"
            )
        wrong = _invalidity(runtime, opener, plan)
        engine = None if wrong else opener.deserialize_cuda_engine(plan)
    if engine is None:
        reason = "; ".join(part for part in (wrong, runtime.last_error(log)) if part)
        raise WanlabError(f"{runtime.name} cannot open {path.name}: {reason or 'no reason given'}")
    return engine


def _invalidity(runtime: Runtime, opener: Any, plan: bytes) -> str:
    """Why TensorRT for RTX calls an engine invalid on this GPU; empty when it does not."""
    if not hasattr(opener, "get_engine_validity"):
        return ""
    verdict, bits = opener.get_engine_validity(plan)
    module = runtime.module
    if verdict != module.EngineValidity.INVALID:
        return ""
    causes = module.EngineInvalidityDiagnostics.__members__.items()
    named = [name.lower().replace("_", " ") for name, value in causes if int(value) & int(bits)]
    return ", ".join(named) or "not valid on this machine"


def runtime_settings(
    runtime: Runtime,
    engine: trt.ICudaEngine,
    cache: str | os.PathLike[str] | None,
    specialization: str,
    device_cuda_graphs: bool,
) -> Any:
    """The `IRuntimeConfig` of TensorRT for RTX, with its runtime cache; None for TensorRT, which has none of this.

    Raises:
        WanlabError: a setting that the runtime does not have.
    """
    if specialization not in SPECIALIZATIONS:
        raise WanlabError(
            f"unknown specialization {specialization!r}{did_you_mean(specialization, SPECIALIZATIONS)};"
            f" give {', '.join(SPECIALIZATIONS)}"
        )
    if not runtime.builds_ahead:
        if cache is not None:
            raise WanlabError(f"{runtime.name} has no runtime cache; leave runtime_cache out")
        return None
    module = runtime.module
    settings: Any = engine.create_runtime_config()  # more than the stubs of TensorRT 10 know
    strategies = module.DynamicShapesKernelSpecializationStrategy
    settings.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialization.upper())
    graphs = module.CudaGraphStrategy
    settings.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if device_cuda_graphs else graphs.DISABLED
    kernels = settings.create_runtime_cache()
    if cache is not None and Path(cache).is_file():
        kernels.deserialize(
            Path(cache).read_bytes()
        )  # one of another GPU or driver is left aside by TensorRT
    settings.set_runtime_cache(kernels)
    return settings
