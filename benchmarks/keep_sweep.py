"""Keep a sweep as a part of the project: records and clips, without executed notebooks and reports.

python benchmarks/keep_sweep.py outputs/wan-nano-precision
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = (
    "run.json",
    "status.json",
    "metrics.jsonl",
    "results.jsonl",
    "artifacts/video.mp4",
    "artifacts/original.mp4",
    "artifacts/truth.mp4",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    sweep = parser.parse_args().sweep
    record = json.loads((sweep / "sweep.json").read_text())
    folder = ROOT / "data" / "sweeps" / record["name"]
    for old in folder.glob("*/run.json"):
        shutil.rmtree(old.parent)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep / "sweep.json", folder)
    size = 0
    for run in record["runs"]:
        for name in KEPT:
            source = sweep / run["run_id"] / name
            if source.is_file():
                target = folder / run["run_id"] / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                size += target.stat().st_size
    print(f"{folder.relative_to(ROOT)}: {len(record['runs'])} runs, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
