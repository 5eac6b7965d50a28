"""How quickly a report with the live view of a trace opens, moves and follows a selection in Chromium.

    python benchmarks/explorer_speed.py

The trace is synthetic (`trace_reading.write_trace`), and the page is that of an executed notebook, opened offline from its
file. For every round, in a new page: `open_ms`, from the navigation until every view is drawn; `frames_ms`, from one
frame to the next while the timeline moves and zooms; `select_ms`, from a selection to all views that follow it, drawn.
Reading the trace in Python comes before and is `trace_reading.py`. The exit status is 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECORD = Path("data/results/explore_cpu.json")
OPEN_MS, FRAME_MS, SELECT_MS, REPORT_MB = 3_000, 33, 200, 12
SMALL = 200_000
"""Events of the report whose size is measured."""
REAL = "wan2.2-i2v-a14b"
"""Recorded trace whose report is measured too."""
IDLE_S = 2.0
"""In which the load of the machine is measured, before Chromium works."""
WIDTH, HEIGHT = 1400, 900
VIEW = "document.querySelector('[data-explorer]').explorer"
MOVE = f"""async () => {{
  const view = {VIEW}, wide = view.high - view.low, frames = [], draws = view.measured.frames.length;
  let last = performance.now();
  for (let i = 0; i < 120; i++) {{
    if (i % 40 === 0) view.move(view.low + 0.1 * wide, view.low + (0.12 + 0.01 * i) * wide);
    view.pan(0.01);
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }}
  const select_ms = [], time = async (change) => {{
    const begin = performance.now();
    view.set(change);
    view.draw();
    select_ms.push(performance.now() - begin);
    await new Promise(requestAnimationFrame);
  }};
  for (let i = 0; i < 8; i++) await time({{ between: [view.low + 0.05 * i * wide, view.low + (0.4 + 0.05 * i) * wide] }});
  await time({{ between: undefined, component: "expert_low" }});
  await time({{ component: undefined, step: 1 }});
  await time({{ step: undefined, search: "kernel_7" }});
  return {{ open_ms: view.measured.shown, frames_ms: frames, draw_ms: view.measured.frames.slice(draws), select_ms }};
}}"""
"""JavaScript: moves and selects, and gives the times of it."""


def write_report(
    folder: Path, trace: Path, compare: Path | None = None, *, figures: tuple[Any, ...] = (), **state: Any
) -> Path:
    """A notebook with a live view in it, and its page; gives the page.

    Args:
        figures: of plotly, which stand before the view.
        state: what is selected first.
    """
    import nbformat

    from wanlab import diagnose, plots
    from wanlab.pages import render

    other = diagnose.read_trace(compare) if compare else None
    widget = plots.explorer(diagnose.explore(diagnose.read_trace(trace), other), **state)
    widget.save(folder / "artifacts" / "explore.explorer.gz")
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    shown = [{"application/vnd.plotly.v1+json": json.loads(figure.to_json())} for figure in figures]
    outputs = [nbformat.v4.new_output("display_data", data=each) for each in (*shown, data)]
    cells = [nbformat.v4.new_markdown_cell("# Explore"), nbformat.v4.new_code_cell("view", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "explore.ipynb")
    return render(folder / "explore.ipynb")


def rounded(taken: dict[str, Any]) -> dict[str, Any]:
    """Times in tenths of a millisecond, which is what a browser tells them to."""
    return {
        name: [round(value, 1) for value in times] if isinstance(times, list) else round(times, 1)
        for name, times in taken.items()
    }


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def figures(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    """Of all rounds: the median of opening, the 95th percentile of frames, the longest selection."""
    opened = [taken["open_ms"] for taken in rounds]
    return {
        "open_ms": statistics.median(opened),
        "frame_p95_ms": p95([ms for taken in rounds for ms in taken["frames_ms"]]),
        "draw_p95_ms": p95([ms for taken in rounds for ms in taken["draw_ms"]]),
        "select_ms": max(ms for taken in rounds for ms in taken["select_ms"]),
    }


def main() -> int:
    arguments = parse()
    from browser import chromium, drawn, launched
    from trace_reading import write_trace

    from wanlab import measure
    from wanlab.core.files import write_json
    from wanlab.measure.load import LoadMeter

    path = chromium()
    if path is None:
        print("no Chromium: `make chromium` installs Debian's, or set CHROMIUM to one", file=sys.stderr)
        return 1
    rounds = []
    with tempfile.TemporaryDirectory() as name, launched(path) as browser:
        folder = Path(name)
        pages, counts = [], []
        for events in (arguments.events, SMALL):
            trace = folder / f"{events}.pt.trace.json.gz"
            counts.append(write_trace(trace, events))
            pages.append(write_report(folder / str(events), trace))
        meter = LoadMeter()
        time.sleep(IDLE_S)
        others_percent = meter.load(
            timing=False
        ).others_percent  # Chromium is idle, and its own work is none of it
        for _ in range(arguments.rounds):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(pages[0].as_uri(), timeout=120_000)
            if not drawn(page, 120):
                raise SystemExit("not drawn within two minutes")
            rounds.append(rounded(page.evaluate(MOVE)))
            page.close()
        report_mb = pages[1].stat().st_size / 1e6
        real = write_report(folder / REAL, Path(f"data/traces/{REAL}.pt.trace.json.gz"))
        real_mb = real.stat().st_size / 1e6
    found = figures(rounds) | {"report_mb": report_mb, "real_report_mb": real_mb}
    limits = {"open_ms": OPEN_MS, "frame_p95_ms": FRAME_MS, "select_ms": SELECT_MS, "report_mb": REPORT_MB}
    passed = all(found[name] <= most for name, most in limits.items())
    record = {"settings": {"events": arguments.events, "rounds": arguments.rounds}, "events": counts[0]}
    record |= {"report_events": counts[1], "figures": found, "limits": limits, "rounds": rounds}
    record |= {"passed": passed, "others_percent": others_percent, "environment": measure.environment("cpu")}
    write_json(arguments.output, record)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    print(f"{'passed' if passed else 'FAILED'}: {arguments.output}")
    return 0 if passed else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RECORD)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
