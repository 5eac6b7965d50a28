"""Optimization profiles in pixels, and the ONNX graph that an engine is built from."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from wanlab import models
from wanlab.core.digests import graph_sha256
from wanlab.core.errors import WanlabError
from wanlab.core.files import file_digest
from wanlab.engines.base import TensorType, fits, spell_shape
from wanlab.export.components import AXES, ClipShape, axis_sizes
from wanlab.export.export import ExportReport
from wanlab.export.graph import file_bytes

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
"""Smallest, preferred and largest shape."""

ENDS = ("min", "opt", "max")
# Axis -> fields of a profile that determine its size.
FIELDS_OF = {
    "batch": ("batch",),
    "text_tokens": ("text_tokens",),
    "frames": ("frames",),
    "latent_frames": ("frames",),
    "height": ENDS,
    "width": ENDS,
    "latent_height": ENDS,
    "latent_width": ENDS,
    "tokens": (*ENDS, "frames"),
}


@dataclass(frozen=True)
class PixelProfile:
    """Sizes of clips for which an engine is built; None takes the size of the model or of the graph.

    >>> PixelProfile(min=(480, 854), opt=(720, 1280), max=(1080, 1920))

    Attributes:
        min, opt, max: smallest, preferred and largest (height, width) in pixels; all or none. The default is half of the
            model's clip, its clip, and one and a half times its clip, as far as the graph was traced for them.
        frames: smallest, preferred and largest number of frames; the default ends at the model's clip.
        batch: smallest, preferred and largest number of clips; the default is 1, 1, 2.
        text_tokens: smallest, preferred and largest number of text tokens; the default is the length that the graph was
            exported with, to which texts are padded.
    """

    min: tuple[int, int] | None = None
    opt: tuple[int, int] | None = None
    max: tuple[int, int] | None = None
    frames: tuple[int, int, int] | None = None
    batch: tuple[int, int, int] | None = None
    text_tokens: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        sizes = (self.min, self.opt, self.max)
        if any(size is None for size in sizes) and any(size is not None for size in sizes):
            raise WanlabError(
                "a profile needs min, opt and max as (height, width) in pixels, or none of them"
            )
        ranges: dict[str, tuple[int, ...] | None] = {
            "frames": self.frames,
            "batch": self.batch,
            "text_tokens": self.text_tokens,
        }
        if self.min is not None and self.opt is not None and self.max is not None:
            pairs = zip(self.min, self.opt, self.max, strict=True)
            ranges |= dict(zip(("height", "width"), pairs, strict=True))
        for name, values in ranges.items():
            if values is None:
                continue
            whole = len(values) == 3 and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
            if not whole or not 1 <= values[0] <= values[1] <= values[2]:
                raise WanlabError(
                    f"{name} of the profile is {', '.join(map(str, values))}; give whole numbers, smallest, preferred,"
                    " largest"
                )

    @classmethod
    def of(cls, *sizes: str, **others: Any) -> PixelProfile:
        """A profile from text: `PixelProfile.of("480x854", "720x1280", "1080x1920")`, height first; nothing for the default.

        Raises:
            WanlabError: a size that is not like 480x854, or another number of sizes than three.
        """
        ends = []
        for text in sizes:
            match = re.fullmatch(r"(\d+)x(\d+)", text)
            if not match:
                raise WanlabError(f"{text!r} is no size; give height x width in pixels, e.g. 480x854")
            ends.append((int(match[1]), int(match[2])))
        if len(ends) not in (0, 3):
            raise WanlabError(f"a profile needs three sizes, min, opt and max; {len(ends)} were given")
        low, best, high = ends or (None, None, None)
        return cls(low, best, high, **others)

    def clip(self) -> dict[str, int]:
        """The preferred height, width and frames, as far as the profile sets them."""
        size = dict(zip(("height", "width"), self.opt, strict=True)) if self.opt else {}
        return size | ({"frames": self.frames[1]} if self.frames else {})

    def without_sizes(self) -> PixelProfile:
        """The profile for a graph that was exported for one clip: batch and text alone."""
        return replace(self, min=None, opt=None, max=None, frames=None)

    def sets(self, axis: str) -> bool:
        """Whether the profile sets the size of an axis."""
        return any(getattr(self, name) is not None for name in FIELDS_OF[axis])


@dataclass(frozen=True)
class Shapes:
    """A profile as shapes of the inputs of one network.

    Attributes:
        inputs: input -> smallest, preferred and largest shape.
        free: whether the graph has free axes; a graph of fixed sizes needs no profile.
        clips: `"min"`, `"opt"`, `"max"` -> the clip in pixels; empty where shapes were given.
        notes: remarks for the reader, each one line.
    """

    inputs: dict[str, Range]
    free: bool
    clips: dict[str, ClipShape]
    notes: tuple[str, ...] = ()


def network_shapes(
    source: Source, profile: PixelProfile | Mapping[str, Range] | None, spec: Any = None
) -> Shapes:
    """Shapes of the inputs of a graph under a profile.

    Args:
        source: the graph.
        profile: sizes in pixels; or input -> (min, opt, max) shapes, for a graph that wanlab did not export.
        spec: spec of the model; None takes the model in the metadata of the graph.

    Raises:
        WanlabError: a size that is fixed in the graph or outside the traced range, a graph without the name of its
            model, or shapes that the graph does not accept.
    """
    inputs = {name: shape for name, (_, shape) in source.inputs.items()}
    free = any(isinstance(size, str) for shape in inputs.values() for size in shape)
    if isinstance(profile, Mapping):
        return Shapes(_given(source, profile), free, {})
    profile = profile or PixelProfile()
    if not free and profile == PixelProfile():
        fixed = {
            name: tuple(size for size in shape if isinstance(size, int)) for name, shape in inputs.items()
        }
        return Shapes({name: (shape, shape, shape) for name, shape in fixed.items()}, False, {})
    spec = _spec(source) if spec is None else spec
    clips, notes = clip_range(spec, profile, source)
    sizes = {end: axis_sizes(spec, clip) for end, clip in clips.items()}
    resolved = {}
    for name, shape in inputs.items():
        ends = [
            tuple(_size(source, name, axis, size, sizes[end], profile) for axis, size in enumerate(shape))
            for end in ENDS
        ]
        resolved[name] = (ends[0], ends[1], ends[2])
    return Shapes(resolved, free, clips, notes)


def clip_range(
    spec: Any, profile: PixelProfile, source: Source | None = None
) -> tuple[dict[str, ClipShape], tuple[str, ...]]:
    """The smallest, preferred and largest clip, rounded to sizes that are legal for the model, and notes about the rounding.

    The smallest is rounded down and the largest up, so that the range includes the sizes of the profile. Sizes that the
    profile leaves open are those of the graph where it has one clip, and stay in the range that it was traced for.

    Args:
        source: the graph; None takes the sizes of the model alone.
    """
    open_sizes = _open_sizes(spec, source)
    sizes = {"min": profile.min, "opt": profile.opt, "max": profile.max}
    if profile.opt is None:
        sizes = {end: (height, width) for end, (height, width, _) in open_sizes.items()}
    frames = profile.frames or tuple(count for _, _, count in open_sizes.values())
    batch = profile.batch or (1, 1, 2)
    exported = None if source is None else source.clip
    text = profile.text_tokens or ((exported or spec.defaults).text_tokens,) * 3
    steps = spec.size_step
    frame_step = spec.frame_step
    clips, notes = {}, []
    for index, end in enumerate(ENDS):
        stated = sizes[end]
        assert stated is not None  # all three are given, or none
        size = tuple(_legal(value, step, 0, end) for value, step in zip(stated, steps, strict=True))
        count = _legal(frames[index], frame_step, 1, end)
        clips[end] = ClipShape(batch[index], size[0], size[1], count, text[index])
        if size != stated and profile.opt is not None:
            off = [f"{v} is no multiple of {s}" for v, s in zip(stated, steps, strict=True) if v % s]
            notes.append(
                f"{end} {stated[0]}x{stated[1]} is built as {size[0]}x{size[1]} pixels: {' and '.join(off)}"
            )
        if count != frames[index] and profile.frames is not None:
            notes.append(f"{end} {frames[index]} frames are built as {count}: they must be {frame_step}k+1")
    return clips, tuple(notes)


def _open_sizes(spec: Any, source: Source | None) -> dict[str, tuple[int, int, int]]:
    """Height, width and frames of the ends of a profile that leaves them open; legal, and inside the traced range."""
    if source is not None and source.clip is not None and not source.sized:
        return dict.fromkeys(ENDS, (source.clip.height, source.clip.width, source.clip.frames))
    have = spec.defaults
    around = {
        "min": (have.height // 2, have.width // 2, (have.frames + 1) // 2),
        "opt": (have.height, have.width, have.frames),
        "max": (have.height * 3 // 2, have.width * 3 // 2, have.frames),
    }
    traced = {} if source is None else source.traced
    axes = (
        ("frames", spec.temporal_factor, spec.frame_step, 1),
        ("height", spec.spatial_factor, spec.size_step[0], 0),
        ("width", spec.spatial_factor, spec.size_step[1], 0),
    )
    grid = {}
    for (axis, factor, step, offset), patch in zip(axes, spec.patch, strict=True):
        # A causal VAE encodes the first frame alone.
        latent = [(size - offset) * factor + offset for size in traced.get(f"latent_{axis}", ())]
        low, high = traced.get(axis) or latent or (1, math.inf)
        if spec.max_positions is not None:
            high = min(high, (spec.max_positions * patch - offset) * factor + offset)
        ends_at = math.inf if high == math.inf else _legal(int(high), step, offset, "min")
        grid[axis] = (step, offset, _legal(int(low), step, offset, "max"), ends_at)
    ends = {}
    for end, values in around.items():
        legal = [
            max(min(_legal(max(value, 1), step, offset, end), high), low)
            for axis, value in zip(("height", "width", "frames"), values, strict=True)
            for step, offset, low, high in [grid[axis]]
        ]
        ends[end] = (int(legal[0]), int(legal[1]), int(legal[2]))
    return ends


def _legal(value: int, step: int, offset: int, end: str) -> int:
    down = max((value - offset) // step * step + offset, offset or step)
    up = -((offset - value) // step) * step + offset
    if end == "min":
        return down
    if end == "max":
        return max(up, down)
    return down if value - down < up - value else max(up, down)


def _size(
    source: Source, name: str, axis: int, size: int | str, sizes: dict[str, int], profile: PixelProfile
) -> int:
    # Inputs that only some families have are known by the names of their axes.
    known = AXES.get(name, {}).get(axis, size if size in sizes else None)
    if isinstance(size, int):
        if known is not None and profile.sets(known) and sizes[known] != size:
            raise WanlabError(
                f"axis {known} of {name} is fixed at {size} in {source.path.name} and the profile asks for"
                f" {sizes[known]}; export with dynamic=True, or give a profile of that size"
            )
        return size
    if known is None:
        raise WanlabError(
            f"axis {axis} of {name} in {source.path.name} may vary, and a clip does not determine its size; give"
            f" profile={{{name!r}: (min, opt, max)}} with whole shapes"
        )
    low, high = source.traced.get(known, (sizes[known], sizes[known]))
    if not low <= sizes[known] <= high:
        raise WanlabError(
            f"axis {known} of {name} is {sizes[known]} in the profile and {source.path.name} was traced for"
            f" {low} to {high}; give a profile inside this range"
        )
    return sizes[known]


def _given(source: Source, shapes: Mapping[str, Range]) -> dict[str, Range]:
    for name, (_, graph) in source.inputs.items():
        if name not in shapes:
            raise WanlabError(f"the profile has no shapes for {name}, an input of {source.path.name}")
        for shape in shapes[name]:
            if len(shapes[name]) != 3 or not fits(graph, tuple(shape)):
                raise WanlabError(
                    f"the profile gives {name} the shape {list(shape)}; {source.path.name} takes {spell_shape(graph)},"
                    " as three shapes: min, opt, max"
                )
    low_high = {name: tuple(tuple(shape) for shape in shapes[name]) for name in source.inputs}
    for name, (low, best, high) in low_high.items():
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise WanlabError(f"the profile's shapes of {name} do not grow from min over opt to max")
    return low_high  # type: ignore[return-value]


def _spec(source: Source) -> Any:
    name = source.metadata.get("model")
    if not name:
        raise WanlabError(
            f"{source.path.name} does not name its model; give profile={{input: (min, opt, max)}} with"
            " whole shapes, or export it with wanlab"
        )
    return models.get(name)


_TRACED = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?: \+ (\d+))?, \2 = (\d+) to (\d+)$")


def traced_range(text: str) -> tuple[int, int] | None:
    """Smallest and largest size that an export report gives for an axis, e.g. `"4*k + 1, k = 1 to 256"`."""
    if plain := re.fullmatch(r"\w+ = (\d+) to (\d+)", text):
        return int(plain[1]), int(plain[2])
    if match := _TRACED.fullmatch(text):
        factor, offset = int(match[1] or 1), int(match[3] or 0)
        return factor * int(match[4]) + offset, factor * int(match[5]) + offset
    return None


@dataclass(frozen=True, eq=False)
class Source:
    """An ONNX file.

    Attributes:
        path: path of the file.
        inputs, outputs: tensor -> dtype as torch names it, and shape; a free axis is given by its name.
        metadata: metadata of the file: model, component, shape, and formats of quantised layers.
        traced: axis -> smallest and largest traced size, as far as an export report beside the file states it.
        size_bytes: size of the graph and its weights.
    """

    path: Path
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    metadata: dict[str, str]
    traced: dict[str, tuple[int, int]]
    size_bytes: int

    @property
    def numbers(self) -> str:
        """Number formats of the graph, e.g. `"float16"` or `"float32, 42 x int8"`."""
        kinds = (dtype for dtype, _ in (*self.inputs.values(), *self.outputs.values()))
        first = next((kind for kind in kinds if "float" in kind), "")
        quantised = json.loads(self.metadata.get("wanlab_format", "{}"))
        return ", ".join([first, *(f"{count} x {name}" for name, count in quantised.items())])

    @cached_property
    def clip(self) -> ClipShape | None:
        """The clip that it was exported with; None if its metadata do not state one."""
        stated = self.metadata.get("shape")
        return ClipShape(**json.loads(stated)) if stated else None

    @property
    def sized(self) -> bool:
        """Whether a size of the clip may vary in it, and not only the batch."""
        shapes = [shape for _, shape in self.inputs.values()]
        return any(isinstance(size, str) for shape in shapes for size in shape[1:])

    @cached_property
    def operators(self) -> dict[str, str]:
        """Node -> its operator."""
        return {node.name: node.op_type for node in onnx.load(self.path, load_external_data=False).graph.node}

    @cached_property
    def graph_sha256(self) -> str:
        """SHA-256 of the graph and of all its files of weights."""
        return graph_sha256(self.path)

    @cached_property
    def file_sha256(self) -> str:
        """SHA-256 of the `.onnx` file alone, which names its weights by their hash."""
        return file_digest(self.path)


def read_source(path: str | os.PathLike[str]) -> Source:
    """Types, metadata and size of an ONNX file.

    Raises:
        WanlabError: no such file, or a file that onnx cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise WanlabError(f"no ONNX file at {path}; export it with wanlab.export.export")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise WanlabError(f"{path} is no ONNX file ({error}); export it with wanlab.export.export") from None
    weights = {tensor.name for tensor in model.graph.initializer}
    return Source(
        path,
        {value.name: _type_of(value) for value in model.graph.input if value.name not in weights},
        {value.name: _type_of(value) for value in model.graph.output},
        {entry.key: entry.value for entry in model.metadata_props},
        _traced(path),
        file_bytes(path),
    )


def _type_of(value: Any) -> TensorType:
    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}[{axis}]"
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
    )
    return {"float": "float32", "double": "float64"}.get(name, name), shape


def _traced(path: Path) -> dict[str, tuple[int, int]]:
    report = ExportReport.find(path)
    if report is None:  # a quantised graph names its source
        try:
            report = ExportReport.find(
                json.loads(ExportReport.file(path).read_text(encoding="utf-8"))["source"]
            )
        except (OSError, ValueError, TypeError, KeyError):
            report = None
    ranges = {} if report is None else {axis: traced_range(text) for axis, text in report.ranges.items()}
    return {axis: ends for axis, ends in ranges.items() if ends is not None}
