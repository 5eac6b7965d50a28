"""ONNX Runtime as an engine, and its own times of every node."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pandas as pd
import torch

from wanlab.core.errors import WanlabError, did_you_mean, first_line, require
from wanlab.engines.base import Engine, TensorType
from wanlab.export.components import PARTS, random_feeds
from wanlab.export.export import check_graph
from wanlab.export.graph import file_bytes, formats_of
from wanlab.models.pipeline import Model

# ONNX Runtime keeps arithmetic on sizes on the CPU on purpose: its results are needed there.
SHAPE_OPERATORS = frozenset(
    {
        "Shape",
        "Size",
        "Gather",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Slice",
        "Cast",
        "Mul",
        "Add",
        "Sub",
        "Div",
        "Mod",
    }
    | {
        "Range",
        "Equal",
        "Where",
        "Reshape",
        "Min",
        "Max",
        "ConstantOfShape",
        "Expand",
        "Less",
        "Greater",
        "And",
        "Or",
    }
    | {"Not", "ReduceProd", "Neg", "Floor", "Ceil", "Identity"}
)


def assigned_nodes(session) -> pd.DataFrame:
    """Provider of each node of a session, as ONNX Runtime recorded it when it partitioned the graph.

    Returns:
        node (wanlab's name), operator, provider (`"CUDAExecutionProvider"`, ...).
    """
    rows = [
        {"node": node.name, "operator": node.op_type, "provider": part.ep_name}
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return pd.DataFrame(rows, columns=["node", "operator", "provider"])


def fallen_back(nodes: pd.DataFrame, tensor_kinds: dict[str, bool]) -> pd.DataFrame:
    """Nodes of a CUDA session that compute on the CPU.

    Nodes that only compute sizes are not included: operators of `SHAPE_OPERATORS` without a floating-point output.

    Args:
        nodes: table of `assigned_nodes`.
        tensor_kinds: node -> whether it has a floating-point output, as far as the graph states it.
    """
    on_cpu = nodes[nodes["provider"] == "CPUExecutionProvider"]
    makes_floats = on_cpu["node"].map(lambda name: tensor_kinds.get(name, False)).astype(bool)
    return on_cpu[makes_floats | ~on_cpu["operator"].isin(SHAPE_OPERATORS)]


def floating_nodes(path) -> dict[str, bool]:
    """Node -> whether it has a floating-point output, by the types in the graph."""

    def floats(node) -> bool:
        return any(value.dtype is not None and value.dtype.is_floating_point() for value in node.outputs)

    return {node.name: floats(node) for node in onnx_ir.load(path).graph.all_nodes() if node.name}


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""Level of graph optimisation: none; constant folding and removal of dead nodes; also fusions; also memory layout."""


def choose_provider(provider: str) -> str:
    """`"cpu"` or `"cuda"` for a name or `"auto"`.

    Raises:
        WanlabError: an unknown provider, one that this ONNX Runtime does not have, or no GPU.
    """
    ort = require("onnxruntime", "onnxruntime-gpu")
    available = ort.get_available_providers()
    if provider == "auto":
        return "cuda" if torch.cuda.is_available() and PROVIDERS["cuda"] in available else "cpu"
    if provider not in PROVIDERS:
        raise WanlabError(
            f"unknown provider {provider!r}{did_you_mean(provider, PROVIDERS)};"
            f" give auto, {', '.join(PROVIDERS)}"
        )
    if PROVIDERS[provider] not in available:
        raise WanlabError(
            f"this onnxruntime has no {PROVIDERS[provider]}; add it with: pip install onnxruntime-gpu"
        )
    if provider == "cuda" and not torch.cuda.is_available():
        raise WanlabError("provider is cuda but PyTorch sees no GPU; use provider='cpu'")
    return provider


def open_session(
    path: Path,
    provider: str,
    *,
    threads: int,
    optimization: str,
    stream: int = 0,
    cuda_graph: bool = False,
    profile_prefix: str = "",
    formats: str = "",
    memory_pattern: bool = True,
) -> Any:
    """An `onnxruntime.InferenceSession` that records the provider of each node.

    Args:
        stream: `CUstream` handle for all of its work.
        profile_prefix: prefix of the file that `end_profiling` writes; empty for no profile.
        formats: formats of quantised layers in the graph's metadata: JSON, format -> layers.
        memory_pattern: whether a second run of the same sizes allocates its memory as one planned block.

    Raises:
        WanlabError: an option that does not exist, or a graph that cannot be loaded.
    """
    ort = require("onnxruntime", "onnxruntime-gpu")
    if optimization not in LEVELS:
        raise WanlabError(
            f"no graph optimisation {optimization!r}{did_you_mean(optimization, LEVELS)};"
            f" give {', '.join(LEVELS)}"
        )
    if threads < 1:
        raise WanlabError(f"threads is {threads}; give 1 or more")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = memory_pattern
    # Idle threads of one session would otherwise keep a core busy that the next session or torch needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Layers whose weights alone are quantised would otherwise get rounded inputs too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not fuses_codes(formats, provider):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3  # errors only; they are raised as exceptions too
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    providers: list[Any] = [PROVIDERS["cpu"]]
    if provider == "cuda":
        ort.set_default_logger_severity(3)
        ort.preload_dlls()  # CUDA and cuDNN libraries that were installed with torch
        settings = {
            "device_id": str(torch.cuda.current_device()),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": str(int(cuda_graph)),
            "use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32)),  # the same setting as PyTorch
        }
        if stream:
            settings["user_compute_stream"] = str(stream)
        providers.insert(0, (PROVIDERS["cuda"], settings))
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has one exception class per failure, without a common base
        raise WanlabError(f"ONNX Runtime cannot load {path.name}: {load_failure(error)}") from error
    if PROVIDERS[provider] not in session.get_providers():
        raise WanlabError(
            f"{PROVIDERS[provider]} did not load for {path.name} (it runs on"
            f" {', '.join(session.get_providers())}); check the CUDA and cuDNN versions or use provider='cpu'"
        )
    return session


def fuses_codes(formats: str, provider: str) -> bool:
    """Whether ONNX Runtime may replace Q/DQ around an operator by an operator on quantised values.

    Such operators accept integers only. On CUDA none of them quantises inputs: the rewriting would only leave biases in
    int32, which only the CPU can dequantise. Operators with quantised weights alone exist on both.
    """
    names = json.loads(formats or "{}")
    return not any("fp8" in name for name in names) and not (provider == "cuda" and "int8" in names)


def load_failure(error: Exception) -> str:
    """The message of ONNX Runtime, or the operator that it has no kernel for."""
    text = first_line(error, 1000)
    unset = re.search(r"Provider type for (\w+) node with name '([^']*)' is not set", text)
    absent = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", text)
    if match := unset or absent:
        return (
            f"it has no kernel for {match[1]} ({match[2]}) in the type that the graph computes in;"
            " export in float16 or float32"
        )
    return text


# Element types of ONNX Runtime, as named in its tensor types -> names in numpy and torch.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
}

