"""TensorRT as an engine, on the GPU that it was built for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_bytes
from wanlab.engines.base import Engine, TensorType
from wanlab.engines.component_bench import bench_components
from wanlab.engines.parity import parity
from wanlab.engines.tensorrt.build import BuildInfo, inspect_engine
from wanlab.engines.tensorrt.runtime import Runtime, open_runtime
from wanlab.models.pipeline import Model

if TYPE_CHECKING:
    import tensorrt as trt

SPECIALIZATIONS = ("lazy", "eager", "none")


def deserialize(runtime: Runtime, path: Path) -> trt.ICudaEngine:
    """Open an engine file.

    Raises:
        WanlabError: the GPU or its driver cannot run it, or the file is damaged; with TensorRT's message.
    """
    plan = path.read_bytes()
    with runtime.messages() as log:
        opener = runtime.module.Runtime(runtime.logger)
        if not opener:
            raise WanlabError(
                f"{runtime.name} cannot run here: {runtime.last_error(log) or 'no GPU is seen'}"
            )
        invalid = _invalidity(runtime, opener, plan)
        engine = None if invalid else opener.deserialize_cuda_engine(plan)
    if engine is None:
        reason = "; ".join(part for part in (invalid, runtime.last_error(log)) if part)
        raise WanlabError(f"{runtime.name} cannot open {path.name}: {reason or 'no reason given'}")
    return engine


def _invalidity(runtime: Runtime, opener: Any, plan: bytes) -> str:
    """Reasons why an engine of TensorRT for RTX is invalid on this GPU; empty when it is valid."""
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
    """The `IRuntimeConfig` of TensorRT for RTX with its runtime cache; None for TensorRT, which does not have one.

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
    settings: Any = engine.create_runtime_config()  # not in the stubs of TensorRT 10
    strategies = module.DynamicShapesKernelSpecializationStrategy
    settings.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialization.upper())
    graphs = module.CudaGraphStrategy
    settings.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if device_cuda_graphs else graphs.DISABLED
    kernels = settings.create_runtime_cache()
    if cache is not None and Path(cache).is_file():
        # TensorRT ignores a cache of another GPU or driver.
        kernels.deserialize(Path(cache).read_bytes())
    settings.set_runtime_cache(kernels)
    return settings


# TensorRT's DataType -> name in torch.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}


