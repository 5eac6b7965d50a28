"""Stage 2: the VAE, first as a whole, then the decoder alone against a frozen encoder.

    torchrun --nproc-per-node 1 -m training.vae joint --minutes 22 --batch 96
    torchrun --nproc-per-node 1 -m training.vae decoder --minutes 8 --batch 12

Joint training spends its first part on 5-frame clips, which teach the spatial code at a third of the cost, and the
rest on whole clips. The decoder stage sharpens: latents stay what they are, so experts trained meanwhile stay valid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from training.common import Average, Budget, Curve, Pictures, Ranks, cosine, save_atomically, seed_everything
from wanlab.convert.vae_sequence import decode_video, encode_moments, whole_clip_resampling
from wanlab.nano import architecture, clips

SHORT_FRAMES = 5
KL_WEIGHT = 3e-5
GRADIENT_WEIGHT = 0.5


class WholeClip(torch.nn.Module):
    """Video `[B, 3, T, H, W]` to reconstruction and moments; one graph for the compiler."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, log_variance = encode_moments(self.vae, video).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        latents = mean + (0.5 * log_variance).exp() * noise
        return decode_video(self.vae, latents).float(), mean, log_variance


class DecodeClip(torch.nn.Module):
    """Latents `[B, C, T', H', W']` to video."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_video(self.vae, latents).float()


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 between horizontal and vertical differences at two scales: what blur destroys first."""
    difference = a - b
    loss = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    half = F.avg_pool3d(difference, (1, 2, 2))
    return loss + half.diff(dim=-1).abs().mean() + half.diff(dim=-2).abs().mean()


def perceptual_network(device: torch.device):
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022), AlexNet; its weights ship with the package."""
    from stlpips_pytorch import stlpips

    network = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False).to(device).eval()
    return network.requires_grad_(False)


def perceptual_loss(network, a: torch.Tensor, b: torch.Tensor, frames: int) -> torch.Tensor:
    """Mean over `frames` frames of every clip, drawn evenly with a random start."""
    total = a.shape[2]
    start = int(torch.randint(0, max(1, total // frames), (1,)))
    index = torch.arange(start, total, max(1, total // frames))[:frames].to(a.device)
    a, b = (x.index_select(2, index).transpose(1, 2).flatten(0, 1) for x in (a, b))
    return network(a.clamp(-1, 1), b).mean()


def channels_last(module: torch.nn.Module) -> None:
    """Weights in the layout that cuDNN's half-precision convolutions read."""
    for p in module.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.dim() == 4 and p.shape[-1] > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def held_out_psnr(vae, device: torch.device, seed: int = 1234, per_photograph: int = 12) -> float:
    """Mean PSNR in dB over whole reconstructed clips of the held-out photographs."""
    import numpy as np

    generator, scores = np.random.default_rng(seed), []
    for name in clips.HELD_OUT_PHOTOGRAPHS:
        image = clips.photograph(name)
        drawn = [clips.draw_clip(image.shape[:2], generator) for _ in range(per_photograph)]
        picture = torch.from_numpy(image).permute(2, 0, 1).to(device)
        for clip in drawn:
            video = clips.render(picture, [clip]) * 2 - 1
            restored = decode_video(vae, encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS])
            error = ((restored.float().clamp(-1, 1) - video) / 2).square().mean()
            scores.append(float(-10 * error.log10()))
    return sum(scores) / len(scores)


