"""What a layer's weight is held as, read from its tensors, and what is wrong with that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from wanlab.precision.apply import AS_LOADED, held_bytes
from wanlab.precision.formats import QuantFormat, decode_weight, encode_weight, get_format
from wanlab.precision.plan import FLOATS, is_float
from wanlab.precision.quant_linear import CastLinear, QuantLinear

_NO_OP = "is said to be {}, but its weight is bitwise the original's: nothing was rounded"


@dataclass(frozen=True)
class LayerState:
    """One layer as it is in memory.

    Attributes:
        layer: its name. wanted: format, or `"as-loaded"`.
        dtype: of the tensor that holds the weight.
        weight_before_bytes: of the original; None where there is no original to read. weight_bytes: as held, scales
            included.
        fault: kind of what is wrong (`"unquantised"`, `"dequantised"`, `"fp32"`, `"no-op"`, `"wrong"`), empty if nothing.
        said: what is wrong with it, without the layer's name.
    """

    layer: str
    wanted: str
    dtype: str
    weight_before_bytes: int | None
    weight_bytes: int
    fault: str = ""
    said: str = ""


def read_held(
    module: torch.nn.Module, layer: str, wanted: str, dtype: torch.dtype, original=None
) -> LayerState:
    """Read one layer.

    Args:
        module: that stands for it now.
        wanted: its format in the plan, or `"as-loaded"`.
        dtype: that its weight has where the plan leaves it alone.
        original: weight of the layer before the plan; None if it is gone.
    """
    quantised = isinstance(module, QuantLinear)
    tensor = module.codes if quantised else module.weight
    asked = "" if wanted == AS_LOADED or is_float(wanted) else wanted
    if asked and quantised and tensor.dtype == _dtype(get_format(asked).weight.codes.held):
        fault, said = _codes_fault(module, get_format(asked), original)
    elif asked:
        held = tensor if not quantised else module.decoded()
        fault, said = _float_fault(held.detach(), tensor.dtype, get_format(asked), dtype, original)
        if quantised and fault == "unquantised":
            fault, said = "no-op", _NO_OP.format(asked)
    elif quantised:
        fault, said = "wrong", f"is {module.format}, though the plan asks for {_called(wanted, dtype)}"
    else:
        kind = dtype if wanted == AS_LOADED else _dtype(FLOATS[wanted])
        fault, said = _dtype_fault(tensor.dtype, kind, wanted)
        if not fault and original is not None and not _same(tensor, original.to(kind)):
            fault, said = (
                "wrong",
                "has another weight than the original, though its format only rounds to a float",
            )
    hidden = _hidden(module) if quantised or isinstance(module, CastLinear) else 0
    if not fault and hidden:
        fault, said = (
            "dequantised",
            f"keeps {hidden:,} bytes of floats beside its {wanted} codes: it was dequantised once at load",
        )
    before = None if original is None else original.nbytes
    return LayerState(
        layer, wanted, str(tensor.dtype).removeprefix("torch."), before, held_bytes(module), fault, said
    )


def _codes_fault(module, format: QuantFormat, original) -> tuple[str, str]:
    """Codes of the right dtype: do they stand for the original's weight, by the format's definition?"""
    scales = {"tensor": 0, "channel": 1, "block": 2}[format.weight.granularity]
    blocks = module.shape[1] // format.weight.block if format.weight.block else None
    if module.scale.ndim != scales or (blocks and module.scale.shape[-1] != blocks):
        return (
            "wrong",
            f"has scales of shape {list(module.scale.shape)}, which are not those of {format.name}",
        )
    if original is None:
        return "", ""
    held, weight = module.decoded(), original.detach().to(module.dtype)
    fresh = decode_weight(*encode_weight(weight, format.weight, module.dtype), format.weight, module.dtype)
    if torch.equal(held, fresh):
        return "", ""
    if torch.equal(held, weight):
        return "no-op", _NO_OP.format(format.name)
    return "wrong", f"holds codes that are not the original's weight in {format.name}"


def _float_fault(held, kept, format: QuantFormat, dtype, original) -> tuple[str, str]:
    """A float where codes were asked for: what is it?"""
    name = str(kept).removeprefix("torch.")
    if original is not None and held.dtype.is_floating_point and torch.equal(held.float(), original.float()):
        if kept == torch.float32 and dtype != torch.float32:
            return "fp32", f"is held in float32, where the plan asks for {format.name}: FP32 fallback"
        return (
            "unquantised",
            f"is held in {name} with the original's values, where the plan asks for {format.name}",
        )
    if not kept.is_floating_point or kept.itemsize < 2:
        return "wrong", f"is held in {name}, where the plan asks for {format.name}"
    fresh = decode_weight(*encode_weight(held, format.weight, held.dtype), format.weight, held.dtype)
    if near(fresh, held):
        return (
            "dequantised",
            f"is held in {name}, though its values are those of {format.name}: it was dequantised once at load",
        )
    if kept == torch.float32 and dtype != torch.float32:
        return "fp32", f"is held in float32, where the plan asks for {format.name}: FP32 fallback"
    return "unquantised", f"is held in {name}, where the plan asks for {format.name}"


def near(first, second) -> bool:
    """Equal to the last bits of every value: a scale found again from rounded values may differ in its last bit."""
    slack = 1.5 * torch.finfo(second.dtype).eps
    return bool(((first.float() - second.float()).abs() <= slack * second.float().abs()).all())


def _dtype_fault(found: torch.dtype, wanted: torch.dtype, format: str) -> tuple[str, str]:
    if found == wanted:
        return "", ""
    name = str(found).removeprefix("torch.")
    if found == torch.float32:
        return "fp32", f"is held in float32, where the plan asks for {_called(format, wanted)}: FP32 fallback"
    return "wrong", f"is held in {name}, where the plan asks for {_called(format, wanted)}"


def _hidden(module) -> int:
    """Bytes of float tensors of a weight's size that hang on a layer outside its codes."""
    known = {id(getattr(module, name, None)) for name in ("codes", "scale", "bias", "input_scale", "weight")}
    there = {**vars(module), **module._parameters, **module._buffers}
    size = math.prod(module.shape)
    return sum(
        tensor.nbytes
        for tensor in there.values()
        if isinstance(tensor, torch.Tensor)
        and id(tensor) not in known
        and tensor.dtype.itemsize > 1
        and tensor.numel() >= size
    )


def _same(first, second) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _called(wanted: str, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, as it was loaded" if wanted == AS_LOADED else wanted


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
