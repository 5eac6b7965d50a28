"""Layer against layer: what a graph and a planned network make of the same input.

End to end, two applications of one plan drift apart by rounding alone, as a value between two codes falls to either side.
One layer on one input does not drift: there the two are as near as their arithmetic, or they mean different things.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.ort import OrtEngine
from wanlab.precision.graphs.sites import OPERATORS
from wanlab.precision.layers import natural
from wanlab.precision.plans.plan import FLOATS

if TYPE_CHECKING:
    import onnx
    import pandas as pd
    import torch

AGREES_BELOW = 0.25
"""Of the format's error. Two differences that have nothing to do with each other add as squares: one of a quarter makes the
error of an application 3 % larger or smaller than that of another."""

ROUNDING = 1e-5
"""Distance that float32 sums in another order may have; exported float32 networks are at 1e-6."""

AT_ONCE = 16  # layers whose inputs and outputs are held
MOST_BLOCKS = 6
_ROUNDED = ("/input_quantize", "/input_dequantize", "/input_cast")


def layer_distances(
    graph: Path,
    network: torch.nn.Module,
    original: torch.nn.Module,
    feeds: Mapping[str, torch.Tensor],
    formats: Mapping[str, str],
    provider: str = "auto",
) -> pd.DataFrame:
    """Every layer's output in ONNX Runtime against the planned network's, on the input that it has in ONNX Runtime.

    Args:
        graph: that the network was planned as. network: its plan applied, at the step that the graph is for.
        original: the same network without a plan, whose layers in float32 are the reference.
        feeds: inputs of the graph.
        formats: layer -> format, floats included. All layers are compared in up to 6 blocks, else those outside the
            blocks and in the first, middle and last.

    Returns:
        A row per layer: layer, format, to_pytorch (||a - p|| / ||r||), format_error (||p - r|| / ||r||), allowed: a
        quarter of the format's error, or the rounding of the dtype where that is more.
    """
    import pandas as pd
    import torch

    rows: list[dict] = []
    chosen = _sample(list(formats))
    for start in range(0, len(chosen), AT_ONCE):
        with _telling(graph, chosen[start : start + AT_ONCE]) as (path, places):
            engine = OrtEngine(path, provider=provider)
            made = engine.run(feeds)
            kinds = {name: getattr(torch, kind) for name, (kind, _) in engine.inputs.items()}
            del engine
        for layer, (source, result) in places.items():
            given = made[source] if source in made else feeds[source].to(kinds[source])
            row = _compared(layer, network, original, given, made[result])
            rows.append({"layer": layer, "format": formats[layer]} | row)
            island = FLOATS.get(formats[layer], "float32")
            rounding = max(_rounding(made[result].dtype), _rounding(getattr(torch, island)))
            rows[-1]["allowed"] = max(AGREES_BELOW * row["format_error"], rounding)
        del made
    columns = ["layer", "format", "to_pytorch", "format_error", "allowed"]
    return pd.DataFrame(rows, columns=columns)


def _rounding(kind: torch.dtype) -> float:
    import torch

    return ROUNDING if kind == torch.float32 else torch.finfo(kind).eps / 2


def _sample(layers: Sequence[str]) -> list[str]:
    ordered = sorted(layers, key=natural)
    blocks = sorted({int(name.split(".")[1]) for name in ordered if name.startswith("blocks.")})
    if len(blocks) <= MOST_BLOCKS:
        return ordered
    few = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    return [name for name in ordered if not name.startswith("blocks.") or int(name.split(".")[1]) in few]


@contextmanager
def _telling(graph: Path, layers: Sequence[str]) -> Iterator[tuple[Path, dict[str, tuple[str, str]]]]:
    """The graph with inputs and outputs of layers as outputs, and their names; beside the graph, as its weights are."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    places = _places(model.graph, layers)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in dict.fromkeys(name for pair in places.values() for name in pair):
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    path = graph.with_name(f".{graph.stem}.{os.getpid()}.layers.onnx")
    try:
        onnx.save(model, path)
        yield path, places
    finally:
        path.unlink(missing_ok=True)


def _places(graph: onnx.GraphProto, layers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer -> name of its input before rounding and casting, and of its output after them; of its first product."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    places: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        layer = node.name.partition("/")[0]
        if layer not in layers or layer in places or node.op_type not in OPERATORS:
            continue
        source = node.input[0]
        while (maker := makers.get(source)) is not None and any(word in maker.name for word in _ROUNDED):
            source = maker.input[0]
        result = node.output[0]
        while len(after := readers.get(result, [])) == 1 and _belongs(after[0], layer):
            result = after[0].output[0]
        places[layer] = source, result
    return places


def _belongs(node: onnx.NodeProto, layer: str) -> bool:
    """Whether a node adds the layer's bias, or casts its output back."""
    owner, _, name = node.name.partition("/")
    return owner == layer and (node.op_type == "Add" or name.startswith("output_cast"))


def _compared(layer: str, network, original, given: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    import torch

    module, plain = network.get_submodule(layer), copy.deepcopy(original.get_submodule(layer)).float()
    device = next(plain.parameters()).device
    given = given.to(device)
    with torch.no_grad():
        wanted = module(given).double()
        reference = plain(given.float()).double()
    size = reference.norm()
    apart = made.to(device).double().reshape(wanted.shape) - wanted
    return {
        "to_pytorch": float(apart.norm() / size),
        "format_error": float((wanted - reference).norm() / size),
    }
