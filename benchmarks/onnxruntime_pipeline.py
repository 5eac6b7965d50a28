"""ONNX Runtime against eager PyTorch: the same model, seed, threads and run, measured side by side.

    python benchmarks/onnxruntime_pipeline.py --model wan-nano --threads 2 --rounds 3

Whole videos in turn, forwards and backwards (`wanlab.measure.baseline`). The two halves of the eager series are
the A/A control: their ratio says how far apart two equal things look on this machine today. The exit status is 1 when
the videos differ (PSNR under --psnr), or the speed-up is under --speedup or lost in the noise.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> int:
    arguments = parse()
    import pandas as pd
    import torch

    from wanlab import engines, evaluate, export, measure, models
    from wanlab.core.files import write_json

    torch.set_num_threads(arguments.threads)
    eager = models.load(arguments.model)
    reports = export.export_all(eager, arguments.folder)
    opened = engines.load_engines(arguments.folder)
    variants = {"eager": eager, "onnxruntime": engines.use(eager, opened)}
    asked = {
        "image": photograph(arguments.image, eager.spec.defaults),
        "prompt": arguments.prompt,
        "steps": arguments.steps,
        "seed": arguments.seed,
    }
    videos = [model.generate(**asked) for model in variants.values()]  # also the warm-up
    psnr_db = evaluate.compare_videos(*videos, metrics=("psnr",), progress=False).mean("psnr")
    pair = measure.compare_models(variants, rounds=arguments.rounds, **asked)
    gain = pair.comparisons["onnxruntime"]

    pd.set_option("display.width", 160, "display.float_format", "{:,.2f}".format)
    rows = pd.DataFrame([samples.row() for samples in pair.timings])
    print("\n" + rows[["label", "n", "median_ms", "min_ms", "max_ms", "cv_percent"]].to_string(index=False))
    stages = pair.breakdown.assign(ratio=pair.breakdown["eager_ms"] / pair.breakdown["onnxruntime_ms"])
    print("\n" + stages.to_string(index=False))
    print(f"\nA/A control of eager: {pair.control.ratio:.3f}x, noise {pair.control.noise_percent:.1f} %")
    print(f"{gain}; PSNR of the videos {psnr_db:.1f} dB")

    quick = gain.verdict == "faster" and gain.speedup >= arguments.speedup
    passed = quick and psnr_db >= arguments.psnr
    record = {
        "model": arguments.model,
        "settings": vars(arguments),
        "psnr_db": psnr_db,
        "comparison": gain.row(),
        "noise_percent": pair.control.noise_percent,
        "samples": {label: samples.to_dict() for label, samples in pair.samples.items()},
        "stages": stages,
        "engines": {
            name: (engine.load_ms, engine.size_bytes, engine.providers_used)
            for name, engine in opened.items()
        },
        "exports": [asdict(report) | {"path": Path(report.path).name} for report in reports],
        "environment": measure.environment(eager.device),
        "passed": passed,
    }
    write_json(arguments.output, record)
    wanted = f"wanted >= {arguments.speedup:g}x and >= {arguments.psnr:g} dB"
    print(f"{'passed' if passed else 'FAILED'}: {wanted}; {arguments.output}")
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
    parser.add_argument("--rounds", type=int, default=3, help="each makes four videos per engine")
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


if __name__ == "__main__":
    sys.exit(main())
