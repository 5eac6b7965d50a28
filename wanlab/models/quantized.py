"""Quantized checkpoints: weights in 8 or 4 bits with scales beside them, read as floating-point numbers.

Of a layer `x` these conventions are read:
- FP8 or INT8 `x.weight` times `x.scale_weight` (ComfyUI, with its marker `scaled_fp8`; musubi-tuner), `x.weight_scale`
  (compressed-tensors, vLLM, ModelOpt, LightX2V, ComfyUI with `x.comfy_quant`), `x.weight_scale_inv` (DeepSeek; despite its
  name it is the factor) or `x.weight._scale` beside `x.weight._data` (quanto). One scale per tensor, channel, or block.
- bitsandbytes in 8 bits: `x.weight` times `x.SCB` / 127, per channel.
- bitsandbytes in 4 bits: two codes a byte, the first in the high half, looked up in `x.weight.quant_map` and multiplied by
  `x.weight.absmax` of its block, which may itself be quantized.
Scales of activations (`x.input_scale`) are not needed, because products are computed in floating point.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wanlab.core.errors import WanlabError

FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
FP8_TYPES = {"F8_E4M3", "F8_E5M2"}
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight._scale")
OF_ACTIVATIONS = ("scale_input", "input_scale", "output_scale")
MARKERS = ("scaled_fp8", "comfy_quant", "weight_format")
"""Names that only say what the other tensors are."""
BLOCK = 128  # DeepSeek's size of a block, where the configuration states none
METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quanto")
"""Values of `quant_method` in config.json that are read, as far as their tensors follow the conventions above."""
NOT_READ = {
    "weight_packed": "packed integers of compressed-tensors",
    "weight_scale_2": "NVFP4 of ModelOpt",
    "weight_global_scale": "NVFP4 of compressed-tensors",
    "weight_zero_point": "integers with zero points",
    "qweight": "GPTQ or AWQ",
    "wscales": "SVDQuant of Nunchaku",
    "lora_A.weight": "a LoRA (its file follows the model's name after +, docs/models.md)",
    "lora_down.weight": "a LoRA (its file follows the model's name after +, docs/models.md)",
}
"""Last part of a tensor's name -> the format that it is a sign of."""

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Encoding:
    """How a quantized weight lies in the files.

    Attributes:
        source: name of the tensor of codes.
        beside: role of another tensor that is needed -> its name.
        kind: name of the format for readers, e.g. `"FP8"`.
        scaling: `"per-tensor"`, `"per-channel"` or `"per-block"`.
        shape: shape of the weight, if the codes are packed.
        block: rows and columns of a block, where the configuration states them.
    """

    source: str
    beside: Mapping[str, str]
    kind: str
    scaling: str
    shape: tuple[int, ...] | None = None
    block: tuple[int, int] | None = None

    def decode(self, read: Read, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight in float32.

        Args:
            read: reads a tensor by its name, to the device of the computation.
            shape: shape of the weight.

        Raises:
            WanlabError: sizes of codes, scales and weight do not belong together.
        """
        codes = read(self.source)
        if self.kind.startswith("4-bit"):
            return _four_bits(
                codes, {role: read(name) for role, name in self.beside.items()}, shape, self.source
            )
        scale = read(self.beside["scale"]).float()
        if "SCB" in self.beside["scale"]:
            scale = scale / 127
        return codes.float().mul_(_expanded(scale, shape, self.block, self.beside["scale"]))


def encodings(
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, str],
    config: Mapping[str, Any],
    read: Read,
    where: str,
) -> dict[str, Encoding]:
    """Parameter -> its encoding, for those that are quantized.

    Args:
        dtypes, shapes: of every tensor in the files; dtypes as safetensors names them.
        parameters: floating-point parameter -> its name in the files.
        config: the part's config.json.
        read: reads a small tensor by its name.
        where: folder, for messages.

    Raises:
        WanlabError: a format that is not read, or a tensor that it needs is missing; the message names both.
    """
    stated = config.get("quantization_config") or {}
    method = stated.get("quant_method") if isinstance(stated, Mapping) else str(stated)
    if method is not None and method not in METHODS:
        raise WanlabError(
            f"{where}: the weights are quantized by {method}, which is not read; give FP8 with scales, bitsandbytes,"
            " or the weights before quantization"
        )
    for name in dtypes:
        for ending, title in NOT_READ.items():
            if name.endswith(f".{ending}"):
                raise WanlabError(
                    f"{where}: tensor {name} is a sign of {title}, which is not read; give FP8 with scales,"
                    " bitsandbytes, or the weights before quantization"
                )
        if name.endswith(".comfy_quant"):
            _check_comfy(name, read(name), where)
    block = stated.get("weight_block_size") if isinstance(stated, Mapping) else None
    found = {}
    for name, source in parameters.items():
        encoding = _encoding(name, source, dtypes, shapes, tuple(block) if block else None, read, where)
        if encoding is not None:
            found[name] = encoding
    bare = [name for name, source in parameters.items() if dtypes[source] in FP8_TYPES and name not in found]
    scaled = [name for name, encoding in found.items() if encoding.kind == "FP8"]
    if bare and (scaled or method is not None or "scaled_fp8" in dtypes):
        raise WanlabError(
            f"{where}: tensor {parameters[bare[0]]} is in FP8 and its scale is missing, others have one;"
            " fetch the files again"
        )
    return found


def _encoding(
    name: str,
    source: str,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, int] | None,
    read: Read,
    where: str,
) -> Encoding | None:
    dtype, layer = dtypes[source], name.removesuffix("weight")
    state = next((key for key in dtypes if key.startswith(f"{name}.quant_state.bitsandbytes__")), None)
    if state is not None:
        roles = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        beside = {role: f"{name}.{role}" for role in roles if f"{name}.{role}" in dtypes}
        if missing := {"absmax", "quant_map"} - set(beside):
            raise WanlabError(
                f"{where}: tensor {name}.{min(missing)} is missing beside {name}; fetch the files again"
            )
        kind = f"4-bit {state.rpartition('__')[2].upper()} (bitsandbytes)"
        shape = tuple(_json_of(read(state), state, where)["shape"])
        return Encoding(source, beside | {"state": state}, kind, "per-block", shape)
    scales = [layer + ending for ending in SCALES if name.endswith("weight") and layer + ending in dtypes]
    if f"{layer}SCB" in dtypes:
        scales.append(f"{layer}SCB")
    if not scales:
        if dtype not in FLOAT_TYPES | FP8_TYPES:
            raise WanlabError(
                f"{where}: tensor {source} is {dtype} and has no scale beside it; give FP8 with scales, bitsandbytes,"
                " or the weights before quantization"
            )
        return None
    scale = scales[0]
    if len(scales) > 1 or dtype not in FP8_TYPES | {"I8"} or dtypes[scale] not in FLOAT_TYPES | {"F8_E8M0"}:
        raise WanlabError(
            f"{where}: {scales[-1]} ({dtypes[scales[-1]]}) beside {source} ({dtype}) follows no convention that is read;"
            " give FP8 or INT8 weights with one floating-point scale each, or the weights before quantization"
        )
    if scale.endswith("SCB"):
        written = f"{layer}weight_format"
        if written in dtypes and int(read(written).flatten()[0]) != 0:
            raise WanlabError(
                f"{where}: {written} is not 0 (rows); save the model again with a present bitsandbytes"
            )
        return Encoding(source, {"scale": scale}, "INT8 (bitsandbytes)", "per-channel")
    sizes = [size for size in shapes[scale] if size != 1]
    scaling = ("per-tensor", "per-channel")[len(sizes)] if len(sizes) < 2 else "per-block"
    return Encoding(source, {"scale": scale}, "FP8" if dtype in FP8_TYPES else "INT8", scaling, block=block)


def used(encoding: Encoding) -> set[str]:
    """Names of the tensors that an encoding reads."""
    return {encoding.source, *encoding.beside.values()}


def is_known(name: str) -> bool:
    """Whether a tensor is not needed: a scale of activations, or a marker."""
    return name.rpartition(".")[2] in (*OF_ACTIVATIONS, *MARKERS)


def described(found: Mapping[str, Encoding], total: int, bare: int, dtype: str) -> list[str]:
    """What was read, as sentences, e.g. "FP8 weights with per-tensor scales, dequantized to bfloat16 (12 of 40 tensors)".

    Args:
        found: from `encodings`.
        total: number of tensors of the network.
        bare: number of FP8 tensors without scales.
        dtype: dtype of the loaded weights.
    """
    kinds = Counter((encoding.kind, encoding.scaling) for encoding in found.values())
    lines = [
        f"{kind} weights with {scaling} scales, dequantized to {dtype} ({count} of {total} tensors)"
        for (kind, scaling), count in kinds.items()
    ]
    if bare:
        lines.append(f"FP8 weights without scales, converted to {dtype} ({bare} of {total} tensors)")
    return lines


def _expanded(
    scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, name: str
) -> torch.Tensor:
    """A scale in a shape that multiplies a weight of `shape`."""
    if scale.numel() == 1:
        return scale.reshape(())
    sizes = list(scale.shape)
    while sizes[-1] == 1 and len(sizes) > 1:
        sizes.pop()
    if sizes == [shape[0]]:
        return scale.reshape(shape[0], *[1] * (len(shape) - 1))
    if len(sizes) != 2 or len(shape) != 2:
        raise WanlabError(
            f"scale {name} has shape {list(scale.shape)}, its weight {list(shape)}; they do not belong together"
        )
    scale = scale.reshape(sizes)
    for axis, (blocks, length) in enumerate(zip(sizes, shape, strict=True)):
        if block is not None and -(-length // block[axis]) == blocks:
            size = block[axis]
        elif blocks == -(-length // BLOCK):
            size = BLOCK
        elif length % blocks == 0:
            size = length // blocks
        else:
            raise WanlabError(
                f"scale {name} has shape {list(scale.shape)}, its weight {list(shape)}; state weight_block_size in the"
                " quantization_config of config.json"
            )
        if blocks > 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return scale


def _four_bits(
    codes: torch.Tensor, beside: Mapping[str, torch.Tensor], shape: tuple[int, ...], name: str
) -> torch.Tensor:
    state = _json_of(beside["state"], name, name)
    absmax = beside["absmax"]
    if "nested_absmax" in beside:  # the scales are quantized themselves
        values = beside["nested_quant_map"].float()[absmax.long()]
        absmax = _by_block(values, beside["nested_absmax"].float(), state["nested_blocksize"])
        absmax = absmax + state["nested_offset"]
    packed = codes.flatten()
    pairs = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()
    values = beside["quant_map"].float()[pairs.long()]
    count = torch.Size(shape).numel()
    if values.numel() not in (count, count + 1) or absmax.numel() != -(-count // state["blocksize"]):
        raise WanlabError(
            f"tensor {name} has {values.numel()} codes, its weight {list(shape)}; fetch the files again"
        )
    return _by_block(values[:count], absmax.float(), state["blocksize"]).reshape(shape)


def _by_block(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """Each `size` values in a row times their factor."""
    return values * factors.flatten().repeat_interleave(size)[: values.numel()]


def _json_of(tensor: torch.Tensor, name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(tensor.flatten().to(torch.uint8).tolist()))
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise WanlabError(f"{where}: tensor {name} holds no JSON object; fetch the files again")


def _check_comfy(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuse a layer whose `comfy_quant` names a format with more than scales, such as a rotation."""
    kind = _json_of(tensor, name, where).get("format", "")
    if not str(kind).startswith("float8_e") and kind not in ("int8", "int8_tensorwise", "int8_blockwise"):
        raise WanlabError(
            f"{where}: {name} names the format {kind!r}, which is not read; give FP8 with scales"
        )
