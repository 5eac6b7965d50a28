"""MagCache: skipped steps are planned before the run, from how the magnitude of the residual changes over the steps."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.files import read_json, write_json
from wanlab.core.lazy import LazyModule
from wanlab.models.families import family_of
from wanlab.models.spec import ModelSpec, component_title
from wanlab.techniques.easy_cache import Decision
from wanlab.techniques.technique import Bound, Proof, Shares, Technique, proof_of_skips

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from wanlab.models.pipeline import Model
    from wanlab.precision import recording
    from wanlab.techniques import place as place_module
    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    recording = LazyModule("wanlab.precision.recording")
    place_module = LazyModule("wanlab.techniques.place")


class MagSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which calls are skipped.

    Attributes:
        threshold: sum of the errors |1 - R| up to which calls are skipped, with R the product of the ratios since the last
            computed call; 0.06 to 0.24 in publications.
        in_a_row: calls that are skipped in a row at most.
        first_percent: percent of the steps of each expert, from its first, that are computed; its first step always is.
        rescaled: whether the kept residual is multiplied by R, which is known; the publication reuses it as it is.
        ratios: file of `Magnitudes.save`; empty measures them in a generation of their own, before the first video of each
            size and number of steps.
    """

    threshold: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.06
    in_a_row: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2
    first_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0
    rescaled: bool = True
    ratios: str = ""


class Planned(msgspec.Struct, frozen=True):
    """One call of a plan.

    Attributes:
        ratio: mean ratio of the magnitudes of its residual and that of the call before; None in the first step of an expert.
        product: of the ratios since the last computed call. error: sum of |1 - product| since then.
        skipped: whether it is skipped. source: step of the computed call that answers it.
    """

    step: int
    component: str
    branch: str
    ratio: float | None
    product: float
    error: float
    skipped: bool
    source: int


class Ratio(msgspec.Struct, frozen=True):
    """How a residual's magnitude changed from the step before, mean over the positions; None in an expert's first step."""

    step: int
    component: str
    branch: str
    ratio: float | None


