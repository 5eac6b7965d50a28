"""Builds TensorRT engines from ONNX graphs, for one or several GPUs; build and layer information is kept beside them."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pandas as pd
from msgspec.structs import replace
from tqdm.auto import tqdm

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.core.files import atomic_path, file_digest, write_text
from wanlab.engines.base import EngineBuild
from wanlab.engines.tensorrt.network import Refused, make_plan, target_gpus
from wanlab.engines.tensorrt.profile import ENDS, PixelProfile, Range, network_shapes, read_source
from wanlab.engines.tensorrt.runtime import Kind, Message, Runtime, open_runtime
from wanlab.export.components import ClipShape

if TYPE_CHECKING:
    import tensorrt as trt


COLUMNS = [
    "component",
    "numbers",
    "runtime",
    "compute_capabilities",
    "build_ms",
    "peak_host_gib",
    "size_mib",
    "onnx_mib",
    "activation_mib",
    "layers",
    "datatypes",
    "warnings",
    "cached",
]


class BuildInfo(EngineBuild, frozen=True, kw_only=True):
    """Build information of one engine, with time and memory of the build; layer information is in `<path>.layers.json`.

    Attributes:
        model, component: names in the graph's metadata; empty where it has none.
        file_sha256: SHA-256 of the ONNX file without weights in other files.
        numbers: dtype of the first floating input, and formats of quantised layers, e.g. `"float16, 42 x int8"`.
        kind: kind of the runtime; only the same kind and version open the engine.
        compute_capabilities: compute capabilities of the GPUs that it runs on, e.g. `("8.6", "8.9")`.
        gpu: name of the GPU it was built on; empty when it was built ahead of time, without one.
        clips: `"min"`, `"opt"`, `"max"` -> clip in pixels, empty where shapes were given.
        shapes: input -> smallest, preferred and largest shape.
        settings: level, workspace_gib and other settings of the build.
        graph_bytes: size of the graph with its weights.
        layers: layer type -> number of layers of the engine, not of the graph.
        layers_source: where `layers` and `datatypes` are from.
        datatypes: datatypes of a layer's inputs -> number of layers; shows whether quantised products are computed as such.
        activation_bytes, weights_bytes: device memory that the builder planned; None where it does not say it.
        time_ms: time of parsing and building.
        peak_host_gib: increase of the process's resident memory during the build.
        log: severity and text of the builder's messages, except the verbose ones.
        notes: remarks for the reader, each one line.
    """

    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "build the engine again with wanlab.engines.build_tensorrt"

    model: str
    component: str
    file_sha256: str
    numbers: str
    kind: Kind
    compute_capabilities: tuple[str, ...]
    gpu: str
    clips: dict[str, ClipShape]
    shapes: dict[str, Range]
    settings: dict[str, Any]
    graph_bytes: int
    layers: dict[str, int]
    datatypes: dict[str, int]
    layers_source: str
    activation_bytes: int | None
    weights_bytes: int | None
    time_ms: float
    peak_host_gib: float
    log: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Distinct warnings of the builder."""
        return tuple(dict.fromkeys(text for severity, text in self.log if severity == "WARNING"))

    def clip(self) -> ClipShape:
        """The clip that the engine was optimised for.

        Raises:
            WanlabError: it was built from shapes, and its graph names no clip.
        """
        if self.clips:
            return self.clips["opt"]
        if "shape" not in self.metadata:
            raise WanlabError(f"{Path(self.path).name} names no clip; give the inputs yourself")
        return ClipShape(**json.loads(self.metadata["shape"]))

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        waits = {"signal", "wait", "shape_call"}  # layers that wait for streams or for the host
        return {
            "component": self.component or Path(self.graph).stem,
            "numbers": self.numbers,
            "runtime": f"{self.kind} {self.version}",
            "compute_capabilities": ", ".join(self.compute_capabilities),
            "build_ms": self.time_ms,
            "peak_host_gib": self.peak_host_gib,
            "size_mib": self.size_bytes / 2**20,
            "onnx_mib": self.graph_bytes / 2**20,
            "activation_mib": None if self.activation_bytes is None else self.activation_bytes / 2**20,
            "layers": sum(count for kind, count in self.layers.items() if kind not in waits) or None,
            "datatypes": ", ".join(f"{count} {kind}" for kind, count in self.datatypes.items()),
            "warnings": len(self.warnings),
            "cached": self.cached,
        }

    def record(self) -> dict[str, Any]:
        """The record of a run, ready for JSON: without metadata of the graph, and with the warnings instead of the log."""
        left_out = ("log", "inputs", "outputs", "metadata", "cached", "facts")
        fields = {name: value for name, value in msgspec.to_builtins(self).items() if name not in left_out}
        return fields | {"path": Path(self.path).name, "key": self.key, "warnings": list(self.warnings)}

    def rebuild(self) -> str:
        """The command that builds the engine again."""
        return f"wanlab.engines.build_tensorrt({self.graph!r}, {Path(self.path).name!r})"

    def check(self, *, kind: str, version: str, capability: str, gpu: str) -> None:
        """Refuse an engine that is out of date, or built for another runtime or GPU than this machine's.

        Args:
            kind, version: kind and version of the runtime that is to open it.
            capability, gpu: compute capability (`"8.9"`) and name of the GPU that is to run it.

        Raises:
            WanlabError: the reason, and the command that builds it again.
        """
        path = Path(self.path)
        again = f"build it again with {self.rebuild()}"
        self.check_file(again)
        graph = path.parent / self.graph
        if graph.is_file() and file_digest(graph) != self.file_sha256:
            raise WanlabError(f"{graph.name} was changed after {path.name} was built from it; {again}")
        if (kind, version) != (self.kind, self.version):
            raise WanlabError(
                f"{path.name} was built by {self.kind} {self.version}, here is {kind} {version}; {again}"
            )
        if capability not in self.compute_capabilities:
            names = ", ".join(self.compute_capabilities)
            raise WanlabError(
                f"{path.name} was built for compute capability {names}, {gpu} has {capability}; build it for this GPU"
                f" with {self.rebuild()[:-1]}, compute_capabilities=[{capability!r}])"
                if kind == "tensorrt-rtx"
                else f"{path.name} was built for compute capability {names}, {gpu} has {capability}; {again} on this"
                " machine"
            )


