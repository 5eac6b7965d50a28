"""The answer of a search for the fastest stack of techniques within a limit of quality loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanlab.core.answer import Answer, Tile, answer, fitting, step
from wanlab.core.words import capital, counted, listed
from wanlab.techniques.budget import KEPT, Budget, Judged, Search
from wanlab.techniques.costs import Costs

MORE_CASES = 12
"""Cases of either set that an answer without a winner asks for."""
MORE_S = 120.0
"""Seconds of timing a stack that an answer asks for where noise hid every gain."""


def budget_answer(
    found: Budget,
    *,
    model: str,
    baseline: str,
    cases: int,
    final_cases: int,
    costs: Costs | None = None,
    configuration: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """What is fastest within the limit, how sure that is, and what it rests on.

    Args:
        model: name of the model whose quality was measured. baseline: what the times are read against.
        cases, final_cases: number of cases of the selection, and of the verification.
        costs: table of costs, where times are those of another run.
        configuration: file of the winner. settings: size and steps of the videos, for the next step.
    """
    searched, limit = found.search, found.search.limit_percent
    details = [_basis(model, costs), _choice(found, cases, final_cases), _left_out(searched)]
    if found.winner is None:
        headline, shown = _without(found, model, baseline)
        more = max(MORE_CASES, 2 * cases)
        following = step("narrows the intervals of the quality loss", cases=more, final_cases=more)
        if _slow(found):
            following = step("times longer, best on an idle machine: noise hides the gains", verify_s=MORE_S)
        return answer(
            headline,
            *details,
            tiles=_tiles(found, shown, limit),
            next=following,
        )
    winner = found.winner
    assert winner.gain is not None  # `verify` times every stack
    names = [each.title for each in winner.stack.candidates]
    where = "" if costs is None else f"on {model} "
    heads = []
    for subject in (f"with {listed(names)} the video", f"with {counted(len(names), 'technique')} the video"):
        head = f"Fastest within {limit:g} % quality loss: {winner.gain.clause(subject, baseline)}"
        heads += [f"{head}; {where}{winner.loss.text}."]
    heads.append(f"{head}.")
    return answer(
        fitting(*heads),
        *details,
        tiles=_tiles(found, winner, limit),
        next=step(
            "measures its memory and load time",
            "41_configuration",
            configuration=None if configuration is None else str(configuration),
            case_set="final",
            cases=final_cases,
            **dict(settings or {}),
        ),
    )


def _basis(model: str, costs: Costs | None) -> str:
    """What time and quality are those of."""
    if costs is None:
        return f"Time and quality are those of {model} at this size on this machine."
    return (
        f"Times are those of {costs.model or 'another run'}, read from {costs.source}. Quality is that of {model} at this"
        " size, not of the model that was timed."
    )


def _choice(found: Budget, cases: int, final_cases: int) -> str:
    """Which cases chose, and which judged."""
    count = len(found.search.judged)
    text = f"{counted(count, 'stack')} {'was' if count == 1 else 'were'} measured on {counted(cases, 'clip')} for choosing"
    if not found.verified:
        return f"{text}; nothing was left to verify on others."
    text += f"; what is said above is of {final_cases} others, which nothing was chosen by."
    failed = [
        f"{each.stack.label} ({_why(each, found.search.limit_percent)})"
        for each in found.verified
        if each is not found.winner
    ]
    if failed and found.winner is not None:
        text += f" Faster ones failed there: {'; '.join(failed)}."
        return f"{text} The more are tried, the more a pass owes to luck."
    return text


def _why(each: Judged, limit_percent: float) -> str:
    """Why a stack failed its verification, in words."""
    if not each.passed:
        return "a technique of it did nothing"
    if each.loss.within(limit_percent) != "yes":
        return each.loss.text
    return "no gain that can be told from noise" if each.speedup > 1 else "no gain"


def _slow(found: Budget) -> bool:
    """Whether time alone kept every verified stack from winning."""
    return bool(found.verified) and all(each.gain is not None for each in found.verified)


def _left_out(searched: Search) -> str:
    """What was not measured, and which candidates were left out, each with the reason in a word."""
    parts = []
    if searched.left:
        parts.append(
            f"The time limit of {searched.limit_s:g} s came before {counted(len(searched.left), 'stack')} more."
        )
    fates: dict[str, list[str]] = {}
    for candidate, each in searched.alone.items():
        if each.fate != KEPT:
            fates.setdefault(each.fate, []).append(candidate.title)
    for candidate, reason in searched.missing.items():
        if "time limit" not in reason:
            fates.setdefault("cannot be measured here", []).append(candidate.title)
    parts += [f"{capital(fate)}: {', '.join(names)}." for fate, names in fates.items()]
    return " ".join(parts)


def _without(found: Budget, model: str, baseline: str) -> tuple[str, Judged | None]:
    """The headline where nothing holds the limit, and the stack that it speaks of."""
    searched, limit = found.search, found.search.limit_percent
    if found.verified:
        last, count = found.verified[-1], len(found.verified)
        tried = (
            f"Each of the {count} fastest stacks that kept" if count > 1 else "The fastest stack that kept"
        )
        if count == 1 and not found.more:
            tried = "The one stack that kept"
        head = f"{tried} within {limit:g} % quality loss on the clips of the choice failed on others"
        return fitting(f"{head}; {last.stack.label}: {_why(last, limit)}.", f"{head}."), last
    worked = [each for each in searched.judged if each.passed]
    unknown = [each for each in worked if not each.loss.known and each.gain is not None]
    if unknown:
        fastest = max(unknown, key=lambda each: each.speedup)
        assert fastest.gain is not None
        head = "Which techniques stay within the limit is unknown, as no true video belongs to these inputs"
        clause = fastest.gain.clause(f"the fastest, {fastest.stack.label},", baseline)
        return fitting(f"{head}; {clause}.", f"{head}."), fastest
    known = [each for each in worked if each.loss.known]
    none = f"No stack of techniques is known to be faster than {baseline} within {limit:g} % quality loss of {model}"
    if not known:
        return f"{none}: none of them had an effect.", None
    mildest = min(
        known,
        key=lambda each: each.loss.percent if each.loss.high_percent is None else each.loss.high_percent,
    )
    return fitting(f"{none}; the mildest, {mildest.stack.label}: {mildest.loss.text}.", f"{none}."), mildest


def _tiles(found: Budget, shown: Judged | None, limit: float) -> list[tuple[str, str, str] | None]:
    searched = found.search
    count = len(searched.judged)
    held = len(searched.promising())
    measured = Tile(
        "stacks measured", str(count), f"{held} of them faster within {limit:g} % on the clips of the choice"
    )
    if shown is None:
        return [
            measured,
            Tile("quality loss", "unknown", "nothing to show"),
            Tile("speed-up", "none", "no effect"),
        ]
    before = next((each for each in searched.judged if each.stack.key == shown.stack.key), shown)
    return [
        Tile("speed-up", "not timed", "as it loses too much or did nothing")
        if shown.gain is None
        else shown.gain.tile(),
        Tile("quality loss", *shown.loss.tile(limit)),
        None if shown is before else Tile("loss on the clips of the choice", *before.loss.tile(limit)),
        measured,
    ]
