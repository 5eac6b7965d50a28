"""ONNX Runtime against eager PyTorch: the same model, seed, threads and run, measured side by side.

    python benchmarks/onnxruntime_pipeline.py --model wan-nano --threads 2 --rounds 5

Each round runs eager, ONNX Runtime and eager again (in alternating order). The two eager series are the
A/A control: their ratio says how far apart two equal things look on this machine today. The exit status
is 1 when the videos differ (PSNR under --psnr), or the speed-up is under --speedup or lost in the noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> int:
    arguments = parse()
    import numpy as np
    import pandas as pd
    import torch
    from tqdm.auto import tqdm

    from wanlab import convert, measure, models

    torch.set_num_threads(arguments.threads)
    eager = models.load(arguments.model)
    print(
        f"{arguments.model} on {eager.device}, {arguments.threads} threads; ONNX files in {arguments.folder}"
    )
    reports = convert.export_all(eager, arguments.folder)
    engines = convert.load_engines(arguments.folder)
    fast = convert.use(eager, engines)
    image = photograph(arguments.image, eager.spec.defaults)

    def generate(model):
        return model.generate(image, arguments.prompt, steps=arguments.steps, seed=arguments.seed)

    reference, made = generate(eager).video, generate(fast).video  # also the warm-up
    error = float(np.mean((reference.astype(np.float64) - made) ** 2))
    psnr_db = 10 * math.log10(1 / error) if error else math.inf

    times: dict[str, list[float]] = {"eager": [], "onnxruntime": [], "eager again": []}
    contenders = [("eager", eager), ("onnxruntime", fast), ("eager again", eager)]
    for number in tqdm(range(arguments.rounds), desc="rounds", unit="round"):
        for label, model in contenders if number % 2 == 0 else contenders[::-1]:
            times[label].append(generate(model).wall_ms)
    stages = []
    for label, model in contenders[:2]:  # apart from the timing, as recording synchronises
        with measure.stages(model) as recorder:
            generation = generate(model)
        stages.append(recorder.breakdown(generation.wall_ms).assign(engine=label))

    samples = {
        label: measure.Samples(label, tuple(values), str(eager.device), "wall clock")
        for label, values in times.items()
    }
    control = measure.compare(samples["eager"], samples["eager again"])
    noise_percent = 100 * max(abs(control.speedup - 1), abs(control.low - 1), abs(control.high - 1))
    result = measure.compare(samples["eager"], samples["onnxruntime"], noise_percent)

    pd.set_option("display.width", 160)
    table = pd.DataFrame([series.row() for series in samples.values()])
    table["speedup"] = samples["eager"].median / table["median_ms"]
    print(
        "\n"
        + table[["label", "median_ms", "min_ms", "max_ms", "cv_percent", "speedup"]]
        .round(2)
        .to_string(index=False)
    )
    by_stage = pd.concat(stages).pivot_table(
        index="component", columns="engine", values="time_ms", sort=False
    )
    by_stage["ratio"] = by_stage["eager"] / by_stage["onnxruntime"]
    print("\n" + by_stage.round(2).to_string())
    load = pd.DataFrame(
        [
            (name, engine.load_ms, engine.size_bytes, ", ".join(engine.providers_used))
            for name, engine in engines.items()
        ],
        columns=["component", "load_ms", "size_bytes", "providers"],
    )
    print("\n" + load.round(1).to_string(index=False))
    print(f"\nA/A control of eager: {control.speedup:.3f}x, noise {noise_percent:.1f} %")
    print(f"{result}; PSNR of the videos {psnr_db:.1f} dB")

    quick = result.verdict == "faster" and result.speedup >= arguments.speedup
    passed = quick and psnr_db >= arguments.psnr
    record = {
        "model": arguments.model,
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
        },
        "psnr_db": psnr_db,
        "comparison": result.row(),
        "control": control.row() | {"noise_percent": noise_percent},
        "samples": {label: series.to_dict() for label, series in samples.items()},
        "stages": pd.concat(stages).to_dict("records"),
        "engines": load.to_dict("records"),
        "exports": [asdict(report) | {"path": Path(report.path).name} for report in reports],
        "environment": measure.environment(eager.device),
        "passed": passed,
    }
    write(arguments.output, record)
    print(
        f"{'passed' if passed else 'FAILED'}: wanted >= {arguments.speedup:g}x and >= {arguments.psnr:g} dB;"
        f" {arguments.output}"
    )
    return 0 if passed else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/onnx"), help="ONNX files, reused while true"
    )
    parser.add_argument("--image", type=Path, help="first frame; a photograph of scikit-image when left out")
    parser.add_argument("--prompt", default="the camera pans left")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's default when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--speedup", type=float, default=2.0, help="least speed-up that passes")
    parser.add_argument("--psnr", type=float, default=50.0, help="least PSNR in dB that passes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/onnxruntime_pipeline.json"))
    return parser.parse_args()


def photograph(path: Path | None, defaults):
    """The given image, or a bundled photograph."""
    from PIL import Image

    if path is not None:
        return path
    from skimage import data

    return Image.fromarray(data.coffee()).resize((defaults.width, defaults.height), Image.Resampling.LANCZOS)


def write(path: Path, record: dict) -> None:
    """JSON in one step; non-finite numbers become null, which every reader takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(record), indent=1), encoding="utf-8")
    os.replace(temporary, path)


def finite(value):
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
