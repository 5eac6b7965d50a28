"""What a run of 30_sensitivity found, as one small JSON: rank correlation, cost of the search, tolerance of the experts.

    wanlab run notebooks/30_sensitivity.ipynb
    python benchmarks/precision_sensitivity.py outputs/30_sensitivity/RUN_ID --output data/results/sensitivity_cpu.json

Nothing is measured here: the numbers are those that the run recorded. The exit status is 1 when the run is not finished,
or did not hold its prediction against generations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

WANTED = ("parts", "cost", "sensitivity", "tolerance")


def main() -> int:
    arguments = parse()
    from wanlab.core.files import write_json
    from wanlab.runs.results import read_run

    run = read_run(arguments.run)
    missing = [name for name in WANTED if name not in run.metrics]
    if run.row["state"] != "finished" or missing or "rank_correlation" not in run.metrics["sensitivity"]:
        print(
            f"{arguments.run} is no finished run of 30_sensitivity with samples: {run.row['state']}",
            file=sys.stderr,
        )
        return 1
    settings = {name: value for name, value in run.record["parameters"].items() if name != "folder"}
    found = {name: run.metrics[name] for name in WANTED}
    write_json(
        arguments.output,
        {
            "settings": settings,
            "environment": run.record["environment"],
            "verdict": run.row["verdict"],
            "cost": found["cost"][0],
            "prediction": found["sensitivity"],
            "tolerance": found["tolerance"],
        },
    )
    print(run.row["verdict"])
    print(arguments.output)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
