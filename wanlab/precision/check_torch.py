"""Effect check in PyTorch: whether a plan was applied, read from weights, operators and kernels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from wanlab.core.errors import WanlabError
from wanlab.models.networks import stored_dtype
from wanlab.models.pipeline import Model
from wanlab.precision.apply import AS_LOADED, Applied, experts_of, held_bytes, requested_formats
from wanlab.precision.assignment import Assignment
from wanlab.precision.denoiser import small_forward
from wanlab.precision.formats import CODE_KINDS, QuantFormat, decode_weight, encode_weight, get_format
from wanlab.precision.plan import FLOATS, is_float
from wanlab.precision.quant_linear import FEWEST_ROWS, CastLinear, QuantLinear
from wanlab.precision.steps import SteppedLayer

_NO_OP = "has the format {}, but its weight is bitwise the original's: nothing was rounded"


@dataclass(frozen=True)
class LayerState:
    """One layer as it is in memory.

    Attributes:
        layer: name of the layer. format: its format, or `"as-loaded"`.
        dtype: dtype of the tensor that holds the weight.
        weight_before_bytes: size of the original; None where there is no original to read. weight_bytes: size in
            memory, scales included.
        fault: kind of the fault (`"unquantised"`, `"dequantised"`, `"fp32"`, `"no-op"`, `"wrong"`), empty without one.
        message: what is wrong, without the layer's name.
    """

    layer: str
    format: str
    dtype: str
    weight_before_bytes: int | None
    weight_bytes: int
    fault: str = ""
    message: str = ""


def read_layer(
    module: torch.nn.Module, layer: str, format_name: str, dtype: torch.dtype, original=None
) -> LayerState:
    """The state of one layer.

    Args:
        module: module that computes the layer now.
        format_name: its format in the plan, or `"as-loaded"`.
        dtype: dtype of its weight where the plan does not change it.
        original: weight of the layer before the plan; None if it is gone.
    """
    quantised = isinstance(module, QuantLinear)
    tensor = module.codes if quantised else module.weight
    codes_format = "" if format_name == AS_LOADED or is_float(format_name) else format_name
    if codes_format and quantised and tensor.dtype == _dtype(get_format(codes_format).weight.codes.held):
        fault, message = _codes_fault(module, get_format(codes_format), original)
    elif codes_format:
        values = tensor if not quantised else module.decoded()
        fault, message = _float_fault(
            values.detach(), tensor.dtype, get_format(codes_format), dtype, original
        )
        if quantised and fault == "unquantised":
            fault, message = "no-op", _NO_OP.format(codes_format)
    elif quantised:
        fault = "wrong"
        message = f"is {module.format}, though the plan asks for {_called(format_name, dtype)}"
    else:
        kind = dtype if format_name == AS_LOADED else _dtype(FLOATS[format_name])
        fault, message = _dtype_fault(tensor.dtype, kind, format_name)
        if not fault and original is not None and not _same(tensor, original.to(kind)):
            fault, message = (
                "wrong",
                "has another weight than the original, though its format only rounds to a float",
            )
    hidden = _hidden(module) if quantised or isinstance(module, CastLinear) else 0
    if not fault and hidden:
        fault, message = (
            "dequantised",
            f"keeps {hidden:,} bytes of floats beside its {format_name} codes: it was dequantised once at load",
        )
    before = None if original is None else original.nbytes
    return LayerState(
        layer,
        format_name,
        str(tensor.dtype).removeprefix("torch."),
        before,
        held_bytes(module),
        fault,
        message,
    )


def _codes_fault(module, format: QuantFormat, original) -> tuple[str, str]:
    """Fault of codes of the right dtype that do not encode the original's weight by the format's definition."""
    scales = {"tensor": 0, "channel": 1, "block": 2}[format.weight.granularity]
    blocks = module.shape[1] // format.weight.block if format.weight.block else None
    if module.scale.ndim != scales or (blocks and module.scale.shape[-1] != blocks):
        return (
            "wrong",
            f"has scales of shape {list(module.scale.shape)}, which are not those of {format.name}",
        )
    if original is None:
        return "", ""
    decoded, weight = module.decoded(), original.detach().to(module.dtype)
    fresh = decode_weight(*encode_weight(weight, format.weight, module.dtype), format.weight, module.dtype)
    if torch.equal(decoded, fresh):
        return "", ""
    if torch.equal(decoded, weight):
        return "no-op", _NO_OP.format(format.name)
    return "wrong", f"holds codes that are not the original's weight in {format.name}"


def _float_fault(values, kept, format: QuantFormat, dtype, original) -> tuple[str, str]:
    """Fault of a layer whose weight is a float where the plan asks for codes."""
    name = str(kept).removeprefix("torch.")
    if (
        original is not None
        and values.dtype.is_floating_point
        and torch.equal(values.float(), original.float())
    ):
        if kept == torch.float32 and dtype != torch.float32:
            return "fp32", f"is held in float32, where the plan asks for {format.name}: FP32 fallback"
        return (
            "unquantised",
            f"is held in {name} with the original's values, where the plan asks for {format.name}",
        )
    if not kept.is_floating_point or kept.itemsize < 2:
        return "wrong", f"is held in {name}, where the plan asks for {format.name}"
    fresh = decode_weight(*encode_weight(values, format.weight, values.dtype), format.weight, values.dtype)
    if near(fresh, values):
        return (
            "dequantised",
            f"is held in {name}, though its values are those of {format.name}: it was dequantised once at load",
        )
    if kept == torch.float32 and dtype != torch.float32:
        return "fp32", f"is held in float32, where the plan asks for {format.name}: FP32 fallback"
    return "unquantised", f"is held in {name}, where the plan asks for {format.name}"


def near(first, second) -> bool:
    """Whether values are equal but for their last bit: a scale computed again from rounded values may differ in it."""
    slack = 1.5 * torch.finfo(second.dtype).eps
    return bool(((first.float() - second.float()).abs() <= slack * second.float().abs()).all())


def _dtype_fault(dtype: torch.dtype, expected: torch.dtype, format_name: str) -> tuple[str, str]:
    if dtype == expected:
        return "", ""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        return (
            "fp32",
            f"is held in float32, where the plan asks for {_called(format_name, expected)}: FP32 fallback",
        )
    return "wrong", f"is held in {name}, where the plan asks for {_called(format_name, expected)}"


def _hidden(module) -> int:
    """Bytes of float tensors of a weight's size that a layer holds beside its codes."""
    known = {id(getattr(module, name, None)) for name in ("codes", "scale", "bias", "input_scale", "weight")}
    tensors = {**vars(module), **module._parameters, **module._buffers}
    size = math.prod(module.shape)
    return sum(
        tensor.nbytes
        for tensor in tensors.values()
        if isinstance(tensor, torch.Tensor)
        and id(tensor) not in known
        and tensor.dtype.itemsize > 1
        and tensor.numel() >= size
    )


