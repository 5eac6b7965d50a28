"""The floor of divergence: what a model differs from itself when nothing is optimised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError, did_you_mean
from wanlab.evaluate.bootstrap import bootstrap_mean
from wanlab.evaluate.catalogue import CATALOGUE, METRICS
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.scores import Scores, mean_score

if TYPE_CHECKING:
    import pandas as pd

AGAIN, OTHER_ATTENTION, COMPILED = "run again", "other attention kernel", "compiled"
KINDS = (AGAIN, OTHER_ATTENTION, COMPILED)
"""What changes nothing but rounding: the same code, inputs and seed once more (0 where everything is deterministic);
another exact attention kernel; the experts' blocks compiled, their operators fused."""


@dataclass(frozen=True, eq=False)
class Floors:
    """What the unchanged model differs from itself by.

    Attributes:
        frame: one row per floor and metric: floor, metric, backbone, cases, identical_cases, mean, low,
            high (95 % bootstrap interval over cases, undefined for one case), worst.
        scores: floor -> the scores of each case; `divergence` takes it as it is.
        notes: floor -> what was run, or why it was not measured.
    """

    frame: pd.DataFrame
    scores: dict[str, tuple[Scores, ...]]
    notes: dict[str, str]

    @property
    def explained(self) -> pd.DataFrame:
        """One row per kind of floor: floor, and what was run or why it was not measured."""
        import pandas as pd

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
    """Generate each case once more in every way that changes nothing but rounding, and score it.

    Costs one generation per case and kind. The videos are not kept.

    Args:
        model: from `wanlab.models.load`, its components eager.
        asked: what `model.generate` is called with, one dictionary per case.
        originals: generations of the same `asked` by the unchanged model, when there are some already.
        kinds: names of `KINDS`; by default all on a GPU; on a CPU the first two, since compiling a small model takes
            longer there than running it.
        metrics, backbone, progress: as `compare_videos`; scored on the model's device.
        seed: of the bootstrap over cases.

    Raises:
        WanlabError: no case, an unknown kind, originals of other cases, a component that is not eager, no C++ compiler for
            `"compiled"` on a CPU, or as `model.generate` and `compare_videos`.
    """
    from tqdm.auto import tqdm

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
        # Kind by kind: what is compiled is compiled once.
        for kind in kinds:
            with _changed(model, kind) as (changed, notes[kind]):
                for each, original in zip(asked, originals, strict=True):
                    made = _counted(bar, changed.generate(**each))
                    scores[kind].append(compare_videos(original, made, **options))
    kept = {kind: tuple(found) for kind, found in scores.items()}
    if COMPILED not in kinds:
        notes[COMPILED] = "not measured" + ("" if on_gpu else ": left out on a CPU unless named in kinds")
    return Floors(floor_table(kept, seed=seed), kept, notes)


def floor_table(scores: Mapping[str, Sequence[Scores]], *, seed: int = 0) -> pd.DataFrame:
    """`Floors.frame` of scores that are there already: floor -> the scores of each case."""
    import pandas as pd

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
        from torch._inductor import cpp_builder, exc

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
    """A block with a model that computes the same in another way, and what was done."""
    if kind == OTHER_ATTENTION:
        from wanlab.models.attention import other_attention

        with other_attention(model.device) as kernel:
            yield model, kernel
    elif kind == COMPILED:
        from wanlab.models.compiled import compile_blocks

        yield compile_blocks(model), "blocks of the experts by torch.compile"
    else:
        yield model, "the same code, inputs and seed"
