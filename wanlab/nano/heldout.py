"""The held-out examination of wan-nano: photographs never trained on, with the true clip known for every case."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from wanlab.nano import clips
from wanlab.nano.architecture import CAMERA_MOTIONS, FRAMES

if TYPE_CHECKING:
    import numpy as np

SMALLEST_TEXTURE = 0.01
"""Mean absolute gradient of a first frame, in intensity per pixel; on flatter pictures no motion can be measured."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One held-out question: a photograph, a clip of it (which fixes the caption), and the seed of the noise."""

    photograph: str
    clip: clips.Clip
    seed: int

    @property
    def caption(self) -> str:
        return self.clip.caption

    def truth(self) -> np.ndarray:
        """The true video, float32 `[T, H, W, 3]` in [0, 1]; its first frame is the model's input."""
        return render_clip(self.photograph, self.clip)


def render_clip(photograph: str, clip: clips.Clip, frames: int = FRAMES) -> np.ndarray:
    """A clip of a photograph of the scikit-image package, float32 `[T, H, W, 3]` in [0, 1]."""
    import torch

    image = torch.from_numpy(clips.photograph(photograph)).permute(2, 0, 1)
    return clips.render(image, [clip], frames=frames)[0].permute(1, 2, 3, 0).numpy()


def draw_cases(count: int = 72, *, seed: int = 2026, photographs=clips.HELD_OUT_PHOTOGRAPHS) -> list[Case]:
    """Cases that go round the motions and photographs, every other round with a moving object.

    72 cases are 9 motions x 4 rounds x 2, each motion on each photograph, half of them with an object.
    """
    import numpy as np

    generator, cases, motions = np.random.default_rng(seed), [], list(CAMERA_MOTIONS)
    for i in range(count):
        motion, round_ = motions[i % len(motions)], i // len(motions)
        name = photographs[(i + round_) % len(photographs)]
        size = clips.photograph(name).shape[:2]
        while True:
            clip = clips.draw_clip(size, generator, motion=motion, with_object=bool(round_ % 2))
            still = render_clip(name, dataclasses.replace(clip, motion="still", moving_object=None), 1)[0]
            if _texture(still) >= SMALLEST_TEXTURE:
                break
        cases.append(Case(name, clip, seed * 1000 + i))
    return cases


def example_case() -> Case:
    """The case that demonstrations use: the camera pans over a spoon beside a cup of coffee."""
    cases = draw_cases()
    return next(c for c in cases if (c.clip.motion, c.photograph) == ("pan_right", "coffee.png"))


def _texture(frame: np.ndarray) -> float:
    import numpy as np

    grey = frame.mean(axis=-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def follows_caption(video: np.ndarray, case: Case) -> bool:
    """Whether the camera, and the object if there is one, do what the caption says."""
    from wanlab.nano import motion

    seen, _ = motion.camera_motion(video)
    if seen != case.clip.motion:
        return False
    return case.clip.moving_object is None or motion.object_moved_as_told(video, case.clip.moving_object)
