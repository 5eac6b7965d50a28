"""Small checkpoints to go on from: weights in 8 bits, as their difference to weights of the tree where they began there.

    python -m training.difference outputs/training/vae_joint.pt data/wan-nano/vae/diffusion_pytorch_model.safetensors \\
        training/start/vae.npz
    python -m training.difference outputs/training/expert_high.pt none outputs/expert_high.npz

A row of a tensor (an output channel) has one scale, its largest difference over 127. Half the size of half precision, and
the rest compresses; what is lost is about a hundredth of the difference, which further training makes good.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from wanlab.core.contents import content_digest

LEVELS = 127
FACTS = ("mean", "std")
"""What the VAE's checkpoint states beside its weights: mean and spread of its latents per channel."""


def write(checkpoint: Mapping[str, Any], base: Path | None, path: Path) -> None:
    """Write the weights of a checkpoint as their difference to those of `base`, a `.safetensors` with the same names and
    shapes, or themselves where None; its mean and spread of the latents, if it states them, go along in float32."""
    arrays: dict[str, np.ndarray] = {}
    if base is not None:
        arrays |= {"base": np.array(str(base)), "digest": np.array(content_digest(base))}
    known = load_file(base) if base is not None else {}
    for name, tensor in checkpoint["weights"].items():
        began = known[name].float() if base is not None else torch.zeros(tensor.shape)
        rows = (tensor.float() - began).reshape(len(tensor), -1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LEVELS
        arrays[f"{name}:codes"] = (rows / scale).round().to(torch.int8).numpy()
        arrays[f"{name}:scale"], arrays[f"{name}:shape"] = scale.numpy(), np.array(tensor.shape)
    arrays |= {f"fact:{name}": checkpoint[name].numpy() for name in FACTS if name in checkpoint}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint of a file of `write`, in float32; its base is looked for in the working directory.

    Raises:
        SystemExit: the base is not there, or holds other weights now.
    """
    with np.load(path) as file:
        weights = {}
        for name in (each.removesuffix(":codes") for each in file.files if each.endswith(":codes")):
            rows = torch.from_numpy(file[f"{name}:codes"] * file[f"{name}:scale"])
            shape = f"{name}:shape"
            weights[name] = rows.reshape(tuple(file[shape])) if shape in file else rows
        if "base" in file:
            base = Path(str(file["base"]))
            if not base.is_file() or content_digest(base) != str(file["digest"]):
                raise SystemExit(
                    f"{path} is a difference to {base}, which is missing or holds other weights now"
                )
            for name, tensor in load_file(base).items():
                weights[name] = tensor.float() + weights[name].reshape(tensor.shape)
        facts = {name: torch.from_numpy(file[f"fact:{name}"]) for name in FACTS if f"fact:{name}" in file}
        return {"weights": weights, **facts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a stage")
    parser.add_argument(
        "base", type=Path, help=".safetensors of the weights that it began with; none if there are none"
    )
    parser.add_argument("to", type=Path, help=".npz to write")
    args = parser.parse_args(argv)
    base = None if str(args.base) == "none" else args.base
    write(torch.load(args.checkpoint, map_location="cpu", weights_only=True), base, args.to)
    print(f"{args.to}: {args.to.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
