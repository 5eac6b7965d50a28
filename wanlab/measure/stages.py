"""Times of the stages of a generation: every call of every component, and a table that adds up to the wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.measure.memory import peak_memory
from wanlab.models.calls import largest_timestep
from wanlab.models.device import synchronise
from wanlab.models.spec import COMPONENTS, ENCODERS, EXPERTS
from wanlab.models.taps import CallProxy, component_calls, intercept_calls

OTHER = "other"  # scheduler, host code, transfers: everything outside the components
BRANCHES = ("cond", "uncond")  # the order in which a guided step calls its expert


@dataclass(frozen=True)
class StageCall:
    """One call of one component.

    Attributes:
        generation: number of the generation in the recording, from 0.
        call: number of earlier calls of this component in the whole recording.
        component: a name of `COMPONENTS`.
        step: denoising step, from 0; None outside the experts.
        timestep: the expert's timestep, 0 to 1000; None outside the experts.
        branch: `"cond"` or `"uncond"` by order within the step; None outside the experts.
        start_ms: start of the call, from the start of the recording.
        time_ms: duration of the call, with the device synchronised at both ends.
        peak_gib, increase_gib: memory during the call, if it was requested (see `PeakMemory`).
    """

    generation: int
    call: int
    component: str
    step: int | None
    timestep: float | None
    branch: str | None
    start_ms: float
    time_ms: float
    peak_gib: float | None = None
    increase_gib: float | None = None


def stages(model, *, memory: bool = False) -> StageRecorder:
    """Record every component call made by `model.generate` inside the `with` block.

    The device is synchronised before and after each call. That gives each call its true time and
    removes any overlap between host and device, so compare the rows with the wall clock of the
    same run, not with that of an unrecorded run.

    Args:
        model: has a `pipeline` with `text_encoder`, `vae`, `transformer`, `transformer_2` and
            `scheduler` (absent ones and None are left out); modules or any callable
            objects, and optionally a `device`.
        memory: also record peak memory of each call. Slows the run; do not time with it.

    Raises:
        WanlabError: the model has no pipeline with a component in it, or is already being recorded.
    """
    return StageRecorder(model, memory=memory)


class StageRecorder:
    """Context manager made by `stages`; its tables can be read during and after the block.

    While it is open the pipeline's attributes are proxies that measure each call and pass it on. The components
    themselves are not changed (compiled modules stay compiled); at the end of the block they are restored.
    """

    def __init__(self, model, *, memory: bool = False) -> None:
        self.calls: list[StageCall] = []
        self.wall_ms: float | None = None
        self._pipeline = getattr(model, "pipeline", None)
        self._device = getattr(model, "device", None)
        self._memory = memory
        self._counts: dict[str, int] = {}
        self._generation, self._step, self._step_calls = 0, 0, 0
        self._denoised = False  # an expert has run in this generation
        self._stack = ExitStack()
        self._begin_ns = 0

    def __enter__(self) -> StageRecorder:
        targets = self._targets()
        if not targets:
            raise WanlabError(
                "the model has no pipeline with components; give the object that wanlab.models.load returns"
            )
        # Exactly this class: a technique's own stand-in is a part of the model, and is measured.
        if any(type(vars(self._pipeline)[name]) is CallProxy for name in targets):
            raise WanlabError("this model is being recorded already; leave the outer stages() block first")
        self._stack = ExitStack()
        self._stack.enter_context(intercept_calls(self._pipeline, targets))
        synchronise(self._device)
        self._begin_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_) -> None:
        synchronise(self._device)
        self.wall_ms = (time.perf_counter_ns() - self._begin_ns) / 1e6
        self._stack.close()

    def frame(self) -> pd.DataFrame:
        """One row per call, in order; columns as in `StageCall` (memory only if it was requested)."""
        columns = list(StageCall.__dataclass_fields__)
        frame = pd.DataFrame([asdict(call) for call in self.calls], columns=columns)
        frame = frame.astype({"step": "Int64", "timestep": "Float64"})
        return frame if self._memory else frame.drop(columns=["peak_gib", "increase_gib"])

    def breakdown(self, wall_ms: float | None = None) -> pd.DataFrame:
        """Time per component, with a last row `other` so that the rows add up to the wall clock.

        Args:
            wall_ms: wall clock of the recorded generation; None takes that of the `with` block.

        Returns:
            DataFrame: component, time_ms, share_percent, calls, mean_ms (and peak_gib with memory).

        Raises:
            WanlabError: the wall clock is shorter than the time inside components, so it is of another run.
        """
        if wall_ms is None:
            wall_ms = self.wall_ms
        if wall_ms is None:
            raise WanlabError(
                "the recording is still open; pass wall_ms or read the breakdown after the block"
            )
        times = {name: [call.time_ms for call in self.calls if call.component == name] for name in COMPONENTS}
        inside = math.fsum(value for values in times.values() for value in values)
        if not wall_ms > 0 or inside > wall_ms:
            raise WanlabError(
                f"wall clock {wall_ms:.3f} ms is shorter than the {inside:.3f} ms recorded inside "
                "components; pass the wall clock of the recorded run"
            )
        rows = [
            {"component": name, "time_ms": math.fsum(values), "calls": len(values)}
            for name, values in times.items()
            if values
        ]
        rows.append({"component": OTHER, "time_ms": wall_ms - inside, "calls": 0})
        frame = pd.DataFrame(rows)
        frame.insert(2, "share_percent", frame["time_ms"] / wall_ms * 100)
        frame["mean_ms"] = frame["time_ms"] / frame["calls"].where(frame["calls"] > 0)
        if self._memory:
            peaks = {
                name: max(call.peak_gib for call in self.calls if call.component == name)
                for name in frame["component"]
                if name != OTHER
            }
            frame["peak_gib"] = frame["component"].map(peaks).astype(float)
        return frame

    def _targets(self) -> dict[str, dict[str, Callable]]:
        """Pipeline attribute -> {method: function that wraps it}, for the attributes that the pipeline has."""
        targets = {
            attribute: {method: self._timed(component) for method, component in methods.items()}
            for attribute, methods in component_calls(self._pipeline).items()
        }
        if targets and vars(self._pipeline).get("scheduler") is not None:
            targets["scheduler"] = {
                "set_timesteps": self._after(self._begin_schedule),
                "step": self._after(self._end_step),
            }
        return targets

    def _timed(self, component: str) -> Callable:
        def wrap(call: Callable) -> Callable:
            def timed(*args, **kwargs):
                with ExitStack() as stack:
                    peak = stack.enter_context(peak_memory(self._device)) if self._memory else None
                    synchronise(self._device)
                    begin = time.perf_counter_ns()
                    result = call(*args, **kwargs)
                    synchronise(self._device)
                    end = time.perf_counter_ns()
                self._record(component, begin, end, peak, args, kwargs)
                return result

            return timed

        return wrap

    def _after(self, note: Callable[[], None]) -> Callable:
        def wrap(call: Callable) -> Callable:
            def noted(*args, **kwargs):
                result = call(*args, **kwargs)
                note()
                return result

            return noted

        return wrap

    def _begin_schedule(self) -> None:
        self._begin_generation()
        self._step = self._step_calls = 0

    def _begin_generation(self) -> None:
        if self._denoised:
            self._generation += 1
            self._step = self._step_calls = 0
            self._denoised = False

    def _end_step(self) -> None:
        self._step += 1
        self._step_calls = 0

    def _record(self, component: str, begin: int, end: int, peak, args: tuple, kwargs: dict) -> None:
        step = timestep = branch = None
        if component in EXPERTS:
            timestep = _timestep(args, kwargs)
            step, branch = self._place(timestep)
            self._denoised = True
        elif component in ENCODERS:
            self._begin_generation()
        count = self._counts.get(component, 0)
        self._counts[component] = count + 1
        self.calls.append(
            StageCall(
                self._generation,
                count,
                component,
                step,
                timestep,
                branch,
                (begin - self._begin_ns) / 1e6,
                (end - begin) / 1e6,
                peak.peak_gib if peak else None,
                peak.increase_gib if peak else None,
            )
        )

    def _place(self, timestep: float | None) -> tuple[int, str]:
        """Step and branch of an expert call that has just returned."""
        scheduled = isinstance(vars(self._pipeline).get("scheduler"), CallProxy)
        last = next((call for call in reversed(self.calls) if call.component in EXPERTS), None)
        # Without a scheduler to observe, a change of the timestep marks the next step.
        if not scheduled and self._denoised and last is not None and last.timestep != timestep:
            self._end_step()
        branch = BRANCHES[self._step_calls] if self._step_calls < 2 else f"branch_{self._step_calls}"
        self._step_calls += 1
        return self._step, branch


def _timestep(args: tuple, kwargs: dict) -> float | None:
    """The timestep of an expert's call; of per-token timesteps the largest."""
    value = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    return None if value is None else largest_timestep(value)