def builds_frame(builds: list[BuildInfo]) -> pd.DataFrame:
    """One row per engine, the columns of `BuildInfo.row`."""
    return pd.DataFrame([build.row() for build in builds], columns=COLUMNS)


LAYERS, TENSORS, ENGINE = "Layers", "I/O Tensors", "Engine Metadata"
TEXTS = (
    "Name",
    "LayerType",
    "TacticName",
    "Datatype",
    "Format",
    "Metadata",
)  # even where they look like numbers
_TOKEN = re.compile(r"([A-Z][\w/ ]*): ")


def layers_from_log(messages: Sequence[Message]) -> dict[str, Any] | None:
    """Layer information that a builder logged, in the form of the inspector's; None if it logged none.

    Returns:
        `"Layers"`: list of dicts (Name, LayerType, Inputs, Constants, Outputs, TacticName, StreamId, Metadata);
        `"I/O Tensors"`: list of dicts; `"Engine Metadata"`: dict; `"Source"`: `"builder log"`. Free axes are -1.
    """
    text = next((text for _, text in reversed(messages) if text.startswith(f"{LAYERS}:\n")), None)
    if text is None:
        return None
    sections: dict[str, list[str]] = {LAYERS: [], TENSORS: [], ENGINE: []}
    section = LAYERS
    for line in text.splitlines()[1:]:
        if line.rstrip(":") in sections and line.endswith(":"):
            section = line.rstrip(":")
        elif line.strip():
            sections[section].append(line.lstrip())  # an empty last field ends with a space
    engine = dict(line.split(": ", 1) for line in sections[ENGINE] if ": " in line)
    return {
        LAYERS: [parse_line(line) for line in sections[LAYERS]],
        TENSORS: [parse_line(line) for line in sections[TENSORS]],
        ENGINE: engine,
        "Source": "builder log",
    }


