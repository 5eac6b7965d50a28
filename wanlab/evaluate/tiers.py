"""How good an optimised model is: one of five tiers, each with the rule behind it, or why it is none.

The limits of LPIPS and PSNR are those that open projects gate their releases with, on LPIPS of AlexNet between
the optimised and the original video of the same seed. The floor and the quality loss are this project's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanlab.errors import WanlabError
from wanlab.evaluate.catalogue import CATALOGUE
from wanlab.evaluate.floor import floor_table
from wanlab.evaluate.quality import LIMIT_PERCENT, Divergence, QualityLoss

NUMERIC_PSNR_DB = 40.0  # a root mean square error of 2.55 of 255 levels
NEAR_PSNR_DB = 30.0
NEAR_LPIPS = 0.05
FAITHFUL_LPIPS = 0.10
PERCEPTUAL_TIMES_FLOOR = 2.0
NEAR_LOSS_PERCENT = 1.0


@dataclass(frozen=True)
class TierRule:
    """A tier, what must hold for it, and what that means for a user."""

    name: str
    rule: str
    meaning: str


TIERS = (
    TierRule("exact", "every pixel of every case is equal", "the same files come out"),
    TierRule(
        "numeric",
        f"no metric reaches further than its floor does, or PSNR is at least {NUMERIC_PSNR_DB:g} dB in every case",
        "as far from the original as the unchanged model is from itself, or as rounding makes it",
    ),
    TierRule(
        "near-lossless",
        f"LPIPS under {NEAR_LPIPS:g} and PSNR over {NEAR_PSNR_DB:g} dB; quality loss at most {NEAR_LOSS_PERCENT:g} %",
        "the same video; the difference is seen only side by side",
    ),
    TierRule(
        "faithful",
        f"LPIPS under {FAITHFUL_LPIPS:g}; quality loss at most {LIMIT_PERCENT:g} %",
        "the same content and motion; details differ",
    ),
    TierRule(
        "perceptual",
        f"quality loss at most {LIMIT_PERCENT:g} %; where there is no truth: LPIPS at most"
        f" {PERCEPTUAL_TIMES_FLOOR:g} times the floor",
        "another video, as good as the original",
    ),
    TierRule(
        "undecided",
        f"the interval of the quality loss holds {LIMIT_PERCENT:g} %, or there is one case and no interval",
        "more cases would say whether it is good enough",
    ),
    TierRule(
        "degraded",
        "none of the rules above holds",
        "worse than the original, or far from it with no truth to judge by",
    ),
)
"""From the strictest on. Limits are held by the unfavourable end of the 95 % interval over cases (by the worst case
where there are too few for one), and a rule about quality loss counts only where the truth is known."""


@dataclass(frozen=True)
class Tier:
    """The strictest tier whose rule holds.

    Attributes:
        name: of `TIERS`.
        rule: what must hold for it.
        why: the measured values that decided, and what kept it from the next stricter tier.
    """

    name: str
    rule: str
    why: str

    def row(self) -> dict:
        return {"tier": self.name, "rule": self.rule, "why": self.why}

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def tier(divergence: Divergence, quality_loss: QualityLoss | None = None) -> Tier:
    """The strictest of `TIERS` whose rule holds.

    Args:
        divergence: with LPIPS and PSNR measured; with a floor where `numeric` is to be decided by it.
        quality_loss: None or unknown where there is no truth; then the rules are about divergence alone.

    Raises:
        WanlabError: LPIPS or PSNR was not measured.
    """
    rows = {row["metric"]: row for row in divergence.frame.to_dict("records")}
    for name in ("lpips", "psnr"):
        if name not in rows:
            raise WanlabError(f"a tier needs {name}; measured: {', '.join(rows)}")
    loss = quality_loss if quality_loss is not None and quality_loss.known else None
    failed = ""
    for rule, (holds, why) in zip(TIERS, _judged(rows, _reach(divergence), loss), strict=True):
        if holds:
            return Tier(rule.name, rule.rule, why + (f"; not {failed}" if failed else ""))
        failed = f"{rule.name}: {why}"
    raise AssertionError("the last rule always holds")


def _judged(rows: dict, reach: dict[str, float], loss: QualityLoss | None):
    """Whether each rule holds, and the values that say so, in the order of `TIERS`."""
    lpips, psnr = rows["lpips"], rows["psnr"]
    far, near = _unfavourable(lpips, "high"), _unfavourable(psnr, "low")
    at_most = _loss_text(loss)

    changed = [name for name, row in rows.items() if row["verdict"] != "identical"]
    yield not changed, "no pixel differs" if not changed else f"{changed[0]} differs"

    above = [name for name, row in rows.items() if _far_error(row) > reach.get(name, 0.0)]
    worst = f"worst PSNR {psnr['worst']:.1f} dB"
    floor = "its floor" if reach else "no difference, and no floor is given"
    reason = (
        f"{above[0]} reaches further than {floor}, {worst}"
        if above
        else "no metric reaches further than its floor"
    )
    holds = psnr["worst"] >= NUMERIC_PSNR_DB
    yield not above or holds, worst if above and holds else reason

    measured = f"{_end(lpips)}LPIPS {far:.3g} ({lpips['backbone']}), PSNR {near:.1f} dB, {at_most}"
    fine = loss is None or _loss_end(loss) <= NEAR_LOSS_PERCENT
    yield far < NEAR_LPIPS and near > NEAR_PSNR_DB and fine, measured

    good = loss is not None and _loss_end(loss) <= LIMIT_PERCENT
    yield far < FAITHFUL_LPIPS and (loss is None or good), measured

    if loss is not None:
        yield good, at_most
    else:
        times = far / lpips["floor"] if lpips["floor"] > 0 else math.nan
        reach = "no floor to hold it against" if math.isnan(times) else f"LPIPS {times:.3g} times the floor"
        yield times <= PERCEPTUAL_TIMES_FLOOR, f"{reach}, {at_most}"
    yield loss is not None and loss.within(LIMIT_PERCENT) == "undecided", measured
    yield True, measured


def _far_error(row: dict) -> float:
    """The largest error of an interval; of the worst case where there is no interval."""
    error = CATALOGUE[row["metric"]].error
    ends = [row["worst"]] if math.isnan(row["low"]) else [row["low"], row["high"]]
    return max(map(error, ends))


def _reach(divergence: Divergence) -> dict[str, float]:
    """Metric -> how far the loosest floor reaches: the far end of its own interval, as an error."""
    reach: dict[str, float] = {}
    if divergence.floors:
        for row in floor_table(divergence.floors).to_dict("records"):
            reach[row["metric"]] = max(reach.get(row["metric"], 0.0), _far_error(row))
    return reach


def _unfavourable(row: dict, side: str) -> float:
    return row["worst"] if math.isnan(row[side]) else row[side]


def _end(lpips: dict) -> str:
    return "worst case " if math.isnan(lpips["high"]) else "interval's far end "


def _loss_end(loss: QualityLoss) -> float:
    """The upper end of the interval; the worst case where there is no interval."""
    return (
        max(loss.per_case_percent, default=loss.percent) if loss.high_percent is None else loss.high_percent
    )


def _loss_text(loss: QualityLoss | None) -> str:
    return "quality loss unknown" if loss is None else f"quality loss up to {_loss_end(loss):+.2f} %"
