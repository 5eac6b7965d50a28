"""Buffers of an engine: page-locked memory on the host, memory on the device, a stream and its events.

PyCUDA or PyTorch can own them. Engines get tensors and a stream handle in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from wanlab.core.errors import WanlabError, did_you_mean, require

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> PyTorch's name of the dtype, and shape."""


class TorchBuffers:
    """Page-locked and device memory, stream and events of PyTorch.

    Attributes:
        inputs, outputs: tensors on the device, by name.
        stream: `CUstream` handle that copies and events use, and that the engine must use.
    """

    backend = "torch"

    def __init__(self, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.stream: int = self._stream.cuda_stream
        self._host_inputs = {name: tensor.cpu().contiguous().pin_memory() for name, tensor in feeds.items()}
        self.inputs = {
            name: torch.empty_like(host, device=device) for name, host in self._host_inputs.items()
        }
        self.outputs = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, shape) in outputs.items()
        }
        self._host_outputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            for name, tensor in self.outputs.items()
        }
        torch.cuda.synchronize(device)

    def upload(self) -> None:
        """Copy the inputs from the host, on the stream."""
        self._copy(self._host_inputs, self.inputs)

    def download(self) -> None:
        """Copy the outputs to the host, on the stream."""
        self._copy(self.outputs, self._host_outputs)

    def _copy(self, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            for name, tensor in source.items():
                target[name].copy_(tensor, non_blocking=True)

    def mark(self) -> Any:
        """Record an event on the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    @staticmethod
    def elapsed_ms(first: Any, last: Any) -> float:
        """Device time between two events; waits for the second."""
        last.synchronize()
        return first.elapsed_time(last)

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs on the host after the last finished download."""
        return dict(self._host_outputs)

    def close(self) -> None:
        """Free all memory."""
        for tensors in (self.inputs, self.outputs, self._host_inputs, self._host_outputs):
            tensors.clear()


class PycudaBuffers:
    """As `TorchBuffers`, with memory, stream, copies and events of PyCUDA, in the context that PyTorch uses."""

    backend = "pycuda"

    def __init__(self, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device) -> None:
        driver = require("pycuda.driver", "pycuda")
        torch.cuda.synchronize(device)  # creates the primary context, which both libraries then share
        driver.init()
        self._driver = driver
        self._context = driver.Device(device.index or 0).retain_primary_context()
        self._context.push()
        try:
            self._stream = driver.Stream()
            self.stream: int = self._stream.handle
            self._held: list[tuple[Any, Any]] = []  # device allocation, host bytes
            self._sources: dict[str, Any] = {}
            self._targets: dict[str, Any] = {}
            self.inputs = {name: self._input(name, tensor.cpu(), device) for name, tensor in feeds.items()}
            self.outputs = {
                name: self._tensor(name, self._targets, dtype, shape, device)
                for name, (dtype, shape) in outputs.items()
            }
        finally:
            self._context.pop()

    def upload(self) -> None:
        """Copy the inputs from the host, on the stream."""
        self._context.push()
        for memory, host in self._sources.values():
            self._driver.memcpy_htod_async(memory, host, self._stream)
        self._context.pop()

    def download(self) -> None:
        """Copy the outputs to the host, on the stream."""
        self._context.push()
        for memory, host in self._targets.values():
            self._driver.memcpy_dtoh_async(host, memory, self._stream)
        self._context.pop()

    def mark(self) -> Any:
        """Record an event on the stream."""
        self._context.push()
        event = self._driver.Event()
        event.record(self._stream)
        self._context.pop()
        return event

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Device time between two events; waits for the second."""
        self._context.push()
        last.synchronize()
        elapsed = first.time_till(last)
        self._context.pop()
        return elapsed

    def results(self) -> dict[str, torch.Tensor]:
        """The outputs on the host after the last finished download."""
        outputs = {}
        for name, (_, host) in self._targets.items():
            like = self.outputs[name]
            outputs[name] = torch.from_numpy(host.copy()).view(like.dtype).view(like.shape)
        return outputs

    def close(self) -> None:
        """Free all memory."""
        self.inputs.clear()
        self.outputs.clear()
        self._context.push()
        self._stream.synchronize()
        for memory, _ in (*self._sources.values(), *self._targets.values()):
            memory.free()
        self._sources.clear()
        self._targets.clear()
        self._stream = None  # while its context exists: without it a stream cannot be destroyed
        self._context.pop()
        self._context.detach()

    def _input(self, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        device_tensor = self._tensor(name, self._sources, dtype, tuple(tensor.shape), device)
        self._sources[name][1][:] = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return device_tensor

    def _tensor(self, name: str, places: dict, dtype: str, shape: tuple[int, ...], device) -> torch.Tensor:
        """Device memory as a tensor, without a copy, and page-locked memory of the same size."""
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        memory = self._driver.mem_alloc(max(size, 1))
        places[name] = (memory, self._driver.pagelocked_empty(size, np.uint8))
        return torch.as_tensor(_Bytes(int(memory), size), device=device).view(kind).view(shape)


class _Bytes:
    """Device memory in the CUDA array interface (version 3), as bytes, because the interface has no bfloat16."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


BACKENDS = {"pycuda": PycudaBuffers, "torch": TorchBuffers}


def buffers(backend: str, feeds: Mapping[str, torch.Tensor], outputs: Shapes, device: torch.device):
    """Buffers for one engine on a GPU.

    Args:
        backend: `"pycuda"`, `"torch"`, or `"auto"`: PyCUDA when it is installed.
        feeds: the inputs, in the dtypes of the engine.
        outputs: name -> dtype and shape.

    Raises:
        WanlabError: unknown backend, or `"pycuda"` when PyCUDA is not installed.
    """
    if backend == "auto":
        backend = "pycuda" if find_spec("pycuda") else "torch"
    if backend not in BACKENDS:
        raise WanlabError(
            f"no buffers of {backend!r}{did_you_mean(backend, BACKENDS)}; give auto, {', '.join(BACKENDS)}"
        )
    return BACKENDS[backend](feeds, outputs, device)
