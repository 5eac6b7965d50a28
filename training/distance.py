"""How far a video is from the true one, as the loss of a stage: pixels, edges, texture, and LPIPS.

Used by the VAE on its reconstructions, and by the low-noise expert on what its latents decode to.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from training.loop import autocast
from wanlab.evaluate.lpips import load_backbone
from wanlab.evaluate.metrics import laplacian

PERCEPTUAL_BACKBONES = ("stlpips-alex", "lpips-squeeze")
"""Two, because a decoder that pleases one network alone leaves artefacts that the other sees."""


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 between horizontal and vertical differences at two scales: what blur destroys first."""
    difference = a - b
    loss = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    half = F.avg_pool3d(difference, (1, 2, 2))
    return loss + half.diff(dim=-1).abs().mean() + half.diff(dim=-2).abs().mean()


def roughness(video: torch.Tensor) -> torch.Tensor:
    """Root mean square of the Laplacian of the brightness in every square of 16 pixels: fine texture, wherever it lies."""
    grey = video.mean(dim=1).flatten(0, 1)[:, None]
    return (F.avg_pool2d(laplacian(grey).square(), 16) + 1e-5).sqrt()


def evenly(video: torch.Tensor, frames: int) -> torch.Tensor:
    """`frames` frames of every clip, evenly spread from a random start: `[B x frames, 3, H, W]`."""
    total = video.shape[2]
    spread = torch.arange(frames, device=video.device) + torch.rand(1, device=video.device)
    index = (spread * (total / frames)).long().clamp(max=total - 1)
    return video.index_select(2, index).transpose(1, 2).flatten(0, 1)


class Distance:
    """How far a reconstruction is from its clip: pixels, edges, texture, and LPIPS as several networks see it.

    Pixels count by their absolute and by their squared difference: only the squared one, which is what PSNR measures, cares
    more for a photograph full of detail than for a smooth one.
    """

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        names = args.backbone or PERCEPTUAL_BACKBONES
        self.networks = {name: load_backbone(name, device) for name in names}
        self.weights = {"square": args.square, "edges": args.edges, "texture": args.texture}
        self.perceptual, self.frames = args.perceptual, args.perceptual_frames

    def __call__(self, restored: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """The weighted sum, and its parts."""
        difference = restored - video
        parts = {
            "pixel": difference.abs().mean(),
            "square": difference.square().mean(),
            "edges": gradient_loss(restored, video),
            "texture": (roughness(restored) - roughness(video)).abs().mean(),
        }
        total = parts["pixel"] + sum(weight * parts[name] for name, weight in self.weights.items())
        both = evenly(torch.cat([restored.clamp(-1, 1), video]), self.frames)
        for name, network in self.networks.items():
            with autocast(video.device):
                parts[name] = network(*both.chunk(2)).mean()
            total = total + self.perceptual * parts[name]
        return total, parts


def add_distance(options: argparse.ArgumentParser) -> None:
    """Add the options that say what counts in a `Distance`."""
    options.add_argument("--square", type=float, default=0.0, help="weight of the mean squared difference")
    options.add_argument("--edges", type=float, default=0.5, help="weight of differences of neighbours")
    options.add_argument("--perceptual", type=float, default=0.5, help="weight of every LPIPS backbone")
    options.add_argument("--backbone", action="append", help=f"default: {' and '.join(PERCEPTUAL_BACKBONES)}")
    options.add_argument("--perceptual-frames", type=int, default=4, help="frames per clip that it looks at")
    options.add_argument(
        "--texture", type=float, default=0.5, help="weight of the roughness of small squares"
    )
