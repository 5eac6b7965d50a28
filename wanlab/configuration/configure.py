"""A model opened in one configuration: networks exported and opened, the plan applied, the effect checked."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from wanlab import measure, models
from wanlab.configuration.configuration import Configuration, load_configuration, save_configuration
from wanlab.core.effects import APPLIED, BASELINE, NOT_APPLIED
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest
from wanlab.engines.base import Engine
from wanlab.engines.pipeline import use
from wanlab.engines.registry import EAGER, EngineKind, engine_kind, kind_of_label, prepare_component
from wanlab.export.components import unconverted
from wanlab.measure.memory import in_own_process
from wanlab.models.loading import resolve
from wanlab.models.pipeline import Model
from wanlab.models.registry import reference
from wanlab.models.spec import EXPERTS, ModelSpec
from wanlab.models.variants import compile_blocks
from wanlab.precision.apply import Applied, apply_plan, experts_of
from wanlab.precision.assignment import assign
from wanlab.precision.calibration import read_calibration
from wanlab.precision.calibration_data import plan_ranges
from wanlab.precision.check_graph import graph_effect_check
from wanlab.precision.check_torch import Effect, effect_check
from wanlab.precision.plan import Plan
from wanlab.precision.plan_engines import load_plan_engines
from wanlab.precision.plan_graphs import export_plan, read_plan_graphs
from wanlab.precision.recording import Example, as_examples
from wanlab.techniques.switch_on import Switched
from wanlab.techniques.switch_on import begin as begin_techniques

COMPILED = "compiled"
GIB = 2**30


@dataclass(frozen=True, eq=False)
class Configured:
    """A model in one configuration.

    Attributes:
        model: model that generates by it. original: the model as it was loaded.
        configuration: the configuration.
        effect: `"applied"`, `"not applied"`, or `"baseline"` where the configuration changes nothing.
        proof: result of the effect check, in a sentence or two. kernels: name of what multiplies.
        frame: table of the plan's effect check: a row per component and format; None without a plan.
        weight_bytes: size of all components, in memory or in the files of their engines.
        prepare_ms: time of converting, rounding, calibrating and compiling; short where earlier results are reused.
        files: files from which another process opens the same configuration, as JSON values; see `open_files`.
    """

    model: Model
    original: Model
    configuration: Configuration
    effect: str
    proof: str
    kernels: str
    frame: pd.DataFrame | None
    weight_bytes: int
    prepare_ms: float
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """Names of its engines as one text for tables."""
        return self.configuration.engine

    @property
    def plan(self) -> str:
        """The name of its plan; `"default"` where it has none."""
        return self.configuration.plan_name

    @property
    def rules(self) -> Plan | None:
        """The plan itself."""
        return self.configuration.plan

    @property
    def weights_gib(self) -> float:
        return self.weight_bytes / GIB

    @property
    def label(self) -> str:
        return self.configuration.label

    @property
    def paths(self) -> dict[str, Path]:
        """Component -> the file that its engine opened, of components without a plan whose engines open files."""
        return {name: Path(path) for name, path in self.files["networks"].items() if path is not None}


def check_configuration(
    configuration: str | os.PathLike | Configuration | None = None,
    *,
    engine: str = EAGER,
    plan: str | os.PathLike | Plan = "default",
    examples: str | os.PathLike | Sequence | None = None,
) -> Configuration:
    """The configuration, after every check that needs no model.

    Args:
        configuration, engine, plan: as `load_configuration` takes them.
        examples: examples as `configure` takes them, which are checked too.

    Raises:
        WanlabError: as `load_configuration`, or this machine lacks what one of its engines needs; examples that cannot be
            read.
    """
    configuration = load_configuration(configuration, engine=engine, plan=plan)
    if examples is not None:
        as_examples(examples)
    for line in missing(configuration):
        raise WanlabError(line)
    return configuration


def missing(
    configuration: Configuration,
    components: Iterable[str] | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """A line for each engine of a configuration that cannot run on this machine: what is missing.

    Args:
        components: components of the model; None looks at all engines that the configuration names.
        device: device of the model; None takes a GPU where there is one.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    named = _engine_names(configuration, components)
    lines = []
    for kind in map(engine_kind, named):
        if kind.missing():
            lines.append(kind.missing())
        elif set(kind.labels.values()) == {"cuda"} and place != "cuda":
            lines.append(
                f"{kind.title} runs on NVIDIA GPUs and this model is on the CPU; choose another engine here"
            )
    return lines


