"""Stage 1: the text encoder learns to keep apart what captions can say. Seconds on a CPU.

Its token outputs are what the experts attend to, so it is trained until linear heads on the mean of the tokens
read the camera motion, the shape, the colour and the direction back without a mistake. Then it is frozen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from training import architecture
from wanlab.heldout import clips


def draw(generator: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Captions and the class of each of their four attributes; class 0 of the last three is "no object"."""
    motions, captions, labels = list(architecture.CAMERA_MOTIONS), [], []
    for _ in range(count):
        motion = int(generator.integers(len(motions)))
        moving, label = (), (0, 0, 0)
        if generator.random() < 0.7:
            label = tuple(int(generator.integers(1, n + 1)) for n in (3, 4, 4))
            shape, colour, direction = (
                names[i - 1]
                for names, i in zip(
                    (architecture.SHAPES, architecture.COLOURS, architecture.DIRECTIONS), label, strict=True
                )
            )
            moving = (clips.MovingObject(shape, colour, direction, 0.0, 0.0),)
        captions.append(clips.caption(motions[motion], moving))
        labels.append((motion, *label))
    return captions, torch.tensor(labels)


def train(steps: int, seed: int) -> tuple[torch.nn.Module, float]:
    """The trained encoder and the accuracy of the heads on captions drawn afterwards."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    tokenizer, encoder = architecture.tokenizer(), architecture.text_encoder()
    sizes = [len(architecture.CAMERA_MOTIONS), 4, 5, 5]
    heads = torch.nn.ModuleList([torch.nn.Linear(architecture.TEXT_DIM, n) for n in sizes])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)

    def logits(captions: list[str]) -> list[torch.Tensor]:
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return [head(pooled) for head in heads]

    for step in tqdm(range(steps), desc="text encoder"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        captions, labels = draw(generator, 64)
        loss = sum(F.cross_entropy(out, labels[:, i]) for i, out in enumerate(logits(captions)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        captions, labels = draw(generator, 512)
        right = torch.stack([out.argmax(-1) == labels[:, i] for i, out in enumerate(logits(captions))])
    return encoder, float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/training"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder, accuracy = train(args.steps, args.seed)
    encoder.save_pretrained(args.out / "text_encoder")
    architecture.tokenizer().save_pretrained(args.out / "tokenizer")
    print(f"attributes read back from {accuracy:.2%} of held-out captions")


if __name__ == "__main__":
    main()
