"""Stage 1: the text encoder learns to keep apart what captions can say. Seconds on a CPU.

Its token outputs are what the experts attend to, so it is trained until linear heads on the mean of the tokens
read the camera motion and the kind, the colour and the direction of every shape back without a mistake. Then it is
frozen.
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

ATTRIBUTES = (clips.SHAPES, clips.COLOURS, clips.DIRECTIONS)
"""Values of the attributes of a shape: kind, colour, direction."""


def draw(generator: np.random.Generator, count: int, most_objects: int = 1) -> tuple[list[str], torch.Tensor]:
    """Captions, and the class of each attribute that they name, `[count, 1 + 3 x most_objects]`.

    The first attribute is the camera motion; three of each shape follow, from front to back. Their class 0 is "no such
    shape". Shapes of one caption differ in colour, as those of clips do.
    """
    motions, captions, labels = list(architecture.CAMERA_MOTIONS), [], []
    for _ in range(count):
        motion = int(generator.integers(len(motions)))
        label = np.zeros((most_objects, len(ATTRIBUTES)), dtype=int)
        if generator.random() < 0.7:
            named = int(generator.integers(1, most_objects + 1)) if most_objects > 1 else 1
            for i, values in enumerate(ATTRIBUTES):
                label[:named, i] = generator.integers(1, len(values) + 1, named)
            if named > 1:
                label[:named, 1] = 1 + generator.choice(len(clips.COLOURS), named, replace=False)
        objects = [
            clips.MovingObject(*(values[i - 1] for values, i in zip(ATTRIBUTES, row, strict=True)), 0.0, 0.0)
            for row in label
            if row.any()
        ]
        captions.append(clips.caption(motions[motion], objects))
        labels.append([motion, *label.ravel()])
    return captions, torch.tensor(np.array(labels))


def train(steps: int, seed: int, most_objects: int = 1) -> tuple[torch.nn.Module, float]:
    """The trained encoder and the accuracy of the heads on captions drawn afterwards."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    tokenizer, encoder = architecture.tokenizer(), architecture.text_encoder()
    sizes = [len(architecture.CAMERA_MOTIONS)] + [1 + len(values) for values in ATTRIBUTES] * most_objects
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
        captions, labels = draw(generator, 64, most_objects)
        loss = sum(F.cross_entropy(out, labels[:, i]) for i, out in enumerate(logits(captions)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        captions, labels = draw(generator, 512, most_objects)
        right = torch.stack([out.argmax(-1) == labels[:, i] for i, out in enumerate(logits(captions))])
    return encoder, float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/training"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-objects", type=int, default=1, help="shapes that a caption may name, 1 to 3")
    args = parser.parse_args()
    encoder, accuracy = train(args.steps, args.seed, args.most_objects)
    encoder.save_pretrained(args.out / "text_encoder")
    architecture.tokenizer().save_pretrained(args.out / "tokenizer")
    print(f"attributes read back from {accuracy:.2%} of held-out captions")


if __name__ == "__main__":
    main()