UNCAPTURED = -1
"""Number of the captured graph of a run that neither captures nor replays."""


class OrtEngine(Engine):
    """One ONNX file in one ONNX Runtime session.

    On CUDA the session has its own stream. It waits for PyTorch's current stream before a run, and that stream waits for
    it after the run: inputs and outputs stay on the device, and the host does not wait.

    Attributes:
        name: `"onnxruntime-cpu"` or `"onnxruntime-cuda"`.
        path: the ONNX file.
        size_bytes: size of the file and its external data.
        load_ms: time from the file to a session that can run.
        provider: `"cpu"` or `"cuda"`.
        providers_used: execution providers that the session reports, in order of priority.
        threads: number of threads inside an operator on the CPU.
        optimization: level of graph optimisation, see `LEVELS`.
        inputs, outputs: name -> (dtype, shape); free axes of a shape are names.
        metadata: metadata of the file: model, component, wanlab_version.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        provider: str = "auto",
        threads: int | None = None,
        optimization: str = "all",
        cuda_graph: bool = False,
        allow_cpu_fallback: bool = False,
        memory_pattern: bool = True,
    ) -> None:
        """Open a session.

        Args:
            path: `.onnx` file.
            provider: `"cpu"`, `"cuda"`, or `"auto"`: CUDA when both PyTorch and ONNX Runtime have it.
            threads: number of CPU threads; None is `torch.get_num_threads()`, for fair comparisons.
            optimization: `"disabled"`, `"basic"`, `"extended"` or `"all"`.
            cuda_graph: whether calls from `bind` are captured as CUDA graphs; every node has to be on the GPU.
            allow_cpu_fallback: whether nodes that compute may run on the CPU in a CUDA session.
            memory_pattern: whether a second run of the same sizes allocates its memory as one planned block. The block is
                added to the memory of the first run, so large graphs need less without it, at the same speed.

        Raises:
            WanlabError: no such file, a graph that this ONNX Runtime cannot run, a provider that did not load, or nodes
                that fell back to the CPU.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise WanlabError(f"no ONNX file at {self.path}; make it with wanlab.export.export")
        self.provider = choose_provider(provider)
        self.name = f"onnxruntime-{self.provider}"
        self.threads = torch.get_num_threads() if threads is None else threads
        self.optimization, self.cuda_graph = optimization, cuda_graph
        self._stream = torch.cuda.Stream() if self.provider == "cuda" else None
        self._graphs = itertools.count(1)
        begin = time.perf_counter()
        self.session = open_session(
            self.path,
            self.provider,
            threads=self.threads,
            optimization=optimization,
            stream=self._stream.cuda_stream if self._stream else 0,
            cuda_graph=cuda_graph,
            formats=formats_of(self.path),
            memory_pattern=memory_pattern,
        )
        self.load_ms = (time.perf_counter() - begin) * 1e3
        self.providers_used = tuple(self.session.get_providers())
        if self.provider == "cuda" and not allow_cpu_fallback:
            self._refuse_fallback()
        self.size_bytes = file_bytes(self.path)
        for value in (*self.session.get_inputs(), *self.session.get_outputs()):
            if not value.type.startswith("tensor("):
                raise WanlabError(
                    f"{value.name!r} of {self.path.name} is {value.type}; only tensors are read"
                )
        self.inputs = {value.name: _type_of(value) for value in self.session.get_inputs()}
        self.outputs = {value.name: _type_of(value) for value in self.session.get_outputs()}
        self._in_numpy = all(
            hasattr(np, dtype) for dtype, _ in (*self.inputs.values(), *self.outputs.values())
        )
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def __repr__(self) -> str:
        return f"OrtEngine({self.path.name!r}, provider={self.provider!r}, threads={self.threads})"

    @property
    def device(self) -> torch.device:
        """Device of inputs and outputs."""
        return torch.device(self.provider, torch.cuda.current_device() if self.provider == "cuda" else None)

    def nodes_by_provider(self) -> pd.DataFrame:
        """Number of nodes by provider and operator, largest first: provider, operator, nodes."""
        counts = assigned_nodes(self.session).value_counts(["provider", "operator"])
        return counts.rename("nodes").reset_index()

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without copies: on the CPU arrays share memory with tensors; on CUDA all tensors stay on the device."""
        try:
            bound = self.provider == "cuda" or not self._in_numpy
            return self._run_bound(tensors) if bound else self._run_numpy(tensors)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise WanlabError(f"{self.path.name} failed on {shapes}: {first_line(error)}") from error

    def _check_capture(self, cuda_graph: bool) -> None:
        if cuda_graph != self.cuda_graph:
            setting = "with cuda_graph=True" if cuda_graph else "without cuda_graph"
            raise WanlabError(f"ONNX Runtime captures for a whole session; open {self.path.name} {setting}")

    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """With `cuda_graph`, which the session was opened with, the first call captures and later calls replay."""
        binding = self._binding(inputs, outputs)
        # A binding has only addresses: the tensors have to exist as long as the function.
        memory = (dict(inputs), dict(outputs))
        if self._stream is None or stream is None:

            def run(_memory=memory) -> None:
                self._run_binding(binding)

            return run
        # A captured graph uses fixed addresses, so every binding has its own graph.
        options = self._without_waiting(graph=next(self._graphs) if cuda_graph else UNCAPTURED)

        def enqueue(_memory=memory) -> None:
            self._stream.wait_stream(stream)
            self._run_binding(binding, options)
            stream.wait_stream(self._stream)

        return enqueue

    def profile(
        self, feeds: Mapping[str, torch.Tensor | np.ndarray], path: str | os.PathLike, runs: int = 3
    ) -> Path:
        """Write ONNX Runtime's profile of some runs, after one warm-up run, as JSON to `path`; `node_times` reads it.

        The runs use another session, so that this engine is not slowed.

        Returns:
            `path`.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="wanlab-profile-") as folder:
            profiled = copy.copy(self)
            profiled.session = open_session(
                self.path,
                self.provider,
                threads=self.threads,
                optimization=self.optimization,
                stream=self._stream.cuda_stream if self._stream else 0,
                profile_prefix=str(Path(folder) / "profile"),
                formats=self.metadata.get("wanlab_format", ""),
            )
            for _ in range(runs + 1):
                profiled.run(feeds)
            shutil.copyfile(profiled.session.end_profiling(), path)
        return path

    def _refuse_fallback(self) -> None:
        on_cpu = fallen_back(assigned_nodes(self.session), floating_nodes(self.path))
        if len(on_cpu):
            kinds = ", ".join(f"{count} {name}" for name, count in on_cpu["operator"].value_counts().items())
            raise WanlabError(
                f"{len(on_cpu)} nodes of {self.path.name} fell back to the CPU ({kinds}; the first is"
                f" {on_cpu['node'].iloc[0] or on_cpu['operator'].iloc[0]}); allow_cpu_fallback=True allows it"
            )

    def _run_numpy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = self.session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)}

    def _run_bound(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs and outputs stay on the device; dlpack converts the outputs to tensors without a copy."""
        binding = self._binding(tensors, None)
        if self._stream is None:
            self.session.run_with_iobinding(binding)
        else:
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            self.session.run_with_iobinding(binding, self._without_waiting())
            current.wait_stream(self._stream)
        return {
            name: torch.from_dlpack(value)
            for name, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }

    def _binding(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None):
        """Addresses of inputs and outputs of a run; without outputs ONNX Runtime allocates them on the device."""
        index = self.device.index or 0
        binding = self.session.io_binding()

        def place(tensor):
            return self.provider, index, _element_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr()

        for name in self.inputs:
            binding.bind_input(name, *place(inputs[name]))
        for name in self.outputs:
            if outputs is None:
                binding.bind_output(name, self.provider, index)
            else:
                binding.bind_output(name, *place(outputs[name]))
        return binding

    def _run_binding(self, binding, options=None) -> None:
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise WanlabError(
                f"{self.path.name} failed on the memory it was given: {first_line(error)}"
            ) from error

    def _without_waiting(self, graph: int = UNCAPTURED):
        """Options of a run for which the host does not wait; `graph` is the number of its captured graph."""
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options


def open_onnxruntime(
    model: Model | None, component: str | None, path: str | os.PathLike, **settings: Any
) -> OrtEngine:
    """A graph in a session, on the model's device if a model is given; the `open` of the kind `onnxruntime`."""
    if model is not None:
        settings = {"provider": model.device.type, **settings}
    check_graph(path, component)
    return OrtEngine(path, **settings)


def describe() -> dict[str, str]:
    """Version and providers of the installed ONNX Runtime, for `wanlab doctor`."""
    import onnxruntime

    built = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    usable = built if torch.cuda.is_available() else [name for name in built if name == "CPU"]
    version = onnxruntime.__version__
    return {"ONNX Runtime": f"{version}, runs on {', '.join(usable)} here; built with {', '.join(built)}"}


def load_engines(
    folder: str | os.PathLike,
    components: Iterable[str] | None = None,
    *,
    provider: str = "auto",
    threads: int | None = None,
    **options,
) -> dict[str, OrtEngine]:
    """Engines for the files that `export_all` wrote.

    Args:
        folder: folder with `<component>.onnx`.
        components: components to open; None takes every one in the folder.
        provider, threads, options: as in `OrtEngine`.

    Returns:
        Component -> engine, in the order of a generation.

    Raises:
        WanlabError: no file for a component, or none at all; a file that was changed, or is of another component.
    """
    folder = Path(folder)
    converted = [name for name in PARTS if (folder / f"{name}.onnx").is_file()]
    names = converted if components is None else list(components)
    for name in names:
        if name not in converted:
            raise WanlabError(
                f"no {name}.onnx in {folder}{did_you_mean(name, converted)}; "
                f"it has {', '.join(converted) or 'none'} (export it with wanlab.export.export_all)"
            )
    if not names:
        raise WanlabError(f"no converted component in {folder}; export them with wanlab.export.export_all")
    options |= {"provider": provider, "threads": threads}
    for name in names:
        check_graph(folder / f"{name}.onnx", name)
    return {name: OrtEngine(folder / f"{name}.onnx", **options) for name in names}


def _type_of(value) -> TensorType:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    # Of an axis that is free and has no name ONNX Runtime gives None.
    return _DTYPES.get(kind, kind), tuple("?" if axis is None else axis for axis in value.shape)


def _element_type(dtype) -> int:
    """ONNX element type of a dtype; a binding needs it for types that numpy does not have."""
    names = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    name = str(dtype).removeprefix("torch.")
    return int(getattr(onnx.TensorProto, names.get(name, name.upper())))


KERNEL = "_kernel_time"
"""Suffix of the events that time a node, after the node's name."""


def node_times(path: str | os.PathLike, *, warmup: int = 1) -> pd.DataFrame:
    """Time of every node in a profile that `OrtEngine.profile` wrote.

    The nodes are those after fusion, so there are fewer than in the file. On the CPU the time of a node is the time of its
    computation. On a GPU it is the time of the launch on the host: ONNX Runtime's CUDA build does not time kernels.

    Args:
        path: JSON of ONNX Runtime's profiler.
        warmup: number of first runs to leave out.

    Returns:
        node, operator, provider, runs, time_ms (median over the runs), share_percent of the sum; longest first.

    Raises:
        WanlabError: another kind of file, or no more runs in it than `warmup`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            events = json.load(file)
        rows = [
            {
                "node": event["name"].removesuffix(KERNEL),
                "operator": event["args"]["op_name"],
                "provider": event["args"]["provider"],
                "start": event["ts"],
                "time_ms": event["dur"] / 1e3,
            }
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WanlabError(
            f"{path} is no profile of ONNX Runtime ({error}); write one with OrtEngine.profile"
        ) from error
    frame = pd.DataFrame(rows, columns=["node", "operator", "provider", "start", "time_ms"])
    keys = ["node", "operator", "provider"]
    frame = frame.sort_values("start", kind="stable")
    timed = frame[frame.groupby(keys).cumcount() >= warmup]
    if timed.empty:
        raise WanlabError(f"{path} has no run of a node after {warmup} warm-up runs; profile more runs")
    nodes = timed.groupby(keys, as_index=False).agg(runs=("time_ms", "size"), time_ms=("time_ms", "median"))
    nodes["share_percent"] = 100 * nodes["time_ms"] / max(nodes["time_ms"].sum(), 1e-12)
    return nodes.sort_values("time_ms", ascending=False, ignore_index=True)


def profile_operators(engine: OrtEngine, folder: str | os.PathLike, **size: int | None) -> pd.DataFrame:
    """`operator_times` of an engine on random inputs; ONNX Runtime's profile stays in the folder."""
    path = Path(folder) / f"{Path(engine.path).stem}_profile.json"
    return operator_times(node_times(engine.profile(random_feeds(engine, shapes=None, **size), path)))


def operator_times(nodes: pd.DataFrame) -> pd.DataFrame:
    """`node_times` by operator.

    Returns:
        operator, provider, nodes, time_ms, share_percent; longest first.
    """
    operators = nodes.groupby(["operator", "provider"], as_index=False).agg(
        nodes=("node", "size"), time_ms=("time_ms", "sum"), share_percent=("share_percent", "sum")
    )
    return operators.sort_values("time_ms", ascending=False, ignore_index=True)
