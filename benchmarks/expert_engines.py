"""One expert on every engine this machine has, in turn: eager, compiled, ONNX Runtime, CUDA graphs, 8- and 4-bit graphs.

    python benchmarks/expert_engines.py --output data/results/expert_engines_cpu.json
    python benchmarks/expert_engines.py --device cuda --dtypes float32 float16 bfloat16 --rounds 25 --output h200.json

Inputs and outputs stay on the device. All engines of a dtype are timed against each other, so that a drift of the machine
falls on all of them alike; ratios are against eager. A graph that an engine refuses is a row with the reason. On a GPU
each call is profiled once and its kernels are kept: a Q/DQ graph computes in codes only where such a kernel is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from profiled import longest, profiled

OPSET = 23
"""The first with attention and RMS norm as operators."""
KERNELS_KEPT = 12


def main() -> int:
    arguments = parse()
    import pandas as pd
    import torch

    from wanlab import measure, models
    from wanlab.core.files import write_json

    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    rows = []
    for dtype in arguments.dtypes:
        model = models.load(arguments.model, device=arguments.device, dtype=dtype)
        with tempfile.TemporaryDirectory(prefix="wanlab-engines-") as folder:
            found = measured(arguments, model, dtype, Path(folder))
        rows += found
        shown = ["engine", "time_ms", "speedup", "verdict", "relative_l2", "nodes", "failed"]
        print(f"{dtype}\n{pd.DataFrame(found).reindex(columns=shown).to_string(index=False)}", flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    record = {"settings": settings, "environment": measure.environment(arguments.device), "engines": rows}
    write_json(arguments.output, record)
    print(arguments.output)
    return 0


def measured(arguments, model, dtype: str, folder: Path) -> list[dict]:
    """A row per engine: its time against eager, its distance from it, where its nodes ran, what multiplied."""
    import torch

    from wanlab import measure
    from wanlab.core.errors import WanlabError
    from wanlab.engines.parity import differences
    from wanlab.export.clip import default_shape
    from wanlab.export.components import component_spec
    from wanlab.measure import timing

    plan = component_spec(model, arguments.component)
    shape = default_shape(model, batch=1)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    rows: dict[str, dict] = {}
    calls, opened = {}, []  # an engine lives as long as its calls
    with torch.no_grad():
        expected = plan.reference(*inputs)
    for name, build in builders(arguments, model, folder).items():
        try:
            engine, facts = build()
            opened.append(engine)
            output = torch.empty_like(expected)
            graph = {"cuda_graph": True} if name.endswith("CUDA graph") else {}
            call = engine.bind(feeds, {plan.output: output}, **graph)
            call()
            timing.synchronise(arguments.device)
            off = differences(expected, output)["relative_l2"]
        except WanlabError as error:
            rows[name] = {"dtype": dtype, "engine": name, "failed": str(error)}
            continue
        calls[name] = call
        rows[name] = {
            "dtype": dtype,
            "engine": name,
            "size_bytes": engine.size_bytes,
            "relative_l2": off,
        } | facts
    samples, control = measure.interleaved(calls, warmup=5, rounds=arguments.rounds, device=arguments.device)
    base = next(iter(samples.values()))
    for name, mine in samples.items():
        gain = {} if mine is base else measure.compare(base, mine, control.noise_percent).row()
        rows[name] |= {
            "time_ms": mine.median,
            "noise_percent": control.noise_percent,
            "samples": mine.to_dict(),
        }
        rows[name] |= {key: gain[key] for key in ("speedup", "low", "high", "verdict") if key in gain}
        on_gpu = arguments.device.startswith("cuda")
        rows[name]["kernels"] = longest(profiled(calls[name]), KERNELS_KEPT) if on_gpu else []
    return list(rows.values())


def builders(arguments, model, folder: Path) -> dict:
    """Name -> a call that makes the engine and says what is known of it; eager first."""
    from wanlab import engines, export, precision
    from wanlab.precision.plan import LINEAR

    on_gpu = arguments.device.startswith("cuda")
    provider = "cuda" if on_gpu else "cpu"
    component = arguments.component
    float_graph = folder / "float.onnx"

    def torch_engine(mode: str):
        return lambda: (engines.TorchEngine(model, component, mode=mode), {})

    def float_engine(**options):
        def build():
            if not float_graph.is_file():
                export.export(model, component, float_graph, opset=OPSET, dynamic=False)
            return opened(float_graph, **options)

        return build

    def opened(path: Path, **options):
        engine = engines.OrtEngine(path, provider=provider, **options)
        counts = engine.nodes_by_provider().groupby("provider")["nodes"].sum().to_dict()
        return engine, {"nodes": counts}

    made = {mode: torch_engine(mode) for mode in ("eager", "compiled")} | {"onnxruntime": float_engine()}
    if on_gpu:
        made |= {f"{mode}, CUDA graph": torch_engine(mode) for mode in ("eager", "compiled")}
        made["onnxruntime, CUDA graph"] = float_engine(cuda_graph=True)
    recording = precision.record_inputs(
        model, precision.nano_examples(2), folder / "recording", steps=4, progress=False
    )
    ranges = {
        name: precision.calibrate(model, name, recording, layers=LINEAR) for name in recording.components
    }

    def planned(plan: str, **options):
        def build():
            graphs = precision.export_plan(model, plan, folder / plan, ranges, opset=OPSET, progress=False)
            path = graphs.folder / graphs.graphs_of(component)[0]
            assignment = precision.assign(graphs.plan, {component: model.component(component)})
            effect = precision.graph_effect_check(assignment, component, path)
            engine, facts = opened(path, **options)
            return engine, facts | {"effect": effect.verdict}

        return build

    for plan in arguments.plans:
        made[f"onnxruntime, {plan}"] = planned(plan)
        if on_gpu:
            made[f"onnxruntime, {plan}, CUDA graph"] = planned(plan, cuda_graph=True)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument(
        "--plans",
        nargs="*",
        default=["uniform-int8", "uniform-fp8", "uniform-int8-weight", "blocks-int4-weight"],
    )
    parser.add_argument("--rounds", type=int, default=10, help="each gives two samples an engine")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