def _engine_names(configuration: Configuration, components: Iterable[str] | None) -> list[str]:
    if components is not None:
        return list(dict.fromkeys(map(configuration.engine_of, components)))
    engines = configuration.engines
    return [engines] if isinstance(engines, str) else list(dict.fromkeys(engines.values()))


def configure(
    model: Model,
    configuration: str | os.PathLike | Configuration,
    folder: str | os.PathLike,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    examples: str | os.PathLike | Sequence | None = None,
    progress: bool = True,
) -> Configured:
    """Open a configuration on a model, and prove that it is applied.

    A plan is applied layer by layer (`precision.apply_plan`) where PyTorch runs the experts: products of codes on GPUs that
    have them, simulated on the CPU. Engines that open graphs get Q/DQ graphs of the experts (`precision.export_plan`).
    Inputs that a plan rounds are scaled by one calibration on recorded inputs, the same on every engine, so that a plan
    is the same arithmetic in all of them.

    Files that were converted and calibrated for this size before are reused. A lock on the folder lets several runs share
    it.

    Args:
        model: model from `wanlab.models.load`, eager; it is not changed.
        configuration: configuration, its name, or its file.
        folder: folder of converted networks and calibrations, of all models and sizes.
        height, width, frames, steps, guidance_scale: settings of the videos it is for (pixels, pixels, frames, denoising
            steps); None takes the model's defaults.
        examples: generations that a plan's inputs are calibrated on: a folder of images with prompts, or what else
            `precision.record_inputs` takes. None takes two of `precision.nano_examples` whatever the model is, with images
            and prompts that suit wan-nano; for another model give some of the kind that it is used for.
        progress: whether bars are shown.

    Raises:
        WanlabError: as `load_configuration`; an engine that cannot run here, or none of whose networks can be converted; a
            plan that does not fit the model; as the exports, builders and engines.
    """
    begin = time.perf_counter()
    configuration = load_configuration(configuration)
    for line in missing(configuration, model.components, model.device):
        raise WanlabError(line)
    configuration, stays = _suited(configuration, model)
    defaults = model.spec.defaults
    sizes = {"height": height, "width": width, "frames": frames}
    sizes = {name: getattr(defaults, name) if value is None else value for name, value in sizes.items()}
    settings = sizes | {
        "steps": defaults.steps if steps is None else steps,
        "guidance_scale": defaults.guidance_scale if guidance_scale is None else guidance_scale,
    }
    dtype = str(model.dtype).removeprefix("torch.")
    place = files_folder(folder, model.spec, model.load.weights, dtype, sizes)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # one process makes the files, others wait and reuse them
        files = _prepare(model, configuration, place, settings, sizes, examples, progress)
        opened = open_files(model, configuration, files)
    checks = _check(model, configuration, opened, settings)
    changes = configuration.plan is not None or opened.switched is not None
    if not changes and all(name == EAGER for name in opened.kinds.values()):
        effect, proof = BASELINE, "the model as it was loaded"
    else:
        effect = APPLIED if all(check.passed for check in checks) else NOT_APPLIED
        proof = " ".join([*(check.sentence for check in checks), *(f"{reason}." for reason in stays)])
    tables = [check.frame for check in checks if check.frame is not None]
    return Configured(
        model=opened.model,
        original=model,
        configuration=configuration,
        effect=effect,
        proof=proof,
        kernels=_kernels(opened, model.device.type),
        frame=pd.concat(tables, ignore_index=True) if tables else None,
        weight_bytes=_weight_bytes(opened),
        prepare_ms=(time.perf_counter() - begin) * 1e3,
        files=files,
    )


