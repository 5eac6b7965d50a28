"""Exports the Wan VAE for processing in chunks: a pair of ONNX graphs, for the first chunk and for all later ones."""

from __future__ import annotations

import json
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    WanCausalConv3d,
    WanResample,
    patchify,
    unpatchify,
)
from msgspec import structs
from torch.export import Dim

from wanlab import __version__
from wanlab.core.digests import trace_facts, weights_key
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.manifest import key_of
from wanlab.export import graph as graphs
from wanlab.export.components import ClipShape, ComponentSpec, component_spec, default_shape, latent_size
from wanlab.export.export import ExportReport, write_report
from wanlab.export.friendly import exportable_operators
from wanlab.export.trace import (
    BFLOAT16_OPSET,
    DEFAULT_OPSET,
    Trace,
    chosen_dtype,
    chosen_opset,
    fixed_reason,
    kept_trace,
    meta_copy,
    quiet,
    weights_as_inputs,
)
from wanlab.export.weights import WeightsFile

Caches = Mapping[str, torch.Tensor]


def decode_chunk(vae, latents: torch.Tensor, past: Caches | None) -> tuple[torch.Tensor, dict]:
    """Frames of one latent frame.

    Args:
        vae: an `AutoencoderKLWan`.
        latents: `[B, C, 1, H', W']`, not normalised.
        past: module name -> frames before this chunk, from the previous chunk; None for the first chunk.

    Returns:
        `[B, 3, 4, s H', s W']` with s the VAE's spatial factor (one frame for the first chunk), clamped to [-1, 1] like
        `AutoencoderKLWan.decode`, and the caches for the next chunk, in the order of computation.
    """
    with _caching(vae.decoder, "decoder", past) as present:
        video = vae.decoder(vae.post_quant_conv(latents), first_chunk=past is None)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video.clamp(-1.0, 1.0), present


def encode_chunk(vae, video: torch.Tensor, past: Caches | None) -> tuple[torch.Tensor, dict]:
    """Moments of one latent frame.

    Args:
        vae: an `AutoencoderKLWan`.
        video: `[B, 3, 1, H, W]` for the first chunk, `[B, 3, 4, H, W]` after it, in [-1, 1].
        past: as in `decode_chunk`.

    Returns:
        `[B, 2 * C, 1, H', W']`, mean first, not normalised, and the caches for the next chunk.
    """
    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    with _caching(vae.encoder, "encoder", past) as present:
        moments = vae.encoder(video)
    return vae.quant_conv(moments), present


