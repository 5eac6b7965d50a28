"""A library that TVM built, as an engine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from wanlab.core.digests import graph_sha256
from wanlab.core.errors import WanlabError, first_line
from wanlab.engines.base import Engine
from wanlab.engines.tvm.build import TvmBuildInfo, load_tvm, target_of
from wanlab.models.pipeline import Model

_pool = threading.local()  # TVM has a pool of threads per calling thread


class TvmEngine(Engine):
    """One component, compiled by TVM.

    Attributes:
        path: path of the library.
        info: its build information.
        name: `"tvm-llvm"` or `"tvm-cuda"`.
        threads: number of CPU threads of one run.
        inputs, outputs, device: see `wanlab.engines.base.Engine`.
        metadata: metadata of the graph: model, component, wanlab_version.
        size_bytes: size of the library with its weights.
        load_ms: time from the library to an engine that can run, without the checks.
    """

    alignment = 64  # compiled code reads whole vectors
    takes_shapes = "the library"

    def __init__(
        self,
        library: str | os.PathLike,
        *,
        graph: str | os.PathLike | None = None,
        threads: int | None = None,
    ) -> None:
        """Open a library of `build_tvm`, after checking that it is current.

        Args:
            library: path of the `.so`.
            graph: ONNX file from which it has to be built; None takes the file that the build information names, if it
                exists.
            threads: number of CPU threads; None is `torch.get_num_threads()`, for fair comparisons.

        Raises:
            WanlabError: TVM is missing, there is no library or no build information, or the library is out of
                date: changed, or built from another graph, by another TVM, or for another processor or GPU.
        """
        tvm = load_tvm()
        self.path = Path(library)
        if not self.path.is_file():
            raise WanlabError(f"no TVM library at {self.path}; build it with wanlab.engines.build_tvm")
        self.info = TvmBuildInfo.read(self.path)
        self._check(tvm, graph)
        kind = self.info.target["kind"]
        self.name = f"tvm-{kind}"
        self.threads = torch.get_num_threads() if threads is None else threads
        most = int(os.environ.get("TVM_NUM_THREADS") or 1)
        if kind == "llvm" and not 1 <= self.threads <= most:
            raise WanlabError(f"threads is {self.threads}; give 1 to {most} (TVM_NUM_THREADS sets the most)")
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        )
        self.inputs, self.outputs = self.info.inputs, self.info.outputs
        self.metadata, self.size_bytes = self.info.metadata, self.info.size_bytes
        self.build_ms = self.info.build_ms
        self._tvm = tvm
        self._place = tvm.cuda(self.device.index) if kind == "cuda" else tvm.cpu()
        begin = time.perf_counter()
        try:
            module = tvm.runtime.load_module(str(self.path.resolve()))
            self._machine = tvm.runtime.vm.VirtualMachine(module, self._place)
            self._main = self._machine["main"]
        except Exception as error:
            raise WanlabError(f"TVM cannot load {self.path.name}: {first_line(error)}") from error
        self.load_ms = (time.perf_counter() - begin) * 1e3

    def __repr__(self) -> str:
        return f"TvmEngine({self.path.name!r}, name={self.name!r}, threads={self.threads})"

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.outputs, self._invoke(self._arguments(tensors), None), strict=True))

    def _check_capture(self, cuda_graph: bool) -> None:
        if cuda_graph:
            raise WanlabError(
                "a TVM engine cannot be captured into a CUDA graph; bind it with cuda_graph=False"
            )

    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """TVM allocates its own output, which is then copied on the device into `outputs`."""
        arguments = self._arguments(inputs)
        targets = [outputs[name] for name in self.outputs]

        def call() -> None:
            self._invoke(arguments, stream, targets)

        return call

    def _invoke(
        self, arguments: list, stream: torch.cuda.Stream | None, targets: list | None = None
    ) -> list[torch.Tensor]:
        """Run; return the outputs as tensors without a copy, or copy them into `targets` in order."""
        on_gpu = self.device.type == "cuda"
        on_stream: AbstractContextManager[Any] = nullcontext()
        if on_gpu:
            import tvm_ffi

            stream = stream or torch.cuda.current_stream(self.device)
            on_stream = tvm_ffi.use_raw_stream(self._place, stream.cuda_stream)
        elif getattr(_pool, "threads", None) != self.threads:
            self._tvm.get_global_func("runtime.config_threadpool")(1, self.threads)
            _pool.threads = self.threads
        try:
            with on_stream:
                results = self._main(*arguments)
        except Exception as error:
            raise WanlabError(f"{self.path.name} failed: {first_line(error)}") from error
        results = [results] if hasattr(results, "shape") else list(results)
        tensors = [torch.from_dlpack(value) for value in results]
        if targets is None:
            return tensors
        with torch.cuda.stream(stream) if on_gpu else nullcontext():
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
        return targets

    def _arguments(self, tensors: Mapping[str, torch.Tensor]) -> list:
        return [self._tvm.runtime.from_dlpack(tensors[name].detach()) for name in self.inputs]

    def _check(self, tvm, graph: str | os.PathLike | None) -> None:
        """Refuse a library that is out of date or built for another machine; the message says what differs."""
        known, again = self.info, self.info.AGAIN
        name = self.path.name
        known.check_file(again)
        if tvm.__version__ != known.version:
            raise WanlabError(f"{name} was built by TVM {known.version}, this is {tvm.__version__}; {again}")
        on_gpu = known.target["kind"] == "cuda"
        if on_gpu and not (tvm.runtime.enabled("cuda") and tvm.cuda(0).exist):
            raise WanlabError(
                f"{name} was built for {known.target['arch']}; TVM sees no NVIDIA GPU here to run it on"
            )
        here = target_of(tvm, "cuda" if on_gpu else "cpu")
        if here != known.target:
            built_for, machine = (t.get("mcpu") or t.get("arch") for t in (known.target, here))
            raise WanlabError(f"{name} was built for {built_for}, this machine is {machine}; {again} here")
        source = Path(graph) if graph is not None else self.path.with_name(known.graph)
        if graph is not None and not source.is_file():
            raise WanlabError(f"no ONNX file at {source} to compare {name} with")
        if source.is_file() and graph_sha256(source) != known.graph_sha256:
            raise WanlabError(f"{name} was not built from this {source.name}, whose content differs; {again}")


def open_tvm(
    model: Model | None, component: str | None, path: str | os.PathLike, **settings: Any
) -> TvmEngine:
    """A library; the `open` of the kind `tvm`."""
    return TvmEngine(path, **settings)
