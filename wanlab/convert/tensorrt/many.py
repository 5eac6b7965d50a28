"""Several graphs built, each for all the GPUs that will have it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.tensorrt.build import build_tensorrt
from wanlab.convert.tensorrt.plan import Refused, target_gpus
from wanlab.convert.tensorrt.profile import ENDS
from wanlab.convert.tensorrt.receipt import EngineReceipt, receipts_frame
from wanlab.convert.tensorrt.runtime import Kind, open_runtime
from wanlab.convert.tensorrt.source import read_source

if TYPE_CHECKING:
    import pandas as pd

REFUSED = ["component", "numbers", "capability", "node", "operator", "reason"]


@dataclass(frozen=True, eq=False)
class EngineBuilds:
    """What came of several builds.

    Attributes:
        runtime: name and version of the TensorRT that built.
        receipts: of the engines, in the order of the graphs.
        refused: a row per graph and GPU that it cannot be built for: component, numbers, capability, node, operator,
            reason.
    """

    runtime: str
    receipts: tuple[EngineReceipt, ...]
    refused: pd.DataFrame

    def frame(self) -> pd.DataFrame:
        """One row per engine, the columns of `EngineReceipt.row`."""
        return receipts_frame(list(self.receipts))

    def refusals(self) -> pd.DataFrame:
        """`refused` for the eye: a row per graph and reason, its capabilities joined, layer and operator in one."""
        import pandas as pd

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
        """What the builder warned of: warning, engines (those that it was said of)."""
        import pandas as pd

        said: dict[str, list[str]] = {}
        for receipt in self.receipts:
            for text in receipt.warnings:
                said.setdefault(text, []).append(Path(receipt.path).name)
        rows = [{"warning": text, "engines": ", ".join(names)} for text, names in said.items()]
        return pd.DataFrame(rows, columns=["warning", "engines"])

    def receipts_table(self) -> pd.DataFrame:
        """What each engine is bound to: engine, input, min, opt, max (its shapes), graph and key (hashes, shortened)."""
        import pandas as pd

        rows = [
            {"engine": Path(receipt.path).name, "input": name}
            | {end: "x".join(map(str, shape)) for end, shape in zip(ENDS, shapes, strict=True)}
            | {"graph": receipt.graph_sha256[:12], "key": receipt.key[:12]}
            for receipt in self.receipts
            for name, shapes in receipt.shapes.items()
        ]
        return pd.DataFrame(rows, columns=["engine", "input", *ENDS, "graph", "key"])

    def records(self) -> list[dict[str, Any]]:
        """The receipts ready for JSON, as `EngineReceipt.record`; `51_platforms` reads them."""
        return [receipt.record() for receipt in self.receipts]

    @property
    def notes(self) -> list[str]:
        """Of all engines, each once."""
        return list(dict.fromkeys(note for receipt in self.receipts for note in receipt.notes))


def build_engines(
    graphs: Sequence[str | os.PathLike[str]],
    *,
    compute_capabilities: Sequence[str] | None = None,
    kind: Kind | None = None,
    progress: bool = True,
    **settings: Any,
) -> EngineBuilds:
    """Build every graph for as many of the GPUs as take it; what is refused is a row, not an error.

    Args:
        graphs: ONNX files; each engine comes to lie beside its graph.
        compute_capabilities: for TensorRT for RTX; TensorRT builds for the GPU of this machine whatever is given.
        kind, settings: as in `build_tensorrt`.
        progress: show a bar over the graphs, and one for each build.

    Raises:
        WanlabError: as `build_tensorrt`, but for a builder that refuses.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    runtime = open_runtime(kind)
    receipts: list[EngineReceipt] = []
    refused: list[dict[str, str]] = []
    for graph in tqdm(list(graphs), desc="engines", unit="engine", leave=False, disable=not progress):
        source = read_source(graph)
        left = list(target_gpus(runtime, compute_capabilities if runtime.builds_ahead else None)[0])
        while left:
            try:
                wanted = left if runtime.builds_ahead else None
                receipts.append(
                    build_tensorrt(
                        graph,
                        compute_capabilities=wanted,
                        kind=runtime.kind,
                        progress=progress,
                        **settings,
                    )
                )
                break
            except Refused as error:
                found = error.refusal
                # Without a name among them it is all of them.
                named = [target for target in left if target in found.targets] or list(left)
                for target in named:
                    left.remove(target)
                    refused.append(
                        {
                            "component": source.metadata.get("component") or Path(graph).stem,
                            "numbers": source.numbers,
                            "capability": target,
                            "node": found.node,
                            "operator": found.operator,
                            "reason": found.reason,
                        }
                    )
    return EngineBuilds(runtime.name, tuple(receipts), pd.DataFrame(refused, columns=REFUSED))