def decode_in_chunks(vae, latents: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.decode` with `decode_chunk`: `[B, C, T', H', W']` to `[B, 3, 1 + 4 (T' - 1), ...]`."""
    return _in_chunks(lambda chunk, past: decode_chunk(vae, chunk, past), latents, 1)


def encode_in_chunks(vae, video: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.encode` with `encode_chunk`: `[B, 3, 1 + 4 k, H, W]` to `[B, 2 * C, 1 + k, H', W']`."""
    return _in_chunks(lambda chunk, past: encode_chunk(vae, chunk, past), video, 4)


def _in_chunks(step: Callable, whole: torch.Tensor, later: int) -> torch.Tensor:
    past, results = None, []
    for chunk in (whole[:, :, :1], *whole[:, :, 1:].split(later, dim=2)):
        if chunk.shape[2]:
            result, past = step(chunk, past)
            results.append(result)
    return torch.cat(results, dim=2)


@contextmanager
def exportable(vae):
    """Like `wanlab.export.friendly.exportable_operators`, for chunks."""
    with exportable_operators(vae):
        for module in vae.modules():
            if type(module) is AvgDown3D:
                module.forward = types.MethodType(_average_down, module)
        yield vae


def _after_zeros(x: torch.Tensor, frames: int) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 0, frames, 0))


def _average_down(self, x: torch.Tensor) -> torch.Tensor:
    """`AvgDown3D.forward` for `[B, C, T, H, W]` with a known T: padded only if necessary."""
    t, s, group = self.factor_t, self.factor_s, self.group_size
    missing = -x.shape[2] % t
    padding = (0, 0, 0, 0, missing, 0)
    if group == s * s and t > 1:  # one frame of a channel becomes one output channel
        x = F.avg_pool3d(x, (1, s, s))
        # Padding after pooling, because ONNX Runtime fuses a padding into a pooling that does not allow its size.
        x = F.pad(x, padding) if missing else x
        return x.unflatten(2, (-1, t)).transpose(2, 3).flatten(1, 2)
    if missing:
        x = F.pad(x, padding)
    if group % self.factor == 0:  # whole windows of one or more channels
        x = F.avg_pool3d(x, (t, s, s)) if self.factor > 1 else x
        return x if group == self.factor else x.unflatten(1, (self.out_channels, -1)).mean(dim=2)
    return type(self).forward(self, x)


@contextmanager
def _caching(half, prefix: str, past: Caches | None):
    """Inside the block the modules of `half` read `past` and write the yielded dict."""
    present: dict[str, torch.Tensor] = {}
    changed = []

    def change(module, forward) -> None:
        module.forward = types.MethodType(forward, module)
        changed.append(module)

    for name, module in half.named_modules(prefix=prefix):
        if isinstance(module, WanResample):
            change(module, _resample(name, past, present))
        elif isinstance(module, WanCausalConv3d) and module._padding[4] > 0:
            change(module, _convolve(name, past, present))
    try:
        yield present
    finally:
        for module in changed:
            del module.forward


def _convolve(name: str, past: Caches | None, present: dict) -> Callable:
    """`WanCausalConv3d.forward` after the frames of its cache; `[B, C, T, H, W]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *sides, frames, _ = self._padding
        x = _after_zeros(x, frames) if past is None else torch.cat([past[name], x], dim=2)
        present[name] = x[:, :, -frames:].clone()  # not a view: it would keep the whole chunk
        return torch.nn.Conv3d.forward(self, F.pad(x, (*sides, 0, 0)))

    return forward


def _resample(name: str, past: Caches | None, present: dict) -> Callable:
    """`WanResample.forward` for `[B, C, T, H, W]`; the first frame skips the temporal convolution."""
    cache = f"{name}.time_conv"

    def forward(self, x: torch.Tensor, feat_cache=None, feat_idx=None) -> torch.Tensor:
        if self.mode == "upsample3d":
            if past is None:
                present[cache] = _after_zeros(x, 2)[:, :, :2].clone()
            else:
                pairs = self.time_conv(x).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T, H, W]
                # Frame t of the input becomes frames 2t and 2t + 1 of the output.
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        frames = x.shape[2]
        x = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)
        if self.mode == "downsample3d":
            present[cache] = x[:, :, -1:].clone()
            if past is not None:
                x = self.time_conv(torch.cat([past[cache], x], dim=2))
        return x

    return forward


PAST, PRESENT = "past.", "present."
STEPS = ("first", "next")


@dataclass(frozen=True)
class Half:
    """One half of the VAE as a stream.

    Attributes:
        component: name of the component.
        source: name of its input.
        result: name of its output.
        rows, columns: names of axes 3 and 4 of the source.
        step: function for one chunk, `decode_chunk` or `encode_chunk`.
    """

    component: str
    source: str
    result: str
    rows: str
    columns: str
    step: Callable

    def file(self, folder: str | os.PathLike, step: str) -> Path:
        """Path of the graph of a step."""
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

    The first reads the first frame and returns its result and `present.<module>`: the last input frames of each causal
    convolution. The second reads the next chunk and these frames as `past.<module>`. Run one after the other
    (`wanlab.engines.open_streamed_decoder`) they need the memory of one chunk for clips of any length.

    Args:
        model: a model from `wanlab.models.load` whose VAE is eager.
        folder: folder of the files; it is created.
        component: `"vae_decoder"` or `"vae_encoder"`.
        opset: 17 to 24; None is 20, or 22 in bfloat16.
        dtype: dtype of the computation, `"float32"`, `"bfloat16"` or `"float16"`; None is the network's.
        simplify: whether onnxsim simplifies the graphs.
        dynamic: whether batch, height and width may vary; False fixes them.
        height, width, batch: size of the example clip, in pixels; None is the model's default, and batch 2, or 1 when
            nothing may vary.
        external_data: whether weights are in one file beside the graphs; None decides by size: above 1.5 GiB.
        reuse: whether to keep files that were made from the same weights, settings and versions.

    Returns:
        A report for each graph, as from `wanlab.export.export`.

    Raises:
        WanlabError: another component, a VAE that is not Wan's, an illegal size, dtype or opset.
    """
    half = half_of(component)
    plan = component_spec(model, component)
    shape = default_shape(model, batch=batch or (2 if dynamic else 1), height=height, width=width)
    latent_size(model, shape)  # refuses an illegal size
    kind = chosen_dtype(dtype, plan.network.dtype)
    if opset is None:  # not 23, because the only head of the VAE's attention is too wide for fused kernels
        opset = BFLOAT16_OPSET if str(kind) == "torch.bfloat16" else DEFAULT_OPSET
    opset = chosen_opset(opset, str(kind))
    weights = weights_key(plan.network)
    job = _Job(model, plan, half, Path(folder), shape, kind, opset, dynamic, simplify, external_data, weights)
    return job.export("first", reuse), job.export("next", reuse)


def half_of(component: str) -> Half:
    """The `Half` of a component.

    Raises:
        WanlabError: the component is no half of a VAE.
    """
    if component not in HALVES:
        raise WanlabError(
            f"{component!r} is not streamed{did_you_mean(component, HALVES)}; give {' or '.join(HALVES)}"
        )
    return HALVES[component]


class _TracedStep(torch.nn.Module):
    """One step of a half of the VAE, with the source and the caches as inputs and outputs.

    Args:
        names: names of the caches among the inputs; None for the first step, which has none.
    """

    def __init__(self, network: torch.nn.Module, half: Half, names: Sequence[str] | None) -> None:
        super().__init__()
        self.network, self.half, self.names = network, half, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        caches = None if self.names is None else dict(zip(self.names, inputs[1:], strict=True))
        result, present = self.half.step(self.network, inputs[0], caches)
        return result, *present.values()


@dataclass(frozen=True, eq=False)
class _Job:
    """Sources and settings of both graphs of a half."""

    model: Any
    plan: ComponentSpec
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
        """Write one graph and its report, unless they are current."""
        begin = time.perf_counter()
        source, path = self.half.source, self.half.file(self.folder, step)
        facts = self._facts(step)
        if reuse and (known := ExportReport.current(path, facts)[0]) is not None:
            return structs.replace(known, time_ms=(time.perf_counter() - begin) * 1e3)
        key = key_of(trace_facts(self._form(), self._settings() | {"step": step}))
        traced, reused = kept_trace(self.plan.network, key, lambda: self._trace(step))
        axes = self._axes()
        kind = str(self.dtype).removeprefix("torch.")
        file = self.folder / f"{self.half.component}.{kind}.{self.weights[:8]}.weights"
        finished = graphs.finish(
            traced.model,
            self.plan.network,
            path,
            axis_names={source: axes},
            simplify=self.simplify,
            weights=WeightsFile(file, self.weights),
            external_data=self.external_data,
            stored=self.dtype,
            metadata=self._metadata(step),
        )
        return write_report(
            path,
            facts,
            traced,
            finished,
            {source: axes},
            component=f"{self.half.component}.{step}",
            opset=self.opset,
            dtype=kind,
            stored_dtype=kind,
            forms="friendly",
            shape=self.shape,
            time_ms=(time.perf_counter() - begin) * 1e3,
            trace_reused=reused,
        )

    def _facts(self, step: str) -> dict[str, Any]:
        finishing = {"simplify": self.simplify, "external_data": self.external_data}
        component = f"{self.half.component}.{step}"
        facts = {"component": component, "weights": self.weights, "finishing": finishing}
        return facts | trace_facts(self._form(), self._settings())

    def _form(self) -> SimpleNamespace:
        """The half in the form that `trace_facts` needs."""
        return SimpleNamespace(network=self.plan.network, inputs=self.half.source, output=self.half.result)

    def _settings(self) -> dict[str, Any]:
        """Settings of both traces."""
        settings = {"opset": self.opset, "dynamic": self.dynamic, "shape": asdict(self.shape)}
        return settings | {"dtype": str(self.dtype)}

    def _axes(self) -> dict[int, str]:
        """Names of the free axes of the source."""
        return {0: "batch", 3: self.half.rows, 4: self.half.columns} if self.dynamic else {}

    def _metadata(self, step: str) -> dict[str, str]:
        return {
            "wanlab_version": __version__,
            "model": self.model.spec.name,
            "component": self.half.component,
            "shape": json.dumps(asdict(self.shape)),
            "step": step,
            "weights": self.weights,
        }

    def _trace(self, step: str) -> Trace:
        """The traced graph of a step."""
        half = self.half
        network, mode = meta_copy(self.plan.network, self.dtype)
        period = network.config.scale_factor_temporal
        plan = component_spec(self.model, half.component, network=network)
        (example,) = plan.inputs_for(replace(self.shape, frames=1 + period), torch.Generator().manual_seed(0))
        frames = period if (step, half.source) == ("next", "video") else 1
        source = mode.from_tensor(example[:, :, :frames].contiguous())

        with torch.no_grad(), exportable(network), quiet():
            with mode:  # names and sizes of the caches, from a first chunk without computation
                _, caches = half.step(network, source[:, :, :1], None)
            names = list(caches)
            inputs = (source, *caches.values()) if step == "next" else (source,)
            # Rows of the source for one row of latents.
            scale = network.config.scale_factor_spatial if half.source == "video" else 1
            dims, ranges = _dimensions(inputs, self._axes(), scale) if self.dynamic else (None, {})
            notes: tuple[str, ...] = ()
            module = _TracedStep(network, half, names if step == "next" else None).eval()
            try:
                program = torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)
            except torch._dynamo.exc.UserError as error:
                # The network fixes a size: all sizes are fixed, and the report has a note.
                notes, ranges = (f"tracing fixed sizes: {fixed_reason(error)}",), {}
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
        return Trace(weights_as_inputs(exported.model, network), ranges, notes)


def _dimensions(inputs: tuple, axes: dict[int, str], scale: int) -> tuple[dict, dict[str, str]]:
    """Free axes for `torch.export`, and their ranges; the source and every cache are multiples of the rows of latents."""
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