def _suited(configuration: Configuration, model: Model) -> tuple[Configuration, list[str]]:
    """The configuration for this model, and why components stay in PyTorch whose networks cannot be converted.

    One engine for the whole model leaves them out; an engine that is named for one of them is an error when it is made.

    Raises:
        WanlabError: none of the components can be converted.
    """
    if not isinstance(configuration.engines, str):
        return configuration, []
    kind = engine_kind(configuration.engines)
    usual = [name for name in model.components if configuration.engine_of(name) != EAGER]
    from_graphs = kind.build is not None or ".onnx" in kind.suffixes
    stays = {name: reason for name, reason in unconverted(model).items() if from_graphs and name in usual}
    if not stays:
        return configuration, []
    chosen = {name: kind.name for name in usual if name not in stays}
    if not chosen:
        raise WanlabError(f"nothing of {model.spec.name} runs in {kind.title}: {'; '.join(stays.values())}")
    return msgspec.structs.replace(configuration, engines=chosen), list(stays.values())


def files_folder(
    folder: str | os.PathLike, spec: ModelSpec, weights: str, dtype: str, sizes: Mapping[str, int]
) -> Path:
    """Folder of the files of one model with its LoRAs and one size, in the folder of all models."""
    loras = spec.lora_identity()
    name = f"{spec.name}-lora-{digest([loras], 8)}" if loras else spec.name
    return Path(folder) / f"{name}-{weights}-{dtype}" / "{width}x{height}x{frames}".format(**sizes)


def plan_folder(place: Path, plan: Plan) -> Path:
    """Folder of the graphs of a plan, in the folder of one model and size."""
    return place / f"plan-{plan.hash[:12]}"


def graphs_folder(place: Path) -> Path:
    """Folder of converted networks without a plan, in the folder of one model and size."""
    return place / "graphs"


def planned_in_graphs(configuration: Configuration, components: Iterable[str]) -> list[str]:
    """The experts whose engine takes the plan as a graph; none without a plan."""
    return [
        name
        for name in components
        if configuration.plan is not None
        and name in EXPERTS
        and engine_kind(configuration.engine_of(name)).plans == "graph"
    ]


def _prepare(
    model: Model,
    configuration: Configuration,
    place: Path,
    settings: Mapping[str, Any],
    sizes: dict[str, int],
    examples: str | os.PathLike | Sequence | None,
    progress: bool,
) -> dict[str, Any]:
    """Calibrate, export and build; current files are reused.

    Returns:
        JSON values: `calibrations` (component -> file), `plan_graphs` (folder, or None), `networks` (component -> the file
        that its engine opens, or None where it opens none; without those of the plan's graphs).
    """
    plan = configuration.plan
    ranges = plan_ranges(model, plan, place, examples=examples, progress=progress, **settings)
    in_graphs, graphs = planned_in_graphs(configuration, model.components), None
    if in_graphs:
        calibrations = {name: calibration for name, (_, calibration) in ranges.items()}
        options: dict[str, Any] = {"dynamic": False, "progress": progress, **sizes}
        graphs = export_plan(model, plan, plan_folder(place, plan), calibrations, **options)
        for name in in_graphs:
            kind, own = _kind_and_settings(configuration, name)
            for graph in graphs.graphs_of(name) if kind.build is not None else ():
                kind.build(
                    graphs.folder / graph, device=model.device.type, progress=progress, **kind.building(own)
                )
    networks: dict[str, str | None] = {}
    left = [
        name for name in model.components if name not in in_graphs and not _by_pytorch(configuration, name)
    ]
    bar = tqdm(left, desc="engines", unit="component", leave=False, disable=not progress)
    for name in bar:
        kind, own = _kind_and_settings(configuration, name)
        bar.set_postfix_str(f"{name} on {kind.name}")
        path = prepare_component(
            kind.name, model, name, graphs_folder(place), size=sizes, progress=progress, **own
        )
        networks[name] = None if path is None else str(path)
    return {
        "calibrations": {name: str(path) for name, (path, _) in ranges.items()},
        "plan_graphs": None if graphs is None else str(graphs.folder),
        "networks": networks,
    }


