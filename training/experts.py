"""Stage 3: the two experts, each on its own noise range, by flow matching.

    python -m training.experts high --minutes 6.8
    python -m training.experts low --minutes 6.8

The high-noise expert sees sigma in [0.9, 1], the low-noise expert sigma in [0, 0.9): neither ever learns the other's
range. Latents are encoded once and kept on the device; a part of them is replaced by new clips all along.
Loss: mean squared error of the velocity `noise - latents` (Lipman et al. 2023; Wan technical report, section 4).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from training import architecture
from training.architecture import BOUNDARY_RATIO, FLOW_SHIFT, LATENT_CHANNELS, TEXT_TOKENS
from training.loop import Loop, Ranks, autocast, load_weights, parser
from training.pictures import Pictures
from wanlab.export.friendly import encode_moments, whole_clip_resampling

CAPTION_DROPOUT = 0.1


class Latents:
    """Cached pairs of clip latents and first-frame condition, `[N, C, T', H', W']` in half precision."""

    def __init__(self, vae, text_encoder, statistics, pictures: Pictures, count: int, chunk: int) -> None:
        self.vae, self.text_encoder, self.pictures, self.chunk = vae, text_encoder, pictures, chunk
        self.mean, self.std = (values.to(pictures.device).view(1, -1, 1, 1, 1) for values in statistics)
        self.tokenizer, self.device = architecture.tokenizer(), pictures.device
        self._cursor = 0
        shape = self._encode()[0].shape[1:]
        self.latents = torch.empty(count, *shape, dtype=torch.float16, device=self.device)
        self.condition = torch.empty_like(self.latents)
        self.text = torch.empty(
            count, TEXT_TOKENS, architecture.TEXT_DIM, dtype=torch.float16, device=self.device
        )
        self.no_text = self._encode_text([""])[0].half()
        for _ in tqdm(range(0, count, chunk), desc="encoding clips"):
            self.refresh()

    @torch.no_grad()
    def _encode_text(self, captions: list[str]) -> torch.Tensor:
        """`[B, L, D]`, zero behind the end of the caption as the pipeline does it."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden * tokens.attention_mask[..., None]

    @torch.no_grad()
    def _encode(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        video, captions = self.pictures.batch(self.chunk, architecture.FRAMES)
        first = torch.zeros_like(video)
        first[:, :, 0] = video[:, :, 0]
        with autocast(self.device):
            latents = encode_moments(self.vae, video)[:, :LATENT_CHANNELS].float()
            condition = encode_moments(self.vae, first)[:, :LATENT_CHANNELS].float()
        return latents, condition, self._encode_text(captions)

    def refresh(self) -> None:
        """Replace the oldest chunk by new clips."""
        latents, condition, text = self._encode()
        rows = torch.arange(self._cursor, self._cursor + self.chunk, device=self.device) % len(self.latents)
        self.latents[rows] = ((latents - self.mean) / self.std).half()
        self.condition[rows] = ((condition - self.mean) / self.std).half()
        self.text[rows] = text.half()
        self._cursor = (self._cursor + self.chunk) % len(self.latents)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(self.latents), (size,), device=self.device)
        text = self.text[rows].float()
        dropped = torch.rand(size, device=self.device) < CAPTION_DROPOUT
        text[dropped] = self.no_text.float()
        return self.latents[rows].float(), self.condition[rows].float(), text


def draw_sigma(expert: str, size: int, device: torch.device) -> torch.Tensor:
    """Noise levels of one expert, as dense as the shifted sampling schedule visits them, `[B]`."""
    # sigma = s u / (1 + (s - 1) u), solved for the boundary.
    boundary = BOUNDARY_RATIO / (FLOW_SHIFT - (FLOW_SHIFT - 1) * BOUNDARY_RATIO)
    u = torch.rand(size, device=device)
    u = boundary + (1 - boundary) * u if expert == "high" else boundary * u
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


def frozen_parts(out: Path, device: torch.device):
    """VAE, text encoder, and the latents' mean and spread per channel."""
    from transformers import UMT5EncoderModel

    vae = architecture.vae()
    checkpoint = load_weights(vae, out / "vae_joint.pt")
    text_encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    vae, text_encoder = (m.to(device).eval().requires_grad_(False) for m in (vae, text_encoder))
    return vae, text_encoder, (checkpoint["mean"], checkpoint["std"])


def train(args, ranks: Ranks) -> None:
    device, seed = ranks.device, (args.seed, ranks.rank, args.expert == "high")
    torch.manual_seed(hash(seed))
    model = architecture.expert()
    if args.start:
        load_weights(model, args.start)
    model.to(device).train()
    ranks.share_parameters(model)
    loop = Loop(f"expert_{args.expert}", model, args, ranks, average_decay=0.9995, weight_decay=0.02)
    vae, text_encoder, statistics = frozen_parts(args.out, device)
    pictures = Pictures(device, (*seed, loop.step), args.dead_leaves)
    forward = torch.compile(model) if args.compile else model
    with whole_clip_resampling(vae):
        data = Latents(vae, text_encoder, statistics, pictures, args.clips, args.chunk)
        mask = torch.zeros(1, 4, *data.latents.shape[2:], device=device)
        mask[:, :, 0] = 1
        batch = args.batch // ranks.world

        def losses(progress: float) -> tuple[torch.Tensor, dict]:
            if loop.step and loop.step % args.refresh_every == 0:
                data.refresh()
            latents, condition, text = data.batch(batch)
            sigma, noise = draw_sigma(args.expert, batch, device), torch.randn_like(latents)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * latents + level * noise
            x = torch.cat([noisy, mask.expand(batch, -1, -1, -1, -1), condition], dim=1)
            with autocast(device):
                velocity = forward(x, sigma * 1000, text, return_dict=False)[0]
            return (velocity.float() - (noise - latents)).square().mean(), {}

        loop.run(losses)
    ranks.close()


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, batch=128, lr=1.5e-3, log_every=250)
    options.add_argument("expert", choices=["high", "low"])
    options.add_argument("--clips", type=int, default=24576, help="clips in the cache of each GPU")
    options.add_argument("--chunk", type=int, default=128, help="clips encoded at once")
    options.add_argument(
        "--refresh-every", type=int, default=40, help="steps between two chunks of new clips"
    )
    train(options.parse_args(argv), Ranks())


if __name__ == "__main__":
    main()
