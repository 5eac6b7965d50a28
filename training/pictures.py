"""Pictures to learn from: the training photographs, synthetic dead leaves, and random clips of both."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from training.photographs import load
from wanlab.heldout import clips
from wanlab.heldout.textures import texture

PHOTOGRAPH_SHARE = 0.65
"""Of the pictures that are no texture; the others are dead leaves."""

SHAPES = (0.4, 0.3, 0.2, 0.1)
"""Weights of clips with 0, 1, 2 and 3 shapes."""

TEXTURE_PX = 512

LARGEST_SCALE = 2.0
"""Pixels of a photograph of one's own per pixel of the clip, at most."""


class Pictures:
    """Photographs, dead-leaves images and textures on one device, and random clips of them.

    Dead leaves (opaque shapes with power-law sizes that hide one another; Lee, Mumford and Huang 2001) have the
    edge and scale statistics of photographs and never run out.

    Args:
        device: where the pictures are kept and clips are rendered.
        seed: of all that is random.
        dead_leaves: number of dead-leaves images.
        photographs: pictures to learn from, uint8 `[H, W, 3]`; those of the scikit-image package where None. Clips show
            them at half their scale at the smallest, as far as they are large enough.
        textures: share of the pictures that are textures; each is a new one.
        objects: weights of clips with 0, 1, 2 and 3 shapes; none or one, each for half of the clips, where None.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int | tuple[int, ...],
        dead_leaves: int,
        *,
        photographs: Sequence[np.ndarray] | None = None,
        textures: float = 0.0,
        objects: Sequence[float] | None = None,
    ) -> None:
        self.device = device
        self.generator = np.random.default_rng(seed)
        self.textures, self.shrinks = textures, photographs is not None
        if photographs is None:
            photographs = [clips.photograph(name) for name in clips.TRAINING_PHOTOGRAPHS]
        self.photographs = [self._on_device(image) for image in photographs]
        self.objects = None if objects is None else np.array(objects) / sum(objects)
        noise = torch.Generator(device=device).manual_seed(int(self.generator.integers(2**31)))
        self.leaves = list(dead_leaves_images(dead_leaves, noise, device)) if dead_leaves else []

    def _on_device(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device)

    def _picture(self, size: tuple[int, int]) -> torch.Tensor:
        """A picture for a clip whose camera sees `size` (height, width) pixels in all: `[3, H, W]` in [0, 1]."""
        g = self.generator
        if self.textures and g.random() < self.textures:
            # Square, for it may be turned.
            return texture(g, (max(TEXTURE_PX, *size),) * 2, self.device)
        if self.leaves and g.random() >= PHOTOGRAPH_SHARE:
            return self.leaves[g.integers(len(self.leaves))]
        image = self.photographs[g.integers(len(self.photographs))]
        if image.dtype == torch.uint8:
            image = image.float() / 255
        return self._shrunk(image, size) if self.shrinks else image

    def _shrunk(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The picture at a random smaller scale that still has `size` pixels."""
        room = min(have / need for have, need in zip(image.shape[1:], size, strict=True))
        factor = float(self.generator.uniform(1.0, min(max(room, 1.0), LARGEST_SCALE)))
        to = [round(extent / factor) for extent in image.shape[1:]]
        return F.interpolate(image[None], size=to, mode="bilinear", antialias=True)[0].clamp(0, 1)

    def _augmented(self, size: tuple[int, int]) -> torch.Tensor:
        """A picture, flipped, turned and recoloured at random: `[3, H, W]` in [0, 1]."""
        g = self.generator
        image = self._picture(size)
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

    def batch(
        self,
        count: int,
        frames: int | None = None,
        height: int = clips.HEIGHT,
        width: int = clips.WIDTH,
        *,
        per_picture: int = 2,
    ) -> tuple[torch.Tensor, list[str]]:
        """Clips `[count, 3, frames, height, width]` in [-1, 1], and their captions.

        Clips are drawn for the natural number of frames of their height, which is also the default; fewer frames are the
        beginning of such clips.

        Args:
            per_picture: clips that share one picture; fewer are more varied, more are quicker.
        """
        frames = frames or clips.natural_frames(height)
        whole = max(frames, clips.natural_frames(height))
        pan = round(clips.PAN_PX_PER_FRAME * (whole - 1))
        images, drawn = [], []
        for i in range(count):
            if i % per_picture == 0:
                image = self._augmented((height + pan, width + pan))
            images.append(image)
            drawn.append(self._clip(tuple(image.shape[1:]), height, width, whole))
        video = clips.render(images, drawn, frames=frames)
        return video * 2 - 1, [clip.caption for clip in drawn]

    def _clip(self, size_px: tuple[int, int], height: int, width: int, frames: int) -> clips.Clip:
        objects = (
            None if self.objects is None else int(self.generator.choice(len(self.objects), p=self.objects))
        )
        return clips.draw_clip(
            size_px, self.generator, objects=objects, height=height, width=width, frames=frames
        )


def add_pictures(options: argparse.ArgumentParser, textures: float) -> None:
    """Add the options that say which pictures a stage learns from; `textures` is the default of theirs."""
    options.add_argument(
        "--photographs",
        type=Path,
        help="folder of training.photographs, shown with 0 to 3 shapes; scikit-image's with 0 or 1 if not given",
    )
    options.add_argument(
        "--textures", type=float, default=textures, help="share of pictures that are textures"
    )


def pictures_of(args: argparse.Namespace, device: torch.device, seed: tuple[int, ...]) -> Pictures:
    """The pictures that the command line asks for."""
    photographs = load(args.photographs) if args.photographs else None
    objects = SHAPES if args.photographs else None
    return Pictures(
        device, seed, args.dead_leaves, photographs=photographs, textures=args.textures, objects=objects
    )


def dead_leaves_images(
    count: int, generator: torch.Generator, device: torch.device, size: int = 512, leaves: int = 400
) -> torch.Tensor:
    """`[count, 3, size, size]` in [0, 1]: ellipses and rectangles, shaded and textured, largest first by luck."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    texture = torch.zeros(count, 1, size, size, device=device)
    for cells in (16, 64, 256):
        coarse = torch.randn(count, 1, cells, cells, generator=generator, device=device)
        texture += F.interpolate(coarse, size=(size, size), mode="bicubic") * (4.0 / cells) ** 0.5
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
