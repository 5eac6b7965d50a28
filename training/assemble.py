"""Stage 4: put the trained parts together as a diffusers pipeline folder in half precision."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wanlab.nano import architecture


def assemble(checkpoints: Path, folder: Path) -> None:
    """Write the pipeline folder from the checkpoints of the earlier stages."""
    from transformers import UMT5EncoderModel

    joint = torch.load(checkpoints / "vae_joint.pt", map_location="cpu", weights_only=True)
    sharpened = checkpoints / "vae_decoder.pt"
    state = torch.load(sharpened, map_location="cpu", weights_only=True) if sharpened.is_file() else joint
    vae = architecture.vae()
    vae.load_state_dict(state["vae"])
    vae.register_to_config(latents_mean=joint["mean"].tolist(), latents_std=joint["std"].tolist())
    parts = {"vae": vae, "text_encoder": UMT5EncoderModel.from_pretrained(checkpoints / "text_encoder")}
    for name, expert in (("transformer", "high"), ("transformer_2", "low")):
        parts[name] = architecture.expert()
        weights = torch.load(checkpoints / f"expert_{expert}.pt", map_location="cpu", weights_only=True)
        parts[name].load_state_dict(weights["expert"])
    # Rounded once here: what is stored is what every later comparison calls the original.
    for part in parts.values():
        part.half()
    architecture.pipeline(**parts).save_pretrained(folder, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/training"))
    parser.add_argument("--folder", type=Path, default=Path("data/wan-nano"))
    args = parser.parse_args()
    assemble(args.checkpoints, args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