class TensorRTEngine(Engine):
    """One engine file, opened on a GPU.

    Attributes:
        name: `"tensorrt"` or `"tensorrt-rtx"`.
        info: its build information.
        inputs, outputs, metadata, size_bytes, load_ms, device: see `wanlab.engines.base.Engine`.
    """

    alignment = 256

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cuda",
        runtime_cache: str | os.PathLike[str] | None = None,
        specialization: str = "lazy",
        device_cuda_graphs: bool = False,
    ) -> None:
        """Open an engine.

        Args:
            path: `.engine` file from `wanlab.engines.build_tensorrt`, with its build information beside it.
            device: the GPU.
            runtime_cache: file of kernels that TensorRT for RTX compiled for this GPU, read if it exists;
                `save_runtime_cache` writes it.
            specialization: when TensorRT for RTX compiles kernels for the shapes that are run: `"lazy"` (in the
                background), `"eager"` (before the first run of a shape) or `"none"`.
            device_cuda_graphs: whether TensorRT for RTX captures and replays its own CUDA graphs.

        Raises:
            WanlabError: no GPU, an engine that is out of date or built for another machine, or one that this GPU or driver
                cannot run; with the reason.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise WanlabError(f"no engine at {self.path}; build it with wanlab.engines.build_tensorrt")
        self.info = BuildInfo.read(self.path)
        if not torch.cuda.is_available():
            raise WanlabError(
                f"{self.path.name} runs on compute capability {', '.join(self.info.compute_capabilities)} and"
                " PyTorch sees no GPU; run the ONNX graph with wanlab.engines.OrtEngine instead"
            )
        self.device = torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._runtime = open_runtime(self.info.kind)
        major, minor = torch.cuda.get_device_capability(self.device)
        self.info.check(
            kind=self._runtime.kind,
            version=self._runtime.version,
            capability=f"{major}.{minor}",
            gpu=torch.cuda.get_device_name(self.device),
        )
        self.name, self.metadata = self.info.kind, dict(self.info.metadata)
        self.size_bytes, self.build_ms = self.info.size_bytes, self.info.time_ms
        begin = time.perf_counter()
        with torch.cuda.device(self.device):
            self._engine = deserialize(self._runtime, self.path)
            self._settings = runtime_settings(
                self._runtime, self._engine, runtime_cache, specialization, device_cuda_graphs
            )
            self._context: trt.IExecutionContext | None = self._new_context()
            self._stream = torch.cuda.Stream(
                self.device
            )  # on the default stream TensorRT waits for the device
        self.load_ms = (time.perf_counter() - begin) * 1e3
        self.inputs, self.outputs = self._types()

    def __repr__(self) -> str:
        return f"TensorRTEngine({self.path.name!r}, {self._runtime.name}, device={str(self.device)!r})"

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The run starts after the work that is queued on the current stream, and later work on it waits for the run."""
        context = self._context = self._context or self._new_context()
        shapes = self._set_shapes(context, {name: tuple(t.shape) for name, t in tensors.items()})
        outputs = {
            name: torch.empty(shape, dtype=getattr(torch, self.outputs[name][0]), device=self.device)
            for name, shape in shapes.items()
        }
        self._set_addresses(context, tensors | outputs)
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        self._enqueue(context, self._stream.cuda_stream)
        caller.wait_stream(self._stream)
        for tensor in (*tensors.values(), *outputs.values()):
            tensor.record_stream(self._stream)  # otherwise its memory could be reused before the run ends
        return outputs

    def _check_capture(self, cuda_graph: bool) -> None:
        """Nothing to refuse here: whether a capture is possible depends on the shapes, which `_bind` knows."""

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = self.info.shapes[name]
        inside = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not inside:
            raise WanlabError(
                f"input {name!r} of {self.path.name} is {list(shape)}; it was built for {list(low)} to"
                f" {list(high)}: build it with a profile that includes your shape"
            )

    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """Every bound function has its own context, because a context has one set of shapes and addresses."""
        self._context = (
            None  # a context holds the memory of all activations; `run` creates another when it needs one
        )
        context = self._new_context()
        shapes = self._set_shapes(context, {name: tuple(inputs[name].shape) for name in self.inputs})
        for name, shape in shapes.items():
            if tuple(outputs[name].shape) != shape:
                raise WanlabError(
                    f"{name!r} of {self.path.name} is {list(shape)} for these inputs;"
                    f" memory for {list(outputs[name].shape)} was given"
                )
        memory = dict(inputs) | dict(outputs)
        self._set_addresses(context, {name: memory[name] for name in (*self.inputs, *self.outputs)})
        assert stream is not None  # TensorRT has GPUs only
        handle = stream.cuda_stream

        # The context has only addresses: the tensors have to exist as long as the function.
        def enqueue(_memory: Any = memory) -> None:
            self._enqueue(context, handle)

        if not cuda_graph:
            return enqueue
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(handle):
            raise WanlabError(f"{self.path.name} cannot be captured for these shapes; leave cuda_graph out")
        for _ in range(3):  # kernels are compiled and shapes are inferred on the first calls
            enqueue()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # TensorRT for RTX compiles in its own threads, which may allocate memory during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._enqueue(context, torch.cuda.current_stream(self.device).cuda_stream)

        def replay(_memory: Any = memory, _context: Any = context) -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    def layers(self) -> dict[str, Any] | None:
        """Layer information from the engine's inspector, as a dict with `"Layers"`."""
        return inspect_engine(self._runtime, self._engine)

    def save_runtime_cache(self, path: str | os.PathLike[str]) -> Path:
        """Write the kernels that TensorRT for RTX compiled for this GPU, so that the next process can load them.

        Raises:
            WanlabError: the runtime is TensorRT, which compiles everything at the build.
        """
        if self._settings is None:
            raise WanlabError(f"{self._runtime.name} has no runtime cache; an engine holds all its kernels")
        return write_bytes(path, self._settings.get_runtime_cache().serialize())

    def _new_context(self) -> trt.IExecutionContext:
        if self._settings is None:
            context = self._engine.create_execution_context()
        else:
            context = self._engine.create_execution_context(self._settings)
        if context is None:
            raise WanlabError(f"{self.path.name} cannot be set up to run: {self._runtime.last_error()}")
        return context

    def _types(self) -> tuple[dict[str, TensorType], dict[str, TensorType]]:
        """Types of inputs and outputs; free axes have their names in the graph."""
        named = self.info.inputs | self.info.outputs
        kinds: tuple[dict[str, TensorType], dict[str, TensorType]] = ({}, {})
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = _sizes(self._engine.get_tensor_shape(name))
            names = named[name][1] if name in named else tuple(f"{name}[{i}]" for i in range(len(shape)))
            axes = tuple(axis if size < 0 else size for size, axis in zip(shape, names, strict=True))
            is_input = self._engine.get_tensor_mode(name).name == "INPUT"
            dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
            kinds[0 if is_input else 1][name] = (dtype, axes)
        return kinds

    def _set_shapes(
        self, context: trt.IExecutionContext, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Set the shapes of the inputs; returns those of the outputs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise WanlabError(f"{self.path.name} refuses input {name!r} of {list(shape)}")
        unknown = context.infer_shapes()
        if unknown:
            raise WanlabError(f"{self.path.name} cannot infer the shape of {', '.join(unknown)}")
        return {name: _sizes(context.get_tensor_shape(name)) for name in self.outputs}

    def _set_addresses(self, context: trt.IExecutionContext, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise WanlabError(f"{self.path.name} refuses the memory given for {name!r}")

    def _enqueue(self, context: trt.IExecutionContext, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise WanlabError(f"{self.path.name} failed: {self._runtime.last_error() or 'no reason given'}")


def open_tensorrt(
    model: Model | None, component: str | None, path: str | os.PathLike[str], **settings: Any
) -> TensorRTEngine:
    """An engine file on the model's GPU if a model is given; the `open` of the kind `tensorrt`."""
    if model is not None and model.device.type == "cuda":
        settings = {"device": model.device, **settings}
    return TensorRTEngine(path, **settings)


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


COLUMNS = ["component", "numbers", "executed", "reason", "clip", "relative_l2"]


def try_engines(
    model: Any,
    built: Sequence[BuildInfo],
    *,
    iterations: int = 10,
    duration_ms: float = 1000.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Open every engine, compare it with PyTorch at the clip it was optimised for, and benchmark both.

    Args:
        model: an eager model from `wanlab.models.load`, on the GPU if there is one.
        built: build information from `build_tensorrt` or `build_engines`.
        iterations, duration_ms: as in `measure.bench`.
        seed: seed of the inputs.

    Returns:
        A row per engine: component, numbers, executed (bool), reason (why it was not executed), clip, relative_l2; for
        engines that were executed also the columns of `measure.bench_table` against eager PyTorch.
    """
    rows: list[dict[str, Any]] = []
    for info in built:
        row: dict[str, Any] = {"component": info.component, "numbers": info.numbers}
        rows.append(row)
        if not torch.cuda.is_available():
            targets = ", ".join(info.compute_capabilities)
            row |= {
                "executed": False,
                "reason": f"no GPU is seen here; it runs on compute capability {targets}",
            }
            continue
        try:
            engine = TensorRTEngine(info.path)
        except WanlabError as error:
            row |= {"executed": False, "reason": str(error)}
            continue
        clip = info.clip()
        compared = parity(model, info.component, engine, shapes=[clip], seed=seed)
        size = {name: getattr(clip, name) for name in ("batch", "height", "width", "frames", "text_tokens")}
        table = bench_components(
            model,
            {info.component: engine},
            [info.component],
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
