"""ONNX Runtime as an engine: named tensors in, named tensors out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.components import PARTS
from wanlab.convert.onnx.graph import file_bytes
from wanlab.errors import WanlabError, did_you_mean, require

if TYPE_CHECKING:
    import numpy as np
    import torch

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
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


class OrtEngine:
    """One ONNX file in one ONNX Runtime session.

    Attributes:
        path: the file. size_bytes: it and its external data.
        load_ms: from the file to a session that can run.
        provider: `"cpu"` or `"cuda"`, what was asked for or chosen.
        providers_used: execution providers of the session, read back from it, first choice first.
        threads: threads inside an operator on the CPU.
        inputs, outputs: name -> (dtype, shape); free axes of a shape are names.
        metadata: what the exporter wrote into the file: model, component, wanlab_version.
    """

    def __init__(
        self, path: str | os.PathLike, *, provider: str = "auto", threads: int | None = None
    ) -> None:
        """Open a session with all graph optimisations on.

        Args:
            path: `.onnx` file.
            provider: `"cpu"`, `"cuda"`, or `"auto"`: CUDA when both PyTorch and ONNX Runtime have it.
            threads: of the CPU; None takes `torch.get_num_threads()`, for fair comparisons.

        Raises:
            WanlabError: no such file, not a graph this ONNX Runtime can run, or the provider did not load.
        """
        import torch

        ort = require("onnxruntime", "onnxruntime-gpu")
        self.path = Path(path)
        if not self.path.is_file():
            raise WanlabError(f"no ONNX file at {self.path}; make it with wanlab.convert.export")
        self.provider = _choose(ort, torch, provider)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise WanlabError(f"threads is {self.threads}; give 1 or more")
        if self.provider == "cuda":
            ort.preload_dlls()  # CUDA and cuDNN that came with torch
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Idle threads of one session would otherwise keep a core busy that the next session or torch needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors only; they come as exceptions as well
        wanted = [PROVIDERS[self.provider]]
        if self.provider == "cuda":
            wanted = [(PROVIDERS["cuda"], {"device_id": torch.cuda.current_device()}), PROVIDERS["cpu"]]
        begin = time.perf_counter()
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=wanted)
        except Exception as error:  # onnxruntime has one exception class per failure, without a common base
            raise WanlabError(f"ONNX Runtime cannot load {self.path.name}: {_first_line(error)}") from error
        self.load_ms = (time.perf_counter() - begin) * 1e3
        self.providers_used = tuple(self.session.get_providers())
        if PROVIDERS[self.provider] not in self.providers_used:
            raise WanlabError(
                f"{PROVIDERS[self.provider]} did not load for {self.path.name} (it runs on"
                f" {', '.join(self.providers_used)}); check the CUDA and cuDNN versions or use provider='cpu'"
            )
        self.size_bytes = file_bytes(self.path)
        self.inputs = {value.name: _type_of(value) for value in self.session.get_inputs()}
        self.outputs = {value.name: _type_of(value) for value in self.session.get_outputs()}
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def __repr__(self) -> str:
        return f"OrtEngine({self.path.name!r}, provider={self.provider!r}, threads={self.threads})"

    @property
    def device(self) -> torch.device:
        """Where outputs live."""
        import torch

        return torch.device(self.provider, torch.cuda.current_device() if self.provider == "cuda" else None)

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
            raise WanlabError(f"{self.path.name} failed on {shapes}: {_first_line(error)}") from error
        return {name: value.cpu().numpy() for name, value in outputs.items()} if as_numpy else outputs

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = self.inputs[name][1]
        fits = len(shape) == len(wanted) and all(
            isinstance(want, str) or want == size for want, size in zip(wanted, shape, strict=True)
        )
        if not fits:
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

        index = self.device.index or 0
        binding = self.session.io_binding()
        for name, tensor in tensors.items():
            kind, shape = _element_type(tensor.dtype), tuple(tensor.shape)
            binding.bind_input(name, self.provider, index, kind, shape, tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self.provider, index)
        if self.provider == "cuda":
            torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {
            name: torch.from_dlpack(value)
            for name, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }


def load_engines(
    folder: str | os.PathLike,
    components: Iterable[str] | None = None,
    *,
    provider: str = "auto",
    threads: int | None = None,
) -> dict[str, OrtEngine]:
    """Engines for the files that `export_all` wrote.

    Args:
        folder: holds `<component>.onnx`.
        components: which; None takes every one that is there.

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
    return {name: OrtEngine(folder / f"{name}.onnx", provider=provider, threads=threads) for name in wanted}


def _choose(ort, torch, provider: str) -> str:
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


def _type_of(value) -> tuple[str, tuple[int | str, ...]]:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(kind, kind), tuple(value.shape)


def _element_type(dtype) -> int:
    """ONNX element type, which is what a binding takes for types that numpy lacks."""
    import onnx

    names = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    name = str(dtype).removeprefix("torch.")
    return int(getattr(onnx.TensorProto, names.get(name, name.upper())))


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
