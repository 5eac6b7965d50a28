"""What export-friendly forms buy: one expert traced as it is, in friendly forms, with fused operators, and eager.

    python benchmarks/onnx_forms.py --device cuda --dtypes float32 bfloat16

All run in turn on ONNX Runtime; ratios are against the graph of the network as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--component", default="expert_high")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=10, help="each gives two samples a form")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/onnx_forms.json"))
    arguments = parser.parse_args()

    import pandas as pd
    import torch

    from wanlab import engines, measure, models
    from wanlab.core.files import write_json

    torch.set_num_threads(arguments.threads)
    tables = []
    for dtype in arguments.dtypes:
        model = models.load(
            arguments.model, components=[arguments.component], device=arguments.device, dtype=dtype
        )
        with tempfile.TemporaryDirectory(prefix="wanlab-forms-") as folder:
            table = engines.compare_forms(model, arguments.component, folder, rounds=arguments.rounds)
        tables.append(table.assign(dtype=dtype))
        shown = [
            "form",
            "opset",
            "nodes",
            "ScatterND",
            "Softmax",
            "Attention",
            "relative_l2",
            "time_ms",
            "ratio",
        ]
        print(f"{dtype}, A/A noise {table['noise_percent'][0]:.1f} %")
        print(table[[*shown, "verdict"]].to_string(index=False), flush=True)
    record = {
        "settings": vars(arguments),
        "forms": pd.concat(tables, ignore_index=True),
        "environment": measure.environment(arguments.device),
    }
    write_json(arguments.output, record)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
