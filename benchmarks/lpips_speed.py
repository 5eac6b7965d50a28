"""LPIPS of two clips: `wanlab.evaluate` beside the official package called frame by frame.

    python benchmarks/lpips_speed.py --device cuda --output lpips_speed_h200.json
    python benchmarks/lpips_speed.py --device cpu --output lpips_speed_cpu.json

Three ways of scoring the same two clips of 8-bit frames, timed in turn:
- `per frame`: the obvious loop, as the package's own `lpips_2imgs.py` does it: `lpips.im2tensor` of both frames, to the
  device, the network, the number.
- `per frame, tensors ready`: the same loop over tensors that are on the device as the network wants them, so that only
  the network is compared.
- `wanlab`: the whole of `compare_videos(..., "lpips")`, from 8-bit frames to a table.
Below them, one batch through the network with every choice of memory layout, TF32 and head.
The official package runs once as PyTorch sets it up (TF32 in convolutions) and once in plain float32, which is what the
scores are held against. The exit status is 1 when a score differs by more than 1e-5, or on a GPU the ratio to the
obvious loop is under 3.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from pathlib import Path

from wanlab.core.stats import ends_text

SIZES = {"cuda": (121, 704, 1280), "cpu": (17, 128, 192)}
TOLERANCE, WANTED = 1e-5, 3.0


def main() -> int:
    arguments = parse()
    import torch

    from wanlab import evaluate, measure
    from wanlab.core.files import write_json
    from wanlab.evaluate.lpips import exact_float32, load_backbone
    from wanlab.evaluate.metrics import BATCH_PIXELS, to_tensor

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    size = arguments.size or SIZES[device.type]
    original, optimized = clips(*size)
    backbone = f"lpips-{arguments.net}"
    network = official(arguments.net, device)
    load_backbone(backbone, device)
    ready = [[to_tensor(frame[None], device) * 2 - 1 for frame in clip] for clip in (original, optimized)]

    def per_frame() -> list[float]:
        import lpips

        return [
            network(lpips.im2tensor(a).to(device), lpips.im2tensor(b).to(device)).item()
            for a, b in zip(original, optimized, strict=True)
        ]

    def tensors_ready() -> list[float]:
        return [network(a, b).item() for a, b in zip(*ready, strict=True)]

    def whole() -> list[float]:
        scores = evaluate.compare_videos(original, optimized, "lpips", backbone, device, progress=False)
        return scores.per_frame["value"].tolist()

    def plainly(call):
        """The call in float32 without TF32."""

        def run() -> list[float]:
            with exact_float32(device):
                return call()

        return run

    with torch.inference_mode():
        few = min(len(original), max(1, BATCH_PIXELS[device.type] // (size[1] * size[2])))
        pair = [to_tensor(clip[:few], device) for clip in (original, optimized)]
        calls = {
            "wanlab": whole,  # the first in turn is its own A/A control
            "per frame": per_frame,
            "per frame, tensors ready": tensors_ready,
            "per frame, tensors ready, no TF32": plainly(tensors_ready),
        } | ladder(pair, backbone, device)
        found = {name: call() for name, call in calls.items()}
        found["per frame, no TF32"] = plainly(per_frame)()
        samples, control = measure.interleaved(calls, warmup=1, rounds=arguments.rounds, device=device)
    reference = found["per frame, no TF32"]
    differences = {
        name: max(abs(a - b) for a, b in zip(reference, values, strict=False))
        for name, values in found.items()
    }
    ours = samples["wanlab"]
    ratios = {
        name: measure.compare(samples[name], ours, control.noise_percent)
        for name in calls
        if name.startswith("per frame")
    }

    print(
        f"\n{size[0]} frames of {size[1]}x{size[2]}, {backbone}, {arguments.device}, {arguments.rounds} rounds"
    )
    for name, series in samples.items():
        print(f"  {name:46} {series.median:10.1f} ms   largest difference of a score {differences[name]:.2g}")
    print(f"A/A: wanlab against itself, {control.noise_percent:.1f} % apart")
    for name, gain in ratios.items():
        print(f"wanlab against {name}: {gain.speedup:.2f}x ({ends_text(gain.low, gain.high)})")
    passed = differences["wanlab"] <= TOLERANCE and (
        device.type != "cuda" or ratios["per frame"].low >= WANTED
    )
    record = {
        "settings": vars(arguments) | {"size": size, "backbone": backbone},
        "ratios": {name: {"speedup": g.speedup, "low": g.low, "high": g.high} for name, g in ratios.items()},
        "noise_percent": control.noise_percent,
        "largest_score_difference": differences,
        "mean_score": sum(reference) / len(reference),
        "samples": {name: series.to_dict() for name, series in samples.items()},
        "peak_gib": peak_gib(device),
        "environment": measure.environment(device),
        "passed": passed,
    }
    write_json(arguments.output, record)
    print(f"{'passed' if passed else 'FAILED'}: scores to {TOLERANCE:g}; {arguments.output}")
    return 0 if passed else 1


def ladder(pair, backbone: str, device) -> dict:
    """The network alone over one batch, with every choice of layout, TF32 and head: name -> call."""
    import copy

    import torch

    from wanlab.evaluate.lpips import by_torch, distance_map, exact_float32, load_backbone

    on_gpu = device.type == "cuda"
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    heads = {"written out": by_torch} | ({"one kernel": distance_map} if on_gpu else {})
    count, frames = len(pair[0]), torch.cat(pair) * 2 - 1

    def scored(network, batch, head, tf32: bool) -> list[float]:
        with contextlib.nullcontext() if tf32 else exact_float32(device):
            layers = network.net(network.scaling_layer(batch))
            weights = [linear.model[-1].weight.flatten() for linear in network.lins]
            maps = [head(f[:count], f[count:], w) for f, w in zip(layers, weights, strict=True)]
            return sum(layer.double().mean((1, 2)) for layer in maps).tolist()

    calls = {}
    for layout, kind in layouts.items():
        network = copy.deepcopy(load_backbone(backbone, device)).to(memory_format=kind)
        batch = frames.contiguous(memory_format=kind)
        for tf32 in (False, True) if on_gpu else (False,):
            for name, head in heads.items():
                label = f"batch of {count}, {layout}, {name}{', TF32' if tf32 else ''}"
                calls[label] = functools.partial(scored, network, batch, head, tf32)
    return calls


def clips(frames: int, height: int, width: int):
    """A smooth moving picture and a noisy copy of it, 8 bits: nothing in them is equal or constant."""
    import numpy as np

    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    wave = generator.uniform(0.005, 0.06, (6, 2)).astype(np.float32)
    tint = generator.uniform(-1, 1, (6, 3)).astype(np.float32)
    pair = [np.empty((frames, height, width, 3), np.uint8) for _ in range(2)]
    for t in range(frames):
        waves = np.stack([np.sin(a * (x + 4 * t) + b * y) for a, b in wave], axis=-1)
        frame = 0.5 + 0.15 * waves @ tint
        noise = generator.standard_normal(frame.shape, dtype=np.float32)
        for clip, amount in zip(pair, (0.02, 0.06), strict=True):
            clip[t] = np.clip((frame + amount * noise) * 255, 0, 255)
    return pair


def official(net: str, device):
    import warnings

    import lpips

    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, verbose=False).to(device).eval()


def peak_gib(device) -> float | None:
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--net", default="squeeze", choices=["alex", "vgg", "squeeze"])
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="default: by device"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on the CPU")
    parser.add_argument("--output", type=Path, required=True, help="JSON with every sample")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
