"""Reading, comparing and drawing a thousand runs: how long each part takes.

    python benchmarks/comparison_speed.py --runs 1000

The runs are written first, each with the files that `notebooks/41_configuration.ipynb` leaves (run.json with schema and
environment, status.json, metrics.jsonl with a table, results.jsonl with samples), and read with a warm page cache.
Importing is timed apart. Beside the clock stands the processor's time, which is what the parts take where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "41_configuration.ipynb"
GOALS = {"time_per_video_ms": "min", "peak_memory_gib": "min", "quality_loss_percent": "min"}
FIRST = {"engine": "eager", "plan": "plan-0000"}


def write(root: Path, count: int, samples: int) -> None:
    """A sweep of engine x plan with `count` runs."""
    from wanlab.runs import Machine, Quality, Result, Work
    from wanlab.runs.parameters import read_schema

    parameters = read_schema(NOTEBOOK).parameters
    environment = {
        "device": "cpu",
        "gpu": None,
        "cpu": "Any CPU",
        "cores": 1,
        "threads": 1,
        "python": "3.11.7",
    }
    environment["packages"] = {f"package-{i}": "1.2.3" for i in range(24)}
    drawn, runs = random.Random(0), []
    for index in range(count):
        values = {p.name: p.default for p in parameters}
        axes = {"engine": ("eager", "onnxruntime")[index % 2], "plan": f"plan-{index // 2:04d}"}
        schema = [
            {
                "name": p.name,
                "type": p.type_text,
                "help": p.help,
                "default": p.default,
                "value": (values | axes)[p.name],
            }
            for p in parameters
        ]
        median = 100.0 * drawn.uniform(0.3, 1.1)
        times = [median * drawn.gauss(1, 0.02) for _ in range(samples)]
        loss = drawn.uniform(-1, 5)
        result = Result(
            work=Work(
                model="wan-nano",
                weights="pretrained",
                height=64,
                width=64,
                frames=5,
                steps=4,
                guided=True,
                seed=0,
            ),
            engine=axes["engine"],
            plan=axes["plan"],
            samples_ms=tuple(times),
            noise_percent=2.0,
            peak_memory_gib=drawn.uniform(0.8, 2),
            load_ms=drawn.uniform(100, 900),
            weights_gib=drawn.uniform(0.02, 0.05),
            quality=Quality(
                divergence_lpips=drawn.uniform(0, 0.02),
                psnr_db=drawn.uniform(20, 60),
                quality_loss_percent=loss,
                quality_loss_low_percent=loss - 1,
                quality_loss_high_percent=loss + 1,
            ),
            effect="applied",
            device="cpu",
            machine=Machine(cpu="Any CPU", threads=1),
        )
        table = [
            {"component": f"component {i}", "time_ms": float(i), "share_percent": 12.5} for i in range(8)
        ]
        run_id = f"{index:012x}"
        (root / run_id).mkdir()
        record = {"run_id": run_id, "name": root.name, "parameters": values | axes, "schema": schema}
        record |= {
            "environment": environment,
            "notebook": "notebooks/41_configuration.ipynb",
            "verdict": "x" * 300,
        }
        status = {"state": "finished", "started": "2026-01-01T00:00:00+00:00", "seconds": 20.0, "exit": 0}
        line = {"time": "2026-01-01T00:00:00+00:00", "name": "breakdown", "value": table}
        (root / run_id / "run.json").write_text(json.dumps(record, indent=1))
        (root / run_id / "status.json").write_text(json.dumps(status, indent=1))
        (root / run_id / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (root / run_id / "results.jsonl").write_text(json.dumps(result.to_dict()) + "\n")
        runs.append(
            {"label": ", ".join(f"{k}={v}" for k, v in axes.items()), "run_id": run_id, "parameters": axes}
        )
    sweep = {
        "name": root.name,
        "state": "finished",
        "axes": ["engine", "plan"],
        "baseline": FIRST,
        "runs": runs,
    }
    (root / "sweep.json").write_text(json.dumps(sweep, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=12, help="of each run")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    begin = time.perf_counter()

    from wanlab import measure, plots
    from wanlab.runs import compare, configurations, load_runs, pareto

    measure.Samples("import", (1.0,))
    imports = time.perf_counter() - begin
    parts: dict[str, tuple[float, float]] = {}

    def timed(name: str, call):
        start, worked = time.perf_counter(), time.process_time()
        made = call()
        parts[name] = (time.perf_counter() - start, time.process_time() - worked)
        return made

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "sweep"
        root.mkdir()
        write(root, options.runs, options.samples)
        timed("load_runs", lambda: load_runs(root))
        found = timed("read and pool", lambda: configurations(root))
        compared = timed("compare", lambda: compare(found))
        frame = compared.frame
        frame["efficient"] = timed("pareto", lambda: pareto(frame, GOALS))
        names = list(frame["configuration"][frame["efficient"]])
        timed(
            "frontier to JSON",
            lambda: plots.run_frontier(frame, *list(GOALS)[:3:2], size="peak_memory_gib").to_json(),
        )
        columns = {"engine": None, "plan": None, **GOALS}
        timed("lines to JSON", lambda: plots.parallel_lines(frame, columns, highlighted=names).to_json())
    total, worked = (sum(each[i] for each in parts.values()) for i in (0, 1))
    for name, (seconds, processor) in parts.items():
        print(f"{name:18s} {seconds:6.2f} s {100 * seconds / total:5.1f} %   processor {processor:5.2f} s")
    print(
        f"{'all':18s} {total:6.2f} s           processor {worked:5.2f} s   {options.runs:,} runs; imports {imports:.1f} s"
    )
    if options.json:
        figures = {
            "runs": options.runs,
            "parts_s": parts,
            "total_s": total,
            "processor_s": worked,
            "imports_s": imports,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
