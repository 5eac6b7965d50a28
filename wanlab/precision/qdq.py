"""Explicit Q/DQ graphs: stored weight codes, rounded inputs, mixed floats, and their verification."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir
import pandas as pd
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from wanlab import __version__
from wanlab.core.digests import graph_sha256
from wanlab.core.errors import InternalError, WanlabError
from wanlab.core.formats import element_name
from wanlab.core.manifest import Manifest, key_of
from wanlab.export.export import ExportReport
from wanlab.export.graph import EXTERNAL_ABOVE_BYTES, file_bytes, save_checked
from wanlab.export.weights import WeightsFile
from wanlab.precision.assignment import choose_layers, layer_set_key, natural
from wanlab.precision.calibration import Calibration, calibrate
from wanlab.precision.formats import QuantFormat, check_blocks, get_format
from wanlab.precision.linear_nodes import (
    OPERATORS,
    LinearNode,
    Rewriter,
    common_module,
    find_linear_nodes,
    nodes_of_layers,
    raise_opset,
)
from wanlab.precision.plan import FLOATS, is_float
from wanlab.precision.recording import nano_examples, record_inputs


def chosen_formats(
    known: Iterable[str],
    layers: str | Sequence[str] | Mapping[str, str | QuantFormat] | None,
    format: str | QuantFormat | None,
    exclude: str | Sequence[str] = (),
) -> dict[str, QuantFormat | str]:
    """Layer -> format, or the name of a float, of the layers that patterns choose, in the order of their names.

    Args:
        known: layers of the graph.
        layers, format, exclude: arguments of `wanlab.precision.quantize`.

    Raises:
        WanlabError: no format or too many, an unknown one, or patterns that match nothing or leave nothing.
    """
    known = list(known)
    if not isinstance(layers, Mapping):
        if format is None:
            raise WanlabError("which format? give format=, or layers= as a mapping from layer to format")
        include = [layers] if layers is None or isinstance(layers, str) else list(layers)
        return dict.fromkeys(_chosen(known, include, exclude), _resolved_format(format))
    if format is not None:
        raise WanlabError("layers gives a format to each layer already; leave format out")
    by_name: dict[str, QuantFormat | str] = {}
    for pattern, name in layers.items():
        by_name |= dict.fromkeys(_chosen(known, [pattern]), _resolved_format(name))
    return {layer: by_name[layer] for layer in _chosen(known, list(layers), exclude)}


def is_norm(layer: str) -> bool:
    """Whether a layer is a norm, which graphs of the VAE write as a convolution."""
    return layer.rpartition(".")[2].startswith("norm")


def _resolved_format(format: str | QuantFormat) -> QuantFormat | str:
    return format if isinstance(format, str) and is_float(format) else get_format(format)


def _chosen(
    known: Sequence[str], include: Sequence[str | None], exclude: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """As `choose_layers`, but norms are chosen only by patterns with `norm` in them; None is its default."""
    plain = [layer for layer in known if not is_norm(layer)]
    chosen = {
        layer
        for pattern in include
        for layer in choose_layers(known if pattern and "norm" in pattern else plain, pattern)
    }
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        chosen -= set(choose_layers(known, pattern))
    if not chosen:
        raise WanlabError("no layer is left; give patterns that include more or exclude less")
    return tuple(sorted(chosen, key=natural))


BFLOAT16_CONV_OPSET = 22
"""First opset whose Conv takes bfloat16."""


def layers_in_other_floats(
    linears: Mapping[str, Sequence[LinearNode]], floats: Mapping[str, str]
) -> dict[str, str]:
    """The layers of `floats` (layer -> `"fp32"`, `"fp16"` or `"bf16"`) whose nodes compute in another float now."""
    return {
        layer: name
        for layer, name in floats.items()
        if any(linear.dtype != float_dtype(name) for linear in linears[layer])
    }


def needed_opset(linears: Mapping[str, Sequence[LinearNode]], other_floats: Mapping[str, str]) -> int:
    """The first opset whose operators take these layers in these floats."""
    narrow = any(
        linear.node.op_type == "Conv"
        for layer, name in other_floats.items()
        if name == "bf16"
        for linear in linears[layer]
    )
    return BFLOAT16_CONV_OPSET if narrow else 13


def compute_in(
    rewriter: Rewriter, linears: Mapping[str, Sequence[LinearNode]], other_floats: Mapping[str, str]
) -> None:
    """Change the float that layers compute in: weight and bias get that dtype, input and output are cast.

    Layers that read one tensor in one float share the Cast.
    """
    groups: dict[tuple[int, str], list[LinearNode]] = {}
    for layer, name in other_floats.items():
        for linear in linears[layer]:
            groups.setdefault((id(linear.activation), name), []).append(linear)
    order = {id(node): index for index, node in enumerate(rewriter.graph)}
    weights: dict[tuple[str, str], onnx_ir.Value] = {}
    for (_, name), group in groups.items():
        group.sort(key=lambda linear: order[id(linear.node)])
        kind = float_dtype(name)
        module = common_module([linear.layer for linear in group])
        source = group[0].activation
        given = _cast(rewriter, source, kind, f"{module}/input_cast", f"{source.name}.{name}", group[0].node)
        for linear in group:
            _narrow(rewriter, linear, kind, name, given, weights)


def float_dtype(name: str) -> torch.dtype:
    """Dtype in PyTorch of a float such as `"bf16"`."""
    return getattr(torch, FLOATS[name])


def _narrow(rewriter: Rewriter, linear: LinearNode, kind, name: str, given, weights) -> None:
    around, node = linear.dtype, linear.node
    key = (linear.stored.name, name)
    if key not in weights:
        weights[key] = _weight(rewriter, linear, kind, name)
    rewriter.weight_bytes[linear.layer] = weights[key].const_value.nbytes
    bias_node, index = _bias_of(linear)
    node.replace_input_with(0, given)
    node.replace_input_with(1, weights[key])
    rewriter.replaced(linear.stored)
    if bias_node is not None:
        bias = bias_node.inputs[index]
        bias_node.replace_input_with(index, _bias(rewriter, bias, kind, name))
        rewriter.replaced(bias)
    last = bias_node or node
    for changed in dict.fromkeys((node, last)):
        changed.outputs[0].type = onnx_ir.TensorType(_onnx_type(kind))
    _cast_back(rewriter, last, around, f"{linear.layer}/output_cast")


def _weight(rewriter: Rewriter, linear: LinearNode, kind, name: str) -> onnx_ir.Value:
    """The weight in another float; it is cast when it is written."""
    value_name = f"{linear.stored.name}.{name}"

    def read():
        value = linear.weight()
        return TorchTensor((value.t() if linear.transposed else value).to(kind).contiguous(), name=value_name)

    shape = onnx_ir.Shape(linear.shape[::-1] if linear.transposed else linear.shape)
    return rewriter.initializer(onnx_ir.LazyTensor(read, _onnx_type(kind), shape, name=value_name))


def _bias(rewriter: Rewriter, bias: onnx_ir.Value, kind, name: str) -> onnx_ir.Value:
    values = torch.from_numpy(np.array(bias.const_value.numpy(), dtype=np.float32)).to(kind)
    return rewriter.initializer(TorchTensor(values, name=f"{bias.name}.{name}"))


def _bias_of(linear: LinearNode) -> tuple[onnx_ir.Node | None, int]:
    """The node that adds a layer's bias, and the index of that input; (None, 0) without one."""
    node = linear.node
    if len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].const_value is not None:
        return node, 2
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1:
        return None, 0
    add = uses[0].node
    if add.op_type != "Add" or (add.name or "").partition("/")[0] != linear.layer:
        return None, 0
    other = 1 - uses[0].idx
    return (add, other) if add.inputs[other].const_value is not None else (None, 0)


