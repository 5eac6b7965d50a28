"""Candidates for one component of a model (engine, plan, CUDA graph): their files, and how each is opened and checked."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from msgspec.structs import replace

from wanlab.configuration.configuration import Configuration, load_configuration
from wanlab.configuration.configure import COMPILED, files_folder, plan_folder
from wanlab.core.effects import APPLIED, BASELINE, NOT_APPLIED
from wanlab.core.errors import WanlabError
from wanlab.engines.base import Engine
from wanlab.engines.registry import EAGER, EngineKind, engine_kind, kind_of_label, prepare_component
from wanlab.models.pipeline import Model
from wanlab.models.spec import EXPERTS
from wanlab.precision.apply import Applied, apply_plan, experts_of
from wanlab.precision.assignment import assign
from wanlab.precision.calibration import Calibration, calibrate
from wanlab.precision.check_graph import graph_effect_check
from wanlab.precision.check_torch import effect_check
from wanlab.precision.formats import get_format
from wanlab.precision.plan import Plan, is_float
from wanlab.precision.plan_engines import load_plan_engines
from wanlab.precision.plan_graphs import PlanGraphs, export_plan, read_plan_graphs
from wanlab.precision.recording import random_recording

CUDA_GRAPH = "CUDA graph"
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """One way to compute a component.

    Attributes:
        label: its name in tables. configuration: engine, plan and settings.
        cuda_graph: whether the work of a call is captured once and replayed.
    """

    label: str
    configuration: Configuration
    cuda_graph: bool = False

    @property
    def plan(self) -> Plan | None:
        return self.configuration.plan

    def kind(self, component: str) -> EngineKind:
        """The engine that computes the component."""
        return engine_kind(self.configuration.engine_of(component))

    def plan_for(self, component: str) -> Plan | None:
        """Its plan with the rules of one expert alone, as the other is not loaded."""
        if self.plan is None:
            return None
        rules = (rule for rule in self.plan.rules if fnmatch.fnmatchcase(component, rule.component))
        return replace(self.plan, rules=tuple(rules))

    def settings(self, component: str) -> dict[str, Any]:
        """Settings of that engine."""
        return dict(self.configuration.settings.get(self.kind(component).name, {}))


def component_candidates(
    component: str,
    engines: Sequence[str] = (EAGER,),
    plans: Sequence[str | os.PathLike | Plan] = ("default",),
    configurations: Sequence[str | os.PathLike | Configuration] = (),
    *,
    cuda_graphs: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates for one component: every engine by every plan, then configurations by name or file.

    Args:
        component: wanlab's name of it.
        engines: names of engines. plans: `"default"`, presets, files or plans.
        cuda_graphs: whether each is there again with its work captured in a CUDA graph.
        device: device of the component.

    Returns:
        The candidates; and label -> reason in one line for each that cannot run here: a missing package, a device that is
        not there, a component or plan that the engine does not take.

    Raises:
        WanlabError: an engine, plan or configuration that does not exist; no candidate is left.
    """
    candidates: list[Candidate] = []
    left_out: dict[str, str] = {}
    pairs = [(engine_kind(engine).name, plan) for engine in engines for plan in plans]
    drafts: list[Configuration | tuple] = [*pairs, *map(load_configuration, configurations)]
    for draft in drafts:
        if isinstance(draft, Configuration):
            label, configuration, line = draft.label, draft, ""
        else:
            engine, plan = draft
            label, configuration, line = _of_pair(component, engine, plan)
        line = line or _reason(component, configuration, torch.device(device))
        if line:
            left_out[label] = line
            continue
        candidates.append(Candidate(label, configuration))
        if cuda_graphs:
            candidates.append(Candidate(f"{label}, {CUDA_GRAPH}", configuration, cuda_graph=True))
    if not candidates:
        raise WanlabError(
            f"nothing to measure {component} with: {'; '.join(left_out.values()) or 'no engine'}"
        )
    return candidates, left_out


