"""The unchanged model on held-out cases: what every plan is held against, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.selection.batched import Batched, Made

if TYPE_CHECKING:
    import numpy as np

    from wanlab.evaluate import Scores

METRICS = ("lpips", "ssim", "psnr")


@dataclass(frozen=True, eq=False)
class Originals:
    """Cases, their truths, and what the unchanged model makes of them.

    Attributes:
        purpose: the set they are of; `"final"` may be verified on and never chosen by.
        names: of the cases, for tables.
        truths: the true videos; empty where none is known.
        made: videos and latents of the unchanged model. to_truth: their scores against the truths.
        floor: name -> scores of each case made once more by the unchanged model with other arithmetic; floor_effect: the
            same on the latents, mean squared relative change.
        batched: makes the same cases by other plans.
        generations: that were run, the floor's included. backbone: of LPIPS.
    """

    purpose: str
    names: tuple[str, ...]
    truths: tuple[np.ndarray, ...]
    made: tuple[Made, ...]
    to_truth: tuple[Scores, ...]
    floor: dict[str, tuple[Scores, ...]]
    floor_effect: float | None
    batched: Batched
    generations: int
    backbone: str

    @property
    def forwards(self) -> int:
        """Calls of an expert so far, cases of a batch counted one by one."""
        return self.generations * self.batched.calls


def make_originals(
    model,
    cases: Sequence[Any],
    *,
    floor: bool = True,
    backbone: str = "auto",
    batch: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Originals:
    """Generate cases by the unchanged model, score them against the truth, and measure the floor.

    Args:
        model: from `wanlab.models.load`, its experts as loaded.
        cases: of `wanlab.nano.heldout`, or dictionaries for `Model.generate` (then no truth is known).
        floor: make every case once more with another exact attention kernel.
        backbone: of LPIPS. batch: videos at once; None fits the device.
        settings: height, width, frames, steps, guidance_scale of `Model.generate`.

    Raises:
        WanlabError: no case, cases of several sets, or as `Model.generate` and `compare_videos`.
    """
    from tqdm.auto import tqdm

    from wanlab.models.attention import other_attention
    from wanlab.nano.heldout import EXAMINATION, Case

    held = [case for case in cases if isinstance(case, Case)]
    if held and len(held) < len(cases):
        raise WanlabError("some cases have a truth and some none; give cases of one kind")
    purposes = {case.purpose for case in held}
    if len(purposes) > 1:
        raise WanlabError(
            f"cases of the sets {' and '.join(sorted(purposes))} are mixed; give those of one set"
        )
    defaults = model.spec.defaults
    size = {n: settings.get(n) or getattr(defaults, n) for n in ("frames", "height", "width")}
    truths = tuple(case.truth(**size) for case in held)
    asked = [
        {"image": truth[0], "prompt": case.caption, "seed": case.seed}
        for truth, case in zip(truths, held, strict=True)
    ] or [dict(case) for case in cases]
    batched = Batched(
        model, [each | {k: v for k, v in settings.items() if v is not None} for each in asked], batch=batch
    )
    with tqdm(
        total=len(asked) * (1 + floor), desc="originals", unit="video", leave=False, disable=not progress
    ) as bar:
        made = batched.generate(model, bar=bar)
        floors, floor_effect = {}, None
        if floor:
            with other_attention(model.device) as name:
                again = batched.generate(model, bar=bar)
            floors[name] = tuple(_scores(made, again, METRICS, backbone, model.device))
            floor_effect = mean_effect(made, again)
    to_truth = tuple(_against(truths, [each.video for each in made], ("lpips",), backbone, model.device))
    return Originals(
        purpose=next(iter(purposes), EXAMINATION),
        names=tuple(f"{case.photograph} {case.clip.motion}" for case in held)
        or tuple(map(str, range(len(asked)))),
        truths=truths,
        made=tuple(made),
        to_truth=to_truth,
        floor=floors,
        floor_effect=floor_effect,
        batched=batched,
        generations=len(asked) * (1 + floor),
        backbone=backbone,
    )


def for_choosing(originals: Originals) -> Originals:
    """The same, when something may be chosen by these cases.

    Raises:
        WanlabError: they are of the final set.
    """
    from wanlab.nano.heldout import FINAL

    if originals.purpose == FINAL:
        raise WanlabError(
            "these cases are of the final set, which nothing may be chosen by; take"
            ' wanlab.nano.heldout.load_cases("selection")'
        )
    return originals


def mean_effect(originals: Sequence[Made], others: Sequence[Made]) -> float:
    """Squared change of the final latents over their own square, mean over cases: what sensitivities predict."""
    import numpy as np

    pairs = [(a.latents.astype(np.float64), b.latents) for a, b in zip(originals, others, strict=True)]
    return float(np.mean([((b - a) ** 2).sum() / (a**2).sum() for a, b in pairs]))


def _scores(made, others, metrics, backbone: str, device) -> list[Scores]:
    return _against([each.video for each in made], [each.video for each in others], metrics, backbone, device)


def _against(references, videos, metrics, backbone: str, device) -> list[Scores]:
    from wanlab.evaluate import compare_videos

    return (
        [
            compare_videos(reference, video, metrics, backbone, device, progress=False)
            for reference, video in zip(references, videos, strict=True)
        ]
        if len(references)
        else []
    )
