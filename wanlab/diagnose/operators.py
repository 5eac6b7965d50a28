"""Operators and kernels: their kind, their operations and bytes from recorded input shapes, and those of one call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

LINEAR, ATTENTION, ALLOCATION, TRANSFER, POINTWISE = (
    "linear",
    "attention",
    "allocation",
    "transfer",
    "pointwise",
)

ITEM_BYTES = {
    "double": 8, "long int": 8, "long": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short": 2,
    "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip
FORMATS = {
    "double": "fp64", "float": "fp32", "c10::BFloat16": "bf16", "c10::Half": "fp16",
    "c10::Float8_e4m3fn": "fp8", "c10::Float8_e5m2": "fp8", "signed char": "int8",
}  # fmt: skip
COPIES = r"(Memcpy ?(HtoD|DtoH|H2D|D2H|M2D|D2M)|Copy(HostToDevice|DeviceToHost))"
"""Names of copies between host and device: of CUDA and ROCm, of older files, of Intel (M is the host's memory)."""
_ATTENTION = r"scaled_dot_product|flash|fmha|sdpa|flex_attention|efficient_attention|sage_?attn"
_KINDS = (
    # Inductor names its kernels after all fused operators, so a product in the name may be outside the kernel.
    (ATTENTION, r"^triton_tem\w*attention"), (LINEAR, r"^triton_tem"), (POINTWISE, r"^triton_"),
    (ATTENTION, _ATTENTION),
    (ALLOCATION, r"^aten::(empty|resize_|set_)|^(cu(da)?|hip)(Malloc|Free|Host(Alloc|Malloc|Free)|MemAlloc|MemFree|MemMap"
                 r"|MemCreate|ExtMalloc)|^ur(USM\w*Alloc|USMFree)"),
    (LINEAR, r"^aten::(linear|addmm|mm|bmm|baddbmm|matmul|_scaled_mm|_int_mm|mkldnn_linear|_?conv|mkldnn_conv|cudnn_conv"
             r"|thnn_conv|slow_conv)|gemm|cutlass|nvjet|xmma|wgmma|cublas|^Cijk_|_conv\w*_(fprop|implicit)"),
    (TRANSFER, rf"^{COPIES}|^(cu(da)?|hip)Memcpy|^urEnqueue(USM|MemBuffer)"),
    (POINTWISE, r"^aten::"),
)  # fmt: skip
_INPUTS = tuple[list[list[int | list[int]]], list[str], list]
LARGEST_SIZE = 2**40  # of an axis; more is a mistake of the file
_SDPA = re.compile(r"^(aten::)?_?scaled_dot_product_\w*attention\w*$")
_VIEW = re.compile(
    r"^aten::(view|as_strided|reshape|_reshape_alias|slice|select|expand|permute|transpose|t$|unsqueeze|squeeze|detach"
    r"|alias|_unsafe_view|split|chunk|narrow|unbind|unflatten|flatten|item|_local_scalar_dense|result_type|lift_fresh"
    r"|is_|movedim|view_as|broadcast|to$|type_as|contiguous)"
)


def kind(name: str) -> str | None:
    """linear (convolutions too), attention, allocation, transfer, pointwise; None if it is not an operator or kernel."""
    return next((name_of_kind for name_of_kind, pattern in _KINDS if re.search(pattern, name)), None)


WORDS = (
    (_ATTENTION, "the attention kernel"),
    (r"conv_?3d|conv3d", "3D convolution"),
    (r"conv_?2d|conv2d", "2D convolution"),
    (r"(?<![a-z])conv|_conv|fprop|mkldnn_convolution", "convolution"),
    (r"^aten::(linear|addmm|mm|bmm|baddbmm|matmul|_scaled_mm|_int_mm|mkldnn_linear)$", "matrix products"),
    (r"^triton_tem|gemm|cutlass|nvjet|xmma|wgmma|cublas|^Cijk_", "matrix products"),
    (r"^triton_", "fused element-wise operators"),
    (r"Memcpy|copy|aten::(cat|clone|contiguous|_to_copy|fill_|zero_)", "copies of data"),
    (r"norm", "norms"),
    (r"softmax", "softmax"),
    (r"elementwise|aten::(add|mul|sub|div|silu|gelu|sigmoid|tanh|exp|pow|sqrt)_?$", "element-wise operators"),
)
"""Pattern in the name of an operator or kernel -> what it is for a reader; the first that fits counts."""


def code_words(name: str) -> str:
    """What an operator or kernel is, in words: "3D convolution"; "" where its name does not tell."""
    return next((words for pattern, words in WORDS if re.search(pattern, name)), "")


def flop(name: str, inputs: str) -> float:
    """Operations of a matrix product, convolution or attention; a multiply-add counts as two. 0 for anything else.

    Args:
        name: name of the operator, such as "aten::addmm".
        inputs: JSON as in `Trace.events`.

    The formulas are those of `torch.utils.flop_counter`: 2 M N K for a product, 4 B H Sq Sk D for attention, twice the
    weight's elements per output position and sample for a convolution.
    """
    short = name.removeprefix("aten::")
    if not inputs or name == short:
        return 0.0
    shapes, _, values = _parsed(inputs)
    try:
        return float(_flop(short, shapes, values))
    except (ArithmeticError, IndexError, TypeError, ValueError):  # other arguments are unknown, not an error
        return 0.0


@lru_cache(maxsize=4096)
def _parsed(inputs: str) -> tuple[list, list[str], list]:
    """Shapes, types and values of inputs; empty where a file has something else in their place."""
    try:
        shapes, types, values = msgspec.json.decode(inputs, type=_INPUTS)
    except (msgspec.DecodeError, RecursionError):
        return [], [], []
    return ([], [], []) if _largest(shapes) > LARGEST_SIZE else (shapes, types, values)


def _largest(shapes: list) -> int:
    """The largest size of any axis; a negative one counts as too large."""
    sizes = [
        size for shape in shapes for part in shape for size in (part if isinstance(part, list) else [part])
    ]
    return max((size if size >= 0 else LARGEST_SIZE + 1 for size in sizes), default=0)


def _flop(name: str, shapes: list, values: list) -> float:
    if name in ("mm", "_int_mm", "_scaled_mm"):
        (m, k), (_, n) = shapes[0], shapes[1]
        return 2 * m * n * k
    if name == "addmm":
        (m, k), (_, n) = shapes[1], shapes[2]
        return 2 * m * n * k
    if name in ("bmm", "baddbmm"):
        left, right = shapes[-2:] if name == "bmm" else shapes[1:3]
        return 2 * math.prod(left) * right[2]
    if name == "linear":
        return 2 * math.prod(shapes[0]) * shapes[1][0]
    if name == "matmul":
        return 2 * math.prod(shapes[0]) * (shapes[1][-1] if len(shapes[1]) > 1 else 1)
    if _SDPA.match(name):
        *heads, queries, width = shapes[0]
        return 2 * math.prod(heads) * queries * shapes[1][-2] * (width + shapes[2][-1])
    if name in ("convolution", "_convolution"):
        stride, padding, dilation = (json.loads(values[i]) for i in (3, 4, 5))
        return _convolution(shapes[0], shapes[1], stride, padding, dilation, values[6] == "True")
    return 0.0


def product_sizes(name: str, inputs: str) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer's product, in features; None if the operator is none.

    Args:
        name, inputs: as in `flop`.
    """
    shapes = _parsed(inputs)[0] if inputs else []
    place = {"aten::linear": 1, "aten::addmm": 2, "aten::mm": 1}.get(name)
    if place is None or len(shapes) <= place or len(shapes[place]) != 2:
        return None
    first, second = shapes[place]
    return (second, first) if name == "aten::linear" else (first, second)


def is_cross_attention(name: str, inputs: str) -> bool:
    """Whether an attention has different numbers of keys and queries, so that its keys come from another sequence."""
    if not inputs or not _SDPA.match(name):
        return False
    shapes = _parsed(inputs)[0]
    return len(shapes) > 1 and len(shapes[0]) > 1 and len(shapes[1]) > 1 and shapes[0][-2] != shapes[1][-2]


def _convolution(
    x: list, weight: list, stride: list, padding: list, dilation: list, transposed: bool
) -> float:
    if transposed:  # every input position is multiplied with the whole kernel once
        return 2 * x[0] * math.prod(x[2:]) * math.prod(weight)
    out = [
        (size + 2 * pad - step * (width - 1) - 1) // move + 1
        for size, width, move, pad, step in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    return 2 * x[0] * math.prod(out) * math.prod(weight)


def moved_bytes(name: str, inputs: str) -> float:
    """Least traffic of an operator: every input read once, and one output written that is as large as the largest input.

    An estimate from recorded shapes: savings by caches and repeated reads of broadcasts are not included. 0 for views, and
    for conversions whose work is in another operator.
    """
    if not inputs or _VIEW.match(name) or kind(name) == ALLOCATION:
        return 0.0
    shapes, types, _ = _parsed(inputs)
    sizes = [size for pair in zip(shapes, types, strict=False) for size in _sizes(*pair)]
    # The inputs of an Inductor kernel include its outputs.
    written = 0.0 if name.startswith("triton_") else max(sizes, default=0)
    try:
        return float(sum(sizes) + written)
    except OverflowError:
        return 0.0


def _sizes(shape: list, kind_of: str) -> list[float]:
    """Bytes of a tensor or of each of a list of tensors."""
    if shape and isinstance(shape[0], list):
        return [
            size for part in shape for size in _sizes(part, "float" if kind_of == "TensorList" else kind_of)
        ]
    return [math.prod(shape) * ITEM_BYTES[kind_of]] if kind_of in ITEM_BYTES else []


def number_format(inputs: str) -> str:
    """Number format of the first tensor input, "" if unknown."""
    if not inputs:
        return ""
    types = _parsed(inputs)[1]
    return next((FORMATS[name] for name in types if name in FORMATS), "")


COLUMNS = ["name", "kind", "calls", "time_ms", "share_percent"]
OTHER = "other"
"""The kind of everything that is no product, attention or simple operator, such as copies inside a library."""


def call_kernels(call: Callable[[], object], device: torch.device | str) -> pd.DataFrame:
    """Kernels of one call by torch.profiler, of every library in this process; on the CPU PyTorch's operators.

    Use it after timing: the profiler slows the call, so the sum of the times is not the latency.

    Args:
        call: a function without arguments. It runs twice, because libraries choose their kernels at the first call.

    Returns:
        name, kind (see `kind`, or `"other"`), calls, time_ms, share_percent of the sum; longest first.
    """
    on_gpu = torch.device(device).type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[activity]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time_us > 0:
            rows.append((event.key, event.count, time_us / 1e3))
    return kernel_table(pd.DataFrame(rows, columns=["name", "calls", "time_ms"]))


def kernel_table(rows: pd.DataFrame, kind_of: Callable[[str], str | None] = kind) -> pd.DataFrame:
    """The columns of `call_kernels` from name, calls and time_ms.

    Args:
        kind_of: name of a kernel or operator -> its kind; None stands for `"other"`.
    """
    kinds = [kind_of(name) or OTHER for name in rows["name"]]
    total = rows["time_ms"].sum() or 1.0
    table = rows.assign(kind=kinds, share_percent=100 * rows["time_ms"] / total)
    return table.sort_values("time_ms", ascending=False, kind="stable", ignore_index=True)[COLUMNS]


@dataclass(frozen=True)
class Operations:
    """Operations of one call, a multiply-add as two.

    Attributes:
        linear, attention, convolution: operations of matrix products, scaled dot products, and convolutions.
    """

    linear: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0

    @property
    def flop(self) -> float:
        return self.linear + self.attention + self.convolution


def count_operations(call: Callable[[], Any]) -> tuple[Operations, Any]:
    """Operations of one call of eager PyTorch, by torch.utils.flop_counter; and what the call returned."""
    # PyTorch registers no count for the attention kernel of the CPU.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_of_cpu}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        output = call()
    sums = {"linear": 0.0, "attention": 0.0, "convolution": 0.0}
    for operator, flop in counter.get_flop_counts().get("Global", {}).items():
        name = str(operator)
        kind = "attention" if "attention" in name else "convolution" if "conv" in name else "linear"
        sums[kind] += flop
    return Operations(**sums), output


def _attention_of_cpu(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop(query, key, value)
