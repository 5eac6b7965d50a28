"""Quality of optimised outputs: divergence against its noise floor, and tiers from exact to lossy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from wanlab.core.answer import Tile
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.stats import bootstrap_mean
from wanlab.core.words import SMALLEST, between_text, shown
from wanlab.evaluate.catalogue import CATALOGUE, METRICS, NUMERIC_PSNR_DB
from wanlab.evaluate.loss import LIMIT_PERCENT, QualityLoss, loss_to_truth, quality_loss
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.scores import Scores, mean_score, same_backbone
from wanlab.models.variants import alternate_sdpa, compile_blocks

__all__ = ["LIMIT_PERCENT", "Divergence", "QualityLoss", "divergence", "loss_to_truth", "quality_loss"]


HOLDS = {
    "identical": "the videos are identical",
    "within floor": "the outputs differ by no more than the noise floor",
    "above floor": "the outputs differ by more than the noise floor",
    "no floor": "the noise floor is not known",
}
"""Verdict of a divergence -> its explanation."""

NEAR_LPIPS = 0.05
FAITHFUL_LPIPS = 0.10
LOOKS = (
    (NEAR_LPIPS, "the videos look alike; differences are seen only side by side"),
    (FAITHFUL_LPIPS, "the videos show the same content and motion, with other details"),
)
"""LPIPS below which two videos look so, and the words for it."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """Difference between optimised and original outputs, with its noise floor.

    Attributes:
        frame: one row per metric: metric, backbone, cases, mean, low, high (95 % bootstrap interval
            over cases, unknown (NaN) for fewer than three cases), worst, floor, floor_name (the largest noise floor; of a
            metric whose perfect score has two bad sides, that score plus the mean distance from it),
            ratio_to_noise_floor (ratio to the noise floor: error over the floor's error; error is LPIPS, 1 - SSIM, MSE,
            flicker, or the distance from a perfect copy's score), and verdict:
            `"identical"`, `"within floor"`, `"above floor"` (with several cases: the whole interval
            is above it) or `"no floor"`.
        scores: the scores of each case.
        floors: the scores of each noise floor, by name.
    """

    frame: pd.DataFrame
    scores: tuple[Scores, ...]
    floors: dict[str, tuple[Scores, ...]]

    def verdict(self, metric: str = "lpips") -> str:
        return self._row(metric)["verdict"]

    @property
    def conclusion(self) -> str:
        """What the main metric shows, such as "the outputs differ by no more than the noise floor"."""
        return HOLDS[self._main_row()["verdict"]]

    @property
    def text(self) -> str:
        """How far the videos are from the original's, in a clause for readers."""
        row = self._main_row()
        if row["verdict"] == "identical":
            return "the videos are identical in every pixel"
        if row["verdict"] == "within floor" or self._only_rounding():
            return "the videos are the same to the eye; they differ by no more than rounding"
        if row["metric"] != "lpips":
            return f"the videos differ ({row['metric'].upper()} {shown(row['mean'])})"
        far = row["worst"] if math.isnan(row["high"]) else row["high"]
        words = next((words for limit, words in LOOKS if far < limit), "the videos look different")
        return f"{words} (LPIPS {shown(row['mean'])}, 0 is equal)"

    def _only_rounding(self) -> bool:
        """Whether every case is nearer than what can be told from rounding, by its PSNR."""
        rows = self.frame[self.frame["metric"] == "psnr"]
        return bool(len(rows)) and float(rows["worst"].iloc[0]) >= NUMERIC_PSNR_DB

    def tile(self) -> Tile:
        """The key figure of the main metric, beside what rounding alone does."""
        row = self._main_row()
        if row["verdict"] == "identical":
            return Tile("difference to the original", "none", "every pixel is equal")
        floor, several = row["floor"], row["low"] == row["low"] and row["high"] >= SMALLEST
        beside = [between_text(row["low"], row["high"])] * several
        beside += [f"rounding alone {shown(floor)}"] * (floor == floor)
        return Tile(
            f"{row['metric'].upper()} to the original",
            shown(row["mean"]),
            "; ".join(beside),
        )

    def differing(self, case: int) -> Scores | None:
        """The scores of a case; None where every pixel is equal and there is nothing to look at."""
        row = self.scores[case].summary.set_index("metric")["mean"]
        same = all(CATALOGUE[metric].error(value) <= 0 for metric, value in row.items())
        return None if same else self.scores[case]

    def worst_case(self, metric: str = "lpips") -> int:
        """Index of the case with the largest difference."""
        self._row(metric)
        error = CATALOGUE[metric].error
        return max(range(len(self.scores)), key=lambda case: error(self.scores[case].mean(metric)))

    def _row(self, metric: str) -> dict:
        rows = self.frame[self.frame["metric"] == metric]
        if rows.empty:
            raise WanlabError(
                f"this divergence holds no {metric!r}; measured: {', '.join(self.frame['metric'])}"
            )
        return rows.iloc[0].to_dict()

    def _main_row(self) -> dict:
        """LPIPS where it was measured, else the first metric."""
        return self._row("lpips" if "lpips" in set(self.frame["metric"]) else self.frame["metric"].iloc[0])

    def __str__(self) -> str:
        row = self._main_row()
        floor = ""
        if row["floor_name"] is not None and row["verdict"] != "identical":
            times = _times_text(row["ratio_to_noise_floor"])
            floor = f", {times} the floor of {row['floor']:.3g} ({row['floor_name']})"
        backbone = f" ({row['backbone']})" if row["metric"] == "lpips" else ""
        return f"{self.conclusion}: {row['metric'].upper()}{backbone} {row['mean']:.3g}{floor}"


def divergence(
    original,
    optimized,
    floor=None,
    *,
    metrics: Sequence[str] | str = METRICS,
    backbone: str = "auto",
    device="auto",
    progress: bool = True,
    seed: int = 0,
) -> Divergence:
    """Difference between optimised and original outputs, compared with the noise floor.

    Args:
        original, optimized: a video (as for `compare_videos`), or lists of them, one per
            case, in the same order and generated with the same seeds and inputs.
        floor: outputs of the unchanged model that differ by noise only: a tuple `(video, video)` of two runs,
            a list of such tuples, `Scores`, a list of `Scores`, or a dictionary that names several
            floors, each one of these; or `Floors`. Of several, the largest is used. None: no floor.
        metrics, backbone, device, progress: as for `compare_videos`.
        seed: seed of the bootstrap over cases.

    Raises:
        WanlabError: as for `compare_videos`; different numbers of cases; no case; a floor that was
            scored with another backbone or lacks a metric.
    """
    floor = getattr(floor, "scores", floor) if not isinstance(floor, Scores) else floor
    options = {"metrics": metrics, "backbone": backbone, "device": device, "progress": progress}
    pairs = _pairs(original, optimized)
    scores = tuple(compare_videos(a, b, **options) for a, b in pairs)
    floors = {
        name: tuple(_floor_scores(value, options))
        for name, value in (floor if isinstance(floor, dict) else {"given": floor}).items()
        if value is not None
    }
    same_backbone([*scores, *(score for group in floors.values() for score in group)])
    rows = []
    for row in scores[0].summary.itertuples():
        values = [score.mean(row.metric) for score in scores]
        error = CATALOGUE[row.metric].error
        low, high = bootstrap_mean(values, seed) or (math.nan, math.nan)
        known = {
            name: _floor_mean(row.metric, [s.mean(row.metric) for s in group])
            for name, group in floors.items()
        }
        name = max(known, key=lambda floor: error(known[floor])) if known else None
        mean = mean_score(values)
        times, least_times = (
            _ratio_to_floor(value, error(known[name])) if known else math.nan
            for value in (error(mean), _least_error(row.metric, mean, low, high))
        )
        rows.append(
            {
                "metric": row.metric,
                "backbone": row.backbone,
                "cases": len(scores),
                "mean": mean,
                "low": low,
                "high": high,
                "worst": max(values, key=error),
                "floor": known[name] if known else math.nan,
                "floor_name": name,
                "ratio_to_noise_floor": times,
                "verdict": _verdict(max(map(error, values)), least_times),
            }
        )
    return Divergence(pd.DataFrame(rows), scores, floors)


def _pairs(original, optimized) -> list[tuple]:
    several = [isinstance(side, list | tuple) for side in (original, optimized)]
    if several == [False, False]:
        return [(original, optimized)]
    if several != [True, True] or len(original) != len(optimized):
        counts = [len(side) if many else 1 for side, many in zip((original, optimized), several, strict=True)]
        raise WanlabError(
            f"divergence of {counts[0]} original and {counts[1]} optimised videos; give one of each per case"
        )
    if not original:
        raise WanlabError("divergence of no video; give at least one case")
    return list(zip(original, optimized, strict=True))


def _floor_scores(floor, options: dict) -> list[Scores]:
    # A tuple of scores is one floor over several cases; any other tuple is a pair of videos.
    several = isinstance(floor, list) or (isinstance(floor, tuple) and floor and isinstance(floor[0], Scores))
    items = floor if several else [floor]
    if not items:
        raise WanlabError("the floor is an empty list; give pairs of videos or Scores, or None")
    scores = []
    for item in items:
        if isinstance(item, Scores):
            scores.append(item)
        elif isinstance(item, tuple) and len(item) == 2:
            scores.append(compare_videos(*item, **options))
        else:
            raise WanlabError(
                "a floor is a tuple of two videos or Scores; give two runs of the unchanged model"
            )
    return scores


def _floor_mean(metric: str, values: Sequence[float]) -> float:
    """Mean score of a floor; where both sides of a perfect score are worse, that score plus the mean distance from it.

    Cases that differ in both directions would cancel in a plain mean, and a floor below a perfect score of 0 reads as better
    than perfect.
    """
    facts = CATALOGUE[metric]
    if facts.better != "near":
        return mean_score(values)
    return facts.perfect + mean_score([facts.error(value) for value in values])


def _least_error(metric: str, mean: float, low: float, high: float) -> float:
    """The smallest error within an interval; the error of the mean where there is no interval."""
    facts = CATALOGUE[metric]
    if math.isnan(low):
        return facts.error(mean)
    if facts.better == "near" and low <= facts.perfect <= high:
        return 0.0
    return min(facts.error(low), facts.error(high))


def _times_text(times: float) -> str:
    return f"{times:.3g} times" if times < 1000 else "over 1,000 times"


def _ratio_to_floor(error: float, least: float) -> float:
    if error <= 0:
        return 0.0
    return error / least if least > 0 else math.inf


def _verdict(largest_error: float, ratio_to_noise_floor: float) -> str:
    if largest_error <= 0:
        return "identical"
    if math.isnan(ratio_to_noise_floor):
        return "no floor"
    return "within floor" if ratio_to_noise_floor <= 1 else "above floor"


AGAIN, OTHER_ATTENTION, COMPILED = "run again", "other attention kernel", "compiled"
KINDS = (AGAIN, OTHER_ATTENTION, COMPILED)
"""Changes that affect only rounding: the same code, inputs and seed again (0 where everything is deterministic);
another exact attention kernel; the experts' blocks compiled, with fused operators."""


@dataclass(frozen=True, eq=False)
class Floors:
    """Noise floors: how far the unchanged model differs from itself.

    Attributes:
        frame: one row per floor and metric: floor, metric, backbone, cases, identical_cases, mean, low,
            high (95 % bootstrap interval over cases, unknown (NaN) for fewer than three cases), worst.
        scores: floor -> the scores of each case; `divergence` accepts this dictionary.
        notes: floor -> what was run, or why it was not measured.
    """

    frame: pd.DataFrame
    scores: dict[str, tuple[Scores, ...]]
    notes: dict[str, str]

    @property
    def explained(self) -> pd.DataFrame:
        """One row per kind of floor: floor, and what was run or why it was not measured."""
        return pd.DataFrame(list(self.notes.items()), columns=["floor", "run"])


def floors(
    model,
    asked: Sequence[Mapping[str, Any]],
    *,
    originals: Sequence[Any] | None = None,
    kinds: Sequence[str] | None = None,
    metrics: Sequence[str] | str = METRICS,
    backbone: str = "auto",
    progress: bool = True,
    seed: int = 0,
) -> Floors:
    """Generate each case again with every change that affects only rounding, and score it against the original.

    Costs one generation per case and kind. The videos are not kept.

    Args:
        model: from `wanlab.models.load`, with eager components.
        asked: arguments of `model.generate`, one dictionary per case.
        originals: generations of the same cases by the unchanged model, if they exist.
        kinds: names from `KINDS`; by default all on a GPU; on a CPU the first two, since compiling a small model takes
            longer there than running it.
        metrics, backbone, progress: as for `compare_videos`; scored on the model's device.
        seed: seed of the bootstrap over cases.

    Raises:
        WanlabError: no case, an unknown kind, originals of other cases, a component that is not eager, no C++ compiler for
            `"compiled"` on a CPU, or as for `model.generate` and `compare_videos`.
    """
    on_gpu = model.device.type == "cuda"
    kinds = [AGAIN, OTHER_ATTENTION] + [COMPILED] * on_gpu if kinds is None else list(kinds)
    _check(model, asked, originals, kinds)
    scores: dict[str, list[Scores]] = {kind: [] for kind in kinds}
    notes = dict.fromkeys(kinds, "")
    total = len(asked) * (len(kinds) + (originals is None))
    bar = tqdm(total=total, desc="floors", unit="video", leave=False, disable=not progress)
    options = {"metrics": metrics, "backbone": backbone, "device": model.device, "progress": False}
    with bar:
        if originals is None:
            originals = [_counted(bar, model.generate(**each)) for each in asked]
        # All cases of one kind together, so that each kind is compiled once.
        for kind in kinds:
            with _changed(model, kind) as (changed, notes[kind]):
                for each, original in zip(asked, originals, strict=True):
                    video = _counted(bar, changed.generate(**each))
                    scores[kind].append(compare_videos(original, video, **options))
    case_scores = {kind: tuple(found) for kind, found in scores.items()}
    if COMPILED not in kinds:
        notes[COMPILED] = "not measured" + ("" if on_gpu else ": left out on a CPU unless named in kinds")
    return Floors(floor_table(case_scores, seed=seed), case_scores, notes)


def floor_table(scores: Mapping[str, Sequence[Scores]], *, seed: int = 0) -> pd.DataFrame:
    """`Floors.frame` from existing scores: floor -> the scores of each case."""
    rows = []
    for floor, cases in scores.items():
        for row in cases[0].summary.itertuples():
            facts, values = CATALOGUE[row.metric], [case.mean(row.metric) for case in cases]
            low, high = bootstrap_mean(values, seed) or (math.nan, math.nan)
            rows.append(
                {
                    "floor": floor,
                    "metric": row.metric,
                    "backbone": row.backbone,
                    "cases": len(cases),
                    "identical_cases": sum(facts.error(value) <= 0 for value in values),
                    "mean": mean_score(values),
                    "low": low,
                    "high": high,
                    "worst": max(values, key=facts.error),
                }
            )
    return pd.DataFrame(rows)


def _check(model, asked, originals, kinds) -> None:
    if not asked:
        raise WanlabError(
            "floors of no case; give what model.generate is called with, one dictionary per case"
        )
    if originals is not None and len(originals) != len(asked):
        raise WanlabError(
            f"floors of {len(asked)} cases and {len(originals)} originals; give one of each per case"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise WanlabError(f"no floor {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    if not kinds:
        raise WanlabError(f"no kind of floor given; known: {', '.join(KINDS)}")
    other = [name for name, engine in model.engines.items() if engine != "eager"]
    if other:
        raise WanlabError(
            f"{other[0]} runs on {model.engines[other[0]]}; the floor is of the model as it was loaded"
        )
    if COMPILED in kinds and model.device.type == "cpu":
        from torch._inductor import (  # as slow to import as torch itself, and needed only here
            cpp_builder,
            exc,
        )

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise WanlabError(
                f"the floor {COMPILED!r} needs a C++ compiler on a CPU, and there is none; install g++ or leave it out of"
                " kinds"
            ) from error


def _counted(bar, made):
    bar.update()
    return made


@contextmanager
def _changed(model, kind: str) -> Iterator[tuple[Any, str]]:
    """A block with a model that computes the same in another way, and a description of the change."""
    if kind == OTHER_ATTENTION:
        with alternate_sdpa(model.device) as kernel:
            yield model, kernel
    elif kind == COMPILED:
        yield compile_blocks(model), "blocks of the experts by torch.compile"
    else:
        yield model, "the same code, inputs and seed"


NEAR_PSNR_DB = 30.0
PERCEPTUAL_FLOOR_RATIO = 2.0
NEAR_LOSS_PERCENT = 1.0


@dataclass(frozen=True)
class TierRule:
    """A quality tier, the rule for it, and its meaning for a user."""

    name: str
    rule: str
    meaning: str


TIERS = (
    TierRule("exact", "every pixel of every case is equal", "the same files come out"),
    TierRule(
        "numeric",
        f"no metric reaches further than its floor does, or PSNR is at least {NUMERIC_PSNR_DB:g} dB in every case",
        "the same videos but for rounding",
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
        f" {PERCEPTUAL_FLOOR_RATIO:g} times the floor",
        "another video, as good as the original",
    ),
    TierRule(
        "undecided",
        f"the interval of the quality loss holds {LIMIT_PERCENT:g} %, or fewer than three cases give no interval",
        "more cases would say whether it is good enough",
    ),
    TierRule(
        "degraded",
        "none of the rules above holds",
        "worse than the original, or far from it with no truth to judge by",
    ),
)
"""From the strictest to the loosest. Limits apply to the unfavourable end of the 95 % interval over cases (to the worst
case where there is no interval), and a rule about quality loss applies only where the ground truth is known."""


@dataclass(frozen=True)
class Tier:
    """The strictest tier whose rule holds.

    Attributes:
        name: name of the tier in `TIERS`.
        rule: rule of the tier.
        why: the measured values that decided, and the reason why the next stricter tier failed.
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
        divergence: must have LPIPS and PSNR; with a noise floor if `numeric` is to be decided by it.
        quality_loss: None or unknown without ground truth; then only divergence decides.

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
    """Whether each rule holds, and the values that decide it, in the order of `TIERS`."""
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
        distance = (
            "no noise floor to compare it with" if math.isnan(times) else f"LPIPS {times:.3g} times the floor"
        )
        yield times <= PERCEPTUAL_FLOOR_RATIO, f"{distance}, {at_most}"
    yield loss is not None and loss.within(LIMIT_PERCENT) == "undecided", measured
    yield True, measured


def _far_error(row: dict) -> float:
    """The largest error within an interval; the error of the worst case where there is no interval."""
    error = CATALOGUE[row["metric"]].error
    ends = [row["worst"]] if math.isnan(row["low"]) else [row["low"], row["high"]]
    return max(map(error, ends))


def _reach(divergence: Divergence) -> dict[str, float]:
    """Metric -> largest error of the largest floor: the unfavourable end of its own interval."""
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
