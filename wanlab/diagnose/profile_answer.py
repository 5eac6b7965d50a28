"""The answer of a profile: which part takes most of the time, which code that is, and what a change there can gain."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from wanlab.core.answer import Answer, Step, answer, step
from wanlab.core.words import percent_text, sentence, time_text
from wanlab.diagnose.breakdown import GAP_US, Breakdown
from wanlab.diagnose.flame import Difference
from wanlab.diagnose.operators import code_words

APART_PERCENT = 2.0
"""Difference of the rows to the recorded wall clock that is said."""
MOST_BOUND = 100.0
"""A larger bound says only that there is nothing else in the trace."""
MOST_OF_IT_PERCENT = 50.0
"""Share of a row from which one operator is named for it."""
REACHED_PERCENT = 95.0
"""Share of what the device can do from which nothing is left to gain by better kernels."""
PLURAL = ("linear", "launch_and_idle", "host_device_transfer")
PLAIN = ("linear", "launch_and_idle")
"""Rows whose name says what their code is."""
NEXT = {
    "self_attention": step("shows what each head looks at and what could be skipped", "13_attention"),
    "cross_attention": step("shows what each head looks at and what could be skipped", "13_attention"),
    "linear": step("measures which layers a smaller number format harms least", "30_sensitivity"),
    "expert_switching": step("shows what a switch costs and how it can be hidden", "12_experts"),
    "memory_allocation": step("shows what is allocated, and what lowers it", "14_memory"),
    "vae_decoder": step("times it on ONNX Runtime beside PyTorch", "42_component", component="vae_decoder"),
    "vae_encoder": step("times it on ONNX Runtime beside PyTorch", "42_component", component="vae_encoder"),
    "text_encoder": step("times it on ONNX Runtime beside PyTorch", "42_component", component="text_encoder"),
}
"""Row with most time -> what to do next."""
RANKS = step("ranks what to change, with the most that each change can gain", "15_triage")


def whole_percent(percent: float) -> str:
    """A share as headline, figure and table show it: in whole percent, and never as a zero."""
    return f"{percent:.0f} %" if percent >= 0.95 or not percent else "< 1 %"


def profile_answer(
    shares: Breakdown,
    caveat: str = "",
    changed: Difference | None = None,
    bounds: pd.DataFrame | None = None,
    trace: str | None = None,
) -> Answer:
    """Where most time goes, which code that is, and what a change there can gain at most.

    Args:
        shares: the breakdown of the profile.
        caveat: sentence that stands first below the headline, such as that of `other_model`.
        changed: difference by category to a second trace; then the headline is about that change.
        bounds: table of `bounds`; with it a detail says how near the code comes to what the device can do.
        trace: file that the profile was read from; None where it was captured in this run.
    """
    top = shares.frame.iloc[0]
    category = str(top["category"])
    name = with_article(shares.name_of(category))
    code = _code_clause(shares, category)
    head = (
        f"{name[:1].upper()}{name[1:]} take{'' if category in PLURAL else 's'} {whole_percent(top['share_percent'])} of the"
        f" time{f', and {code}' if code else ''}."
    )
    if top["amdahl_bound"] <= MOST_BOUND:
        head += f" Without all of that a video would be {top['amdahl_bound']:.2f} times as fast, no more."
    elif category == "launch_and_idle":
        head = f"There is almost no work in the trace: {100 - top['share_percent']:.2g} % of {time_text(shares.wall_ms)}."
    head += " One profile: how much this varies is not known."
    if changed is not None:
        head, first = changed.headline, head
        caveat = f"{caveat.strip()} Before: {first[:1].lower()}{first[1:]}"
    return answer(
        head,
        caveat,
        _code_detail(shares, category, bounds),
        " ".join([_closure(shares), *map(sentence, shares.cautions)]),
        next=_next(category, changed, trace),
        tiles=_tiles(shares),
    )


def _next(category: str, changed: Difference | None, trace: str | None) -> Step:
    if changed is not None:
        return step("times videos without the profiler, and says how much equal ones differ", "10_baseline")
    if trace is not None:
        return step("ranks what to change by this profile", "15_triage", trace=trace)
    return NEXT.get(category, RANKS)


def with_article(name: str) -> str:
    """Name of a row inside a sentence: "the VAE decoder", "self-attention"."""
    return f"the {name}" if name.endswith("coder") else name


def _codes(shares: Breakdown, category: str) -> pd.Series:
    """Time of every operator or kernel of a category, the longest first."""
    rows = shares.codes[shares.codes["category"] == category]
    return rows.set_index("code")["time_ms"].sort_values(ascending=False)


def _code_clause(shares: Breakdown, category: str) -> str:
    """How much of a category its main code is: "83 % of it is 3D convolution"; "" where that is not known."""
    codes = _codes(shares, category)
    sums = codes.groupby(codes.index.map(code_words)).sum().drop("", errors="ignore")
    if sums.empty or category in PLAIN:
        return ""
    share = whole_percent(100 * sums.max() / codes.sum())
    return f"{'all' if share == '100 %' else share} of it is {sums.idxmax()}"


def _code_detail(shares: Breakdown, category: str, bounds: pd.DataFrame | None) -> str:
    """Which code has most of the time of a category, by its name, and how well the category uses the device."""
    codes, name, said = _codes(shares, category), with_article(shares.name_of(category)), []
    share = 100 * codes.iloc[0] / codes.sum() if len(codes) and codes.sum() else 0.0
    if share >= MOST_OF_IT_PERCENT:
        said.append(f"the code is {codes.index[0]}, with {whole_percent(share)} of that time")
    if bounds is not None:
        reached = float(bounds.set_index("category")["of_roofline_percent"].get(category, math.nan))
        if reached < REACHED_PERCENT:
            runs = f"{name} run{'' if category in PLURAL else 's'}"
            said.append(
                f"{runs} at {whole_percent(reached)} of the best that this device can do for the same work"
            )
    return sentence("; ".join(said))


def _closure(shares: Breakdown) -> str:
    """Whether the rows add up to the recorded wall clock."""
    if abs(shares.residual_percent) <= APART_PERCENT:
        return f"The rows add up to the wall clock within {max(abs(shares.residual_percent), 0.1):.1f} %."
    return (
        f"The rows add up to {time_text(shares.frame['time_ms'].sum())}, but the generation took"
        f" {time_text(shares.recorded_ms or 0.0)}: the trace is not of all of it."
    )


def _tiles(shares: Breakdown) -> tuple[Any, ...]:
    """Key figures: the three largest rows with their code, how busy the device is, and the time of the profile."""
    gpu = shares.gpu
    busy = (
        "processor computes",
        whole_percent(shares.host_busy_percent),
        "of the time; else Python, or it waits",
    )
    if gpu:
        gaps = f"gaps over {GAP_US:.0f} µs between kernels: {gpu['launch_gaps']:,}"
        busy = ("GPU busy", percent_text(gpu["busy_percent"]), gaps)
    rows = [
        (shares.name_of(row.category), whole_percent(row.share_percent), _beside(shares, row))
        for row in shares.frame.head(3).itertuples()
    ]
    return (
        *rows,
        busy,
        ("profiled generation", time_text(shares.wall_ms), "longer than without the profiler"),
    )


def _beside(shares: Breakdown, row: Any) -> str:
    code = _code_clause(shares, row.category)
    return f"{time_text(row.time_ms)}{f'; {code}' if code else ''}"
