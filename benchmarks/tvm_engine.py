"""Apache TVM against ONNX Runtime and eager PyTorch: one expert, one graph, the same threads, on the CPU.

    python benchmarks/tvm_engine.py --threads 2 --output data/results/tvm_cpu.json

Calls are taken in turn, forwards and backwards, so that a drift of the machine falls on all engines alike; the two halves
of the eager series are the A/A control. TVM is shown as wanlab builds it (tiled) and as it comes (plain). The
exit status is 1 when an engine's output is farther from PyTorch's than --parity.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PLAIN = "tvm plain"


def main() -> int:
    arguments = parse()
    import pandas as pd
    import torch

    from wanlab import engines, export, measure, models
    from wanlab.core.files import write_json
    from wanlab.engines.parity import differences
    from wanlab.export.clip import ClipShape, default_shape
    from wanlab.export.components import component_spec

    torch.set_num_threads(arguments.threads)
    model = models.load(arguments.model, device="cpu")
    graph = arguments.folder / f"{arguments.component}.onnx"
    export.export(model, arguments.component, graph, dynamic=False)
    builds = {
        "tvm": engines.build_tvm(graph, graph.with_suffix(".tvm-tiled.so"), reuse=False),
        PLAIN: engines.build_tvm(graph, graph.with_suffix(".tvm-plain.so"), schedule="plain", reuse=False),
    }
    opened = {"onnxruntime": engines.OrtEngine(graph, provider="cpu", threads=arguments.threads)}
    opened |= {
        name: engines.TvmEngine(build.path, graph=graph, threads=arguments.threads)
        for name, build in builds.items()
    }
    plan = component_spec(model, arguments.component)
    shape: ClipShape = default_shape(model, batch=1)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(arguments.seed))
    feeds = dict(zip(plan.inputs, inputs, strict=True))

    @torch.no_grad()
    def eager():
        return plan.reference(*inputs)

    expected = eager()
    outputs = {name: engine.run(feeds)[plan.output] for name, engine in opened.items()}
    parity = pd.DataFrame(
        [
            {"engine": name, "against": label} | differences(reference, made)
            for name, made in outputs.items()
            for label, reference in (("eager", expected), ("onnxruntime", outputs["onnxruntime"]))
            if name != label
        ]
    )

    calls = {name: (lambda engine=engine: engine.run(feeds)) for name, engine in opened.items()}
    plain = calls.pop(PLAIN)
    samples, control = measure.interleaved(
        {"eager": eager} | calls, rounds=arguments.rounds // 2, device="cpu"
    )
    samples[PLAIN] = measure.time_ms(plain, iterations=arguments.plain_rounds, device="cpu", label=PLAIN)
    both = samples.pop("eager")
    gains = [measure.compare(both, one, control.noise_percent) for one in samples.values()]
    gains += [
        measure.compare(samples["onnxruntime"], samples[name], control.noise_percent) for name in builds
    ]

    pd.set_option("display.width", 170, "display.max_columns", 30, "display.float_format", "{:,.3g}".format)
    table = pd.DataFrame([one.row() for one in (both, *samples.values())])
    print(table[["label", "n", "median_ms", "min_ms", "p90_ms", "cv_percent"]].to_string(index=False))
    print("\n" + parity[["engine", "against", "max_abs", "relative_l2", "cosine"]].to_string(index=False))
    rows = pd.DataFrame([{"build": name} | build.row() for name, build in builds.items()])
    columns = ["build", "target", "kernels", "import_ms", "compile_ms", "link_ms", "build_ms", "size_bytes"]
    print("\n" + rows[columns].to_string(index=False))
    print(f"\nA/A control of eager: {control.ratio:.3f}x, noise {control.noise_percent:.1f} %")
    print(*gains, sep="\n")

    passed = bool((parity["relative_l2"] <= arguments.parity).all())
    record = {
        "model": arguments.model,
        "component": arguments.component,
        "shape": {"batch": 1, "height": shape.height, "width": shape.width, "frames": shape.frames},
        "seed": arguments.seed,
        "dtype": "float32",
        "threads": arguments.threads,
        "builds": rows,
        "parity": parity,
        "noise_percent": control.noise_percent,
        "control": control.row(),
        "samples": {name: one.to_dict() for name, one in ({"eager": both} | samples).items()},
        "comparisons": [gain.row() for gain in gains],
        "load_ms": {name: engine.load_ms for name, engine in opened.items()},
        "environment": measure.environment("cpu"),
        "passed": passed,
    }
    write_json(arguments.output, record)
    print(
        f"{'passed' if passed else 'FAILED'}: wanted relative L2 <= {arguments.parity:g}; {arguments.output}"
    )
    return 0 if passed else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--folder", type=Path, default=Path("outputs/tvm"), help="graph and libraries")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each engine, two at a time")
    parser.add_argument(
        "--plain-rounds", type=int, default=5, help="calls of TVM's own loop nests, which are slow"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parity", type=float, default=1e-5, help="greatest relative L2 that passes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/tvm_engine.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
