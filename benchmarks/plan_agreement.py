"""One plan in PyTorch, ONNX Runtime and TensorRT: do the three compute the same, and does each hold the formats asked for?

    python benchmarks/plan_agreement.py recipes/wan-nano-3-percent.yaml --output plan_agreement.json

Ranges are recorded on training photographs. ONNX Runtime executes the graphs; TensorRT, where no GPU is, builds engines
ahead of time and the formats of their layers are read from them. The exit status is 1 when two applications differ by more
than the plan's own error allows, or a layer has another format than was asked for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def main() -> int:
    arguments = parse()
    from wanlab import measure, models, precision
    from wanlab.core.files import write_json
    from wanlab.precision.plan import LINEAR

    size = {name: getattr(arguments, name) for name in ("height", "width", "frames", "steps")}
    model = models.load(arguments.model, device=arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        recording = precision.record_inputs(
            model, precision.nano_examples(arguments.examples), f"{folder}/recording", **size
        )
        ranges = {c: precision.calibrate(model, c, recording, layers=LINEAR) for c in recording.components}
        plan = precision.load_plan(arguments.plan)
        found = precision.agreement(
            model, plan, f"{folder}/graphs", recording, ranges, provider=arguments.provider
        )
    facts = ["component", "application", "executed", "relative_l2", "to_pytorch", "format_error"]
    facts += ["agrees", "layers", "layers_as_asked", "layer_share_percent", "note"]
    print(found[facts].to_string(index=False))
    asked = found.dropna(subset=["layers"])
    compared = found["agrees"].dropna()  # what was only built has no outputs to agree with
    passed = len(compared) > 0 and bool(compared.astype(bool).all())
    passed &= bool((asked["layers_as_asked"] == asked["layers"]).all())
    record = {
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
        },
        "environment": measure.environment(arguments.device),
        "plan": plan.to_dict(),
        "plan_hash": plan.hash,
        "rows": found.to_dict("records"),
        "passed": passed,
    }
    write_json(arguments.output, record)
    print(f"{'passed' if passed else 'FAILED'}; {arguments.output}")
    return 0 if passed else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("plan", help="plan file or preset")
    add("--model", default="wan-nano")
    add("--device", default="cpu")
    add("--provider", default="auto", help="of ONNX Runtime: auto, cpu or cuda")
    add("--output", type=Path, required=True)
    add("--examples", type=int, default=2, help="generations to record")
    add("--height", type=int, default=128, help="pixels")
    add("--width", type=int, default=192, help="pixels")
    add("--frames", type=int, default=17)
    add("--steps", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
