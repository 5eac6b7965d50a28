"""What a service is started with: the model and its configuration, sizes, limits, and where it keeps its jobs."""

from __future__ import annotations

from typing import Any

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.text import convert


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one service, as JSON values, so that every process of a cluster takes the same.

    Attributes:
        model, weights, device, dtype: as `wanlab.models.load` takes them.
        configuration: name or YAML file of a configuration. engines_folder: folder of its converted networks.
        sizes: (width, height, frames) that are served, the first where a request names none; empty is the model's own size.
        any_size: serve every legal size within `max_pixels`; only where no engine opens files, which are made for one size.
        folder: folder of the job records, inputs and results.
        max_batch: videos that one worker makes at a time. replicas: number of workers.
        batch_wait_s: time that an idle worker waits for more requests before it begins; later ones join at their own step.
        gpus, cpus: share of a GPU, and processors, of each worker. threads: threads of PyTorch; 0 is PyTorch's own choice.
        queue: accepted requests that may wait. deadline_s: time after which a request is given up, unless it names another.
        keep_s, keep_gib: results are kept for this time, and the newest within this size.
        max_body_mib: size of a request. max_picture_pixels: pixels of its picture. max_prompt: characters of a prompt.
        max_steps: denoising steps. max_pixels: pixels of all frames of a video.
        warm_up: make a video of every served size, alone and in the largest batch, before the service is ready.
        attempts: times that a request is started whose worker died.
        token: what callers give as `Authorization: Bearer`; empty where none is asked for.
    """

    model: str = "wan-nano"
    weights: str = "pretrained"
    device: str = "auto"
    dtype: str = "auto"
    configuration: str = "eager"
    engines_folder: str = "outputs/configured"
    sizes: tuple[tuple[int, int, int], ...] = ()
    any_size: bool = False
    folder: str = "outputs/serve"
    max_batch: int = 8
    replicas: int = 1
    batch_wait_s: float = 0.01
    gpus: float = 0.0
    cpus: float = 1.0
    threads: int = 0
    queue: int = 64
    deadline_s: float = 3600.0
    keep_s: float = 24 * 3600.0
    keep_gib: float = 2.0
    max_body_mib: float = 32.0
    max_picture_pixels: int = 40_000_000
    max_prompt: int = 10_000
    max_steps: int = 100
    max_pixels: int = 1280 * 720 * 161
    warm_up: bool = True
    attempts: int = 2
    token: str = ""

    def __post_init__(self) -> None:
        for name in ("max_batch", "replicas", "queue", "attempts", "max_steps", "max_prompt"):
            if getattr(self, name) < 1:
                raise WanlabError(f"{name} of a service is {getattr(self, name)}; give 1 or more")
        for name in ("deadline_s", "keep_s", "keep_gib", "max_body_mib", "max_picture_pixels", "max_pixels"):
            if not getattr(self, name) > 0:
                raise WanlabError(f"{name} of a service is {getattr(self, name)}; give a number above 0")

        for name in ("batch_wait_s", "gpus", "cpus", "threads"):
            if not 0 <= getattr(self, name) < 1e6:
                raise WanlabError(f"{name} of a service is {getattr(self, name)}; give a number from 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `settings_of` reads."""
        return msgspec.to_builtins(self)


def settings_of(values: dict[str, Any]) -> ServiceSettings:
    """Settings from JSON values.

    Raises:
        WanlabError: an unknown name or a wrong type.
    """
    return convert(values, ServiceSettings, "settings of the service")


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells of the model that it serves, without which no request can be checked.

    Attributes:
        name: name of the model. needs: inputs besides the prompt -> "picture" or "clip".
        fps, steps, guidance_scale: of a video where a request names none.
        sizes: (width, height, frames) that are served; `any_size`: whether others are too.
        size_step: legal heights and widths are multiples of these. frame_step: legal numbers of frames are `k * step + 1`.
        fewest_steps: smallest number of steps. max_batch: videos that a worker makes at a time.
        alone: why it makes one at a time; empty where it makes more.
        versions: what goes into every answer: wanlab, torch, the configuration and its hash, and the model's weights.
    """

    name: str
    needs: dict[str, str]
    fps: int
    steps: int
    guidance_scale: float
    sizes: tuple[tuple[int, int, int], ...]
    any_size: bool
    size_step: tuple[int, int]
    frame_step: int
    fewest_steps: int
    max_batch: int
    alone: str
    versions: dict[str, str]