@dataclass(frozen=True, eq=False)
class Opened:
    """A configuration opened from its files.

    Attributes:
        model: model that generates by it. kinds: component -> name of its engine.
        engines: component -> engine, of components that PyTorch does not run inside the pipeline.
        switched: the techniques; None where there are none.
        applied: the plan in PyTorch; None where none is. in_pytorch: experts whose plan is in PyTorch.
        plan_graphs: folder of the plan's graphs; None where there are none.
        networks: component -> network in PyTorch, of components whose engine has no file.
        load_ms: time of loading weights into PyTorch and applying the plan, or of opening sessions from files.
    """

    model: Model
    kinds: dict[str, str]
    engines: dict[str, Engine]
    switched: Switched | None
    applied: Applied | None
    in_pytorch: tuple[str, ...]
    plan_graphs: str | None
    networks: dict[str, torch.nn.Module]
    load_ms: float


def open_files(
    model: Model, configuration: Configuration, files: Mapping[str, Any], *, in_place: bool = False
) -> Opened:
    """Open a configuration whose files `configure` made.

    Args:
        model: model as it was loaded. in_place: whether the plan may replace its layers, which saves memory.
        files: value of `Configured.files`.

    Raises:
        WanlabError: a file is missing or was changed; as the engines.
    """
    plan, in_graphs = configuration.plan, planned_in_graphs(configuration, model.components)
    in_pytorch = tuple(
        name for name in model.components if plan is not None and name in EXPERTS and name not in in_graphs
    )
    used, applied, begin = model, None, time.perf_counter()
    if in_pytorch:
        ranges = {name: read_calibration(path) for name, path in files["calibrations"].items()}
        applied = apply_plan(model, plan, ranges, in_place=in_place)
        used = applied.model
    plan_ms = (time.perf_counter() - begin) * 1e3
    kinds = {name: configuration.engine_of(name) for name in model.components}
    switched = None
    if configuration.techniques:
        switched = begin_techniques(used, configuration.techniques, kinds)
        used = switched.model
    networks = dict(used.components)
    compiled = [name for name, kind in kinds.items() if kind == COMPILED and name in EXPERTS]
    used = compile_blocks(used, compiled) if compiled else used
    opened: dict[str, Engine] = {}
    for name, path in files["networks"].items():
        kind, own = _kind_and_settings(configuration, name)
        source = used if kind.plans == "torch" else model
        opened[name] = kind.open(source, name, None if path is None else Path(path), **kind.opening(own))
    opened |= _open_planned(configuration, in_graphs, files["plan_graphs"], model.device)
    filed = {name for name in opened if name in in_graphs or files["networks"][name] is not None}
    networks = {name: network for name, network in networks.items() if name not in filed}
    parts = {model.spec.part_of(name) for name in networks}
    load_ms = sum(part.time_ms for part in model.load.parts if part.part in parts)
    load_ms += sum(engine.load_ms for engine in opened.values())
    used = use(used, opened) if opened else used
    return Opened(
        model=used if switched is None else switched.place.finish(used),
        kinds=kinds,
        engines=opened,
        switched=switched,
        applied=applied,
        in_pytorch=in_pytorch,
        plan_graphs=files["plan_graphs"],
        networks=networks,
        load_ms=load_ms + (plan_ms if applied is not None else 0.0),
    )


