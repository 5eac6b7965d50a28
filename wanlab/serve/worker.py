"""What makes the videos of a service: one model in one configuration, on one device, several generations at a time."""

from __future__ import annotations

import asyncio
import io
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import torch
from PIL import Image

import wanlab
from wanlab import models
from wanlab.configuration.configuration import load_configuration
from wanlab.configuration.configure import configure
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import digest
from wanlab.engines.registry import EAGER
from wanlab.evaluate.video import write_video
from wanlab.models.batches import Meeting, Stages, Stopped, out_of_memory
from wanlab.models.families.base import PICTURE
from wanlab.models.pipeline import Generation, Model
from wanlab.models.shapes import latent_shape
from wanlab.serve.requests import Order
from wanlab.serve.settings import ModelFacts, ServiceSettings

OUT_OF_MEMORY, FAULT, CANCELLED, STORAGE = "out_of_memory", "generation_failed", "cancelled", "storage"
SHOWN_PROMPT = "a warm-up of the service"


class Worker:
    """A model that is loaded, configured and warmed up when the constructor returns.

    Args:
        settings: settings of the service.

    Raises:
        WanlabError: as `load` and `configure`; a model that needs a clip; a size that is not legal, or several sizes of a
            configuration whose engines are made for one.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        loaded = models.load(
            settings.model, device=settings.device, dtype=settings.dtype, weights=settings.weights
        )
        self.needs = _needs(loaded)
        self.sizes = _sizes(loaded, settings)
        self.configuration = load_configuration(settings.configuration)
        several = len(self.sizes) > 1 or settings.any_size
        made_for_one = [
            name
            for name in loaded.spec.components
            if self.configuration.engine_of(name) not in (EAGER, "compiled")
        ]
        if several and made_for_one:
            raise WanlabError(
                f"configuration {self.configuration.name} has engines made for one size ({', '.join(made_for_one)});"
                " serve one size, or another configuration"
            )
        width, height, frames = self.sizes[0]
        configured = configure(
            loaded,
            self.configuration,
            settings.engines_folder,
            height=height,
            width=width,
            frames=frames,
            progress=False,
        )
        self.model = configured.model
        self.meeting = Meeting(self.model, max_batch=settings.max_batch)
        self._threads = ThreadPoolExecutor(self.meeting.max_batch, thread_name_prefix="wanlab-video")
        self.warm_up_ms: dict[str, float] = {}
        if settings.warm_up:
            self.warm_up()

    def facts(self) -> ModelFacts:
        """What the service tells of the model and checks requests by."""
        spec = self.model.spec
        return ModelFacts(
            name=self.settings.model,
            needs=self.needs,
            fps=spec.defaults.fps,
            steps=spec.defaults.steps,
            guidance_scale=spec.defaults.guidance_scale,
            sizes=self.sizes,
            any_size=self.settings.any_size,
            size_step=spec.size_step,
            frame_step=spec.frame_step,
            fewest_steps=self.model.family.fewest_steps,
            max_batch=self.meeting.max_batch,
            alone=self.meeting.alone,
            versions={
                "wanlab": wanlab.__version__,
                "torch": str(torch.__version__),
                "diffusers": diffusers.__version__,
                "model": spec.name,
                "weights": self.settings.weights,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": torch.cuda.get_device_name(self.model.device)
                if self.model.device.type == "cuda"
                else "cpu",
                "configuration": self.configuration.name,
                "configuration_hash": self.configuration.hash,
            },
        )

    def warm_up(self) -> None:
        """Make a video of every served size, alone and in the largest batch, with the fewest steps that use all experts."""
        for width, height, frames in self.sizes:
            order = Order(
                prompt=SHOWN_PROMPT, negative_prompt="", width=width, height=height, frames=frames,
                steps=self.model.spec.defaults.steps, guidance_scale=self.model.spec.defaults.guidance_scale,
                seed=0, output_format="mp4", deadline_s=self.settings.deadline_s,
            )  # fmt: skip
            picture = np.full((height, width, 3), 0.5) if self.needs else None
            for count in dict.fromkeys((1, self.meeting.max_batch)):
                made = [self._threads.submit(self._generate, order, picture, Stages()) for _ in range(count)]
                self.warm_up_ms[f"{width}x{height}x{frames} in {count}"] = max(
                    each.result().wall_ms for each in made
                )

    def make(
        self,
        order: Order,
        picture: bytes | None,
        *,
        on_step: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[bytes, dict[str, Any]]:
        """The video of an order as the bytes of a file, and what is told of it. Called from several threads.

        Raises:
            Stopped: `stop` said so.
            WanlabError: as `Model.generate`; torch's own error where memory is short for this video alone.
        """
        image = None if picture is None else Image.open(io.BytesIO(picture))
        stages = Stages()
        device = self.model.device
        generation = self._generate(order, image, stages, on_step=on_step, stop=stop)
        video = _file(generation, order.output_format)
        told = {name: value for name, value in asdict(stages).items() if name != "batches"}
        return video, {
            **told,
            "mean_batch": stages.mean_batch,
            "largest_batch": max(stages.batches, default=0),
            "wall_ms": generation.wall_ms,
            "peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20
            if device.type == "cuda"
            else None,
            "frames_sha256": frames_digest(generation.video),
            "notes": list(generation.notes),
        }

    async def run(self, order: dict[str, Any], picture: bytes | None) -> AsyncGenerator[dict[str, Any]]:
        """Events of one video: `{"step": n}` after each step, then `{"video": bytes, "result": ...}`, or `{"error": text,
        "code": word}`. Where the caller stops to listen, the generation ends at its next step."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def tell(event: dict[str, Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                asked = msgspec.convert(order, Order)
                video, result = self.make(
                    asked, picture, on_step=lambda step: tell({"step": step}), stop=stop.is_set
                )
                tell({"video": video, "result": result})
            except Stopped:
                tell({"error": "cancelled", "code": CANCELLED})
            except Exception as error:
                tell(_fault(error, order))

        self._threads.submit(work)
        try:
            while True:
                event = await events.get()
                yield event
                if "step" not in event:
                    return
        finally:
            stop.set()

    def close(self) -> None:
        """End what is being made at its next step."""
        self.meeting.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _generate(self, order: Order, picture: Any, stages: Stages, **told: Any) -> Generation:
        return self.meeting.generate(picture, order.prompt, stages=stages, **order.settings(), **told)


