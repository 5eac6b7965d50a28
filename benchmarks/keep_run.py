"""Keep what runs measured as a part of the project, where the tables read it.

    python benchmarks/keep_run.py outputs/42_component/ID --output data/results/engines_dit_h200.jsonl
    python benchmarks/keep_run.py outputs/30_sensitivity/ID --output data/results/sensitivity_cpu.json

`.jsonl` keeps the typed rows of one or several runs; `.json` the parameters, the environment, the verdict and all recorded
values of one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl or .json")
    arguments = parser.parse_args()
    from wanlab.core.files import write_json, write_text
    from wanlab.runs.results import read_run

    runs = [read_run(path) for path in arguments.runs]
    for run in runs:
        if run.row["state"] != "finished":
            print(f"{run.folder} is no finished run: {run.row['state']}", file=sys.stderr)
            return 1
    if arguments.output.suffix == ".jsonl":
        rows = [row.to_dict() for run in runs for row in run.results]
        write_text(arguments.output, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        run = runs[0]
        parameters = {k: v for k, v in run.record["parameters"].items() if k not in ("folder", "files")}
        facts = {
            "settings": parameters,
            "environment": run.record["environment"],
            "verdict": run.row["verdict"],
        }
        write_json(arguments.output, facts | run.metrics)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
