"""Explicit Q/DQ graphs: weights stored as codes, inputs rounded where an engine finds it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.convert.onnx.graph import EXTERNAL_ABOVE_BYTES, file_bytes
from wanlab.convert.onnx.report import read_report
from wanlab.convert.onnx.weights_file import WeightsFile
from wanlab.errors import WanlabError
from wanlab.precision.formats import Format, check_blocks
from wanlab.precision.graphs.choice import chosen_formats
from wanlab.precision.graphs.islands import compute_in, islands_among, needed_opset
from wanlab.precision.graphs.report import QuantizedLayer, QuantizedReport
from wanlab.precision.graphs.rewrite import Rewriter, raise_opset
from wanlab.precision.graphs.sites import find_sites, sites_of
from wanlab.precision.graphs.verify import verify
from wanlab.precision.layers import layer_set_key

if TYPE_CHECKING:
    import onnx_ir

    from wanlab.precision.calibrations.calibration import Calibration

IR_VERSION = 10  # the first that knows INT4


def quantize(
    onnx_path: str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    layers: str | Sequence[str] | Mapping[str, str | Format] | None = None,
    format: str | Format | None = None,
    exclude: str | Sequence[str] = (),
    calibration: Calibration | None = None,
    external_data: bool | None = None,
    weights: WeightsFile | None = None,
    progress: bool = True,
) -> QuantizedReport:
    """Write a graph whose chosen layers compute in a number format, said by QuantizeLinear and DequantizeLinear.

    Weights become codes and scales, taken from the weights in the graph. Inputs of layers whose format has an
    activation are rounded to codes of the calibration's range; layers that read one tensor in one format share the
    codes, with the largest of their ranges. A layer of another float computes in it between two Casts, with weight and
    bias in that dtype. All other biases, and everything else, stay as they are. Weights are read, rounded
    and written one at a time, so a graph of any size needs room for its largest. The file is checked by
    onnx.checker and read back: a layer that did not come out as asked is an error.

    Args:
        onnx_path: from `wanlab.convert.export`, in float32, float16 or bfloat16.
        out_path: the `.onnx` file to write; its folder is made. A report lies beside it as `.json`.
        layers: patterns as in `choose_layers`, None for its default; or pattern -> format, for a mixture, where
            later patterns win and `"fp32"`, `"fp16"` and `"bf16"` are formats too. Norms that are written as
            convolutions, as in the VAE, are taken by patterns with `norm` in them only.
        format: of all the layers that `layers` chooses: a name of `FORMATS`, a `Format`, or a float.
        exclude: patterns of layers to leave as they are.
        calibration: ranges of the layers' inputs; of the same component. Needed by formats with an activation.
        external_data: weights in a file of their own; None does so above 1.5 GiB.
        weights: the file that they go to then, in the folder of `out_path`; other graphs made from the same source may
            use it too. None takes one for this graph alone.
        progress: show a bar while weights are written.

    Raises:
        WanlabError: a layer that is not in the graph, no calibration for a layer or one of another component, blocks
            that do not fill a layer, an opset that cannot be raised, or a graph that onnx.checker refuses.
    """
    import onnx_ir

    begin = time.perf_counter()
    source, path = Path(onnx_path), Path(out_path)
    if not source.is_file():
        raise WanlabError(f"no ONNX file at {source}; make it with wanlab.convert.export")
    if path.suffix != ".onnx" or path.resolve() == source.resolve():
        raise WanlabError(f"{path} is no other .onnx file than the one read; give a name of its own")
    model = onnx_ir.load(source)
    metadata = dict(model.metadata_props)
    if "wanlab_quantized" in metadata:
        raise WanlabError(f"{source.name} is quantised already; start from the file that was exported")
    found = find_sites(model.graph)
    wanted_of = chosen_formats(found, layers, format, exclude)
    asked = {layer: wanted for layer, wanted in wanted_of.items() if isinstance(wanted, Format)}
    floats = {layer: name for layer, name in wanted_of.items() if layer not in asked}
    calibration = _needed(calibration, asked, metadata, source.name)
    sites = sites_of(found, wanted_of, source.name)
    islands = islands_among(sites, floats)
    if not asked and not islands:
        raise WanlabError(
            f"{source.name} computes these layers in these floats already; nothing is to be written"
        )
    named = {layer: asked[layer].name if layer in asked else islands[layer] for layer in (*asked, *islands)}
    for layer, wanted in asked.items():
        check_blocks(sites[layer][0].shape, wanted.weight, layer)
    # Read here, as rewriting replaces the weights.
    before_bytes = {layer: sites[layer][0].stored.const_value.nbytes for layer in named}
    dtypes = Counter(str(site.dtype).removeprefix("torch.") for all_ in sites.values() for site in all_)

    opset_before = model.opset_imports[""]
    # Scales of other types than float32 came with opset 19.
    needed = max(
        19 if asked and set(dtypes) != {"float32"} else 0,
        needed_opset(sites, islands),
        *(wanted.opset for wanted in asked.values()),
    )
    if opset_before < needed:
        model = raise_opset(model, needed, source.name)
        sites = sites_of(find_sites(model.graph), named, source.name)
    rewriter = Rewriter(model.graph, model.opset_imports[""])
    for layer, wanted in asked.items():
        for site in sites[layer]:
            rewriter.weight(site, wanted.weight)
    inputs = [(site, asked[layer].activation) for layer in asked for site in sites[layer]]
    amax = calibration.amax if calibration is not None else {}
    scales = rewriter.activations([(site, numbers) for site, numbers in inputs if numbers], amax)
    compute_in(rewriter, sites, islands)
    rewriter.clear()

    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    key = _key(source, asked, islands, scales, calibration)
    model.metadata_props.update(
        {
            "wanlab_format": json.dumps(dict(Counter(named.values()))),
            "wanlab_layers": layer_set_key(named),
            "wanlab_calibration": calibration.key if calibration is not None else "",
            "wanlab_quantized": key,
        }
    )
    weights_file = _write(model, path, key, external_data, weights, progress)
    quantized = verify(path, asked, islands)
    report = QuantizedReport(
        path=str(path),
        source=str(source),
        model=metadata.get("model", ""),
        component=metadata.get("component", ""),
        key=key,
        layers=tuple(
            _layer(layer, name, sites[layer], scales.get(layer), rewriter, before_bytes[layer])
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


def _layer(layer, name, sites, scale, rewriter, before_bytes: int) -> QuantizedLayer:
    return QuantizedLayer(
        layer=layer,
        format=name,
        nodes=len(sites),
        activation_amax=scale.amax if scale else None,
        activation_scale=scale.scale if scale else None,
        shared_with=scale.shared_with if scale else (),
        weight_bytes=rewriter.weight_bytes[layer],
        weight_before_bytes=before_bytes,
    )


def _needed(calibration, asked, metadata: dict[str, str], name: str) -> Calibration | None:
    """The calibration, checked; None when no layer's input is rounded."""
    wanting = [layer for layer, wanted in asked.items() if wanted.activation is not None]
    if not wanting:
        return None
    if calibration is None:
        raise WanlabError(
            f"{asked[wanting[0]].name} rounds inputs and needs their ranges; give calibration= from"
            " wanlab.precision.calibrate, or a weight-only format"
        )
    for what in ("model", "component"):
        here, there = metadata.get(what), getattr(calibration, what)
        if here and there != here:
            raise WanlabError(
                f"the calibration is of {what} {there}, {name} of {here}; give the one of {here}"
            )
    missing = [layer for layer in wanting if layer not in calibration.amax]
    if missing:
        raise WanlabError(
            f"the calibration has no range for {missing[0]}"
            f"{f' and {len(missing) - 1} more layers' if len(missing) > 1 else ''};"
            " calibrate with these layers, or exclude them"
        )
    return calibration


