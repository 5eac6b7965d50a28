"""Stage 4: put the trained parts together as a diffusers pipeline folder in half precision."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import UMT5EncoderModel

from training import architecture
from training.loop import load_weights
from training.vae import read_vae
from wanlab.core.files import write_json


def assemble(
    checkpoints: Path, folder: Path, experts: str = "published", vae_source: Path | None = None
) -> None:
    """Write the pipeline folder from the checkpoints of the earlier stages.

    Args:
        experts: name of their architecture.
        vae_source: the VAE that the experts learned with; the checkpoints' own where None.
    """
    vae_source = vae_source or checkpoints / "vae_joint.pt"
    vae, mean, std = read_vae(vae_source)
    sharpened = vae_source.with_name("vae_decoder.pt")
    if sharpened.is_file():
        load_weights(vae, sharpened)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    parts = {"vae": vae, "text_encoder": UMT5EncoderModel.from_pretrained(checkpoints / "text_encoder")}
    for name, expert in (("transformer", "high"), ("transformer_2", "low")):
        parts[name] = architecture.expert(experts)
        load_weights(parts[name], checkpoints / f"expert_{expert}.pt")
    # Rounded once here: what is stored is what every later comparison calls the original.
    for part in parts.values():
        part.half()
    architecture.pipeline(**parts).save_pretrained(folder, safe_serialization=True)
    write_json(folder / "wanlab.json", {"defaults": architecture.defaults(experts)})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/training"))
    parser.add_argument("--folder", type=Path, default=Path("data/wan-nano"))
    parser.add_argument("--architecture", choices=architecture.EXPERTS, default="published")
    parser.add_argument(
        "--vae", type=Path, help="VAE of the experts: a checkpoint or a folder; vae_joint.pt if not given"
    )
    args = parser.parse_args(argv)
    assemble(args.checkpoints, args.folder, args.architecture, args.vae)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
