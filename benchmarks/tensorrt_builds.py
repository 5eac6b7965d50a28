"""What TensorRT for RTX builds of a model on a machine without a GPU: networks in each format, and what is refused where.

    python benchmarks/tensorrt_builds.py --output data/results/tensorrt_builds_cpu.json

Graphs are exported in float32 and float16; INT8 and FP8 are explicit Q/DQ in the float16 graph, calibrated on a short
generation. Nothing is executed. Building times are those of this machine with whatever else it does, hence its load.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

# Beside the linear layers of an expert, which are the default: all that multiplies, but no norms.
LAYERS = {"vae_decoder": {"layers": "decoder.*", "exclude": "*norm*"}}


def main() -> int:
    arguments = parse()
    from wanlab import engines, measure, models
    from wanlab.core.files import write_json

    load = os.getloadavg()[0]
    model = models.load(arguments.model, device="cpu")
    with tempfile.TemporaryDirectory(prefix="wanlab-tensorrt-") as folder:
        paths = graphs(model, arguments, Path(folder))
        builds = engines.build_engines(
            paths, compute_capabilities=arguments.capabilities, kind="tensorrt-rtx", progress=False
        )
    print(
        builds.frame()[["component", "numbers", "compute_capabilities", "build_ms", "size_mib"]].to_string()
    )
    print(builds.refusals().to_string())
    record = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "runtime": builds.runtime,
        "builds": builds.records(),
        "refused": builds.refused,
        "load": load,
        "environment": measure.environment("cpu"),
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(arguments.output, record)
    print(arguments.output)
    return 0


def graphs(model, arguments, folder: Path) -> list[Path]:
    """Each component in float32 and float16, and quantised; an expert's sizes are free, the others have the model's."""
    from wanlab import export, precision

    paths = []
    for dtype in ("float32", "float16"):
        free = [name for name in arguments.components if name.startswith("expert")]
        made = export.export_all(
            model, folder / dtype, arguments.components, dtype=dtype, dynamic=free, progress=False
        )
        paths += [report.path for report in made]
    recording = precision.record_inputs(
        model,
        precision.nano_examples(1),
        folder / "recording",
        components=arguments.components,
        steps=arguments.steps,
        progress=False,
    )
    for name in arguments.components:
        choice = LAYERS.get(name, {})
        ranges = precision.calibrate(model, name, recording, layers=choice.get("layers"), progress=False)
        for kind in arguments.formats:
            path = folder / f"{name}.{kind}.onnx"
            source = folder / "float16" / f"{name}.onnx"
            how = {"format": kind, "calibration": ranges, "progress": False}
            paths.append(precision.quantize(source, path, **how, **choice).path)
    return paths


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--components", nargs="+", default=["expert_high", "vae_decoder"])
    parser.add_argument("--formats", nargs="*", default=["int8", "fp8"])
    parser.add_argument("--capabilities", nargs="+", default=["7.5", "8.6", "8.9", "12.0"])
    parser.add_argument(
        "--steps", type=int, default=2, help="of the generation that formats are calibrated on"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/tensorrt_builds.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
