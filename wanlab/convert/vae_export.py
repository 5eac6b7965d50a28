"""The two halves of the Wan VAE as pairs of ONNX graphs: one for the first chunk of a clip, one for all later ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from wanlab.convert.clip import ClipShape, default_shape, latent_size
from wanlab.convert.components import Recipe, recipe
from wanlab.convert.onnx import graph as graphs
from wanlab.convert.onnx.export import kept_report
from wanlab.convert.onnx.identity import component_key, trace_key, weights_key
from wanlab.convert.onnx.report import ExportReport, write_report
from wanlab.convert.onnx.settings import BFLOAT16_OPSET, DEFAULT_OPSET, chosen_dtype, chosen_opset
from wanlab.convert.onnx.trace import quiet, tied_reason
from wanlab.convert.onnx.twin import weightless
from wanlab.convert.onnx.vae_stream import decode_chunk, encode_chunk, exportable
from wanlab.convert.onnx.weights_file import WeightsFile
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import torch

PAST, PRESENT = "past.", "present."
STEPS = ("first", "next")


@dataclass(frozen=True)
class Half:
    """One half of the VAE as a stream.

    Attributes:
        component: wanlab's name of it. source: name of what it takes. result: name of what it gives.
        rows, columns: names of the axes 3 and 4 of the source.
        step: computes a chunk, see `wanlab.convert.onnx.vae_stream`.
    """

    component: str
    source: str
    result: str
    rows: str
    columns: str
    step: Callable

    def file(self, folder: str | os.PathLike, step: str) -> Path:
        """Where the graph of a step lies."""
        return Path(folder) / f"{self.component}.{step}.onnx"


HALVES = {
    "vae_decoder": Half("vae_decoder", "latents", "video", "latent_height", "latent_width", decode_chunk),
    "vae_encoder": Half("vae_encoder", "video", "moments", "height", "width", encode_chunk),
}


def export_streamed(
    model,
    folder: str | os.PathLike,
    component: str = "vae_decoder",
    *,
    opset: int | None = None,
    dtype: str | None = None,
    simplify: bool = True,
    dynamic: bool = True,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    external_data: bool | None = None,
    reuse: bool = True,
) -> tuple[ExportReport, ExportReport]:
    """Write one half of the VAE as `<component>.first.onnx` and `<component>.next.onnx`.

    The first takes the first frame and gives its result and `present.<module>`: the last frames that each causal
    convolution has seen. The second takes the next chunk and those as `past.<module>`. Run one after the other
    (`wanlab.convert.open_streamed`) they need the memory of one chunk, whatever the length of the clip.

    Args:
        model: from `wanlab.models.load`, the VAE eager.
        folder: is made.
        component: `"vae_decoder"` or `"vae_encoder"`.
        opset: 17 to 24; None takes 20, or 22 in bfloat16.
        dtype: `"float32"`, `"bfloat16"` or `"float16"` that the graphs compute in; None takes the network's.
        simplify: let onnxsim go over the graphs.
        dynamic: let batch, height and width vary; False fixes them.
        height, width, batch: of the example clip, in pixels; None takes the model's defaults, and for the batch 2, or 1
            when nothing may vary.
        external_data: weights in one file beside the graphs; None does so above 1.5 GiB.
        reuse: keep the files when they were made from the same weights, settings and versions.

    Returns:
        A report for each graph, as `wanlab.convert.export` gives it.

    Raises:
        WanlabError: no such half, a VAE that is not Wan's, an illegal size, dtype or opset.
    """
    half = half_of(component)
    plan = recipe(model, component)
    shape = default_shape(model, batch=batch or (2 if dynamic else 1), height=height, width=width)
    latent_size(model, shape)  # refuses an illegal size
    kind = chosen_dtype(dtype, plan.network.dtype)
    if opset is None:  # not 23: the one head of the VAE's attention is too wide for fused kernels
        opset = BFLOAT16_OPSET if str(kind) == "torch.bfloat16" else DEFAULT_OPSET
    opset = chosen_opset(opset, str(kind))
    weights = weights_key(plan.network)
    job = _Job(model, plan, half, Path(folder), shape, kind, opset, dynamic, simplify, external_data, weights)
    return job.export("first", reuse), job.export("next", reuse)


def half_of(component: str) -> Half:
    """The stream of a component.

    Raises:
        WanlabError: it is no half of a VAE.
    """
    if component not in HALVES:
        raise WanlabError(
            f"{component!r} is not streamed{did_you_mean(component, HALVES)}; give {' or '.join(HALVES)}"
        )
    return HALVES[component]


@dataclass(frozen=True, eq=False)
class _Job:
    """What both graphs of a half are made from."""

    model: Any
    plan: Recipe
    half: Half
    folder: Path
    shape: ClipShape
    dtype: torch.dtype
    opset: int
    dynamic: bool
    simplify: bool
    external_data: bool | None
    weights: str

    def export(self, step: str, reuse: bool) -> ExportReport:
        """Write one graph and its report, or find them there."""
        begin = time.perf_counter()
        source, path = self.half.source, self.half.file(self.folder, step)
        key = self._key(step)
        if reuse and (kept := kept_report(path, key)) is not None:
            return replace(kept, cached=True, time_ms=(time.perf_counter() - begin) * 1e3)
        program, axes, ranges, notes = self._trace(step)
        kind = str(self.dtype).removeprefix("torch.")
        file = self.folder / f"{self.half.component}.{kind}.{self.weights[:8]}.weights"
        finished = graphs.finish(
            program,
            self.plan.network,
            path,
            axis_names={source: axes},
            simplify=self.simplify,
            weights=WeightsFile(file, self.weights),
            external_data=self.external_data,
            stored=self.dtype,
            metadata=self._metadata(step),
        )
        free, sizes = finished.free_axes[source], finished.sizes[source]
        report = ExportReport(
            path=str(path),
            component=f"{self.half.component}.{step}",
            key=key,
            opset=self.opset,
            nodes_before=finished.nodes_before,
            nodes_after=finished.nodes_after,
            operators=finished.operators,
            dtype=kind,
            stored_dtype=kind,
            forms="friendly",
            dynamic_axes={source: {axis: name for axis, name in axes.items() if axis in free}},
            fixed_axes={source: fixed} if (fixed := {a: sizes[a] for a in axes if a not in free}) else {},
            ranges=ranges,
            shape=self.shape,
            size_bytes=finished.size_bytes,
            time_ms=(time.perf_counter() - begin) * 1e3,
            weights_file=finished.weights_file,
            weights_written_bytes=finished.weights_written_bytes,
            simplified=finished.simplified,
            notes=(*notes, *finished.notes),
        )
        write_report(report)
        return report

    def _key(self, step: str) -> str:
        form = SimpleNamespace(network=self.plan.network, inputs=self.half.source, output=self.half.result)
        settings = {"opset": self.opset, "dynamic": self.dynamic, "shape": asdict(self.shape)}
        tracing = trace_key(form, settings | {"dtype": str(self.dtype)})
        how = {"simplify": self.simplify, "external_data": self.external_data}
        return component_key(f"{self.half.component}.{step}", tracing, self.weights, how)

    def _metadata(self, step: str) -> dict[str, str]:
        from wanlab import __version__

        return {
            "wanlab_version": __version__,
            "model": self.model.spec.name,
            "component": self.half.component,
            "shape": json.dumps(asdict(self.shape)),
            "step": step,
            "weights": self.weights,
        }

    def _trace(self, step: str):
        """The ONNX program of a step; names of the free axes of its source, their ranges, and notes."""
        import torch

        half = self.half
        twin, mode = weightless(self.plan.network, self.dtype)
        period = twin.config.scale_factor_temporal
        plan = recipe(self.model, half.component, network=twin)
        (example,) = plan.inputs_for(replace(self.shape, frames=1 + period), torch.Generator().manual_seed(0))
        frames = period if (step, half.source) == ("next", "video") else 1
        source = mode.from_tensor(example[:, :, :frames].contiguous())

        class Traced(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = twin

            def forward(self, *inputs):
                caches = dict(zip(names, inputs[1:], strict=True)) if step == "next" else None
                result, present = half.step(self.network, inputs[0], caches)
                return result, *present.values()

        with torch.no_grad(), exportable(twin), quiet():
            with mode:  # names and sizes of the caches, from a first chunk that costs nothing
                _, caches = half.step(twin, source[:, :, :1], None)
            names = list(caches)
            inputs = (source, *caches.values()) if step == "next" else (source,)
            axes = {0: "batch", 3: half.rows, 4: half.columns} if self.dynamic else {}
            # Rows of the source for one row of latents.
            scale = twin.config.scale_factor_spatial if half.source == "video" else 1
            dims, ranges = _dimensions(inputs, axes, scale) if self.dynamic else (None, {})
            notes: tuple[str, ...] = ()
            module = Traced().eval()
            try:
                program = torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)
            except torch._dynamo.exc.UserError as error:
                # A network that ties a size down: fixed sizes, and the report says so.
                notes, ranges = (f"tracing tied sizes down: {tied_reason(error)}",), {}
                program = torch.export.export(module, inputs, strict=False)
            exported = torch.onnx.export(
                program,
                (),
                None,
                input_names=[half.source, *(f"{PAST}{name}" for name in names[: len(inputs) - 1])],
                output_names=[half.result, *(f"{PRESENT}{name}" for name in names)],
                opset_version=self.opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        return exported, axes, ranges, notes


def _dimensions(inputs: tuple, axes: dict[int, str], scale: int) -> tuple[dict, dict[str, str]]:
    """Free axes as `torch.export` takes them: the source and every cache are multiples of the rows of latents."""
    from torch.export import Dim

    batch = Dim("batch", min=1, max=64)
    units = {axis: Dim(name, min=2, max=512) for axis, name in ((3, "rows"), (4, "columns"))}

    def free(tensor) -> dict:
        times = {axis: tensor.shape[axis] * scale // inputs[0].shape[axis] for axis in units}
        return {0: batch} | {axis: units[axis] * k if k > 1 else units[axis] for axis, k in times.items()}

    ranges = {axes[0]: "batch = 1 to 64"}
    for axis, unit in units.items():
        times = f"{scale}*{unit.__name__}, " if scale > 1 else ""
        ranges[axes[axis]] = f"{times}{unit.__name__} = 2 to 512"
    return {"inputs": tuple(free(tensor) for tensor in inputs)}, ranges
