"""A loaded model and the videos that it generates."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline

from wanlab.core import limits
from wanlab.core.errors import WanlabError
from wanlab.models.device import synchronise
from wanlab.models.families import family_of
from wanlab.models.families.base import PICTURE, Family
from wanlab.models.finite import StepCheck, check_video
from wanlab.models.inputs import prepared
from wanlab.models.schedulers import is_flow_matching
from wanlab.models.shapes import LatentShape, latent_shape, nearest_size, token_count
from wanlab.models.spec import ModelSpec
from wanlab.models.weights import check_size

COLD_BELOW, WARM_ABOVE = 0.05, 0.95


@dataclass(frozen=True)
class PartLoad:
    """Load of one part: time, bytes of its files, bytes on the device, and share of the files cached before the load."""

    part: str
    time_ms: float
    read_bytes: int
    memory_bytes: int
    cached_fraction: float | None

    @property
    def gb_per_s(self) -> float | None:
        """Read rate in 1e9 bytes per second; None when no file was read."""
        return self.read_bytes / self.time_ms / 1e6 if self.read_bytes and self.time_ms else None


@dataclass(frozen=True)
class LoadReport:
    """Load of a model: `weights` is "pretrained" or "random", `time_ms` lasts until the pipeline is ready."""

    weights: str
    time_ms: float
    parts: tuple[PartLoad, ...]
    cached_fraction: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Total size of the weight files."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        """Total size of weights and buffers on the device."""
        return sum(part.memory_bytes for part in self.parts)

    @property
    def gb_per_s(self) -> float | None:
        """Read rate of the whole load, in 1e9 bytes per second; None when no file was read."""
        return self.read_bytes / self.time_ms / 1e6 if self.read_bytes and self.time_ms else None

    @property
    def state(self) -> str:
        """State of the page cache before the load: "cold", "warm", "partly cached", "unknown" or "no files"."""
        if not self.read_bytes:
            return "no files"
        if self.cached_fraction is None:
            return "unknown"
        if self.cached_fraction < COLD_BELOW:
            return "cold"
        return "warm" if self.cached_fraction > WARM_ABOVE else "partly cached"

    def frame(self) -> pd.DataFrame:
        """One row per part and a row "total": time_ms, read_bytes, memory_bytes, gb_per_s, cached_percent.

        The total includes tokenizer, scheduler and checks, so it is more than the sum; imports of packages
        are not included.
        """
        rows = [_row(part.part, part) for part in self.parts] + [_row("total", self)]
        return pd.DataFrame(rows)


def _row(name: str, load: PartLoad | LoadReport) -> dict[str, object]:
    cached = load.cached_fraction
    unknown = float("nan")
    return {
        "part": name,
        "time_ms": load.time_ms,
        "read_bytes": load.read_bytes,
        "memory_bytes": load.memory_bytes,
        "gb_per_s": unknown if load.gb_per_s is None else load.gb_per_s,
        "cached_percent": unknown if cached is None else 100 * cached,
    }


OUTPUTS = ("np", "latent")
BEGINS, ENDS = "generation begins", "generation ends"
"""Names of zero-length ranges in a profile that enclose the interval of `Generation.wall_ms`."""


@dataclass(frozen=True)
class Generation:
    """A generated video.

    Attributes:
        video: float32 `[T, H, W, 3]` in [0, 1]; with `output="latent"` the latents, float32 `[C, T, H, W]`.
        fps: frames per second at which it should be shown.
        seed: seed of the initial noise.
        settings: all settings of the generation, chosen or default.
        wall_ms: time from prompt and image to video, including the wait for the device.
        notes: remarks about what was asked, e.g. that a prompt was cut.
    """

    video: np.ndarray
    fps: int
    seed: int
    settings: dict[str, Any]
    wall_ms: float
    notes: tuple[str, ...] = ()


@dataclass
class Model:
    """A diffusers pipeline with its facts.

    Attributes:
        notes: remarks for the reader of a result: what was read from the files, and what was said of generations. Copies
            that share the weights share the list.
        engines: component -> the engine that runs it, "eager" at first.
    """

    spec: ModelSpec
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    load: LoadReport
    notes: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.engines:
            self.spec.part_of(name)
        self.engines = dict.fromkeys(self.spec.components, "eager") | self.engines

    def component(self, name: str) -> Any:
        """The object that runs a component: `pipeline.transformer` for expert_high, the whole VAE for either half.

        Raises:
            WanlabError: the model has no such component, or it was not loaded.
        """
        network = getattr(self.pipeline, self.spec.part_of(name), None)
        if network is None:
            raise WanlabError(f"{self.spec.name}: {name} is not loaded; name it in load(..., components=...)")
        return network

    @property
    def components(self) -> dict[str, Any]:
        """Component name -> the object that runs it, for the loaded components, in the order of their use."""
        loaded = {
            name: getattr(self.pipeline, self.spec.part_of(name), None) for name in self.spec.components
        }
        return {name: module for name, module in loaded.items() if module is not None}

    @property
    def family(self) -> Family:
        """The family of models that it belongs to."""
        return family_of(self.spec.pipeline_class)

    @property
    def conditions(self) -> dict[str, str]:
        """Inputs that a generation needs besides the prompt: argument of the pipeline -> "picture" or "clip"."""
        needed = self.family.conditions(self.spec)
        image = inspect.signature(type(self.pipeline).__call__).parameters.get("image")
        if image is not None and image.default is image.empty:  # of a pipeline whose name does not tell
            needed = {"image": PICTURE} | needed
        return needed

    @property
    def text_tokens(self) -> int:
        """Tokens that a prompt is padded to: the model's setting, or the tokenizer's limit where that is lower; for some
        denoisers a fixed number."""
        return text_tokens(self.pipeline, self.spec)

    def schedule(self, steps: int | None = None, **size: int | None) -> pd.DataFrame:
        """The denoising steps, known before the run: step, timestep, sigma, snr, component.

        Computed on a copy of the scheduler, which is not changed. The expert is chosen by the pipeline's rule:
        expert_high while timestep >= boundary_ratio * training timesteps. snr is ((1 - sigma) / sigma)**2 for
        flow matching, where x = (1 - sigma) x0 + sigma noise, and 1 / sigma**2 for schedulers of other kinds. Timestep,
        sigma and snr are NaN where the scheduler wants more than the number of steps, and the family is not known.

        Args:
            steps: number of steps; the model's default if None.
            size: height, width and frames of the video, on which the schedule of some families depends; the default of
                the model where it is not given.
        """
        return pd.DataFrame(
            step_table(self.pipeline, self.spec, _whole("steps", steps, self.spec.defaults.steps), **size)
        )

    def generate(
        self,
        image: Any,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        conditions: Mapping[str, Any] | None = None,
        output: str = "np",
        progress: bool = False,
    ) -> Generation:
        """Generate a video from a prompt and what else the model needs; other settings come from `spec.defaults`.

        The noise is drawn on the CPU, so that a seed means the same on every device.

        Args:
            image: first frame: PIL image, path, or array `[H, W, 3]`, uint8 or float in [0, 1]. Scaled to
                cover the video (Lanczos) and cropped in the middle. None for text-to-video models.
            prompt: description of what happens.
            negative_prompt: description of what guidance avoids.
            height, width: size in pixels. frames: number of frames, including the first.
            steps: denoising steps.
            guidance_scale: 1 or less runs without guidance, in half the time.
            seed: seed of the initial noise.
            conditions: further inputs that the model needs (see the attribute `conditions`), by name: pictures as for
                `image`, clips as an array `[T, H, W, 3]` or a list of pictures, of at least `frames` frames.
            output: "np" for the video, "latent" to skip the decoder.
            progress: show a bar over the steps.

        Raises:
            WanlabError: a size that is not legal, an input that is missing, not taken or unreadable, a network that is
                not loaded, or a wrong option.
        """
        defaults = self.spec.defaults
        if output not in OUTPUTS:
            raise WanlabError(f"output is {' or '.join(map(repr, OUTPUTS))}, not {output!r}")
        if not isinstance(prompt, str):
            raise WanlabError(f"prompt must be a string, not {type(prompt).__name__}")
        settings: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": defaults.height if height is None else height,
            "width": defaults.width if width is None else width,
            "frames": defaults.frames if frames is None else frames,
            "steps": _whole("steps", steps, defaults.steps),
            "guidance_scale": float(defaults.guidance_scale if guidance_scale is None else guidance_scale),
            "output": output,
        }
        if not math.isfinite(settings["guidance_scale"]):
            raise WanlabError(f"guidance_scale must be a finite number, not {settings['guidance_scale']}")
        if settings["steps"] < self.family.fewest_steps:
            raise WanlabError(
                f"{self.family} needs at least {self.family.fewest_steps} denoising steps, not {settings['steps']}"
            )
        latent = latent_shape(self.spec, settings["height"], settings["width"], settings["frames"])
        self._check_loaded(output)
        check_size(self.spec, settings, self.device, self.dtype.itemsize)
        if not hasattr(seed, "__index__") or seed < 0:
            raise WanlabError(f"seed must be a whole number of at least 0, not {seed!r}")
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        size = (settings["frames"], settings["height"], settings["width"])
        inputs, notes = prepared(
            self.spec.name, self.conditions, {"image": image} | dict(conditions or {}), size
        )
        arguments = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": settings["height"],
            "width": settings["width"],
            **dict.fromkeys(("num_frames", "frames", "video_length"), settings["frames"]),
            "use_resolution_binning": False,  # the size is the one that was asked for
            "frame_rate": defaults.fps,
            "num_inference_steps": settings["steps"],
            "guidance_scale": settings["guidance_scale"],
            "generator": torch.Generator("cpu").manual_seed(limits.check_seed(int(seed))),
            "output_type": output,
            "max_sequence_length": self.text_tokens,
        }
        arguments = {key: value for key, value in arguments.items() if key in accepted}
        arguments |= inputs | self.family.arguments(settings)
        self._check_arguments(accepted, arguments)

        notes += self.remarks(settings, latent)
        assumed = [
            name
            for name, value in (("height", height), ("width", width), ("frames", frames))
            if value is None
        ]
        if assumed and not self.spec.sizes_stated:
            sizes = ", ".join(f"{name} {settings[name]}" for name in assumed)
            notes.append(
                f"{self.spec.name} states no sizes of its own: {sizes} are assumed; state them in wanlab.json"
            )
        self.notes += [note for note in notes if note not in self.notes]
        if "callback_on_step_end" in accepted:
            arguments |= StepCheck(self, settings["steps"]).arguments(accepted)

        self.pipeline.set_progress_bar_config(disable=not progress, desc=self.spec.name, unit="step")
        try:
            synchronise(self.device)
            with torch.profiler.record_function(BEGINS):
                start = time.perf_counter()
            videos = self.pipeline(**arguments).frames
            synchronise(self.device)
            with torch.profiler.record_function(ENDS):
                wall_ms = (time.perf_counter() - start) * 1e3
        finally:
            self.pipeline.set_progress_bar_config(disable=True)
        video = _array(videos)
        if output == "latent":
            video = self.family.unpacked(video, (latent.channels, latent.frames, latent.height, latent.width))
        check_video(video, self.spec.name)
        return Generation(video, defaults.fps, int(seed), settings, wall_ms, tuple(notes))

    def remarks(self, settings: Mapping[str, Any], latent: LatentShape) -> list[str]:
        """What a reader of the video should know: prompts that are cut, an expert that is not used, unusual sizes.

        Args:
            settings: prompt, negative_prompt, guidance_scale and steps of a generation.
            latent: shape of its latents.
        """
        texts = [("prompt", settings["prompt"])]
        if settings["guidance_scale"] > 1:
            texts.append(("negative_prompt", settings["negative_prompt"]))
        remarks = [self._cut(name, text) for name, text in texts]
        remarks += [idle_expert(self.pipeline, self.spec, settings["steps"]), unusual_size(self.spec, latent)]
        return [remark for remark in remarks if remark]

    def _cut(self, name: str, text: str) -> str:
        """A sentence about the end of a text that the text encoder does not take; empty if it takes all."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if tokenizer is None or not isinstance(text, str):
            return ""
        tokens = len(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
        limit = self.text_tokens
        if tokens <= limit:
            return ""
        return (
            f"{name} has {tokens} tokens and the text encoder takes {limit}: its end is cut"
            f" (it ends in {text.strip()[-40:]!r}); shorten it"
        )

    def _check_loaded(self, output: str) -> None:
        for name in self.spec.components:
            # Both halves of the VAE are one part; without a decoder there is no image latent either.
            if not (output == "latent" and name == "vae_decoder"):
                self.component(name)

    def _check_arguments(self, accepted: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
        """A pipeline of a family that is not known may need what nobody gives."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        missing = [
            name
            for name, parameter in accepted.items()
            if parameter.default is parameter.empty
            and parameter.kind not in variadic
            and name not in ("self", *given)
        ]
        if missing:
            raise WanlabError(
                f"{self.spec.name}: {self.spec.pipeline_class} needs {', '.join(missing)}, which wanlab cannot give;"
                " call its pipeline yourself, or add its family (CONTRIBUTING.md)"
            )


def text_tokens(pipeline: Any, spec: ModelSpec) -> int:
    """See `Model.text_tokens`."""
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "transformer_2", None)
    if denoiser is not None and (fixed := family_of(spec.pipeline_class).fixed_text_tokens(denoiser.config)):
        return fixed
    longest = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    return int(min(spec.defaults.text_tokens, longest or math.inf))


def _whole(name: str, value: int | None, otherwise: int) -> int:
    value = otherwise if value is None else value
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < 1:
        raise WanlabError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


def _array(videos: Any) -> np.ndarray:
    """First video of the batch as float32."""
    first = videos[0]
    if hasattr(first, "detach"):
        first = first.detach().float().cpu().numpy()
    return np.ascontiguousarray(first, dtype=np.float32)


def step_table(
    pipeline: DiffusionPipeline, spec: ModelSpec, steps: int, **size: int | None
) -> list[dict[str, object]]:
    """Rows step, timestep, sigma, snr, component; see `Model.schedule`."""
    # Not `type`: while calls are recorded, a proxy takes the scheduler's place.
    scheduler = pipeline.scheduler.__class__.from_config(pipeline.scheduler.config)
    known = set_timesteps(scheduler, spec, steps, size)
    training_steps = scheduler.config.get("num_train_timesteps", 1000)
    experts = [name for name in spec.components if name.startswith("expert")]
    ratio = boundary_ratio(pipeline, spec)
    boundary = -math.inf if ratio is None else ratio * training_steps
    rows = []
    for step, timestep in enumerate(scheduler.timesteps[:steps] if known else [math.nan] * steps):
        sigma, snr = _noise(scheduler, step, timestep) if known else (math.nan, math.nan)
        rows.append(
            {
                "step": step,
                "timestep": float(timestep),
                "sigma": sigma,
                "snr": snr,
                # Compared as a tensor, as the pipeline does, so that rounding is the same.
                "component": experts[-1] if timestep < boundary else experts[0],
            }
        )
    return rows


def set_timesteps(scheduler: Any, spec: ModelSpec, steps: int, size: Mapping[str, int | None]) -> bool:
    """Set the timesteps as the pipeline does; False if that is not known."""
    family, usual = family_of(spec.pipeline_class), spec.defaults
    sides = [size.get(name) or getattr(usual, name) for name in ("height", "width", "frames")]
    tokens = token_count(spec, *nearest_size(spec, *sides))
    arguments = family.schedule(spec, steps, tokens)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if not arguments or (
        not family.title and "sigmas" in accepted
    ):  # the pipeline may give sigmas of its own
        return False
    if "sigmas" in arguments and "sigmas" not in accepted:  # another scheduler was put into the model
        arguments = {"num_inference_steps": steps}
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    try:
        scheduler.set_timesteps(**arguments, device="cpu")
    except (ValueError, TypeError):
        if family.title:
            raise
        return False
    return True


def _noise(scheduler: Any, step: int, timestep: float) -> tuple[float, float]:
    """Sigma and signal-to-noise ratio of a step."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None and hasattr(scheduler, "alphas_cumprod"):
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        return (math.sqrt((1 - signal) / signal), signal / (1 - signal)) if signal else (math.inf, 0.0)
    training_steps = scheduler.config.get("num_train_timesteps", 1000)
    sigma = float(sigmas[step]) if sigmas is not None else float(timestep) / training_steps
    flow = is_flow_matching(scheduler)
    return sigma, ((1 - sigma) / sigma if flow else 1 / sigma) ** 2 if sigma else math.inf


def idle_expert(pipeline: DiffusionPipeline, spec: ModelSpec, steps: int) -> str:
    """A sentence if one of two experts runs in no step; else empty."""
    experts = [name for name in spec.components if name.startswith("expert")]
    if len(experts) < 2:
        return ""
    used = {str(row["component"]) for row in step_table(pipeline, spec, steps)}
    idle = [name for name in experts if name not in used]
    if not idle:
        return ""
    ratio = boundary_ratio(pipeline, spec)
    why = "boundary_ratio is null" if ratio is None else f"boundary_ratio is {ratio:g}"
    return (
        f"{' and '.join(idle)} runs in none of {steps} steps ({why}): {', '.join(sorted(used))} runs them all"
    )


UNUSUAL_RATIO = 4
"""Sizes with so many times more or fewer tokens than the model was made for are remarked on; 480p and 720p differ by 2.3."""


def unusual_size(spec: ModelSpec, latent: LatentShape) -> str:
    """A sentence if a video is far larger or smaller than all sizes that the model is known to be made for; else empty."""
    usual = spec.defaults
    if not spec.sizes_stated:
        return ""
    sizes = ((usual.height, usual.width, usual.frames), *usual.other_sizes)
    ratios = {size: latent.tokens / latent_shape(spec, *nearest_size(spec, *size)).tokens for size in sizes}
    (height, width, frames), ratio = min(ratios.items(), key=lambda each: abs(math.log(each[1])))
    if 1 / UNUSUAL_RATIO <= ratio <= UNUSUAL_RATIO:
        return ""
    size = (latent.height * spec.spatial_factor, latent.width * spec.spatial_factor)
    here = f"{size[0]}x{size[1]} with {(latent.frames - 1) * spec.temporal_factor + 1} frames"
    other = f"{1 / ratio:.0f} times smaller" if ratio < 1 else f"{ratio:.0f} times larger"
    return (
        f"measured at {here}, {other} than the model's usual {height}x{width} with {frames}: times and quality at the usual"
        " size cannot be concluded from it"
    )


def boundary_ratio(pipeline: DiffusionPipeline, spec: ModelSpec) -> float | None:
    """The ratio that the pipeline will use; its configuration may have changed since it was loaded."""
    config = getattr(pipeline, "config", None) or {}
    return config.get("boundary_ratio", spec.boundary_ratio)