@torch.no_grad()
def latent_statistics(
    vae, pictures: Pictures, count: int, chunk: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every latent channel over clips, `[C]` each: what the pipeline normalises by."""
    latents = []
    for _ in range(0, count, chunk):
        video, _ = pictures.batch(min(chunk, count), architecture.FRAMES)
        with autocast(pictures.device):
            latents.append(encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS].float().cpu())
    latents = torch.cat(latents)
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def setup(args, ranks: Ranks):
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    seed_everything(args.seed)
    vae = architecture.vae()
    start = args.resume or (args.out / "vae_joint.pt" if args.stage == "decoder" else None)
    if start is not None:
        vae.load_state_dict(torch.load(start, map_location="cpu", weights_only=True)["vae"])
    vae.to(ranks.device).train()
    ranks.share_parameters(vae)
    if ranks.device.type == "cuda":
        channels_last(vae)
    torch.manual_seed(args.seed + ranks.rank)
    return vae, Pictures(ranks.device, args.seed * 1000 + ranks.rank, args.dead_leaves)


def autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def save(vae, average: Average, path: Path, **facts) -> None:
    """The averaged weights, leaving the ones in training untouched."""
    kept = [p.detach().clone() for p in vae.parameters()]
    average.copy_to(vae)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in vae.state_dict().items()}
    save_atomically({"vae": state, **facts}, path)
    with torch.no_grad():
        for parameter, value in zip(vae.parameters(), kept, strict=True):
            parameter.copy_(value)


def train_joint(args, ranks: Ranks) -> None:
    vae, pictures = setup(args, ranks)
    device = ranks.device
    model = WholeClip(vae)
    forward = torch.compile(model) if args.compile else model
    network = perceptual_network(device)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=device.type == "cuda"
    )
    average = Average(vae, 0.998)
    per_rank = max(1, args.batch // ranks.world)
    curve = Curve(args.out / "vae_joint.jsonl", args.log_every, ranks.is_first)
    step, done = 0, 0.0
    phases = [
        (SHORT_FRAMES, per_rank, args.short_share),
        (architecture.FRAMES, max(1, per_rank // 3), 1.0),
    ]
    with whole_clip_resampling(vae):
        for frames, batch, until in phases:
            budget = Budget(
                args.minutes and args.minutes * (until - done),
                args.steps and int(args.steps * (until - done)),
                ranks,
            )
            bar, local, progress = tqdm(desc=f"VAE, {frames} frames", disable=not ranks.is_first), 0, 0.0
            while progress < 1.0:
                progress = budget.progress(local)
                overall = done + (until - done) * progress
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * cosine(overall)
                video, _ = pictures.batch(batch, frames)
                if device.type == "cuda":
                    video = video.contiguous(memory_format=torch.channels_last_3d)
                size = (1 + (frames - 1) // 4, video.shape[3] // 8, video.shape[4] // 8)
                noise = torch.randn(len(video), architecture.LATENT_CHANNELS, *size, device=device)
                with autocast(device):
                    restored, mean, log_variance = forward(video, noise)
                    perceptual = perceptual_loss(network, restored, video, args.perceptual_frames)
                pixel, edges = (restored - video).abs().mean(), gradient_loss(restored, video)
                kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
                loss = pixel + GRADIENT_WEIGHT * edges + KL_WEIGHT * kl + args.perceptual * perceptual
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                ranks.average_gradients(parameters)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                average.update(vae)
                curve.log(
                    step, budget.steps, pixel=pixel, edges=edges, perceptual=perceptual, kl=kl, frames=frames
                )
                step, local = step + 1, local + 1
                bar.update()
                if ranks.is_first and local % 1000 == 0:
                    save(vae, average, args.out / "vae_joint.pt", steps=step)
            bar.close()
            done = until
        if ranks.is_first:
            average.copy_to(vae)
            mean, std = latent_statistics(vae.eval(), pictures, args.statistics_clips)
            save(vae, average, args.out / "vae_joint.pt", steps=step, mean=mean, std=std)
            print(f"{step} steps, held-out PSNR {held_out_psnr(vae.eval(), device):.2f} dB", flush=True)
    ranks.close()


def train_decoder(args, ranks: Ranks) -> None:
    vae, pictures = setup(args, ranks)
    device = ranks.device
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    model = DecodeClip(vae)
    forward = torch.compile(model) if args.compile else model
    network = perceptual_network(device)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=device.type == "cuda"
    )
    average = Average(vae, 0.998)
    budget = Budget(args.minutes, args.steps, ranks)
    curve = Curve(args.out / "vae_decoder.jsonl", args.log_every, ranks.is_first)
    batch, step, progress = max(1, args.batch // ranks.world), 0, 0.0
    bar = tqdm(desc="VAE decoder", disable=not ranks.is_first)
    with whole_clip_resampling(vae):
        while progress < 1.0:
            progress = budget.progress(step)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * cosine(progress)
            video, _ = pictures.batch(batch, architecture.FRAMES)
            with torch.no_grad(), autocast(device):
                latents = encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS].float()
                # Generated latents are a little off; a decoder that has seen such errors does not amplify them.
                spread = latents.std(dim=(0, 2, 3, 4), keepdim=True)
                level = args.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, device=device)
                latents = latents + torch.randn_like(latents) * spread * level
            with autocast(device):
                restored = forward(latents)
                perceptual = perceptual_loss(network, restored, video, args.perceptual_frames)
            pixel, edges = (restored - video).abs().mean(), gradient_loss(restored, video)
            loss = pixel + GRADIENT_WEIGHT * edges + args.perceptual * perceptual
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update(vae)
            curve.log(step, budget.steps, pixel=pixel, edges=edges, perceptual=perceptual)
            step += 1
            bar.update()
            if ranks.is_first and step % 1000 == 0:
                save(vae, average, args.out / "vae_decoder.pt", steps=step)
        if ranks.is_first:
            average.copy_to(vae)
            save(vae, average, args.out / "vae_decoder.pt", steps=step)
            print(f"{step} steps, held-out PSNR {held_out_psnr(vae.eval(), device):.2f} dB", flush=True)
    ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["joint", "decoder"])
    parser.add_argument("--out", type=Path, default=Path("outputs/training"))
    parser.add_argument("--resume", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--minutes", type=float, help="length of the schedule; the speed decides the steps")
    parser.add_argument("--steps", type=int, help="length of the schedule in steps, instead of --minutes")
    parser.add_argument("--batch", type=int, default=96, help="short clips per step over all GPUs")
    parser.add_argument(
        "--short-share", type=float, default=0.5, help="share of the schedule on 5-frame clips"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--perceptual", type=float, default=0.15, help="weight of the perceptual loss")
    parser.add_argument("--perceptual-frames", type=int, default=2, help="frames per clip that it looks at")
    parser.add_argument(
        "--latent-noise", type=float, default=0.15, help="decoder stage: largest relative noise"
    )
    parser.add_argument(
        "--statistics-clips", type=int, default=1024, help="clips behind the latents' mean and spread"
    )
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--dead-leaves", type=int, default=96, help="how many synthetic pictures; slow on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if (args.minutes is None) == (args.steps is None):
        parser.error("give either --minutes or --steps")
    ranks = Ranks()
    (train_joint if args.stage == "joint" else train_decoder)(args, ranks)


if __name__ == "__main__":
    main()
