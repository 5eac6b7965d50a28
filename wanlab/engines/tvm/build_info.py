"""What a TVM library was built from; kept beside it, and checked when the library is opened."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from wanlab.core.manifest import Manifest, file_damage

TensorType = tuple[str, tuple[int, ...]]


class TvmBuildInfo(Manifest, frozen=True, kw_only=True):
    """What one library was built from, and what the build took.

    Attributes:
        path: of the library; this record lies beside it as `<path>.json`.
        facts: graph, target, TVM's version and settings; the library is used again while they stay the same.
        library_sha256: of the library's bytes.
        graph: file name of the ONNX graph. graph_sha256: of its bytes and of its weights outside.
        target: TVM's own words for what it was built for: kind, processor or architecture.
        schedule: `"tiled"` (loop schedules of `wanlab.engines.tvm.build`), `"plain"` (TVM's own loop nests) or
            `"default"` (TVM's own rules for GPUs).
        fast_math: exp and tanh are polynomials that can be vectorised.
        tvm_version: the runtime must be the same.
        inputs, outputs: tensor name -> (dtype, shape), in order.
        metadata: what the exporter wrote into the graph: model, component, wanlab_version, shape.
        rewrites: how often each rewrite of the graph was made.
        nodes: of the graph, before the rewrites. kernels: functions that TVM made of them, None where it does not
            say. scheduled: those of them that got a schedule.
        size_bytes: of the library, weights included.
        import_ms, compile_ms, link_ms: reading the graph; scheduling and code generation; the C++ compiler's link.
    """

    KIND: ClassVar[str] = "build information"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "build again with wanlab.engines.build_tvm"
    NONE: ClassVar[str] = (
        "{name} has no build information {file} beside it, so nothing says what it was built from;"
        " build it with wanlab.engines.build_tvm"
    )

    library_sha256: str
    graph: str
    graph_sha256: str
    target: dict[str, str]
    schedule: str
    fast_math: bool
    tvm_version: str
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    metadata: dict[str, str]
    rewrites: dict[str, int]
    nodes: int
    kernels: int | None
    scheduled: int | None
    size_bytes: int
    import_ms: float
    compile_ms: float
    link_ms: float

    @property
    def build_ms(self) -> float:
        """From the graph to a library."""
        return self.import_ms + self.compile_ms + self.link_ms

    def row(self) -> dict:
        """One flat row of a table."""
        return {
            "engine": f"tvm-{self.target['kind']}",
            "component": self.metadata.get("component", self.graph),
            "target": self.target.get("mcpu") or self.target.get("arch", ""),
            "schedule": self.schedule,
            "fast_math": self.fast_math,
            "nodes": self.nodes,
            "kernels": self.kernels,
            "import_ms": self.import_ms,
            "compile_ms": self.compile_ms,
            "link_ms": self.link_ms,
            "build_ms": self.build_ms,
            "size_bytes": self.size_bytes,
            "tvm": self.tvm_version,
            "cached": self.cached,
        }

    def damage(self) -> str:
        return file_damage(Path(self.path), self.library_sha256, self.size_bytes)
