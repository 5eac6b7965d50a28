"""Answers of notebooks about whole videos: one configuration, a model beside its original, techniques combined."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from wanlab.core.answer import IDLE, Answer, answer, loss_texts, more_videos, ratio_text, step
from wanlab.core.effects import BASELINE, NOT_APPLIED
from wanlab.core.stats import interval_text
from wanlab.core.words import SMALLEST_PERCENT, capital, sentence, shown, size_text, time_text
from wanlab.engines.registry import engine_text, title_of_label
from wanlab.evaluate.loss import LIMIT_PERCENT, QualityLoss
from wanlab.evaluate.quality import Divergence
from wanlab.measure.baseline import MOST_NOISE_PERCENT
from wanlab.measure.in_turn import timed_text
from wanlab.measure.timing import Comparison, verdict_of
from wanlab.runs.choose import NOT_EXECUTED
from wanlab.runs.compare import SAME, Comparisons
from wanlab.runs.result import UNCHANGED, Result
from wanlab.runs.results import is_number, parameter_text

LONGEST_NAME = 44
"""Longer names of techniques stand in the figure, not in a headline."""


def configuration_answer(
    row: Result, loss: QualityLoss, divergence: Divergence, *, proof: str = ""
) -> Answer:
    """What one configuration costs and how good it is; what was not applied is said first.

    Args:
        row: its result. proof: sentence that shows what was applied.
        loss, divergence: of its videos beside the original's.
    """
    name = capital(engine_text(row.engine))
    name += "" if row.plan in UNCHANGED else f" with plan {row.plan}"
    took, base = shown(row.time_ms, "ms"), row.effect == BASELINE
    noise = math.nan if row.noise_percent is None else row.noise_percent
    sure = f"repeats differ by up to {shown(noise, '%')}" if noise == noise else "noise not known"
    head = "The configuration was not applied, so its figures are the original's. " * (
        row.effect == NOT_APPLIED
    )
    cost = (
        ("time per video", took, sure),
        ("peak memory", shown(row.peak_memory_gib, "GiB"), "of a process of its own"),
    )
    if base:
        following = step("measures another configuration beside this one", engine="onnxruntime")
        if noise > MOST_NOISE_PERCENT:
            following = more_videos(6)
        return answer(
            f"{name} makes a video in {took} ({sure}). It is the original that others are compared with.",
            tiles=(
                *cost,
                ("quality loss", "0 %", "it is the original"),
                ("load time", shown(row.load_ms, "ms"), "until it can run"),
            ),
            next=following,
        )
    within, lost = loss.within(), loss.text.removeprefix("quality loss ")
    judged = {
        "yes": f"It keeps within {LIMIT_PERCENT:g} % of quality loss: {loss.bound}.",
        "no": f"It loses more than {LIMIT_PERCENT:g} % of quality: {lost}.",
        "unknown": "What it loses in quality is not known: no true video belongs to its inputs.",
    }.get(
        within,
        f"Whether it keeps within {LIMIT_PERCENT:g} % of quality loss is not decided: {lost}.",
    )
    if within == "undecided" or noise > MOST_NOISE_PERCENT:
        following = step(
            "decides more, with more cases and repeats", cases=max(8, 2 * loss.cases), iterations=6
        )
    else:
        why = "measures the original in the same way, which says how much faster this is"
        following = step(why, engine="eager", plan=None, configuration=None)
    return answer(
        f"{head}{name} makes a video in {took} ({sure}). {judged}",
        f"{capital(divergence.text)}.",
        proof,
        "The original's time is not measured here, so this says nothing on how much faster it is.",
        tiles=(*cost, ("quality loss", *loss.tile()), divergence.tile()),
        next=following,
    )


def gain_answer(gain: Comparison, loss: QualityLoss, psnr_db: float) -> Answer:
    """Whether an optimised model is faster than its original, and what that costs in quality.

    Args:
        gain: times of whole videos. loss: quality loss over held-out cases. psnr_db: between the two videos.
    """
    name, original = gain.candidate, gain.baseline
    if gain.verdict == "not distinguishable":
        busy = f" while {gain.busy}" if gain.busy else ""
        head = f"No difference in time between {name} and {original} can be told from noise{busy}."
    elif gain.direction_only:
        head = f"{gain.clause(name, original)}."
    else:
        known = ratio_text(gain.speedup, gain.low, gain.high, beside=original)
        head = f"{name} is {'slower: ' if gain.speedup < 1 else ''}{known}."
    noise = f"Two series of {original} differ by up to {gain.noise_percent:.1f} %; a smaller gain would not count."
    if gain.busy:
        following = IDLE._replace(notebook="00_quickstart")
    else:
        following = step(
            "says where the time of a video goes; give your own model with -p model=", "10_baseline"
        )
    return answer(
        f"{head} {loss_words(loss)}",
        f"{noise} The two videos agree to {psnr_db:.0f} dB (PSNR).",
        timed_text([gain]),
        f"Quality loss is how much farther from the true video the optimised one is, over {loss.cases} held-out cases.",
        tiles=(gain.tile(), ("quality loss", *loss.tile())),
        next=following,
    )


def loss_words(loss: QualityLoss) -> str:
    """What was lost in quality as a sentence, and how sure that is."""
    if not loss.known:
        return "What it costs in quality is not known: there is no true video."
    if loss.high_percent is None or loss.low_percent is None:
        cases = f"{loss.cases} case{'s' * (loss.cases != 1)}"
        changes = (
            f"by {loss.percent:+.2f} %" if abs(loss.percent) >= SMALLEST_PERCENT else "by less than 0.01 %"
        )
        return f"Quality changes {changes}, from {cases}, too few to say how sure that is."
    if max(abs(loss.low_percent), abs(loss.high_percent)) < SMALLEST_PERCENT:
        return f"It costs no quality that can be measured: less than {SMALLEST_PERCENT:g} %."
    known = interval_text(loss.low_percent, loss.high_percent, "+.2f")
    if loss.low_percent <= 0 <= loss.high_percent:
        return f"No loss of quality can be told from noise ({known} %)."
    return f"It {'costs' if loss.percent > 0 else 'gains'} {abs(loss.percent):.2f} % of quality ({known} %)."


def technique_title(techniques: str) -> str:
    """`"engine=onnxruntime + plan=uniform-int8"` in words: `"ONNX Runtime with plan uniform-int8"`."""
    titles = []
    for name in techniques.split(" + "):
        axis, _, value = name.partition("=")
        titles.append(title_of_label(value) if axis == "engine" else f"{axis.replace('_', ' ')} {value}")
    return " with ".join([titles[0], *([" and ".join(titles[1:])] if titles[1:] else [])])


def technique_answer(comparisons: Comparisons, matrix: pd.DataFrame, table: pd.DataFrame) -> Answer:
    """The best technique alone, and whether another on top of it gains more.

    Args:
        comparisons: from `compare`. matrix: its `technique_matrix`. table: its `engine_table`.
    """
    alone, combined = (_best(matrix[rows]) for rows in (matrix["moved"] == 1, matrix["moved"] > 1))
    base, by, best = comparisons.baseline.results, comparisons.by, alone if alone is not None else combined
    if all(row is None or _verdict(row) == SAME for row in (alone, combined)):
        head = "No technique gives a difference from the original that can be told from noise."
        if best is not None:
            head += f" The best, {_named(best)}, was {_gain(best)}."
    else:
        parts = []
        if alone is not None:
            holds = f"is {_gain(alone)}"
            if _verdict(alone) == SAME:
                holds = "cannot be told from the original"
            parts.append(f"{_named(alone)} alone {holds}.")
        if combined is not None:
            parts.append(_beside(combined))
            best = combined if _more(combined) else best
        head = " ".join(parts)
    row = next((each for each in comparisons.rows if _moved(comparisons, each) == best["techniques"]), None)
    tiles = [
        (
            f"best {word}",
            f"{each['speedup']:.2f}×",
            f"{_named(each)}; {interval_text(each['low'], each['high'])}",
        )
        for word, each in (("alone", alone), ("combined", combined))
        if each is not None
    ]
    if row is not None:
        tiles += [tile for name in (by, "peak_memory_gib") if (tile := _pair(name, row.results, base))]
        if is_number(loss := row.results.get("quality_loss_percent")):
            ends = [row.results.get(f"quality_loss_{end}_percent") for end in ("low", "high")]
            tiles.append(("quality loss", *loss_texts(loss, *ends)))
    product = "" if combined is None else sentence(str(combined["verdict"]))
    return answer(
        head,
        f"{_named(combined)} beside the product of each alone: {product}" if product else "",
        f"{comparisons.place} {_not_run(table)}",
        tiles=tuple(tiles[:5]),
        next=step("chooses a configuration within a limit of quality loss", "60_sweep"),
    )


def _not_run(table: pd.DataFrame) -> str:
    names = ", ".join(table.loc[table["state"] == NOT_EXECUTED, "engine"])
    return f"Of {names} only the files were built; no device here runs them." if names else ""


def _best(rows: pd.DataFrame) -> Any:
    return rows.loc[rows["speedup"].idxmax()] if len(rows) else None


def _verdict(row: Any) -> str:
    figures = [row[name] for name in ("speedup", "low", "high", "noise_percent")]
    return SAME if math.isnan(row["low"]) else verdict_of(*figures)


def _more(row: Any) -> bool:
    """Whether a combination is faster than the best technique alone, beyond noise; also where that was not measured."""
    ratio, low, high = (row[name] for name in ("of_best", "of_best_low", "of_best_high"))
    return not is_number(ratio) or verdict_of(ratio, low, high, row["noise_percent"]) == "faster"


def _beside(row: Any) -> str:
    """A combination beside the best technique alone."""
    if not is_number(row["of_best"]):
        return f"{_named(row)} is {_gain(row)}."
    if _more(row):
        return f"{_named(row)} gains more: {_gain(row)}."
    beside = [row[name] for name in ("of_best", "of_best_low", "of_best_high", "noise_percent")]
    if not is_number(beside[1]) or verdict_of(*beside) == SAME:
        return "No combination can be told from that alone."
    return f"Combining gains nothing: {_named(row)} is slower, at {row['speedup']:.2f} times."


def _named(row: Any) -> str:
    title = technique_title(row["techniques"])
    return title if len(title) <= LONGEST_NAME else "the best combination"


def _gain(row: Any) -> str:
    return ratio_text(row["speedup"], row["low"], row["high"], beside="the original")


def _moved(comparisons: Comparisons, row: Any) -> str:
    return " + ".join(f"{axis}={parameter_text(row.parameters.get(axis))}" for axis in comparisons.moved(row))


def _pair(name: str, after: Any, before: Any) -> tuple[str, str, str] | None:
    """A figure of the best technique beside the original's."""
    values = [each.get(name) for each in (after, before)]
    if not all(map(is_number, values)):
        return None
    texts = [size_text(value * 2**30) if name.endswith("_gib") else time_text(value) for value in values]
    title = name.rpartition("_")[0].replace("_", " ")
    return title, texts[0], f"original: {texts[1]}"
