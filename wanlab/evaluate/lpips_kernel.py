"""The Triton kernel of `wanlab.evaluate.lpips`; imported only where Triton is used."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the source of the kernel and its annotations, so no `from __future__ import annotations` here.


@triton.jit
def distance_kernel(
    first,
    second,
    weight,
    out,
    pixels,
    stride_image,
    stride_channel,
    stride_pixel,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDE)
    within = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    place = (
        image * stride_image + pixel.to(tl.int64)[:, None] * stride_pixel + channel[None, :] * stride_channel
    )
    x = tl.load(first + place, mask=within, other=0.0)
    y = tl.load(second + place, mask=within, other=0.0)
    x = x / (tl.sqrt(tl.sum(x * x, axis=1)) + EPSILON)[:, None]
    y = y / (tl.sqrt(tl.sum(y * y, axis=1)) + EPSILON)[:, None]
    w = tl.load(weight + channel, mask=channel < CHANNELS, other=0.0)
    distance = tl.sum((x - y) * (x - y) * w[None, :], axis=1)
    tl.store(out + image * pixels + pixel, distance, mask=pixel < pixels)
