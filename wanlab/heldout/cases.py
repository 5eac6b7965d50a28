"""Held-out test cases of wan-nano: photographs outside the training set, with the true clip known for every case.

Two sets are fixed in files. `selection` is for every choice: which layers, which format, which plan. `final` is for the
numbers that are reported once the choice is made; its photographs, order of captions and seeds are others, and code
that chooses refuses it (`for_selection`). Both can also be drawn at the large size, with up to three shapes and with
textures.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.paths import data, existing
from wanlab.heldout import clips
from wanlab.heldout.clips import CAMERA_MOTIONS
from wanlab.heldout.textures import texture

SMALLEST_TEXTURE = 0.01
"""Least mean absolute gradient of a first frame, in intensity per pixel; on flatter pictures motion cannot be measured."""

MOST_DRAWS = 200
"""Number of tries to draw a clip of one photograph whose first frame has enough texture."""

MOST_TEXTURES = 8
"""Number of textures to try for one case; a few are nearly flat."""

FOLDER = data("heldout")
FINAL_PHOTOGRAPHS = ("china.jpg", "flower.jpg", "grace_hopper.jpg")
"""Photographs of `data/heldout/photographs`, which no required package contains; only the set `final` shows them."""

SOURCES = {
    "scikit-image": clips.HELD_OUT_PHOTOGRAPHS,
    "scikit-learn": ("china.jpg", "flower.jpg"),
    "matplotlib": ("grace_hopper.jpg",),
}
"""Package -> its held-out photographs, as `picture` takes them."""

SETS = {"selection": (7301, clips.HELD_OUT_PHOTOGRAPHS), "final": (9127, FINAL_PHOTOGRAPHS)}
"""Name of a fixed set -> the seed that it was drawn with, and its photographs."""

SET_SIZE = 72
CONTENT: dict[str, dict[str, Any]] = {
    clips.SMALL: {"objects": (0, 1), "textures": 0.0},
    clips.LARGE: {"objects": (0, 1, 2, 3), "textures": 0.25},
}
"""What cases of a size show, as arguments of `draw_cases`."""

TEXTURE = "texture:"
"""What the name of a texture begins with; its seed follows."""

EXAMINATION, SELECTION, FINAL = "examination", "selection", "final"


@dataclasses.dataclass(frozen=True)
class Case:
    """One test case: a photograph, a clip of it (which fixes the caption), and the seed of the noise.

    `purpose` is the set of the case: "selection", "final", or "examination" for cases that belong to no fixed set.
    """

    photograph: str
    clip: clips.Clip
    seed: int
    purpose: str = EXAMINATION

    @property
    def caption(self) -> str:
        return self.clip.caption

    def truth(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """The true video, float32 `[T, H, W, 3]` in [0, 1]; its first frame is the model's input.

        It has the clip's own size where None. A smaller size shows the middle of the clip, at the same scale.
        """
        return render_clip(self.photograph, self.clip, frames, height, width)


def render_clip(
    photograph: str,
    clip: clips.Clip,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """A clip of a photograph, float32 `[T, H, W, 3]` in [0, 1], of the clip's own size where None."""
    image = torch.from_numpy(picture(photograph)).permute(2, 0, 1)
    videos = clips.render(image, [clip], frames=frames, height=height, width=width)
    return videos[0].permute(1, 2, 3, 0).numpy()


@lru_cache(maxsize=8)
def picture(name: str) -> np.ndarray:
    """A photograph by name, from `data/heldout` or from the scikit-image package, as `clips.photograph`; or a texture.

    `texture:7` is the regular picture that `textures.texture` draws from the seed 7.

    Raises:
        WanlabError: a photograph of the final set is missing, or the seed of a texture is no number.
    """
    if name.startswith(TEXTURE):
        seed = name.removeprefix(TEXTURE)
        if not seed.isdecimal():
            raise WanlabError(f"{name!r} is no texture; name one by a number, such as {TEXTURE}7")
        return texture(np.random.default_rng(int(seed))).permute(1, 2, 0).numpy()
    if name not in FINAL_PHOTOGRAPHS:
        return clips.photograph(name)
    with Image.open(existing(FOLDER / "photographs" / name)) as opened:
        return clips.prepare_photograph(opened)


def is_held_out(photograph: str) -> bool:
    """Whether a photograph is used to judge quality, so that nothing may be trained or calibrated on it."""
    return any(photograph in photographs for _, photographs in SETS.values())


