"""The answer of a notebook that tried out techniques."""

from __future__ import annotations

import pandas as pd

from wanlab.core.answer import Answer, Step, answer, fitting, step
from wanlab.core.words import capital, percent_text
from wanlab.techniques.trial import Trial, Tried

ENOUGH_CASES = 8
"""Cases beyond which an answer no longer asks for more."""


def cache_answer(trial: Trial, limit_percent: float, cases: int) -> Answer:
    """What a step cache buys within a limit of quality loss: the variant that skips most, if its gain can be told.

    Args:
        limit_percent: limit of the quality loss, at the upper end of its interval.
        cases: number of cases.
    """
    within = trial.within(limit_percent)
    idle = [tried for tried in trial.variants if not tried.passed]
    detail = (
        f"{capital(idle[0].label)} skipped nothing in at least one of the videos: it is too low to do anything."
        if idle
        else ""
    )
    if not within:
        working = [tried for tried in trial.variants if tried.passed]
        least = min(working or trial.variants, key=_upper)
        none = f"No setting of the cache is known to stay within {limit_percent:g} % quality loss."
        headline = fitting(
            f"{none} The mildest, {least.label}, skips {percent_text(least.skipped_percent)} of calls: {least.loss.text}.",
            none,
        )
        return answer(
            headline,
            detail,
            tiles=_tiles(trial, least, limit_percent),
            next=next_step(least, cases, AFTER_CACHE),
        )
    best = max(within, key=lambda tried: tried.skipped_percent)
    gain = trial.comparison(best.label)
    speed = gain.clause("the video", "the original")
    skips = f"With {best.label}, {percent_text(best.skipped_percent)} of the denoiser's calls are skipped"
    headline = fitting(f"{skips}, and {speed}; {best.loss.text}.", f"{skips}, and {speed}.")
    return answer(
        headline, detail, tiles=_tiles(trial, best, limit_percent), next=next_step(best, cases, AFTER_CACHE)
    )


def _upper(tried: Tried) -> float:
    high = tried.loss.high_percent
    return tried.loss.percent if high is None else high


def _tiles(trial: Trial, tried: Tried, limit_percent: float) -> list[tuple[str, str, str]]:
    gain = trial.comparison(tried.label)
    skipped = 100 * tried.calls.groupby("component")["skipped"].mean()
    apart = ", ".join(
        f"{percent_text(share)} of the {name.removeprefix('expert_')}-noise expert's"
        if name != "expert"
        else percent_text(share)
        for name, share in skipped.items()
    )
    return [
        ("calls skipped", percent_text(tried.skipped_percent), apart),
        gain.tile(),
        (
            "most it could buy",
            f"{tried.times_faster_at_most:.2f}×",
            "if every call that may be skipped were, at no cost",
        ),
        ("quality loss", *tried.loss.tile(limit_percent)),
    ]


AFTER_CACHE = step(
    "measures it as a configuration, with memory and load time", "41_configuration", configuration="cached"
)


def next_step(tried: Tried, cases: int, otherwise: Step) -> Step:
    """More cases where they would narrow the interval of a quality loss; else another step."""
    if tried.loss.known and (tried.loss.low_percent is None or cases < ENOUGH_CASES):
        return step("narrows the interval of the quality loss", cases=ENOUGH_CASES)
    return otherwise


def skipped_steps(calls: pd.DataFrame) -> pd.DataFrame:
    """Variant, step and component -> percent of the calls, of all cases and branches, that were skipped."""
    keys = ["variant", "step", "component"]
    skipped = calls.assign(skipped_percent=100.0 * calls["skipped"])
    return skipped.groupby(keys, sort=False)["skipped_percent"].mean().reset_index()