def _same(first, second) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _called(format_name: str, dtype: torch.dtype) -> str:
    return (
        f"{str(dtype).removeprefix('torch.')}, as it was loaded" if format_name == AS_LOADED else format_name
    )


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@dataclass(frozen=True)
class Fault:
    """A fault of one layer: `kind` as `LayerState.fault`, `message` without the layer's name."""

    component: str
    layer: str
    kind: str
    message: str


def raise_weights(
    assignment: Assignment, rows: list[dict], faults: list[Fault], remedy: str | None = None
) -> None:
    """Raise the faults that concern a whole expert, then the first of the others; `remedy` ends the message."""
    name, default = assignment.plan.name, f"torch.{FLOATS[assignment.default]}"
    changed = [row for row in rows if changes(row, assignment.default)]
    recast = any(row["weight_before_bytes"] not in (None, row["weight_bytes"]) for row in rows)
    if not changed and not recast:
        raise WanlabError(
            f"plan {name} changed nothing: every layer is in {default} as it was; give it rules of another format"
        )
    left = {(fault.component, fault.layer) for fault in faults if fault.kind == "unquantised"}
    by_component: dict[str, list[bool]] = {}
    for row in changed:
        by_component.setdefault(row["component"], []).append((row["component"], row["layer"]) in left)
    untouched = [component for component, missing in by_component.items() if all(missing)]
    if untouched and len(untouched) == len(by_component):
        raise WanlabError(
            f"plan {name} changed nothing: none of its {len(changed)} layers in {', '.join(untouched)} is in its format;"
            f" {remedy or _REMEDIES['unquantised']}"
        )
    if untouched:
        done = [component for component in by_component if component not in untouched]
        raise WanlabError(
            f"plan {name}: only {', '.join(done)} was quantised; none of {len(by_component[untouched[0]])} layers of"
            f" {', '.join(untouched)} is in its format; apply the plan to every expert it names"
        )
    raise_first(name, faults, remedy)


