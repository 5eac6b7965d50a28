"""Ranges of layer inputs for quantization: methods, observers, and a cache that is refused where it is out of date."""

from __future__ import annotations

import hashlib
import math
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from tqdm.auto import tqdm

import wanlab
from wanlab.core.digests import weights_key
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import write_bytes
from wanlab.core.manifest import Manifest, file_damage, key_of, plain_facts
from wanlab.export.components import component_spec
from wanlab.models.spec import EXPERTS
from wanlab.precision.assignment import choose_layers, layer_set_key
from wanlab.precision.denoiser import eager_network, output_of
from wanlab.precision.recording import RecordedCall, Recording

BINS = 4096
SMALLEST_EXPONENT = -126
_CHUNK = 2**24  # elements in float32 at a time


@dataclass(eq=False)
class Histogram:
    """Counts of magnitudes in equal bins from 0 to `2**exponent`.

    The range is always a power of two, and grows by adding neighbouring bins, so that counts are exact and do not
    depend on the order in which tensors came.

    Attributes:
        counts: int64 `[BINS]`, on the CPU.
        exponent: the smallest for which all magnitudes lie below `2**exponent`.
        amax: largest magnitude.
    """

    counts: torch.Tensor
    exponent: int
    amax: float

    @classmethod
    def empty(cls) -> Histogram:
        return cls(torch.zeros(BINS, dtype=torch.int64), SMALLEST_EXPONENT, 0.0)

    @property
    def bin_width(self) -> float:
        return 2.0**self.exponent / BINS

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        exponent = max(self.exponent, other.exponent)
        self.counts = _widened(self, exponent) + _widened(other, exponent)
        self.exponent, self.amax = exponent, max(self.amax, other.amax)