def _open_planned(
    configuration: Configuration, components: Sequence[str], folder: str | None, device: torch.device
) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    for name in dict.fromkeys(map(configuration.engine_of, components)):
        own_components = tuple(
            component for component in components if configuration.engine_of(component) == name
        )
        kind, own = _kind_and_settings(configuration, own_components[0])
        options = kind.opening(own)
        provider = options.pop("provider", device.type) if "provider" in kind.open_settings else kind.name
        engines |= load_plan_engines(folder, provider, components=own_components, **options)
    return engines


def _kind_and_settings(configuration: Configuration, component: str) -> tuple[EngineKind, dict[str, Any]]:
    name = configuration.engine_of(component)
    return engine_kind(name), dict(configuration.settings.get(name, {}))


def _by_pytorch(configuration: Configuration, component: str) -> bool:
    """Whether PyTorch runs the component inside the pipeline, so that it has no engine of its own."""
    name = configuration.engine_of(component)
    return name == EAGER or (name == COMPILED and component in EXPERTS)


@dataclass(frozen=True, eq=False)
class _Check:
    """One effect check: whether it passed, its result as a sentence, and its table where it has one."""

    passed: bool
    sentence: str
    frame: pd.DataFrame | None = None


def _check(
    model: Model, configuration: Configuration, opened: Opened, settings: Mapping[str, Any]
) -> list[_Check]:
    checks = []
    if opened.applied is not None:
        components = opened.in_pytorch
        checks.append(_effect(lambda: effect_check(model, opened.applied, components=components)))
    if opened.plan_graphs is not None:
        graphs = read_plan_graphs(opened.plan_graphs, check=False)
        assignment = assign(graphs.plan, experts_of(model), default=graphs.facts["settings"]["default"])
        for component in planned_in_graphs(configuration, model.components):
            for first, _, graph in graphs.bands[component]:
                path = graphs.folder / graph
                checks.append(
                    _effect(functools.partial(graph_effect_check, assignment, component, path, step=first))
                )
    compiled = any(kind == COMPILED and name in EXPERTS for name, kind in opened.kinds.items())
    if compiled or opened.switched is not None:
        techniques = opened.switched.techniques if opened.switched is not None else []
        decodes = any("vae_decoder" in technique.touches for technique in techniques)
        graphs_made = _generate(opened.model, settings, "np" if decodes else "latent")
    if compiled:
        made = f"{graphs_made} graph{'s' * (graphs_made != 1)}"
        checks.append(_Check(graphs_made > 0, f"torch.compile made {made} of the experts' blocks."))
    if opened.switched is not None:
        proofs = opened.switched.proofs().values()
        checks += [_Check(proof.passed, proof.sentence) for proof in proofs]
    for name in dict.fromkeys(opened.kinds[component] for component in opened.engines):
        expected = [component for component in opened.engines if opened.kinds[component] == name]
        kind = engine_kind(name)
        on = sum(_runs_on(opened.model.engines[component], kind) for component in expected)
        sentence = f"{on} of {len(opened.kinds)} networks run in {kind.title}."
        checks.append(_Check(on == len(expected), sentence))
    return checks


def _runs_on(label: str, kind: EngineKind) -> bool:
    ran = kind_of_label(label)
    return ran is not None and ran.name == kind.name


def _effect(check: Callable[[], Any]) -> _Check:
    """Run an effect check; a `WanlabError` of it means that the configuration was not applied, and is the sentence."""
    try:
        effect: Effect = check()
    except WanlabError as error:
        return _Check(False, f"{error}.")
    return _Check(True, str(effect), effect.frame)


def _generate(model: Model, settings: Mapping[str, Any], output: str) -> int:
    """Generate once, which is also the warm-up; returns the number of graphs that torch.compile made.

    Only the size matters to the compiler, so the image is noise and the prompt is empty; further inputs are frames of a
    held-out clip.

    Args:
        output: of `Model.generate`: `"latent"` leaves the decoder out.
    """
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    image = np.random.default_rng(0).random((settings["height"], settings["width"], 3), dtype=np.float32)
    inputs = Example(image, "", adapts=True).inputs(model, settings["frames"])
    model.generate(prompt="", output=output, **inputs, **settings)
    return counters["unique_graphs"] - before


