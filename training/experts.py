"""Stage 3: the two experts, each on its own noise range, by flow matching.

    python -m training.experts high --minutes 6.8
    python -m training.experts low --minutes 6.8 --architecture next --large-share 0.4 --photographs outputs/photographs

The high-noise expert sees sigma in [0.9, 1], the low-noise expert sigma in [0, 0.9): neither ever learns the other's
range. Latents are encoded once and kept on the device, of each size apart; a part of them is replaced by new clips all
along. A step has clips of one size, so that each size has one graph.
Loss: mean squared error of the velocity `noise - latents` (Lipman et al. 2023; Wan technical report, section 4). With
`--seen`, an expert also learns from what the eye sees, at latents that the experts sampled themselves
(`training.rollouts`): the clip that its estimate of the clean latents decodes to, against the one that the true latents
decode to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import UMT5EncoderModel

from training import architecture
from training.architecture import BOUNDARY_RATIO, FLOW_SHIFT, LATENT_CHANNELS, TEXT_TOKENS
from training.distance import Distance, add_distance
from training.loop import Loop, Ranks, autocast, channels_last, dense, load_weights, parser
from training.pictures import Pictures, add_pictures, pictures_of
from training.rollouts import Rollouts, guidance
from training.vae import DecodeClip, read_vae
from wanlab.core.files import write_json
from wanlab.export.friendly import encode_moments, whole_clip_resampling
from wanlab.heldout.clips import LARGE, SIZES, SMALL

CAPTION_DROPOUT = 0.1
OTHER_CAPTIONS = {"high": 0.0, "low": 0.75}
"""Share of the clips of a step that an expert sees with the caption of another clip.

What moves is the high-noise expert's work. A low-noise one that can trust the caption lays out the motion itself, and does
nearly as well alone; so it learns to read the motion from the latents that it is given.
"""


class Captions:
    """The frozen text encoder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = architecture.tokenizer()
        self.encoder = UMT5EncoderModel.from_pretrained(folder).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """`[B, L, D]`, zero behind the end of the caption as the pipeline does it."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.encoder.device)
        hidden = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden * tokens.attention_mask[..., None]


def frozen_vae(source: Path, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A VAE that is not trained, and mean and spread of its latents, `[1, C, 1, 1, 1]` each, on the device.

    Args:
        source: as `read_vae` takes it.
    """
    vae, *statistics = read_vae(source)
    mean, std = (values.to(device).view(1, -1, 1, 1, 1) for values in statistics)
    return vae.to(device).eval().requires_grad_(False), mean, std


class Encoder:
    """The frozen encoder of the VAE: half precision on a GPU, as it will be stored, which loses less than bfloat16."""

    def __init__(self, source: Path, device: torch.device) -> None:
        self.vae, self.mean, self.std = frozen_vae(source, device)
        self.vae.decoder = self.vae.post_quant_conv = None
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        if device.type == "cuda":
            channels_last(self.vae.half())

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, T', H', W']` of clips `[B, 3, T, H, W]` in [-1, 1], in half precision."""
        with whole_clip_resampling(self.vae):
            moments = encode_moments(self.vae, dense(video.to(self.dtype)))
        return ((moments[:, :LATENT_CHANNELS].float() - self.mean) / self.std).half()


