"""Table of kernels for dense attention: what each needs, and how it is called on `[B, L, H, D]`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from wanlab.models.weights import free_bytes

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Query, key and value, `[B, L, H, D]` each, to `[B, L, H, D]`."""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: name in settings and tables. run: how it is called.
        cpu: whether it runs on a CPU.
        capability: lowest and highest compute capability of GPUs that it runs on; None is no GPU.
        dtypes: what it takes on a GPU. head_sizes: lowest, highest, and what they are a multiple of.
        module: module that it is imported from; `""` comes with PyTorch. install: command that brings it.
        rounds: what it rounds beyond its dtype; `""` for an exact one.
    """

    name: str
    run: Attention
    cpu: bool = False
    capability: tuple[tuple[int, int], tuple[int, int]] | None = ((8, 0), (99, 0))
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    head_sizes: tuple[int, int, int] = (8, 256, 8)
    module: str = ""
    install: str = ""
    rounds: str = ""

    def lacks(
        self, device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
    ) -> str:
        """What it needs and is not here, with what brings it; empty if it can run. None leaves a check out."""
        if device.type != "cuda":
            return "" if self.cpu else f"an NVIDIA GPU ({self._capabilities}) for {self.name}"
        has = torch.cuda.get_device_capability(device)
        if self.capability is None or not self.capability[0] <= has <= self.capability[1]:
            here = ".".join(map(str, has))
            return f"a GPU of {self._capabilities} for {self.name}; this one has {here}"
        kind = None if dtype is None else str(dtype).removeprefix("torch.")
        if kind is not None and kind not in self.dtypes:
            return f"a model in {' or '.join(self.dtypes)} for {self.name}, not {kind}: give dtype={self.dtypes[0]!r}"
        low, high, step = self.head_sizes
        if head_size is not None and not (low <= head_size <= high and head_size % step == 0):
            return f"heads of {low} to {high} channels, a multiple of {step}, for {self.name}; this model has {head_size}"
        if self.module and not importable(self.module):
            return f"the package of {self.name}: {self.install}"
        return ""

    @property
    def _capabilities(self) -> str:
        low, high = (".".join(map(str, end)) for end in self.capability or ((0, 0), (0, 0)))
        if low == high:
            return f"compute capability {low}"
        return (
            f"compute capability {low} or later"
            if high.startswith("99")
            else f"compute capability {low} to {high}"
        )


def importable(module: str) -> bool:
    """Whether a module is installed; its own imports are not tried."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def heads_first(call: Callable[..., torch.Tensor]) -> Attention:
    """Attention on `[B, L, H, D]` by a function that takes `[B, H, L, D]`; views, no copies."""

    @functools.wraps(call)
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return call(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)

    return run


def _sdpa(backend: SDPBackend) -> Attention:
    def call(*heads: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads)

    return heads_first(call)


def _first(output: Any) -> torch.Tensor:
    """The attention itself, from a function that may return the sums of the softmax beside it."""
    return output[0] if isinstance(output, tuple) else output


def _flash_attention_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func  # an optional package

    return _first(flash_attn_func(query, key, value))


def _flash_attention_4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func  # an optional package

    return _first(flash_attn_func(query, key, value))


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """flex_attention as one kernel; uncompiled it holds all scores."""
    return torch.compile(flex_attention, dynamic=False)


def _sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from sageattention import sageattn  # an optional package

    # It would take the mean off the keys in place, which another layer may still need.
    key = key - key.mean(1, keepdim=True)
    return sageattn(query.contiguous(), key, value.contiguous(), tensor_layout="NHD", smooth_k=False)


_HALF_AND_SINGLE = ("bfloat16", "float16", "float32")

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "sdpa-math",
            _sdpa(SDPBackend.MATH),
            cpu=True,
            capability=((0, 0), (99, 0)),
            dtypes=(*_HALF_AND_SINGLE, "float64"),
            head_sizes=(1, 1 << 20, 1),
        ),
        Kernel("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION), cpu=True),
        Kernel(
            "sdpa-efficient",
            _sdpa(SDPBackend.EFFICIENT_ATTENTION),
            capability=((5, 0), (99, 0)),
            dtypes=_HALF_AND_SINGLE,
            head_sizes=(8, 1 << 16, 8),
        ),
        Kernel("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), head_sizes=(8, 128, 8)),
        Kernel(
            "flash-attention-3",
            _flash_attention_3,
            capability=((9, 0), (9, 0)),
            dtypes=("bfloat16",),
            module="fa3_fwd_interface",
            install="pip install fa3-fwd",
        ),
        Kernel(
            "flash-attention-4",
            _flash_attention_4,
            capability=((9, 0), (11, 9)),
            head_sizes=(8, 128, 8),
            module="flash_attn.cute",
            install="pip install flash-attn-4 'nvidia-cutlass-dsl[cu13]'",
        ),
        Kernel(
            "flex",
            heads_first(lambda *heads: compiled_flex()(*heads)),
            dtypes=_HALF_AND_SINGLE,
            head_sizes=(16, 256, 8),
            module="triton",
            install="pip install triton",
        ),
        Kernel(
            "sage",
            _sage,
            head_sizes=(64, 128, 32),
            module="sageattention",
            install="pip install sageattention==1.0.6",
            rounds="queries and keys to 8 bits",
        ),
    )
}


def fits(kernel: Kernel, query: torch.Tensor) -> bool:
    """Whether there is memory for a kernel at this shape, `[B, L, H, D]`: the unfused one holds all scores twice."""
    if kernel.name != "sdpa-math":
        return True
    batch, tokens, heads, _ = query.shape
    return 8 * batch * heads * tokens**2 < free_bytes(query.device) / 2
