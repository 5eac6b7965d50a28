"""`wanlab sweep` beside `papermill` called once per run, and what supervision adds to one long run.

    python benchmarks/sweep_speed.py --output sweep_speed.json

Sixteen short runs of one notebook: `papermill` in a shell loop, `wanlab sweep` with a process per slot, and the loop again
(the A/A control). The sweep's time is all of it: start, sixteen reports, one page. Then one run of about a minute of
arithmetic under `papermill`, under `wanlab run`, and under `papermill` again. The physical bound of the first is its
notebooks' own work shared by the cores, as the sum of the cell times of its fastest run.
The exit status is 1 when the sweep needs over --ratio of the loop, or supervision adds over --overhead percent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = ROOT / "tests" / "fixtures" / "notebooks" / "ok.ipynb"


def main() -> int:
    arguments = parse()
    from wanlab import measure
    from wanlab.core.files import write_json

    record = {"settings": {"runs": arguments.runs, "slots": arguments.slots, "seconds": arguments.seconds}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record["short"] = short_runs(folder, arguments)
        print(json.dumps({k: v for k, v in record["short"].items() if k != "sweep"}, indent=1))
        record["long"] = long_run(folder, arguments)
        print(json.dumps(record["long"], indent=1))
    record["environment"] = measure.environment("cpu")
    record["passed"] = (
        record["short"]["ratio"] <= arguments.ratio
        and record["long"]["overhead_percent"] <= arguments.overhead
    )
    if arguments.output:
        write_json(arguments.output, record)
    return int(not record["passed"])


def short_runs(folder: Path, arguments: argparse.Namespace) -> dict:
    """Sixteen runs both ways."""
    notebook = folder / "short.ipynb"
    notebook.write_text(SHORT.read_text().replace('wanlab.start(\\"ok\\")', 'wanlab.start(\\"short\\")'))
    grid = folder / "grid.yaml"
    numbers = list(range(1, arguments.runs + 1))
    grid.write_text(f"name: short\nnotebook: short.ipynb\naxes: {{steps: {numbers}}}\n")

    def loop(label: str) -> float:
        begin = time.perf_counter()
        for number in numbers:
            papermill(notebook, folder / f"{label}-{number}.ipynb", folder, steps=number)
        return time.perf_counter() - begin

    first = loop("first")
    begin = time.perf_counter()
    command = [sys.executable, "-m", "wanlab.cli", "sweep", "grid.yaml", "--output", "sweep"]
    subprocess.run(
        [*command, "--slots", str(arguments.slots)], cwd=folder, check=True, stderr=subprocess.DEVNULL
    )
    swept = time.perf_counter() - begin
    second = loop("second")
    statuses = [json.loads(p.read_text()) for p in (folder / "sweep" / "short").glob("*/status.json")]
    if [s["state"] for s in statuses] != ["finished"] * arguments.runs:
        raise SystemExit("not every run of the sweep finished")
    fastest = min(cells_s(p) for p in (folder / "sweep" / "short").glob("*/executed.ipynb"))
    return {
        "papermill_s": [first, second],
        "sweep_s": swept,
        "ratio": swept / min(first, second),
        "control_ratio": max(first, second) / min(first, second),
        "bound_s": fastest * arguments.runs / arguments.slots,
        "sweep": [status["seconds"] for status in statuses],
    }


def long_run(folder: Path, arguments: argparse.Namespace) -> dict:
    """One run of a fixed amount of arithmetic in twelve cells."""
    notebook = folder / "long.ipynb"
    notebook.write_text(json.dumps(arithmetic(rounds_for(arguments.seconds / 12))))

    def plain(label: str) -> tuple[float, float]:
        begin = time.perf_counter()
        made = papermill(notebook, folder / f"{label}.ipynb", folder)
        return time.perf_counter() - begin, cells_s(made)

    first, first_cells = plain("long-first")
    begin = time.perf_counter()
    command = [sys.executable, "-m", "wanlab.cli", "run", "long.ipynb", "--output", "long"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours = time.perf_counter() - begin
    (made,) = (folder / "long" / "long").glob("*/executed.ipynb")
    second, second_cells = plain("long-second")
    cells = cells_s(made)
    least = min(first_cells, second_cells)
    return {
        "papermill_s": [first, second],
        "wanlab_s": ours,
        "papermill_cells_s": [first_cells, second_cells],
        "wanlab_cells_s": cells,
        "overhead_percent": 100 * (ours / min(first, second) - 1),
        "control_percent": 100 * (max(first, second) / min(first, second) - 1),
        "cells_percent": 100 * (cells / least - 1),
        "bound_s": least,
    }


def papermill(notebook: Path, made: Path, folder: Path, **parameters: object) -> Path:
    """The command line of papermill, as people call it in a loop."""
    pairs = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(made), "-k", "python3", *pairs]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def cells_s(made: Path) -> float:
    """Sum of the cells' own times, as papermill notes them."""
    cells = json.loads(made.read_text())["cells"]
    return sum(cell["metadata"].get("papermill", {}).get("duration") or 0.0 for cell in cells)


ROUND = "import hashlib\nblock = bytes(2**20)\nfor _ in range({rounds}):\n    hashlib.sha256(block).digest()"


def rounds_for(seconds: float) -> int:
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < 1.0:
        exec(ROUND.format(rounds=10), {})
        done += 10
    return max(1, int(done * seconds / (time.perf_counter() - begin)))


def arithmetic(rounds: int) -> dict:
    import nbformat

    v4 = nbformat.v4
    cells = [v4.new_markdown_cell("# How long does this take?")]
    cells += [v4.new_code_cell(ROUND.format(rounds=rounds)) for _ in range(12)]
    return v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the long run")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--overhead", type=float, default=5.0, help="percent")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
