"""The halves of the Wan VAE as engines that work chunk by chunk, in memory that does not grow with the clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wanlab.core.errors import WanlabError
from wanlab.engines.base import Engine, TensorType
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.export.vae_streamed import HALVES, PAST, PRESENT, STEPS, export_streamed, half_of
from wanlab.models.pipeline import Model


class Streamed(Engine):
    """One half of the VAE over two engines: the first chunk of a clip, and every later one.

    The caches of the causal convolutions stay in the memory where the engines wrote them; peak memory is that of one chunk,
    the input and the output. Both engines have the weights, so `size_bytes` counts them twice.

    Attributes: as `wanlab.engines.base.Engine`, with the input and the output of the whole clip; `name` is the name of
        the engines and `-streamed`; `path` is the path of the first engine, if it has one.
    """

    component = ""

    def __init__(self, first: Engine, next: Engine) -> None:
        """Combine two engines.

        Args:
            first, next: engines of `<component>.first.onnx` and `<component>.next.onnx` (`wanlab.export.export_streamed`).

        Raises:
            WanlabError: engines of another component or step, of different weights, dtypes or places.
        """
        half = HALVES[self.component]
        self.first, self.next = first, next
        for engine, step in ((first, STEPS[0]), (next, STEPS[1])):
            actual = f"{engine.metadata.get('component', 'something')}.{engine.metadata.get('step', 'whole')}"
            if actual != f"{self.component}.{step}":
                raise WanlabError(
                    f"{_file(engine)} is {actual}, not {self.component}.{step};"
                    " export the pair with wanlab.export.export_streamed"
                )
        carried = {name: kind[0] for name, kind in first.outputs.items() if name.startswith(PRESENT)}
        self.caches = tuple(name.removeprefix(PAST) for name in next.inputs if name.startswith(PAST))
        agree = carried == {f"{PRESENT}{name}": next.inputs[f"{PAST}{name}"][0] for name in self.caches}
        if not agree or first.metadata.get("weights") != next.metadata.get("weights"):
            raise WanlabError(
                f"{_file(first)} and {_file(next)} were exported from different networks or in different dtypes;"
                " export the pair again"
            )
        if first.device != next.device:
            raise WanlabError(
                f"{_file(first)} runs on {first.device}, {_file(next)} on {next.device}; open both on one device"
            )
        self.source, self.result = half.source, half.result
        self.name, self.device = f"{next.name}-streamed", next.device
        self.metadata = {name: value for name, value in next.metadata.items() if name != "step"}
        self.size_bytes = first.size_bytes + next.size_bytes
        self.load_ms = first.load_ms + next.load_ms
        self.path = getattr(first, "path", None)
        # Frames of a later chunk in source and result; the graph is fixed to them.
        self._later = int(next.inputs[self.source][1][2]), int(next.outputs[self.result][1][2])
        self.inputs: dict[str, TensorType] = {self.source: _whole(first.inputs[self.source], half.source)}
        self.outputs: dict[str, TensorType] = {self.result: _whole(first.outputs[self.result], half.result)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.first!r}, {self.next!r})"

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"the streamed {self.component}"

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`latents` `[B, C, 1 + k, H', W']`, not normalised, to `video` in [-1, 1], or `video` to `moments`."""
        source = tensors[self.source]
        chunks = self._chunks(source.shape)
        outputs = self.first.run({self.source: source[:, :, :1]})
        frame = outputs.pop(self.result)
        whole = frame.new_empty((*frame.shape[:2], 1 + self._later[1] * chunks, *frame.shape[3:]))
        whole[:, :, :1] = frame
        for index in range(chunks):
            start = 1 + self._later[0] * index
            feeds = {f"{PAST}{name}": outputs.pop(f"{PRESENT}{name}") for name in self.caches}
            feeds[self.source] = source[:, :, start : start + self._later[0]]
            outputs = self.next.run(feeds)
            start = 1 + self._later[1] * index
            whole[:, :, start : start + self._later[1]] = outputs.pop(self.result)
        return {self.result: whole}

    def _check_capture(self, cuda_graph: bool) -> None:
        if cuda_graph:
            raise WanlabError(
                f"{self.name} runs a clip as many calls, which do not fit into one CUDA graph; leave cuda_graph out"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._chunks(shape)
        super()._check_shape(name, shape)

    def _bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: torch.cuda.Stream | None,
        cuda_graph: bool,
    ) -> Callable[[], None]:
        """Two sets of caches are allocated here: one is read while the other is written."""
        source, whole = inputs[self.source], outputs[self.result]
        chunks = self._chunks(source.shape)
        frames = 1 + self._later[1] * chunks
        if whole.shape[2] != frames:
            raise WanlabError(
                f"{self.result!r} has memory for {whole.shape[2]} frames, this clip gives {frames}"
            )
        on_stream, handle = nullcontext(), None
        if stream is not None:
            on_stream, handle = torch.cuda.stream(stream), stream.cuda_stream
        sets = [self._empty_caches(source) for _ in range(min(1 + chunks, 2))]
        chunk, output = source[:, :, :1].contiguous(), torch.empty_like(whole[:, :, :1].contiguous())
        written = {f"{PRESENT}{name}": cache for name, cache in sets[0].items()}
        first = self.first.bind({self.source: chunk}, {self.result: output} | written, stream=handle)
        calls = [(first, chunk, output)]
        if chunks:
            chunk = source[:, :, 1 : 1 + self._later[0]].contiguous()
            output = torch.empty_like(whole[:, :, 1 : 1 + self._later[1]].contiguous())
        for turn in range(min(chunks, 2)):
            read = {f"{PAST}{name}": cache for name, cache in sets[turn].items()}
            written = {f"{PRESENT}{name}": cache for name, cache in sets[1 - turn].items()}
            call = self.next.bind({self.source: chunk} | read, {self.result: output} | written, stream=handle)
            calls.append((call, chunk, output))

        def run() -> None:
            with on_stream:
                at_source = at_result = 0
                for index in range(1 + chunks):
                    call, chunk, output = calls[2 - index % 2 if index else 0]
                    chunk.copy_(source[:, :, at_source : at_source + chunk.shape[2]])
                    call()
                    whole[:, :, at_result : at_result + output.shape[2]] = output
                    at_source, at_result = at_source + chunk.shape[2], at_result + output.shape[2]

        return run

    def _chunks(self, shape: Sequence[int]) -> int:
        """Number of chunks after the first in a source of this shape."""
        frames, step = shape[2] if len(shape) == 5 else 0, self._later[0]
        if frames < 1 or (frames - 1) % step:
            allowed = "1 or more frames" if step == 1 else f"{step}k + 1 frames"
            raise WanlabError(f"{self.source!r} is {list(shape)}; give [B, C, T, H, W] with {allowed}")
        return (frames - 1) // step

    def _empty_caches(self, source: torch.Tensor) -> dict[str, torch.Tensor]:
        """Memory for the caches of the convolutions, at the size that belongs to `source`."""
        own = self.next.inputs[self.source][1]
        sizes = {
            _factor(axis)[1]: size / _factor(axis)[0] for axis, size in zip(own, source.shape, strict=True)
        }
        caches = {}
        for name in self.caches:
            dtype, axes = self.next.inputs[f"{PAST}{name}"]
            factors = [_factor(axis) for axis in axes]
            shape = [round(times * sizes[symbol]) if symbol else times for times, symbol in factors]
            caches[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        return caches


class StreamedDecoder(Streamed):
    """The VAE's decoder chunk by chunk: `{"latents"}` to `{"video"}`, as the engine of `vae_decoder`."""

    component = "vae_decoder"


class StreamedEncoder(Streamed):
    """The VAE's encoder chunk by chunk: `{"video"}` to `{"moments"}`, as the engine of `vae_encoder`."""

    component = "vae_encoder"


def open_streamed_decoder(folder: str | os.PathLike, **options) -> StreamedDecoder:
    """The pair that `export_streamed` wrote for the decoder.

    Args:
        folder: folder with `vae_decoder.first.onnx` and `vae_decoder.next.onnx`.
        options: options of `OrtEngine`: provider, threads and so on.

    Raises:
        WanlabError: a file is missing, or as `OrtEngine` and `StreamedDecoder`.
    """
    return StreamedDecoder(*_open(folder, "vae_decoder", options))


def open_streamed_encoder(folder: str | os.PathLike, **options) -> StreamedEncoder:
    """The pair that `export_streamed` wrote for the encoder; as `open_streamed_decoder`."""
    return StreamedEncoder(*_open(folder, "vae_encoder", options))


def prepare_streamed(
    model: Model,
    component: str,
    folder: str | os.PathLike,
    *,
    size: Mapping[str, int | None],
    progress: bool = False,
) -> Path:
    """Export one half of the VAE as a pair of graphs; the `prepare` of the kind `streamed_vae`.

    The graphs take any number of frames, so only batch, height and width of `size` count.

    Returns:
        The file of the first chunk; the file of the later ones is in the same folder.
    """
    fixed: dict[str, Any] = {name: size.get(name) for name in ("batch", "height", "width")}
    first, _ = export_streamed(model, folder, component, dynamic=False, **fixed)
    return Path(first.path)


def open_streamed(model: Model | None, component: str, path: str | os.PathLike, **settings: Any) -> Streamed:
    """The pair that `prepare_streamed` exported; the `open` of the kind `streamed_vae`."""
    if model is not None:
        settings = {"provider": model.device.type, **settings}
    kinds = {kind.component: kind for kind in (StreamedDecoder, StreamedEncoder)}
    return kinds[component](*_open(Path(path).parent, component, settings))


def _open(folder: str | os.PathLike, component: str, options: dict) -> list[OrtEngine]:
    files = [half_of(component).file(folder, step) for step in STEPS]
    for file in files:
        if not file.is_file():
            raise WanlabError(f"no {file.name} in {folder}; export it with wanlab.export.export_streamed")
    # With memory patterns both sessions would allocate one large block at their second run and keep the memory of the first.
    return [OrtEngine(file, **{"memory_pattern": False} | options) for file in files]


def _file(engine) -> str:
    return getattr(getattr(engine, "path", None), "name", engine.name)


def _whole(chunk: TensorType, name: str) -> TensorType:
    """The type of a whole clip from the type of its first chunk."""
    dtype, axes = chunk
    return dtype, (*axes[:2], "frames" if name == "video" else "latent_frames", *axes[3:])


def _factor(axis: int | str) -> tuple[int, str]:
    """Factor and name of an axis: `"4*latent_height"` gives 4 and `"latent_height"`; a fixed size gives itself and `""`."""
    if isinstance(axis, int):
        return axis, ""
    times, _, name = axis.rpartition("*")
    return int(times or 1), name
