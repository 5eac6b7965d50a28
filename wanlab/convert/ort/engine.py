"""ONNX Runtime as an engine: named tensors in, named tensors out."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.binding import check_bound, fits
from wanlab.convert.components import PARTS
from wanlab.convert.onnx.graph import file_bytes, formats_of
from wanlab.convert.ort.nodes import assigned_nodes, fallen_back, floating_nodes
from wanlab.convert.ort.session import choose_provider, first_line, open_session
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

# Element types of ONNX Runtime, as named in its tensor types -> names in numpy and torch.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int64": "int64",
    "int32": "int32",
    "bool": "bool",
}

UNCAPTURED = -1
"""Number of the captured graph of a run that neither captures nor replays."""


class OrtEngine:
    """One ONNX file in one ONNX Runtime session.

    On CUDA the session has a stream of its own, which waits for PyTorch's current stream before a run and is waited
    for after it: inputs and outputs stay on the device, and the host waits for nothing.

    Attributes:
        name: `"onnxruntime-cpu"` or `"onnxruntime-cuda"`.
        path: the file. size_bytes: it and its external data.
        load_ms: from the file to a session that can run.
        provider: `"cpu"` or `"cuda"`, what was asked for or chosen.
        providers_used: execution providers of the session, read back from it, first choice first.
        threads: threads inside an operator on the CPU. optimization: of the graph, see `LEVELS`.
        inputs, outputs: name -> (dtype, shape); free axes of a shape are names.
        metadata: what the exporter wrote into the file: model, component, wanlab_version.
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
    ) -> None:
        """Open a session.

        Args:
            path: `.onnx` file.
            provider: `"cpu"`, `"cuda"`, or `"auto"`: CUDA when both PyTorch and ONNX Runtime have it.
            threads: of the CPU; None takes `torch.get_num_threads()`, for fair comparisons.
            optimization: `"disabled"`, `"basic"`, `"extended"` or `"all"`.
            cuda_graph: let the session capture and replay what `bind` gives it; every node must be on the GPU.
            allow_cpu_fallback: let nodes that compute run on the CPU in a CUDA session.

        Raises:
            WanlabError: no such file, not a graph this ONNX Runtime can run, the provider did not load, or nodes
                fell back to the CPU.
        """
        import torch

        self.path = Path(path)
        if not self.path.is_file():
            raise WanlabError(f"no ONNX file at {self.path}; make it with wanlab.convert.export")
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
        )
        self.load_ms = (time.perf_counter() - begin) * 1e3
        self.providers_used = tuple(self.session.get_providers())
        if self.provider == "cuda" and not allow_cpu_fallback:
            self._refuse_fallback()
        self.size_bytes = file_bytes(self.path)
        self.inputs = {value.name: _type_of(value) for value in self.session.get_inputs()}
        self.outputs = {value.name: _type_of(value) for value in self.session.get_outputs()}
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def __repr__(self) -> str:
        return f"OrtEngine({self.path.name!r}, provider={self.provider!r}, threads={self.threads})"

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        import torch

        return torch.device(self.provider, torch.cuda.current_device() if self.provider == "cuda" else None)

    def nodes_by_provider(self) -> pd.DataFrame:
        """Rows of provider, operator, nodes: where ONNX Runtime put what, most first."""
        counts = assigned_nodes(self.session).value_counts(["provider", "operator"])
        return counts.rename("nodes").reset_index()

    def run(self, feeds: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor | np.ndarray]:
        """Run the graph once.

        On the CPU tensors are handed over without a copy. On CUDA, inputs that are on the device stay
        there and outputs are made there.

        Args:
            feeds: every input by name; cast to the graph's dtype where it differs.

        Returns:
            Output name -> tensor on `device`, or numpy array when all feeds are numpy arrays.

        Raises:
            WanlabError: an unknown or missing input, or a shape that the graph does not take.
        """
        import torch

        for name in feeds:
            if name not in self.inputs:
                raise WanlabError(
                    f"{self.path.name} has no input {name!r}{did_you_mean(name, self.inputs)};"
                    f" it takes {', '.join(self.inputs)}"
                )
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise WanlabError(f"{self.path.name} misses input {', '.join(map(repr, missing))}")
        as_numpy = all(not isinstance(value, torch.Tensor) for value in feeds.values())
        tensors = {
            name: torch.as_tensor(feeds[name]).detach().to(self.device, getattr(torch, dtype)).contiguous()
            for name, (dtype, _) in self.inputs.items()
        }
        for name, tensor in tensors.items():
            self._check_shape(name, tuple(tensor.shape))
        try:
            outputs = self._run_bound(tensors) if self.provider == "cuda" else self._run_numpy(tensors)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise WanlabError(f"{self.path.name} failed on {shapes}: {first_line(error)}") from error
        return {name: value.cpu().numpy() for name, value in outputs.items()} if as_numpy else outputs

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        *,
        stream: int | None = None,
        cuda_graph: bool = False,
    ) -> Callable[[], None]:
        """A call that runs the graph over memory that stays where it is; see `Engine.bind`.

        With `cuda_graph`, for which the session has to be opened, the first call runs and captures, later ones replay.

        Raises:
            WanlabError: memory that does not fit, or a session that was opened for the other `cuda_graph`; from the
                call, what ONNX Runtime refuses.
        """
        import torch

        if cuda_graph != self.cuda_graph:
            wanted = "with cuda_graph=True" if cuda_graph else "without cuda_graph"
            raise WanlabError(f"ONNX Runtime captures for a whole session; open {self.path.name} {wanted}")
        for kinds, given in ((self.inputs, inputs), (self.outputs, outputs)):
            check_bound(self.path.name, kinds, given, self.provider)
        for name in self.inputs:
            self._check_shape(name, tuple(inputs[name].shape))
        binding = self._binding(inputs, outputs)
        # A binding holds addresses only: the tensors have to live as long as the call.
        memory = (dict(inputs), dict(outputs))
        if self._stream is None:

            def run(_memory=memory) -> None:
                self._run_binding(binding)

            return run
        caller = torch.cuda.current_stream() if stream is None else torch.cuda.ExternalStream(stream)
        # A captured graph replays its own addresses, so every binding has one of its own.
        options = self._without_waiting(graph=next(self._graphs) if cuda_graph else UNCAPTURED)

        def enqueue(_memory=memory) -> None:
            self._stream.wait_stream(caller)
            self._run_binding(binding, options)
            caller.wait_stream(self._stream)

        return enqueue

    def profile(
        self, feeds: Mapping[str, torch.Tensor | np.ndarray], path: str | os.PathLike, runs: int = 3
    ) -> Path:
        """Run in a session that profiles itself, after one warm-up; its own times of every node as JSON.

        Times of this engine's own session are not touched by it.

        Returns:
            `path`.
        """
        import tempfile

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="wanlab-profile-") as folder:
            twin = copy.copy(self)
            twin.session = open_session(
                self.path,
                self.provider,
                threads=self.threads,
                optimization=self.optimization,
                stream=self._stream.cuda_stream if self._stream else 0,
                profile_prefix=str(Path(folder) / "profile"),
                formats=self.metadata.get("wanlab_format", ""),
            )
            for _ in range(runs + 1):
                twin.run(feeds)
            shutil.copyfile(twin.session.end_profiling(), path)
        return path

    def _refuse_fallback(self) -> None:
        lost = fallen_back(assigned_nodes(self.session), floating_nodes(self.path))
        if len(lost):
            kinds = ", ".join(f"{count} {name}" for name, count in lost["operator"].value_counts().items())
            raise WanlabError(
                f"{len(lost)} nodes of {self.path.name} fell back to the CPU ({kinds}; the first is"
                f" {lost['node'].iloc[0] or lost['operator'].iloc[0]}): allow_cpu_fallback=True runs it all the same"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = self.inputs[name][1]
        if not fits(wanted, shape):
            raise WanlabError(
                f"input {name!r} of {self.path.name} is {list(shape)},"
                f" the graph takes [{', '.join(map(str, wanted))}];"
                " give that shape or export again for yours"
            )

    def _run_numpy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        arrays = self.session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)}

    def _run_bound(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs and outputs stay on the device; dlpack hands the outputs to torch without a copy."""
        import torch

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
        """Where a run reads and writes; without outputs ONNX Runtime makes them on the device."""
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
        """Options of a run that the host does not wait for; `graph` is the number of its captured graph."""
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options


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
        folder: holds `<component>.onnx`.
        components: which; None takes every one that is there.
        provider, threads, options: as in `OrtEngine`.

    Returns:
        Component -> engine, in the order a generation uses them.

    Raises:
        WanlabError: no file for a component, or none at all.
    """
    folder = Path(folder)
    there = [name for name in PARTS if (folder / f"{name}.onnx").is_file()]
    wanted = there if components is None else list(components)
    for name in wanted:
        if name not in there:
            raise WanlabError(
                f"no {name}.onnx in {folder}{did_you_mean(name, there)}; "
                f"there is {', '.join(there) or 'nothing'} (make it with wanlab.convert.export_all)"
            )
    if not wanted:
        raise WanlabError(f"no converted component in {folder}; make them with wanlab.convert.export_all")
    options |= {"provider": provider, "threads": threads}
    return {name: OrtEngine(folder / f"{name}.onnx", **options) for name in wanted}


def _type_of(value) -> tuple[str, tuple[int | str, ...]]:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(kind, kind), tuple(value.shape)


def _element_type(dtype) -> int:
    """ONNX element type, which is what a binding takes for types that numpy lacks."""
    import onnx

    names = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    name = str(dtype).removeprefix("torch.")
    return int(getattr(onnx.TensorProto, names.get(name, name.upper())))
