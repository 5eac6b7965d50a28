"""The floor of divergence on this machine: wan-nano run again, by another exact attention kernel, and compiled.

    python benchmarks/precision_floors.py --output data/results/floors_cpu.json

On a CPU `torch.compile` needs a C++ compiler. Cases are of the set `selection`; videos have the model's own size.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> int:
    arguments = parse()
    from wanlab import evaluate, measure, models
    from wanlab.core.files import write_json
    from wanlab.evaluate.quality import KINDS
    from wanlab.heldout import cases as heldout

    model = models.load("wan-nano", device=arguments.device)
    asked = [
        {"image": case.truth()[0], "prompt": case.caption, "seed": case.seed, "steps": arguments.steps}
        for case in heldout.load_cases("selection", arguments.cases)
    ]
    found = evaluate.floors(model, asked, kinds=KINDS, metrics=("lpips", "psnr", "ssim"))
    defaults = model.spec.defaults
    record = {
        "settings": {
            "model": model.spec.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": arguments.device,
            "cases": arguments.cases,
            "size": [defaults.frames, defaults.height, defaults.width],
            "steps": arguments.steps or defaults.steps,
        },
        "environment": measure.environment(model.device),
        "floors": found.frame.to_dict("records"),
        "notes": found.notes,
    }
    write_json(arguments.output, record)
    print(found.frame.to_string(index=False))
    print(arguments.output)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=6, help="of the set `selection`")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's default if not given")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
