"""Stage 3: the two experts, each on its own noise range, by flow matching.

    python -m training.experts high --minutes 9
    python -m training.experts low  --minutes 18

The high-noise expert sees sigma in [0.9, 1], the low-noise expert sigma in [0, 0.9): neither ever learns the other's
range. Latents are encoded once and kept on the device; a part of them is replaced by new clips all along.
Loss: mean squared error of the velocity `noise - latents` (Lipman et al. 2023; Wan technical report, section 4).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from training.common import Average, Budget, Curve, Pictures, Ranks, cosine, save_atomically, seed_everything
from wanlab.convert.vae_sequence import encode_moments, whole_clip_resampling
from wanlab.nano import architecture
from wanlab.nano.architecture import BOUNDARY_RATIO, FLOW_SHIFT, LATENT_CHANNELS, TEXT_TOKENS

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
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
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
    from transformers import UMT5EncoderModel

    vae, checkpoint = (
        architecture.vae(),
        torch.load(out / "vae_joint.pt", map_location="cpu", weights_only=True),
    )
    vae.load_state_dict(checkpoint["vae"])
    text_encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    vae, text_encoder = (m.to(device).eval().requires_grad_(False) for m in (vae, text_encoder))
    return vae, text_encoder, (checkpoint["mean"], checkpoint["std"])


def train(args, ranks: Ranks) -> None:
    device = ranks.device
    torch.set_float32_matmul_precision("high")
    seed_everything(args.seed + (1 if args.expert == "high" else 2))
    model = architecture.expert().to(device).train()
    if args.resume:
        model.load_state_dict(torch.load(args.resume, map_location="cpu", weights_only=True)["expert"])
    ranks.share_parameters(model)
    vae, text_encoder, statistics = frozen_parts(args.out, device)
    torch.manual_seed(args.seed * 100 + ranks.rank + (50 if args.expert == "high" else 0))
    pictures = Pictures(
        device, args.seed * 2000 + ranks.rank + (500 if args.expert == "high" else 0), args.dead_leaves
    )
    with whole_clip_resampling(vae):
        data = Latents(vae, text_encoder, statistics, pictures, args.clips, args.chunk)
        forward = torch.compile(model) if args.compile else model
        decay = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        average = Average(model, 0.9995)
        budget = Budget(args.minutes, args.steps, ranks)
        curve = Curve(args.out / f"expert_{args.expert}.jsonl", args.log_every, ranks.is_first)
        mask = torch.zeros(1, 4, *data.latents.shape[2:], device=device)
        mask[:, :, 0] = 1
        batch, step, progress = args.batch // ranks.world, 0, 0.0
        parameters = list(model.parameters())
        bar = tqdm(desc=f"{args.expert}-noise expert", disable=not ranks.is_first, mininterval=5)
        while progress < 1.0:
            progress = budget.progress(step)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * cosine(progress)
            latents, condition, text = data.batch(batch)
            sigma, noise = draw_sigma(args.expert, batch, device), torch.randn_like(latents)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * latents + level * noise
            x = torch.cat([noisy, mask.expand(batch, -1, -1, -1, -1), condition], dim=1)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                velocity = forward(x, sigma * 1000, text, return_dict=False)[0]
            loss = (velocity.float() - (noise - latents)).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update(model)
            curve.log(step, budget.steps, loss=loss)
            step += 1
            bar.update()
            if step % args.refresh_every == 0:
                data.refresh()
            if ranks.is_first and (step % 5000 == 0 or progress >= 1.0):
                save(model, average, args.out / f"expert_{args.expert}.pt", step)
        if ranks.is_first:
            print(f"{args.expert}: {step} steps, loss {float(loss):.4f}", flush=True)
    ranks.close()


def save(model, average: Average, path: Path, steps: int) -> None:
    kept = [p.detach().clone() for p in model.parameters()]
    average.copy_to(model)
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    save_atomically({"expert": state, "steps": steps}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("expert", choices=["high", "low"])
    parser.add_argument("--out", type=Path, default=Path("outputs/training"))
    parser.add_argument("--resume", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--minutes", type=float, help="length of the schedule; the speed decides the steps")
    parser.add_argument("--steps", type=int, help="length of the schedule in steps, instead of --minutes")
    parser.add_argument("--batch", type=int, default=128, help="clips per step over all GPUs")
    parser.add_argument("--clips", type=int, default=24576, help="clips in the cache of each GPU")
    parser.add_argument("--chunk", type=int, default=128, help="clips encoded at once")
    parser.add_argument("--refresh-every", type=int, default=40, help="steps between two chunks of new clips")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument(
        "--dead-leaves", type=int, default=96, help="how many synthetic pictures; slow on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if (args.minutes is None) == (args.steps is None):
        parser.error("give either --minutes or --steps")
    train(args, Ranks())


if __name__ == "__main__":
    main()
