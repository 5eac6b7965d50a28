"""A sharded float32 checkpoint in the layout of Wan2.2-I2V-A14B, small enough to be broken many times."""

from __future__ import annotations

from pathlib import Path

from training import architecture as nano

EXPERT = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=12,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    cross_attn_norm=True,
    rope_max_seq_len=64,
)
VAE = dict(
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    is_residual=False,
    scale_factor_temporal=4,
    scale_factor_spatial=4,
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)
TEXT = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, is_encoder_decoder=False, use_cache=False)


def save(folder: Path, *, pipeline: str = "WanImageToVideoPipeline", seed: int = 0, **changes) -> Path:
    """Write the checkpoint; `changes` go to the pipeline's constructor, a part set to None is left out."""
    import diffusers
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(nano.vocabulary()), pad_token_id=0, eos_token_id=1, **TEXT)
    parts = dict(
        tokenizer=nano.tokenizer(),
        text_encoder=UMT5EncoderModel(config),
        vae=diffusers.AutoencoderKLWan(**VAE),
        transformer=diffusers.WanTransformer3DModel(**EXPERT),
        transformer_2=diffusers.WanTransformer3DModel(**EXPERT),
        scheduler=nano.scheduler(),
        boundary_ratio=0.9,
    )
    built = getattr(diffusers, pipeline)(**parts | changes)
    built.save_pretrained(folder, max_shard_size="20KB")
    return folder
