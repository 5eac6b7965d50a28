"""One file of weights beside the graphs that use it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

    from wanlab.convert.onnx.weights import Weight

ALIGNMENT_BYTES = 4096  # of a page: engines map the file into memory
FORMAT = 1


@dataclass(frozen=True)
class WeightsFile:
    """Weights of one network in one dtype, for any number of graphs in the same folder.

    Graphs of other sizes, opsets and forms point into the same file, and so do graphs that compute in another
    dtype and cast. Beside it lies `<name>.json`: which weight lies where.

    Attributes:
        path: the raw tensors, each aligned to a page.
        key: hash of the network's weights; with another key the file is another's, and written anew.
    """

    path: Path
    key: str

    def add(self, weights: dict[str, Weight], *, progress: bool = True) -> int:
        """Write the weights that are not there yet, one at a time; returns the bytes written."""
        from tqdm.auto import tqdm

        places = self.places()
        missing = {name: weight for name, weight in weights.items() if name not in places}
        end = max((start + length for start, length, *_ in places.values()), default=0)
        written = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if places else "wb") as file:
            bar = tqdm(missing.items(), desc="weights", unit="tensor", leave=False, disable=not progress)
            for name, weight in bar:
                tensor = weight.lazy(name)
                start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                file.seek(start)
                tensor.tofile(file)
                places[name] = (start, tensor.nbytes, tensor.dtype.name, weight.shape)
                end = start + tensor.nbytes
                written += tensor.nbytes
        manifest = {"format": FORMAT, "key": self.key, "tensors": places}
        temporary = self._manifest.with_name(f".{self._manifest.name}.{os.getpid()}")
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        os.replace(temporary, self._manifest)
        return written

    def places(self) -> dict[str, tuple[int, int, str, list[int]]]:
        """Name -> start and length in bytes, dtype, shape; empty when the file is not whole or another's."""
        try:
            manifest = json.loads(self._manifest.read_text(encoding="utf-8"))
            size = self.path.stat().st_size
        except (OSError, ValueError):
            return {}
        if manifest.get("format") != FORMAT or manifest.get("key") != self.key:
            return {}
        places = {name: tuple(place) for name, place in manifest["tensors"].items()}
        return places if all(start + length <= size for start, length, *_ in places.values()) else {}

    def refer(self, graph: onnx_ir.Graph) -> None:
        """Let the initializers of `graph` that lie in the file point into it."""
        import onnx_ir

        for name, (start, length, kind, shape) in self.places().items():
            value = graph.initializers.get(name)
            if value is not None:
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name,
                    start,
                    length,
                    onnx_ir.DataType[kind],
                    shape=onnx_ir.Shape(shape),
                    name=name,
                    base_dir=self.path.parent,
                )

    @property
    def _manifest(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")
