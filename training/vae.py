"""Stage 2: the VAE, first as a whole, then the decoder alone against a frozen encoder.

    torchrun --nproc-per-node 2 -m training.vae joint --minutes 7
    torchrun --nproc-per-node 2 -m training.vae decoder --minutes 3.9 --batch 16 --lr 0.0007 --perceptual 1 --seed 5

Joint training spends its first part on 5-frame clips, which teach the spatial code at a third of the cost, and the
rest on whole clips. Batches are small because many steps teach more than large ones. The decoder stage sharpens:
latents stay what they are, so experts trained meanwhile stay valid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training import architecture
from training.loop import Loop, Ranks, autocast, load_weights, parser
from training.pictures import Pictures
from wanlab.evaluate.lpips import load_backbone
from wanlab.export.friendly import decode_video, encode_moments, whole_clip_resampling
from wanlab.heldout import clips

SHORT_FRAMES = 5
KL_WEIGHT = 3e-5
GRADIENT_WEIGHT = 0.5
PERCEPTUAL_BACKBONES = ("stlpips-alex", "lpips-squeeze")
"""Two, because a decoder that pleases one network alone leaves artefacts that the other sees."""


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


def evenly(video: torch.Tensor, frames: int) -> torch.Tensor:
    """`frames` frames of every clip, evenly spread from a random start: `[B x frames, 3, H, W]`."""
    total = video.shape[2]
    spread = torch.arange(frames, device=video.device) + torch.rand(1, device=video.device)
    index = (spread * (total / frames)).long().clamp(max=total - 1)
    return video.index_select(2, index).transpose(1, 2).flatten(0, 1)


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
        video, _ = pictures.batch(min(chunk, count), clips.FRAMES)
        with autocast(pictures.device):
            latents.append(encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS].float().cpu())
    latents = torch.cat(latents)
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


class Distance:
    """How far a reconstruction is from its clip: pixels, edges, and LPIPS as several networks see it."""

    def __init__(self, device: torch.device, backbones: list[str], weight: float, frames: int) -> None:
        self.networks = {name: load_backbone(name, device) for name in backbones}
        self.weight, self.frames = weight, frames

    def __call__(self, restored: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """The weighted sum, and its parts."""
        parts = {"pixel": (restored - video).abs().mean(), "edges": gradient_loss(restored, video)}
        total = parts["pixel"] + GRADIENT_WEIGHT * parts["edges"]
        both = evenly(torch.cat([restored.clamp(-1, 1), video]), self.frames)
        for name, network in self.networks.items():
            with autocast(video.device):
                parts[name] = network(*both.chunk(2)).mean()
            total = total + self.weight * parts[name]
        return total, parts


def train_joint(vae, args, ranks: Ranks, distance: Distance) -> None:
    loop = Loop("vae_joint", vae, args, ranks, average_decay=0.998, weight_decay=1e-4)
    pictures = Pictures(ranks.device, (args.seed, ranks.rank, loop.step), args.dead_leaves)
    model = WholeClip(vae)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    batch = max(1, args.batch // ranks.world)

    def losses(progress: float) -> tuple[torch.Tensor, dict]:
        short = progress < args.short_share
        frames = SHORT_FRAMES if short else clips.FRAMES
        video = dense(pictures.batch(batch if short else max(1, batch // 3), frames)[0])
        size = (1 + (frames - 1) // 4, video.shape[3] // 8, video.shape[4] // 8)
        noise = torch.randn(len(video), architecture.LATENT_CHANNELS, *size, device=video.device)
        with autocast(video.device):
            restored, mean, log_variance = forward(video, noise)
        total, parts = distance(restored, video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return total + KL_WEIGHT * kl, {**parts, "kl": kl, "frames": frames}

    loop.run(losses, warm=(0.0, 1.0) if args.short_share else (1.0,))
    if ranks.is_first:
        with loop.average.in_place_of(vae):
            mean, std = latent_statistics(vae.eval(), pictures, args.statistics_clips)
        loop.save(mean=mean, std=std)
        report(vae, loop)


def train_decoder(vae, args, ranks: Ranks, distance: Distance) -> None:
    for frozen in (vae.encoder, vae.quant_conv):
        frozen.requires_grad_(False)
    loop = Loop("vae_decoder", vae, args, ranks, average_decay=0.998, weight_decay=1e-4)
    pictures = Pictures(ranks.device, (args.seed, ranks.rank, loop.step), args.dead_leaves)
    model = DecodeClip(vae)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    batch = max(1, args.batch // ranks.world)

    def losses(progress: float) -> tuple[torch.Tensor, dict]:
        video = dense(pictures.batch(batch, clips.FRAMES)[0])
        with torch.no_grad(), autocast(video.device):
            latents = encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS].float()
            # Experts make small errors; a decoder that has seen such errors does not amplify them.
            spread = latents.std(dim=(0, 2, 3, 4), keepdim=True)
            level = args.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, device=video.device)
            latents = latents + torch.randn_like(latents) * spread * level
        with autocast(video.device):
            restored = forward(latents)
        return distance(restored, video)

    loop.run(losses)
    if ranks.is_first:
        report(vae, loop)


def dense(video: torch.Tensor) -> torch.Tensor:
    """In the layout that cuDNN's half-precision convolutions read, where there is a GPU."""
    return video.contiguous(memory_format=torch.channels_last_3d) if video.is_cuda else video


def report(vae, loop: Loop) -> None:
    with loop.average.in_place_of(vae):
        psnr_db = held_out_psnr(vae.eval(), loop.ranks.device)
    print(f"{loop.step} steps, held-out PSNR {psnr_db:.2f} dB", flush=True)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, batch=32, lr=1e-3, log_every=100)
    options.add_argument("stage", choices=["joint", "decoder"])
    options.add_argument(
        "--short-share", type=float, default=0.4, help="share of the schedule on 5-frame clips"
    )
    options.add_argument("--perceptual", type=float, default=0.5, help="weight of every LPIPS backbone")
    options.add_argument("--backbone", action="append", help=f"default: {' and '.join(PERCEPTUAL_BACKBONES)}")
    options.add_argument("--perceptual-frames", type=int, default=4, help="frames per clip that it looks at")
    options.add_argument("--latent-noise", type=float, default=0.1, help="decoder: largest relative noise")
    options.add_argument(
        "--statistics-clips", type=int, default=1024, help="behind the latents' mean and spread"
    )
    args = options.parse_args(argv)
    ranks = Ranks()
    torch.manual_seed(args.seed)
    vae = architecture.vae()
    start = args.start or (args.out / "vae_joint.pt" if args.stage == "decoder" else None)
    if start is not None:
        load_weights(vae, start)
    vae.to(ranks.device).train()
    ranks.share_parameters(vae)
    if ranks.device.type == "cuda":
        channels_last(vae)
    torch.manual_seed(args.seed + ranks.rank)
    with whole_clip_resampling(vae):
        train = {"joint": train_joint, "decoder": train_decoder}[args.stage]
        backbones = args.backbone or PERCEPTUAL_BACKBONES
        train(vae, args, ranks, Distance(ranks.device, backbones, args.perceptual, args.perceptual_frames))
    ranks.close()


if __name__ == "__main__":
    main()
