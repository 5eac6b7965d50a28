"""What a switch of experts costs on a GPU: both resident, swapped from pageable or pinned memory, prefetched.

    python benchmarks/expert_switch.py --model wan2.2-i2v-a14b --weights random --height 720 --width 1280 --frames 81

Only the two experts are loaded; their forwards run on random latents and text of the right shape
(`wanlab.diagnose.switch_cost`). The file written is what the notebook 12_experts shows on machines without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    arguments = parse()
    import pandas as pd

    from wanlab import diagnose, measure, models
    from wanlab.core.errors import WanlabError

    try:
        model = models.load(
            arguments.model,
            device=arguments.device,
            weights=arguments.weights,
            components=("expert_high", "expert_low"),
        )
        size = {"height": arguments.height, "width": arguments.width, "frames": arguments.frames}
        cost = diagnose.switch_cost(model, samples=arguments.samples, **size)
    except WanlabError as error:
        print(error, file=sys.stderr)
        return 2
    cost.settings.update(size, weights=arguments.weights)
    cost.save(arguments.output, environment=measure.environment(model.device))

    pd.set_option("display.width", 200, "display.max_columns", 20, "display.float_format", "{:,.4g}".format)
    print(f"\n{cost.device}, {arguments.model}, {cost.size_bytes / 1e9:.2f} GB an expert")
    print(cost.frame.to_string(index=False))
    print(f"page-locking {cost.lock_ms:,.0f} ms, filling it {cost.fill_ms:,.0f} ms, once per load")
    print(f"{cost}\n{arguments.output}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="wan2.2-i2v-a14b", help="registry name or folder, with two experts"
    )
    parser.add_argument("--weights", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--height", type=int, help="pixels; the model's default when left out")
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--samples", type=int, default=3, help="rounds, six forwards each (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("data/results/expert_switch_h200.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
