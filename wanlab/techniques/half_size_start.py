"""Half-size start: first steps on latents of half the height and width, while noise hides what only the full size holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.schedulers import is_flow_matching, named_as
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.technique import Bound, Proof, Shares, Technique

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    torch = LazyModule("torch")

_FIXED = "its graph has one size of video"
WAN21_SPECTRUM = (219.48, 2.4227)
"""Amplitude A and exponent b of the power spectrum A w^-b of latents of Wan 2.1's VAE, which Wan2.2 A14B has too; from
`speed-generator/scripts/configs.yaml` of https://github.com/howardhx/speed."""


class HalfSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the latents grow.

    Attributes:
        until: noise level sigma, 0 (clean) to 1 (noise): steps that begin above it are made at half size. The step that
            begins at s <= until is made at full size from 2 s / (1 + s), to which growing takes the latents back; with
            until <= b / (2 - b) that is below the boundary b of two experts, so the high-noise one is not called again
            (0.818 for b = 0.9).
    """

    until: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.8


class HalfSizeStart(Technique[HalfSettings]):
    """Spectral progressive diffusion (arXiv:2605.18736) for image-to-video models, with two sizes.

    In the discrete cosine transform (DCT-II, orthonormal) of latents at noise level t, coefficients of high frequency are
    nearly noise alone: t e. So latents x of half the size hold all else. They grow by k (C(x), t e), transformed back, with
    C(x) as the low frequencies, r the ratio of the sides and k = r / (1 + (r - 1) t): exactly latents of the full size at
    noise level k t, since a coefficient of the same content is r times as large there. The noise e is that of the full size:
    the low frequencies of a seed's noise start the half size, the high ones are filled in. The solver's history is dropped.

    The first frame is encoded at both sizes. Every rule inside begins anew when the latents grow.
    """

    name = "half_size_start"
    does = "makes the steps at high noise levels at half the height and width, and grows the latents with exact noise"
    tier = "lossy"
    order = 40
    order_reason = "it changes the size of what every rule inside sees, and tells them to begin anew"
    touches: ClassVar[tuple[str, ...]] = (*EXPERTS, "vae_encoder")
    not_with: ClassVar[Mapping[str, str]] = {
        "mag_cache": "the ratios of its plan are those of steps of one size"
    }
    not_on: ClassVar[Mapping[str, str]] = {"onnxruntime": _FIXED, "tensorrt": _FIXED, "tvm": _FIXED}
    Settings = HalfSettings

    def __init__(self, settings: HalfSettings | None = None) -> None:
        super().__init__(settings)
        self.growth = Growth(self.settings.until)

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if spec.pipeline_class != "WanImageToVideoPipeline":
            return (
                "a WanImageToVideoPipeline, whose first frame it encodes at both sizes;"
                f" {spec.name} has {spec.pipeline_class}"
            )
        if spec.expand_timesteps:
            return f"a model with one timestep for all tokens; {spec.name} gives the first frame's tokens another"
        return ""

    def bound(self, shares: Shares) -> Bound:
        cost = (1 - shares.self_attention) / 4 + shares.self_attention / 16
        saved = shares.denoising * (1 - cost) * (1 - 1 / shares.steps)
        return Bound(
            saved,
            f"a forward at half size is {100 * cost:.2g} % of a full one, and the last step is a full one",
        )

    def apply(self, place: Place) -> None:
        pipeline = place.model.pipeline
        scheduler = pipeline.scheduler
        if not is_flow_matching(scheduler):
            raise WanlabError(
                f"half_size_start needs a scheduler of flow matching, and {place.model.spec.name} has"
                f" {type(scheduler).__name__} without use_flow_sigmas"
            )
        self.growth.patch = tuple(place.model.components[_first_expert(place)].config.patch_size)[1:]
        pipeline.scheduler = _growing(scheduler, self.growth)
        pipeline.__class__ = _encoding_both(type(pipeline))
        pipeline.wanlab_growth = self.growth
        place.add(GrowRule(self.growth))

    def proof(self, place: Place) -> Proof:
        growth, calls = self.growth, place.calls
        ran = calls[calls["ran"]]
        sizes = list(dict.fromkeys(ran["size"]))
        if len(sizes) < 2:
            return Proof(
                False,
                f"{self.name} made all {len(ran)} calls at one size, {_size(sizes[0])}: {growth.why_one_size}.",
            )
        small, large = min(sizes, key=math.prod), max(sizes, key=math.prod)
        halved = ran["size"] == small
        for component in dict.fromkeys(ran["component"]):
            early = ran[(ran["component"] == component) & (ran["step"] < growth.first_full)]
            if (early["size"] != small).any():
                return Proof(
                    False,
                    f"{self.name} made {int((early['size'] != small).sum())} of {len(early)} calls of the"
                    f" {component_title(component)} before step {growth.first_full + 1} at full size.",
                )
        if halved[ran["step"] >= growth.first_full].any() or len(sizes) > 2:
            return Proof(
                False, f"{self.name} did not grow at step {growth.first_full + 1}, but went on at half size."
            )
        parts = [
            f"{int(halved[rows.index].sum())} of {len(rows)} calls of the {component_title(str(component))}"
            for component, rows in ran.groupby("component", sort=False)
        ]
        return Proof(
            True,
            f"{self.name} made {listed(parts)} on latents of {_size(small)} in place of {_size(large)}, which grew before"
            f" step {growth.first_full + 1}, at noise level {growth.reached:.2f}, to {growth.level:.2f}.",
        )


def _first_expert(place: Place) -> str:
    return next(name for name in place.model.components if name in EXPERTS)


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def noise_level_for(
    tolerance: float,
    height: int,
    width: int,
    spectrum: tuple[float, float] = WAN21_SPECTRUM,
    ratio: float = 0.5,
) -> float:
    """The noise level down to which a smaller size holds all that is not nearly noise; a value for `until`.

    At t = 1 / (1 + sqrt(d / (P (1 + P - d)))) the power P of the highest frequency of the smaller size differs from noise by
    the share d (equations 9 and 10 of arXiv:2605.18736).

    Args:
        tolerance: the share d, between 0 and 1; 0.01 and 0.05 in the publication.
        height, width: of the latents at full size. ratio: of the sides of the smaller size.
        spectrum: amplitude and exponent of the power spectrum of the model's latents.
    """
    amplitude, exponent = spectrum
    power = amplitude * (ratio * min(height, width) / 2) ** -exponent
    return 1 / (1 + math.sqrt(tolerance / (power * (1 + power - tolerance))))


class Growth:
    """The latents of one generation while they are small, shared by the pipeline, its scheduler and the rule.

    Attributes:
        until: as in the settings. patch: positions per token along height and width.
        first_full: the first step at full size.
        reached: noise level at which the latents grow. level: that of the latents at full size.
        latents: the small latents `[B, C, T, H, W]`; None before they are made and after they grew.
        condition: what the denoiser takes beside them: mask and latents of the first frame at half size.
        why_one_size: why a generation had one size.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self.patch: tuple[int, ...] = (2, 2)
        self.begin(0, 0.0)

    def __deepcopy__(self, memo: Any) -> Growth:
        """Copies of the scheduler share it."""
        return self

    def begin(self, first_full: int, reached: float) -> None:
        """A generation begins."""
        self.first_full, self.reached, self.level = first_full, reached, reached
        self.latents: torch.Tensor | None = None
        self.condition: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None
        self.why_one_size = f"no step but the last begins above noise level {self.until:g}"

    def start(self, noise: torch.Tensor) -> None:
        """Take the low frequencies of the full size's noise, `[B, C, T, H, W]`."""
        low = [
            _dct(side, noise)[:small] for side, small in zip(noise.shape[-2:], self.small(noise), strict=True)
        ]
        back = [_dct(rows.shape[0], noise) for rows in low]
        self.noise = noise
        self.latents = back[0].T @ (low[0] @ noise @ low[1].T) @ back[1]

    def small(self, full: torch.Tensor) -> tuple[int, int]:
        """Height and width of half the size, in whole tokens.

        Raises:
            WanlabError: the latents have one token along a side.
        """
        sides = [side // (2 * patch) * patch for side, patch in zip(full.shape[-2:], self.patch, strict=True)]
        if 0 in sides:
            raise WanlabError(
                f"latents of {_size(tuple(full.shape[-2:]))} cannot be halved for half_size_start; make a larger video"
            )
        return sides[0], sides[1]

    def ratio(self, full: torch.Tensor) -> float:
        """How many times as long a side of the full size is; the mean of both where they do not halve evenly."""
        return math.sqrt(math.prod(full.shape[-2:]) / math.prod(self.small(full)))

    def aligned(self, level: float, ratio: float) -> float:
        """The noise level of latents at `level` after they grew."""
        return level * ratio / (1 + (ratio - 1) * level)

    def grown(self) -> torch.Tensor:
        """The latents at full size, at noise level `level`."""
        assert self.latents is not None
        assert self.noise is not None
        height, width = self.noise.shape[-2:]
        rows, columns = _dct(height, self.noise), _dct(width, self.noise)
        whole = self.reached * (rows @ self.noise @ columns.T)
        small = self.latents.to(whole.dtype)
        low = _dct(small.shape[-2], small) @ small @ _dct(small.shape[-1], small).T
        whole[..., : small.shape[-2], : small.shape[-1]] = low
        scale = self.level / self.reached
        return scale * (rows.T @ whole @ columns)


def _dct(size: int, like: torch.Tensor) -> torch.Tensor:
    """The orthonormal DCT-II of vectors of a size, `[size, size]`, a row per frequency."""
    position = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (position[None] + 0.5) * position[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.device, like.dtype)


class GrowRule:
    """Gives the denoisers the small latents until they grow."""

    name = HalfSizeStart.name

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.begin()

    def begin(self) -> None:
        self._anew: set[str] = set()  # branches that have begun anew at full size

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        growth = self.growth
        if growth.latents is not None and growth.condition is not None:
            both = torch.cat([growth.latents, growth.condition], dim=1).to(call.latents.dtype)
            return inner(replace(call, arguments=call.arguments | {"hidden_states": both}))
        if growth.first_full and call.branch not in self._anew:
            self._anew.add(call.branch)
            call = replace(call, first=True)
        return inner(call)


def _growing(scheduler: Any, growth: Growth) -> Any:
    """A copy of a scheduler that steps the small latents, and passes the large ones on until they grow."""
    base: Any = type(scheduler)

    class GrowingScheduler(base):
        @wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            result = super().set_timesteps(*args, **kwargs)
            growth = getattr(
                self, "wanlab_growth", None
            )  # those made from this one's configuration have none
            if growth is not None:
                levels = [float(level) for level in self.sigmas[: len(self.timesteps)]]
                first = next(
                    (step for step, level in enumerate(levels) if level <= growth.until), len(levels)
                )
                first = min(first, len(levels) - 1)
                growth.begin(first, levels[first])
            return result

        @wraps(base.step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            growth = getattr(self, "wanlab_growth", None)
            if growth is None or growth.latents is None:
                return super().step(model_output, timestep, sample, *args, **kwargs)
            result = super().step(model_output, timestep, growth.latents, *args, **kwargs)
            growth.latents, large = result[0], sample
            if self.step_index == growth.first_full:
                large = growth.grown().to(sample.dtype)
                growth.latents = growth.condition = growth.noise = None
                self.sigmas[growth.first_full] = growth.level
                forget_history(self)
            return (large,) if isinstance(result, tuple) else type(result)(prev_sample=large)

    changed = copy.deepcopy(scheduler)
    changed.__class__ = named_as(GrowingScheduler, base)
    changed.wanlab_growth = growth
    return changed


def forget_history(scheduler: Any) -> None:
    """Drop what a multistep solver keeps of its last steps; it goes on as it began."""
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)
    for name, value in (("lower_order_nums", 0), ("last_sample", None)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)


def _encoding_both(base: Any) -> type:
    """A pipeline class that prepares the first frame at half size too."""

    class BothSizesPipeline(base):
        @wraps(base.prepare_latents)
        def prepare_latents(self, image, batch_size, channels, height, width, frames, *args, **kwargs):
            large, condition = super().prepare_latents(
                image, batch_size, channels, height, width, frames, *args, **kwargs
            )
            growth = self.wanlab_growth
            if growth.first_full:
                growth.level = growth.aligned(growth.reached, growth.ratio(large))
                times = self.scheduler.timesteps  # the pipeline reads them in the loop, after this
                times[growth.first_full] = round(growth.level * self.scheduler.config.num_train_timesteps)
                growth.start(large)
                factor = self.vae_scale_factor_spatial
                height, width = (side * factor for side in growth.small(large))
                given = (
                    dict(zip(("dtype", "device", "generator", "latents", "last_image"), args, strict=False))
                    | kwargs
                )
                given |= {"latents": growth.latents, "generator": None}
                if given.get("last_image") is not None:
                    given["last_image"] = _shrunk(given["last_image"], height, width)
                _, growth.condition = super().prepare_latents(
                    _shrunk(image, height, width), batch_size, channels, height, width, frames, **given
                )
            return large, condition

    return named_as(BothSizesPipeline, base)


def _shrunk(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pictures `[B, 3, H, W]` at another size."""
    size = (height, width)
    return torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
