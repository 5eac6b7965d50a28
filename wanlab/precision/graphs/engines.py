"""Engines that compute a plan: one per expert, which changes its graph with the step of the generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.ort import OrtEngine
from wanlab.convert.tensorrt.engine import TensorRTEngine
from wanlab.convert.tensorrt.source import read_source
from wanlab.errors import WanlabError, did_you_mean
from wanlab.precision.graphs.record import PlanGraphs, files_of, read_plan_graphs

if TYPE_CHECKING:
    import torch

    from wanlab.convert.engine import Engine, TensorType
    from wanlab.precision.applied.steps import StepClock

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")


class SteppedEngine:
    """One expert whose graph changes with the step; `wanlab.convert.use` takes it as any engine.

    The step is counted by the scheduler of the pipeline it is used in: a generation with another number of steps than the
    plan's is refused when it begins, before anything is computed.

    Attributes:
        name, inputs, outputs, metadata, device: see `wanlab.convert.engine.Engine`.
        path: the folder of the graphs. bands: first step, last step (inclusive), graph.
        size_bytes: of its graphs, weights that they share once. load_ms: of the engines opened so far.
    """

    def __init__(
        self,
        component: str,
        bands: tuple[tuple[int, int, str], ...],
        graphs: PlanGraphs,
        clock: StepClock,
        opener: Callable[[Path], Engine],
        resident: bool = True,
    ) -> None:
        self.path, self.bands, self.clock = graphs.folder, bands, clock
        self._component, self._plan = component, graphs.plan.name
        self._opener, self._resident = opener, resident
        self._open: dict[str, Engine] = {}
        self.load_ms = 0.0
        source = read_source(graphs.folder / bands[0][2])
        self.inputs: Mapping[str, TensorType] = source.inputs
        self.outputs: Mapping[str, TensorType] = source.outputs
        self.metadata: Mapping[str, str] = source.metadata
        self.size_bytes = sum(
            graphs.files[name][1] for name in files_of(graphs.folder, [b[2] for b in bands])
        )
        for _, _, graph in bands if resident else bands[:1]:
            self._engine(graph)
        self.name = next(iter(self._open.values())).name

    def __repr__(self) -> str:
        return f"SteppedEngine({self._component!r}, {len(self.bands)} ranges of steps, {self.name})"

    @property
    def device(self) -> torch.device:
        return next(iter(self._open.values())).device

    def band(self, step: int) -> Engine:
        """The engine of a step.

        Raises:
            WanlabError: the expert has no graph for it.
        """
        for first, last, graph in self.bands:
            if first <= step <= last:
                return self._engine(graph)
        ranges = ", ".join(f"{first}-{last}" for first, last, _ in self.bands)
        raise WanlabError(
            f"plan {self._plan} has no graph of {self._component} for step {step}, only for {ranges}: it does not run"
            " there with the boundary that the graphs were made for; make them again with wanlab.precision.export_plan"
        )

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Inside the block it is this step; a generation counts its steps itself.

        Raises:
            WanlabError: the plan has no such step.
        """
        with self.clock.at(step):
            yield

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph of the step that it is now.

        Raises:
            WanlabError: no generation is under way; as `band` and the engine's own `run`.
        """
        if self.clock.step is None:
            raise WanlabError(
                f"plan {self._plan} changes with the step, and no generation is under way; call inside"
                " `with engine.at(step)`"
            )
        return self.band(self.clock.step).run(feeds)

    def bind(self, *_: Any, **__: Any) -> Callable[[], None]:
        """There is no one graph to bind.

        Raises:
            WanlabError: always.
        """
        raise WanlabError(f"{self._component} has a graph for every range of steps; bind engine.band(step)")

    def follow(self, pipeline) -> None:
        """Let the scheduler of a pipeline, which becomes a copy, tell the steps.

        Raises:
            WanlabError: it tells them to another plan already.
        """
        from wanlab.precision.applied.steps import stepped_scheduler

        told = getattr(pipeline.scheduler, "wanlab_clock", None)
        if told is None:
            pipeline.scheduler = stepped_scheduler(pipeline.scheduler, self.clock)
        elif told is not self.clock:
            raise WanlabError(
                f"this model's steps are counted for plan {told.plan.name} already; use the engines of one"
                " load_plan_engines together, on the model as it was loaded"
            )

    def _engine(self, graph: str) -> Engine:
        if graph not in self._open:
            if not self._resident:
                self._open.clear()
            self._open[graph] = self._opener(self.path / graph)
            self.load_ms += self._open[graph].load_ms
        return self._open[graph]


def load_plan_engines(
    folder: str | os.PathLike | PlanGraphs,
    provider: str = "auto",
    *,
    components: tuple[str, ...] | None = None,
    resident: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Engines for the graphs of a plan, as `wanlab.convert.use` takes them.

    Args:
        folder: that `export_plan` wrote.
        provider: `"cpu"`, `"cuda"` or `"auto"` for ONNX Runtime; `"tensorrt"` for the engines of `build_plan`.
        components: which; None takes all.
        resident: keep the graphs of all steps open; False holds one of each expert, and opens the next when its step comes.
        options: as `wanlab.convert.OrtEngine`, or `TensorRTEngine`, takes them.

    Returns:
        Component -> engine: of one graph where nothing changes with the step, else a `SteppedEngine`.

    Raises:
        WanlabError: no graphs, or such as were changed; an unknown provider or component; a TensorRT engine that computes
            in floats what the plan asked for in codes (`engine_effect_check`); as the engines.
    """
    from wanlab.precision.applied.steps import StepClock
    from wanlab.precision.effects.engine import engine_effect_check

    graphs = folder if isinstance(folder, PlanGraphs) else read_plan_graphs(folder)
    if provider not in PROVIDERS:
        raise WanlabError(
            f"unknown provider {provider!r}{did_you_mean(provider, PROVIDERS)}; give {', '.join(PROVIDERS)}"
        )
    for name in components or ():
        if name not in graphs.bands:
            raise WanlabError(
                f"no graph of {name!r} in {graphs.folder}{did_you_mean(name, graphs.bands)};"
                f" there is {', '.join(graphs.bands)}"
            )

    def opener(path: Path) -> Engine:
        if provider == "tensorrt":
            engine_effect_check(graphs, path.relative_to(graphs.folder).as_posix())
            return TensorRTEngine(path.with_suffix(".engine"), **options)
        return OrtEngine(path, provider=provider, **options)

    clock = None
    if graphs.changes_with_step:
        clock = StepClock(graphs.plan, [(0, graphs.plan.num_steps - 1)])
    engines: dict[str, Any] = {}
    for name in components or graphs.components:
        bands = graphs.bands[name]
        if bands[0][0] is None:
            engines[name] = opener(graphs.folder / bands[0][2])
        else:
            engines[name] = SteppedEngine(name, bands, graphs, clock, opener, resident)
    return engines
