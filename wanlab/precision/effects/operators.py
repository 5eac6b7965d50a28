"""What layers really multiply, seen in one forward: operators with their operands, and on a GPU their kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.precision.applied.layers import AS_LOADED
from wanlab.precision.plans.plan import is_float

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from wanlab.models import Model

PRODUCTS = {
    "mm": 0,
    "addmm": 1,
    "_scaled_mm": 0,
    "_int_mm": 0,
    "bmm": 0,
    "baddbmm": 1,
    "convolution": 0,
    "linear": 0,
}
"""Operators that multiply -> position of their first operand; the weight follows."""


EXPECTED = {"scaled_mm": ("_scaled_mm", "float8_e4m3fn"), "int_mm": ("_int_mm", "int8")}
"""How a layer computes -> its operator and the dtype of both operands."""


@dataclass(frozen=True)
class Product:
    """One product of a layer.

    Attributes:
        operator: e.g. `"_scaled_mm"`. left, right: dtypes of input and weight as they are multiplied.
        rows: of the input.
        few: every value of the input is one of at most 256 (of the first row, where rows have scales of their own).
        decoded: the weight is, bitwise, what the layer's codes stand for.
    """

    operator: str
    left: str
    right: str
    rows: int
    few: bool
    decoded: bool

    def __str__(self) -> str:
        return f"{self.operator} {self.left} x {self.right}"


def watch(call: Callable[[], object], layers: Mapping[str, torch.nn.Module]) -> dict[str, list[Product]]:
    """Run a forward and note what every layer multiplies; compiled parts run eagerly meanwhile.

    Args:
        call: one forward.
        layers: name -> module, of those to note.

    Returns:
        Layer -> its products, in order; empty for a layer that was not called.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    running: list[str] = []
    seen: dict[str, list[Product]] = {name: [] for name in layers}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if running and name in PRODUCTS:
                seen[running[-1]].append(_product(name, args, layers[running[-1]]))
            return func(*args, **(kwargs or {}))

    with _named(layers, running), torch.no_grad(), torch.compiler.set_stance("force_eager"), Watching():
        call()
    return seen


def kernels(call: Callable[[], object], device: torch.device) -> pd.DataFrame:
    """Kernels of one forward by the operator that launched them; the profiler's times are not to be quoted as latency.

    Returns:
        DataFrame: operator, kernel (on the CPU the operator itself), calls, share_percent (of the time of these kernels).
    """
    import pandas as pd
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        call()  # libraries choose their kernels on the first call
        with profile(activities=activities) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
    counts: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for event in profiler.events():
        operator = event.name.removeprefix("aten::")
        if not event.name.startswith("aten::") or operator not in PRODUCTS or operator == "linear":
            continue
        found = _kernels(event) if on_gpu else [(operator, event.time_range.elapsed_us())]
        for name, duration in found:
            counts[operator, name] += 1
            times[operator, name] += duration
    total = sum(times.values()) or 1.0
    rows = [
        {
            "operator": operator,
            "kernel": name,
            "calls": count,
            "share_percent": 100 * times[operator, name] / total,
        }
        for (operator, name), count in counts.items()
    ]
    frame = pd.DataFrame(rows, columns=["operator", "kernel", "calls", "share_percent"])
    return frame.sort_values("share_percent", ascending=False, ignore_index=True)


def small_forward(model: Model, component: str):
    """A call of an expert on random inputs of a clip of 8 x 8 tokens and two latent frames."""
    import torch

    from wanlab.convert.clip import default_shape
    from wanlab.convert.components import recipe

    side = 8 * model.spec.spatial_factor * model.spec.patch[1]
    wide = 8 * model.spec.spatial_factor * model.spec.patch[2]
    frames = 1 + (2 * model.spec.patch[0] - 1) * model.spec.temporal_factor
    plan = recipe(model, component)
    shape = default_shape(model, batch=1, height=side, width=wide, frames=frames)
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    return lambda: plan.reference(*inputs)


def product_fault(module, wanted: str, kernel: str, products: list[Product]) -> tuple[str, str] | None:
    """Kind and words of what is wrong with how a layer multiplied; None if nothing is."""
    from wanlab.precision.applied.linears import FEWEST_ROWS

    if not products:
        return (
            None
            if wanted == AS_LOADED
            else ("product", "was not called in a forward, so its format has no effect")
        )
    for product in products:
        if kernel == "int_mm" and product.rows < FEWEST_ROWS:
            operator, kind = None, str(module.dtype).removeprefix("torch.")
        elif kernel in EXPECTED:
            operator, kind = EXPECTED[kernel]
        else:
            operator, kind = None, _float_of(module, wanted)
        if {product.left, product.right} != {kind}:
            fallback = "float32" in (product.left, product.right)
            said = f"computes {product} where {operator or kind} is meant" + (
                ": FP32 fallback" if fallback else ""
            )
            return ("fp32" if fallback else "product"), said
        if operator and product.operator != operator:
            return "product", f"computes {product} where {operator} is meant"
        if operator is None and not product.decoded:
            return "no-op", "multiplies with another weight than the one that it holds"
        if operator is None and getattr(module, "activation", None) is not None and not product.few:
            return "no-op", f"takes its input as it comes, where {wanted} rounds it to codes"
    return None


def _float_of(module, wanted: str) -> str:
    """The float that a layer's product is meant to be in."""
    kind = module.weight.dtype if wanted == AS_LOADED or is_float(wanted) else module.dtype
    return str(kind).removeprefix("torch.")


def _kernels(event) -> list[tuple[str, float]]:
    """Kernels of an operator and of what it calls."""
    found = [(kernel.name, kernel.duration) for kernel in event.kernels]
    for child in event.cpu_children:
        found += _kernels(child)
    return [(name, duration) for name, duration in found if not name.startswith(("Memcpy", "Memset"))]


@contextmanager
def _named(layers: Mapping[str, torch.nn.Module], running: list[str]) -> Iterator[None]:
    """Inside the block `running` ends with the name of the innermost of these layers that is under way."""
    with ExitStack() as stack:
        for name, module in layers.items():
            before = module.register_forward_pre_hook(lambda module, args, name=name: running.append(name))
            after = module.register_forward_hook(
                lambda module, args, made: running.pop() and None, always_call=True
            )
            stack.callback(before.remove), stack.callback(after.remove)
        yield


def _product(name: str, args: tuple, module) -> Product:
    import torch

    left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
    codes = getattr(module, "decoded", None)
    weight = codes() if codes is not None else module.weight
    given = right if name == "convolution" else right.mT
    given = given[0] if given.ndim > weight.ndim else given
    same = given.shape == weight.shape and given.dtype == weight.dtype and torch.equal(given, weight)
    one = left[:1] if getattr(module, "per_token", False) else left
    few = left.dtype.itemsize > 1 and torch.unique(one.detach().flatten()[: 2**20]).numel() <= 256
    rows = left.numel() // (left.shape[1] if name == "convolution" else left.shape[-1])
    return Product(name, *(str(t.dtype).removeprefix("torch.") for t in (left, right)), rows, few, same)
