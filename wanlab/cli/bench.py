"""`wanlab bench`: times any engine and prints the figures that trtexec prints."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wanlab import measure, models
from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError
from wanlab.core.limits import check_seed
from wanlab.core.paths import default_outputs
from wanlab.core.stats import interval_text
from wanlab.engines.base import Engine
from wanlab.engines.registry import (
    EAGER,
    ENGINES,
    EngineKind,
    engine_kind,
    open_component,
    open_engine,
    suffixes,
)
from wanlab.export.components import component_spec, default_shape, random_feeds

HELP = """Time an engine or ONNX file, or a component of a model in PyTorch, as trtexec does: host and device latency,
throughput, and the noise of the measurement against itself."""
SIZES = ("batch", "height", "width", "frames", "text_tokens")
UNITS = {"batch": "clips", "height": "pixels", "width": "pixels", "frames": "frames", "text_tokens": "tokens"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", help=f"a file ({', '.join(suffixes())}), or a model with --component")
    add("--component", help="component of the model: expert_high, vae_decoder, ...")
    add("--engine", default=EAGER, help=f"engine of the component: {', '.join(ENGINES)}")
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder of graphs and built files (default: the project's outputs/)",
    )
    add("--weights", default="pretrained", choices=("pretrained", "random"), help="weights of the model")
    add("--dtype", default="auto", help="dtype of the model: auto, float32, bfloat16, float16")
    add("--device", default="auto", help="device of the model: auto, cpu, cuda")
    add("--provider", help="provider of ONNX Runtime: auto, cpu, cuda")
    add("--threads", type=int, help="CPU threads of ONNX Runtime and TVM")
    add("--optimization", help="optimization of ONNX Runtime: disabled, basic, extended, all (default all)")
    for name in SIZES:
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar=UNITS[name].upper(),
            help=f"size in {UNITS[name]}",
        )
    add(
        "--shape",
        "--shapes",
        action="append",
        default=[],
        metavar="NAME=1x3x224x224",
        help="shape of an input of a file, several separated by commas; NAME:1x3x224x224 is read too (default: the size of"
        " the export; of other graphs 1 for every free axis)",
    )
    add("--iterations", type=int, default=10, help="smallest number of iterations (default 10)")
    add("--duration-s", type=float, default=3.0, help="shortest duration in seconds (default 3)")
    add(
        "--warmup-ms",
        type=float,
        default=200.0,
        help="milliseconds of warm-up before the first sample (default 200)",
    )
    add("--no-transfers", action="store_true", help="do not copy between host and device")
    add("--cuda-graph", action="store_true", help="capture the engine once and replay it")
    add("--buffers", default="auto", help="buffers on a GPU: auto, pycuda, torch")
    add(
        "--check-events", action="store_true", help="on a GPU: compare the device time with events of PyTorch"
    )
    add("--seed", type=int, default=0, help="seed of the inputs")
    add("--json", type=Path, metavar="FILE", help="file for all samples")
    add("--baseline", type=Path, metavar="FILE", help="file of an earlier --json to compare with")


def main(options: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status 0."""
    check_seed(options.seed)
    baseline = measure.read_bench(options.baseline) if options.baseline else None
    engine, feeds = _engine(options)
    result = measure.bench(
        engine,
        feeds,
        warmup_ms=options.warmup_ms,
        duration_ms=options.duration_s * 1e3,
        iterations=options.iterations,
        transfers=not options.no_transfers,
        cuda_graph=options.cuda_graph,
        buffers=options.buffers,
    )
    show(report(result))
    if options.check_events:
        result = replace(result, events_ratio=measure.events_check(engine, feeds, result))
        show(f"PyTorch's events over device time: {result.events_ratio:.4f}")
    if options.json:
        show(str(result.save(options.json)))
    if baseline is not None:
        gain = measure.bench_table([baseline, result]).iloc[-1]
        show(
            f"against {baseline.engine}: {gain['speedup']:.2f}x ({interval_text(gain['low'], gain['high'])},"
            f" noise {gain['noise_percent']:.1f} %), {gain['verdict']}"
        )
    return 0


