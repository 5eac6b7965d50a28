"""One component at true size on several engines, each in a process of its own: time, memory, distance, kernels.

    python benchmarks/engines.py --model wan2.2-ti2v-5b --component expert --height 704 --width 1280 --frames 121

Weights are random from one seed, so that every process has the same. Each engine is timed against itself (A/A) after
a warm-up, then profiled once: where its kernels' time goes says what a slower engine loses to. Ratios are against
the first engine named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from profiled import longest, profiled

ENGINES = ("eager", "compiled", "onnxruntime")
LIMIT_S = 600  # of one engine in its process
KERNELS_KEPT = 60


def main() -> int:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return 0
    import pandas as pd
    import torch

    from wanlab import measure
    from wanlab.core.files import write_json
    from wanlab.engines.parity import differences
    from wanlab.measure import Samples, compare

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="wanlab-engines-"))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("worker", "folder", "output")},
        "engines": {},
    }
    record["prepared"] = work("prepare", folder)
    reference = None
    for name in arguments.engines:
        try:
            row = work(name, folder)
        except RuntimeError as error:
            record["engines"][name] = {"failed": str(error)}
            print(f"{name}: {error}", flush=True)
            continue
        output = torch.load(folder / f"{name}.pt", weights_only=True)
        reference = output if reference is None else reference
        row["distance"] = differences(reference, output)
        samples = Samples.from_dict(row["samples"])
        first = record["engines"].setdefault(name, row)
        base = next(iter(record["engines"].values()))
        if first is not base:
            noise = max(base["noise_percent"], row["noise_percent"])
            row["gain"] = compare(Samples.from_dict(base["samples"]), samples, noise).row()
        print(f"{name}: {samples.median:,.1f} ms, {row['peak_gib']:.1f} GiB", flush=True)
    record["environment"] = measure.environment(arguments.device)
    write_json(arguments.output, record)
    rows = [
        {
            "engine": name,
            "median_ms": row["samples"]["median_ms"],
            "noise_percent": row["noise_percent"],
            "speedup": row.get("gain", {}).get("speedup", 1.0),
            "peak_gib": row["peak_gib"],
            "load_ms": row["load_ms"],
            "relative_l2": row["distance"]["relative_l2"],
        }
        for name, row in record["engines"].items()
        if "failed" not in row
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    print(arguments.output)
    return 0 if rows and not any("failed" in row for row in record["engines"].values()) else 1


def work(what: str, folder: Path) -> dict:
    """Run one worker in a fresh process; its last line is its record."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", what, "--folder", str(folder)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what} took more than {LIMIT_S} s") from error
    if done.returncode:
        raise RuntimeError(f"{what} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare(arguments) -> dict:
    """Inputs for all engines, and the graph where one of them needs it."""
    import torch

    from wanlab import export, measure
    from wanlab.export import vae_streamed as vae_export
    from wanlab.export.components import component_spec

    model = load(arguments)
    plan = component_spec(model, arguments.component)
    inputs = plan.inputs_for(shape(arguments), torch.Generator().manual_seed(arguments.seed))
    torch.save({n: t.cpu() for n, t in zip(plan.inputs, inputs, strict=True)}, arguments.folder / "inputs.pt")
    if "onnxruntime" not in arguments.engines:
        return {}
    size = {"height": arguments.height, "width": arguments.width}
    with measure.peak_memory("cpu") as memory:
        if arguments.component.startswith("vae_"):
            reports = vae_export.export_streamed(
                model, arguments.folder, arguments.component, dynamic=False, **size
            )
        else:
            size |= {"frames": arguments.frames, "opset": arguments.opset}
            reports = [export.export(model, arguments.component, graph(arguments), **size)]
    rows = [report.row() | {"operators": report.operators} for report in reports]
    return {"exports": rows, "peak_host_gib": memory.peak_gib}


def torch_engine(arguments, *, compiled: bool) -> dict:
    import torch

    from wanlab.export.components import component_spec

    begin = time.perf_counter()
    model = load(arguments)
    load_ms = (time.perf_counter() - begin) * 1e3
    plan = component_spec(model, arguments.component)
    inputs = torch.load(arguments.folder / "inputs.pt", weights_only=True)
    given = [inputs[name].to(plan.network.device) for name in plan.inputs]
    if compiled:
        # The VAE's chunks differ in their caches: PyTorch's limit would leave its later blocks eager.
        torch._dynamo.config.recompile_limit = 64
        blocks = getattr(plan.network, "blocks", None)
        for part in blocks if blocks is not None else [plan.network.decoder]:
            part.compile()

    @torch.no_grad()
    def run():
        return plan.reference(*given)

    return measured(arguments, run, load_ms, "compiled" if compiled else "eager")


def onnxruntime_engine(arguments) -> dict:
    import torch

    from wanlab import engines
    from wanlab.engines import streamed_vae as vae_engine

    if arguments.component == "vae_decoder":
        engine = vae_engine.open_streamed_decoder(arguments.folder, provider=arguments.provider)
    elif arguments.component == "vae_encoder":
        engine = vae_engine.open_streamed_encoder(arguments.folder, provider=arguments.provider)
    else:
        engine = engines.OrtEngine(graph(arguments), provider=arguments.provider)
    feeds = torch.load(arguments.folder / "inputs.pt", weights_only=True)
    feeds = {name: tensor.to(engine.device) for name, tensor in feeds.items()}
    output = next(iter(engine.outputs))
    return measured(arguments, lambda: engine.run(feeds)[output], engine.load_ms, "onnxruntime")


def measured(arguments, run, load_ms: float, name: str) -> dict:
    import torch

    from wanlab import measure
    from wanlab.measure import timing

    begin = time.perf_counter()
    with measure.peak_memory(arguments.device) as memory:
        result = run()
        timing.synchronise(arguments.device)
        first_ms = (time.perf_counter() - begin) * 1e3
        control = measure.aa_control(
            run,
            warmup=1,
            iterations=arguments.iterations,
            device=arguments.device,
            progress=False,
            label=name,
        )
    torch.save(result.cpu(), arguments.folder / f"{name}.pt")
    both = (*control.first.values_ms, *control.second.values_ms)
    samples = measure.Samples(name, both, control.first.device, control.first.clock)
    return {
        "samples": samples.to_dict(),
        "noise_percent": control.noise_percent,
        "load_ms": load_ms,
        "first_call_ms": first_ms,
        "peak_gib": memory.peak_gib,
        "kernels": longest(profiled(run), KERNELS_KEPT) if arguments.device.startswith("cuda") else [],
    }


WORKERS = {
    "prepare": prepare,
    "eager": lambda arguments: torch_engine(arguments, compiled=False),
    "compiled": lambda arguments: torch_engine(arguments, compiled=True),
    "onnxruntime": onnxruntime_engine,
}


def load(arguments):
    from wanlab import models

    return models.load(
        arguments.model,
        weights=arguments.weights,
        seed=arguments.seed,
        components=[arguments.component],
        device=arguments.device,
        dtype=arguments.dtype,
    )


def shape(arguments):
    from wanlab import export, models

    tokens = models.get(arguments.model).defaults.text_tokens
    return export.ClipShape(1, arguments.height, arguments.width, arguments.frames, tokens)


def graph(arguments) -> Path:
    return arguments.folder / f"{arguments.component}.{arguments.dtype}.onnx"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--weights", default="random", choices=("random", "pretrained"))
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=192, help="pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--provider", default="auto", help="of ONNX Runtime")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--iterations", type=int, default=4, help="samples of each half of the A/A control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="graphs and tensors; a temporary one when left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/engines.json"))
    parser.add_argument("--worker", choices=("prepare", *ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
