"""From a network to an ONNX program whose weights are still under their own names."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

from wanlab.convert.clip import ClipShape
from wanlab.convert.components import recipe
from wanlab.convert.onnx.twin import weightless

ORIGINAL = "original"
FORMS = ("friendly", ORIGINAL)


def trace(model, component: str, shape: ClipShape, *, opset: int, dynamic: bool, dtype, forms: str):
    """Trace a component without its weights and translate it to ONNX, unfolded.

    Args:
        dtype: `torch.dtype` that the graph computes in; that of the network, or another.
        forms: `"friendly"`, or `"original"` to trace the network as it is, for a comparison.

    Returns:
        The `torch.onnx.ONNXProgram`, axis name -> range it was traced for, and notes for the report.
    """
    import torch

    twin, mode = weightless(recipe(model, component).network, dtype)
    plan = recipe(model, component, network=twin)
    inputs = tuple(
        mode.from_tensor(tensor) for tensor in plan.inputs_for(shape, torch.Generator().manual_seed(0))
    )
    call = plan.reference if forms == ORIGINAL else plan.traced
    friendly = nullcontext() if forms == ORIGINAL else plan.friendly(opset)
    notes: list[str] = []

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = twin

        def forward(self, *args):
            return call(*args)

    with torch.no_grad(), friendly, quiet():
        module = Traced().eval()
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
    import logging
    import warnings

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
