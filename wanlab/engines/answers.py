"""What an export, an engine and a build say at the top of their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wanlab.core.answer import Answer, Tile, speed_text
from wanlab.core.stats import ends_text, interval_text
from wanlab.core.words import apart_text, capital, component_text, counted, listed, shown
from wanlab.engines.parity import ParitySummary, float16_text
from wanlab.engines.registry import engine_text
from wanlab.engines.tensorrt.build import EngineBuilds
from wanlab.evaluate.quality import Divergence
from wanlab.measure.timing import NOT_DISTINGUISHABLE, Comparison

FORM_NAMES = {
    "original": "as it is traced",
    "friendly": "with the export-friendly form",
    "fused": "with ONNX's fused operators",
    "eager": "in eager PyTorch",
}
"""Form of a network in a table of `compare_forms` -> its name for readers."""


def export_answer(
    exports: pd.DataFrame,
    components: int,
    summary: ParitySummary,
    forms: pd.DataFrame | None = None,
    ranges: pd.DataFrame | None = None,
) -> Answer:
    """Whether every component became a correct graph, how near the graphs are, and what the better form gains.

    Args:
        exports: from `export.report_frame`, a row per file.
        components: number of components of the model.
        summary: from `parity_summary`.
        forms: from `compare_forms`, where an expert was exported. ranges: from `value_ranges`.
    """
    files = exports.drop_duplicates("component")
    worst, limit = apart_text(summary.worst["relative_l2"]), apart_text(summary.tolerance)
    where = component_text(summary.worst["component"])
    made = f"all {components}" if len(files) == components else f"{len(files)} of {components}"
    right = summary.agree == summary.components
    if right:
        head = f"{capital(made)} components became correct ONNX graphs"
    else:
        head = f"Not every graph is correct: {summary.agree} of {summary.components} agree with PyTorch"
    headline = f"{head}: the {where} is farthest from PyTorch with {worst}, where {limit} is allowed."
    nodes = [int(files[name].sum()) for name in ("nodes_before", "nodes_after")]
    tiles = [
        Tile("correct graphs", f"{summary.agree} of {summary.components}", f"of {components} components"),
        Tile("largest distance to PyTorch", worst, f"{limit} allowed; {where}"),
        Tile("graph nodes", f"{nodes[1]:,}", f"{nodes[0]:,} as traced"),
        Tile(
            "size of the files",
            shown(int(exports["size_bytes"].sum()), "bytes"),
            counted(len(exports), "graph"),
        ),
    ]
    details = []
    if gain := _best_form(forms):
        details.append(gain[0])
        tiles.append(gain[1])
    details += [float16_text(ranges)] if ranges is not None else []
    details.append(
        "Next: 21_onnxruntime makes whole videos with these graphs, and times them."
        if right
        else "Next: the table of blocks below says where the distance begins."
    )
    return Answer(headline, tuple(details), tuple(tiles))


def _best_form(forms: pd.DataFrame | None) -> tuple[str, Tile] | None:
    """The fastest form of an expert beside the network as it is traced, as a sentence and a key figure."""
    if forms is None:
        return None
    others = forms[forms["form"].isin(("friendly", "fused"))]
    if others.empty:
        return None
    best = others.loc[others["ratio"].idxmax()].to_dict()
    name = FORM_NAMES[best["form"]]
    figures = (best["ratio"], best.get("low", math.nan), best.get("high", math.nan))
    words = speed_text(
        *figures,
        candidate=f"An expert {name}",
        baseline=f"one {FORM_NAMES['original']}",
        same=best["verdict"] == NOT_DISTINGUISHABLE,
        noise_percent=best.get("noise_percent", math.nan),
    )
    return f"{words}.", Tile("gain of the best form", f"{figures[0]:.2f}×", interval_text(*figures[1:]))


def engine_answer(
    gain: Comparison,
    divergence: Divergence,
    operators: pd.DataFrame,
    component: str,
    candidate: str = "onnxruntime",
) -> Answer:
    """How much faster an engine makes a video, whether it is the same video, and where its time goes.

    Args:
        gain: of whole videos, beside eager PyTorch.
        operators: from `operator_times`, of `component`.
        candidate: label of the engine.
    """
    name, base = engine_text(candidate), engine_text("eager")
    same = gain.verdict == NOT_DISTINGUISHABLE
    figures = (gain.speedup, gain.low, gain.high)
    speed = speed_text(*figures, candidate=name, baseline=base, same=same, noise_percent=gain.noise_percent)
    top = operators.iloc[0]
    least = gain.noise_percent
    return Answer(
        f"{speed}; {divergence.text}.",
        (
            f"{top['operator']} takes {top['share_percent']:.0f} % of the {component_text(component)}'s time in it.",
            "Next: 41_configuration with configuration or engine says what it loses on held-out cases.",
        ),
        (
            Tile("speed-up", f"{gain.speedup:.2f}×", f"{interval_text(*figures[1:])}; noise {least:.0f} %"),
            Tile(
                "time per video", shown(gain.candidate_ms, "ms"), f"{shown(gain.baseline_ms, 'ms')} in {base}"
            ),
            divergence.tile(),
        ),
    )


def build_answer(builds: EngineBuilds, graphs: Sequence[Any], executed: pd.DataFrame) -> Answer:
    """Which graphs became engines, for which GPUs, what that cost, and what was executed.

    Args:
        graphs: all that were to be built. executed: from `try_engines`.
    """
    targets = sorted({each for info in builds.built for each in info.compute_capabilities}, key=float)
    ran = executed[executed["executed"]]
    done = f"{len(builds.built)} of {len(graphs)}"
    gpus = f" for GPUs of compute capability {listed(targets)}" if targets else ""
    head = f"{done} graphs became engines of {builds.runtime}{gpus}"
    if ran.empty:
        headline = f"{head}; none of them could run on this machine, so their speed is not known."
        following = "Next: 22_tensorrt on one of these GPUs runs and times them."
    else:
        worst = apart_text(ran["relative_l2"].max())
        headline = f"{head}; {len(ran)} ran here, at most {worst} from PyTorch."
        following = "Next: 41_configuration with engine=tensorrt times whole videos."
    took, sizes = sum(info.time_ms for info in builds.built), [info.size_bytes for info in builds.built]
    refused = f"{counted(len(builds.refused), 'build')} refused: see below." if len(builds.refused) else ""
    return Answer(
        headline,
        tuple(filter(None, [refused, following])),
        (
            Tile("engines", done, builds.runtime),
            Tile(
                "GPUs",
                counted(len(targets), "generation"),
                listed(targets) and f"compute capability {listed(targets)}",
            ),
            Tile("build time", shown(took, "ms"), "of all engines, on this machine"),
            Tile(
                "size",
                shown(sum(sizes), "bytes"),
                f"{ends_text(*_range(sizes), ',.0f')} KiB each" if sizes else "",
            ),
            Tile(
                "executed here", f"{len(ran)} of {len(builds.built)}", "" if len(ran) else "no such GPU here"
            ),
        ),
    )


def _range(sizes: Sequence[int]) -> tuple[float, float]:
    return min(sizes) / 2**10, max(sizes) / 2**10
