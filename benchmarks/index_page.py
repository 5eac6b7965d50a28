"""How large index.html of a sweep is, how long it takes to write, and when Chromium has it ready and drawn.

    python benchmarks/index_page.py [--runs 100 1000] [--clip-kb 40]

Runs are made up, clips are real H.264 padded to the size of wan-nano's. Times of the browser are from its own clock
(`performance`), from the start of the navigation: "ready" when table, filters and lines answer, "drawn" when the
frontier stands.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from browser import chromium, launched

from wanlab.core.files import append_json, now, write_json
from wanlab.evaluate import write_video
from wanlab.pages import render_index
from wanlab.runs import Quality, Result, RunFolder, Work

ENGINES = ("eager", "compiled", "onnxruntime", "tensorrt")


def make(root: Path, count: int, clip_bytes: int) -> None:
    """A sweep of `count` runs with a clip each."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (1, 16, 24, 3), dtype=np.uint8).repeat(17, 0).repeat(8, 1).repeat(8, 2)
    clip = write_video(root / "clip.mp4", frames, 8).read_bytes()
    runs = []
    for k in range(count):
        parameters = {"engine": ENGINES[k % 4], "plan": f"plan-{k // 4}", "steps": 4 + k % 7}
        loss = float(rng.gamma(1.5, 1.5))
        time_ms = 4000.0 / (1 + k % 4) * (1 + float(rng.normal(0, 0.05))) / (1 + loss / 10)
        result = Result(
            work=Work(model="wan-nano", height=128, width=192, frames=17),
            engine=parameters["engine"],
            plan=parameters["plan"],
            samples_ms=(time_ms, time_ms * 1.05),
            peak_memory_gib=1 + float(rng.random()),
            weights_gib=float(rng.random()),
            load_ms=900 + 100 * float(rng.random()),
            quality=Quality(
                quality_loss_percent=loss,
                quality_loss_low_percent=loss * 0.6,
                quality_loss_high_percent=loss * 1.5,
                divergence_lpips=loss / 300,
                psnr_db=50 - loss * 3,
            ),
        )
        folder = RunFolder.of(root, "sweep", f"run{k:04d}").open()
        write_json(folder.run_json, {"run_id": f"run{k:04d}", "name": "sweep", "parameters": parameters})
        write_json(folder.status_json, {"state": "finished", "started": now(), "seconds": 60.0})
        append_json(folder.results, result.to_dict())
        # An MP4 may end in a box that players skip.
        rest = max(0, clip_bytes - len(clip) - 8)
        (folder.artifacts / "video.mp4").write_bytes(
            clip + (rest + 8).to_bytes(4) + b"free" + rng.bytes(rest)
        )
        runs.append({"label": str(k), "run_id": f"run{k:04d}", "parameters": parameters, "state": "finished"})
    axes = ["engine", "plan", "steps"]
    baseline = {"engine": "eager", "plan": "plan-0", "steps": 4}
    write_json(
        root / "sweep" / "sweep.json", {"name": "sweep", "runs": runs, "axes": axes, "baseline": baseline}
    )


def opened(page_path: Path, times: int = 3) -> dict[str, float]:
    """Median milliseconds until the page is ready and drawn."""
    found: dict[str, list[float]] = {"ready_ms": [], "drawn_ms": []}
    with launched(chromium()) as browser:
        for _ in range(times):
            page = browser.new_page()
            page.goto(page_path.as_uri())
            for name in found:
                mark = f"wanlab-{name.removesuffix('_ms')}"
                while not page.evaluate("name => performance.getEntriesByName(name).length", mark):
                    page.wait_for_timeout(20)
                found[name].append(
                    page.evaluate("name => performance.getEntriesByName(name)[0].startTime", mark)
                )
            page.close()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--clip-kb", type=int, default=40, help="size of each clip, kB")
    options = parser.parse_args()
    for count in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count, options.clip_kb * 1000)
            begun = time.perf_counter()
            page = render_index(Path(folder) / "sweep")
            seconds = time.perf_counter() - begun
            took = opened(page)
            size = page.stat().st_size / 2**20
            print(
                f"{count:5d} runs  {size:5.1f} MiB  written in {seconds:5.2f} s  "
                f"ready {took['ready_ms']:6,.0f} ms  drawn {took['drawn_ms']:6,.0f} ms"
            )


if __name__ == "__main__":
    main()
