"""A trace of a million events: parsed, broken down and folded into flame graphs by wanlab, and read by HTA beside it.

    python benchmarks/trace_reading.py --events 1000000 --hta-python .venv-hta/bin/python

Every reader gets a process of its own, so that its peak memory (resident) is its own. The trace is synthetic, in
the shape PyTorch writes: steps, ranges, operators with their shapes, launches, kernels linked by correlation id. HTA
(`pip install HolisticTraceAnalysis`, in an environment of its own) parses it and makes its kernel breakdown, wanlab
parses it and makes the breakdown and both flame graphs; the ratio compares parsing with kernel times, which both do.
The exit status is 1 when wanlab takes longer than --seconds or more than --gib.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

READERS = {
    "wanlab, kernel times": """
from wanlab import diagnose
trace = diagnose.read_trace(path)
trace.kernels.groupby("name", observed=True)["time_us"].sum()
""",
    "wanlab, everything": """
from wanlab import diagnose
trace = diagnose.read_trace(path)
diagnose.breakdown(trace), diagnose.gpu_flame(trace), diagnose.cpu_flame(trace)
""",
    "HTA, kernel breakdown": """
from hta.trace_analysis import TraceAnalysis
analysis = TraceAnalysis(trace_files={0: path})
analysis.get_gpu_kernel_breakdown(visualize=False)
""",
}
FRAME = """
import json, resource, sys, time
path = sys.argv[1]
begin = time.perf_counter()
{body}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}}))
"""


OPERATORS = ("aten::addmm", "aten::mul", "aten::add", "aten::native_layer_norm", "aten::copy_", "aten::cat", "aten::gelu",
             "aten::scaled_dot_product_attention")  # fmt: skip
SHAPES = {
    "Input Dims": [[5120], [3600, 5120], [5120, 5120], [], []],
    "Input type": ["c10::BFloat16", "c10::BFloat16", "c10::BFloat16", "Scalar", "Scalar"],
    "Input Strides": [[1], [5120, 1], [1, 5120], [], []],
    "Concrete Inputs": ["", "", "", "1", "1"],
}


def main() -> int:
    arguments = parse()
    from wanlab import measure
    from wanlab.core.files import write_json

    pythons = {name: sys.executable for name in READERS if name.startswith("wanlab")}
    if arguments.hta_python:
        pythons["HTA, kernel breakdown"] = str(arguments.hta_python)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "million.pt.trace.json.gz"
        count = write_trace(path, arguments.events)
        print(f"{count:,} events, {path.stat().st_size / 1e6:.0f} MB compressed")
        rows: dict[str, list[dict]] = {name: [] for name in pythons}
        for _ in range(arguments.rounds):
            for name, python in pythons.items():
                rows[name].append(read(python, READERS[name], path))
                last = rows[name][-1]
                print(f"{name:28} {last['seconds']:6.2f} s {last['peak_gib']:5.2f} GiB", flush=True)
    best = {name: min(row["seconds"] for row in taken) for name, taken in rows.items()}
    if "HTA, kernel breakdown" in best:
        ratio = best["HTA, kernel breakdown"] / best["wanlab, kernel times"]
        print(f"parsing and kernel times: {ratio:.1f}x as fast as HTA")
    all_of_it = rows["wanlab, everything"]
    passed = min(row["seconds"] for row in all_of_it) <= arguments.seconds and (
        max(row["peak_gib"] for row in all_of_it) <= arguments.gib
    )
    settings = {key: value for key, value in vars(arguments).items() if key not in ("hta_python", "output")}
    record = {"settings": settings, "events": count, "readers": rows, "passed": passed}
    write_json(arguments.output, record | {"environment": measure.environment("cpu")})
    wanted = f"wanted <= {arguments.seconds:g} s and <= {arguments.gib:g} GiB"
    print(f"{'passed' if passed else 'FAILED'}: {wanted}; {arguments.output}")
    return 0 if passed else 1


def read(python: str, body: str, path: Path) -> dict:
    done = subprocess.run(
        [python, "-c", FRAME.format(body=body), str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_trace(path: Path, events: int, seed: int = 0) -> int:
    """Steps of 40 blocks of 12 modules; each operator launches a kernel. Returns the number of events."""
    draw, made, now, gpu, correlation, step = random.Random(seed), [], 0.0, 0.0, 0, 0

    def event(category: str, name: str, start: float, time: float, **args) -> None:
        on_gpu = category == "kernel"
        made.append(
            {"ph": "X", "cat": category, "name": name, "pid": 0 if on_gpu else 1, "tid": 7 if on_gpu else 2,
             "ts": round(start, 3), "dur": round(time, 3), "args": args}
        )  # fmt: skip

    while len(made) < events:
        step_at = now
        for block in range(40):
            block_at = now
            for module in range(12):
                module_at = now
                for operator in range(8):
                    at, correlation = now, correlation + 1
                    long = draw.uniform(5, 200)
                    link = {"External id": correlation, "correlation": correlation}
                    event("cpu_op", OPERATORS[operator], at, 9.0, **{"External id": correlation} | SHAPES)
                    event("cuda_runtime", "cudaLaunchKernel", at + 3, 4.0, cbid=211, **link)
                    gpu = max(gpu, at + 10)
                    place = {
                        "device": 0,
                        "context": 1,
                        "stream": 7,
                        "grid": [128, 1, 1],
                        "block": [256, 1, 1],
                    }
                    event(
                        "kernel", f"kernel_{(operator * 7 + module) % 60}<float>", gpu, long, **link, **place
                    )
                    gpu, now = gpu + long, now + 10
                event(
                    "user_annotation",
                    f"expert_low.blocks.{block}.module_{module}",
                    module_at,
                    now - module_at,
                )
            event("user_annotation", f"expert_low.blocks.{block}", block_at, now - block_at)
        event("user_annotation", f"ProfilerStep#{step}", step_at, now - step_at)
        step += 1
    content = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "synthetic", "totalGlobalMem": 1 << 37, "numSms": 132}],
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 1},
        "traceEvents": made,
    }
    with gzip.open(path, "wt", compresslevel=1) as file:
        json.dump(content, file)
    return len(made)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hta-python", type=Path, help="interpreter of an environment that has HTA")
    parser.add_argument("--seconds", type=float, default=10.0, help="most seconds that pass")
    parser.add_argument("--gib", type=float, default=2.0, help="most GiB that pass")
    parser.add_argument("--output", type=Path, default=Path("data/results/trace_reading_cpu.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