def _key(source: Path, asked: dict[str, Format], islands: dict[str, str], scales, calibration) -> str:
    from wanlab import __version__

    with open(source, "rb") as file:
        graph = hashlib.file_digest(file, "sha256").hexdigest()
    exported = read_report(source)
    facts: dict[str, Any] = {
        "graph": graph,
        "weights": exported.key if exported is not None else "",
        "formats": {layer: wanted.to_dict() for layer, wanted in asked.items()},
        "islands": islands,
        "scales": {layer: entry.scale for layer, entry in scales.items()},
        "calibration": calibration.key if calibration is not None else "",
        "wanlab": __version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Stored:
    """An initializer, as a `WeightsFile` takes it."""

    def __init__(self, tensor: onnx_ir.TensorProtocol) -> None:
        self.tensor = tensor
        self.shape = list(tensor.shape.numpy())

    def lazy(self, name: str) -> onnx_ir.LazyTensor:
        import onnx_ir

        return onnx_ir.LazyTensor(lambda: self.tensor, self.tensor.dtype, self.tensor.shape, name=name)


def _write(
    model, path: Path, key: str, external_data: bool | None, shared: WeightsFile | None, progress: bool
) -> str:
    """Write graph and weights; the graph appears under `path` when it is whole. Returns the weights' file."""
    import numpy as np
    import onnx
    import onnx_ir

    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = {name: tensor for name, tensor in held.items() if tensor.nbytes >= 1024}
    size = sum(tensor.nbytes for tensor in large.values())
    external = size > EXTERNAL_ABOVE_BYTES if external_data is None else external_data
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = shared or WeightsFile(path.with_name(f"{path.stem}.weights"), key)
    manifest = weights.path.with_name(f"{weights.path.name}.json")
    for tensor in held.values():
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
    for name, tensor in held.items():
        # What stays in the graph may lie in the source's file, which is not found from another folder.
        if isinstance(tensor, onnx_ir.ExternalTensor) and not (external and name in large):
            copy = np.array(tensor.numpy())
            model.graph.initializers[name].const_value = onnx_ir.Tensor(copy, dtype=tensor.dtype, name=name)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.onnx")
    try:
        onnx.save(onnx_ir.to_proto(model), draft)
        try:
            onnx.checker.check_model(str(draft), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise WanlabError(f"onnx.checker refuses {path.name}: {str(error).splitlines()[0]}") from error
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return weights.path.name if external else ""
