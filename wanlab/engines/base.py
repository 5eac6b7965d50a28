"""The base class of every engine, which runs one component with named tensors, and of its build information."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.manifest import Manifest, file_damage

TensorType = tuple[str, tuple[int | str, ...]]
"""dtype as torch names it, and shape. A free axis is given by its name; an empty shape is unknown before a run."""


class EngineBuild(Manifest, frozen=True, kw_only=True):
    """Build information of an engine's file: the facts that every kind of engine that is built records beside the file.

    Attributes:
        path: path of the engine's file; this record is beside it as `<path>.json`.
        facts: what the file depends on, such as the graph, the settings and the version of the library; the file is used
            again while they stay the same.
        graph: path of the ONNX file, relative to the engine's file.
        graph_sha256: SHA-256 of the ONNX file and of its weights in other files.
        engine_sha256: SHA-256 of the engine's file.
        version: version of the library that built the engine; only the same version opens it.
        inputs, outputs: tensor name -> dtype and shape, in order.
        metadata: metadata of the graph: model, component, wanlab_version, shape.
        size_bytes: size of the engine's file.
    """

    KIND: ClassVar[str] = "build information"
    NONE: ClassVar[str] = (
        "{name} has no build information {file} beside it, so nothing says what it was built from; {again}"
    )

    graph: str
    graph_sha256: str
    engine_sha256: str
    version: str
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    metadata: dict[str, str]
    size_bytes: int

    def damage(self) -> str:
        return file_damage(Path(self.path), self.engine_sha256, self.size_bytes)

    def check_file(self, again: str) -> None:
        """Refuse a file whose bytes differ from those that were built.

        Args:
            again: how to build it again, for the message.

        Raises:
            WanlabError: the file is gone or was changed.
        """
        if self.damage():
            raise WanlabError(
                f"{Path(self.path).name} is not the file that its build information was written for (its bytes"
                f" differ); {again}"
            )


class Engine(ABC):
    """One component, ready to run.

    `run` and `bind` check names, dtypes, shapes and memory for every engine; a subclass implements `_run` and `_bind`,
    which get only tensors that passed the checks.

    Attributes:
        name: kind of the engine and where it computes, e.g. `"eager"`, `"compiled"`, `"onnxruntime-cuda"`, `"tensorrt"`,
            `"tvm-llvm"`.
        device: device of its inputs and outputs.
        inputs, outputs: tensor name -> type, in the order of the network's arguments.
        metadata: `component`, `model` and other facts, as far as they are known.
        size_bytes: size of its files, or of its weights where there is no file.
        load_ms: time from the files to an engine that can run.
        build_ms: time of building its files; None where nothing is built.
        path: its file; None without one.
        alignment: number of bytes that divides the addresses of its inputs and outputs.
        checks_output_dtypes: whether `bind` checks dtypes of outputs; False where they are known only after a run.
        takes_shapes: name, in messages, of what fixes the shapes.
    """

    alignment: ClassVar[int] = 1
    checks_output_dtypes: ClassVar[bool] = True
    takes_shapes: ClassVar[str] = "the graph"

    name: str
    device: torch.device
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    metadata: Mapping[str, str]
    size_bytes: int
    load_ms: float
    build_ms: float | None = None
    path: Path | None = None

    @property
    def label(self) -> str:
        """Its name in messages: the name of its file, or its name and component."""
        return self.path.name if self.path else f"{self.name} {self.metadata.get('component', '')}".strip()

    def run(
        self, feeds: Mapping[str, torch.Tensor | np.ndarray]
    ) -> dict[str, torch.Tensor] | dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: input name -> tensor or array; cast and moved to the engine's dtype and device where they differ.

        Returns:
            Output name -> new tensor on `device`, or numpy array when all feeds are numpy arrays.

        Raises:
            WanlabError: an unknown or missing input, or a shape that the engine does not accept.
        """
        self._check_names(feeds)
        as_numpy = bool(feeds) and not any(isinstance(value, torch.Tensor) for value in feeds.values())
        tensors = {}
        for name, (dtype, _) in self.inputs.items():
            tensor = torch.as_tensor(feeds[name]).detach()
            self._check_shape(name, tuple(tensor.shape))
            tensor = tensor.to(self.device, getattr(torch, dtype)).contiguous()
            tensors[name] = tensor if tensor.data_ptr() % self.alignment == 0 else tensor.clone()
        outputs = self._run(tensors)
        return {name: value.cpu().numpy() for name, value in outputs.items()} if as_numpy else outputs

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        *,
        stream: int | None = None,
        cuda_graph: bool = False,
    ) -> Callable[[], None]:
        """A function that runs the engine once on these tensors each time it is called.

        On a GPU it enqueues the work on `stream` (a `CUstream` handle) and returns at once; on the CPU it returns
        when the outputs are written. Nothing is copied between host and device.

        Args:
            inputs, outputs: tensor name -> tensor on `device`, contiguous, of the engine's dtype.
            stream: handle of the stream; None is the current stream of PyTorch.
            cuda_graph: whether to capture the work as a CUDA graph once and replay it.

        Raises:
            WanlabError: a missing or unsuitable tensor, or an engine that cannot be captured.
        """
        self._check_capture(cuda_graph)
        self._check_memory("input", self.inputs, inputs)
        self._check_memory("output", self.outputs, outputs, dtypes=self.checks_output_dtypes)
        for name in self.inputs:
            self._check_shape(name, tuple(inputs[name].shape))
        for name, (_, shape) in self.outputs.items():
            actual = tuple(outputs[name].shape)
            if shape and not fits(shape, actual):
                raise WanlabError(
                    f"output {name!r} of {self.label} is {spell_shape(shape)};"
                    f" memory for {list(actual)} was given"
                )
        on_stream = stream_of(stream, self.device) if self.device.type == "cuda" else None
        return self._bind(inputs, outputs, on_stream, cuda_graph)

    @abstractmethod
    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute; `tensors` are the inputs in order, on `device`, contiguous, of the right dtypes and shapes."""

    @abstractmethod
    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """The function that `bind` returns, for tensors that passed its checks; `stream` is None on the CPU only."""

    def _check_capture(self, cuda_graph: bool) -> None:
        """Refuse `cuda_graph` where the engine cannot be captured; by default on the CPU."""
        if cuda_graph and self.device.type != "cuda":
            raise WanlabError(f"{self.name} runs on the CPU, which has no CUDA graphs; leave cuda_graph out")

    def _check_names(self, feeds: Mapping) -> None:
        for name in feeds:
            if name not in self.inputs:
                raise WanlabError(
                    f"{self.label} has no input {name!r}{did_you_mean(name, self.inputs)};"
                    f" it takes {', '.join(map(repr, self.inputs))}; {', '.join(feeds)} was given"
                )
        if missing := [name for name in self.inputs if name not in feeds]:
            raise WanlabError(f"{self.label} misses input {', '.join(map(repr, missing))}")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a shape of an input that the engine does not accept."""
        if not fits(self.inputs[name][1], shape):
            raise WanlabError(
                f"input {name!r} of {self.label} is {list(shape)},"
                f" {self.takes_shapes} takes {spell_shape(self.inputs[name][1])};"
                " give that shape or export again for yours"
            )

    def _check_memory(
        self,
        what: str,
        types: Mapping[str, TensorType],
        tensors: Mapping[str, torch.Tensor],
        *,
        dtypes: bool = True,
    ) -> None:
        """Refuse tensors that are missing, unknown, of another dtype or device, not contiguous or not aligned.

        Args:
            what: `"input"` or `"output"`, for messages.
        """
        for name in tensors:
            if name not in types:
                raise WanlabError(
                    f"{self.label} has no {what} {name!r}{did_you_mean(name, types)};"
                    f" it has {', '.join(types)}"
                )
        for name, (dtype, _) in types.items():
            if name not in tensors:
                raise WanlabError(
                    f"{self.label} misses {what} {name!r}: it needs memory for {name!r};"
                    f" {', '.join(tensors) or 'none'} was given"
                )
            tensor = tensors[name]
            same = not dtypes or str(tensor.dtype) == f"torch.{dtype}"
            if not same or tensor.device.type != self.device.type:
                raise WanlabError(
                    f"{name!r} of {self.label} is {dtype} on {self.device.type};"
                    f" {tensor.dtype} on {tensor.device} was given"
                )
            if not tensor.is_contiguous():
                raise WanlabError(f"{name!r} is not contiguous; give tensor.contiguous()")
            if tensor.data_ptr() % self.alignment:
                raise WanlabError(
                    f"{name!r} of {self.label} has to lie at a multiple of {self.alignment} bytes;"
                    " give tensor.clone()"
                )


def stream_of(handle: int | None, device: torch.device) -> torch.cuda.Stream:
    """The stream of a `CUstream` handle; None is the current stream of PyTorch on the device.

    Handle 0 is the default stream: `torch.cuda.ExternalStream(0)` would be another stream, of PyTorch's pool.
    """
    if handle is None:
        return torch.cuda.current_stream(device)
    return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)


def fits(declared: tuple[int | str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a shape agrees with a declared one, in which free axes are names."""
    return len(shape) == len(declared) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(declared, shape, strict=True)
    )


def spell_shape(shape: tuple[int | str, ...]) -> str:
    """A shape as text, such as `[batch, 36, 3]`."""
    return f"[{', '.join(map(str, shape))}]"