def _cast_back(rewriter: Rewriter, last: onnx_ir.Node, kind, name: str) -> None:
    value = last.outputs[0]
    after = onnx_ir.node("Cast", [value], {"to": int(_onnx_type(kind))}, name=rewriter.name(name))
    rewriter.finish(after, f"{value.name}.back", kind, value.shape)
    result = after.outputs[0]
    for use in list(value.uses()):
        if use.node is not after:
            use.node.replace_input_with(use.idx, result)
    if value.is_graph_output():  # whose name stays
        outputs = rewriter.graph.outputs
        outputs[[output is value for output in outputs].index(True)] = result
        value.name, result.name = f"{value.name}.{_onnx_type(kind).name.lower()}", value.name
    rewriter.graph.insert_after(last, after)


def _cast(rewriter: Rewriter, value: onnx_ir.Value, kind, name: str, value_name: str, before: onnx_ir.Node):
    node = onnx_ir.node("Cast", [value], {"to": int(_onnx_type(kind))}, name=rewriter.name(name))
    rewriter.finish(node, value_name, kind, value.shape)
    rewriter.graph.insert_before(before, node)
    return node.outputs[0]


def _onnx_type(kind: torch.dtype) -> onnx_ir.DataType:
    return from_torch_dtype(kind)


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer of a quantised graph.

    Attributes:
        layer: module path.
        format: name of its format.
        nodes: number of nodes of the graph that compute it.
        activation_amax: largest magnitude of its input's codes; None where the input is not quantised.
        activation_scale: scale of its input, as stored. shared_with: layers that read the same codes.
        weight_bytes: size of codes and scales. weight_before_bytes: size in the graph that was read.
    """

    layer: str
    format: str
    nodes: int
    activation_amax: float | None
    activation_scale: float | None
    shared_with: tuple[str, ...]
    weight_bytes: int
    weight_before_bytes: int


class QuantizedReport(Manifest, frozen=True, kw_only=True):
    """Facts of a quantised graph, read back from the written file.

    Attributes:
        path, source: graph that was written and graph that was read.
        model, component: names from the source's metadata; empty where it has none.
        facts: hash of the source, formats by layer, scales and package version.
        layers: every layer with a new format.
        quantized: format -> number of layers whose weight and input have it in the written file.
        layer_set: hash of the set of layers. calibration: key of the calibration; empty without one.
        opset_before, opset: opset of source and result.
        dtype: float that the graph computes in.
        size_before_bytes, size_bytes: size of source and result, weights included.
        weights_file: file of the weights beside the graph; empty where they are in it.
        time_ms: time of reading, rounding, writing and checking.
    """

    KIND: ClassVar[str] = "report of quantization"
    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "quantise the graph again with wanlab.precision.quantize"

    source: str
    model: str
    component: str
    layers: tuple[QuantizedLayer, ...]
    quantized: dict[str, int]
    layer_set: str
    calibration: str
    opset_before: int
    opset: int
    dtype: str
    size_before_bytes: int
    size_bytes: int
    weights_file: str
    time_ms: float

    @classmethod
    def file(cls, path: str | os.PathLike) -> Path:
        """Path of the report of a quantised ONNX file."""
        return Path(path).with_suffix(".json")

    @property
    def requested(self) -> dict[str, int]:
        """Format -> number of layers that were to have it."""
        return dict(Counter(layer.format for layer in self.layers))

    def frame(self) -> pd.DataFrame:
        """One row per layer, columns as in `QuantizedLayer`."""
        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def row(self) -> dict[str, object]:
        """One flat row of a table."""
        return {
            "component": self.component,
            "formats": ", ".join(f"{count} {name}" for name, count in self.quantized.items()),
            "dtype": self.dtype,
            "opset": self.opset,
            "size_before_bytes": self.size_before_bytes,
            "size_bytes": self.size_bytes,
            "calibration": self.calibration[:12],
            "time_ms": self.time_ms,
        }


def read_quantized_report(path: str | os.PathLike) -> QuantizedReport | None:
    """The report beside a quantised ONNX file; None where there is none that can be read."""
    return QuantizedReport.find(path)


def verify(
    path: Path, formats: Mapping[str, QuantFormat], other_floats: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Read a graph back, without its weights, and count the layers of each format.

    Args:
        formats: layer -> format of its codes. other_floats: layer -> name of another float that it computes in.

    Raises:
        InternalError: a layer is missing, or its weight or input has another format than requested.
    """
    other_floats = other_floats or {}
    model = onnx.load(path, load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    counts: Counter[str] = Counter()
    seen = set()
    for node in model.graph.node:
        layer = node.name.partition("/")[0]
        if node.op_type not in OPERATORS or (layer not in formats and layer not in other_floats):
            continue
        if layer in other_floats:
            float_name = other_floats[layer]
            _compare(path, layer, "weight", _type_name(kinds.get(node.input[1], 0)), float_name)
            _compare(path, layer, "input", _cast_kind(makers.get(node.input[0])), float_name)
            if layer not in seen:
                counts[float_name] += 1
            seen.add(layer)
            continue
        format = formats[layer]
        weight = _weight_kind(makers.get(node.input[1]), kinds)
        input_kind = _input_kind(makers.get(node.input[0]), makers, kinds)
        _compare(path, layer, "weight", weight, format.weight.kind)
        _compare(path, layer, "input", input_kind, format.activation.kind if format.activation else "")
        if layer not in seen:
            counts[format.name] += 1
        seen.add(layer)
    missing = [layer for layer in (*formats, *other_floats) if layer not in seen]
    if missing:
        raise InternalError(f"{path.name} was written without {missing[0]}; this is a mistake of wanlab")
    return dict(counts)


def _weight_kind(maker, kinds: dict[str, int]) -> str:
    if maker is None or maker.op_type != "DequantizeLinear":
        return ""
    return _type_name(kinds.get(maker.input[0], 0))


def _input_kind(maker, makers, kinds: dict[str, int]) -> str:
    if maker is None or maker.op_type != "DequantizeLinear":
        return ""
    before = makers.get(maker.input[0])
    if before is None or before.op_type != "QuantizeLinear" or before.input[1] != maker.input[1]:
        return ""
    return _type_name(kinds.get(before.input[2], 0))


def _cast_kind(maker) -> str:
    if maker is None or maker.op_type != "Cast":
        return ""
    return _type_name(next(attribute.i for attribute in maker.attribute if attribute.name == "to"))


def _compare(path: Path, layer: str, what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise InternalError(
            f"{path.name}: the {what} of {layer} came out as {actual or 'not quantised'}, requested was"
            f" {expected or 'not quantised'}; this is a mistake of wanlab"
        )


def _type_name(data_type: int) -> str:
    """wanlab's name of an `onnx.TensorProto.DataType`; empty where it has none."""
    return element_name(onnx.TensorProto.DataType.Name(data_type))


IR_VERSION = 10  # the first with INT4


def quantized_experts(
    model,
    folder: str | os.PathLike,
    components: Iterable[str],
    formats: Sequence[str],
    *,
    steps: int = 2,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Experts in one file per format, `<folder>/<expert>.<format>.onnx`, calibrated on one short generation.

    Args:
        model: model from `wanlab.models.load`, with all its components.
        folder: folder of the experts' graphs, `<expert>.onnx`; the quantized ones and the recorded inputs are written to it.
        components: components, of which the experts are quantized.
        formats: formats of their linear layers. steps: denoising steps of the generation. height, width,
            frames: its size; the model's default if not given.

    Returns:
        The files; empty where no expert or no format is given.

    Raises:
        WanlabError: as `record_inputs`, `calibrate` and `quantize`.
    """
    folder = Path(folder)
    experts = [name for name in components if name.startswith("expert")]
    if not experts or not formats:
        return []
    examples = nano_examples(1)
    recording = record_inputs(
        model,
        examples,
        folder / "latents",
        components=experts,
        progress=progress,
        steps=steps,
        height=height,
        width=width,
        frames=frames,
    )
    files = []
    for expert in experts:
        ranges = calibrate(model, expert, recording, progress=progress)
        for name in formats:
            file = folder / f"{expert}.{name}.onnx"
            graph = folder / f"{expert}.onnx"
            files.append(quantize(graph, file, format=name, calibration=ranges, progress=progress).path)
    return files


def quantize(
    onnx_path: str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    layers: str | Sequence[str] | Mapping[str, str | QuantFormat] | None = None,
    format: str | QuantFormat | None = None,
    exclude: str | Sequence[str] = (),
    calibration: Calibration | None = None,
    external_data: bool | None = None,
    weights: WeightsFile | None = None,
    progress: bool = True,
) -> QuantizedReport:
    """Write a graph whose chosen layers are quantised with explicit Q/DQ nodes (QuantizeLinear, DequantizeLinear).

    Weights become codes and scales. Inputs of layers whose format has an
    activation are rounded to codes of the calibration's range; layers that read one tensor in one format share the
    codes, with the largest of their ranges. A layer of another float computes in it between two Casts, with weight and
    bias in that dtype. All other biases, and everything else, are unchanged. Weights are read, rounded
    and written one at a time, so a graph of any size needs room for its largest. The file is checked by
    onnx.checker and read back: a layer in another format than requested is an error.

    Args:
        onnx_path: graph from `wanlab.export.export`, in float32, float16 or bfloat16.
        out_path: `.onnx` file to write; its folder is made. A report is written beside it as `.json`.
        layers: patterns as in `choose_layers`, None for its default; or pattern -> format, for a mixture, where
            later patterns win and `"fp32"`, `"fp16"` and `"bf16"` are formats too. Norms that are written as
            convolutions, as in the VAE, are chosen by patterns with `norm` in them only.
        format: format of all the layers that `layers` chooses: a name of `FORMATS`, a `QuantFormat`, or a float.
        exclude: patterns of layers that are not changed.
        calibration: ranges of the inputs of layers of the same component. Needed by formats with an activation.
        external_data: whether weights are written to a file of their own; None does so above 1.5 GiB.
        weights: that file, in the folder of `out_path`; other graphs made from the same source may share it. None makes one
            for this graph alone.
        progress: show a bar while weights are written.

    Raises:
        WanlabError: a layer that is not in the graph, no calibration for a layer or one of another component, blocks
            that do not fill a layer, an opset that cannot be raised, or a graph that onnx.checker refuses.
    """
    begin = time.perf_counter()
    source, path = Path(onnx_path), Path(out_path)
    if not source.is_file():
        raise WanlabError(f"no ONNX file at {source}; make it with wanlab.export.export")
    if path.suffix.lower() != ".onnx" or path.resolve() == source.resolve():
        raise WanlabError(
            f"{path} is the file that is read, or no .onnx file; give another name that ends in .onnx"
        )
    model = onnx_ir.load(source)
    metadata = dict(model.metadata_props)
    if "wanlab_quantized" in metadata:
        raise WanlabError(f"{source.name} is quantised already; start from the file that was exported")
    nodes = find_linear_nodes(model.graph)
    format_of = chosen_formats(nodes, layers, format, exclude)
    formats = {
        layer: each_format for layer, each_format in format_of.items() if isinstance(each_format, QuantFormat)
    }
    floats = {layer: name for layer, name in format_of.items() if isinstance(name, str)}
    calibration = _needed(calibration, formats, metadata, source.name)
    linears = nodes_of_layers(nodes, format_of, source.name)
    other_floats = layers_in_other_floats(linears, floats)
    if not formats and not other_floats:
        raise WanlabError(
            f"{source.name} computes these layers in these floats already, so there is nothing to write"
        )
    named = {
        layer: formats[layer].name if layer in formats else other_floats[layer]
        for layer in (*formats, *other_floats)
    }
    for layer, each_format in formats.items():
        check_blocks(linears[layer][0].shape, each_format.weight, layer)
    # Read here, as rewriting replaces the weights.
    before_bytes = {layer: linears[layer][0].stored.const_value.nbytes for layer in named}
    dtypes = Counter(str(linear.dtype).removeprefix("torch.") for all_ in linears.values() for linear in all_)

    opset_before = model.opset_imports[""]
    # Scales of other types than float32 came with opset 19.
    needed = max(
        19 if formats and set(dtypes) != {"float32"} else 0,
        needed_opset(linears, other_floats),
        *(each_format.opset for each_format in formats.values()),
    )
    if opset_before < needed:
        model = raise_opset(model, needed, source.name)
        linears = nodes_of_layers(find_linear_nodes(model.graph), named, source.name)
    rewriter = Rewriter(model.graph, model.opset_imports[""])
    for layer, each_format in formats.items():
        for linear in linears[layer]:
            rewriter.weight(linear, each_format.weight)
    inputs = [(linear, formats[layer].activation) for layer in formats for linear in linears[layer]]
    amax = calibration.amax if calibration is not None else {}
    scales = rewriter.activations([(linear, numbers) for linear, numbers in inputs if numbers], amax)
    compute_in(rewriter, linears, other_floats)
    rewriter.clear()

    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    facts = _facts(source, formats, other_floats, scales, calibration)
    key = key_of(facts)
    model.metadata_props.update(
        {
            "wanlab_format": json.dumps(dict(Counter(named.values()))),
            "wanlab_layers": layer_set_key(named),
            "wanlab_calibration": calibration.key if calibration is not None else "",
            "wanlab_quantized": key,
        }
    )
    weights_file = _write(model, path, key, external_data, weights, progress)
    quantized = verify(path, formats, other_floats)
    report = QuantizedReport(
        path=str(path),
        facts=facts,
        source=str(source),
        model=metadata.get("model", ""),
        component=metadata.get("component", ""),
        layers=tuple(
            _layer(layer, name, linears[layer], scales.get(layer), rewriter, before_bytes[layer])
            for layer, name in named.items()
        ),
        quantized=quantized,
        layer_set=layer_set_key(named),
        calibration=calibration.key if calibration is not None else "",
        opset_before=opset_before,
        opset=model.opset_imports[""],
        dtype=dtypes.most_common(1)[0][0],
        size_before_bytes=file_bytes(source),
        size_bytes=file_bytes(path),
        weights_file=weights_file,
        time_ms=(time.perf_counter() - begin) * 1e3,
    )
    report.write()
    return report


def _layer(layer, name, linears, scale, rewriter, before_bytes: int) -> QuantizedLayer:
    return QuantizedLayer(
        layer=layer,
        format=name,
        nodes=len(linears),
        activation_amax=scale.amax if scale else None,
        activation_scale=scale.scale if scale else None,
        shared_with=scale.shared_with if scale else (),
        weight_bytes=rewriter.weight_bytes[layer],
        weight_before_bytes=before_bytes,
    )


def _needed(calibration, formats, metadata: dict[str, str], name: str) -> Calibration | None:
    """The calibration, checked; None where no layer's input is rounded."""
    rounding = [layer for layer, each_format in formats.items() if each_format.activation is not None]
    if not rounding:
        return None
    if calibration is None:
        raise WanlabError(
            f"{formats[rounding[0]].name} rounds inputs and needs their ranges; give calibration= from"
            " wanlab.precision.calibrate, or a weight-only format"
        )
    for what in ("model", "component"):
        expected, actual = metadata.get(what), getattr(calibration, what)
        if expected and actual != expected:
            raise WanlabError(
                f"the calibration is of {what} {actual}, {name} of {expected}; give the one of {expected}"
            )
    missing = [layer for layer in rounding if layer not in calibration.amax]
    if missing:
        raise WanlabError(
            f"the calibration has no range for {missing[0]}"
            f"{f' and {len(missing) - 1} more layers' if len(missing) > 1 else ''};"
            " calibrate with these layers, or exclude them"
        )
    return calibration


def _facts(
    source: Path,
    formats: dict[str, QuantFormat],
    other_floats: dict[str, str],
    scales: Mapping[str, Any],
    calibration: Calibration | None,
) -> dict[str, Any]:
    exported = ExportReport.find(source)
    return {
        "graph": graph_sha256(source),
        "weights": exported.key if exported is not None else "",
        "formats": {layer: each_format.to_dict() for layer, each_format in formats.items()},
        "other_floats": other_floats,
        "scales": {layer: entry.scale for layer, entry in scales.items()},
        "calibration": calibration.key if calibration is not None else "",
        "wanlab": __version__,
    }


class _Stored:
    """An initializer in the form that `WeightsFile.add` takes."""

    def __init__(self, tensor: onnx_ir.TensorProtocol) -> None:
        self.tensor = tensor
        self.shape = list(tensor.shape.numpy())

    def lazy(self, name: str) -> onnx_ir.LazyTensor:
        return onnx_ir.LazyTensor(lambda: self.tensor, self.tensor.dtype, self.tensor.shape, name=name)


def _write(
    model, path: Path, key: str, external_data: bool | None, shared: WeightsFile | None, progress: bool
) -> str:
    """Write graph and weights; the graph appears at `path` when it is complete. Returns the name of the weights' file."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= 1024}
    size = sum(tensor.nbytes for tensor in large.values())
    external = size > EXTERNAL_ABOVE_BYTES if external_data is None else external_data
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = shared or WeightsFile(path.with_name(f"{path.stem}.weights"), key)
    manifest = weights.path.with_name(f"{weights.path.name}.json")
    for tensor in tensors.values():
        if (
            isinstance(tensor, onnx_ir.ExternalTensor)
            and Path(tensor.path).resolve() == weights.path.resolve()
        ):
            raise WanlabError(
                f"{weights.path} holds the weights that are read; give {path.name} another name"
            )
    if shared is None:
        manifest.unlink(missing_ok=True)  # no tensor of an earlier file is kept
    if external:
        weights.add({name: _Stored(tensor) for name, tensor in large.items()}, progress=progress)
        weights.refer(model.graph)
    elif shared is None:
        weights.path.unlink(missing_ok=True)
    for name, tensor in tensors.items():
        # What stays in the graph may lie in the source's file, which is not found from another folder.
        if isinstance(tensor, onnx_ir.ExternalTensor) and not (external and name in large):
            copy = np.array(tensor.numpy())
            model.graph.initializers[name].const_value = onnx_ir.Tensor(copy, dtype=tensor.dtype, name=name)
    save_checked(model, path)
    return weights.path.name if external else ""