def _of_pair(component: str, engine: str, plan: Any) -> tuple[str, Configuration, str]:
    """Label, configuration, and the reason why engine and plan do not go together; empty where they do."""
    rules = load_configuration(plan=plan).plan
    label = engine if rules is None else f"{engine} {rules.name}"
    if rules is not None and component not in EXPERTS:
        return label, Configuration(name=engine), f"plans are for experts; {component} has none"
    if rules is not None and not engine_kind(engine).plans:
        return label, Configuration(name=engine), f"{engine} applies no precision plan"
    configuration = Configuration(name=label.replace(" ", "+"), engines={component: engine}, plan=rules)
    return label, configuration, ""


def _reason(component: str, configuration: Configuration, device: torch.device) -> str:
    """Why a component cannot run by a configuration here, in one line; empty where it can."""
    kind = engine_kind(configuration.engine_of(component))
    if missing := kind.missing():
        return missing
    if not kind.runs(component):
        return f"{kind.name} runs {' and '.join(kind.components)}, not {component}"
    if device.type != "cuda" and set(kind.labels.values()) == {"cuda"}:
        return f"{kind.title} runs on NVIDIA GPUs, and the component is on the CPU"
    return ""


@dataclass(frozen=True, eq=False)
class Files:
    """Files that candidates open, as JSON values.

    Attributes:
        networks: label -> the file that its engine opens, or None where it opens none.
        plan_graphs: label -> folder of the graphs of its plan.
        ranges: layer -> largest magnitude of its input in one call.
        prepare_ms: label -> time of export, calibration and build, or of the check that they are current.
        left_out: label -> reason in one line why its files could not be made.
    """

    networks: dict[str, str | None] = field(default_factory=dict)
    plan_graphs: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    prepare_ms: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def component_files(
    model: Model,
    component: str,
    candidates: Iterable[Candidate],
    folder: str | os.PathLike,
    *,
    size: Mapping[str, Any],
    ranges: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Files:
    """Export, calibrate and build the files of candidates; current files are reused.

    A lock on the folder lets several runs share it.

    Args:
        folder: folder of converted networks, of all models and sizes.
        size: height, width and frames of the clip.
        ranges: layer -> largest magnitude of its input in a call on the measured inputs, for plans in PyTorch. Graphs of a
            plan are calibrated on random inputs of the same size.
        seed: seed of these random inputs.
    """
    place = files_folder(
        folder, model.spec, model.load.weights, str(model.dtype).removeprefix("torch."), size
    )
    place.mkdir(parents=True, exist_ok=True)
    files = Files(ranges=dict(ranges or {}))
    calibrations: dict[str, Calibration] = {}
    with FileLock(place / ".lock"):
        for candidate in candidates:
            begin = time.perf_counter()
            kind, settings = candidate.kind(component), candidate.settings(component)
            plan = candidate.plan_for(component)
            try:
                if plan is not None and kind.plans == "graph":
                    if _rounds(model, component, plan) and not calibrations:
                        calibrations = _calibrated(model, component, place, size, seed, progress)
                    graphs = export_plan(
                        model,
                        plan,
                        plan_folder(place, plan) / component,
                        calibrations if _rounds(model, component, plan) else {},
                        progress=progress,
                        **size,
                    )
                    for graph in graphs.graphs_of(component) if kind.build is not None else ():
                        kind.build(
                            graphs.folder / graph,
                            device=model.device.type,
                            progress=progress,
                            **kind.building(settings),
                        )
                    files.plan_graphs[candidate.label] = str(graphs.folder)
                else:
                    path = prepare_component(
                        kind.name,
                        model,
                        component,
                        place / "graphs",
                        size=size,
                        progress=progress,
                        **_placed(kind, settings, model.device),
                    )
                    files.networks[candidate.label] = None if path is None else str(path)
            except WanlabError as error:
                files.left_out[candidate.label] = str(error).splitlines()[0]
            files.prepare_ms[candidate.label] = (time.perf_counter() - begin) * 1e3
    return files


def _calibrated(
    model: Model, component: str, place: Path, size: Mapping[str, Any], seed: int, progress: bool
) -> dict[str, Calibration]:
    recording = random_recording(model, component, place / f"random-{component}", steps=2, seed=seed, **size)
    return {component: calibrate(model, component, recording, layers="*", method="max", progress=progress)}


def _rounds(model: Model, component: str, plan: Plan) -> bool:
    """Whether a plan rounds the input of a layer of the component."""
    used = assign(plan, experts_of(model)).frame
    names = used.loc[used["component"] == component, "format"]
    return any(not is_float(name) and get_format(name).activation is not None for name in names)


def _placed(kind: EngineKind, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Settings with the device of the component as provider, where the engine has this setting."""
    own = {"provider": device.type} if "provider" in kind.open_settings else {}
    return own | dict(settings)


@dataclass(frozen=True, eq=False)
class Opened:
    """A component opened by one candidate, in one range of steps.

    Attributes:
        label: label of the candidate, with the steps where the plan changes with them.
        candidate: the candidate. engine: engine that runs the component.
        at: function whose context is a step of the range. effect: effect check, see `check_effect`.
        formats: layer -> format whose codes it multiplies.
        weight_bytes: size of its tensors, or of its files. load_ms: time of loading weights into PyTorch and applying the
            plan, or of opening its files. kernels: name of what multiplies, as far as it is known without a call.
        plan: name of its plan, with the steps.
    """

    label: str
    candidate: Candidate
    engine: Engine
    at: Callable[[], Any]
    effect: Callable[[], str]
    formats: dict[str, str]
    weight_bytes: int
    load_ms: float
    kernels: str
    plan: str | None


def needs_model(component: str, candidate: Candidate, files: Files) -> bool:
    """Whether the candidate needs the networks in PyTorch, and not its files alone."""
    return candidate.label not in files.plan_graphs and files.networks.get(candidate.label) is None


def open_candidate(
    model: Model | None, component: str, candidate: Candidate, files: Files, device: torch.device
) -> list[Opened]:
    """Open a component by a candidate: once for each range of steps where the plan changes with the step.

    Args:
        model: model with the component; None where `needs_model` is false. files: result of `component_files`.

    Raises:
        WanlabError: as the engine and the plan.
    """
    if candidate.label in files.plan_graphs:
        return _open_graphs(model, component, candidate, files, device)
    kind, settings = candidate.kind(component), candidate.settings(component)
    begin, used, applied = time.perf_counter(), model, None
    if candidate.plan is not None:
        ranges = {component: files.ranges} if files.ranges else None
        applied = apply_plan(model, candidate.plan_for(component), ranges)
        used = applied.model
    plan_ms = (time.perf_counter() - begin) * 1e3
    path = files.networks.get(candidate.label)
    engine = kind.open(
        used, component, None if path is None else Path(path), **kind.opening(_placed(kind, settings, device))
    )
    load_ms = engine.load_ms + (plan_ms if applied else 0.0)
    weight_bytes = engine.size_bytes
    if path is None and used is not None:
        parts = {model.spec.part_of(component)}
        load_ms += sum(part.time_ms for part in model.load.parts if part.part in parts)
        weight_bytes = _held_bytes(used.component(component), component)
    kernels = applied.kernels if applied else f"{kind.title} on {device.type}"
    if applied is None or applied.clock is None:
        formats = {} if applied is None else _on_codes(applied, component)
        effect = _effect_of(model, component, candidate, engine, applied)
        name = candidate.plan.name if candidate.plan is not None else None
        return [
            Opened(
                candidate.label,
                candidate,
                engine,
                nullcontext,
                effect,
                formats,
                weight_bytes,
                load_ms,
                kernels,
                name,
            )
        ]
    return [
        Opened(
            f"{candidate.label} steps {first}-{last}",
            candidate,
            engine,
            partial(applied.at, first),
            _effect_of(model, component, candidate, engine, applied),
            _on_codes(applied, component, first),
            weight_bytes,
            load_ms,
            kernels,
            f"{candidate.plan.name} steps {first}-{last}",
        )
        for first, last in applied.clock.bands
    ]


def _open_graphs(
    model: Model | None, component: str, candidate: Candidate, files: Files, device: torch.device
) -> list[Opened]:
    kind, settings = candidate.kind(component), candidate.settings(component)
    graphs = read_plan_graphs(files.plan_graphs[candidate.label])
    options = kind.opening(_placed(kind, settings, device))
    provider = options.pop("provider", device.type) if "provider" in kind.open_settings else kind.name
    engine = load_plan_engines(graphs, provider, components=(component,), **options)[component]
    opened = []
    for first, last, graph in graphs.bands[component]:
        steps = f" steps {first}-{last}" if len(graphs.bands[component]) > 1 else ""
        own = engine.band(first) if hasattr(engine, "band") else engine
        formats = {
            layer: name
            for layer, name in graphs.formats[graph].items()
            if not is_float(name) and get_format(name).activation is not None
        }
        opened.append(
            Opened(
                candidate.label + steps,
                candidate,
                own,
                nullcontext,
                _graph_effect(model, component, graphs, graph, first),
                formats,
                own.size_bytes,
                own.load_ms,
                f"{kind.title} on {device.type}",
                candidate.plan.name + steps,
            )
        )
    return opened


def _held_bytes(network: torch.nn.Module, component: str) -> int:
    """Bytes of distinct tensors of a component; of the VAE those of its half."""
    half = {"vae_encoder": "decoder", "vae_decoder": "encoder"}.get(component)
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if half is None or not name.startswith(f"{half}.")
    }
    return sum(tensors.values())


def _on_codes(applied: Applied, component: str, step: int | None = None) -> dict[str, str]:
    """Layer -> format, of layers that multiply codes."""
    rows = applied.frame[applied.frame["component"] == component]
    if step is not None:
        rows = rows[rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))]
    rows = rows[rows["kernel"].isin(("scaled_mm", "int_mm"))]
    return dict(zip(rows["layer"], rows["format"], strict=True))


def _effect_of(
    model: Model | None, component: str, candidate: Candidate, engine: Engine, applied: Applied | None
) -> Callable[[], str]:
    """Effect check of a candidate: returns a sentence, or raises a `WanlabError` where it was not applied."""

    def check() -> str:
        sentences = [str(effect_check(model, applied))] if applied is not None else []
        kind, used_kind = candidate.kind(component), kind_of_label(engine.name)
        if used_kind is None or used_kind.name != kind.name:
            raise WanlabError(f"{engine.name} ran instead of {kind.name}")
        if hasattr(engine, "nodes_by_provider"):
            counts = engine.nodes_by_provider().groupby("provider")["nodes"].sum()
            sentences.append(", ".join(f"{nodes} nodes on {provider}" for provider, nodes in counts.items()))
        return "; ".join(sentences) or f"{kind.title} ran"

    return check


def _graph_effect(
    model: Model | None, component: str, graphs: PlanGraphs, graph: str, step: int | None
) -> Callable[[], str]:
    def check() -> str:
        if (
            model is None
        ):  # in a process that holds no network the layers are read from the record of the graphs
            formats = [name for name in graphs.formats[graph].values() if not is_float(name)]
            if not formats:
                raise WanlabError(f"plan {graphs.plan.name} changed nothing in {graph}")
            return f"{len(formats)} layers of {graph} on codes"
        assignment = assign(graphs.plan, experts_of(model), default=graphs.facts["settings"]["default"])
        return str(graph_effect_check(assignment, component, graphs.folder / graph, step=step))

    return check


def check_effect(opened: Opened, compiled_graphs: int | None = None) -> tuple[str, str]:
    """Whether a candidate was applied, and how that was seen.

    Args:
        compiled_graphs: number of graphs that torch.compile made in the first call.

    Returns:
        `"applied"`, `"not applied"` or `"baseline"` (eager as it was loaded); and a sentence.
    """
    configuration, label = opened.candidate.configuration, opened.engine.name
    if label == EAGER and configuration.plan is None and not opened.candidate.cuda_graph:
        return BASELINE, "the component as it was loaded"
    try:
        sentence = opened.effect()
    except WanlabError as error:
        return NOT_APPLIED, str(error)
    if label == COMPILED:
        if not compiled_graphs:
            return NOT_APPLIED, f"{sentence}; torch.compile made no graph"
        sentence += f"; torch.compile made {compiled_graphs} graph{'s' * (compiled_graphs != 1)}"
    return APPLIED, sentence
