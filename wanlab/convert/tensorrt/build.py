"""An ONNX graph built into an engine, with a receipt of what it was built from, for and by."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanlab.convert.onnx.identity import file_sha256
from wanlab.convert.tensorrt import receipt as receipts
from wanlab.convert.tensorrt.inspect import inspect_plan
from wanlab.convert.tensorrt.layers import count_datatypes, count_types, layers_from_log, write_layers
from wanlab.convert.tensorrt.plan import make_plan, target_gpus
from wanlab.convert.tensorrt.profile import PixelProfile, Range, network_shapes
from wanlab.convert.tensorrt.receipt import EngineReceipt
from wanlab.convert.tensorrt.runtime import Kind, Message, Runtime, open_runtime
from wanlab.convert.tensorrt.source import read_source
from wanlab.errors import WanlabError


def build_tensorrt(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str] | None = None,
    *,
    profile: PixelProfile | Mapping[str, Range] | None = None,
    workspace_gib: float | None = None,
    level: int | None = None,
    tf32: bool = True,
    timing_cache: str | os.PathLike[str] | None = None,
    compute_capabilities: Sequence[str] | None = None,
    kind: Kind | None = None,
    reuse: bool = True,
    progress: bool = True,
) -> EngineReceipt:
    """Build an engine from an ONNX graph; engine and receipt appear only when all went well.

    The network is strongly typed: it computes in the types that the graph says, quantised where the graph has
    QuantizeLinear and DequantizeLinear. TensorRT for RTX builds ahead of time for a list of GPUs and needs none;
    TensorRT builds for the GPU of this machine and times its kernels on it.

    Args:
        onnx_path: from `wanlab.convert.export` or `wanlab.precision.quantize`; weights beside it are found.
        engine_path: None takes `<graph>.engine` beside the graph. Beside the engine come `<engine>.json`, the
            receipt, and `<engine>.layers.json`, what the builder made of each layer.
        profile: sizes to build for, in pixels, or as shapes of the inputs; None takes sizes around the model's clip.
            A graph of fixed sizes needs none.
        workspace_gib: most device memory for a layer's scratch; None sets no limit.
        level: builder optimisation level, 0 to 5; None takes TensorRT's own.
        tf32: let float32 products use TF32 where the GPU has it, which TensorRT does by default.
        timing_cache: file that kernel timings are taken from and added to; TensorRT only.
        compute_capabilities: for TensorRT for RTX, e.g. `["8.6", "12.0"]`; None takes 8.6, 8.9 and 12.0.
        kind: `"tensorrt"` or `"tensorrt-rtx"`; None as in `open_runtime`.
        reuse: keep an engine that was built from the same graph, shapes, settings and version for the same GPUs.
        progress: show a bar while the builder works.

    Raises:
        WanlabError: TensorRT is not installed, the parser or the builder refuses the graph (with the node's name),
            the profile does not fit the graph, or a setting makes no sense.
    """
    runtime, source = open_runtime(kind), read_source(onnx_path)
    path = Path(engine_path) if engine_path else source.path.with_suffix(".engine")
    if path.suffix not in (".engine", ".plan"):
        raise WanlabError(f"{path} does not end in .engine; give the file to write, e.g. {path.stem}.engine")
    if level is not None and not 0 <= level <= 5:
        raise WanlabError(f"level is {level}; give 0 (fastest build) to 5 (longest search)")
    if workspace_gib is not None and workspace_gib <= 0:
        raise WanlabError(f"workspace_gib is {workspace_gib}; give more than 0, or None for no limit")
    if timing_cache is not None and runtime.builds_ahead:
        raise WanlabError(f"{runtime.name} times nothing while it builds; leave timing_cache out")
    shapes = network_shapes(source, profile)
    targets, gpu = target_gpus(runtime, compute_capabilities)
    settings = {"level": level, "workspace_gib": workspace_gib, "tf32": tf32}
    key = receipts.build_key(
        {
            "graph": source.graph_sha256,
            "shapes": shapes.inputs,
            "settings": settings,
            "runtime": [runtime.kind, runtime.version],
            "targets": targets,
            "gpu": gpu,
        }
    )
    if reuse and (known := receipts.kept(path, key)) is not None:
        return replace(known, cached=True)

    from wanlab import measure

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    begin = time.perf_counter()
    with runtime.messages() as log, measure.peak_memory("cpu") as memory:
        plan = make_plan(runtime, source, shapes, targets, settings, timing_cache, log, progress)
        time_ms = (time.perf_counter() - begin) * 1e3
        try:
            draft.write_bytes(plan)
            made = EngineReceipt(
                path=str(path),
                key=key,
                model=source.metadata.get("model", ""),
                component=source.metadata.get("component", ""),
                graph=os.path.relpath(source.path, path.parent),
                graph_sha256=source.graph_sha256,
                file_sha256=source.file_sha256,
                engine_sha256=file_sha256(draft),
                numbers=source.numbers,
                kind=runtime.kind,
                version=runtime.version,
                compute_capabilities=targets,
                gpu=gpu,
                inputs=source.inputs,
                outputs=source.outputs,
                clips=shapes.clips,
                shapes=shapes.inputs,
                settings=settings,
                size_bytes=draft.stat().st_size,
                graph_bytes=source.size_bytes,
                **_layers(runtime, path, plan, log),
                activation_bytes=_logged_bytes(log, "Total Activation Memory"),
                weights_bytes=_logged_bytes(log, "Total Weights Memory"),
                time_ms=time_ms,
                peak_host_gib=0.0,
                log=tuple((severity, text) for severity, text in log if severity != "VERBOSE"),
                notes=shapes.notes,
                metadata=source.metadata,
                wanlab_version=_wanlab_version(),
            )
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    made = replace(made, peak_host_gib=memory.increase_gib)
    receipts.write_receipt(made)
    return made


def _layers(runtime: Runtime, path: Path, plan: Any, log: list[Message]) -> dict[str, Any]:
    """Layer information beside the engine: from its inspector where a GPU can open it, else from the log."""
    found = None if runtime.builds_ahead else inspect_plan(runtime, plan)
    found = found or layers_from_log(log)
    if found is None:
        return {
            "layers": {},
            "datatypes": {},
            "layers_source": f"none: {runtime.last_error(log) or 'the builder logged no layers'}",
        }
    write_layers(path, found)
    counts = {"layers": count_types(found), "datatypes": count_datatypes(found)}
    return counts | {"layers_source": found["Source"]}


def _logged_bytes(log: Sequence[Message], what: str) -> int | None:
    pattern = re.compile(rf"{what}: (\d+) bytes")
    found = [int(match[1]) for _, text in log if (match := pattern.search(text))]
    return max(found, default=None)


def _wanlab_version() -> str:
    from wanlab import __version__

    return __version__
