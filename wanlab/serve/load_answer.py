"""The answer of a load test: whether batches pay, what a caller waits, and what bounds the gain."""

from __future__ import annotations

import pandas as pd

from wanlab.core.answer import Answer, answer, fitting, step
from wanlab.core.words import counted, shown
from wanlab.measure.timing import NOT_DISTINGUISHABLE
from wanlab.serve.load_test import ALONE, BATCHES, BatchBound, LoadTest

FEW = 100
"""Requests of a load below which its slowest percent is a single request."""


def load_answer(test: LoadTest, bound: BatchBound | None, requests: int) -> Answer:
    """Whether batches pay at the load at which they bring most, with what could be expected.

    Args:
        bound: what a batch can buy; None where the service is elsewhere. requests: of a load in one round.
    """
    frame = test.frame()
    lost = int((frame["refused"] + frame["failed"]).sum())
    failed = f"{lost} of {int(frame['requests'].sum())} requests were refused or failed." if lost else ""
    if test.best is None:
        return _one_way(test, frame, failed, requests)
    load, gain = test.best
    rows = frame[frame["load"] == load.name].set_index("way")
    batches, alone = rows.loc[BATCHES], rows.loc[ALONE]
    who = "one caller" if load.at_once == 1 else f"{load.at_once} callers at a time"
    clause = gain.clause("serving in batches", "one at a time")
    waits, before = shown(batches["latency_p50_s"], "s"), shown(alone["latency_p50_s"], "s")
    waits = f"half of them wait at most {waits}, {before} without batches"
    headline = fitting(f"With {who}, {clause}; {waits}.", f"With {who}, {clause}.")
    formed = f"its calls held {batches['mean_batch']:.1f} videos on average, at most {test.batch} are allowed"
    tiles = [
        gain.tile(),
        _bound_tile(bound),
        (
            "videos a minute",
            shown(batches["videos_per_min"]),
            f"{shown(alone['videos_per_min'])} one at a time; with {who}",
        ),
        (
            "wait of half the callers",
            shown(batches["latency_p50_s"], "s"),
            f"longest {shown(batches['latency_max_s'], 's')} of {counted(int(batches['completed']), 'video')}",
        ),
        ("videos in a call", f"{batches['mean_batch']:.1f}", f"mean; at most {test.batch}"),
    ]
    told = gain.verdict != NOT_DISTINGUISHABLE
    reason = _reason(bound, formed) if bound else f"In this load {formed}."
    return answer(
        headline,
        reason,
        failed,
        tiles=tiles,
        next=step("gives the slowest percent of the waits", requests=FEW)
        if told
        else step(
            "lowers the noise: more requests in a load, best on an idle machine", requests=4 * requests
        ),
    )


def _reason(bound: BatchBound, formed: str) -> str:
    if bound.together is None:
        return f"In this load {formed}."
    measured = f"the model itself, without a queue, makes {bound.batch} videos together"
    return (
        f"{bound.shared_percent:.0f} % of a video's time is launches, Python and copies, which a batch shares: at most"
        f" {bound.times_faster:.2f} times as fast by that alone; {measured} {bound.together.speedup:.2f} times as fast as"
        f" one after another. In this load {formed}."
    )


def _bound_tile(bound: BatchBound | None) -> tuple[str, str, str] | None:
    if bound is None:
        return None
    shared = f"{bound.times_faster:.2f}× by shared launches, Python and copies alone"
    if bound.together is None:
        return "most it could buy", f"{bound.times_faster:.2f}×", shared
    return (
        "the model itself",
        f"{bound.together.speedup:.2f}×",
        f"{bound.batch} videos together, no service; {shared}",
    )


def _one_way(test: LoadTest, frame: pd.DataFrame, failed: str, requests: int) -> Answer:
    """Where there is one way: no batches, or a service elsewhere."""
    best = frame.loc[frame["videos_per_min"].idxmax()]
    why = f"It makes one video at a time: {test.alone}." if test.alone else ""
    headline = (
        f"The service makes {shown(best['videos_per_min'])} videos a minute ({best['load']}); half of the callers wait at"
        f" most {shown(best['latency_p50_s'], 's')}, the longest {shown(best['latency_max_s'], 's')}."
    )
    return answer(
        headline,
        why,
        failed,
        tiles=[
            ("videos a minute", shown(best["videos_per_min"]), best["load"]),
            ("wait of half the callers", shown(best["latency_p50_s"], "s"), ""),
            ("videos in a call", f"{best['mean_batch']:.1f}", f"mean; at most {test.batch}"),
        ],
        next=step("gives the slowest percent of the waits", requests=max(FEW, requests)),
    )