def parse_line(line: str) -> dict[str, Any]:
    """One layer or tensor: `Name: a, Inputs: [ { Name: b, Dimensions: [1,-1] }], Metadata: c`."""
    value, end = _fields(line, 0)
    if end != len(line):
        raise ValueError(f"cannot read {line[end : end + 60]!r}")
    return value


def _fields(text: str, at: int) -> tuple[dict[str, Any], int]:
    """`Key: value, Key: value`, until a closing brace or the end."""
    fields: dict[str, Any] = {}
    while match := _TOKEN.match(text, at):
        key = match[1]
        fields[key], at = _value(text, match.end(), key)
        if text.startswith(", ", at):
            at += 2
    return fields, at


def _value(text: str, at: int, key: str) -> tuple[Any, int]:
    if text.startswith("[ {", at):
        items, at = [], at + 2
        while text.startswith("{", at):
            item, at = _fields(text, at + 2)
            items.append(item)
            at = _skip(text, at, (" }", "}"))
            at = _skip(text, at, (", ",))
        return items, _skip(text, at, ("]", " ]"))
    if key != "Metadata" and (match := re.compile(r"\[([-\d, ]*)\]").match(text, at)):
        numbers = [int(number) for number in match[1].split(",") if number.strip()]
        return numbers, match.end()
    # A name ends at the next key after a comma, or at the end of the item.
    end = re.compile(r", (?=[A-Z][\w/ ]*: )| }|$").search(text, at)
    stop = len(text) if key == "Metadata" or end is None else end.start()
    word = text[at:stop]
    if key not in TEXTS and re.fullmatch(r"-?\d+", word):
        return int(word), stop
    return {"true": True, "false": False}.get(word, word), stop


def _skip(text: str, at: int, choices: tuple[str, ...]) -> int:
    return next((at + len(choice) for choice in choices if text.startswith(choice, at)), at)


def count_types(information: dict[str, Any]) -> dict[str, int]:
    """Layer type -> number of layers, largest first; layers for which only a name is known are not counted."""
    layers = [layer for layer in information.get(LAYERS, ()) if isinstance(layer, dict)]
    return dict(Counter(layer.get("LayerType", "") for layer in layers).most_common())


def count_datatypes(information: dict[str, Any]) -> dict[str, int]:
    """Datatypes of a layer's inputs, e.g. `"Int8"` or `"Float+Half"` -> number of layers, largest first."""
    counts: Counter[str] = Counter()
    for layer in information.get(LAYERS, ()):
        inputs = layer.get("Inputs") if isinstance(layer, dict) else None
        kinds = {entry.get("Datatype", "") for entry in inputs or () if isinstance(entry, dict)} - {""}
        if kinds:
            counts["+".join(sorted(kinds))] += 1
    return dict(counts.most_common())


def layers_path(engine: str | os.PathLike) -> Path:
    """Path of the layer information of an engine."""
    return Path(f"{os.fspath(engine)}.layers.json")


def write_layers(engine: str | os.PathLike, information: dict[str, Any]) -> Path:
    """Write layer information beside its engine."""
    return write_text(layers_path(engine), json.dumps(information))


def inspect_plan(runtime: Runtime, plan: Any) -> dict[str, Any] | None:
    """Layer information of a serialised engine; None if it cannot be opened on this machine.

    Args:
        plan: bytes or buffer of the builder.
    """
    opener: trt.Runtime | None = runtime.module.Runtime(runtime.logger)
    engine = opener.deserialize_cuda_engine(plan) if opener else None
    return None if engine is None else inspect_engine(runtime, engine)


