"""What the GPU stages share: ranks, a schedule by steps or by the clock, averaged weights, curves and checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from training import difference
from training.muon import Muon

SAVE_EVERY_S = 120.0


def parser(description: str, **defaults: object) -> argparse.ArgumentParser:
    """Command-line options that every stage has; `defaults` are those of the stage."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("outputs/training"), help="folder of the checkpoints")
    length = made.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the schedule by the clock")
    length.add_argument("--steps", type=int, help="length of the schedule in steps")
    made.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of this stage was"
    )
    made.add_argument("--start", type=Path, help="begin with the weights of this checkpoint")
    made.add_argument("--batch", type=int, help="clips per step over all GPUs")
    made.add_argument("--lr", type=float, help="highest learning rate")
    made.add_argument(
        "--muon", type=float, help="highest learning rate of the blocks' matrices by Muon; AdamW if not given"
    )
    made.add_argument("--log-every", type=int, help="steps between two rows of the loss curve")
    made.add_argument("--dead-leaves", type=int, default=96, help="synthetic pictures; slow on a CPU")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    made.set_defaults(**defaults)
    return made


def autocast(device: torch.device):
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def channels_last(module: torch.nn.Module) -> None:
    """Weights in the layout that cuDNN's half-precision convolutions read."""
    for p in module.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.dim() == 4 and p.shape[-1] > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def dense(video: torch.Tensor) -> torch.Tensor:
    """In the layout that cuDNN's half-precision convolutions read, where there is a GPU."""
    return video.contiguous(memory_format=torch.channels_last_3d) if video.is_cuda else video


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
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
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

    @contextmanager
    def in_place_of(self, module: torch.nn.Module) -> Iterator[None]:
        """The module holds the averaged weights inside the block, and its own again behind it."""
        parameters = list(module.parameters())
        kept = [p.detach().clone() for p in parameters]
        try:
            _overwrite(parameters, self.shadow)
            yield
        finally:
            _overwrite(parameters, kept)


