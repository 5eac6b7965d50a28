"""What a TVM library was built from, kept beside it: while that is true the library is, and otherwise it is refused."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from wanlab.core.digests import file_sha256
from wanlab.core.errors import WanlabError

TensorType = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class TvmBuildInfo:
    """What came of one build.

    Attributes:
        path: the library; a `.json` with this receipt lies beside it.
        key: hash of everything that the library depends on; it is reused while that stays the same.
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
        cached: the library was there already and still true.
    """

    path: str
    key: str
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
    cached: bool = False

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


def receipt_path(library: str | os.PathLike) -> Path:
    """Where the receipt of a library lies."""
    return Path(f"{os.fspath(library)}.json")


def write_receipt(receipt: TvmBuildInfo) -> None:
    """Write it beside its library, whole or not at all."""
    path = receipt_path(receipt.path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    facts = asdict(receipt) | {"path": Path(receipt.path).name}
    draft.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(draft, path)


def read_receipt(library: str | os.PathLike) -> TvmBuildInfo:
    """The receipt of a library.

    Raises:
        WanlabError: there is none, or it cannot be read.
    """
    path = receipt_path(library)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name in ("inputs", "outputs"):
            facts[name] = {key: (kind, tuple(shape)) for key, (kind, shape) in facts[name].items()}
        return TvmBuildInfo(**facts | {"path": os.fspath(library)})
    except FileNotFoundError:
        raise WanlabError(
            f"{Path(library).name} has no receipt {path.name} beside it, so nothing says what it was built from;"
            " build it with wanlab.engines.build_tvm"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise WanlabError(f"cannot read {path}: {error}; build again with wanlab.engines.build_tvm") from None


def kept(library: Path, key: str) -> TvmBuildInfo | None:
    """The receipt of a library that is still whole and true."""
    try:
        receipt = read_receipt(library)
    except WanlabError:
        return None
    whole = library.is_file() and file_sha256(library) == receipt.library_sha256
    return receipt if receipt.key == key and whole else None


def key_of(graph_sha256: str, settings: dict) -> str:
    """Hash of a graph and of how it is built."""
    return hashlib.sha256(json.dumps([graph_sha256, settings], sort_keys=True).encode()).hexdigest()
