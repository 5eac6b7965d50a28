"""What the stages share: pictures to learn from, several GPUs, a time budget, checkpoints and loss curves."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from wanlab.nano import clips


def seed_everything(seed: int) -> np.random.Generator:
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


class Ranks:
    """One process per GPU under torchrun, or a single process; gradients are averaged in one flat tensor."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        )
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_parameters(self, module: torch.nn.Module) -> None:
        if self.world > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def agree(self, value: float) -> float:
        """The first rank's value, so that all ranks stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def close(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


class Pictures:
    """The training photographs and dead-leaves images on one device, and random clips of them.

    Dead leaves (opaque shapes with power-law sizes that hide one another; Lee, Mumford and Huang 2001) have the
    edge and scale statistics of photographs and never run out.
    """

    def __init__(self, device: torch.device, seed: int, dead_leaves: int) -> None:
        self.device = device
        self.generator = np.random.default_rng(seed)
        self.photographs = [self._on_device(clips.photograph(name)) for name in clips.TRAINING_PHOTOGRAPHS]
        noise = torch.Generator(device=device).manual_seed(seed)
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


class Budget:
    """Turns minutes into a number of steps once the speed is known, so that schedules end where they should."""

    def __init__(
        self, minutes: float | None, steps: int | None, ranks: Ranks, measure_after: int = 20
    ) -> None:
        self.minutes, self.steps, self.ranks, self.measure_after = minutes, steps, ranks, measure_after
        self._mark: tuple[int, float] | None = None

    def progress(self, step: int) -> float:
        """Fraction of the schedule that is done at `step`; 0 while the speed is still being measured."""
        if self.steps is None:
            if step == self.measure_after:
                self._mark = (step, time.monotonic())
            if step == 3 * self.measure_after:
                per_step = (time.monotonic() - self._mark[1]) / (step - self._mark[0])
                self.steps = int(self.ranks.agree(step + self.minutes * 60 / per_step))
            if self.steps is None:
                return 0.0
        return min(1.0, step / self.steps)


def cosine(progress: float, warmup: float = 0.02, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to the floor."""
    if progress < warmup:
        return max(0.05, progress / warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Average:
    """Exponential moving average of a module's parameters, ramped up so that early noise is forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.shadow = [p.detach().clone().float() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for parameter, average in zip(module.parameters(), self.shadow, strict=True):
            parameter.copy_(average)


class Curve:
    """A loss curve as JSON lines, and a line on the terminal now and then."""

    def __init__(self, path: Path, every: int = 100, enabled: bool = True) -> None:
        self.path, self.every, self.enabled = path, every, enabled
        self.start = time.monotonic()
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, total: int | None, **values: torch.Tensor | float) -> None:
        if not self.enabled or step % self.every:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self.start, 1)}
        row |= {name: round(float(value), 6) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"[{self.path.stem}] {step}/{total or '?'} "
            + " ".join(f"{k}={v:g}" for k, v in row.items() if k != "step"),
            flush=True,
        )


def save_atomically(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
