"""Traces a network without its weights to an ONNX graph, for a given opset and dtype; traced graphs are kept on disk.

Tracing takes most of the time of an export. A graph without weights is small and depends on few facts
(`wanlab.core.digests.trace_facts`), so it is kept in `wanlab.core.paths.cache("traces")` for the second expert, for the same
model with other weights or in another folder, and for later processes.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import onnx_ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wanlab.core import paths
from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.core.files import atomic_path
from wanlab.export.components import FUSED_OPSET, ClipShape, component_spec
from wanlab.export.weights import WRAPPER
from wanlab.models.loading import DTYPES
from wanlab.models.networks import stored_dtype

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 17, 24, 20
BFLOAT16_OPSET = 22  # the first with Conv in bfloat16


def chosen_opset(opset: int | None, dtype: str) -> int:
    """The given opset, or the default one for the dtype.

    Raises:
        WanlabError: the exporter does not support the opset, or it has no convolutions in bfloat16.
    """
    narrow = dtype == "torch.bfloat16"
    if opset is None:
        return FUSED_OPSET if narrow else DEFAULT_OPSET
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise WanlabError(f"opset is {opset}; give {MIN_OPSET} to {MAX_OPSET}")
    if narrow and opset < BFLOAT16_OPSET:
        raise WanlabError(
            f"opset {opset} has no convolution in bfloat16; give {BFLOAT16_OPSET} or more, or another dtype"
        )
    return opset


def chosen_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """The dtype of a name, or the default.

    Raises:
        WanlabError: graphs cannot be exported in this dtype.
    """
    if name is None:
        return default
    if name not in DTYPES:
        raise WanlabError(f"no graphs in {name!r}{did_you_mean(name, DTYPES)}; give {', '.join(DTYPES)}")
    return getattr(torch, name)


def meta_copy(network: torch.nn.Module, dtype: torch.dtype):
    """A copy of `network` in `dtype` whose parameters and buffers have sizes but no memory.

    For tracing the copy is on the CPU, on whichever device the network is. Modules that the library keeps in float32 stay
    in float32 (`wanlab.models.networks.stored_dtype`), so the copy has the dtypes of a network that is loaded in `dtype`.

    Returns:
        The copy, and the `FakeTensorMode` of its tensors, which inputs need too.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replacements: dict[int, object] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        weight = isinstance(tensor, torch.nn.Parameter)
        kind = stored_dtype(network, name, dtype) if weight and tensor.is_floating_point() else tensor.dtype
        with mode:
            empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
        replacements[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if weight else empty
    # `deepcopy` looks up the id of every object here first, so that tensors are replaced and not copied.
    return copy.deepcopy(network, replacements), mode


ORIGINAL = "original"
FORMS = ("friendly", ORIGINAL)


class _Traced(torch.nn.Module):
    """A network as the attribute `network`, and the function to trace."""

    def __init__(self, network: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.call(*args)


@dataclass(frozen=True)
class Trace:
    """A traced graph before constant folding.

    Attributes:
        model: graph whose weights are inputs, with `WRAPPER` before their names in the network. It is cloned before use.
        ranges: axis name -> traced range of sizes.
        notes: notes for the report.
    """

    model: onnx_ir.Model
    ranges: dict[str, str]
    notes: tuple[str, ...]


KEPT = "wanlab.trace"  # metadata key of the other facts in the file of a trace
LIBRARIES = ("diffusers.", "torch.", "transformers.", "wanlab.")


_UNWRITTEN: dict[str, Trace] = {}  # traces that no folder could take, for this process


def kept_trace(network: torch.nn.Module, key: str, make: Callable[[], Trace]) -> tuple[Trace, bool]:
    """The trace with this key, which is made and kept if there is none, and whether it existed.

    Networks with modules or methods of a caller are traced each time, because the key does not include their code.

    Args:
        network: network that is traced.
        key: hash of everything that the graph depends on besides the weights.
        make: function that traces the network.
    """
    owned = all(type(part).__module__.startswith(LIBRARIES) for part in network.modules())
    if not owned or any("forward" in vars(part) for part in network.modules()):
        return make(), False
    if key in _UNWRITTEN:
        return _UNWRITTEN[key], True
    file = paths.cache("traces", f"{key}.onnx")
    with suppress(Exception):  # a missing file, or an incomplete one after a full disk: it is made again
        model = onnx_ir.load(file)
        facts = json.loads(model.metadata_props[KEPT])
        if facts["key"] == key:  # not a file under another name
            return Trace(model, facts["ranges"], tuple(facts["notes"])), True
    trace = make()
    trace.model.metadata_props[KEPT] = json.dumps({"key": key, "ranges": trace.ranges, "notes": trace.notes})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file, ".onnx") as draft:
            onnx_ir.save(trace.model, draft)
    except OSError:  # a folder that cannot be written, or a full disk
        _UNWRITTEN[key] = trace
    return trace, False


def weights_as_inputs(model: onnx_ir.Model, network: torch.nn.Module) -> onnx_ir.Model:
    """The traced model, with weights of the network, which have no memory, changed to inputs of the graph."""
    graph = model.graph
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    weights |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
    for name in [name for name in graph.initializers if name.startswith(WRAPPER)]:
        if name.removeprefix(WRAPPER) not in weights:  # a constant in the code of a module
            graph.initializers[name].name = f"constant.{name.removeprefix(WRAPPER)}"
            continue
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return model


def trace(
    model, component: str, shape: ClipShape, *, opset: int, dynamic: bool, dtype: torch.dtype, forms: str
) -> Trace:
    """Trace a component without its weights and convert it to ONNX, without constant folding.

    Args:
        model: model with the component.
        component: name of the component.
        shape: clip of the example inputs.
        opset: ONNX opset.
        dynamic: whether sizes may vary.
        dtype: `torch.dtype` of the computation.
        forms: `"friendly"`, or `"original"` to trace the network without rewriting, for a comparison.
    """
    network, mode = meta_copy(component_spec(model, component).network, dtype)
    plan = component_spec(model, component, network=network)
    inputs = tuple(
        mode.from_tensor(tensor) for tensor in plan.inputs_for(shape, torch.Generator().manual_seed(0))
    )
    call = plan.reference if forms == ORIGINAL else plan.traced
    friendly = nullcontext() if forms == ORIGINAL else plan.friendly(opset)
    notes: list[str] = []

    with torch.no_grad(), friendly, quiet():
        module = _Traced(network, call).eval()
        ranges: dict[str, str] = {}
        if not dynamic:
            program = torch.export.export(module, inputs, strict=False)
        else:
            dims = plan.dimensions()
            dynamic_axes = [
                {axis: dims.get(name, torch.export.Dim.AUTO) for axis, name in axes.items()}
                for axes in plan.inputs.values()
            ]
            try:
                program = torch.export.export(
                    module, inputs, dynamic_shapes={"args": tuple(dynamic_axes)}, strict=False
                )
                ranges = {name: _range(dim) for name, dim in dims.items()}
            except torch._dynamo.exc.UserError as error:
                # The network fixes a size: tracing decides about each axis, and the report names the fixed ones.
                notes.append(f"tracing fixed sizes: {fixed_reason(error)}")
                auto = tuple({axis: torch.export.Dim.AUTO for axis in axes} for axes in plan.inputs.values())
                program = torch.export.export(module, inputs, dynamic_shapes={"args": auto}, strict=False)
        try:
            exported = torch.onnx.export(
                program,
                (),
                None,
                input_names=list(plan.inputs),
                output_names=[plan.output],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise WanlabError(
                f"{component} is a {type(network).__name__}, which does not convert ({_innermost(error)}); it stays in"
                " PyTorch: leave it out of the components"
            ) from error
    return Trace(weights_as_inputs(exported.model, network), ranges, tuple(notes))


def _innermost(error: BaseException) -> str:
    """The line of the innermost error that a converter met."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 120)


def fixed_reason(error: Exception) -> str:
    """The first line of a tracing error that is about a size."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "values of" in line or "specialized" in line), lines[0])


def _range(dim) -> str:
    root = getattr(dim, "root", dim)
    expression = "" if root is dim else f"{dim.__name__}, "
    return f"{expression}{root.__name__} = {root.min} to {root.max}"


@contextmanager
def quiet():
    """Hide log messages and warnings of exporter and optimiser inside the block; exceptions are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
