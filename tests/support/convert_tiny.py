"""Tiny models for conversion: a whole pipeline in wan-nano's layout, no weight of it neutral."""

from __future__ import annotations

from types import SimpleNamespace

from training import architecture as nano
from wanlab.models.spec import Defaults, ModelSpec, component_parts

EXPERT = nano.EXPERT | dict(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=48, freq_dim=32, num_layers=1
)
RESIDUAL_VAE = nano.VAE | dict(base_dim=8, decoder_base_dim=8, num_res_blocks=1)
# The form of Wan2.1's VAE, which Wan2.2-I2V-A14B uses: no shortcuts around the resamplers, no patches.
PLAIN_VAE = dict(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)


def stir(network, seed: int = 0):
    """Random norms, biases and tables, so that a part that is left out shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim != 5 and parameter.ndim != 2:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def vae(**config):
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    return stir(AutoencoderKLWan(**config))


def expert(seed: int, **config):
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return stir(WanTransformer3DModel(**EXPERT | config), seed)


def pipeline():
    import torch

    torch.manual_seed(0)
    statistics = dict(
        latents_mean=torch.randn(nano.LATENT_CHANNELS).tolist(),
        latents_std=(torch.rand(nano.LATENT_CHANNELS) + 0.5).tolist(),
    )
    return nano.pipeline(
        vae=vae(**RESIDUAL_VAE | statistics),
        transformer=expert(2),
        transformer_2=expert(3),
        text_encoder=stir(nano.text_encoder()),
    )


def bare(built, **defaults):
    """What conversion needs of a model, around a pipeline that no registry knows."""
    import torch

    shape = dict(height=64, width=96, frames=9, text_tokens=nano.TEXT_TOKENS) | defaults
    config = built.vae.config
    expert = built.transformer or built.transformer_2
    spec = ModelSpec(
        name="tiny",
        source="",
        pipeline_class=type(built).__name__,
        components=tuple(component_parts([name for name in built.components if "tokenizer" not in name])),
        boundary_ratio=None,
        defaults=Defaults(**shape),
        spatial_factor=config.scale_factor_spatial,
        temporal_factor=config.scale_factor_temporal,
        patch=tuple(expert.config.patch_size),
        latent_channels=config.z_dim,
    )
    return SimpleNamespace(pipeline=built, engines={}, spec=spec, device=torch.device("cpu"))