def frames_digest(video: np.ndarray) -> str:
    """SHA-256 of the frames `[T, H, W, 3]` in float32 before they are packed: equal only for videos equal bit for bit."""
    return digest([np.ascontiguousarray(video, dtype=np.float32).tobytes()])


def _fault(error: Exception, order: dict[str, Any]) -> dict[str, Any]:
    """What is told of a generation that failed."""
    if out_of_memory(error):
        size = f"{order['width']}x{order['height']} with {order['frames']} frames"
        return {"error": f"out of memory for {size}; ask for a smaller video", "code": OUT_OF_MEMORY}
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
        return {"error": f"the video cannot be written: {first_line(error)}", "code": STORAGE}
    text = str(error) if isinstance(error, WanlabError) else f"the generation failed: {first_line(error)}"
    return {"error": text, "code": FAULT}


def _file(generation: Generation, output_format: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="wanlab-video-") as folder:
        path = write_video(
            Path(folder) / f"video.{output_format}",
            generation.video,
            generation.fps,
            lossless=output_format == "mkv",
        )
        return path.read_bytes()


def _needs(model: Model) -> dict[str, str]:
    needs = model.conditions
    if any(name != "image" or kind != PICTURE for name, kind in needs.items()):
        asked = " and ".join(f"{name} ({kind})" for name, kind in needs.items())
        raise WanlabError(
            f"{model.spec.name} makes a video from {asked}; a service takes a prompt and at most one picture"
        )
    return needs


def _sizes(model: Model, settings: ServiceSettings) -> tuple[tuple[int, int, int], ...]:
    usual = model.spec.defaults
    sizes = settings.sizes or ((usual.width, usual.height, usual.frames),)
    for width, height, frames in sizes:
        latent_shape(model.spec, height, width, frames)
    return tuple(sizes)
