"""The names that tensors have in Wan's own release, from those of diffusers; written from its networks, for tests."""

from __future__ import annotations

import re

LAYERS = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
ENDS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
RESNET = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
VAE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.0": "middle.0",
    "mid_block.resnets.1": "middle.2",
}


def of_transformer(name: str) -> str:
    """Wan's name of a tensor of WanTransformer3DModel, or of a scale beside it."""
    if name.endswith("scale_shift_table"):
        return name.replace(
            "scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation"
        )
    layer, _, leaf = name.rpartition(".")
    if not layer:
        return leaf
    if block := re.match(r"blocks\.\d+\.", layer):
        return f"{block[0]}{LAYERS[layer[block.end() :]]}.{leaf}"
    return f"{ENDS[layer]}.{leaf}"


def of_vae(name: str, resnets: int = 3) -> str:
    """Wan2.1's name of a tensor of AutoencoderKLWan without residual blocks; `resnets` in each block of the decoder."""
    half = re.match(r"(encoder|decoder)\.", name)
    start = half[0] if half else ""
    rest = name[len(start) :]
    if block := re.match(r"down_blocks\.(\d+)\.", rest):
        start, rest = f"{start}downsamples.{block[1]}.", rest[block.end() :]
    elif block := re.match(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", rest):
        place = int(block[1]) * (resnets + 1) + (int(block[3]) if block[2] == "resnets" else resnets)
        start, rest = f"{start}upsamples.{place}.", rest[block.end() :]
    else:
        inside = next(key for key in VAE if rest.startswith(f"{key}."))
        start, rest = f"{start}{VAE[inside]}.", rest[len(inside) + 1 :]
    first, _, leaf = rest.partition(".")
    if first == "conv_shortcut":
        return f"{start}shortcut.{leaf}"
    return f"{start}{RESNET[first]}.{leaf}" if first in RESNET else start + rest
