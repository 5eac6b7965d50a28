"""The VAE over a whole clip must be the VAE of diffusers, chunk by chunk."""

from __future__ import annotations

import pytest
import torch
from support import convert_tiny as tiny

from wanlab.export.friendly import decode_video, encode_moments, exportable_operators, whole_clip_resampling

pytestmark = pytest.mark.slow

FORMS = {
    "residual": tiny.RESIDUAL_VAE,
    "wider decoder": tiny.RESIDUAL_VAE | dict(decoder_base_dim=12),
    "four levels": tiny.RESIDUAL_VAE | dict(dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]),
    "plain": tiny.PLAIN_VAE,
}


def relative(a, b) -> float:
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [5, 9, 17])
def test_whole_clip_equals_chunks(form, frames):
    vae = tiny.vae(**FORMS[form])
    video = torch.rand(2, 3, frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(video).latent_dist.parameters
        decoded = vae.decode(moments[:, :16]).sample
        with whole_clip_resampling(vae):
            assert relative(moments, encode_moments(vae, video)) < 1e-5
            with exportable_operators(vae):
                assert relative(moments, encode_moments(vae, video)) < 1e-5
                again = decode_video(vae, moments[:, :16]).clamp(-1, 1)
        assert again.shape == decoded.shape
        assert relative(decoded, again) < 1e-5


def test_the_vae_is_left_as_it_was():
    vae = tiny.vae(**tiny.RESIDUAL_VAE)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(video).latent_dist.parameters
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            whole_clip_resampling(vae),
            exportable_operators(vae),
        ):
            raise RuntimeError("on purpose")
        assert torch.equal(before, vae.encode(video).latent_dist.parameters)
    assert not [module for module in vae.modules() if "forward" in vars(module)]


def test_silent_pixels_have_a_finite_norm():
    vae = tiny.vae(**tiny.RESIDUAL_VAE)
    with torch.no_grad(), whole_clip_resampling(vae), exportable_operators(vae):
        assert torch.isfinite(encode_moments(vae, torch.zeros(1, 3, 5, 32, 32))).all()