def histogram_of(tensor: torch.Tensor, elements: int = 2**22) -> Histogram:
    """Histogram of the magnitudes of a tensor, on its device.

    Args:
        elements: count at most about this many, evenly spread; the largest magnitude is of all.

    Raises:
        ValueError: a value is not finite.
    """
    flat = tensor.detach().flatten()
    if not flat.numel():
        return Histogram.empty()
    low, high = torch.aminmax(flat)
    amax = max(-float(low), float(high))
    if not math.isfinite(amax):
        raise ValueError("values are not finite")
    exponent = max(math.frexp(amax)[1], SMALLEST_EXPONENT) if amax else SMALLEST_EXPONENT
    step = max(1, flat.numel() // elements)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:
        step += 1  # or only some of the channels would be counted
    counts = torch.zeros(BINS, dtype=torch.int64)
    for piece in flat[::step].split(_CHUNK):
        magnitudes = piece.float().abs()
        # histc counts in float32 and is exact up to 2**24, which is the size of a piece.
        counts += torch.histc(magnitudes, BINS, min=0.0, max=2.0**exponent).to(torch.int64).cpu()
    return Histogram(counts, exponent, amax)


class Observer:
    """Histograms of the inputs of layers, and the largest magnitude of every call.

    Attributes:
        histograms: layer -> histogram of its input over all calls so far.
        call_amax: layer -> largest magnitude of its input in each call.
    """

    def __init__(self, network: torch.nn.Module, layers: Sequence[str], *, elements: int = 2**22) -> None:
        self.histograms = {layer: Histogram.empty() for layer in layers}
        self.call_amax: dict[str, list[float]] = {layer: [] for layer in layers}
        self._network = network
        self._elements = elements
        self._seen: dict[int, tuple[weakref.ref, int, Histogram]] = {}
        self._now: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Inside the block inputs of layers are counted; `end_call` ends the call after each forward of the network."""
        handles = [
            self._network.get_submodule(layer).register_forward_pre_hook(self._hook(layer))
            for layer in self.histograms
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def end_call(self) -> None:
        """End one call of the network.

        Raises:
            WanlabError: a layer was not run.
        """
        idle = [layer for layer in self.histograms if layer not in self._now]
        if idle:
            raise WanlabError(f"{idle[0]} is not run by this component; leave it out of the layers")
        for layer, amax in self._now.items():
            self.call_amax[layer].append(amax)
        self._now, self._seen = {}, {}

    def _hook(self, layer: str):
        def look(module, args) -> None:
            try:
                histogram = self._of(args[0])
            except ValueError as error:
                raise WanlabError(
                    f"the input of {layer} is not finite; nothing can be calibrated on it"
                ) from error
            self.histograms[layer].add(histogram)
            self._now[layer] = max(self._now.get(layer, 0.0), histogram.amax)

        return look

    def _of(self, tensor: torch.Tensor) -> Histogram:
        """The histogram of a tensor. Queries, keys and values read the same tensor, which is counted once."""
        cached = self._seen.get(id(tensor))
        if cached is not None and cached[0]() is tensor and cached[1] == _version(tensor):
            return cached[2]
        histogram = histogram_of(tensor, self._elements)
        self._seen[id(tensor)] = (weakref.ref(tensor), _version(tensor), histogram)
        return histogram


def _version(tensor: torch.Tensor) -> int:
    """Number that changes when a tensor is written to; -1 of inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def _widened(histogram: Histogram, exponent: int) -> torch.Tensor:
    """The counts over a range of `2**exponent`."""
    doublings = min(exponent - histogram.exponent, int(math.log2(BINS)))
    if not doublings:
        return histogram.counts
    sums = histogram.counts.view(-1, 2**doublings).sum(dim=1)
    return torch.cat([sums, torch.zeros(BINS - len(sums), dtype=torch.int64)])


METHODS = ("max", "percentile", "entropy")


@dataclass(frozen=True)
class Method:
    """How a range is chosen.

    Attributes:
        name: `"max"` (the largest magnitude seen), `"percentile"`, or `"entropy"` (the range whose codes lose least
            information, by the Kullback-Leibler divergence: S. Migacz, 8-bit Inference with TensorRT, GTC 2017).
        percentile: percentage of the magnitudes that the range covers, for `"percentile"`.
        levels: number of codes of one sign, for `"entropy"`; 128 for INT8.
    """

    name: str = "max"
    percentile: float = 99.99
    levels: int = 128

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise WanlabError(
                f"no calibration method {self.name!r}{did_you_mean(self.name, METHODS)};"
                f" give {', '.join(METHODS)}"
            )
        if not 0 < self.percentile <= 100:
            raise WanlabError(f"percentile is {self.percentile}; give more than 0 and at most 100")

    def to_dict(self) -> dict[str, Any]:
        """Its name and the parameters that it uses."""
        uses = {"max": (), "percentile": ("percentile",), "entropy": ("levels",)}[self.name]
        return {key: value for key, value in asdict(self).items() if key == "name" or key in uses}

    def amax(self, histogram: Histogram) -> float:
        """The largest magnitude that the codes represent."""
        counts = histogram.counts.numpy()
        if self.name == "max" or not counts.sum():
            return histogram.amax
        if self.name == "percentile":
            value = _percentile(counts, self.percentile) * histogram.bin_width
        else:
            pairs = counts.reshape(-1, 2).sum(axis=1)  # half the bins, a quarter of the time
            value = _entropy(pairs, self.levels) * 2 * histogram.bin_width
        return min(value, histogram.amax)


def _percentile(counts: np.ndarray, percentile: float) -> float:
    """Bins below which `percentile` of the counts lie, spread evenly inside a bin."""
    total = np.cumsum(counts)
    target = total[-1] * percentile / 100
    index = int(np.searchsorted(total, target))
    below = total[index - 1] if index else 0
    return index + float(target - below) / max(int(counts[index]), 1)


def _entropy(counts: np.ndarray, levels: int) -> float:
    """Bins up to which the range goes.

    For every range P is the histogram with all counts outside it added to its last bin, and Q the counts inside it after
    rounding to `levels` codes: each code's counts spread over those of its bins that are not empty. The range with the
    smallest KL(P || Q) is taken.
    """
    last = int(np.flatnonzero(counts)[-1]) + 1
    if last <= levels:
        return float(last)
    sums = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    best, best_loss = last, np.inf
    for bins in range(levels, last + 1):
        inside = counts[:bins].astype(np.float64)
        target = inside.copy()
        target[-1] += sums[-1] - sums[bins]
        edges = np.arange(levels + 1) * bins // levels
        per_code = np.diff(sums[edges]) / np.maximum(np.diff(filled[edges]), 1)
        spread = np.repeat(per_code, np.diff(edges)) * (inside > 0)
        loss = _divergence(target, spread)
        if loss < best_loss:
            best, best_loss = bins, loss
    return float(best)


def _divergence(target: np.ndarray, other: np.ndarray) -> float:
    """KL(P || Q) of two histograms; a bin that is empty in Q alone counts as one in a million."""
    p, q = target / target.sum(), other / max(other.sum(), 1e-30)
    filled = p > 0
    return float(np.sum(p[filled] * np.log(p[filled] / np.maximum(q[filled], 1e-6 / len(p)))))


MEND = "delete it, give another path, or calibrate with force=True"

# Facts of a cache -> their names in messages, in the order in which differences are listed.
_PARTS = {
    "model": "model",
    "component": "component",
    "weights": "weights",
    "layers": "layer set",
    "data": "data",
    "method": "method",
    "elements": "number of counted values",
    "version": "wanlab version",
}


class LayerRange(msgspec.Struct, frozen=True):
    """The range of one layer's input in a cache: by the method, the largest value, exponent of the histogram."""

    layer: str
    amax: float
    max: float
    exponent: int


class CalibrationCache(Manifest, frozen=True, kw_only=True):
    """A calibration as JSON, with its histograms beside it as safetensors.

    Attributes:
        facts: the fields of `Identity`, the names of the layers instead of their hash.
        layers: ranges in the order of the histograms. calls: as of `Calibration`.
        tensors: SHA-256 and size in bytes of the histograms' file.
    """

    KIND: ClassVar[str] = "calibration cache"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = MEND
    NONE: ClassVar[str] = "no calibration cache at {path}; make it with wanlab.precision.calibrate(cache=...)"

    layers: tuple[LayerRange, ...]
    calls: tuple[dict[str, Any], ...]
    tensors: tuple[str, int]

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """The JSON file of the cache, which is at its path."""
        return Path(path)

    @property
    def tensors_file(self) -> Path:
        return Path(self.path).with_suffix(".safetensors")

    def damage(self) -> str:
        return file_damage(self.tensors_file, *self.tensors)

    def changed(self, facts: Mapping[str, Any]) -> str:
        """Every fact that differs, in words."""
        now = plain_facts(facts)
        return "; ".join(
            _difference(name, self.facts[name], now[name]) for name in _PARTS if self.facts[name] != now[name]
        )


def _difference(name: str, before: Any, now: Any) -> str:
    what = _PARTS[name]
    if name == "layers":
        more, fewer = set(now) - set(before), set(before) - set(now)
        parts = [f"{len(more)} more, e.g. {min(more)}"] if more else []
        parts += [f"{len(fewer)} fewer, e.g. without {min(fewer)}"] if fewer else []
        return f"another {what} ({', '.join(parts)})"
    if name in ("weights", "data"):
        return f"other {what} ({before[:8]} there, {now[:8]} here)"
    return f"another {what} ({_in_words(before)} there, {_in_words(now)} here)"


def _in_words(value: Any) -> str:
    return ", ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def write(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON and, beside it, its histograms as safetensors; each file appears when it is complete."""
    if path.suffix != ".json":
        raise WanlabError(f"{path} does not end in .json; a calibration cache does")
    histograms = list(calibration.histograms.values())
    tensors = save(
        {
            "counts": torch.stack([histogram.counts for histogram in histograms]),
            "call_amax": torch.tensor(list(calibration.call_amax.values()), dtype=torch.float64),
        }
    )
    cache = CalibrationCache(
        path=str(path),
        facts=calibration.identity.facts(calibration.layers),
        layers=tuple(
            LayerRange(layer, amax, histogram.amax, histogram.exponent)
            for (layer, amax), histogram in zip(calibration.amax.items(), histograms, strict=True)
        ),
        calls=calibration.calls,
        tensors=(hashlib.sha256(tensors).hexdigest(), len(tensors)),
    )
    # The JSON is written last: without it, and the hash in it, the tensors are not read.
    write_bytes(cache.tensors_file, tensors)
    cache.write()


def read(path: Path) -> tuple[Calibration, CalibrationCache]:
    """A calibration from its files, and its record.

    Raises:
        WanlabError: files that are missing, truncated or changed after they were written.
    """
    cache = CalibrationCache.read(path)
    if wrong := cache.damage():
        raise WanlabError(f"calibration cache {path} is broken ({wrong}); {MEND}")
    tensors = load(cache.tensors_file.read_bytes())
    names = tuple(entry.layer for entry in cache.layers)
    method = Method(**cache.facts["method"])
    for entry, counts in zip(cache.layers, tensors["counts"], strict=True):
        # The search for the best range of "entropy" takes too long to be repeated at each reading.
        largest = (
            entry.max
            if method.name == "entropy"
            else method.amax(Histogram(counts, entry.exponent, entry.max))
        )
        agrees = math.isclose(entry.amax, largest, rel_tol=1e-6) or (
            method.name == "entropy" and entry.amax <= largest
        )
        if not agrees:
            raise WanlabError(
                f"calibration cache {path}: the range of {entry.layer} is {entry.amax:g}, its histogram gives {largest:g};"
                f" it was changed; {MEND}"
            )
    calibration = Calibration(
        identity=Identity(**cache.facts | {"layers": layer_set_key(cache.facts["layers"])}),
        amax={entry.layer: entry.amax for entry in cache.layers},
        histograms={
            entry.layer: Histogram(counts, entry.exponent, entry.max)
            for entry, counts in zip(cache.layers, tensors["counts"], strict=True)
        },
        calls=cache.calls,
        call_amax={
            layer: tuple(values) for layer, values in zip(names, tensors["call_amax"].tolist(), strict=True)
        },
        cached=True,
    )
    return calibration, cache


@dataclass(frozen=True)
class Identity:
    """What a calibration depends on.

    Attributes:
        model, component: names.
        weights: hash of the component's weights.
        data: hash of the recorded calls.
        layers: hash of the set of layers.
        method: name and parameters of the method.
        elements: largest number of values of a tensor that were counted, about.
        version: version of wanlab.
    """

    model: str
    component: str
    weights: str
    data: str
    layers: str
    method: dict[str, Any]
    elements: int
    version: str

    @property
    def key(self) -> str:
        """Hash of all fields."""
        return key_of(vars(self))

    def facts(self, layers: Sequence[str]) -> dict[str, Any]:
        """All fields, with the names of the layers instead of their hash."""
        return vars(self) | {"layers": list(layers)}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges of the inputs of a component's layers.

    Attributes:
        identity: what it depends on.
        amax: layer -> largest magnitude that codes should reach, by the method.
        histograms: layer -> histogram of the magnitudes of its input over all calls.
        calls: example, step, timestep, sigma and branch of every call, in order.
        call_amax: layer -> largest magnitude in each of them.
        time_ms: time of the pass over the calls, or of reading the cache.
        cached: whether it was read from a cache.
    """

    identity: Identity
    amax: dict[str, float]
    histograms: dict[str, Histogram]
    calls: tuple[dict[str, Any], ...]
    call_amax: dict[str, tuple[float, ...]]
    time_ms: float = 0.0
    cached: bool = False

    @property
    def key(self) -> str:
        """Hash of what it depends on, and of its ranges."""
        return key_of([self.identity.key, self.amax])

    @property
    def model(self) -> str:
        return self.identity.model

    @property
    def component(self) -> str:
        return self.identity.component

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.amax)

    def with_method(self, name: str, **parameters: Any) -> Calibration:
        """The same measurements with ranges by another method; see `Method`. Nothing is run again."""
        method = Method(name, **parameters)
        amax = {layer: method.amax(histogram) for layer, histogram in self.histograms.items()}
        return replace(self, identity=replace(self.identity, method=method.to_dict()), amax=amax)

    def frame(self) -> pd.DataFrame:
        """One row per layer.

        Columns: layer, amax (by the method), max (seen), percentile, entropy (by the methods' defaults),
        clipped_percent (of the counted values that lie above amax), values (counted).
        """
        rows = []
        for layer, histogram in self.histograms.items():
            counts = histogram.counts
            total = int(counts.sum())
            inside = min(int(self.amax[layer] / histogram.bin_width) + 1, len(counts))
            rows.append(
                {
                    "layer": layer,
                    "amax": self.amax[layer],
                    "max": histogram.amax,
                    "percentile": Method("percentile").amax(histogram),
                    "entropy": Method("entropy").amax(histogram),
                    "clipped_percent": 100 * int(counts[inside:].sum()) / max(total, 1),
                    "values": total,
                }
            )
        return pd.DataFrame(rows)

    def drift(self) -> pd.DataFrame:
        """Largest magnitude of every layer in every call.

        Columns: layer, example, step, timestep, sigma, branch, amax.
        """
        rows = [
            {"layer": layer, **call, "amax": value}
            for layer, values in self.call_amax.items()
            for call, value in zip(self.calls, values, strict=True)
        ]
        frame = pd.DataFrame(rows)
        return frame.astype({"step": "Int64", "timestep": "Float64", "sigma": "Float64"})


def calibrate(
    model,
    component: str,
    recording: Recording,
    *,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    method: str | Method = "percentile",
    percentile: float = 99.99,
    elements: int = 2**22,
    cache: str | os.PathLike | None = None,
    force: bool = False,
    progress: bool = True,
) -> Calibration:
    """Ranges of the inputs of a component's layers over the calls that were recorded of it.

    The component computes every recorded call once, without rounding, and each layer's input is counted on its device
    as it is computed; only histograms are kept. One pass serves all methods (`Calibration.with_method`).

    Args:
        model: model from `wanlab.models.load`, the component eager.
        component: e.g. `"expert_high"`. Every expert needs its own.
        recording: recording of this model, from `record_inputs`.
        layers, exclude: patterns as in `choose_layers`.
        method: `"max"`, `"percentile"` or `"entropy"`, or a `Method`.
        percentile: percentage of the magnitudes that ranges cover, for that method.
        elements: largest number of values of a tensor to count, about, evenly spread; the largest magnitude is of all.
        cache: a `.json` file, with a `.safetensors` file beside it. It is read where it was made from the same weights,
            data, layers and method, and written where there is none.
        force: measure again and replace the cache.
        progress: show a bar over the calls.

    Raises:
        WanlabError: a cache that was made from something else (the message names it), or is broken; an unknown component,
            layer or method; a component that runs on an engine; nothing recorded of it; inputs that are not finite.
    """
    begin = time.perf_counter()
    method = method if isinstance(method, Method) else Method(method, percentile=percentile)
    network = (
        eager_network(model, component) if component in EXPERTS else component_spec(model, component).network
    )
    chosen = choose_layers(network, layers, exclude)
    calls = recording.of(component)
    if recording.model != model.spec.name:
        raise WanlabError(
            f"{recording.folder} was recorded with {recording.model}, this model is {model.spec.name};"
            " record its own inputs"
        )
    identity = Identity(
        model=model.spec.name,
        component=component,
        weights=weights_key(network),
        data=recording.inputs_key(component),
        layers=layer_set_key(chosen),
        method=method.to_dict(),
        elements=elements,
        version=wanlab.__version__,
    )
    if cache is not None and not force and Path(cache).exists():
        cached, record = read(Path(cache))
        if changed := record.changed(identity.facts(chosen)):
            raise WanlabError(f"calibration cache {cache} does not fit: {changed}; {MEND}")
        return replace(cached, time_ms=(time.perf_counter() - begin) * 1e3)

    observer = _observe(model, component, network, recording, calls, chosen, elements, progress)
    calibration = Calibration(
        identity=identity,
        amax={layer: method.amax(histogram) for layer, histogram in observer.histograms.items()},
        histograms=observer.histograms,
        calls=tuple(
            {
                "example": call.example,
                "step": call.step,
                "timestep": call.timestep,
                "sigma": call.sigma,
                "branch": call.branch,
            }
            for call in calls
        ),
        call_amax={layer: tuple(values) for layer, values in observer.call_amax.items()},
        time_ms=(time.perf_counter() - begin) * 1e3,
    )
    if cache is not None:
        write(Path(cache), calibration)
    return calibration


def calibrate_all(
    model, recording: Recording, folder: str | os.PathLike, **settings: Any
) -> dict[str, Calibration]:
    """Component -> `calibrate` of every component that was recorded, each kept as `<folder>/<component>.json`."""
    return {
        name: calibrate(model, name, recording, cache=Path(folder) / f"{name}.json", **settings)
        for name in recording.components
    }


def read_calibration(path: str | os.PathLike) -> Calibration:
    """A calibration from its cache, whatever it was made from.

    Raises:
        WanlabError: there is none, or it is broken.
    """
    return read(Path(path))[0]


def _observe(
    model,
    component: str,
    network: torch.nn.Module,
    recording: Recording,
    calls: Sequence[RecordedCall],
    layers,
    elements: int,
    progress: bool,
) -> Observer:
    observer = Observer(network, layers, elements=elements)
    bar = tqdm(calls, desc=f"calibrate {component}", unit="call", leave=False, disable=not progress)
    with torch.no_grad(), observer.watching():
        for call in bar:
            if component in EXPERTS:
                output_of(network, recording.arguments(call, network))
            else:
                plan, given = component_spec(model, component), recording.inputs(call)
                device = next(network.parameters()).device
                plan.reference(*[given[name].to(device) for name in plan.inputs])
            observer.end_call()
    return observer
