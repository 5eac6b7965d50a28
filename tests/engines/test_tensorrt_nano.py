"""wan-nano's own networks built for GPUs that are not here, in every format, on the CPU."""

from __future__ import annotations

import json

import pytest

from wanlab import engines, models, precision
from wanlab.core.errors import WanlabError
from wanlab.engines.tensorrt import runtime as runtimes
from wanlab.engines.tensorrt.build import layers_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not runtimes.installed("tensorrt-rtx"),
        reason='needs pip install "wanlab[rtx]", which Linux on x86 has',
    ),
]
SMALL = {"height": 64, "width": 64, "frames": 5}
COMPONENTS = ("text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder")
# What is quantised: by default the linear layers of an expert's blocks; elsewhere all that multiplies, but no norms.
LAYERS = {
    "text_encoder": {"layers": "*"},
    "vae_encoder": {"layers": "encoder.*", "exclude": "*norm*"},
    "vae_decoder": {"layers": "decoder.*", "exclude": "*norm*"},
}
FP8_TARGETS = ("8.9", "12.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def graphs(model, folder, exported):
    """Graphs by (component, dtype): the experts with free sizes in float32, everything else fixed."""
    free = exported(model, COMPONENTS, folder / "float32", dynamic=("expert_high", "expert_low"), **SMALL)
    half = exported(model, COMPONENTS, folder / "float16", dynamic=False, dtype="float16", **SMALL)
    return {(report.component, report.dtype): report.path for report in (*free, *half)}


@pytest.fixture(scope="module")
def recording(model, folder):
    """What one small generation gives every component."""
    wanted = [name for name in COMPONENTS if name != "expert_low"]
    return precision.record_inputs(
        model,
        precision.nano_examples(1),
        folder / "inputs",
        components=wanted,
        steps=2,
        progress=False,
        **SMALL,
    )


@pytest.fixture(scope="module")
def quantised(model, graphs, recording, folder):
    """A graph of explicit Q/DQ by (component, format), made when asked for."""
    calibrations = {}

    def make(component, format):
        choice = LAYERS.get(component, {})
        if component not in calibrations:
            layers = choice.get("layers")
            calibrations[component] = precision.calibrate(
                model, component, recording, layers=layers, progress=False
            )
        return precision.quantize(
            graphs[component, "float32"],
            folder / f"{component}.{format}.onnx",
            format=format,
            calibration=calibrations[component],
            progress=False,
            **choice,
        ).path

    return make


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_builds_for_ampere_ada_and_blackwell(graphs, component, dtype):
    made = engines.build_tensorrt(graphs[component, dtype], level=0, progress=False)
    assert made.compute_capabilities == ("8.6", "8.9", "12.0")
    assert made.component == component
    assert made.model == "wan-nano"
    assert made.size_bytes > 0.5 * made.graph_bytes  # it holds the weights
    # Norms and the like stay in float32 by choice of the graph, what multiplies does not.
    word = {"float32": "Float", "float16": "Half"}[dtype]
    assert sum(count for kind, count in made.datatypes.items() if word in kind) > 0.5 * sum(
        made.datatypes.values()
    )
    if dtype == "float32":
        assert set(made.datatypes) <= {"Float", "Int64", "Bool", "Float+Int64", "Bool+Float", "Int32"}
    free = dtype == "float32" and component.startswith("expert")
    assert all((low != high) == free for low, _, high in made.shapes.values())


def test_a_dynamic_profile_is_in_the_engine(graphs):
    profile = engines.PixelProfile(
        min=(64, 90), opt=(128, 192), max=(192, 300), frames=(5, 17, 17), text_tokens=(8, 24, 24)
    )
    made = engines.build_tensorrt(graphs["expert_high", "float32"], profile=profile, level=0, progress=False)
    assert made.shapes["hidden_states"] == ((1, 36, 2, 8, 10), (1, 36, 5, 16, 24), (2, 36, 5, 24, 38))
    assert made.shapes["encoder_hidden_states"] == ((1, 8, 96), (1, 24, 96), (2, 24, 96))
    assert made.notes == (
        "min 64x90 is built as 64x80 pixels: 90 is no multiple of 16",
        "max 192x300 is built as 192x304 pixels: 300 is no multiple of 16",
    )
    layers = json.loads(layers_path(made.path).read_text())
    video = next(tensor for tensor in layers["I/O Tensors"] if tensor["Name"] == "hidden_states")
    assert video["ProfileInfo"][0]["MinShape"] == [1, 36, 2, 8, 10]
    assert video["Dimensions"] == [-1, 36, -1, -1, -1]
    text = " ".join(layer.get("Metadata", "") for layer in layers["Layers"])
    for block in range(6):
        for name in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2"):
            assert f"blocks.{block}.{name}/" in text
    with pytest.raises(WanlabError, match=r"latent_frames of hidden_states is 1 .* was traced for 2 to 256"):
        engines.build_tensorrt(
            graphs["expert_high", "float32"], profile=engines.PixelProfile(frames=(1, 5, 5))
        )
    with pytest.raises(WanlabError, match=r"axis batch of hidden_states is fixed at 1 in expert_high.onnx"):
        engines.build_tensorrt(
            graphs["expert_high", "float16"], profile=engines.PixelProfile(batch=(1, 2, 2))
        )


@pytest.mark.parametrize("component", [name for name in COMPONENTS if name != "expert_low"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_explicit_quantisation_builds_and_is_computed_as_such(quantised, component, format):
    path = quantised(component, format)
    targets = FP8_TARGETS if format == "fp8" else ("8.6", *FP8_TARGETS)
    made = engines.build_tensorrt(path, compute_capabilities=targets, level=0, progress=False)
    layers = precision.read_quantized_report(path).layers
    assert made.numbers == f"float32, {len(layers)} x {format}"
    word = {"int8": "Int8", "fp8": "FP8"}[format]
    computed = sum(count for kinds, count in made.datatypes.items() if word in kinds.split("+"))
    # Projections of one input are one product in the engine.
    assert computed >= len(layers) / 3


@pytest.mark.parametrize("component", ["expert_high", "text_encoder"])
def test_ampere_and_turing_refuse_fp8_with_the_reason(quantised, component):
    frame = engines.buildable(quantised(component, "fp8"), ["7.5", "8.6"], progress=False)
    assert not frame["built"].any()
    for row in frame.itertuples():
        assert (
            f"sm{row.capability.replace('.', '')}, because the model contains HW-specific datatypes: fp8"
            in row.reason
        )


@pytest.mark.parametrize(
    ("component", "node", "operator", "reason"),
    [
        ("expert_high", "patch_embedding/", "Conv", "FP32 3D convolution"),
        ("vae_encoder", "encoder.conv_in/", "Conv", "FP32 3D convolution"),
        ("vae_decoder", "post_quant_conv/", "Conv", "FP32 3D convolution"),
        ("text_encoder", "encoder.block.", "MatMul", "FP32 GEMM"),
    ],
)
def test_turing_refuses_float32_by_the_layers_name(graphs, component, node, operator, reason):
    row = engines.buildable(graphs[component, "float32"], ["7.5"], progress=False).iloc[0]
    assert not row["built"]
    assert row["node"].startswith(node)
    assert row["operator"] == operator
    assert f"for Turing (SM75): {reason} is not supported" in row["reason"]
