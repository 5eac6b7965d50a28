"""Distances of an engine's outputs from PyTorch's: by component, by block, and where half precision overflows."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir
import pandas as pd
import torch
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.engines.base import Engine
from wanlab.engines.onnxruntime import OrtEngine
from wanlab.export.components import ClipShape, component_spec, default_shape
from wanlab.export.export import ExportReport
from wanlab.export.graph import cut, piece_file
from wanlab.models.taps import BlockTap


def parity(
    model,
    component: str,
    onnx_path: str | os.PathLike | Engine,
    *,
    shapes: Sequence[ClipShape] | None = None,
    cases: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    provider: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Compare a converted component with the network as the pipeline runs it.

    The reference is the original forward (for the VAE the chunked one) in the network's own dtype, not the rewritten
    form that was traced.

    Args:
        model: the model that was exported, eager.
        onnx_path: ONNX file, or an open engine.
        shapes: clips to compare at; None takes the traced one and, if the axes of the graph are free, one with height and
            width exchanged and a smaller one, both shorter and with batch 1.
        provider: as in `OrtEngine`.
        cases: label -> inputs by name, e.g. recorded from a generation; used instead of random inputs.
        seed: seed of the random inputs.

    Returns:
        One row per shape or label and output: component, shape, output, elements, max_abs, mean_abs, relative_l2
        (||a - b|| / ||a||), cosine, psnr_db (peak = range of the reference; inf when equal).

    Raises:
        WanlabError: as `component_spec` and `OrtEngine`, or a shape that the graph does not accept.
    """
    plan = component_spec(model, component)
    if isinstance(onnx_path, str | os.PathLike):
        engine: Engine = OrtEngine(onnx_path, provider=provider)
    else:
        engine = onnx_path
    rows = []
    if cases is None:
        clips = _shapes(model, plan, engine) if shapes is None else shapes
        cases = {str(shape): _random(plan, shape, seed) for shape in clips}
    training = plan.network.training
    plan.network.eval()
    try:
        for label, inputs in cases.items():
            arguments = [inputs[name].to(plan.network.device) for name in plan.inputs]
            with torch.no_grad():
                expected = plan.reference(*arguments)
            output = engine.run(inputs)[plan.output]
            row = {"component": component, "shape": label, "output": plan.output}
            rows.append(row | differences(expected, output))
    finally:
        plan.network.train(training)
    return pd.DataFrame(rows)


def parity_all(
    model,
    reports: Sequence[ExportReport],
    *,
    cases: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]] | None = None,
    provider: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """`parity` of several exports, on random inputs and on recorded ones.

    Args:
        reports: reports from `export_all`.
        cases: component -> label -> inputs by name; compared in addition to the random inputs.

    Returns:
        The rows of `parity`, with `inputs` (`"random"` or `"recorded"`).
    """
    tables = []
    for report in reports:
        engine = OrtEngine(report.path, provider=provider)
        table = parity(model, report.component, engine, seed=seed)
        tables.append(table.assign(inputs="random"))
        recorded = (cases or {}).get(report.component)
        if recorded:
            table = parity(model, report.component, engine, cases=recorded)
            tables.append(table.assign(inputs="recorded"))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class ParitySummary:
    """Number of components that agree with PyTorch.

    Attributes:
        components: number of components that were compared.
        agree: number of those within the tolerance on all inputs.
        tolerance: largest relative L2 distance that counts as agreement.
        dtype: number format that the tolerance belongs to; "" where it was given.
        worst: the row of the table with the largest distance.
    """

    components: int
    agree: int
    tolerance: float
    worst: dict[str, Any]
    dtype: str = ""

    def row(self) -> dict[str, Any]:
        """Flat record: agree, worst_relative_l2, tolerance."""
        return {
            "agree": self.agree,
            "worst_relative_l2": self.worst["relative_l2"],
            "tolerance": self.tolerance,
        }

    def __str__(self) -> str:
        worst = (
            f"at worst {self.worst['relative_l2']:.1e} ({self.worst['component']} at {self.worst['shape']})"
        )
        who = "all" if self.agree == self.components else f"{self.agree} of {self.components}"
        of = f" (that of {self.dtype})" if self.dtype else ""
        return f"{who} agree with PyTorch within a relative distance of {self.tolerance:g}{of}, {worst}"


TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Number format -> relative L2 distance that counts as agreement: some tens of its rounding steps, because errors of blocks
add up (2**-11 is 5e-4 in float16, 2**-8 is 4e-3 in bfloat16), and for float32 what no video shows."""


def parity_summary(
    table: pd.DataFrame, tolerance: float | None = None, *, dtype: Any = None
) -> ParitySummary:
    """Summary of a table of `parity` or `parity_all`.

    Args:
        tolerance: largest relative L2 distance that counts as agreement; None takes that of `dtype` in `TOLERANCES`.
        dtype: number format of the network; float32 if None.
    """
    name = "" if tolerance is not None else str(dtype or "float32").removeprefix("torch.")
    tolerance = TOLERANCES.get(name, TOLERANCES["float32"]) if tolerance is None else tolerance
    worst = table.groupby("component")["relative_l2"].max()
    row = table.loc[table["relative_l2"].idxmax()].to_dict()
    return ParitySummary(len(worst), int((worst <= tolerance).sum()), tolerance, row, name)


def float16_text(ranges: pd.DataFrame | None) -> str:
    """Number of tensors of `value_ranges` that are near float16's largest number, as a sentence; empty where unknown."""
    if ranges is None:
        return ""
    near = int((ranges["state"] != "fits").sum())
    return f"{near} of {len(ranges)} tensors are near float16's limit."