def report(result: measure.Bench) -> str:
    """The table, totals and warnings of one benchmark, as text."""
    frame = result.frame()
    columns = ["min_ms", "max_ms", "mean_ms", "median_ms", "p90_ms", "p95_ms", "p99_ms", "cv_percent"]
    shown = frame.set_index("measure")[columns].map(_number)
    main = result.main
    settings = result.settings
    lines = [
        f"{result.engine}: {_name(result)}",
        ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in result.inputs.items()),
        f"A/A noise of {main.label}: {result.control.noise_percent:.2f} % (measured against itself)",
        shown.rename_axis(None).to_string(),
        f"throughput {result.throughput_per_s:.4g} per s, {main.n} iterations, total host wall time"
        f" {result.wall_ms / 1e3:.3f} s, total {main.label} time {result.device_total_ms / 1e3:.3f} s",
    ]
    if "device" in result.samples:
        lines.append(
            f"CUDA graph {'on' if settings['cuda_graph'] else 'off'}, transfers"
            f" {'in' if settings['transfers'] else 'left out'}, buffers of {settings['buffers']}"
        )
    lines += [f"warning: {row['hazard']}; {row['mitigation']}" for row in result.warnings()]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:,.4g}"


def _name(result: measure.Bench) -> str:
    facts = result.metadata
    return (
        f"{facts['component']} of {facts['model']}"
        if {"component", "model"} <= set(facts)
        else "a graph without wanlab's metadata"
    )


def _engine(options: argparse.Namespace) -> tuple[Engine, dict[str, torch.Tensor]]:
    """The engine and its inputs."""
    sizes = {name: getattr(options, name) for name in SIZES}
    path, files = Path(options.what), suffixes()
    suffix, shapes = path.suffix.lower(), read_shapes(options.shape)
    if suffix in files:
        if options.component:
            raise WanlabError(f"{path} is one component already; leave --component out")
        engine = open_engine(path, **_settings(options, files[suffix]))
        return engine, random_feeds(engine, seed=options.seed, shapes=shapes, **sizes)
    if shapes:
        raise WanlabError(
            "--shape is for files; give a component --height, --width, --frames, --text-tokens, --batch"
        )
    kind, spec = engine_kind(options.engine), models.get(options.what)
    if not options.component:
        raise WanlabError(f"{spec.name} is a model; give --component, one of {', '.join(spec.components)}")
    spec.part_of(options.component)
    kind.check(options.component)
    model = models.load(
        spec,
        weights=options.weights,
        dtype=options.dtype,
        device=options.device,
        components=[options.component],
    )
    folder = options.folder or default_outputs() / "onnx-fixed" / spec.name
    engine = open_component(
        kind.name, model, options.component, folder, size=sizes, **_settings(options, kind)
    )
    plan = component_spec(model, options.component)
    shape = default_shape(model, **sizes | {"batch": sizes["batch"] or 1})
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(options.seed))
    return engine, dict(zip(plan.inputs, inputs, strict=True))


def read_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Input -> shape, from `["a=1x3x224x224,b=2"]`; as trtexec writes them also `a:1x3x224x224`.

    Raises:
        WanlabError: a text of another form.
    """
    shapes = {}
    for text in filter(None, (part.strip() for given in texts for part in given.split(","))):
        match = re.fullmatch(r"(.+)[=:](\d+(?:[xX*]\d+)*|scalar)", text)
        if match is None:
            raise WanlabError(f"--shape {text!r} cannot be read; give NAME=1x3x224x224")
        shapes[match[1]] = tuple(int(size) for size in re.findall(r"\d+", match[2]))
    return shapes


def _settings(options: argparse.Namespace, kind: EngineKind) -> dict[str, Any]:
    """The options of this engine that were given."""
    given = {name: getattr(options, name, None) for name in kind.open_settings}
    return {name: value for name, value in given.items() if value not in (None, False)}


COMMANDS = {"bench": Command(HELP, add_arguments, main)}
