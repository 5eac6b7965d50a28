"""What ONNX Runtime's own profiler says of the nodes of a session."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

KERNEL = "_kernel_time"
"""How the events that time a node end; the node's name stands before it."""


def node_times(path: str | os.PathLike, *, warmup: int = 1) -> pd.DataFrame:
    """Time of every node in a profile that `OrtEngine.profile` wrote.

    The nodes are those that are left after fusion, so their number is smaller than the file's. On the CPU a node's time is
    its computation. On a GPU it is what the host takes to launch it: ONNX Runtime's CUDA build does not time kernels.

    Args:
        path: JSON of ONNX Runtime's profiler.
        warmup: first runs to leave out.

    Returns:
        node, operator, provider, runs, time_ms (median over the runs), share_percent of the sum; longest first.

    Raises:
        WanlabError: not such a file, or no more runs in it than `warmup`.
    """
    import pandas as pd

    try:
        with open(path, encoding="utf-8") as file:
            events = json.load(file)
        rows = [
            {
                "node": event["name"].removesuffix(KERNEL),
                "operator": event["args"]["op_name"],
                "provider": event["args"]["provider"],
                "start": event["ts"],
                "time_ms": event["dur"] / 1e3,
            }
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WanlabError(
            f"{path} is no profile of ONNX Runtime ({error}); make one with OrtEngine.profile"
        ) from error
    frame = pd.DataFrame(rows, columns=["node", "operator", "provider", "start", "time_ms"])
    keys = ["node", "operator", "provider"]
    frame = frame.sort_values("start", kind="stable")
    kept = frame[frame.groupby(keys).cumcount() >= warmup]
    if kept.empty:
        raise WanlabError(f"{path} holds no run of a node after {warmup} to warm up; profile more runs")
    found = kept.groupby(keys, as_index=False).agg(runs=("time_ms", "size"), time_ms=("time_ms", "median"))
    found["share_percent"] = 100 * found["time_ms"] / max(found["time_ms"].sum(), 1e-12)
    return found.sort_values("time_ms", ascending=False, ignore_index=True)


def operator_times(nodes: pd.DataFrame) -> pd.DataFrame:
    """`node_times` by operator.

    Returns:
        operator, provider, nodes, time_ms, share_percent; longest first.
    """
    found = nodes.groupby(["operator", "provider"], as_index=False).agg(
        nodes=("node", "size"), time_ms=("time_ms", "sum"), share_percent=("share_percent", "sum")
    )
    return found.sort_values("time_ms", ascending=False, ignore_index=True)