@torch.no_grad()
def _overwrite(parameters: Iterable[torch.nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def optimizers(
    module: torch.nn.Module, args: argparse.Namespace, weight_decay: float, fused: bool
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimisers of a module's parameters that want gradients, each with its highest learning rate.

    AdamW steps all of them, or, where Muon's rate is given, all but the matrices of a transformer's blocks.
    """
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for name, p in wanted.items() if args.muon and name.startswith("blocks.") and p.dim() == 2]
    others = [p for p in wanted.values() if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=fused), args.lr)
    ]
    if matrices:
        made.append((Muon(matrices, lr=args.muon, weight_decay=weight_decay), args.muon))
    return made


class Loop:
    """Trains the parameters of a module that want gradients, to the end of its schedule or from an interruption.

    Beside `NAME.pt`, the averaged weights that later stages read, it keeps `NAME.resume.pt` with everything an
    interrupted run needs (live weights, optimiser, average, time spent) and `NAME.jsonl`, the loss curve.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        args: argparse.Namespace,
        ranks: Ranks,
        *,
        average_decay: float,
        weight_decay: float,
    ) -> None:
        self.name, self.module, self.args, self.ranks = name, module, args, ranks
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizers = optimizers(module, args, weight_decay, fused=ranks.device.type == "cuda")
        self.average = Average(module, average_decay)
        self.step, self.seconds = 0, 0.0
        if args.resume:
            self._restore()
        self._cut_curve()

    @property
    def weights_path(self) -> Path:
        return self.args.out / f"{self.name}.pt"

    @property
    def curve_path(self) -> Path:
        return self.args.out / f"{self.name}.jsonl"

    @property
    def resume_path(self) -> Path:
        return self.args.out / f"{self.name}.resume.pt"

    @property
    def progress(self) -> float:
        """Fraction of the schedule that is done."""
        if self.args.steps:
            return min(1.0, self.step / self.args.steps)
        return min(1.0, self.seconds / (60 * self.args.minutes))

    def run(
        self,
        losses: Callable[[float], tuple[torch.Tensor, dict[str, torch.Tensor | float]]],
        *,
        warm: tuple[float, ...] = (0.0,),
    ) -> None:
        """Step until the schedule ends.

        Args:
            losses: progress to the loss of one batch and its parts for the curve.
            warm: points of the schedule whose graphs are compiled before the clock starts.
        """
        for point in warm if self.args.compile else ():
            losses(point)[0].backward()
        total = self.args.steps or round(60 * self.args.minutes)
        unit = "step" if self.args.steps else "s"
        with tqdm(
            total=total, unit=unit, desc=self.name, disable=None if self.ranks.is_first else True
        ) as bar:
            before, saved = time.monotonic(), self.seconds
            bar.update(int(self.step if self.args.steps else self.seconds))
            while (progress := self.progress) < 1.0:
                self._one_step(losses, progress)
                now = time.monotonic()
                self.seconds = self.ranks.agree(self.seconds + now - before)
                before = now
                self.step += 1
                bar.update(int(self.step if self.args.steps else self.seconds) - bar.n)
                if self.seconds - saved > SAVE_EVERY_S:
                    saved = self.seconds
                    self.save()
        self.save()

    def _one_step(self, losses: Callable, progress: float) -> None:
        for optimizer, highest in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * cosine(progress)
            optimizer.zero_grad(set_to_none=True)
        loss, parts = losses(progress)
        loss.backward()
        self.ranks.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.average.update(self.module)
        if self.ranks.is_first and self.step % self.args.log_every == 0:
            self._log(loss, parts)

    def _log(self, loss: torch.Tensor, parts: dict[str, torch.Tensor | float]) -> None:
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {
            name: round(float(torch.as_tensor(value).detach()), 6)
            for name, value in {"loss": loss, **parts}.items()
        }
        self.args.out.mkdir(parents=True, exist_ok=True)
        with self.curve_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(f"[{self.name}] {self.progress:4.0%} {row}")

    def _cut_curve(self) -> None:
        """Forget the rows of steps that are still to come: of an older run, or between checkpoint and interruption."""
        if not (self.ranks.is_first and self.curve_path.is_file()):
            return
        rows = self.curve_path.read_text().splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] < self.step]
        self.curve_path.write_text("".join(kept))

    def save(self, **facts: torch.Tensor) -> None:
        """Write both checkpoints; `facts` go beside the averaged weights."""
        if not self.ranks.is_first:
            return
        with self.average.in_place_of(self.module):
            weights = _on_cpu(self.module.state_dict())
        _save({"weights": weights, "steps": self.step, **facts}, self.weights_path)
        _save(
            {
                "weights": _on_cpu(self.module.state_dict()),
                "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
                "average": self.average.shadow,
                "steps": self.step,
                "seconds": self.seconds,
            },
            self.resume_path,
        )

    def _restore(self) -> None:
        if not self.resume_path.is_file():
            raise SystemExit(f"nothing to resume: {self.resume_path} is missing; leave --resume out")
        state = torch.load(self.resume_path, map_location=self.ranks.device, weights_only=True)
        self.module.load_state_dict(state["weights"])
        for (optimizer, _), kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.average.shadow, self.average.steps = state["average"], state["steps"]
        self.step, self.seconds = state["steps"], state["seconds"]


def load_weights(
    module: torch.nn.Module,
    path: Path,
    fit: Callable[[dict, torch.nn.Module], dict] = lambda weights, module: weights,
) -> dict:
    """Read the averaged weights of a checkpoint into a module; returns the checkpoint.

    Args:
        fit: makes weights of the module's shapes of those in the checkpoint.
    """
    if not path.is_file():
        raise SystemExit(f"no checkpoint {path}: run the stage before it first, see training/README.md")
    if path.suffix == ".safetensors":  # of a pipeline folder
        state: dict = {"weights": {name: tensor.float() for name, tensor in load_file(path).items()}}
    elif path.suffix == ".npz":
        state = difference.read(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(fit(state["weights"], module))
    return state


def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _save(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
