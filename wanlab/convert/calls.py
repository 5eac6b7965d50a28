"""One component in every engine that can be had for it, as calls that can be timed side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.clip import default_shape
from wanlab.convert.compare import differences
from wanlab.convert.components import components_of, recipe
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import torch

ENGINES = ("eager", "onnxruntime", "tvm")
SMALL_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class EngineCalls:
    """Calls of one component on the same inputs.

    Attributes:
        component: wanlab's name of it. size: height, width and frames of the clip. precision: of eager's weights.
        calls: engine name (`"eager"`, `"onnxruntime-cpu"`, `"tvm-llvm"`) -> one forward on inputs that are in place.
        facts: engine name -> load_ms, size_bytes, build_ms (None where there is nothing to build) and relative_l2,
            the distance of its output from eager's.
        left_out: engine -> why there is no call of it, one line each.
    """

    component: str
    size: dict[str, int]
    precision: str
    calls: dict[str, Callable[[], object]]
    facts: dict[str, dict[str, float | None]]
    left_out: dict[str, str]


def engine_calls(
    model,
    component: str | None,
    folder: str | os.PathLike,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    **size: int | None,
) -> EngineCalls:
    """Export and build one component at one size, batch 1, and check every engine against eager.

    An engine that cannot be had here is left out with its reason; eager is always first.

    Args:
        model: from `wanlab.models.load`, all components eager.
        component: wanlab's name of it; None takes the first expert.
        folder: where graphs and libraries are kept and, while true, reused.
        engines: of `"eager"`, `"onnxruntime"`, `"tvm"`; None takes all where the weights are under 1 GiB, and else
            eager, as the export of a large network is a work of its own.
        threads: on the CPU, of all of them; None takes `torch.get_num_threads()`.
        seed: of the inputs.
        size: height, width, frames, text_tokens; the model's defaults where not given.

    Raises:
        WanlabError: an unknown engine or component, or a size that is not legal.
    """
    import torch

    component = component or next(name for name in components_of(model) if name.startswith("expert"))
    for engine in engines or ():
        if engine not in ENGINES:
            raise WanlabError(
                f"unknown engine {engine!r}{did_you_mean(engine, ENGINES)}; give {', '.join(ENGINES)}"
            )
    plan = recipe(model, component)
    shape = default_shape(model, batch=1, **size)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def eager() -> torch.Tensor:
        return plan.reference(*inputs)

    expected, weights = eager(), sum(parameter.nbytes for parameter in plan.network.parameters())
    calls: dict[str, Callable[[], object]] = {"eager": eager}
    facts: dict[str, dict[str, Any]] = {"eager": _facts(None, weights, None, 0.0)}
    left_out: dict[str, str] = {}
    if engines is None and weights > SMALL_BYTES:
        why = f"{component} has {weights / 2**30:.1f} GiB of weights: name it in `engines` to export and build it"
        left_out = {engine: why for engine in ENGINES if engine != "eager"}
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    for kind in (engine for engine in engines or ENGINES if engine != "eager" and engine not in left_out):
        try:
            name, engine, build_ms = _open(kind, model, component, Path(folder), threads, size)
            made = engine.run(feeds)[plan.output]
        except WanlabError as error:
            left_out[kind] = str(error)
            continue
        calls[name] = lambda engine=engine: engine.run(feeds)
        apart = differences(expected, made)["relative_l2"]
        facts[name] = _facts(engine.load_ms, engine.size_bytes, build_ms, apart)
    clip = {"height": shape.height, "width": shape.width, "frames": shape.frames}
    precision = str(plan.network.dtype).removeprefix("torch.")
    return EngineCalls(component, clip, precision, calls, facts, left_out)


def _open(kind: str, model, component: str, folder: Path, threads: int | None, size: dict):
    from wanlab.convert.onnx.export import export
    from wanlab.convert.ort import OrtEngine

    on_gpu = model.device.type == "cuda"
    graph = export(model, component, folder / f"{component}.onnx", dynamic=False, **size)
    if kind == "onnxruntime":
        provider = "cuda" if on_gpu else "cpu"
        return f"onnxruntime-{provider}", OrtEngine(graph.path, provider=provider, threads=threads), None
    from wanlab.convert.tvm.build import build_tvm
    from wanlab.convert.tvm.engine import TvmEngine

    built = build_tvm(graph.path, target="cuda" if on_gpu else "cpu")
    engine = TvmEngine(built.path, graph=graph.path, threads=threads)
    return engine.name, engine, built.build_ms


def _facts(load_ms, size_bytes, build_ms, relative_l2) -> dict[str, float | None]:
    return {
        "load_ms": load_ms,
        "size_bytes": size_bytes,
        "build_ms": build_ms,
        "relative_l2": relative_l2,
    }
