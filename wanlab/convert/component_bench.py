"""Components of a model on PyTorch and on engines, benchmarked on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wanlab import measure
from wanlab.convert.clip import default_shape
from wanlab.convert.components import check_components, recipe
from wanlab.convert.torch_engine import TorchEngine

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.convert.engine import Engine


def bench_components(
    model,
    engines: Mapping[str, Engine],
    components: Sequence[str] | None = None,
    *,
    iterations: int = 10,
    duration_ms: float = 1000.0,
    warmup_ms: float = 200.0,
    transfers: bool = True,
    seed: int = 0,
    progress: bool = True,
    **size: int | None,
) -> pd.DataFrame:
    """`measure.bench` of eager PyTorch and of an engine, component by component.

    Args:
        model: from `wanlab.models.load`, all components eager.
        engines: component -> engine. components: which of them; None takes the experts.
        iterations, duration_ms, warmup_ms, transfers: as in `measure.bench`.
        seed: of the inputs. size: batch (1 by default), height, width, frames, text_tokens; the model's own where None.

    Returns:
        component, and the columns of `measure.bench_table`; eager is the baseline of each component.

    Raises:
        WanlabError: a component that the model lacks, or whatever `measure.bench` refuses.
    """
    import pandas as pd
    import torch

    names = [n for n in engines if n.startswith("expert")] if components is None else list(components)
    check_components(model, names)
    shape = default_shape(model, **size | {"batch": size.get("batch") or 1})
    settings = {
        "iterations": iterations,
        "duration_ms": duration_ms,
        "warmup_ms": warmup_ms,
        "transfers": transfers,
        "progress": progress,
    }
    tables = []
    for name in names:
        plan = recipe(model, name)
        inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
        feeds = dict(zip(plan.inputs, inputs, strict=True))
        eager = measure.bench(TorchEngine(model, name), feeds, **settings)
        table = measure.bench_table([eager, measure.bench(engines[name], feeds, **settings)])
        table.insert(0, "component", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def provider_table(engines: Mapping[str, Engine]) -> pd.DataFrame:
    """Where the nodes of ONNX Runtime engines run.

    Args:
        engines: component -> `OrtEngine`.

    Returns:
        component, provider, nodes, share_percent of the component's nodes, operators (the three with most nodes).
    """
    import pandas as pd

    rows = []
    for component, engine in engines.items():
        counts = engine.nodes_by_provider()
        total = counts["nodes"].sum()
        for provider, part in counts.groupby("provider"):
            first = ", ".join(f"{row.nodes} {row.operator}" for row in part.head(3).itertuples())
            rows.append(
                {
                    "component": component,
                    "provider": provider,
                    "nodes": int(part["nodes"].sum()),
                    "share_percent": 100 * part["nodes"].sum() / total,
                    "operators": first,
                }
            )
    return pd.DataFrame(rows)
