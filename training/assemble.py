"""Stage 4: put the trained parts together as a diffusers pipeline folder in half precision."""

from __future__ import annotations

import argparse
from pathlib import Path

from training import architecture
from training.loop import load_weights
from wanlab.core.files import write_json


def assemble(checkpoints: Path, folder: Path) -> None:
    """Write the pipeline folder from the checkpoints of the earlier stages."""
    from transformers import UMT5EncoderModel

    vae = architecture.vae()
    joint, sharpened = load_weights(vae, checkpoints / "vae_joint.pt"), checkpoints / "vae_decoder.pt"
    if sharpened.is_file():
        load_weights(vae, sharpened)
    vae.register_to_config(latents_mean=joint["mean"].tolist(), latents_std=joint["std"].tolist())
    parts = {"vae": vae, "text_encoder": UMT5EncoderModel.from_pretrained(checkpoints / "text_encoder")}
    for name, expert in (("transformer", "high"), ("transformer_2", "low")):
        parts[name] = architecture.expert()
        load_weights(parts[name], checkpoints / f"expert_{expert}.pt")
    # Rounded once here: what is stored is what every later comparison calls the original.
    for part in parts.values():
        part.half()
    architecture.pipeline(**parts).save_pretrained(folder, safe_serialization=True)
    write_json(folder / "wanlab.json", {"defaults": architecture.defaults()})


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