def changes(row: Mapping[str, Any], default: str) -> bool:
    """Whether a layer is to be other than it was; it is not where its rule names the dtype that it has."""
    recast = row["weight_before_bytes"] not in (None, row["weight_bytes"])
    return recast if row["format"] == default else row["format"] != AS_LOADED


def raise_first(name: str, faults: list[Fault], remedy: str | None = None) -> None:
    """Raise the first fault as an error, with the number of faults like it; nothing without one."""
    if not faults:
        return
    first = faults[0]
    alike = sum(fault.kind == first.kind for fault in faults) - 1
    raise WanlabError(
        f"plan {name}: {first.layer} of {first.component} {first.message}"
        f"{f' ({alike} more like it)' if alike else ''}; {remedy or _REMEDIES[first.kind]}"
    )


_REMEDIES = {
    "unquantised": "apply the plan with precision.apply_plan and use the model that it returns",
    "dequantised": "keep the codes in memory and decode them at use",
    "fp32": "load the model in the plan's dtype, and look for a cast that was left in",
    "no-op": "the quantiser does nothing: give it the format's scale and rounding",
    "wrong": "apply the plan again to the model as it was loaded",
    "product": "see applied.frame for the kernel that was planned",
}


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


EXPECTED = {
    kind.operator.removeprefix("_"): (kind.operator, kind.encoded)
    for kind in CODE_KINDS.values()
    if kind.operator
}
"""How a layer computes -> its operator and the dtype of both operands."""


@dataclass(frozen=True)
class Product:
    """One product of a layer.

    Attributes:
        operator: e.g. `"_scaled_mm"`. left, right: dtypes of input and weight as they are multiplied.
        rows: number of rows of the input.
        few: whether every value of the input is one of at most 256 (of the first row, where rows have scales of their own).
        decoded: whether the weight is, bitwise, the one that the layer's codes encode.
    """

    operator: str
    left: str
    right: str
    rows: int
    few: bool
    decoded: bool

    def __str__(self) -> str:
        return f"{self.operator} {self.left} x {self.right}"


class _ProductWatch(TorchDispatchMode):
    """Records the products of layers while they run.

    Args:
        layers: name -> module. running: names of the layers that run now, the innermost last.
        seen: layer -> its products; the watch appends to them.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        running: Sequence[str],
        seen: Mapping[str, list[Product]],
    ) -> None:
        super().__init__()
        self.layers, self.running, self.seen = layers, running, seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.running and name in PRODUCTS:
            layer = self.running[-1]
            self.seen[layer].append(_product(name, args, self.layers[layer]))
        return func(*args, **(kwargs or {}))


def watch(call: Callable[[], object], layers: Mapping[str, torch.nn.Module]) -> dict[str, list[Product]]:
    """Run a forward and record what every layer multiplies; compiled parts run eagerly meanwhile.

    Args:
        call: function that runs one forward.
        layers: name -> module of the layers to record.

    Returns:
        Layer -> its products, in order; empty for a layer that was not called.
    """
    running: list[str] = []
    seen: dict[str, list[Product]] = {name: [] for name in layers}

    watch = _ProductWatch(layers, running, seen)
    with _named(layers, running), torch.no_grad(), torch.compiler.set_stance("force_eager"), watch:
        call()
    return seen


def kernels(call: Callable[[], object], device: torch.device) -> pd.DataFrame:
    """Kernels of one forward by the operator that launched them; times under the profiler are no latencies.

    Returns:
        DataFrame: operator, kernel (on the CPU the operator itself), calls, share_percent (of the time of these kernels).
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        call()  # libraries choose their kernels on the first call
        with profile(activities=activities) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
    counts: Counter[tuple[str, str]] = Counter()
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in profiler.events():
        operator = event.name.removeprefix("aten::")
        if not event.name.startswith("aten::") or operator not in PRODUCTS or operator == "linear":
            continue
        launched = _kernels(event) if on_gpu else [(operator, event.time_range.elapsed_us())]
        for name, duration in launched:
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


