"""Stage 2: the VAE, first as a whole, then the decoder alone against a frozen encoder.

    python -m training.vae joint --minutes 15 --photographs outputs/photographs
    python -m training.vae decoder --minutes 8 --batch 16 --lr 0.0007 --perceptual 1 --seed 5

Joint training spends its first part on 5-frame clips, which teach the spatial code at a third of the cost, and the
rest on whole clips, some of them of the larger size. Batches are small because many steps teach more than large ones.
The decoder stage sharpens: latents stay what they are, so experts trained meanwhile stay valid. `--start` goes on from
earlier weights, also those of a pipeline folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from training import architecture
from training import photographs as photographs_
from training.distance import Distance, add_distance, roughness
from training.loop import Loop, Ranks, autocast, channels_last, dense, load_weights, parser
from training.pictures import Pictures, add_pictures, pictures_of
from wanlab.core.files import write_json
from wanlab.export.friendly import decode_video, encode_moments, whole_clip_resampling
from wanlab.heldout import clips

SHORT_FRAMES = 5
LARGE = {"frames": 9, "height": clips.SIZES[clips.LARGE][0], "width": clips.SIZES[clips.LARGE][1]}
"""The larger size; more of its frames would teach no more about it, and cost as much again."""
KL_WEIGHT = 3e-5


def read_vae(source: Path) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A trained VAE, and mean and spread of its latents per channel, `[C]` each.

    Args:
        source: checkpoint of the joint stage, or folder of a pipeline or of a VAE in the layout of diffusers.

    Raises:
        SystemExit: there is none, or nothing states mean and spread.
    """
    if source.is_dir():
        folder = source / "vae" if (source / "vae").is_dir() else source
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
        return vae, torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    vae = architecture.vae()
    state = load_weights(vae, source)
    if "mean" not in state:
        raise SystemExit(
            f"{source} states no mean and spread of its latents: the joint stage writes them when it is done"
        )
    return vae, state["mean"], state["std"]


class WholeClip(torch.nn.Module):
    """Video `[B, 3, T, H, W]` to reconstruction and moments; one graph for the compiler."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, video: torch.Tensor, noise: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        mean, log_variance = encode_moments(self.vae, video).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        # Experts make small errors; a decoder that has seen such errors does not amplify them.
        spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        latents = mean + ((0.5 * log_variance).exp() + level * spread) * noise
        return decode_video(self.vae, latents).float(), mean, log_variance


class DecodeClip(torch.nn.Module):
    """Latents `[B, C, T', H', W']` to video."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_video(self.vae, latents).float()


@torch.no_grad()
def held_out_figures(
    vae,
    device: torch.device,
    photographs: Sequence[np.ndarray],
    *,
    seed: int = 1234,
    per_photograph: int = 4,
    **size,
) -> tuple[float, float]:
    """How well clips of photographs come back.

    Args:
        photographs: uint8 `[H, W, 3]`.
        size: height, width and frames of the clips.

    Returns:
        Mean PSNR in dB, and mean sharpness: the variance of the Laplacian over that of the true clip.
    """
    generator, scores = np.random.default_rng(seed), []
    for photograph in photographs:
        picture = torch.from_numpy(photograph.copy()).permute(2, 0, 1).to(device) / 255
        for _ in range(per_photograph):
            clip = clips.draw_clip(photograph.shape[:2], generator, **size)
            video = clips.render(picture, [clip], **size) * 2 - 1
            restored = decode_video(vae, encode_moments(vae, video)[:, : architecture.LATENT_CHANNELS])
            restored = restored.float().clamp(-1, 1)
            psnr_db = -10 * ((restored - video) / 2).square().mean().log10()
            sharpness = roughness(restored).square().mean() / roughness(video).square().mean()
            scores.append((float(psnr_db), float(sharpness)))
    psnr_db, sharpness = np.mean(scores, axis=0)
    return float(psnr_db), float(sharpness)


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


def train_joint(vae, args, ranks: Ranks, distance: Distance) -> None:
    loop = Loop("vae_joint", vae, args, ranks, average_decay=0.998, weight_decay=1e-4)
    pictures = pictures_of(args, ranks.device, (args.seed, ranks.rank, loop.step))
    model = WholeClip(vae)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    batch = max(1, args.batch // ranks.world)
    sizes = np.random.default_rng((args.seed, loop.step))  # the same on every rank

    def losses(progress: float) -> tuple[torch.Tensor, dict]:
        short = progress < args.short_share
        large = bool(sizes.random() < args.large_share) and 0 < progress < 1
        size = LARGE if large else {"frames": SHORT_FRAMES if short else clips.FRAMES}
        count = batch if short else max(1, batch // (6 if large else 3))
        video = dense(pictures.batch(count, **size, per_picture=1)[0])
        frames = video.shape[2]
        shape = (1 + (frames - 1) // 4, video.shape[3] // 8, video.shape[4] // 8)
        noise = torch.randn(len(video), architecture.LATENT_CHANNELS, *shape, device=video.device)
        level = args.latent_noise * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
        with autocast(video.device):
            # Compiled for the size of most steps only: one graph takes as long as hundreds of steps.
            restored, mean, log_variance = (model if large else forward)(video, noise, level)
        total, parts = distance(restored, video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return total + KL_WEIGHT * kl, {**parts, "kl": kl, "frames": frames, "height": video.shape[3]}

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
    pictures = pictures_of(args, ranks.device, (args.seed, ranks.rank, loop.step))
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


def report(vae, loop: Loop) -> None:
    """Print how well photographs of sources that no stage sees come back, at both sizes."""
    folder = loop.args.photographs
    photographs = [(clips.photograph(name) * 255).astype(np.uint8) for name in clips.HELD_OUT_PHOTOGRAPHS]
    sources = {"scikit-image": photographs} | (
        {"other sources": photographs_.load(folder, held_out=True)} if folder else {}
    )
    small = {"frames": clips.FRAMES, "height": clips.HEIGHT, "width": clips.WIDTH}
    rows = []
    with loop.average.in_place_of(vae):
        for source, pictures in sources.items():
            for size in (small, LARGE):
                psnr_db, sharpness = held_out_figures(vae.eval(), loop.ranks.device, pictures, **size)
                rows.append(
                    {"source": source, "photographs": len(pictures)}
                    | size
                    | {"psnr_db": psnr_db, "sharpness": sharpness}
                )
                where = f"{source}, {size['height']}x{size['width']}x{size['frames']}"
                print(f"{where}: PSNR {psnr_db:.2f} dB, sharpness {sharpness:.2f}", flush=True)
    write_json(
        loop.args.out / f"{loop.name}.json", {"steps": loop.step, "seconds": loop.seconds, "heldout": rows}
    )


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, batch=32, lr=1e-3, log_every=100)
    options.add_argument("stage", choices=["joint", "decoder"])
    options.add_argument(
        "--short-share", type=float, default=0.4, help="share of the schedule on 5-frame clips"
    )
    add_distance(options)
    options.add_argument("--latent-noise", type=float, default=0.1, help="largest relative noise of latents")
    add_pictures(options, textures=0.1)
    options.add_argument(
        "--large-share", type=float, default=0.2, help="joint: share of steps at the larger size"
    )
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
        train(vae, args, ranks, Distance(ranks.device, args))
    ranks.close()


if __name__ == "__main__":
    main()
