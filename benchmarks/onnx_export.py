"""An expert as ONNX at its true size: seconds, bytes, host memory, and parity block by block.

    python benchmarks/onnx_export.py --model wan2.2-i2v-a14b --component expert_high --height 480 --width 832 --frames 17

The weights are brought to the host first, so that its peak counts them. The graph is written in bfloat16, then once
more in float32 arithmetic over the same file of weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    arguments = parse()
    from wanlab import engines, export, measure, models
    from wanlab.core.files import write_json

    model = models.load(
        arguments.model,
        weights=arguments.weights,
        components=[arguments.component],
        device=arguments.device,
        dtype=arguments.dtype,
    )
    network = model.pipeline.components[model.spec.part_of(arguments.component)]
    network.to("cpu")
    weights_gib = sum(parameter.nbytes for parameter in network.parameters()) / 2**30
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="wanlab-export-"))
    size = {"height": arguments.height, "width": arguments.width, "frames": arguments.frames}
    graphs = {
        arguments.dtype: {"opset": 23},
        "float32 arithmetic": {"opset": 23, "dtype": "float32", "stored_dtype": arguments.dtype},
    }
    record = {"settings": vars(arguments), "weights_gib": weights_gib, "exports": []}
    for label, how in graphs.items():
        path = folder / f"{arguments.component}.{label.replace(' ', '_')}.onnx"
        with measure.peak_memory("cpu") as memory:
            report = export.export(model, arguments.component, path, external_data=True, **how, **size)
        row = report.row() | {"graph": label, "peak_host_gib": memory.peak_gib}
        row |= {"operators": report.operators, "weights_written_bytes": report.weights_written_bytes}
        record["exports"].append(row | {"peak_over_weights": memory.peak_gib / weights_gib})
        print(
            f"{label}: {report.time_ms / 1e3:.0f} s, {report.size_bytes / 2**30:.2f} GiB of which"
            f" {report.weights_written_bytes / 2**30:.2f} written, host peak {memory.peak_gib:.2f} GiB",
            flush=True,
        )
    if arguments.device != "cpu":
        network.to(arguments.device)
    tokens = model.spec.defaults.text_tokens
    shape = export.ClipShape(1, arguments.height, arguments.width, arguments.frames, tokens)
    path = folder / f"{arguments.component}.{arguments.dtype}.onnx"
    blocks = engines.blockwise_parity(
        model, arguments.component, path, shape=shape, provider=arguments.provider
    )
    print(blocks.to_string())
    record |= {"blocks": blocks, "environment": measure.environment(arguments.device)}
    write_json(arguments.output, record)
    print(arguments.output)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--weights", default="random", choices=("random", "pretrained"))
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=192, help="pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda", help="where the blocks are compared")
    parser.add_argument("--provider", default="auto", help="of ONNX Runtime")
    parser.add_argument("--folder", type=Path, help="of the graphs; a temporary one when left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/onnx_export.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
