"""Cost of a switch of experts: both resident, swapped from the host, or prefetched.

The weights are copied from the host over the same weights on the GPU, byte for byte, so that the
model is the same before, during and after the measurement, also after an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.paths import data, locate
from wanlab.core.text import WRONG
from wanlab.core.words import time_text
from wanlab.measure.environment import environment
from wanlab.measure.timing import Samples, time_ms
from wanlab.models.pipeline import Model
from wanlab.models.shapes import latent_shape
from wanlab.models.weights import check_host_room, host_weights

RECORDED = data("results", "expert_switch_h200.json")
"""A measurement on an NVIDIA H200 with the full-size model, for machines without a GPU."""
WAYS = ("resident", "pageable", "pinned", "prefetched")
WORDS = {
    "resident": "with both experts in GPU memory",
    "pageable": "from ordinary host memory",
    "pinned": "from page-locked host memory",
    "prefetched": "with the weights copied ahead",
}
WAY_NAMES = {
    "resident": "both in GPU memory",
    "pageable": "from ordinary host memory",
    "pinned": "from page-locked host memory",
    "prefetched": "copied ahead",
}
"""Way -> its name in figures and tables."""
HERE = "measured here"
KEPT = ("size_bytes", "lock_ms", "fill_ms", "device", "settings")


@dataclass(frozen=True, eq=False)
class SwitchCost:
    """Cost of a switch in each of four ways; all samples are kept, and the table is computed from them.

    Attributes:
        samples: by name. Forwards of the entering expert after a switch: "after switch", "later", "later again".
            Transfers alone: "pageable", "pageable again", "pinned", "pinned again". Forwards of the leaving expert:
            "alone", "alone again", "beside transfer"; "beside transfer, both" ends when the transfer has ended too,
            and "transfer beside forward" is the transfer in it. Samples with the same index are of one round.
        size_bytes: size of the entering expert's weights.
        lock_ms, fill_ms: time to allocate that much page-locked memory, and to copy the weights to it: part of loading.
        device, settings: device of the measurement; model and sizes.
        source: "measured here", or the name of its file.
        note: reason why there is no measurement, else empty.
    """

    samples: dict[str, Samples] = field(default_factory=dict)
    size_bytes: int = 0
    lock_ms: float | None = None
    fill_ms: float | None = None
    device: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = HERE
    note: str = ""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per measured way.

        Columns: way, experts_on_gpu, transfer_ms and gb_per_s (1e9 bytes; medians), time_ms (delay of the video by a
        switch: median over rounds), noise_ms (largest difference in any round of two equal calls), hidden_percent (share of
        the transfer that overlapped with a forward), slowdown_percent (of the forward beside the transfer).
        """
        return pd.DataFrame([row for way in WAYS if (row := self._row(way))])

    def _row(self, way: str) -> dict[str, Any] | None:
        def values(name: str) -> np.ndarray:
            return np.array(self.samples[name].values_ms) if name in self.samples else np.zeros(0)

        transfer, wait, more = np.zeros(0), np.zeros(0), {}
        if way == "resident":
            equal = values("later"), values("later again")
            wait = values("after switch") - (equal[0] + equal[1]) / 2
        elif way == "prefetched":
            equal, transfer = (values("alone"), values("alone again")), values("transfer beside forward")
            alone = (equal[0] + equal[1]) / 2
            wait = values("beside transfer, both") - alone
            if len(wait):
                hidden = 1 - np.median(wait) / np.median(values("pinned"))
                more["hidden_percent"] = 100 * float(np.clip(hidden, 0, 1))
                more["slowdown_percent"] = 100 * float(np.median(values("beside transfer") / alone) - 1)
        else:
            equal = values(way), values(f"{way} again")
            transfer = wait = (equal[0] + equal[1]) / 2
        if not len(wait):
            return None
        moved = float(np.median(transfer)) if len(transfer) else None
        cost, noise = float(np.median(wait)), float(np.abs(equal[0] - equal[1]).max())
        return {
            "way": way,
            "experts_on_gpu": 1 if way in ("pageable", "pinned") else 2,
            "transfer_ms": moved,
            "gb_per_s": self.size_bytes / moved / 1e6 if moved else None,
            "time_ms": cost,
            "noise_ms": noise,
            "hidden_percent": more.get("hidden_percent", 0.0 if moved else None),
            "slowdown_percent": more.get("slowdown_percent"),
        }

    @property
    def shown(self) -> pd.DataFrame:
        """The table with the names of the ways as figures have them."""
        frame = self.frame
        return frame if frame.empty else frame.assign(way=frame["way"].map(WAY_NAMES))

    @property
    def empty(self) -> bool:
        """Whether nothing was measured; `note` then says why."""
        return self.frame.empty

    @property
    def sentence(self) -> str:
        """The cheapest and the most expensive way, each with its noise, and where they were measured; `note` without any.

        A measurement of another machine says so before its figures.
        """
        if self.frame.empty:
            return self.note
        rows = sorted(self.frame.itertuples(), key=lambda row: row.time_ms)
        ends = " and ".join(dict.fromkeys(_cost(row) for row in (rows[0], rows[-1])))
        if self.measured_here:
            return f"A switch costs {ends} ({self.device}, measured here)"
        model = self.settings.get("model") or "another model"
        return f"On another machine ({self.device}) a switch of {model} costs {ends}"

    @property
    def where(self) -> str:
        """Machine, model and source of the samples: "NVIDIA H200, wan2.2-i2v-a14b: another machine"."""
        model = self.settings.get("model") or "a model that is not recorded"
        return f"{self.device}, {model}: {'measured here' if self.measured_here else 'another machine'}"

    @property
    def measured_here(self) -> bool:
        """Whether the samples were taken in this process, and not read from a record."""
        return self.source == HERE

    def row(self) -> dict[str, Any]:
        """Flat record: switch_<way>_ms, switch_hidden_percent, ..., switch_source; only measured values."""
        flat: dict[str, Any] = {f"switch_{line.way}_ms": line.time_ms for line in self.frame.itertuples()}
        if "switch_prefetched_ms" in flat:
            last = self.frame.iloc[-1]
            flat |= {f"switch_{key}": float(last[key]) for key in ("hidden_percent", "slowdown_percent")}
        known = ("size_bytes", "lock_ms", "device", "source") if flat else ()
        return flat | {f"switch_{key}": getattr(self, key) for key in known}

    def __str__(self) -> str:
        if self.frame.empty:
            return self.note
        rows = self.frame.itertuples()
        parts = [f"{row.time_ms:,.1f} ms {row.way} (noise {row.noise_ms:,.1f})" for row in rows]
        hidden = self.row().get("switch_hidden_percent")
        more = "" if hidden is None else f"; the prefetch hides {hidden:.0f} % of the transfer"
        where = f"{self.settings.get('model', 'model')} on {self.device}, {self.source}"
        lead = "" if self.measured_here else "on another machine "
        return f"{lead}a switch costs {', '.join(parts)}{more} ({where})"

    def save(self, path: str | os.PathLike, **more: Any) -> None:
        """Write as JSON, with further entries such as the environment; `read` reads it back."""
        content = {key: getattr(self, key) for key in KEPT} | more
        content["rows"] = json.loads(self.frame.to_json(orient="records"))
        content["samples"] = {name: samples.to_dict() for name, samples in self.samples.items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike) -> SwitchCost:
        """Read a measurement from a file written by `save`.

        Raises:
            WanlabError: the file is missing or holds something else.
        """
        path = locate(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            samples = {name: Samples.from_dict(entry) for name, entry in data["samples"].items()}
            known = {key: data[key] for key in KEPT}
            return cls(samples=samples, **known, source=f"recorded in {path.name}")
        except (OSError, KeyError, TypeError, AttributeError, *WRONG) as error:
            advice = "12_experts writes one on a GPU, artifacts/switch.json"
            raise WanlabError(f"{path} holds no measured switch ({first_line(error)}); {advice}") from error


def _cost(row: Any) -> str:
    noise = f"noise {time_text(row.noise_ms)}"
    if abs(row.time_ms) <= row.noise_ms:
        return f"nothing that can be told from noise {WORDS[row.way]} ({noise})"
    return f"{time_text(row.time_ms)} {WORDS[row.way]} ({noise})"


def switching(
    model: Model,
    record: str | None = None,
    *,
    samples: int = 3,
    save: str | os.PathLike | None = None,
    **settings,
) -> SwitchCost:
    """The cost of a switch: measured on a machine that can, else from a record of another machine.

    Args:
        record: file of a recorded measurement; None takes the one on an H200 that comes with the source tree.
        samples: number of rounds; 0 uses the record on any machine.
        save: file that a measurement on this machine is written to, to be a `record` elsewhere.
        settings: as for `switch_cost`.

    Raises:
        WanlabError: a named record cannot be read, or an error of `switch_cost` on a GPU.
    """
    if "expert_low" not in model.spec.components:
        return SwitchCost(note=f"{model.spec.name} has one expert: there is nothing to switch")
    if model.device.type == "cuda" and samples:
        cost = switch_cost(model, samples=samples, **settings)
        if save is not None:
            sizes = {name: value for name, value in settings.items() if value is not None}
            cost.settings.update(sizes, weights=model.load.weights)
            cost.save(save, environment=environment(model.device))
        return cost
    if record is not None or RECORDED.is_file():
        return SwitchCost.read(record or RECORDED)
    return SwitchCost(
        note="a switch was not measured: that takes a GPU, and no recorded measurement is at hand"
    )


def switch_cost(
    model: Model,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    samples: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> SwitchCost:
    """Measure a switch from the high-noise to the low-noise expert in four ways, on a GPU that holds both.

    Forwards run on random latents and text of the right shape. A round runs, in this order: the leaving expert alone,
    the entering one three times (the first is the one after the switch), the transfer twice, the leaving expert beside
    a transfer on a separate stream, and the leaving expert alone again. Equal calls of a round are its A/A control.
    Transfers from pageable memory run before, in separate rounds, so that the host holds one copy of the weights at a time.

    Args:
        model: from `wanlab.models.load`, on a GPU; the text encoder and the VAE are not needed.
        height, width, frames: size of the video, in pixels and frames; the model's default if None.
        samples: number of rounds; each runs 6 forwards.
        seed: seed of latents and text.

    Raises:
        WanlabError: a model with one expert, no GPU, an expert that is not a PyTorch module, too little host or GPU memory,
            or a size that is not legal.
    """
    leaving, entering = _both_experts(model)
    if samples < 1:
        raise WanlabError(f"samples is {samples}; take at least 1 round")
    if model.device.type != "cuda":
        raise WanlabError(
            f"{model.spec.name} is on {model.device}: a switch is a transfer to a GPU; load it with device='cuda', or"
            " read a recorded measurement with diagnose.SwitchCost.read"
        )
    size = sum(parameter.nbytes for parameter in entering.parameters())
    check_host_room(model.spec.name, size)
    inputs = expert_inputs(model, height=height, width=width, frames=frames, seed=seed)
    times: dict[str, list[float]] = {}

    def take(name: str, call: Callable) -> None:
        timed = time_ms(call, warmup=0, iterations=1, device=model.device, progress=False)
        times.setdefault(name, []).append(timed.values_ms[0])

    bar = tqdm(total=3 * samples + 1, desc="switches", unit="part", leave=False, disable=not progress)
    try:
        with bar, torch.no_grad(), torch.cuda.device(model.device):
            with host_weights(entering, pinned=False) as host:
                host.refill()
                for _ in range(samples):
                    take("pageable", host.refill)
                    take("pageable again", host.refill)
                    bar.update()
            for expert in (entering, leaving):
                expert(**inputs)
            bar.update()
            with host_weights(entering, pinned=True) as host:
                host.refill()
                for _ in range(samples):
                    take("alone", lambda: leaving(**inputs))
                    for name in ("after switch", "later", "later again"):
                        take(name, lambda: entering(**inputs))
                    bar.update()
                    take("pinned", host.refill)
                    take("pinned again", host.refill)
                    for name, value in _beside(host.refill, lambda: leaving(**inputs)).items():
                        times.setdefault(name, []).append(value)
                    take("alone again", lambda: leaving(**inputs))
                    bar.update()
                lock_ms, fill_ms = host.lock_ms, host.fill_ms
    except torch.OutOfMemoryError as error:
        reason = "a forward does not fit beside both experts; take a smaller video"
        raise WanlabError(f"{model.spec.name} on {model.device}: {reason}") from error
    device = torch.cuda.get_device_name(model.device)
    series = {name: Samples(name, tuple(values), device, "CUDA events") for name, values in times.items()}
    kind = str(model.dtype).removeprefix("torch.")
    settings = {"model": model.spec.name, "dtype": kind, "samples": samples}
    settings |= {key: list(value.shape) for key, value in inputs.items() if hasattr(value, "shape")}
    return SwitchCost(series, size, lock_ms, fill_ms, device, settings)


def _beside(transfer: Callable, forward: Callable) -> dict[str, float]:
    """A forward with a concurrent transfer on a separate stream: the end of each, from the common start."""
    begin, loading, loaded, computed, both = (torch.cuda.Event(enable_timing=True) for _ in range(5))
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    begin.record(main)
    side.wait_event(begin)
    with torch.cuda.stream(side):
        loading.record(side)
        transfer()
        loaded.record(side)
    forward()
    computed.record(main)
    main.wait_stream(side)
    both.record(main)
    torch.cuda.synchronize()
    return {
        "beside transfer": begin.elapsed_time(computed),
        "beside transfer, both": begin.elapsed_time(both),
        "transfer beside forward": loading.elapsed_time(loaded),
    }


def _both_experts(model: Model) -> tuple[torch.nn.Module, torch.nn.Module]:
    if "expert_low" not in model.spec.components:
        raise WanlabError(f"{model.spec.name} has one expert, there is nothing to switch; take one with two")
    pair = model.component("expert_high"), model.component("expert_low")
    if not all(isinstance(part, torch.nn.Module) and any(True for _ in part.parameters()) for part in pair):
        raise WanlabError(f"{model.spec.name}: an expert is an engine that owns its weights; load it eager")
    return pair


def expert_inputs(
    model: Model,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs of an expert as the pipeline passes them, with the right shapes and random content, on the model's device.

    `hidden_states` `[1, C, T, H, W]`, `timestep` `[1]` (`[1, tokens]` for a model that expands it),
    `encoder_hidden_states` `[1, text tokens, D]`.

    Raises:
        WanlabError: a size that is not legal, or an expert that is not a Wan transformer.
    """
    defaults = model.spec.defaults
    latent = latent_shape(
        model.spec, height or defaults.height, width or defaults.width, frames or defaults.frames
    )
    name = next(name for name in model.components if name.startswith("expert"))
    config = model.component(name).config
    if not {"in_channels", "text_dim"} <= set(config):
        raise WanlabError(f"{model.spec.name}: {name} is no Wan transformer; its inputs are not known")
    draw = torch.Generator(model.device).manual_seed(seed)
    options = {"generator": draw, "device": model.device, "dtype": model.dtype}
    return {
        "hidden_states": torch.randn(
            1, config["in_channels"], latent.frames, latent.height, latent.width, **options
        ),
        "timestep": torch.full(
            (1, latent.tokens) if model.spec.expand_timesteps else (1,), 900, device=model.device
        ),
        "encoder_hidden_states": torch.randn(1, defaults.text_tokens, config["text_dim"], **options),
        "return_dict": False,
    }