class Seen:
    """How far a clip that an expert's latents decode to is from the true one, as `Distance` measures it.

    A clip larger than the small size is judged by a window of it, and both sides are decoded in the same window: its edges
    are the same in both.

    Args:
        source: the VAE, as `read_vae` takes it.
    """

    def __init__(self, source: Path, device: torch.device, args: argparse.Namespace) -> None:
        vae, self.mean, self.std = frozen_vae(source, device)
        vae.encoder = vae.quant_conv = None
        if device.type == "cuda":
            channels_last(vae)
        self.vae, self.device = vae, device
        self.decode = torch.compile(DecodeClip(vae), dynamic=False) if args.compile else DecodeClip(vae)
        self.distance = Distance(device, args)

    def __call__(self, estimate: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """The distance, and its parts, of normalised latents `[B, C, T', H', W']`."""
        height, width = (side // 8 for side in SIZES[SMALL][:2])
        y, x = (
            int(torch.randint(whole - part + 1, ()))
            for whole, part in zip(latents.shape[-2:], (height, width), strict=True)
        )
        window = (..., slice(y, y + height), slice(x, x + width))
        with torch.no_grad():
            true = self._video(latents[window]).clamp(-1, 1)
        return self.distance(self._video(estimate[window]), true)

    def _video(self, latents: torch.Tensor) -> torch.Tensor:
        with whole_clip_resampling(self.vae), autocast(self.device):
            return self.decode(dense(latents * self.std + self.mean))


class Ahead:
    """Calls a function in a thread, once ahead of who asks: drawing clips is work of the CPU, which a GPU need not wait for.

    On a GPU the thread has a stream of its own. Results come in the order of the calls.
    """

    def __init__(self, function: Callable[[], tuple[torch.Tensor, Any]], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:  # what the function reads may still be under way
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.thread = ThreadPoolExecutor(1)
        self.coming = self.thread.submit(self._call)

    def _call(self) -> tuple[torch.Tensor, Any]:
        with torch.no_grad(), torch.cuda.stream(self.stream) if self.stream else nullcontext():
            result = self.function()
            if self.stream:
                self.stream.synchronize()
        return result

    def __call__(self) -> tuple[torch.Tensor, Any]:
        tensor, rest = self.coming.result()
        if self.stream:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        self.coming = self.thread.submit(self._call)
        return tensor, rest

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)


class Latents:
    """Cached pairs of clip latents and first-frame condition, `[N, C, T', H', W']` in half precision, of one size.

    Args:
        size: height, width and frames of the clips.
        count: clips in the cache.
        chunk: clips that are drawn and encoded at once.
    """

    def __init__(
        self,
        encoder: Encoder,
        captions: Captions,
        pictures: Pictures,
        size: tuple[int, int, int],
        count: int,
        chunk: int,
    ) -> None:
        height, width, frames = size
        self.encoder, self.captions = encoder, captions
        self.count, self.chunk = count, min(chunk, count)
        self.clips = Ahead(
            lambda: pictures.batch(self.chunk, frames, height, width, per_picture=2), pictures.device
        )
        shape = (LATENT_CHANNELS, 1 + (frames - 1) // 4, height // 8, width // 8)
        half = {"dtype": torch.float16, "device": pictures.device}
        self.latents = torch.empty(count, *shape, **half)
        self.condition = torch.empty_like(self.latents)
        self.text = torch.empty(count, TEXT_TOKENS, architecture.TEXT_DIM, **half)
        self.no_text = captions([""])[0].half()
        self.mask = torch.zeros(1, 4, *shape[1:], device=pictures.device)
        self.mask[:, :, 0] = 1
        self._cursor = 0

    def fill(self) -> None:
        """Encode as many clips as the cache holds."""
        for _ in tqdm(range(0, self.count, self.chunk), desc="encoding clips"):
            self.refresh()

    def refresh(self) -> None:
        """Replace the oldest chunk by new clips."""
        video, captions = self.clips()
        first = torch.zeros_like(video)
        first[:, :, 0] = video[:, :, 0]
        rows = (self._cursor + torch.arange(self.chunk, device=video.device)) % self.count
        self.latents[rows] = self.encoder(video)
        self.condition[rows] = self.encoder(first)
        self.text[rows] = self.captions(captions).half()
        self._cursor = (self._cursor + self.chunk) % self.count

    def draw(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, conditions and text embeddings of clips of the cache."""
        rows = torch.randint(self.count, (size,), device=self.latents.device)
        return self.latents[rows].float(), self.condition[rows].float(), self.text[rows].float()

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same, a part of the captions dropped."""
        latents, condition, text = self.draw(size)
        dropped = torch.rand(size, device=text.device) < CAPTION_DROPOUT
        text[dropped] = self.no_text.float()
        return latents, condition, text


def misplaced(text: torch.Tensor, share: float) -> torch.Tensor:
    """Text embeddings `[B, L, D]`, a share of them exchanged for that of another row."""
    if share == 0 or len(text) < 2:
        return text
    exchanged = torch.rand(len(text), 1, 1, device=text.device) < share
    return torch.where(exchanged, text.roll(1, 0), text)


def draw_sigma(expert: str, size: int, device: torch.device) -> torch.Tensor:
    """Noise levels of one expert, as dense as the shifted sampling schedule visits them, `[B]`."""
    # sigma = s u / (1 + (s - 1) u), solved for the boundary.
    boundary = BOUNDARY_RATIO / (FLOW_SHIFT - (FLOW_SHIFT - 1) * BOUNDARY_RATIO)
    u = torch.rand(size, device=device)
    u = boundary + (1 - boundary) * u if expert == "high" else boundary * u
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


class Before:
    """Seconds of what is done before the clock of the schedule starts, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.monotonic() - started
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)


def vae_of(args: argparse.Namespace) -> Path:
    return args.vae or args.out / "vae_joint.pt"


def caches(args, ranks: Ranks, step: int, before: Before) -> dict[str, Latents]:
    """The cached latents of every size that the schedule has steps of."""
    captions = Captions(args.out / "text_encoder", ranks.device)
    encoder = Encoder(vae_of(args), ranks.device)
    seed = (args.seed, ranks.rank, int(args.expert == "high"), step)
    counts = {SMALL: (args.clips, args.chunk), LARGE: (args.large_clips, args.large_chunk)}
    shares = {SMALL: 1 - args.large_share, LARGE: args.large_share}
    made = {}
    for number, (size, (count, chunk)) in enumerate(counts.items()):
        if shares[size] > 0:
            # Each has pictures of its own: another thread draws from them.
            pictures = pictures_of(args, ranks.device, (*seed, number))
            made[size] = Latents(encoder, captions, pictures, SIZES[size], count, chunk)
            with before.measured(f"encoding {count} {size} clips"):
                made[size].fill()
    return made


class Followed:
    """Reads a network's weights again whenever its checkpoint is a newer one than the last that was read."""

    def __init__(self, network: torch.nn.Module, path: Path) -> None:
        self.network, self.path = network, path
        self.read_ns = path.stat().st_mtime_ns if path.is_file() else 0

    def __call__(self) -> None:
        if self.path.is_file() and (written_ns := self.path.stat().st_mtime_ns) > self.read_ns:
            load_weights(self.network, self.path)
            self.read_ns = written_ns


def rollouts(args, model: torch.nn.Module, data: dict[str, Latents]) -> dict[str, Rollouts]:
    """What the expert that learns samples, of every size that the schedule has steps of.

    The low-noise one begins where a high-noise expert of an earlier run ends, and where it is to follow one that learns
    beside it, where that one's last checkpoint ends.
    """
    high, low, refresh = model, None, None
    if args.expert == "low":
        high, low, beside = architecture.expert(args.architecture), model, args.out / "expert_high.pt"
        if args.high or beside.is_file() or not args.follow:  # the one beside it may not have been saved yet
            load_weights(high, args.high or beside, architecture.widened)
        high.to(next(model.parameters()).device).eval().requires_grad_(False)
        if args.follow:
            refresh = Followed(high, beside)
    counts = {SMALL: args.rollouts, LARGE: args.large_rollouts}
    return {
        size: Rollouts(high, low, cache.draw, cache.mask, cache.no_text.float(), counts[size], refresh)
        for size, cache in data.items()
    }


def train(args, ranks: Ranks) -> None:
    device, before = ranks.device, Before(ranks.device)
    torch.manual_seed(hash((args.seed, ranks.rank, args.expert == "high")))
    model = architecture.expert(args.architecture)
    if args.start:
        load_weights(model, args.start, architecture.widened)
    model.to(device).train()
    ranks.share_parameters(model)
    loop = Loop(f"expert_{args.expert}", model, args, ranks, average_decay=0.9995, weight_decay=0.02)
    torch.manual_seed(hash((args.seed, ranks.rank, args.expert == "high", loop.step)))
    data = caches(args, ranks, loop.step, before)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    seen = Seen(vae_of(args), device, args) if args.seen else None
    own = rollouts(args, model, data) if seen else {}
    batches = {
        size: max(1, batch // ranks.world) for size, batch in ((SMALL, args.batch), (LARGE, args.large_batch))
    }
    sizes = np.random.default_rng((args.seed, loop.step))  # the same on every rank
    steps = dict.fromkeys(data, 0)

    def losses_of(size: str, progress: float) -> tuple[torch.Tensor, dict]:
        cache, batch = data[size], batches[size]
        latents, condition, text = cache.batch(batch)
        text = misplaced(text, args.other_captions)
        sigma, noise = draw_sigma(args.expert, batch, device), torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy, target = (1 - level) * latents + level * noise, noise - latents
        # Both branches of guidance of a sampled clip are rows of the batch.
        judged = min(args.seen_clips, batch // 6) if seen and progress >= args.seen_from else 0
        if judged:
            states, pair = own[size](judged), slice(2 * judged)
            noisy[pair], condition[pair] = (
                states.noisy.repeat(2, 1, 1, 1, 1),
                states.condition.repeat(2, 1, 1, 1, 1),
            )
            sigma[pair] = states.sigma.repeat(2)
            told = misplaced(states.text, args.other_captions)
            text[pair] = torch.cat([told, cache.no_text.float().expand_as(told)])
        x = torch.cat([noisy, cache.mask.expand(batch, -1, -1, -1, -1), condition], dim=1)
        with autocast(device):
            velocity = forward(x, sigma * 1000, text, return_dict=False)[0].float()
        loss = (velocity - target)[2 * judged :].square().mean()
        if not judged:
            return loss, {}
        estimate = states.noisy - states.sigma.view(-1, 1, 1, 1, 1) * guidance(velocity[pair])
        distance, parts = seen(estimate, states.latents)
        return loss + args.seen * distance, {"velocity": loss, **parts}

    def losses(progress: float) -> tuple[torch.Tensor, dict]:
        size = LARGE if sizes.random() < args.large_share else SMALL
        if steps[size] and steps[size] % args.refresh_every == 0:
            data[size].refresh()
        steps[size] += 1
        loss, parts = losses_of(size, progress)
        return loss, {"height": SIZES[size][0], **parts}

    for size in data if args.compile else ():
        with before.measured(f"compiling for {size} clips"):
            losses_of(size, 1.0)[0].backward()
    loop.run(losses, warm=())
    for cache in data.values():
        cache.clips.close()
    if ranks.is_first:
        facts = {"architecture": args.architecture, "steps": loop.step, "seconds": loop.seconds}
        write_json(
            args.out / f"{loop.name}.json", facts | {"steps_of_this_run": steps, "before_s": before.seconds}
        )
    ranks.close()


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, batch=128, lr=1.5e-3, log_every=250)
    options.add_argument("expert", choices=["high", "low"])
    options.add_argument("--architecture", choices=architecture.EXPERTS, default="published")
    options.add_argument(
        "--vae", type=Path, help="checkpoint with statistics, or folder; vae_joint.pt if not given"
    )
    options.add_argument("--clips", type=int, default=24576, help="small clips in the cache of each GPU")
    options.add_argument("--chunk", type=int, default=128, help="small clips encoded at once")
    options.add_argument(
        "--large-share", type=float, default=0.0, help="share of steps at 256x384 and 33 frames"
    )
    options.add_argument("--large-clips", type=int, default=4096, help="large clips in the cache")
    options.add_argument("--large-chunk", type=int, default=16, help="large clips encoded at once")
    options.add_argument("--large-batch", type=int, default=18, help="large clips per step over all GPUs")
    options.add_argument(
        "--refresh-every", type=int, default=40, help="steps of a size between two chunks of new clips"
    )
    options.add_argument(
        "--seen", type=float, default=0.0, help="weight of what is seen at latents of its own"
    )
    options.add_argument("--seen-from", type=float, default=0.4, help="part of the schedule it begins at")
    options.add_argument(
        "--seen-clips",
        type=int,
        default=8,
        help="clips of a step that are decoded for it, a sixth of it at most",
    )
    options.add_argument(
        "--high", type=Path, help="high-noise expert before a low-noise one; expert_high.pt if not given"
    )
    options.add_argument(
        "--follow",
        action="store_true",
        help="read the checkpoints of a high-noise expert that learns beside it",
    )
    options.add_argument("--rollouts", type=int, default=64, help="small clips sampled at once for it")
    options.add_argument("--large-rollouts", type=int, default=12, help="large clips sampled at once for it")
    add_distance(options)
    add_pictures(options, textures=0.0)
    options.add_argument(
        "--other-captions", type=float, help="share of clips with another clip's caption; see OTHER_CAPTIONS"
    )
    args = options.parse_args(argv)
    if args.other_captions is None:
        args.other_captions = OTHER_CAPTIONS[args.expert]
    train(args, Ranks())


if __name__ == "__main__":
    main()
