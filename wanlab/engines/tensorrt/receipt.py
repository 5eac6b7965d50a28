"""What an engine was built from, for and by; kept beside it, and held against it when it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab.core.digests import file_sha256
from wanlab.core.errors import WanlabError
from wanlab.engines.base import TensorType
from wanlab.engines.tensorrt.profile import Range
from wanlab.engines.tensorrt.runtime import Kind
from wanlab.export.clip import ClipShape

FORMAT = 1  # of the receipt
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


@dataclass(frozen=True)
class BuildInfo:
    """What came of one build.

    Attributes:
        path: the engine; this receipt lies beside it as `<path>.json`, layer information as `<path>.layers.json`.
        key: hash of graph, shapes, settings, runtime and GPUs; the engine is kept while it stays the same.
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
        cached: the engine was there already and still true.
    """

    path: str
    key: str
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
    wanlab_version: str
    format: int = FORMAT
    cached: bool = False

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
        """What a run keeps of it, ready for JSON: all but the log, of which its warnings, and the graph's own words."""
        left_out = ("log", "inputs", "outputs", "metadata", "cached")
        facts = {name: value for name, value in asdict(self).items() if name not in left_out}
        return facts | {"path": Path(self.path).name, "warnings": list(self.warnings)}

    def rebuild(self) -> str:
        """The command that makes it anew."""
        return f"wanlab.engines.build_tensorrt({self.graph!r}, {Path(self.path).name!r})"


def builds_frame(receipts: list[BuildInfo]) -> pd.DataFrame:
    """One row per engine, the columns of `EngineReceipt.row`."""
    return pd.DataFrame([receipt.row() for receipt in receipts], columns=COLUMNS)


def receipt_path(engine: str | os.PathLike[str]) -> Path:
    """Where the receipt of an engine lies."""
    return Path(f"{os.fspath(engine)}.json")


def write_receipt(receipt: BuildInfo) -> None:
    """Write it beside its engine, whole or not at all."""
    path = receipt_path(receipt.path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    facts = asdict(receipt) | {"path": Path(receipt.path).name}
    draft.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(draft, path)


def read_receipt(engine: str | os.PathLike[str]) -> BuildInfo:
    """The receipt of an engine.

    Raises:
        WanlabError: there is none, or it cannot be read.
    """
    path = receipt_path(engine)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name in ("inputs", "outputs"):
            facts[name] = {key: (kind, tuple(shape)) for key, (kind, shape) in facts[name].items()}
        facts["shapes"] = {
            key: tuple(tuple(shape) for shape in ends) for key, ends in facts["shapes"].items()
        }
        facts["clips"] = {end: ClipShape(**clip) for end, clip in facts["clips"].items()}
        facts["log"] = tuple((severity, text) for severity, text in facts["log"])
        for name in ("compute_capabilities", "notes"):
            facts[name] = tuple(facts[name])
        return BuildInfo(**facts | {"path": os.fspath(engine)})
    except FileNotFoundError:
        raise WanlabError(
            f"{Path(engine).name} has no receipt {path.name} beside it, so nothing says what it was built from and for;"
            " build it with wanlab.engines.build_tensorrt"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise WanlabError(
            f"cannot read {path} ({type(error).__name__}); build the engine again with wanlab.engines.build_tensorrt"
        ) from None


def build_key(facts: Mapping[str, Any]) -> str:
    """Hash of all that an engine depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kept(engine: Path, key: str) -> BuildInfo | None:
    """The receipt of an engine that is still whole and true."""
    try:
        receipt = read_receipt(engine)
    except WanlabError:
        return None
    whole = engine.is_file() and file_sha256(engine) == receipt.engine_sha256
    return receipt if receipt.key == key and whole else None


def check_receipt(receipt: BuildInfo, *, kind: str, version: str, capability: str, gpu: str) -> None:
    """Refuse an engine that is stale, or foreign to this machine.

    Args:
        kind, version: of the runtime that would open it.
        capability, gpu: compute capability (`"8.9"`) and name of the GPU that would run it.

    Raises:
        WanlabError: the reason, and the command that mends it.
    """
    path = Path(receipt.path)
    again = f"build it again with {receipt.rebuild()}"
    if receipt.format != FORMAT:
        raise WanlabError(f"{path.name} has a receipt of another wanlab ({receipt.wanlab_version}); {again}")
    if path.stat().st_size != receipt.size_bytes or file_sha256(path) != receipt.engine_sha256:
        raise WanlabError(f"{path.name} is not the file that its receipt was written for; {again}")
    graph = path.parent / receipt.graph
    if graph.is_file() and file_sha256(graph) != receipt.file_sha256:
        raise WanlabError(f"{graph.name} was changed after {path.name} was built from it; {again}")
    if (kind, version) != (receipt.kind, receipt.version):
        raise WanlabError(
            f"{path.name} was built by {receipt.kind} {receipt.version}, here is {kind} {version}; {again}"
        )
    if capability not in receipt.compute_capabilities:
        names = ", ".join(receipt.compute_capabilities)
        raise WanlabError(
            f"{path.name} was built for compute capability {names}, {gpu} has {capability}; build it for this GPU with"
            f" {receipt.rebuild()[:-1]}, compute_capabilities=[{capability!r}])"
            if kind == "tensorrt-rtx"
            else f"{path.name} was built for compute capability {names}, {gpu} has {capability}; {again} on this machine"
        )
