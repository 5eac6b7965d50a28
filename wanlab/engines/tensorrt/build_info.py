"""What an engine was built from, for and by; kept beside it, and checked when the engine is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.files import file_digest
from wanlab.core.manifest import Manifest, file_damage
from wanlab.engines.base import TensorType
from wanlab.engines.tensorrt.profile import Range
from wanlab.engines.tensorrt.runtime import Kind
from wanlab.export.components import ClipShape

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


class BuildInfo(Manifest, frozen=True, kw_only=True):
    """What one engine was built from, for and by, and what the build took.

    Attributes:
        path: of the engine; this record lies beside it as `<path>.json`, layer information as `<path>.layers.json`.
        facts: graph, shapes, settings, runtime and GPUs; the engine is used again while they stay the same.
        model, component: as the graph says; empty where it does not.
        graph: the ONNX file, relative to the engine. graph_sha256: of it and its weights. file_sha256: of it alone.
        engine_sha256: of the engine.
        numbers: dtype of the first floating input, and formats of quantised layers, e.g. `"float16, 42 x int8"`.
        kind, version: of the runtime, which must be the same to open it.
        compute_capabilities: of the GPUs that it runs on, e.g. `("8.6", "8.9")`.
        gpu: name of the GPU it was built on; empty when it was built ahead of time, without one.
        inputs, outputs: tensor -> dtype and shape; a free axis is its name.
        clips: `"min"`, `"opt"`, `"max"` -> clip in pixels, empty where shapes were given.
        shapes: input -> smallest, preferred and largest shape.
        settings: level, workspace_gib and whatever else was asked for.
        size_bytes, graph_bytes: of the engine, and of the graph with its weights.
        layers: layer type -> how many; of what the builder made, not of the graph. layers_source: what said so.
        datatypes: of a layer's inputs -> how many layers; says whether quantised products are computed as such.
        activation_bytes, weights_bytes: device memory that the builder planned, None where it does not say.
        time_ms: parsing and building. peak_host_gib: resident memory meanwhile, of the whole process.
        log: severity and text of what the builder said above its details.
        notes: what a reader should know, each one line.
        metadata: of the graph.
    """

    KIND: ClassVar[str] = "build information"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "build the engine again with wanlab.engines.build_tensorrt"
    NONE: ClassVar[str] = (
        "{name} has no build information {file} beside it, so nothing says what it was built from and for;"
        " build it with wanlab.engines.build_tensorrt"
    )

    model: str
    component: str
    graph: str
    graph_sha256: str
    file_sha256: str
    engine_sha256: str
    numbers: str
    kind: Kind
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    clips: dict[str, ClipShape]
    shapes: dict[str, Range]
    settings: dict[str, Any]
    size_bytes: int
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
    metadata: dict[str, str]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the builder warned of, each once."""
        return tuple(dict.fromkeys(text for severity, text in self.log if severity == "WARNING"))

    def clip(self) -> ClipShape:
        """The clip that it was optimised for.

        Raises:
            WanlabError: it was built from shapes, of a graph that names no clip.
        """
        if self.clips:
            return self.clips["opt"]
        if "shape" not in self.metadata:
            raise WanlabError(
                f"{Path(self.path).name} does not say which clip it is for; give the inputs yourself"
            )
        return ClipShape(**json.loads(self.metadata["shape"]))

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        waits = {"signal", "wait", "shape_call"}  # of streams and of the host
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
        """What a run keeps of it, ready for JSON: without the log, of which its warnings, and the graph's own metadata."""
        left_out = ("log", "inputs", "outputs", "metadata", "cached", "facts")
        fields = {name: value for name, value in msgspec.to_builtins(self).items() if name not in left_out}
        return fields | {"path": Path(self.path).name, "key": self.key, "warnings": list(self.warnings)}

    def rebuild(self) -> str:
        """The command that makes it anew."""
        return f"wanlab.engines.build_tensorrt({self.graph!r}, {Path(self.path).name!r})"

    def damage(self) -> str:
        return file_damage(Path(self.path), self.engine_sha256, self.size_bytes)

    def check(self, *, kind: str, version: str, capability: str, gpu: str) -> None:
        """Refuse an engine that is out of date, or built for another runtime or GPU than this machine's.

        Args:
            kind, version: of the runtime that would open it.
            capability, gpu: compute capability (`"8.9"`) and name of the GPU that would run it.

        Raises:
            WanlabError: the reason, and the command that mends it.
        """
        path = Path(self.path)
        again = f"build it again with {self.rebuild()}"
        if self.damage():
            raise WanlabError(
                f"{path.name} is not the file that its build information was written for; {again}"
            )
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
