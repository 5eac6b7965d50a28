"""One configuration of a model, engine and plan: opened, checked for effect, measured in its own process."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from wanlab import __version__, engines, export
from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.models.pipeline import Model, first_frame
from wanlab.models.variants import compile_blocks
from wanlab.precision.apply import apply_plan, experts_of
from wanlab.precision.assignment import EXPERTS, assign
from wanlab.precision.calibration import Calibration, calibrate
from wanlab.precision.check_graph import graph_effect_check
from wanlab.precision.check_torch import effect_check
from wanlab.precision.formats import get_format
from wanlab.precision.plan import Plan, is_float, load_plan
from wanlab.precision.plan_engines import load_plan_engines
from wanlab.precision.plan_graphs import export_plan
from wanlab.precision.recording import (
    Example,
    Recording,
    as_examples,
    nano_examples,
    read_recording,
    record_inputs,
)
from wanlab.precision.sensitivity.work import check_known

SIZES = ("height", "width", "frames", "steps", "guidance_scale")


@dataclass(frozen=True)
class CalibrationData:
    """Inputs of experts and the ranges of their layers, in a folder of their own.

    Attributes:
        folder: of this model, these weights, examples and settings, and no other.
        recording: of all experts. ranges: component -> its calibration. files: component -> the file of it.
        reused: the recording was found there.
    """

    folder: Path
    recording: Recording
    ranges: dict[str, Calibration]
    files: dict[str, Path]
    reused: bool

    @property
    def parts(self) -> Path:
        """Where `sensitivity` keeps its parts beside the ranges."""
        return self.folder / "sensitivity"


def keep_inputs(
    model,
    cases: Sequence,
    folder: str | os.PathLike,
    *,
    components: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> CalibrationData:
    """Record the experts' inputs and calibrate on them, or find both as an earlier run left them.

    A lock lets several runs begin together: one records, the others wait and find it done.

    Args:
        model: from `wanlab.models.load`.
        cases: as `record_inputs` takes them.
        folder: of all models and settings; each has a folder in it, named by a hash of what the inputs depend on.
        components: experts to calibrate; None takes all. All are recorded, as an error is followed through the steps of the
            experts that come later.
        layers: as `calibrate` takes them; runs that share a folder calibrate the same.
        progress: show bars.
        settings: height, width, frames, steps, guidance_scale; None takes the model's default.

    Raises:
        WanlabError: as `record_inputs` and `calibrate`.
    """
    examples = as_examples(cases)
    recorded = [name for name in model.components if name.startswith("expert")]
    chosen = [components] if isinstance(components, str) else list(components or recorded)
    check_known(chosen, recorded, "expert")
    defaults = model.spec.defaults
    sizes = {name: settings.pop(name, None) for name in SIZES}
    sizes = {name: getattr(defaults, name) if value is None else value for name, value in sizes.items()}
    name = f"{model.spec.name.rpartition('/')[2]}-{_key(model, examples, sizes | settings)[:12]}"
    place = Path(folder).resolve() / name
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):
        try:
            recording, reused = read_recording(place / "recording"), True
        except WanlabError:  # none, or one that was cut off
            recording = record_inputs(
                model, examples, place / "recording", progress=progress, **sizes, **settings
            )
            reused = False
        files = {name: place / "sensitivity" / f"{name}.json" for name in chosen}
        ranges = {
            name: calibrate(model, name, recording, layers=layers, cache=path, progress=progress)
            for name, path in files.items()
        }
    return CalibrationData(place, recording, ranges, files, reused)


def _key(model, examples: Sequence[Example], settings: dict[str, Any]) -> str:
    """Hash of everything that the inputs depend on."""

    def picture(image) -> str | None:
        if image is None:
            return None
        made = first_frame(image, settings["height"], settings["width"])
        return hashlib.sha256(made.tobytes()).hexdigest()

    networks = {
        id(network): network for network in model.components.values()
    }  # both halves of the VAE are one
    facts = [
        __version__,
        model.spec.name,
        [weights_key(network) for network in networks.values()],
        [[e.name, e.prompt, e.negative_prompt, e.seed, picture(e.image)] for e in examples],
        settings,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def plan_ranges(
    model: Model, plan: Plan | None, place: Path, settings: dict[str, Any], progress: bool
) -> dict[str, tuple[Path, Calibration]]:
    """Component -> file and ranges, for the experts whose inputs the plan rounds; none where it rounds none."""
    if plan is None:
        return {}
    used = assign(plan, experts_of(model)).frame
    rounds = [not is_float(name) and get_format(name).activation is not None for name in used["format"]]
    components = list(dict.fromkeys(used.loc[rounds, "component"]))
    if not components:
        return {}
    kept = keep_inputs(
        model, nano_examples(2), place, components=components, layers="*", progress=progress, **settings
    )
    return {name: (kept.files[name], found) for name, found in kept.ranges.items()}


ENGINES = ("eager", "compiled", "onnxruntime")
DEFAULT = "default"
"""The plan that changes nothing: the model as it is."""

AS_ASKED, NO_EFFECT, NOTHING_ASKED = "as asked", "no effect", "nothing asked"
GIB = 2**30


@dataclass(frozen=True, eq=False)
class Configured:
    """A model in one configuration.

    Attributes:
        model: generates by it. original: the model it was made from, as it was loaded.
        engine, plan: their names. rules: the plan itself, None for the model as it is.
        effect: `"as asked"`, `"no effect"`, or `"nothing asked"` where engine and plan are those of the original.
        proof: what was found, in a sentence or two. kernels: what multiplies.
        frame: of the plan's effect check: a row per component and format; None without a plan.
        weight_bytes: of all components as this configuration holds them, or keeps them in its files.
        prepare_ms: converting, rounding, calibrating, compiling; little where it was done before.
        files: what a fresh process needs to come to the same configuration; see `measure_configured`.
    """

    model: Model
    original: Model
    engine: str
    plan: str
    rules: Plan | None
    effect: str
    proof: str
    kernels: str
    frame: pd.DataFrame | None
    weight_bytes: int
    prepare_ms: float
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def weights_gib(self) -> float:
        return self.weight_bytes / GIB

    @property
    def label(self) -> str:
        return self.engine if self.plan == DEFAULT else f"{self.engine} {self.plan}"


def configure(
    model: Model,
    folder: str | os.PathLike,
    *,
    engine: str = "eager",
    plan: str | os.PathLike | Plan = DEFAULT,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
) -> Configured:
    """A model by a plan on an engine, and proof that it is.

    In PyTorch the plan is applied layer by layer (`apply_plan`): products of codes on GPUs that have them, simulated on the
    CPU. In ONNX Runtime the experts become Q/DQ graphs (`export_plan`), the other networks graphs as they are. Inputs that
    a plan rounds are scaled by one calibration on recorded inputs, the same on every engine, so that a plan means the same
    arithmetic everywhere.

    What was converted and calibrated for this size before is reused. A lock on the folder lets several runs share it.

    Args:
        model: from `wanlab.models.load`, eager; it stays as it is.
        folder: of converted networks and calibrations, of all models and sizes.
        engine: `"eager"`, `"compiled"` (the blocks of the experts) or `"onnxruntime"`.
        plan: `"default"`, a preset's name, a file, or a plan.
        height, width, frames, steps, guidance_scale: of the videos it is for; None takes the model's defaults.

    Raises:
        WanlabError: unknown engine or plan, a plan that does not fit, and as `export_all`, `export_plan`, `apply_plan`.
    """
    begin = time.perf_counter()
    wanted = check_configuration(engine, plan)
    defaults = model.spec.defaults
    sizes = {"height": height, "width": width, "frames": frames}
    sizes = {name: getattr(defaults, name) if value is None else value for name, value in sizes.items()}
    settings = sizes | {
        "steps": defaults.steps if steps is None else steps,
        "guidance_scale": defaults.guidance_scale if guidance_scale is None else guidance_scale,
    }
    name = f"{model.spec.name}-{model.load.weights}-{str(model.dtype).removeprefix('torch.')}"
    place = Path(folder) / name / "{width}x{height}x{frames}".format(**sizes)
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        ranges = plan_ranges(model, wanted, place, settings, progress)
        if engine == "onnxruntime":
            made = _in_graphs(model, wanted, ranges, place, sizes, progress)
        else:
            made = _in_pytorch(model, wanted, ranges, compiled=engine == "compiled", settings=settings)
    used, done, effect, files = made
    asked = (engine != "eager") or wanted is not None
    if not asked:
        state, proof = NOTHING_ASKED, "the model as it was loaded"
    else:
        said = [sentence for _, sentence in done]
        state, proof = AS_ASKED if all(ok for ok, _ in done) else NO_EFFECT, " ".join(said)
    return Configured(
        model=used,
        original=model,
        engine=engine,
        plan=DEFAULT if wanted is None else wanted.name,
        rules=wanted,
        effect=state,
        proof=proof,
        kernels=files.pop("kernels", ""),
        frame=effect,
        weight_bytes=files.pop("weight_bytes"),
        prepare_ms=(time.perf_counter() - begin) * 1e3,
        files=files | {"calibrations": {name: str(path) for name, (path, _) in ranges.items()}},
    )


def check_configuration(engine: str, plan: str | os.PathLike | Plan) -> Plan | None:
    """The plan, or None for the model as it is; both names are looked at before anything is loaded.

    Raises:
        WanlabError: an unknown engine or plan.
    """
    if engine not in ENGINES:
        raise WanlabError(f"no engine {engine!r}{did_you_mean(engine, ENGINES)}; give {', '.join(ENGINES)}")
    if isinstance(plan, str) and plan == DEFAULT:
        return None
    try:
        return load_plan(plan)
    except WanlabError as error:
        near = did_you_mean(str(plan), [DEFAULT])
        raise WanlabError(f"{error}{near or f'; {DEFAULT!r} is the model as it is'}") from None


Done = tuple[bool, str]


def _in_pytorch(model: Model, plan: Plan | None, ranges: Mapping, *, compiled: bool, settings: dict):
    used, done, frame, kernels = model, [], None, ""
    if plan is not None:
        applied = apply_plan(model, plan, {name: found for name, (_, found) in ranges.items()})
        used, kernels = applied.model, applied.kernels
        frame = _proven(lambda: effect_check(model, applied), done)
    if compiled:
        used = compile_blocks(used)
        done.append(_compiled(used, settings))
    return used, done, frame, {"weight_bytes": _held_bytes(used), "kernels": kernels}


def _in_graphs(
    model: Model, plan: Plan | None, ranges: Mapping, place: Path, sizes: dict[str, int], progress: bool
):
    provider = "cuda" if model.device.type == "cuda" else "cpu"
    plain = [name for name in model.components if plan is None or name not in EXPERTS]
    options = {"dynamic": False, "progress": progress, **sizes}
    export.export_all(model, place / "graphs", tuple(plain), **options)
    opened = engines.load_engines(place / "graphs", plain, provider=provider)
    done: list[Done] = []
    frames, graphs = [], None
    if plan is not None:
        graphs = export_plan(
            model,
            plan,
            place / f"plan-{plan.hash[:12]}",
            {name: found for name, (_, found) in ranges.items()},
            **options,
        )
        opened |= load_plan_engines(graphs, provider)
        experts = {name: network for name, network in model.components.items() if name in EXPERTS}
        assignment = assign(plan, experts, default=graphs.facts["settings"]["default"])
        for component, bands in graphs.bands.items():
            for first, _, graph in bands:
                frames.append(
                    _proven(
                        lambda c=component, g=graph, s=first: graph_effect_check(
                            assignment, c, graphs.folder / g, step=s
                        ),
                        done,
                    )
                )
    used = engines.use(model, opened)
    on = sum(name.startswith("onnxruntime") for name in used.engines.values())
    done.append((on == len(used.engines), f"{on} of {len(used.engines)} networks run in ONNX Runtime."))
    found = [frame for frame in frames if frame is not None]
    return (
        used,
        done,
        _joined(found),
        {
            "graphs": str(place / "graphs"),
            "plain": plain,
            "plan_graphs": None if graphs is None else str(graphs.folder),
            "weight_bytes": sum(engine.size_bytes for engine in opened.values()),
            "kernels": f"ONNX Runtime on {provider}",
        },
    )


def _proven(check, done: list[Done]) -> pd.DataFrame | None:
    """A check that fails says that there was no effect, and why; other mistakes were raised before it."""
    try:
        found = check()
    except WanlabError as error:
        done.append((False, f"{error}."))
        return None
    done.append((True, str(found)))
    return found.frame


def _compiled(model: Model, settings: dict) -> Done:
    """Whether a generation made the compiler compile; it is also the warm-up in which that happens."""
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    example = nano_examples(1)[0]
    model.generate(example.image, example.prompt, seed=example.seed, output="latent", **settings)
    made = counted["unique_graphs"] - before
    return made > 0, f"torch.compile made {made} graph{'s' * (made != 1)} of the experts' blocks."


def _held_bytes(model: Model) -> int:
    """Weights and buffers of all components, shared ones once."""
    held = {
        id(tensor): tensor.nbytes
        for network in dict.fromkeys(model.components.values())
        for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(held.values())


def _joined(frames: list) -> Any:
    return pd.concat(frames, ignore_index=True) if frames else None


def _locked(place: Path):
    """One process at a time makes files in a folder; others wait and then find them made."""
    return FileLock(place / ".lock")