def product_fault(module, format_name: str, kernel: str, products: list[Product]) -> tuple[str, str] | None:
    """Kind and message of a fault in a layer's products; None without one."""
    if not products:
        return (
            None
            if format_name == AS_LOADED
            else ("product", "was not called in a forward, so its format has no effect")
        )
    for product in products:
        if kernel == "int_mm" and product.rows < FEWEST_ROWS:
            operator, kind = None, str(module.dtype).removeprefix("torch.")
        elif kernel in EXPECTED:
            operator, kind = EXPECTED[kernel]
        else:
            operator, kind = None, _float_of(module, format_name)
        if {product.left, product.right} != {kind}:
            fallback = "float32" in (product.left, product.right)
            message = f"computes {product} where {operator or kind} is planned" + (
                ": FP32 fallback" if fallback else ""
            )
            return ("fp32" if fallback else "product"), message
        if operator and product.operator != operator:
            return "product", f"computes {product} where {operator} is planned"
        if operator is None and not product.decoded:
            return "no-op", "multiplies with another weight than the one that it holds"
        if operator is None and getattr(module, "activation", None) is not None and not product.few:
            return "no-op", f"takes its input as it comes, where {format_name} rounds it to codes"
    return None


def _float_of(module, format_name: str) -> str:
    """The float that a layer's product is planned in."""
    kind = module.weight.dtype if format_name == AS_LOADED or is_float(format_name) else module.dtype
    return str(kind).removeprefix("torch.")


def _kernels(event) -> list[tuple[str, float]]:
    """Kernels of an operator and of what it calls."""
    kernels_of_event = [(kernel.name, kernel.duration) for kernel in event.kernels]
    for child in event.cpu_children:
        kernels_of_event += _kernels(child)
    return [
        (name, duration) for name, duration in kernels_of_event if not name.startswith(("Memcpy", "Memset"))
    ]


@contextmanager
def _named(layers: Mapping[str, torch.nn.Module], running: list[str]) -> Iterator[None]:
    """Inside the block `running` ends with the name of the innermost of these layers that is running."""
    with ExitStack() as stack:
        for name, module in layers.items():
            before = module.register_forward_pre_hook(lambda module, args, name=name: running.append(name))
            after = module.register_forward_hook(
                lambda module, args, output: running.pop() and None, always_call=True
            )
            stack.callback(before.remove), stack.callback(after.remove)
        yield


def _product(name: str, args: tuple, module) -> Product:
    left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
    codes = getattr(module, "decoded", None)
    weight = codes() if codes is not None else module.weight
    given = right if name == "convolution" else right.mT
    given = given[0] if given.ndim > weight.ndim else given
    same = given.shape == weight.shape and given.dtype == weight.dtype and torch.equal(given, weight)
    one = left[:1] if getattr(module, "per_token", False) else left
    few = left.dtype.itemsize > 1 and torch.unique(one.detach().flatten()[: 2**20]).numel() <= 256
    rows = left.numel() // (left.shape[1] if name == "convolution" else left.shape[-1])
    one_dtype, other_dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (left, right))
    return Product(name, one_dtype, other_dtype, rows, few, same)


@dataclass(frozen=True, eq=False)
class Effect:
    """Result of an effect check.

    Attributes:
        verdict: result in one sentence.
        frame: one row per component and format: component, format (`"as-loaded"` where the plan changes nothing),
            layers_asked, layers_found, layers_changed (from what they were), weight_before_bytes, weight_bytes, held
            (dtypes of the weights in memory), products
            (operators with the dtypes of their operands; of a graph its nodes), kernels (on a GPU, most time first).
        layers: one row per layer and format: component, layer, format, held, weight_before_bytes, weight_bytes, product.
        kernels: kernels of one forward: component, operator, kernel, calls, share_percent; empty without a profile.
    """

    verdict: str
    frame: pd.DataFrame
    layers: pd.DataFrame
    kernels: pd.DataFrame

    def __str__(self) -> str:
        return self.verdict