def inspect_engine(
    runtime: Runtime, engine: trt.ICudaEngine, context: trt.IExecutionContext | None = None
) -> dict[str, Any] | None:
    """Layer information of the inspector, as a dict with `"Layers"`; None if it cannot be read.

    Args:
        context: context with input shapes; with it the information has the sizes of free axes.
    """
    inspector = engine.create_engine_inspector()
    if context is not None:
        inspector.execution_context = context
    try:
        information = json.loads(
            inspector.get_engine_information(runtime.module.LayerInformationFormat.JSON), strict=False
        )
    except ValueError:
        return None
    return (
        information | {"Source": "inspector"}
        if isinstance(information, dict) and information.get(LAYERS)
        else None
    )


def build_tensorrt(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str] | None = None,
    *,
    profile: PixelProfile | Mapping[str, Range] | None = None,
    workspace_gib: float | None = None,
    level: int | None = None,
    tf32: bool = True,
    timing_cache: str | os.PathLike[str] | None = None,
    compute_capabilities: Sequence[str] | None = None,
    kind: Kind | None = None,
    reuse: bool = True,
    progress: bool = True,
) -> BuildInfo:
    """Build an engine from an ONNX graph; its file and build information are written only after a successful build.

    The network is strongly typed: it computes in the types of the graph, quantised where the graph has
    QuantizeLinear and DequantizeLinear. TensorRT for RTX builds ahead of time for a list of GPUs and does not need one;
    TensorRT builds for the GPU of this machine and times its kernels on it.

    Args:
        onnx_path: graph from `wanlab.export.export` or `wanlab.precision.quantize`, with its files of weights.
        engine_path: path of the engine; None is `<graph>.engine` beside the graph. Build information is written to
            `<engine>.json`, layer information to `<engine>.layers.json`.
        profile: sizes to build for, in pixels or as shapes of the inputs; None takes sizes around the model's clip. A
            graph of fixed sizes needs none.
        workspace_gib: limit of temporary device memory of a layer, in GiB; None sets no limit.
        level: builder optimisation level, 0 to 5; None is TensorRT's default.
        tf32: whether float32 products may use TF32 where the GPU has it, as is TensorRT's default.
        timing_cache: file of kernel timings, which is read and added to; TensorRT only.
        compute_capabilities: GPUs for TensorRT for RTX, e.g. `["8.6", "12.0"]`; None takes 8.6, 8.9 and 12.0.
        kind: `"tensorrt"` or `"tensorrt-rtx"`; None as in `open_runtime`.
        reuse: whether to keep an engine that was built from the same graph, shapes, settings and version for the same
            GPUs.
        progress: whether to show a bar.

    Raises:
        WanlabError: TensorRT is not installed, the parser or the builder refuses the graph (with the node's name), the
            profile does not suit the graph, or a setting is impossible.
    """
    runtime, source = open_runtime(kind), read_source(onnx_path)
    path = Path(engine_path) if engine_path else source.path.with_suffix(".engine")
    if path.suffix.lower() not in (".engine", ".plan"):
        raise WanlabError(f"{path} does not end in .engine; give the file to write, e.g. {path.stem}.engine")
    if level is not None and not 0 <= level <= 5:
        raise WanlabError(f"level is {level}; give 0 (fastest build) to 5 (longest search)")
    if workspace_gib is not None and workspace_gib <= 0:
        raise WanlabError(f"workspace_gib is {workspace_gib}; give more than 0, or None for no limit")
    if timing_cache is not None and runtime.builds_ahead:
        raise WanlabError(f"{runtime.name} does not time kernels at the build; leave timing_cache out")
    shapes = network_shapes(source, profile)
    targets, gpu = target_gpus(runtime, compute_capabilities)
    settings = {"level": level, "workspace_gib": workspace_gib, "tf32": tf32}
    facts = {
        "graph": source.graph_sha256,
        "shapes": shapes.inputs,
        "settings": settings,
        "runtime": f"{runtime.kind} {runtime.version}",
        "targets": targets,
        "gpu": gpu,
    }
    if reuse and (known := BuildInfo.current(path, facts)[0]) is not None:
        return known

    begin = time.perf_counter()
    with runtime.messages() as log, measure.peak_memory("cpu") as memory:
        plan = make_plan(runtime, source, shapes, targets, settings, timing_cache, log, progress)
        time_ms = (time.perf_counter() - begin) * 1e3
        with atomic_path(path) as draft:
            draft.write_bytes(plan)
            info = BuildInfo(
                path=str(path),
                facts=facts,
                model=source.metadata.get("model", ""),
                component=source.metadata.get("component", ""),
                graph=os.path.relpath(source.path, path.parent),
                graph_sha256=source.graph_sha256,
                file_sha256=source.file_sha256,
                engine_sha256=file_digest(draft),
                numbers=source.numbers,
                kind=runtime.kind,
                version=runtime.version,
                compute_capabilities=targets,
                gpu=gpu,
                inputs=source.inputs,
                outputs=source.outputs,
                clips=shapes.clips,
                shapes=shapes.inputs,
                settings=settings,
                size_bytes=draft.stat().st_size,
                graph_bytes=source.size_bytes,
                **_layers(runtime, path, plan, log),
                activation_bytes=_logged_bytes(log, "Total Activation Memory"),
                weights_bytes=_logged_bytes(log, "Total Weights Memory"),
                time_ms=time_ms,
                peak_host_gib=0.0,
                log=tuple((severity, text) for severity, text in log if severity != "VERBOSE"),
                notes=shapes.notes,
                metadata=source.metadata,
            )
    info = replace(info, peak_host_gib=memory.increase_gib)
    info.write()
    return info


