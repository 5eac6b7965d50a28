"""Several generations at a time that share the calls of their networks, each with its own picture, prompt, seed and steps.

Every generation runs the code of its diffusers pipeline in a thread of its own, with a scheduler of its own. Where a
pipeline calls a network, the thread waits; when all threads wait, calls of the same network with tensors of the same shape
are joined along the batch, run once, and divided again. So a generation joins the others at its own step, because the
timestep is an input per sample, and a generation alone runs exactly what `Model.generate` runs.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from wanlab.core.errors import WanlabError
from wanlab.models.calls import shared_by_batch
from wanlab.models.pipeline import Generation, Model
from wanlab.models.spec import EXPERTS

VAE_PIXELS = 4_000_000
"""Most pixels, of all frames, that one call of the VAE joins: larger videos are encoded and decoded one at a time, which
bounds memory. The value is a choice, not a measurement."""
SPARE = 0.9
"""Share of the free memory of a GPU that a batch may be predicted to take."""


class Stopped(Exception):
    """A generation was ended by its `stop`."""


@dataclass
class Stages:
    """Where the time of one generation went, in ms; `wait_ms` is the part spent waiting for calls of others.

    Attributes:
        batches: samples in each call of a denoiser that this generation took part in.
    """

    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    wait_ms: float = 0.0
    batches: list[int] = field(default_factory=list)

    @property
    def mean_batch(self) -> float:
        """Mean number of samples in the denoiser's calls; 0 before the first."""
        return sum(self.batches) / len(self.batches) if self.batches else 0.0


@dataclass(eq=False)
class _Call:
    """A call of a network that waits. `key` is equal for calls that can be joined, None where it can be joined with none."""

    component: str
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    key: Any
    rows: int
    since: float
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None
    batch: int = 1
    ran_s: float = 0.0