def draw_cases(
    count: int = 72,
    *,
    seed: int = 2026,
    photographs=clips.HELD_OUT_PHOTOGRAPHS,
    purpose: str = EXAMINATION,
    height: int = clips.HEIGHT,
    width: int = clips.WIDTH,
    frames: int | None = None,
    objects: Sequence[int] = (0, 1),
    textures: float = 0.0,
) -> list[Case]:
    """Cases that cycle through motions and photographs; every other round has a moving object.

    A case whose photograph is too flat for its motion at this size shows the next one.

    72 cases of three photographs show each motion about three times on each photograph, half of them with an object.

    Args:
        height, width, frames: size of the clips; as many frames as are natural for the height where None.
        objects: numbers of shapes, of which every round of the nine motions takes the next.
        textures: share of cases that show a texture, each another one, in place of a photograph.

    Raises:
        WanlabError: every photograph is too flat to show motion, or shapes have no room.
    """
    generator, cases, motions = np.random.default_rng(seed), [], list(CAMERA_MOTIONS)
    clip_size = {"height": height, "width": width, "frames": frames or clips.natural_frames(height)}
    for i in range(count):
        motion, round_ = motions[i % len(motions)], i // len(motions)
        turn = (i + round_) % len(photographs)
        names: Iterable[str] = (*photographs[turn:], *photographs[:turn])
        if textures and generator.random() < textures:
            names = _textures(generator)
        number = objects[round_ % len(objects)]
        name, clip = _clear_clip(names, generator, motion=motion, objects=number, **clip_size)
        cases.append(Case(name, clip, seed * 1000 + i, purpose))
    return cases


def _textures(generator: np.random.Generator) -> Iterator[str]:
    """Names of some textures; each is drawn when it is asked for."""
    for _ in range(MOST_TEXTURES):
        yield f"{TEXTURE}{int(generator.integers(2**31))}"


def _clear_clip(names: Iterable[str], generator: np.random.Generator, **drawn: Any) -> tuple[str, clips.Clip]:
    """The first of some pictures that is not too flat to show motion where a clip is cut from it, and the clip.

    Args:
        drawn: arguments of `clips.draw_clip`.

    Raises:
        WanlabError: all are too flat.
    """
    tried = []
    for name in names:
        size = picture(name).shape[:2]
        for _ in range(MOST_DRAWS):
            clip = clips.draw_clip(size, generator, **drawn)
            still = render_clip(name, dataclasses.replace(clip, motion="still", objects=()), 1)[0]
            if has_texture(still):
                return name, clip
        tried.append(name)
    raise WanlabError(
        f"{' and '.join(tried)} {'is' if len(tried) == 1 else 'are'} too flat for cases: no part shows how it moves; take"
        " other pictures"
    )


def inputs(needed: Mapping[str, str], frames: int, case: Case | None = None) -> dict[str, Any]:
    """The inputs of a generation besides its prompt, from a held-out clip; arguments of `Model.generate`.

    The first frame is the picture. What else a model needs is filled with frames of the same clip: they have no meaning for
    its task, and a measurement of time or memory needs no more.

    Args:
        needed: name of the input -> "picture" or "clip", as `Model.conditions`.
        frames: number of frames of the video.
        case: case whose clip is taken; that of `example_case` if None.
    """
    case = case or example_case()
    # Frames in the number of the video only where more than the picture is taken from them.
    return _filled(needed, case.truth(frames if set(needed) - {"image"} else None))


def _filled(needed: Mapping[str, str], clip: np.ndarray) -> dict[str, Any]:
    """Inputs from a clip `[T, H, W, 3]`: its first frame as the picture, its last as others, and the whole as clips."""
    image = clip[0] if "image" in needed else None
    more = {name: clip if kind == "clip" else clip[-1] for name, kind in needed.items() if name != "image"}
    return {"image": image} | ({"conditions": more} if more else {})


def size_content(size: str) -> dict[str, Any]:
    """Arguments of `draw_cases` for a size: its height, width and frames, and what its cases show.

    Args:
        size: a name of `clips.SIZES`, or numbers such as `192x288x25`, which show what the large size shows.

    Raises:
        WanlabError: no such size.
    """
    shown = size if size in clips.SIZES else clips.LARGE
    try:
        height, width, frames = clips.SIZES.get(size) or map(int, size.split("x"))
    except ValueError:
        known = ", ".join(clips.SIZES)
        hint = did_you_mean(size, clips.SIZES)
        raise WanlabError(
            f"no size {size!r}{hint}; known: {known}, or HEIGHTxWIDTHxFRAMES such as 192x288x25"
        ) from None
    return {"height": height, "width": width, "frames": frames} | CONTENT[shown]


def draw_set(name: str, size: str = clips.SMALL) -> list[Case]:
    """Draw a fixed set again: the same cases as in its file, which a test checks.

    The order is shuffled, so that the first cases of a set already show several motions, photographs and objects.

    Raises:
        WanlabError: no such set or size.
    """
    seed, photographs = SETS[_set_name(name)]
    content = size_content(size)
    cases = draw_cases(SET_SIZE, seed=seed, photographs=photographs, purpose=name, **content)
    return [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]


