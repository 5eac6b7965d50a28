"""What the ranges of `wanlab.diagnose.capture` cost a forward pass while no profiler runs.

    python benchmarks/range_cost.py --model wan-nano --forwards 400

Forwards of one expert, called where the pipeline calls it, in turn: bare, with ranges, bare again. The ratio of the two
bare series is the A/A control.
The exit status is 1 when the ranges' interval lies above --limit percent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    arguments = parse()
    import torch
    from tqdm import tqdm

    from wanlab import diagnose, measure, models
    from wanlab.core.files import write_json
    from wanlab.measure import Samples, compare, time_ms

    torch.set_num_threads(arguments.threads)
    model = models.load(arguments.model, device=arguments.device, weights=arguments.weights)
    name, call = recorded_forward(model)

    def one() -> float:
        return time_ms(call, iterations=1, warmup=0, device=model.device).values_ms[0]

    series: dict[str, list[float]] = {"bare": [], "with ranges": [], "bare again": []}
    one()
    for _ in tqdm(range(arguments.forwards), unit="round", leave=False):
        series["bare"].append(one())
        with diagnose.ranges(model) as names:
            series["with ranges"].append(one())
        series["bare again"].append(one())
    bare, ranged, again = (
        Samples(label, tuple(values), str(model.device)) for label, values in series.items()
    )
    control, cost = compare(bare, again), compare(bare, ranged)
    # A ratio under 1 is a slowdown; the interval of the slowdown in percent.
    low, middle, high = (100 * (1 / x - 1) for x in (cost.high, cost.speedup, cost.low))
    print(f"\n{name} of {arguments.model}: {bare.median:.2f} ms bare, {len(names)} ranges")
    print(
        f"A/A control {100 * (1 / control.speedup - 1):+.2f} %, ranges {middle:+.2f} % ({low:+.2f} to {high:+.2f})"
    )
    passed = low <= arguments.limit
    record = {
        "settings": vars(arguments),
        "ranges": len(names),
        "cost_percent": middle,
        "cost_percent_interval": [low, high],
        "control_percent": 100 * (1 / control.speedup - 1),
        "samples": {s.label: s.to_dict() for s in (bare, ranged, again)},
        "environment": measure.environment(model.device),
        "passed": passed,
    }
    write_json(arguments.output, record)
    print(f"{'passed' if passed else 'FAILED'}: wanted <= {arguments.limit:g} %; {arguments.output}")
    return 0 if passed else 1


def recorded_forward(model):
    """The component that is called first in denoising, and that call again with the same inputs."""
    import torch

    component = next(name for name in ("expert_high", "expert") if name in model.components)
    network, kept = model.components[component], []
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((args, kwargs)), with_kwargs=True
    )
    try:
        import numpy as np

        defaults = model.spec.defaults
        frame = np.zeros((defaults.height, defaults.width, 3), dtype=np.float32)
        model.generate(frame, "the camera pans left", steps=1, guidance_scale=1.0, output="latent")
    finally:
        handle.remove()
    args, kwargs = kept[0]

    def call():
        with torch.no_grad():
            # What stands there now: the network itself, or what `ranges` put in its place.
            return model.pipeline.transformer(*args, **kwargs)

    return component, call


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-nano", help="registry name or folder")
    parser.add_argument("--weights", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--forwards", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.0, help="most percent that passes")
    parser.add_argument("--output", type=Path, default=Path("data/results/range_cost_cpu.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
