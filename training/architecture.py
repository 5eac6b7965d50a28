"""The architecture of wan-nano: Wan2.2-I2V-A14B's layout, small enough for a laptop.

Every component has the class and the tensor interface of its big sibling. What differs is width,
depth and one deliberate choice in the VAE: it folds 2x2 pixels into channels first (`patch_size=2`,
as the VAE of Wan2.2-TI2V-5B does), because convolutions at full resolution are what a laptop waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanlab.heldout.clips import (
    CAMERA_MOTIONS,
    COLOURS,
    DIRECTIONS,
    FPS,
    FRAMES,
    HEIGHT,
    LARGE,
    SHAPES,
    SIZES,
    WIDTH,
)

BOUNDARY_RATIO = 0.9
FLOW_SHIFT = 5.0
LATENT_CHANNELS = 16
TEXT_TOKENS = 24
TEXT_DIM = 96
STEPS, GUIDANCE_SCALE = 10, 1.5

VAE = dict(
    base_dim=32,
    decoder_base_dim=40,
    z_dim=LATENT_CHANNELS,
    dim_mult=[1, 2, 2],
    num_res_blocks=2,
    temperal_downsample=[True, True],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)

EXPERT = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=48,
    in_channels=2 * LATENT_CHANNELS + 4,
    out_channels=LATENT_CHANNELS,
    text_dim=TEXT_DIM,
    freq_dim=128,
    ffn_dim=512,
    num_layers=6,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    rope_max_seq_len=256,
)

EXPERTS = {
    "published": EXPERT,
    # Heads of 64, as attention kernels want them; not larger than the published one.
    "next": EXPERT | dict(attention_head_dim=64, ffn_dim=320, num_layers=4),
    "wide": EXPERT | dict(attention_head_dim=64, ffn_dim=960, num_layers=4),
}
"""Architectures of the experts by name; everything else is the same in all. `wide` goes on from weights of `next`."""

TEXT_ENCODER = dict(
    d_model=TEXT_DIM,
    d_kv=24,
    d_ff=192,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=32,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    is_encoder_decoder=False,
    use_cache=False,
)


def vocabulary() -> list[str]:
    """Words the captions are made of; everything else is `<unk>`."""
    words = {"a", "moves", ",", "and"}
    for caption in CAMERA_MOTIONS.values():
        words.update(caption.split())
    words.update(COLOURS, SHAPES, DIRECTIONS)
    return ["<pad>", "</s>", "<unk>", *sorted(words)]


def tokenizer():
    """A word-level tokenizer that `transformers` saves and loads like any other."""
    words = vocabulary()
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
        padding_side="right",
    )


def text_encoder():
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocabulary()), pad_token_id=0, eos_token_id=1, **TEXT_ENCODER)
    )


def vae():
    zeros, ones = [0.0] * LATENT_CHANNELS, [1.0] * LATENT_CHANNELS
    return AutoencoderKLWan(**VAE, latents_mean=zeros, latents_std=ones)


def expert(name: str = "published"):
    return WanTransformer3DModel(**EXPERTS[name])


def widened(weights: Mapping[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a module whose feed-forward layers are wider than those that the weights are of.

    They compute the same: the new hidden channels begin as they are in `module`, and go nowhere yet.

    Raises:
        RuntimeError: another tensor has another shape, when they are loaded.
    """
    grown = dict(weights)
    for name, start in module.state_dict().items():
        narrow = weights.get(name)
        if narrow is None or ".ffn." not in name or not _fits(narrow, start):
            continue
        wide = start.clone()
        if name.endswith("net.2.weight"):
            wide.zero_()
        wide[tuple(map(slice, narrow.shape))] = narrow.to(wide.dtype)
        grown[name] = wide
    return grown


def _fits(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.dim() == whole.dim() and all(a <= b for a, b in zip(part.shape, whole.shape, strict=True))


def scheduler():
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )


def pipeline(**components):
    """A WanImageToVideoPipeline; components that are not given get fresh random weights.

    Pass `torch.manual_seed` before the call for repeatable weights.
    """
    makers = dict(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=expert,
        transformer_2=expert,
        scheduler=scheduler,
    )
    parts = {name: components.get(name) or make() for name, make in makers.items()}
    return WanImageToVideoPipeline(**parts, boundary_ratio=BOUNDARY_RATIO)


def defaults(experts: str = "published") -> dict[str, Any]:
    """The settings that wan-nano was trained for, as `wanlab.json` of its folder holds them.

    Args:
        experts: name of their architecture; all but the published ones learn both sizes.
    """
    settings: dict[str, Any] = {
        "height": HEIGHT,
        "width": WIDTH,
        "frames": FRAMES,
        "fps": FPS,
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "text_tokens": TEXT_TOKENS,
    }
    return settings if experts == "published" else settings | {"other_sizes": [SIZES[LARGE]]}
