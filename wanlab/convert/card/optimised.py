"""What an engine's optimiser made of a graph: operators before and after, and which modules they were in."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.card.layers import EngineLayers
from wanlab.errors import WanlabError, require

if TYPE_CHECKING:
    import pandas as pd

EXTERNAL_ABOVE_BYTES = 1024  # weights over this size go beside the graph


def optimised_graph(
    path: str | os.PathLike, out: str | os.PathLike, *, provider: str = "cpu", optimization: str = "all"
) -> Path:
    """The graph that ONNX Runtime makes of a file for a provider; weights go to `<out>.data` beside it.

    Opens a session, which takes the memory of the weights, and writes all of them.

    Args:
        out: the `.onnx` file to write.
        provider: `"cpu"` or `"cuda"`; fusions differ. optimization: a level of `OrtEngine`.

    Raises:
        WanlabError: as `OrtEngine`.
    """
    from wanlab.convert.ort.session import LEVELS, PROVIDERS, choose_provider, first_line

    ort = require("onnxruntime", "onnxruntime-gpu")
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    provider = choose_provider(provider)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization])
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{out.name}.data"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_ABOVE_BYTES)
    )
    if provider == "cuda":
        ort.preload_dlls()
    (out.parent / f"{out.name}.data").unlink(missing_ok=True)  # ONNX Runtime appends to it
    try:
        ort.InferenceSession(
            str(path), options, providers=list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
        )
    except Exception as error:  # onnxruntime has one exception class per failure, without a common base
        raise WanlabError(f"ONNX Runtime cannot optimise {Path(path).name}: {first_line(error)}") from error
    return out


def fusions(before: EngineLayers | None, after: EngineLayers | None) -> pd.DataFrame:
    """Operators of a graph and of what an engine made of it; no rows where one of the two is not known.

    Returns:
        type, layers_before, layers_after, change, roles (where the change is, largest first); ordered by how much
        changed.
    """
    import pandas as pd

    sides = (before, after) if before is not None and after is not None else ()
    counts = [Counter((layer.type, layer.role) for layer in side.layers) for side in sides]
    rows = []
    for kind in dict.fromkeys(kind for side in counts for kind, _ in side):
        roles = {role for side in counts for name, role in side if name == kind}
        moved = {role: counts[1][kind, role] - counts[0][kind, role] for role in roles}
        here, there = (sum(side[kind, role] for role in roles) for side in counts)
        changed = sorted(
            (role for role in roles if moved[role]), key=lambda role, moved=moved: -abs(moved[role])
        )
        rows.append(
            (kind, here, there, there - here, ", ".join(f"{role} {moved[role]:+d}" for role in changed))
        )
    frame = pd.DataFrame(rows, columns=["type", "layers_before", "layers_after", "change", "roles"])
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def fused_layers(before: EngineLayers, after: EngineLayers) -> pd.DataFrame:
    """Layers that an engine made by fusing, and the module they stand for.

    Returns:
        name, type, modules, nodes_before: how many nodes of the same modules the graph had that the engine no longer
        has. Only layers of a type that the graph did not have, or that name several modules.
    """
    import pandas as pd

    kinds = {layer.type for layer in before.layers}
    names = {layer.name for layer in after.layers}
    gone = Counter(layer.modules for layer in before.layers if layer.name not in names)
    rows = [
        {
            "name": layer.name,
            "type": layer.type,
            "modules": ", ".join(layer.modules),
            "nodes_before": gone[layer.modules] if len(layer.modules) == 1 else len(layer.nodes),
        }
        for layer in after.layers
        if layer.modules and (layer.type not in kinds or len(layer.modules) > 1)
    ]
    return pd.DataFrame(rows, columns=["name", "type", "modules", "nodes_before"])
