"""Ranges of layers' inputs, measured on recorded calls of a component."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.components import recipe
from wanlab.convert.onnx.identity import weights_key
from wanlab.errors import WanlabError
from wanlab.precision.calibrations import cache as caches
from wanlab.precision.calibrations.methods import Method
from wanlab.precision.calibrations.observers import Histogram, Observer
from wanlab.precision.layers import choose_layers, layer_set_key

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.calibrations.recording import RecordedCall, Recording


@dataclass(frozen=True)
class Identity:
    """What a calibration is true for.

    Attributes:
        model, component: names.
        weights: hash of the component's weights.
        data: hash of the recorded calls.
        layers: hash of the set of layers.
        method: name and parameters of the method.
        elements: at most about this many values of a tensor were counted.
        version: of wanlab.
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
        """Hash of all of it."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges of the inputs of a component's layers.

    Attributes:
        identity: what it is true for.
        amax: layer -> largest magnitude that codes should reach, by the method.
        histograms: layer -> histogram of the magnitudes of its input over all calls.
        calls: example, step, timestep, sigma and branch of every call, in order.
        call_amax: layer -> largest magnitude in each of them.
        time_ms: of the pass over the calls, or of reading the cache.
        cached: read from a cache.
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
        return self.identity.key

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
        import pandas as pd

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
        import pandas as pd

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

    The component computes every recorded call once, as it is, and each layer's input is counted on its device while
    it passes; nothing but histograms is kept. One pass serves all methods (`Calibration.with_method`).

    Args:
        model: from `wanlab.models.load`, the component eager.
        component: e.g. `"expert_high"`. Every expert needs its own.
        recording: from `record_inputs`; of this model.
        layers, exclude: patterns as in `choose_layers`.
        method: `"max"`, `"percentile"` or `"entropy"`, or a `Method`.
        percentile: of the magnitudes that ranges cover, with that method.
        elements: count at most about this many values of a tensor, evenly spread; the largest is of all.
        cache: a `.json` file, with a `.safetensors` file beside it. Read when it is true for the same weights, data,
            layers and method; written when there is none.
        force: measure again and replace the cache.
        progress: show a bar over the calls.

    Raises:
        WanlabError: a cache that is true for something else (says what), or broken; an unknown component, layer or
            method; a component that runs on an engine; nothing recorded of it; inputs that are not finite.
    """
    begin = time.perf_counter()
    method = method if isinstance(method, Method) else Method(method, percentile=percentile)
    plan = recipe(model, component)
    chosen = choose_layers(plan.network, layers, exclude)
    calls = recording.of(component)
    if recording.model != model.spec.name:
        raise WanlabError(
            f"{recording.folder} was recorded with {recording.model}, this model is {model.spec.name};"
            " record its own inputs"
        )
    identity = Identity(
        model=model.spec.name,
        component=component,
        weights=weights_key(plan.network),
        data=recording.key(component),
        layers=layer_set_key(chosen),
        method=method.to_dict(),
        elements=elements,
        version=_version(),
    )
    if cache is not None and not force and Path(cache).exists():
        found = caches.read(Path(cache))
        caches.check(Path(cache), found, identity, chosen)
        return replace(found, cached=True, time_ms=(time.perf_counter() - begin) * 1e3)

    observer = _observe(plan, recording, calls, chosen, elements, progress)
    made = Calibration(
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
        caches.write(Path(cache), made)
    return made


def read_calibration(path: str | os.PathLike) -> Calibration:
    """A calibration from its cache, whatever it is true for.

    Raises:
        WanlabError: there is none, or it is broken.
    """
    return replace(caches.read(Path(path)), cached=True)


def _observe(
    plan, recording: Recording, calls: Sequence[RecordedCall], layers, elements: int, progress: bool
) -> Observer:
    import torch
    from tqdm.auto import tqdm

    parameter = next(plan.network.parameters())
    observer = Observer(plan.network, layers, elements=elements)
    bar = tqdm(calls, desc=f"calibrate {plan.component}", unit="call", leave=False, disable=not progress)
    with torch.no_grad(), observer.watching():
        for call in bar:
            given = recording.inputs(call)
            plan.reference(*[given[name].to(parameter.device) for name in plan.inputs])
            observer.end_call()
    return observer


def _version() -> str:
    from wanlab import __version__

    return __version__
