"""From a network to an ONNX program: traced without its weights, at the opset and dtype asked for."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.export.components import FUSED_OPSET, ClipShape, component_spec
from wanlab.models.loading import DTYPES
from wanlab.models.networks import stored_dtype

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 17, 24, 20
BFLOAT16_OPSET = 22  # the first whose Conv takes it


def chosen_opset(opset: int | None, dtype: str) -> int:
    """The opset that was asked for, or the one that suits the dtype.

    Raises:
        WanlabError: none that the exporter has, or none with convolutions in bfloat16.
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
        WanlabError: no graphs can be had in it.
    """
    if name is None:
        return default
    if name not in DTYPES:
        raise WanlabError(f"no graphs in {name!r}{did_you_mean(name, DTYPES)}; give {', '.join(DTYPES)}")
    return getattr(torch, name)


def meta_copy(network: torch.nn.Module, dtype: torch.dtype):
    """A twin of `network` in `dtype` whose parameters and buffers have sizes but no memory.

    The twin lies on the CPU as far as tracing is concerned, wherever the network is. Modules that the library
    keeps in float32 stay in float32 (`wanlab.models.networks.stored_dtype`), so the twin is what loading in
    `dtype` would give.

    Returns:
        The twin, and the `FakeTensorMode` that its tensors belong to: inputs must be of the same mode.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, object] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        weight = isinstance(tensor, torch.nn.Parameter)
        kind = stored_dtype(network, name, dtype) if weight and tensor.is_floating_point() else tensor.dtype
        with mode:
            empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
        twins[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if weight else empty
    # A copy takes what it finds under an object's id: every tensor is replaced, none is copied.
    return copy.deepcopy(network, twins), mode


ORIGINAL = "original"
FORMS = ("friendly", ORIGINAL)


class _Traced(torch.nn.Module):
    """A network under the attribute `network`, called by a function of its own."""

    def __init__(self, network: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.call(*args)


def trace(model, component: str, shape: ClipShape, *, opset: int, dynamic: bool, dtype, forms: str):
    """Trace a component without its weights and translate it to ONNX, unfolded.

    Args:
        dtype: `torch.dtype` that the graph computes in; that of the network, or another.
        forms: `"friendly"`, or `"original"` to trace the network as it is, for a comparison.

    Returns:
        The `torch.onnx.ONNXProgram`, axis name -> range it was traced for, and notes for the report.
    """
    twin, mode = meta_copy(component_spec(model, component).network, dtype)
    plan = component_spec(model, component, network=twin)
    inputs = tuple(
        mode.from_tensor(tensor) for tensor in plan.inputs_for(shape, torch.Generator().manual_seed(0))
    )
    call = plan.reference if forms == ORIGINAL else plan.traced
    friendly = nullcontext() if forms == ORIGINAL else plan.friendly(opset)
    notes: list[str] = []

    with torch.no_grad(), friendly, quiet():
        module = _Traced(twin, call).eval()
        ranges: dict[str, str] = {}
        if not dynamic:
            program = torch.export.export(module, inputs, strict=False)
        else:
            dims = plan.dimensions()
            wanted = [
                {axis: dims.get(name, torch.export.Dim.AUTO) for axis, name in axes.items()}
                for axes in plan.inputs.values()
            ]
            try:
                program = torch.export.export(
                    module, inputs, dynamic_shapes={"args": tuple(wanted)}, strict=False
                )
                ranges = {name: _range(dim) for name, dim in dims.items()}
            except torch._dynamo.exc.UserError as error:
                # The network ties a size down: tracing decides axis by axis, the report names those it fixed.
                notes.append(f"tracing tied sizes down: {tied_reason(error)}")
                auto = tuple({axis: torch.export.Dim.AUTO for axis in axes} for axes in plan.inputs.values())
                program = torch.export.export(module, inputs, dynamic_shapes={"args": auto}, strict=False)
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
    return exported, ranges, tuple(notes)


def tied_reason(error: Exception) -> str:
    """The first line of a tracing error that names a size."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "values of" in line or "specialized" in line), lines[0])


def _range(dim) -> str:
    root = getattr(dim, "root", dim)
    expression = "" if root is dim else f"{dim.__name__}, "
    return f"{expression}{root.__name__} = {root.min} to {root.max}"


@contextmanager
def quiet():
    """Without the progress chatter of exporter and optimiser; errors still come through as exceptions."""
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