class Magnitudes(msgspec.Struct, frozen=True):
    """Ratios of magnitudes over the steps of one schedule, of each branch of guidance.

    They belong to the weights, the scheduler and the number of steps. Pictures change them too, less than the threshold by
    the publication; measure several of your own to see how much.

    Attributes:
        model: its name. scheduler: class of its scheduler. steps: denoising steps.
        ratios: of every call, in order.
    """

    model: str
    scheduler: str
    steps: int
    ratios: tuple[Ratio, ...]

    def plan(self, settings: MagSettings | None = None) -> list[Planned]:
        """Which calls are skipped; each expert is a zone of its own, whose first steps are computed."""
        settings = settings or MagSettings()
        rows: list[Planned] = []
        for branch in dict.fromkeys(each.branch for each in self.ratios):
            own = [each for each in self.ratios if each.branch == branch]
            for zone in _zones(own):
                rows += _zone_plan(zone, settings)
        return sorted(rows, key=lambda row: row.step)

    def save(self, path: str | os.PathLike) -> Path:
        """Write them to a JSON file, for the setting `ratios`."""
        return write_json(path, msgspec.to_builtins(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Magnitudes:
        """Read a file of `save`.

        Raises:
            WanlabError: no such file, or not one of `save`.
        """
        try:
            return msgspec.convert(read_json(path), cls)
        except msgspec.ValidationError as error:
            raise WanlabError(
                f"{os.fspath(path)} holds no ratios of magnitudes ({error}); write one with"
                " techniques.measure_magnitudes(model).save(path)"
            ) from None


def _zones(own: list[Ratio]) -> Iterator[list[Ratio]]:
    """Runs of one expert."""
    start = 0
    for index in range(1, len(own) + 1):
        if index == len(own) or own[index].component != own[start].component:
            yield own[start:index]
            start = index


def _zone_plan(zone: list[Ratio], settings: MagSettings) -> Iterator[Planned]:
    computed = max(1, math.ceil(settings.first_percent / 100 * len(zone)))
    product, error, skips, source = 1.0, 0.0, 0, zone[0].step
    for index, each in enumerate(zone):
        skipped = False
        if index >= computed:
            product *= 1.0 if each.ratio is None else each.ratio
            error += abs(1 - product)
            skipped = error < settings.threshold and skips < settings.in_a_row
        yield Planned(
            each.step,
            each.component,
            each.branch,
            each.ratio,
            product,
            error,
            skipped,
            source if skipped else each.step,
        )
        if skipped:
            skips += 1
        else:
            product, error, skips, source = 1.0, 0.0, 0, each.step


class MagCache(Technique[MagSettings]):
    """Ma et al. 2025, "MagCache: fast video generation with magnitude-aware cache" (arXiv:2506.09045), with a zone in each
    expert.

    With x the noisy latents and y what is predicted for them, the residual is y - x. One generation measures by which ratio
    its magnitude changes from step to step, so the skipped calls are known before the run, and no decision waits for the
    device. Nothing is kept when another expert takes over.

    Why not the hook of diffusers 0.42: it counts the calls of each expert up to the steps of the whole schedule, which no
    expert of two makes. So it takes the ratios of the first steps for those of the low-noise expert, keeps the first share
    of all steps in each, and goes into the next video with the residual and the count of the last one. The publication's
    code for the image-to-video model of Wan2.2 has one zone that ends at the switch and skips in the low-noise expert only.
    """

    name = "mag_cache"
    does = "skips the calls of a plan, made from how the magnitude of the residual changes over the steps of each expert"
    tier = "lossy"
    order = 21
    order_reason = "it decides for each branch of guidance, so what skips a branch stands outside of it"
    not_with: ClassVar[Mapping[str, str]] = {
        "easy_cache": "both decide which steps are computed",
    }
    Settings = MagSettings

    def __init__(self, settings: MagSettings | None = None) -> None:
        super().__init__(settings)
        self.rule: MagRule | None = None

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if family_of(spec.pipeline_class).title != "Wan":
            return f"a model of the Wan family, whose latents tell the size of the video; {spec.name} is of another"
        return ""

    def bound(self, shares: Shares) -> Bound:
        first = self.settings.first_percent / 100
        longest = self.settings.in_a_row
        saved = shares.denoising * (1 - first) * longest / (longest + 1)
        return Bound(
            saved,
            f"of the steps after the first {self.settings.first_percent:g} % one in {longest + 1} is computed",
        )

    def apply(self, place: Place) -> None:
        known = [Magnitudes.load(self.settings.ratios)] if self.settings.ratios else []
        self.rule = MagRule(self.settings, place, known)
        place.add(self.rule)

    def proof(self, place: Place) -> Proof:
        proof = proof_of_skips(place.calls, self.name, self._why_none(self.plan))
        if not proof.passed:
            return proof
        calls = place.calls
        for component in dict.fromkeys(calls["component"]):
            own = [row for row in self.plan if row.component == component]
            reached = calls[(calls["component"] == component) & (calls["by"].isin(["", self.name]))]
            if len({row.step for row in own}) > 1 and not (reached["by"] == self.name).any():
                return Proof(
                    False,
                    f"{self.name} skipped nothing on the {component_title(component)}: {self._why_none(own)}.",
                )
        return proof

    def _why_none(self, plan: list[Planned]) -> str:
        errors = [row.error for row in plan if row.error > 0]
        smallest = (
            f"the smallest error of a step is {min(errors):.3g}" if errors else "no step may be skipped"
        )
        return f"{smallest}, the threshold is {self.settings.threshold:g}"

    @property
    def plan(self) -> list[Planned]:
        """The plan of the last generation; empty before the first."""
        return [] if self.rule is None else self.rule.plan

    @property
    def decisions(self) -> list[Decision]:
        """The plan of the branch with text, as a cache that decides at every step would tell it."""
        branches = ("cond", "both")
        return [
            Decision(row.step, row.component, abs(1 - (row.ratio or 1.0)), row.error, row.skipped)
            for row in self.plan
            if row.branch in branches and row.error > 0
        ]


class MagRule:
    """The cache of one generation, and the plans of all generations."""

    name = MagCache.name

    def __init__(self, settings: MagSettings, place: Place, known: list[Magnitudes]) -> None:
        self.settings, self.place, self.known = settings, place, known
        self.plan: list[Planned] = []
        self._plans: dict[tuple[int, ...], list[Planned]] = {}
        self.begin()

    def begin(self) -> None:
        self._rows: dict[tuple[int, str], Planned] | None = None
        self._kept: dict[
            str, tuple[str, int, torch.Tensor]
        ] = {}  # branch -> expert, step, residual of the last computed

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        if self._rows is None:
            self.plan = self._plan_for(call)
            self._rows = {(row.step, row.branch): row for row in self.plan}
        if call.first:
            self._kept.pop(call.branch, None)
        row, kept = self._rows.get((call.step, call.branch)), self._kept.get(call.branch)
        if row is not None and row.skipped and kept is not None and kept[:2] == (call.component, row.source):
            residual = kept[2] * row.product if self.settings.rescaled else kept[2]
            return (_noisy(call, residual).float() + residual).to(call.latents.dtype)
        other = self._rows.get((call.step, "uncond"))
        alone = call.alone or (call.branch == "cond" and other is not None and other.skipped)
        prediction = inner(replace(call, alone=alone))
        residual = prediction.float() - _noisy(call, prediction).float()
        self._kept[call.branch] = (call.component, call.step, residual)
        return prediction

    def _plan_for(self, call: Call) -> list[Planned]:
        """The plan of the schedule of a generation, from its first call; measures the ratios where they are not known."""
        model = self.place.bare
        steps = asked_steps(self.place.model.pipeline.scheduler, call.steps)
        size = size_of(model.spec, call)
        key = (steps, *size.values())
        if key not in self._plans:
            if self.settings.ratios:
                magnitudes = self.known[0]
                _check(magnitudes, self.settings.ratios, model, steps)
            else:
                magnitudes = measure_magnitudes(model, steps=steps, **size)
                self.known.append(magnitudes)
                for forget in self.place.denoising.at_begin:  # what networks remember of the other generation
                    forget()
            self._plans[key] = magnitudes.plan(self.settings)
        return self._plans[key]


def asked_steps(scheduler: Any, steps: int) -> int:
    """The steps that a generation asked for, of which a solver may make fewer."""
    return getattr(scheduler, "wanlab_asked", None) or steps


def size_of(spec: ModelSpec, call: Call) -> dict[str, Any]:
    """Height, width and frames of the video that a call of a Wan denoiser makes, `[B, C, T, H, W]`."""
    frames, height, width = call.latents.shape[2:]
    factor = spec.spatial_factor
    return {
        "height": height * factor,
        "width": width * factor,
        "frames": (frames - 1) * spec.temporal_factor + 1,
    }


def _check(magnitudes: Magnitudes, path: str, model: Model, steps: int) -> None:
    scheduler = type(model.pipeline.scheduler).__name__
    for what, measured, here in (
        ("model", magnitudes.model, model.spec.name),
        ("scheduler", magnitudes.scheduler, scheduler),
        ("number of steps", magnitudes.steps, steps),
    ):
        if measured != here:
            raise WanlabError(
                f"{path} was measured with another {what}, {measured}, than this generation's, {here}; measure the ratios"
                " anew, or leave the setting `ratios` of mag_cache out"
            )


def measure_magnitudes(
    model: Model, image: Any = None, prompt: str | None = None, *, seed: int = 0, **settings: Any
) -> Magnitudes:
    """Measure how the magnitude of the residual changes over the steps, in one generation that computes every call.

    The ratio of a call is the mean over the positions of the latents of |r| / |r'|, with r its residual and r' that of the
    call of the same branch and expert a step before, each a vector along the channels.

    Args:
        model: from `wanlab.models.load`, or with engines; it stays as it is.
        image, prompt, seed: of the generation; an example like those that plans are calibrated on where no prompt is given.
        settings: height, width, frames, steps, guidance_scale and conditions of `Model.generate`.

    Raises:
        WanlabError: as `Model.generate`.
    """
    if prompt is None:
        example = recording.nano_examples(1)[0]
        settings = example.inputs(model, settings.get("frames")) | settings
        image, prompt = settings.pop("image"), example.prompt
    place, measured = place_module.Place(model), MeasureRule()
    place.add(measured)
    place.finish(place.model).generate(image, prompt, seed=seed, output="latent", **settings)
    scheduler = model.pipeline.scheduler
    steps = asked_steps(place.model.pipeline.scheduler, place.denoising.steps)
    ratios = tuple(
        Ratio(step, component, branch, None if ratio is None else float(ratio))
        for step, component, branch, ratio in measured.rows
    )
    return Magnitudes(model.spec.name, type(scheduler).__name__, steps, ratios)


class MeasureRule:
    """Measures ratios of magnitudes and skips nothing."""

    name = "measure_magnitudes"

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.rows: list[tuple[int, str, str, torch.Tensor | None]] = []
        self._before: dict[str, torch.Tensor] = {}

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        prediction = inner(call)
        magnitude = (prediction.float() - _noisy(call, prediction).float()).norm(dim=1)
        before = None if call.first else self._before.get(call.branch)
        ratio = None if before is None else (magnitude / before.clamp_min(1e-8)).mean()
        self.rows.append((call.step, call.component, call.branch, ratio))
        self._before[call.branch] = magnitude
        return prediction


def _noisy(call: Call, like: torch.Tensor) -> torch.Tensor:
    """The noisy latents among the channels that the denoiser takes: the first ones."""
    return call.latents[:, : like.shape[1]]
