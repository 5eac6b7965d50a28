"""Pictures to learn from: the training photographs, synthetic dead leaves, and random clips of both."""

from __future__ import annotations

import math

import numpy as np
import torch

from wanlab.heldout import clips


class Pictures:
    """The training photographs and dead-leaves images on one device, and random clips of them.

    Dead leaves (opaque shapes with power-law sizes that hide one another; Lee, Mumford and Huang 2001) have the
    edge and scale statistics of photographs and never run out.
    """

    def __init__(self, device: torch.device, seed: int | tuple[int, ...], dead_leaves: int) -> None:
        self.device = device
        self.generator = np.random.default_rng(seed)
        self.photographs = [self._on_device(clips.photograph(name)) for name in clips.TRAINING_PHOTOGRAPHS]
        noise = torch.Generator(device=device).manual_seed(int(self.generator.integers(2**31)))
        self.leaves = list(dead_leaves_images(dead_leaves, noise, device)) if dead_leaves else []

    def _on_device(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device)

    def _augmented(self) -> torch.Tensor:
        """A picture, flipped, turned and recoloured at random: `[3, H, W]` in [0, 1]."""
        g = self.generator
        if not self.leaves or g.random() < 0.65:
            image = self.photographs[g.integers(len(self.photographs))]
        else:
            image = self.leaves[g.integers(len(self.leaves))]
        if g.random() < 0.5:
            image = image.flip(-1)
        if g.random() < 0.25:
            image = image.flip(-2)
        if g.random() < 0.25:
            image = image.transpose(-1, -2)
        if g.random() < 0.6:
            image = image[torch.as_tensor(g.permutation(3), device=self.device)]
        gain = torch.as_tensor(g.uniform(0.75, 1.2, (3, 1, 1)), dtype=torch.float32, device=self.device)
        offset = torch.as_tensor(g.uniform(-0.12, 0.08, (3, 1, 1)), dtype=torch.float32, device=self.device)
        return ((image * gain + offset).clamp(0, 1) ** float(g.uniform(0.75, 1.35))).clamp(0, 1)

    def batch(self, count: int, frames: int, per_picture: int = 2) -> tuple[torch.Tensor, list[str]]:
        """Clips `[B, 3, T, 128, 192]` in [-1, 1] and their captions."""
        videos, captions = [], []
        while len(captions) < count:
            image = self._augmented()
            drawn = [
                clips.draw_clip(tuple(image.shape[1:]), self.generator)
                for _ in range(min(per_picture, count - len(captions)))
            ]
            videos.append(clips.render(image, drawn, frames=frames))
            captions += [clip.caption for clip in drawn]
        return torch.cat(videos) * 2 - 1, captions


def dead_leaves_images(
    count: int, generator: torch.Generator, device: torch.device, size: int = 512, leaves: int = 400
) -> torch.Tensor:
    """`[count, 3, size, size]` in [0, 1]: ellipses and rectangles, shaded and textured, largest first by luck."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    texture = torch.zeros(count, 1, size, size, device=device)
    for cells in (16, 64, 256):
        coarse = torch.randn(count, 1, cells, cells, generator=generator, device=device)
        texture += (
            torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * (4.0 / cells) ** 0.5
        )
    y, x = torch.meshgrid(
        torch.arange(size, device=device).float(), torch.arange(size, device=device).float(), indexing="ij"
    )
    image = uniform(count, 3, 1, 1).expand(-1, -1, size, size).clone()
    for _ in range(leaves):
        # Radius density ~ r^-3 between 8 and 200 pixels, by inversion.
        radius = (1 / (1 / 200**2 + uniform(count, 1, 1) * (1 / 8**2 - 1 / 200**2))).sqrt()
        angle, squash = uniform(count, 1, 1, high=math.pi), uniform(count, 1, 1, low=0.3)
        dx, dy = x - uniform(count, 1, 1, high=size), y - uniform(count, 1, 1, high=size)
        u = dx * angle.cos() + dy * angle.sin()
        v = (dy * angle.cos() - dx * angle.sin()) / squash
        square = uniform(count, 1, 1) < 0.4
        distance = torch.where(square, torch.maximum(u.abs(), v.abs()), torch.hypot(u, v)) - radius
        alpha = (0.5 - distance).clamp(0, 1)[:, None]
        shade = uniform(count, 1, 1, 1, low=-0.3, high=0.3) * (u / radius)[:, None]
        shade = shade + uniform(count, 1, 1, 1, high=0.25) * texture
        image = image * (1 - alpha) + (uniform(count, 3, 1, 1) + shade).clamp(0, 1) * alpha
    return image