def _kernels(opened: Opened, device: str) -> str:
    """Name of what multiplies: the plan's kernels in PyTorch, then engines with their device."""
    parts = [opened.applied.kernels] if opened.applied is not None else []
    for name in dict.fromkeys(opened.kinds[component] for component in opened.engines):
        parts.append(f"{engine_kind(name).title} on {device}")
    return "; ".join(parts)


def _weight_bytes(opened: Opened) -> int:
    """Bytes of weights and buffers of networks in PyTorch, shared ones once, and of the files of other components."""
    tensors = {
        id(tensor): tensor.nbytes
        for network in dict.fromkeys(opened.networks.values())
        for tensor in (*network.parameters(), *network.buffers())
    }
    filed = [engine for name, engine in opened.engines.items() if name not in opened.networks]
    return sum(tensors.values()) + sum(engine.size_bytes for engine in filed)


def measure_isolated(
    configured: Configured,
    image: Any,
    prompt: str,
    *,
    conditions: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Memory and load time of a configuration: a new process opens it from its files and generates once.

    Two configurations in one process share libraries and allocator, so that their peaks cannot be told apart there.

    Args:
        configured: result of `configure`. The process loads a model of the same name, device, dtype and weights.
        image: first frame, `[H, W, 3]` in [0, 1]; None for a model that takes none.
        conditions: further inputs of the model by name, arrays.
        prompt, settings: arguments of `Model.generate`, as JSON values.

    Returns:
        `peak_memory_gib` during the generation (on a GPU what this process added to the device, on the CPU its resident
        set), `load_ms` (of the networks alone: loading weights and applying the plan, or opening sessions),
        `first_video_ms` (with everything that happens only once, such as compiling).

    Raises:
        WanlabError: the process failed; the message ends with its last line.
    """
    model = configured.original
    with tempfile.TemporaryDirectory(prefix="wanlab-isolated-") as folder:
        given = {"image": image} | dict(conditions or {})
        given = {name: np.asarray(value) for name, value in given.items() if value is not None}
        np.savez(Path(folder) / "inputs.npz", **given)
        order = {
            "model": reference(model.spec),
            "load": {
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "weights": model.load.weights,
            },
            "configuration": str(
                save_configuration(configured.configuration, Path(folder) / "configuration.yaml")
            ),
            "files": configured.files,
            "inputs": str(Path(folder) / "inputs.npz"),
            "prompt": prompt,
            "settings": {name: value for name, value in settings.items() if value is not None},
        }
        return in_own_process("wanlab.configuration.configure", order, configured.label)


def _measure_in_process(order: dict[str, Any]) -> dict[str, float]:
    device = resolve(order["load"]["device"], "auto")[0]
    with np.load(order["inputs"], allow_pickle=False) as given:
        conditions = dict(given)
    image = conditions.pop("image", None)
    configuration = load_configuration(order["configuration"])
    with measure.peak_memory(device) as whole:
        model = models.load(order["model"], **order["load"])
        opened = open_files(model, configuration, order["files"], in_place=True)
        used, load_ms = opened.model, opened.load_ms
        del model, opened
        gc.collect()  # frees networks that engines replaced
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with measure.peak_memory(device) as memory:
            generation = used.generate(
                image, order["prompt"], conditions=conditions or None, **order["settings"]
            )
    # Other processes may use the GPU; their memory was in use before.
    before = whole.start_gib if device.type == "cuda" else 0.0
    return {
        "peak_memory_gib": memory.peak_gib - before,
        "load_ms": load_ms,
        "first_video_ms": generation.wall_ms,
    }


if __name__ == "__main__":
    print(json.dumps(_measure_in_process(json.load(sys.stdin))))