def set_file(name: str, size: str = clips.SMALL) -> str:
    """Name of the file of a fixed set: `final.json`, of the large size `final_large.json`."""
    return f"{_set_name(name)}.json" if size == clips.SMALL else f"{_set_name(name)}_{size}.json"


def load_cases(name: str, count: int | None = None, size: str = clips.SMALL) -> list[Case]:
    """The first `count` cases of a fixed set, from `data/heldout/<name>.json`; None takes all.

    Raises:
        WanlabError: no such set, more cases than it has, or a missing or damaged file.
    """
    path = existing(FOLDER / set_file(name, size))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
        cases = [_case(row, name) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise WanlabError(
            f"{path} holds no cases; make it again with wanlab.heldout.cases.write_sets"
        ) from error
    if count is not None and not 1 <= count <= len(cases):
        raise WanlabError(f"set {name} has {len(cases)} cases; ask for 1 to {len(cases)}, not {count}")
    return cases[:count]


def for_selection(cases: Iterable[Case]) -> list[Case]:
    """The same cases, after a check that they may be used for a choice: code that chooses a plan calls this first.

    Raises:
        WanlabError: a case belongs to the final set, or shows one of its photographs.
    """
    cases = list(cases)
    for case in cases:
        if case.purpose == FINAL or case.photograph in FINAL_PHOTOGRAPHS:
            raise WanlabError(
                f"{case.photograph} ({case.caption}) is of the final set, which nothing may be chosen by; take"
                ' wanlab.heldout.cases.load_cases("selection")'
            )
    return cases


def write_sets(folder: Path = FOLDER, sizes: Iterable[str] = (clips.SMALL,)) -> list[Path]:
    """Write the files of the fixed sets at some sizes; returns their paths."""
    paths = []
    for (name, (seed, photographs)), size in itertools.product(SETS.items(), sizes):
        cases = [dataclasses.asdict(case) | {"caption": case.caption} for case in draw_set(name, size)]
        for case in cases:
            del case["purpose"]
        content = {"set": name, "drawn_with_seed": seed, "photographs": list(photographs), "cases": cases}
        paths.append(folder / set_file(name, size))
        paths[-1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return paths


def _set_name(name: str) -> str:
    if name not in SETS:
        raise WanlabError(f"no held-out set {name!r}{did_you_mean(name, SETS)}; known: {', '.join(SETS)}")
    return name


def _case(row: dict, purpose: str) -> Case:
    values = dict(row["clip"])
    values["objects"] = tuple(clips.MovingObject(**each) for each in values["objects"])
    return Case(row["photograph"], clips.Clip(**values), row["seed"], purpose)


def example_case() -> Case:
    """The case of the demonstrations: the camera pans over a spoon beside a cup of coffee."""
    cases = draw_cases()
    return next(c for c in cases if (c.clip.motion, c.photograph) == ("pan_right", "coffee.png"))


def requests(
    cases: Iterable[Case],
    truths: Iterable[np.ndarray],
    *,
    needed: Mapping[str, str] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Arguments of `Model.generate` that ask for the clips of some cases, one dict per case.

    Args:
        truths: the true video of each case, `[T, H, W, 3]`; its first frame is the model's input.
        needed: inputs of the model besides the prompt, as `Model.conditions`; a picture if not given. A model that takes no
            picture gets None; further pictures are the last frame, and clips the whole.
        settings: settings for all cases, such as frames and steps.
    """
    needed = {"image": "picture"} if needed is None else needed
    return [
        _filled(needed, truth) | {"prompt": case.caption, "seed": case.seed} | settings
        for case, truth in zip(cases, truths, strict=True)
    ]


def ask(model: Any, cases: Sequence[Case], **settings: Any) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Arguments of `model.generate` that ask for the clips of some cases, and their true videos of that size where its
    inputs determine them (see `known_truths`).

    Args:
        model: model from `wanlab.models.load`.
        settings: settings for all cases; height, width and frames are the model's default where None or not given.
    """
    size = {n: settings.get(n) or getattr(model.spec.defaults, n) for n in ("frames", "height", "width")}
    truths = [case.truth(**size) for case in cases]
    needed = model.conditions
    return requests(cases, truths, needed=needed, **settings), known_truths(truths, needed)


def known_truths(truths: Sequence[np.ndarray], needed: Mapping[str, str]) -> list[np.ndarray]:
    """The true videos, where the inputs of a model determine them: its first picture and others; of a text alone, or of
    clips that have another meaning, none is known."""
    determined = "image" in needed and all(kind == "picture" for kind in needed.values())
    return list(truths) if determined else []


def has_texture(image: np.ndarray) -> bool:
    """Whether a picture `[H, W, 3]` in [0, 1] has enough texture to measure motion on it."""
    return _texture(image) >= SMALLEST_TEXTURE


def _texture(frame: np.ndarray) -> float:
    grey = frame.mean(axis=-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2
