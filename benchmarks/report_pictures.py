"""The pictures of the pages in docs: the first screen of the report of every notebook, and of a sweep's page.

    python benchmarks/report_pictures.py                 # run every notebook with its defaults, or find it finished
    python benchmarks/report_pictures.py 12_experts      # these notebooks alone
    python benchmarks/report_pictures.py --from outputs  # run nothing: the newest finished runs with defaults

Pictures are docs/pictures/*.webp. What the runs took and answered is data/results/reports_cpu.json, from which
`benchmarks/tables.py` writes the lines beside the pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import chromium, drawn, launched
from PIL import Image
from table_text import RESULTS, ROOT

from wanlab.core.files import read_json, write_bytes, write_json
from wanlab.launch.execute import execute
from wanlab.pages import render_index
from wanlab.runs.catalogue import questions
from wanlab.runs.parameters import read_schema
from wanlab.runs.results import read_runs

PICTURES = ROOT / "docs" / "pictures"
RECORD = RESULTS / "reports_cpu.json"
SWEEP = ROOT / "data" / "sweeps" / "wan-nano-precision"
PACKAGES = ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu")
LAST = "15_triage"  # reads what the others have measured
# Pixels of the first screen; its end is that of the main output, where that comes sooner.
WIDTH, HEIGHT = 1200, 1040
REPORT_END, SWEEP_END = ".main", "main > section"  # the element with which the first screen ends
MARGIN = 14
LIMIT_BYTES = 60_000
COLOURS = 128  # text and figures have few; those that are rare are kept, as they have a meaning


def newest(folder: Path, name: str) -> Path | None:
    """The newest finished run of a notebook with its default parameters."""
    defaults = read_schema(name).defaults
    found = [
        run
        for run in read_runs(folder)
        if Path(run.row["notebook"] or "").stem == name
        and run.row["state"] == "finished"
        and run.record["parameters"] == defaults
    ]
    return Path(max(found, key=lambda run: run.row["started"]).row["folder"]) if found else None


def short(environment: dict[str, Any]) -> dict[str, Any]:
    """Of the description of a machine what pages name."""
    packages = {name: version for name, version in environment["packages"].items() if name in PACKAGES}
    return {name: environment[name] for name in ("gpu", "cpu", "threads", "python")} | {"packages": packages}


def facts(folder: Path) -> dict[str, Any]:
    """What a run answered and took."""
    record, status = read_json(folder / "run.json"), read_json(folder / "status.json")
    return {
        "verdict": record["verdict"],
        "seconds": status["seconds"],
        "peak_memory_gib": status.get("peak_memory_gib"),
        "others_percent": (record.get("load_of_run") or {}).get("others_percent"),
        "environment": short(record["environment"]),
    }


def picture(browser: Any, page_path: Path, target: Path, end: str) -> int:
    """Write the first screen of a page as WebP; returns its size in bytes.

    Args:
        end: CSS selector of the element with which it ends.
    """
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.goto(page_path.resolve().as_uri(), timeout=120_000)
    if not drawn(page, 60):
        raise SystemExit(f"{page_path}: its figures are not drawn within a minute")
    page.wait_for_timeout(500)  # videos have their first frame
    below, photographs = page.evaluate(
        """end => { const last = document.querySelector(end), box = last?.getBoundingClientRect();
        return [box ? box.bottom : innerHeight, !!last?.querySelector("video, img")] }""",
        end,
    )
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": min(HEIGHT, round(below) + MARGIN)}
    image = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    page.close()
    if photographs:
        form = {"quality": 70}
    else:
        image, form = (
            image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB"),
            {"lossless": True},
        )
    made = io.BytesIO()
    image.save(made, "WEBP", method=6, **form)
    write_bytes(target, made.getvalue())
    return len(made.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", help="names such as 12_experts (default: all, and the sweep's page)"
    )
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="folder of runs; nothing is run"
    )
    options = parser.parse_args()
    path = chromium()
    if path is None:
        print(
            "no Chromium: `make chromium` installs Debian's, or set CHROMIUM to the path of one",
            file=sys.stderr,
        )
        return 1
    known = [row.notebook for row in questions(ROOT / "notebooks")]
    if unknown := set(options.notebooks) - set(known):
        parser.error(f"no notebook {', '.join(sorted(unknown))}")
    names = sorted(options.notebooks or known, key=lambda name: (name == LAST, name))
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    with launched(path) as browser:
        for name in names:
            if options.folder:
                folder = newest(options.folder, name)
            elif (outcome := execute(name)).state == "finished":
                folder = outcome.folder
            else:
                print(
                    f"{name}: the run {outcome.state}: {outcome.error}; its page is {outcome.report}",
                    file=sys.stderr,
                )
                return 1
            if folder is None:
                print(
                    f"{name}: no finished run with its default parameters in {options.folder}",
                    file=sys.stderr,
                )
                return 1
            size = picture(browser, folder / "report.html", PICTURES / f"{name}.webp", REPORT_END)
            record[name] = facts(folder)
            print(f"{name}: {size / 1000:.0f} kB, run in {record[name]['seconds']:.0f} s", flush=True)
            write_json(RECORD, {key: record[key] for key in sorted(record)})
        if not options.notebooks:
            with tempfile.TemporaryDirectory() as place:
                copy = shutil.copytree(SWEEP, Path(place) / SWEEP.name)
                size = picture(browser, render_index(copy), PICTURES / "sweep.webp", SWEEP_END)
            print(f"sweep: {size / 1000:.0f} kB")
    large = [file.name for file in PICTURES.glob("*.webp") if file.stat().st_size > LIMIT_BYTES]
    if large:
        print(f"over {LIMIT_BYTES / 1000:.0f} kB: {', '.join(large)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
