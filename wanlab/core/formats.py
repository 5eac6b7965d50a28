"""Element types of tensors: one table of their names in PyTorch, ONNX and other programs, their sizes and colours.

Quantized layers combine these types (`wanlab.precision.formats`); engine reports, plots and plans take names, widths and
colours from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ElementType:
    """One type of number that tensors hold.

    Attributes:
        name: name in plans, reports and tables, e.g. `"bf16"`.
        kind: `"float"` (networks are trained in it), `"code"` (elements of quantized tensors), `"index"` (counts and
            masks) or `"product"` (only used inside matrix products, never stored).
        bits: size of one number in memory.
        torch: name in PyTorch; empty where PyTorch has none.
        onnx: names in `onnx.TensorProto.DataType`; wanlab writes the first.
        others: other names, used by profilers and engines.
        colour: colour in every plot; empty where plots do not distinguish the type.
    """

    name: str
    kind: str
    bits: int
    torch: str = ""
    onnx: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    colour: str = ""


# fmt: off
ELEMENT_TYPES: dict[str, ElementType] = {
    element.name: element
    for element in (
        ElementType("fp64", "float", 64, "float64", ("DOUBLE",), ("double",)),
        ElementType("fp32", "float", 32, "float32", ("FLOAT",), ("float",), "#8a93a0"),
        ElementType("tf32", "product", 19, colour="#a58a6f"),
        ElementType("bf16", "float", 16, "bfloat16", ("BFLOAT16",), (), "#5f7fbf"),
        ElementType("fp16", "float", 16, "float16", ("FLOAT16",), ("half",), "#3fa796"),
        ElementType("fp8", "code", 8, "float8_e4m3fn", ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
                    ("float8_e5m2", "float8", "e4m3", "e5m2"), "#e07b39"),
        ElementType("int8", "code", 8, "int8", ("INT8",), (), "#b0679b"),
        ElementType("uint8", "code", 8, "uint8", ("UINT8",)),
        ElementType("fp4", "code", 4, "", ("FLOAT4E2M1",), ("float4", "e2m1"), "#c9485b"),
        ElementType("int4", "code", 4, "", ("INT4",), ("int4x2",), "#c9485b"),
        ElementType("uint4", "code", 4, "", ("UINT4",), ("uint4x2",)),
        ElementType("int64", "index", 64, "int64", ("INT64",)),
        ElementType("int32", "index", 32, "int32", ("INT32",)),
        ElementType("int16", "index", 16, "int16", ("INT16",)),
        ElementType("bool", "index", 8, "bool", ("BOOL",)),
    )
}
# fmt: on
"""Name -> type: floats from the widest, then codes, then indices."""

FLOATS = tuple(element.name for element in ELEMENT_TYPES.values() if element.kind == "float")
CODES = tuple(element.name for element in ELEMENT_TYPES.values() if element.kind == "code")
"""Number formats of quantized tensors."""

ITEM_BYTES = {name: element.bits / 8 for name, element in ELEMENT_TYPES.items() if element.kind != "product"}
"""Bytes of one number of a type in memory; a 4-bit code takes half a byte."""

PLAN_FLOATS = {name: ELEMENT_TYPES[name].torch for name in ("fp32", "fp16", "bf16")}
"""Floating-point types that wanlab computes in -> their names in PyTorch."""

_NAMES = {
    known.lower(): element.name
    for element in ELEMENT_TYPES.values()
    for known in (element.name, element.torch, *element.onnx, *element.others)
    if known
}
_ANY = re.compile(
    "|".join(sorted(_NAMES, key=len, reverse=True)), re.IGNORECASE
)  # longer names first: "bfloat16" contains "float16"


def element_name(name: str) -> str:
    """wanlab's name of a type that PyTorch, ONNX, ONNX Runtime or TensorRT name; empty for an unknown type.

    >>> [element_name(name) for name in ("bfloat16", "torch.float32", "FLOAT8E4M3FN", "Half", "complex64")]
    ['bf16', 'fp32', 'fp8', 'fp16', '']
    """
    return _NAMES.get(str(name).removeprefix("torch.").lower(), "")


def element_in(text: str) -> str:
    """wanlab's name of the type named in a text such as `"Row major linear BFloat16 format"`; empty if there is none."""
    match = _ANY.search(text)
    return _NAMES[match[0].lower()] if match else ""


def format_colours() -> dict[str, str]:
    """Type -> colour, for the types that plots distinguish, from the widest."""
    return {element.name: element.colour for element in ELEMENT_TYPES.values() if element.colour}