def _layers(runtime: Runtime, path: Path, plan: Any, log: list[Message]) -> dict[str, Any]:
    """Write layer information, from the inspector if a GPU can open the engine, else from the log; fields of `BuildInfo`."""
    information = None if runtime.builds_ahead else inspect_plan(runtime, plan)
    information = information or layers_from_log(log)
    if information is None:
        return {
            "layers": {},
            "datatypes": {},
            "layers_source": f"none: {runtime.last_error(log) or 'the builder logged no layers'}",
        }
    write_layers(path, information)
    counts = {"layers": count_types(information), "datatypes": count_datatypes(information)}
    return counts | {"layers_source": information["Source"]}


def _logged_bytes(log: Sequence[Message], what: str) -> int | None:
    pattern = re.compile(rf"{what}: (\d+) bytes")
    return max((int(match[1]) for _, text in log if (match := pattern.search(text))), default=None)


REFUSED = ["component", "numbers", "capability", "node", "operator", "reason"]


def build_graph(
    graph: str | os.PathLike[str], *, device: str = "cuda", progress: bool = False, **settings: Any
) -> Path:
    """The engine of an ONNX graph, beside it; the `build` of the kind `tensorrt`."""
    return Path(build_tensorrt(graph, progress=progress, **settings).path)


@dataclass(frozen=True, eq=False)
class EngineBuilds:
    """Results of several builds.

    Attributes:
        runtime: name and version of TensorRT.
        built: build information of the engines, in the order of the graphs.
        refused: a row per graph and GPU for which it cannot be built: component, numbers, capability, node, operator,
            reason.
    """

    runtime: str
    built: tuple[BuildInfo, ...]
    refused: pd.DataFrame

    def frame(self) -> pd.DataFrame:
        """One row per engine, the columns of `BuildInfo.row`."""
        return builds_frame(list(self.built))

    def refusals(self) -> pd.DataFrame:
        """`refused` for readers: a row per graph and reason, capabilities in one column, layer and operator in another."""
        columns = ["component", "numbers", "capability", "layer", "reason"]
        shown = self.refused.assign(
            layer=[
                f"{node.partition('/')[0]} ({operator})" if node else ""
                for node, operator in zip(self.refused["node"], self.refused["operator"], strict=True)
            ]
        )
        keys = [name for name in columns if name != "capability"]
        rows = [
            dict(zip(keys, values, strict=True)) | {"capability": ", ".join(group["capability"])}
            for values, group in shown.groupby(keys, sort=False)
        ]
        return pd.DataFrame(rows, columns=columns)

    def warnings(self) -> pd.DataFrame:
        """Warnings of the builder: warning, engines (names of those that it is about)."""
        engines: dict[str, list[str]] = {}
        for info in self.built:
            for text in info.warnings:
                engines.setdefault(text, []).append(Path(info.path).name)
        rows = [{"warning": text, "engines": ", ".join(names)} for text, names in engines.items()]
        return pd.DataFrame(rows, columns=["warning", "engines"])

    def bindings(self) -> pd.DataFrame:
        """Shapes and graph of each engine: engine, input, min, opt, max (shapes), graph and key (shortened hashes)."""
        rows = [
            {"engine": Path(info.path).name, "input": name}
            | {end: "x".join(map(str, shape)) for end, shape in zip(ENDS, shapes, strict=True)}
            | {"graph": info.graph_sha256[:12], "key": info.key[:12]}
            for info in self.built
            for name, shapes in info.shapes.items()
        ]
        return pd.DataFrame(rows, columns=["engine", "input", *ENDS, "graph", "key"])

    def records(self) -> list[dict[str, Any]]:
        """Build information ready for JSON, as `BuildInfo.record`; `51_platforms` reads it."""
        return [info.record() for info in self.built]

    @property
    def notes(self) -> list[str]:
        """Distinct notes of all engines."""
        return list(dict.fromkeys(note for info in self.built for note in info.notes))


