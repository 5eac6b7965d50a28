"""Whether an engine computes every layer in the format that its plan asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.card.inspector import read_inspector
from wanlab.convert.card.kinds import PRODUCTS
from wanlab.convert.card.layers import CODES, FLOATS, Layer, precision_of
from wanlab.convert.tensorrt.layers import layers_path
from wanlab.errors import WanlabError
from wanlab.precision.formats import get_format
from wanlab.precision.graphs.sites import OPERATORS
from wanlab.precision.plans.plan import is_float

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["layer", "asked", "built", "as_asked", "engine_layers"]


def built_formats(
    engine: str | os.PathLike, graph: str | os.PathLike, formats: Mapping[str, str]
) -> pd.DataFrame:
    """What the builder made of each layer, from the layer information beside an engine; no GPU is needed.

    A layer is as asked when the kernels that hold its product multiply codes (formats that round inputs), keep its weight
    as codes (weight-only formats: decoded at use, not folded to floats when it was built), or multiply in its float.
    Where several GPUs were built for, the builder describes the last of them.

    Args:
        engine: from `build_tensorrt`. graph: that it was built from.
        formats: layer -> format, floats included, e.g. of `PlanGraphs.formats`.

    Returns:
        A row per layer: layer, asked, built (number format of the product; with `" x "` and that of the weight, where
        that is another), as_asked, engine_layers (how many kernels hold its product).

    Raises:
        WanlabError: no layer information, or a layer that the graph does not have.
    """
    import onnx
    import pandas as pd

    if not layers_path(engine).is_file():
        raise WanlabError(
            f"{Path(engine).name} has no {layers_path(engine).name} beside it; build it with wanlab.convert.build_tensorrt"
        )
    layers = read_inspector(layers_path(engine)).layers
    products: dict[str, list[str]] = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        layer = node.name.partition("/")[0]
        if node.op_type in OPERATORS and layer in formats:
            products.setdefault(layer, []).append(node.name)
    missing = [layer for layer in formats if layer not in products]
    if missing:
        raise WanlabError(f"{Path(graph).name} has no layer {missing[0]!r}; give the formats of this graph")
    return pd.DataFrame(
        [_row(layer, asked, products[layer], layers) for layer, asked in formats.items()], columns=COLUMNS
    )


def _row(layer: str, asked: str, products: Iterable[str], layers: Iterable[Layer]) -> dict[str, object]:
    layers, products = list(layers), set(products)
    holding = [found for found in layers if products & set(found.nodes)]
    # A product of few rows may be written as a sum, and what follows one may carry its name.
    kernels = [found for found in holding if found.kind in PRODUCTS] or holding
    computed = sorted({_computed(found) for found in kernels} - {""})
    of_layer = [found for found in layers if any(node.partition("/")[0] == layer for node in found.nodes)]
    constants = {
        tensor.dtype for found in (*kernels, *of_layer) for tensor in found.inputs if tensor.constant
    }
    codes = sorted(constants & set(CODES))
    if is_float(asked):
        weight, right = "", asked in computed
        # Beside others, a small product may be in a kernel of several dtypes: then its weight tells.
        right = right or (not any(found.kind in PRODUCTS for found in kernels) and asked in constants)
    else:
        wanted = get_format(asked)
        weight = wanted.weight.kind if wanted.weight.kind in codes else ""
        right = bool(weight) and (wanted.activation is None or wanted.activation.kind in computed)
    product = "+".join(computed) or "not found"
    return {
        "layer": layer,
        "asked": asked,
        "built": product if weight in ("", *computed) else f"{product} x {weight}",
        "as_asked": bool(holding) and right,
        "engine_layers": len(kernels),
    }


def _computed(layer: Layer) -> str:
    if layer.kind in PRODUCTS:
        return layer.precision
    found = precision_of("matmul", layer.inputs, layer.outputs)
    return found if found in FLOATS or found in CODES else ""
