"""Generations to calibrate on: real images and prompts, none of them held out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Example:
    """One generation: what `Model.generate` takes. `name` says in tables which one it was."""

    image: Image.Image | str | os.PathLike | np.ndarray | None
    prompt: str
    seed: int = 0
    negative_prompt: str = ""
    name: str = ""


def nano_examples(count: int = 4, *, seed: int = 7) -> list[Example]:
    """Cases of the kind that wan-nano learnt from, on photographs it learnt from: none is held out.

    They go round the motions and photographs, every other round with a moving object, as
    `wanlab.nano.heldout.draw_cases` does; photographs that are too flat to show motion are left out.
    """
    from wanlab.nano import clips, heldout

    photographs = [name for name in clips.TRAINING_PHOTOGRAPHS if heldout.has_texture(heldout.picture(name))]
    return as_examples(heldout.draw_cases(count, seed=seed, photographs=photographs))


def as_examples(cases: Iterable[Any]) -> list[Example]:
    """Examples from examples, `wanlab.nano.heldout.Case`s, or (image, prompt) pairs.

    Raises:
        WanlabError: something else, nothing, or a photograph that quality is judged on.
    """
    from wanlab.nano import heldout

    examples = []
    for index, case in enumerate(cases):
        if isinstance(case, heldout.Case):
            if heldout.is_held_out(case.photograph):
                raise WanlabError(
                    f"{case.photograph} is held out to judge quality, so nothing may be calibrated on it; take"
                    " wanlab.precision.nano_examples"
                )
            first = case.truth()[0]
            case = Example(first, case.caption, case.seed, name=f"{case.photograph} {case.clip.motion}")
        elif isinstance(case, tuple | list) and len(case) == 2:
            case = Example(case[0], case[1], seed=index)
        if not isinstance(case, Example):
            raise WanlabError(f"example {index} is {type(case).__name__}; give Example or (image, prompt)")
        examples.append(case)
    if not examples:
        raise WanlabError("no example to record; give at least one Example or (image, prompt)")
    return examples