def build_engines(
    graphs: Sequence[str | os.PathLike[str]],
    *,
    compute_capabilities: Sequence[str] | None = None,
    kind: Kind | None = None,
    profile: PixelProfile | Mapping[str, Range] | None = None,
    progress: bool = True,
    **settings: Any,
) -> EngineBuilds:
    """Build every graph for all GPUs for which that is possible; a refusal is a row of the result, not an error.

    Args:
        graphs: ONNX files; each engine is written beside its graph.
        compute_capabilities: GPUs for TensorRT for RTX; TensorRT always builds for the GPU of this machine.
        profile: as in `build_tensorrt`; a graph that was exported for one clip is built for that clip.
        kind, settings: as in `build_tensorrt`.
        progress: whether to show a bar for all graphs and one for each build.

    Raises:
        WanlabError: as `build_tensorrt`, except when the builder refuses a graph.
    """
    runtime = open_runtime(kind)
    built: list[BuildInfo] = []
    refused: list[dict[str, str]] = []
    for graph in tqdm(list(graphs), desc="engines", unit="engine", leave=False, disable=not progress):
        source = read_source(graph)
        sizes = profile
        if isinstance(profile, PixelProfile) and not source.sized:
            sizes = profile.without_sizes()
        left = list(target_gpus(runtime, compute_capabilities if runtime.builds_ahead else None)[0])
        while left:
            try:
                capabilities = left if runtime.builds_ahead else None
                built.append(
                    build_tensorrt(
                        graph,
                        compute_capabilities=capabilities,
                        kind=runtime.kind,
                        profile=sizes,
                        progress=progress,
                        **settings,
                    )
                )
                break
            except Refused as error:
                refusal = error.refusal
                # If the reason names no capability, it is about all of them.
                named = [target for target in left if target in refusal.targets] or list(left)
                for target in named:
                    left.remove(target)
                    refused.append(
                        {
                            "component": source.metadata.get("component") or Path(graph).stem,
                            "numbers": source.numbers,
                            "capability": target,
                            "node": refusal.node,
                            "operator": refusal.operator,
                            "reason": refusal.reason,
                        }
                    )
    return EngineBuilds(runtime.name, tuple(built), pd.DataFrame(refused, columns=REFUSED))
