"""What works on which family of models: keeps a run of recipes/sweeps/families.yaml, and makes the table of it.

python benchmarks/family_tables.py outputs/families    # writes data/results/families_cpu.json, then run tables.py

A sweep of some notebooks replaces their runs of earlier sweeps; what it did not run stays, with the environment it ran in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from table_text import ROOT, machine, markdown, read

WORKS = "works"


def cells(sweep: Path) -> dict:
    """Notebook -> model -> "works", or the error of the run in one line; with the environment of the runs.

    Raises:
        SystemExit: the folder holds no runs that ended, or one that failed by a fault of wanlab.
    """
    table: dict[str, dict[str, str]] = {}
    environment = None
    for path in sorted(sweep.glob("*/run.json")):
        record, status = (
            json.loads((path.parent / name).read_text()) for name in ("run.json", "status.json")
        )
        if status["state"] not in ("finished", "failed"):
            continue
        environment = record.get("environment", environment)
        outcome = WORKS if status["state"] == "finished" else str(status.get("reason", "failed"))
        if outcome != WORKS and not outcome.startswith("WanlabError: "):
            raise SystemExit(f"{path.parent}: {outcome}: this is a fault, and no refusal; mend it first")
        notebook = Path(record["notebook"]).stem
        table.setdefault(notebook, {})[record["parameters"]["model"]] = outcome.removeprefix("WanlabError: ")
    if not table:
        raise SystemExit(f"{sweep} holds no runs; make them with wanlab sweep recipes/sweeps/families.yaml")
    return {"environment": environment, "notebooks": dict(sorted(table.items()))}


def merged(kept: dict, new: dict) -> dict:
    """Sweeps that were kept and a new one, whose runs take the place of earlier runs of the same model and notebook."""
    sweeps = []
    for sweep in kept["sweeps"]:
        left = {
            notebook: {
                model: outcome
                for model, outcome in outcomes.items()
                if model not in new["notebooks"].get(notebook, {})
            }
            for notebook, outcomes in sweep["notebooks"].items()
        }
        if left := {notebook: outcomes for notebook, outcomes in left.items() if outcomes}:
            sweeps.append(sweep | {"notebooks": left})
    return {"sweeps": [*sweeps, new]}


def families() -> str:
    """A row per model and a column per notebook; refusals are told below the table."""
    sweeps = read("families_cpu")["sweeps"]
    notebooks: dict[str, dict[str, str]] = {}
    for sweep in sweeps:
        for notebook, outcomes in sweep["notebooks"].items():
            notebooks.setdefault(notebook, {}).update(outcomes)
    notebooks = dict(sorted(notebooks.items()))
    models = sorted({model for outcomes in notebooks.values() for model in outcomes})
    refusals: dict[str, list[str]] = {}
    rows = []
    for model in models:
        row = [f"`{model}`"]
        for notebook, outcomes in notebooks.items():
            outcome = outcomes.get(model, "")
            if outcome not in (WORKS, ""):
                refusals.setdefault(outcome, []).append(f"{model} in {notebook}")
                outcome = f"no ({list(refusals).index(outcome) + 1})"
            row.append(outcome)
        rows.append(row)
    notes = [
        f"{number}. {', '.join(where)}: {text}"
        for number, (text, where) in enumerate(refusals.items(), start=1)
    ]
    body = markdown(["model", *(name.partition("_")[0] for name in notebooks)], rows)
    machines = "; ".join(dict.fromkeys(machine(sweep["environment"]) for sweep in sweeps))
    source = f"{machines}; `wanlab sweep recipes/sweeps/families.yaml`, random weights."
    return "\n\n".join([body, *(["\n".join(notes)] if notes else []), source])


TABLES = {"families": families}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    path = ROOT / "data" / "results" / "families_cpu.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"sweeps": []}
    path.write_text(json.dumps(merged(kept, cells(parser.parse_args().sweep)), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
