"""PyTorch as an engine: a component of a loaded model, eager or compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.engines.base import Engine, TensorType
from wanlab.export.components import component_spec, default_shape
from wanlab.models.pipeline import Model
from wanlab.models.shapes import nearest_size
from wanlab.models.variants import compiled_copy

MODES = ("eager", "compiled")


class TorchEngine(Engine):
    """One component of a model, computed by PyTorch as the pipeline computes it.

    Attributes: as `wanlab.engines.base.Engine`. `load_ms` is the time of wrapping, without the load of the model.
    """

    checks_output_dtypes = False
    takes_shapes = "the network"

    def __init__(self, model: Model, component: str, *, mode: str = "eager") -> None:
        """Wrap a component.

        Args:
            model: a model from `wanlab.models.load` whose component is eager.
            mode: `"eager"`, or `"compiled"`: `torch.compile` of each transformer block, or of each half of a VAE, at the
                first run.

        Raises:
            WanlabError: unknown mode or component.
        """
        if mode not in MODES:
            raise WanlabError(f"no mode {mode!r}{did_you_mean(mode, MODES)}; give {' or '.join(MODES)}")
        begin = time.perf_counter()
        network = component_spec(model, component).network
        if mode == "compiled":
            network = compiled_copy(network)
        self._spec = component_spec(model, component, network=network)
        self.name = mode
        self.device, self.dtype = network.device, network.dtype
        self.size_bytes = sum(parameter.nbytes for parameter in network.parameters())
        self.metadata = {"component": component, "model": model.spec.name}
        if lora := model.spec.lora_identity(component):
            self.metadata["lora"] = lora
        self.inputs: dict[str, TensorType] = {}
        self._types(model)
        self._call = self._spec.reference
        self.load_ms = (time.perf_counter() - begin) * 1e3

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {self._spec.output: self._call(*tensors.values())}

    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """PyTorch allocates its own output, which is then copied on the device into `outputs`."""
        arguments = [inputs[name] for name in self.inputs]
        target = outputs[self._spec.output]

        @torch.no_grad()
        def call() -> None:
            output = self._call(*arguments)
            if output.shape != target.shape or output.dtype != target.dtype:  # a copy would broadcast or cast
                raise WanlabError(
                    f"{self.label} returns {list(output.shape)} in {output.dtype};"
                    f" memory for {list(target.shape)} in {target.dtype} was given"
                )
            target.copy_(output)

        if stream is None:
            return call
        if not cuda_graph:

            def enqueue() -> None:
                with torch.cuda.stream(stream):
                    call()

            return enqueue
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose and allocate on their first calls
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    def _types(self, model: Model) -> None:
        """Names, dtypes and free axes of inputs and output, from a small example."""
        usual, sized = model.spec.defaults, self._spec.sized
        size = (1, 1, 1 + model.spec.temporal_factor) if sized else (usual.height, usual.width, usual.frames)
        height, width, frames = nearest_size(model.spec, *size)
        small = default_shape(model, batch=1, height=height, width=width, frames=frames)
        example = self._spec.inputs_for(small, torch.Generator().manual_seed(0))
        for (name, axes), tensor in zip(self._spec.inputs.items(), example, strict=True):
            # A graph of this network has fixed sizes; PyTorch itself takes any.
            axes = axes if sized else {axis: f"{name}_{axis}" for axis in range(tensor.ndim)}
            shape = tuple(axes.get(axis, size) for axis, size in enumerate(tensor.shape))
            self.inputs[name] = (str(tensor.dtype).removeprefix("torch."), shape)
        self.outputs = {self._spec.output: (str(self.dtype).removeprefix("torch."), ())}


def open_eager(model: Model, component: str, path: None = None) -> TorchEngine:
    """A component as the pipeline computes it; the `open` of the kind `eager`."""
    return TorchEngine(model, component)


def open_compiled(model: Model, component: str, path: None = None) -> TorchEngine:
    """A component with its large parts compiled at the first run; the `open` of the kind `compiled`."""
    return TorchEngine(model, component, mode="compiled")
