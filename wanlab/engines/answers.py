"""What an export, an engine and a build say at the top of their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wanlab.core.answer import IDLE, Answer, Tile, answer, fitting, speed_text, step
from wanlab.core.stats import interval_text
from wanlab.core.words import (
    SMALLEST,
    apart_text,
    capital,
    component_text,
    counted,
    listed,
    percent_text,
    shown,
)
from wanlab.engines.parity import ParitySummary, float16_text
from wanlab.engines.registry import engine_text
from wanlab.engines.tensorrt.build import EngineBuilds
from wanlab.evaluate.quality import Divergence
from wanlab.measure.in_turn import timed_text
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
    apart = percent_text(100 * summary.worst["relative_l2"], SMALLEST)
    headline = f"{head}: the {where} differs most from PyTorch, by {apart}, where {limit} is allowed."
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
    if right:
        following = step("makes whole videos with these graphs, and times them", "21_onnxruntime")
    else:
        following = step("Look up in the table of blocks below where the distance begins")
    return answer(headline, *details, tiles=tiles, next=following)


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
    stages: pd.DataFrame,
    operators: pd.DataFrame,
    component: str,
    candidate: str = "onnxruntime",
) -> Answer:
    """How much faster an engine makes a video, which components take its time, and whether it is the same video.

    Args:
        gain: of whole videos, beside eager PyTorch.
        stages: time of every component in one video of each, from `compare_models(...).breakdown`.
        operators: from `operator_times`, of `component`.
        candidate: label of the engine.
    """
    name, base = engine_text(candidate), engine_text("eager")
    speed = gain.clause(name, base)
    top, shares = operators.iloc[0], _shares(stages, f"{candidate}_percent")
    first, noise = shares[0], shown(gain.noise_percent, "%")
    why = "measures its quality on pictures whose true videos are known, and its memory"
    following = step(why, "41_configuration", engine=candidate, cases=8)
    most = f"The {first[0]} take{'s' * (first[0] != BOTH)} {first[1]:.0f} % of the time."
    same = f"{capital(divergence.text)}."
    return answer(
        # A busy machine takes words; the share stands among the key figures too.
        fitting(f"{speed}. {most} {same}", f"{speed}. {same}"),
        f"A video takes {shown(gain.candidate_ms, 'ms')} in {name}, {shown(gain.baseline_ms, 'ms')} in {base}. Two"
        f" series of {base} may differ by {noise} by chance, and a smaller gain would not count. {timed_text([gain])}",
        f"Of the {component_text(component)}'s own time, {top['operator']} takes {top['share_percent']:.0f} %.",
        tiles=(
            gain.tile(),
            *(Tile(part, f"{share:.0f} %", f"of a video in {name}") for part, share in shares[:3]),
            divergence.tile(),
        ),
        next=IDLE._replace(notebook="21_onnxruntime") if gain.direction_only else following,
    )


BOTH = "two experts"


def _shares(stages: pd.DataFrame, column: str) -> list[tuple[str, float]]:
    """Parts of a video with their share of its time in percent, largest first; both experts together are one part."""
    sums: dict[str, float] = {}
    experts = stages["component"].str.startswith("expert")
    both = BOTH if experts.sum() > 1 else "expert"
    for part, share in zip(stages["component"], stages[column], strict=True):
        name = both if part.startswith("expert") else component_text(part)
        name = "work around the networks" if part == "other" else name
        sums[name] = sums.get(name, 0.0) + (0.0 if math.isnan(share) else share)
    return sorted(sums.items(), key=lambda each: -each[1])


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
        following = step("Run this notebook on one of these GPUs: it executes the engines there")
    else:
        worst = apart_text(ran["relative_l2"].max())
        headline = f"{head}; {len(ran)} ran here, at most {worst} from PyTorch."
        following = step(
            "times whole videos and measures their quality", "41_configuration", engine="tensorrt"
        )
    took, sizes = sum(info.time_ms for info in builds.built), [info.size_bytes for info in builds.built]
    refused = f"{counted(len(builds.refused), 'build')} refused: see below." if len(builds.refused) else ""
    return answer(
        headline,
        refused,
        tiles=(
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
                f"{shown(min(sizes), 'bytes')} to {shown(max(sizes), 'bytes')} each" if sizes else "",
            ),
            Tile(
                "executed here", f"{len(ran)} of {len(builds.built)}", "" if len(ran) else "no such GPU here"
            ),
        ),
        next=following,
    )