def effect_check(
    original: Model | None,
    applied: Applied,
    *,
    profile: bool | None = None,
    components: Collection[str] | None = None,
) -> Effect:
    """Prove that a plan was applied, or fail.

    Every layer's tensors are read: dtypes, bytes, and whether its codes are those of the original's weight by the
    definition of the format. Then every expert computes one small forward (of every range of steps) in which the operands
    of each layer's product are looked at, with compiled parts running eagerly; on a GPU it is also profiled. Of a family
    whose calls wanlab neither knows nor can see, weights alone are looked at, and the verdict says so.

    Args:
        original: the model before the plan. None, or the same model after `in_place=True`, which replaced it: then weights
            are not compared with it.
        applied: result of `apply_plan`.
        profile: whether kernels are named too; None does so on a GPU.
        components: experts to check; None checks all of the plan.

    Raises:
        WanlabError: a plan that changed nothing; an expert that was left out; a layer that is not in the network; weights
            or products in float32 where the plan says otherwise; weights that were dequantised once at load; a quantiser
            that rounded nothing; a layer in another format than the plan's.
    """
    assignment, model = applied.assignment, applied.model
    name = assignment.plan.name
    chosen = [name for name in assignment.components if components is None or name in components]
    networks = {component: model.component(component) for component in chosen}
    before = _originals(original, applied)
    faults: list[Fault] = []
    rows: list[dict[str, Any]] = []
    kernels = []
    for component, network in networks.items():
        planned_layers = requested_formats(assignment, component)
        modules = dict(network.named_modules())
        missing = [layer for layer in dict.fromkeys(planned_layers["layer"]) if layer not in modules]
        if missing:
            raise WanlabError(
                f"plan {name}: {component} has no layer {missing[0]!r}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: the name matches none of its layers; assign"
                " the plan to this model"
            )
        states = _weights(component, network, modules, planned_layers, assignment, before.get(component))
        faults += [
            Fault(component, one.layer, one.fault, one.message) for one in states.values() if one.fault
        ]
        rows += [_row(component, one, applied) for one in states.values()]
    raise_weights(assignment, rows, faults)

    for component in networks:
        products, component_faults, table = _products(applied, component, profile)
        faults += component_faults
        for row in rows:
            if row["component"] == component:
                row["product"] = ", ".join(
                    dict.fromkeys(map(str, products.get((row["layer"], row["format"]), ())))
                )
        kernels.append(table.assign(component=component))
    raise_first(name, faults)
    layers = pd.DataFrame([row | {"changed": changes(row, assignment.default)} for row in rows])
    named = pd.concat(kernels, ignore_index=True)[
        ["component", "operator", "kernel", "calls", "share_percent"]
    ]
    frame = summary(layers, named)
    verdict = _verdict(assignment, chosen, frame, applied.kernels)
    unseen = [
        component for component in chosen if not layers.loc[layers["component"] == component, "product"].any()
    ]
    if unseen:
        verdict += f" Only weights were looked at: wanlab does not know how {' and '.join(unseen)} of this family is called."
    return Effect(verdict, frame, layers, named)


