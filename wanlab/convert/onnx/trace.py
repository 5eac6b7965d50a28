"""From a network to an ONNX program whose weights are still under their own names."""

from __future__ import annotations

from contextlib import contextmanager

from wanlab.convert.clip import ClipShape


def trace(plan, shape: ClipShape, opset: int, dynamic: bool):
    """Trace a component and translate it to ONNX, unfolded.

    Returns:
        The `torch.onnx.ONNXProgram`, axis name -> range it was traced for, and notes for the report.
    """
    import torch

    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(0))
    notes: list[str] = []

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = plan.network

        def forward(self, *args):
            return plan.traced(*args)

    with torch.no_grad(), _evaluating(plan.network), plan.friendly(opset), _quiet():
        module = Traced()
        module.training = False
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
                notes.append(f"tracing tied sizes down: {_reason(error)}")
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


def _reason(error: Exception) -> str:
    """The first line of a tracing error that names a size."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "values of" in line or "specialized" in line), lines[0])


def _range(dim) -> str:
    root = getattr(dim, "root", dim)
    expression = "" if root is dim else f"{dim.__name__}, "
    return f"{expression}{root.__name__} = {root.min} to {root.max}"


@contextmanager
def _evaluating(network):
    """`network` in evaluation mode while the context lasts."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet():
    """Without the exporter's progress chatter; errors still come through as exceptions."""
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