class Meeting:
    """Generations of one model that run together. `generate` is called from several threads, one for each generation.

    Args:
        model: from `wanlab.models.load` or `configure`; it is not changed.
        max_batch: samples of one call of a network, and generations at a time.

    Attributes:
        alone: why this model makes one video at a time; empty where it does not.
        formed: samples of a denoiser's call -> number of such calls.
    """

    def __init__(self, model: Model, *, max_batch: int = 8) -> None:
        self.alone = why_alone(model)
        self.max_batch = 1 if self.alone else max_batch
        self.formed: dict[int, int] = {}
        self._model = model
        self._change = threading.Condition()
        self._baton = (
            threading.Lock()
        )  # pipelines, tokenizers and schedulers are not made for several threads
        self._places = threading.Semaphore(self.max_batch)
        self._active = 0
        self._waiting: list[_Call] = []
        self._most: dict[Any, int] = {}  # largest batch that fitted, after one did not
        self._bytes: dict[Any, float] = {}  # memory of a call by sample, as it was measured
        self._open = True
        self._runner = threading.Thread(target=self._run, name="wanlab-batches", daemon=True)
        self._runner.start()

    def generate(
        self,
        image: Any,
        prompt: str,
        *,
        on_step: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        stages: Stages | None = None,
        **settings: Any,
    ) -> Generation:
        """`Model.generate`, together with the calls of other threads; waits while `max_batch` generations run.

        Args:
            image, prompt, settings: as `Model.generate` takes them.
            on_step: called after each denoising step with the number of steps done.
            stop: asked before each call of a network and after each step; true ends the generation.
            stages: where its times are written.

        Raises:
            Stopped: `stop` said so.
            WanlabError: as `Model.generate`; no memory for this generation alone is torch's own error.
        """
        seat = _Seat(self, on_step, stop or (lambda: False), stages or Stages())
        with self._places:
            with self._change:
                if not self._open:
                    raise Stopped("the meeting is closed")
                self._active += 1
            try:
                with self._baton, torch.no_grad():
                    return seat.generate(image, prompt, settings)
            finally:
                with self._change:
                    self._active -= 1
                    self._change.notify_all()

    def close(self) -> None:
        """End all generations at their next call, and the thread that runs networks."""
        with self._change:
            self._open = False
            self._change.notify_all()
        self._runner.join(timeout=60)

    def meet(
        self, seat: _Seat, component: str, function: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Run a call of a network, joined with those of other generations."""
        seat.check()
        key, rows = (None, 1) if self.alone else _key(function, args, kwargs)
        call = _Call(component, function, (args, kwargs), key, rows, time.perf_counter())
        self._baton.release()
        try:
            with self._change:
                self._waiting.append(call)
                self._change.notify_all()
            call.done.wait()
        finally:
            self._baton.acquire()
        seat.stages.wait_ms += max(0.0, time.perf_counter() - call.since - call.ran_s) * 1e3
        if component in EXPERTS:
            seat.stages.batches.append(call.batch)
        if call.error is not None:
            raise call.error
        return call.result

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._change:
                    self._change.wait_for(self._ready)
                    if not self._open:
                        for call in self._waiting:
                            call.error = Stopped("the service ends")
                            call.done.set()
                        self._waiting.clear()
                        if not self._active:
                            return
                        continue
                    group = self._chosen()
                    self._waiting = [call for call in self._waiting if call not in group]
                self._execute(group)
                del group

    def _ready(self) -> bool:
        if not self._open:
            return bool(self._waiting) or not self._active
        return bool(self._waiting) and len(self._waiting) >= self._active

    def _chosen(self) -> list[_Call]:
        """Calls that run next: encoders and decoders first, so that their generations join the others or leave."""
        first = min(self._waiting, key=lambda call: (call.component in EXPERTS, call.since))
        if first.key is None:
            return [first]
        same = [call for call in self._waiting if call.key == first.key]
        return same[: self._room(first, len(same))]

    def _room(self, call: _Call, count: int) -> int:
        """How many of the calls of this kind run at once."""
        most = min(count, self.max_batch, self._most.get(call.key, count))
        if call.component.startswith("vae_"):
            most = min(
                most, max(1, VAE_PIXELS // max(1, _video_pixels(call, self._model.spec.spatial_factor)))
            )
        each = self._bytes.get(call.key)
        if each and most > 1:
            free = torch.cuda.mem_get_info(self._model.device)[0]
            free += torch.cuda.memory_reserved(self._model.device) - torch.cuda.memory_allocated(
                self._model.device
            )
            most = min(most, max(1, int(SPARE * free / each)))
        return max(1, most)

    def _execute(self, group: list[_Call]) -> None:
        begin = time.perf_counter()
        try:
            results = self._measured(group)
        except Exception as error:
            if len(group) == 1:
                group[0].error = error
                results = [None]
            else:  # one of them has failed: the others are not to fail with it
                if out_of_memory(error):
                    self._most[group[0].key] = len(group) // 2
                del error
                if self._model.device.type == "cuda":
                    torch.cuda.empty_cache()
                for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                    self._execute(half)
                return
        ran_s = time.perf_counter() - begin
        if group[0].component in EXPERTS:
            self.formed[len(group)] = self.formed.get(len(group), 0) + 1
        for call, result in zip(group, results, strict=True):
            call.result, call.batch, call.ran_s = result, len(group), ran_s
            call.done.set()

    def _measured(self, group: list[_Call]) -> list[Any]:
        if self._model.device.type != "cuda" or group[0].key is None:
            return _joined(group)
        device = self._model.device
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = _joined(group)
        self._bytes[group[0].key] = (torch.cuda.max_memory_allocated(device) - before) / len(group)
        return results


class _Seat:
    """One generation of a meeting: its copy of the pipeline, its times, and whether it is to end."""

    def __init__(
        self,
        meeting: Meeting,
        on_step: Callable[[int], None] | None,
        stop: Callable[[], bool],
        stages: Stages,
    ) -> None:
        self.meeting, self.stages = meeting, stages
        self._on_step, self._stop = on_step, stop
        self._steps = 0
        self._first: float | None = None
        self._last: float | None = None

    def check(self) -> None:
        """Raises Stopped if the generation is to end."""
        if self._stop():
            raise Stopped(f"stopped after {self._steps} steps")

    def generate(self, image: Any, prompt: str, settings: Mapping[str, Any]) -> Generation:
        begin = time.perf_counter()
        model, restore = self._copy(self.meeting._model)
        try:
            generation = model.generate(image, prompt, **settings)
        finally:
            restore()
        end = time.perf_counter()
        first, last = self._first or begin, self._last or end
        self.stages.encode_ms = (first - begin) * 1e3
        self.stages.denoise_ms = (last - first) * 1e3
        self.stages.decode_ms = (end - last) * 1e3
        return generation

    def network(self, component: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if component in EXPERTS and self._first is None:
            self._first = time.perf_counter()
        return self.meeting.meet(self, component, function, args, kwargs)

    def stepped(self) -> None:
        """The scheduler made a step."""
        self._steps += 1
        self._last = time.perf_counter()
        if self._on_step is not None:
            self._on_step(self._steps)
        self.check()

    def _copy(self, model: Model) -> tuple[Model, Callable[[], None]]:
        """A model whose networks are called through the meeting, and what undoes changes of shared objects."""
        pipeline = copy.copy(model.pipeline)
        shared = hasattr(pipeline.scheduler, "wanlab_clock")  # layers read the step from this object
        scheduler = pipeline.scheduler if shared else copy.deepcopy(pipeline.scheduler)
        step = scheduler.step

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.stepped()
            return result

        scheduler.step = counted
        pipeline.scheduler = scheduler
        by_part: dict[str, list[str]] = {}
        for component in model.components:
            by_part.setdefault(model.spec.part_of(component), []).append(component)
        for part, components in by_part.items():
            network = getattr(pipeline, part)
            setattr(pipeline, part, StandIn(network, self, components))
        changed = copy.copy(model)
        changed.pipeline, changed.notes = pipeline, []
        return changed, functools.partial(scheduler.__dict__.pop, "step", None)


class StandIn(torch.nn.Module):
    """A network of a pipeline whose calls go through a meeting; all else is the network's own."""

    def __init__(self, network: torch.nn.Module, seat: _Seat, components: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["_network"], self.__dict__["_seat"] = network, seat
        self.__dict__["_components"] = tuple(components)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_network"], name)

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Those of the network."""
        return self._network.parameters(recurse)

    def cache_context(self, name: str) -> Any:
        """What a cache knows one of two branches by; nothing where calls of several generations are joined."""
        return self._network.cache_context(name) if self._seat.meeting.alone else nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self._seat.network(self._components[0], self._network, args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Call the encoder of a VAE."""
        return self._seat.network("vae_encoder", self._network.encode, args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Call the decoder of a VAE."""
        return self._seat.network("vae_decoder", self._network.decode, args, kwargs)


def generate_together(
    model: Model, requests: Sequence[Mapping[str, Any]], *, max_batch: int | None = None
) -> list[Generation]:
    """Videos of several requests, made together: one call of each network for all of them, where shapes agree.

    Args:
        model: from `wanlab.models.load` or `configure`.
        requests: arguments of `Model.generate`, by name, for each video.
        max_batch: samples of one call of a network; by default as many as there are requests.

    Raises:
        WanlabError: as `Model.generate`, of the first request that failed.
    """
    if not requests:
        return []
    most = len(requests) if max_batch is None else max_batch
    meeting = Meeting(model, max_batch=most)
    try:
        with ThreadPoolExecutor(meeting.max_batch) as threads:
            return list(threads.map(lambda request: meeting.generate(**request), requests))
    finally:
        meeting.close()


def why_alone(model: Model) -> str:
    """Why the generations of a model cannot share calls of its networks; empty if they can."""
    if getattr(model.pipeline.scheduler, "wanlab_clocks", ()):
        return "its plan or its techniques follow the steps of one video"
    for component, network in model.components.items():
        if getattr(network, "one_size_of_batch", False):
            return f"the graph of {component} was made for a batch of 1"
        if component in EXPERTS and _has_hooks(network):
            return f"{component} keeps results from one step to the next, of one video"
    return ""


def _has_hooks(network: Any) -> bool:
    """Whether diffusers calls anything else than the network, such as a cache of its blocks."""
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    return any(getattr(getattr(module, "_diffusers_hook", None), "hooks", None) for module in modules)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the GPU or the machine, was not enough."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _video_pixels(call: _Call, factor: int) -> int:
    """Pixels of all frames of a call of the VAE: `[B, 3, T, H, W]` of an encoder, `[B, C, T', H', W']` of a decoder."""
    tensor = next((each for each in call.arguments[0] if isinstance(each, torch.Tensor)), None)
    if tensor is None or tensor.ndim < 4:
        return 1
    frames, height, width = ((1, *tensor.shape[-3:]))[-3:]
    encoder = call.component == "vae_encoder"
    return frames * height * width if encoder else 4 * frames * height * width * factor**2


def _key(function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    """What is equal for calls that can be joined, and the rows of this one; None where it cannot be joined."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    shared = shared_by_batch({str(name): value for name, value in kwargs.items()})
    first = next((value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is None:
        return None, 1
    rows = first.shape[0]
    parts: list[Any] = [
        getattr(function, "__name__", id(function)),
        id(getattr(function, "__self__", function)),
    ]
    for name, value in given.items():
        if name in shared or isinstance(value, tuple | list):
            parts.append((name, _form(value)))
        elif isinstance(value, torch.Tensor):
            if not value.ndim or value.shape[0] != rows:
                return None, rows
            parts.append((name, tuple(value.shape), value.dtype))
        elif value is None or isinstance(value, bool | int | float | str) or value == {}:
            parts.append((name, value if value != {} else "{}"))
        else:
            return None, rows
    return tuple(parts), rows


def _form(value: Any) -> Any:
    """Shape and dtype of the tensors of a value that all samples share; other values as text."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_form(each) for each in value)
    return repr(value)


def _joined(group: list[_Call]) -> list[Any]:
    """Results of calls that are run as one."""
    args, kwargs = group[0].arguments
    function = group[0].function
    if len(group) == 1:
        return [function(*args, **kwargs)]
    shared = shared_by_batch(kwargs)

    def join(name: Any, values: list[Any]) -> Any:
        whole = isinstance(values[0], torch.Tensor) and name not in shared
        return torch.cat(values) if whole else values[0]

    every = [call.arguments for call in group]
    one = [join(index, [each[0][index] for each in every]) for index in range(len(args))]
    named = {name: join(name, [each[1][name] for each in every]) for name in kwargs}
    return _divided(function(*one, **named), [call.rows for call in group])


def _divided(value: Any, rows: list[int]) -> list[Any]:
    """An output of a network, in parts of so many rows each."""
    if isinstance(value, torch.Tensor):
        if not value.ndim or value.shape[0] != sum(rows):
            raise WanlabError(f"an output of {list(value.shape)} cannot be divided into {len(rows)} samples")
        return list(value.split(rows))
    if value is None or isinstance(value, bool | int | float | str):
        return [value] * len(rows)
    if isinstance(value, DiagonalGaussianDistribution):
        return [
            DiagonalGaussianDistribution(part, value.deterministic)
            for part in _divided(value.parameters, rows)
        ]
    if isinstance(value, Mapping):  # outputs of transformers and diffusers
        parts = {name: _divided(each, rows) for name, each in value.items()}
        return [type(value)(**{name: part[i] for name, part in parts.items()}) for i in range(len(rows))]
    if isinstance(value, tuple | list):
        divided = [_divided(each, rows) for each in value]
        return [type(value)(part[i] for part in divided) for i in range(len(rows))]
    raise WanlabError(f"an output of {type(value).__name__} cannot be divided into samples")