def summary(layers: pd.DataFrame, kernels: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of layers by component and format; see `Effect.frame`."""

    def joined(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    rows = []
    for (component, format), group in layers.groupby(["component", "format"], sort=False):
        operators = {
            product.split()[0] for value in group["product"] for product in value.split(", ") if product
        }
        names = ()
        if kernels is not None and len(kernels):
            of_format = (kernels["component"] == component) & kernels["operator"].isin(operators)
            names = kernels.loc[of_format, "kernel"]
        rows.append(
            {
                "component": component,
                "format": format,
                "layers_asked": group["layer"].nunique(),
                "layers_found": group.loc[group["found"], "layer"].nunique(),
                "layers_changed": group.loc[group["found"] & group["changed"], "layer"].nunique(),
                "weight_before_bytes": group["weight_before_bytes"].sum(min_count=1),
                "weight_bytes": int(group["weight_bytes"].sum()),
                "held": joined(group["held"]),
                "products": joined(part for value in group["product"] for part in value.split(", ")),
                "kernels": joined(names),
            }
        )
    return pd.DataFrame(rows).astype({"weight_before_bytes": "Int64"})


def _originals(original: Model | None, applied: Applied) -> dict[str, torch.nn.Module]:
    """The networks before the plan; empty where they are gone."""
    if original is None or applied.in_place:
        return {}
    networks = experts_of(original)
    return {name: networks[name] for name in applied.assignment.components}


def _weights(
    component: str, network, modules: dict, planned_layers, assignment: Assignment, before
) -> dict[tuple[str, str], LayerState]:
    """(layer, format) -> state of every layer in every format that the plan gives it."""
    default = getattr(torch, FLOATS[assignment.default])
    states = {}
    for row in planned_layers.itertuples():
        module = _variant(modules[row.layer], row.requested)
        kind = stored_dtype(network, f"{row.layer}.weight", default)
        original = None if before is None else before.get_submodule(row.layer).weight
        key = (row.layer, row.requested)
        if key in states:
            continue
        if module is None:
            message = f"has no variant in {row.requested} for steps {row.first_step} to {row.last_step}"
            states[key] = LayerState(row.layer, row.requested, "", None, 0, "unquantised", message)
        else:
            states[key] = read_layer(module, row.layer, row.requested, kind, original)
    return states


def _variant(module, format_name: str):
    """The module that computes a layer in a format: one of several where the format changes with the step."""
    if not isinstance(module, SteppedLayer):
        return module
    return module.variants[format_name] if format_name in module.variants else None  # noqa: SIM401  torch 2.11 has no get


def _row(component: str, one: LayerState, applied: Applied) -> dict[str, Any]:
    before = one.weight_before_bytes
    if before is None:  # the original is gone; its size was recorded when it was replaced
        noted = applied.frame[
            (applied.frame["component"] == component) & (applied.frame["layer"] == one.layer)
        ]
        before = int(noted["weight_before_bytes"].iloc[0])
    return {
        "component": component,
        "layer": one.layer,
        "format": one.format,
        "held": one.dtype,
        "weight_before_bytes": before,
        "weight_bytes": one.weight_bytes,
        "found": not one.fault,
        "product": "",
    }


def _products(applied: Applied, component: str, profile: bool | None):
    """Products of every layer and format in a small forward, their faults, and the kernels."""
    model, assignment = applied.model, applied.assignment
    call = small_forward(model, component)
    if call is None:
        return {}, [], pd.DataFrame(columns=["operator", "kernel", "calls", "share_percent"])
    on_gpu = model.device.type == "cuda"
    named = dict(model.component(component).named_modules())
    planned_layers = requested_formats(assignment, component)
    seen: dict[tuple[str, str], list[Product]] = {}
    faults: list[Fault] = []
    table = pd.DataFrame(columns=["operator", "kernel", "calls", "share_percent"])
    planned_kernels = applied.frame[applied.frame["component"] == component]
    for first, _ in assignment.bands(component):
        with applied.at(first or 0):
            rows = planned_layers if first is None else planned_layers[at_step(planned_layers, first)]
            formats = dict(zip(rows["layer"], rows["requested"], strict=True))
            modules = {layer: _variant(named[layer], format) for layer, format in formats.items()}
            kinds = planned_kernels if first is None else planned_kernels[at_step(planned_kernels, first)]
            ways = dict(zip(kinds["layer"], kinds["kernel"], strict=True))
            for layer, products in watch(call, modules).items():
                format = formats[layer]
                if problem := product_fault(modules[layer], format, ways[layer], products):
                    faults.append(Fault(component, layer, *problem))
                seen.setdefault((layer, format), []).extend(products)
            if profile or (profile is None and on_gpu):
                table = pd.concat([table, kernels(call, model.device)], ignore_index=True)
    return seen, faults, table


def at_step(rows: pd.DataFrame, step: int) -> pd.Series:
    """Mask of the rows that apply in a step."""
    return rows["first_step"].isna() | ((rows["first_step"] <= step) & (step <= rows["last_step"]))


def counts(frame: pd.DataFrame) -> list[str]:
    """Phrases such as "60 of 67 layers of expert_high in int8"; only layers that changed count."""
    return [
        f"{row.layers_changed} of {row.layers_asked} layers of {row.component} in {row.format}"
        for row in frame[frame["layers_changed"] > 0].itertuples()
    ]


def _verdict(assignment: Assignment, components: Sequence[str], frame: pd.DataFrame, kernels: str) -> str:
    before, after = frame["weight_before_bytes"].sum(), frame["weight_bytes"].sum()
    size = f"; {after / 2**20:,.1f} MiB of weights" + (f" instead of {before / 2**20:,.1f}" if before else "")
    end = "".join(f" {line}." for line in assignment.without_effect(components))
    what = "; ".join(counts(frame)) or "everything cast"
    return f"Plan {assignment.plan.name} took effect: {what}{size}; {kernels}.{end}"