def differences(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """Distances between two tensors of one shape, computed in float64; keys as in `parity`."""
    a, b = (tensor.detach().to("cpu", torch.float64).flatten() for tensor in (expected, actual))
    error = b - a
    peak = (a.max() - a.min()).item()
    mean_square = error.square().mean().item()
    return {
        "elements": a.numel(),
        "max_abs": error.abs().max().item(),
        "mean_abs": error.abs().mean().item(),
        "relative_l2": (error.norm() / a.norm()).item() if a.norm() > 0 else math.inf if error.any() else 0.0,
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        "psnr_db": 10 * math.log10(peak**2 / mean_square)
        if mean_square and peak
        else math.inf
        if not mean_square
        else -math.inf,
    }


def _random(plan, shape: ClipShape, seed: int) -> dict[str, torch.Tensor]:
    inputs = plan.inputs_for(shape, torch.Generator().manual_seed(seed))
    return dict(zip(plan.inputs, inputs, strict=True))


def _shapes(model, plan, engine: Engine) -> list[ClipShape]:
    """The traced clip; if the graph accepts other sizes, also one with height and width exchanged and a smaller one."""
    report = ExportReport.find(engine.path) if hasattr(engine, "path") else None
    first = default_shape(model) if report is None else report.shape
    axes = {(name, axis): label for name, axes in plan.inputs.items() for axis, label in axes.items()}
    free = all(isinstance(engine.inputs[name][1][axis], str) for name, axis in axes)
    free = free and plan.sized
    if not free:
        return [first]
    spec = model.spec
    step_h, step_w = spec.size_step
    text = first.text_tokens
    if "text_tokens" in axes.values():  # beside the tokens of a picture the text has one length
        text = max(text // 2, 2)
    few = max((first.frames - 1) // spec.temporal_factor // 2, 2) * spec.temporal_factor + 1
    turned = replace(first, batch=1, height=first.width, width=first.height, frames=few)
    smaller = ClipShape(
        batch=1,
        height=max(first.height // 2 // step_h, 2) * step_h,
        width=max(first.width // 4 // step_w, 2) * step_w,
        frames=few,
        text_tokens=text,
    )
    return [first, turned, smaller]


def blockwise_parity(
    model,
    component: str,
    onnx_path: str | os.PathLike,
    *,
    feeds: Mapping[str, torch.Tensor] | None = None,
    reference_dtype: str = "float32",
    provider: str = "auto",
    seed: int = 0,
    progress: bool = True,
    **size: int | None,
) -> pd.DataFrame | None:
    """Compare every transformer block of an exported expert with the same block of PyTorch.

    The graph is cut between the blocks. The part before the first block (patches, timestep and text embedding, rotary
    tables) runs once in the engine. Then each block runs alone on the hidden states that PyTorch computed in
    `reference_dtype`, so that errors do not accumulate; at any time one block is in memory in the reference dtype and
    one in the engine. Where the network is in the graph's dtype, its own block
    is compared with the reference as well: its error is rounding, which no engine can avoid.

    Args:
        model: the model that was exported, eager.
        component: an expert of the model.
        onnx_path: graph from `wanlab.export.export`.
        size: height, width and frames of the random inputs, of batch 1; the model's default where not given.
        feeds: inputs by name to use instead of random ones.
        reference_dtype: dtype of PyTorch's blocks, `"float32"` or `"float64"`.
        provider: as in `OrtEngine`.

    Returns:
        A row per piece (`before`, `blocks.0` …, `after`): piece, relative_l2 (||a - b|| / ||a||), max_abs, mean_abs,
        cosine of its output; update_relative_l2 of the difference between the block's output and input;
        eager_relative_l2 of PyTorch's own block (NaN where the network is not in the graph's dtype). None where the blocks
        of the network hand on more than one state, as those of CogVideoX and HunyuanVideo do.

    Raises:
        WanlabError: the component is no expert, or its graph cannot be cut into blocks.
    """
    plan = component_spec(model, component)
    if not component.startswith("expert"):
        raise WanlabError(
            f"{component} has no transformer blocks; compare it whole with wanlab.engines.parity"
        )
    if type(plan.network).__name__ != "WanTransformer3DModel":
        return None
    path = Path(onnx_path)
    if feeds is None:
        drawn = plan.inputs_for(
            default_shape(model, **{"batch": 1} | size), torch.Generator().manual_seed(seed)
        )
        feeds = dict(zip(plan.inputs, drawn, strict=True))
    kind = getattr(torch, reference_dtype)
    graph = onnx_ir.load(path)
    before, *pieces = cut(graph)
    with piece_file(graph, before, path.parent) as file:
        values = OrtEngine(file, provider=provider).run({name: feeds[name] for name in before.inputs})
    values |= dict(feeds)
    rows = []
    with torch.no_grad():
        shell = _Shell(plan.network, kind)
        state, *others = shell.enter(*(feeds[name].to(plan.network.device) for name in plan.inputs))
        rows.append({"piece": "before"} | differences(state, values[pieces[0].state]))
        for index, piece in enumerate(
            tqdm(pieces, desc="blocks", unit="block", leave=False, disable=not progress)
        ):
            inputs = {name: state if name == piece.state else values[name] for name in piece.inputs}
            with piece_file(graph, piece, path.parent) as file:
                engine = OrtEngine(file, provider=provider)
                result = engine.run(inputs)
            if piece is pieces[-1]:
                rows.append({"piece": piece.name} | differences(shell.leave(state), result[plan.output]))
                break
            block = plan.network.blocks[index]
            expected = torch.nn.Module.to(copy.deepcopy(block), kind)(state, *others)
            actual = result[pieces[index + 1].state].to(state.device)
            row = {"piece": piece.name} | differences(expected, actual)
            row["update_relative_l2"] = differences(expected - state, actual.to(kind) - state)["relative_l2"]
            dtype = engine.inputs[piece.state][0]
            if plan.network.dtype == getattr(torch, dtype):
                eager = block(*_cast((state, *others), plan.network.dtype))
                row["eager_relative_l2"] = differences(expected, eager)["relative_l2"]
            rows.append(row)
            state = expected
    return pd.DataFrame(rows).drop(columns=["elements", "psnr_db"])


class _Shell:
    """The parts of an expert before and after its blocks, in another dtype; the blocks themselves are not copied."""

    def __init__(self, network, dtype) -> None:
        self.tap, self.dtype, self.inputs = BlockTap(), dtype, ()
        blocks = torch.nn.ModuleList([self.tap])
        shell = copy.deepcopy(network, {id(network.blocks): blocks})
        self.network = torch.nn.Module.to(
            shell, dtype
        )  # diffusers' `to` warns about modules that stay in float32

    def enter(self, *inputs) -> tuple:
        """The inputs of the first block."""
        self.inputs = _cast(inputs, self.dtype)
        self.network(*self.inputs, return_dict=False)
        return self.tap.inputs

    def leave(self, state):
        """The output of the expert for the hidden states after the last block."""
        self.tap.answer = state
        return self.network(*self.inputs, return_dict=False)[0]


def _cast(values: tuple, dtype) -> tuple:
    """Tensors in another dtype; rotary tables, which are a tuple, stay in float32, as in the network."""
    return tuple(value if isinstance(value, tuple) else value.to(dtype) for value in values)


FLOAT16_MAX = 65504.0
NEAR_SHARE = 0.25  # within a factor of four: another prompt may overflow


def value_ranges(
    onnx_path: str | os.PathLike,
    inputs: Iterable[Mapping[str, torch.Tensor]],
    *,
    provider: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Largest magnitude of every floating-point tensor that a graph computes.

    A maximum of every tensor is added to the outputs of the graph. The float32 graph shows which values float16 could not
    represent (above 65,504); the float16 graph shows which tensors do overflow.

    Args:
        onnx_path: graph from `wanlab.export.export`.
        inputs: sets of feeds by name, best recorded from real generations; the result is the largest value of all sets.

    Returns:
        One row per tensor, largest first, without tensors that stayed empty: node (wanlab's name), operator, tensor, max_abs
        (inf where it overflowed), float16_share (max_abs / 65,504), state (`"overflows"`, `"near"` above a quarter, or
        `"fits"`).

    Raises:
        WanlabError: no inputs, or as `OrtEngine`.
    """
    path = Path(onnx_path)
    model = onnx_ir.load(path)
    nodes = _add_maxima(model.graph)
    draft = path.with_name(f".{path.stem}.ranges.{os.getpid()}.onnx")
    largest = dict.fromkeys(nodes, -math.inf)  # what a maximum of nothing is
    sets = 0
    try:
        onnx_ir.save(model, draft)
        engine = OrtEngine(draft, provider=provider)
        for feeds in tqdm(inputs, desc="ranges", unit="input", leave=False, disable=not progress):
            outputs = engine.run(feeds)
            sets += 1
            for name in nodes:
                value = float(outputs[name])
                largest[name] = max(largest[name], math.inf if math.isnan(value) else value)
    finally:
        draft.unlink(missing_ok=True)
    if not sets:
        raise WanlabError("no inputs to measure ranges with; give at least one set of feeds")
    rows = [
        {
            "node": node.name,
            "operator": node.op_type,
            "tensor": name.removesuffix(_SUFFIX),
            "max_abs": largest[name],
            "float16_share": largest[name] / FLOAT16_MAX,
            "state": _state(largest[name]),
        }
        for name, node in nodes.items()
        if largest[name] >= 0
    ]
    return pd.DataFrame(rows).sort_values("max_abs", ascending=False, kind="stable", ignore_index=True)


_SUFFIX = "/max_abs"


def _add_maxima(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Node]:
    """Add the largest magnitude of every floating-point tensor as an output; name of the output -> node of the tensor."""
    nodes = {}
    for node in list(graph):
        for value in node.outputs:
            if value.dtype is None or not value.dtype.is_floating_point() or not value.uses():
                continue
            # In float32, which holds every smaller float: ONNX Runtime has no ReduceMax in bfloat16.
            wide = onnx_ir.node("Cast", [value], {"to": int(onnx_ir.DataType.FLOAT)})
            size = onnx_ir.node("Abs", [wide.outputs[0]])
            peak = onnx_ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
            peak.outputs[0].name = f"{value.name}{_SUFFIX}"
            peak.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            peak.outputs[0].shape = onnx_ir.Shape([])
            graph.extend([wide, size, peak])
            graph.outputs.append(peak.outputs[0])
            nodes[peak.outputs[0].name] = node
    return nodes


def _state(value: float) -> str:
    share = value / FLOAT16_MAX
    return "overflows" if share > 1 else "near" if share > NEAR_SHARE else "fits"
