"""A plan as graphs and engines: what was asked is in the file, runs step by step, and agrees with PyTorch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from msgspec import structs
from onnx import TensorProto
from support import convert_tiny as tiny
from support.plan_agreement import AGREES_BELOW, _tensorrt, agreement, layer_distances

from wanlab import engines, models, precision
from wanlab.core.errors import WanlabError
from wanlab.engines.tensorrt import runtime as runtimes
from wanlab.engines.tensorrt.build import layers_path
from wanlab.export.components import AXES
from wanlab.export.graph import file_bytes
from wanlab.precision.qdq import chosen_formats, is_norm

pytestmark = pytest.mark.slow

EXPERTS = ("expert_high", "expert_low")
SIZE = dict(height=64, width=64, frames=5)
STEPS = 4  # of which expert_high runs the first two
needs_tensorrt = pytest.mark.skipif(
    not runtimes.installed("tensorrt-rtx"), reason='needs pip install "wanlab[rtx]", which Linux on x86 has'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def recording(model, folder):
    return precision.record_inputs(
        model, precision.nano_examples(1), folder / "recording", steps=STEPS, progress=False, **SIZE
    )


@pytest.fixture(scope="module")
def calibrations(model, recording):
    return {name: precision.calibrate(model, name, recording, layers="*", progress=False) for name in EXPERTS}


@pytest.fixture(scope="module")
def stepped():
    """Left alone at first, then int8; the last step of expert_low has 8-bit floats in its feed-forward layers."""
    rules = [
        {"format": "int8", "layers": ("blocks.*",)},
        {"format": "fp16", "layers": ("proj_out", "blocks.0.attn1.to_[qk]")},
        {"format": "fp8", "component": "expert_low", "steps": "3", "layers": ("blocks.*.ffn.*",)},
        {"format": "default", "component": "expert_high", "steps": "0", "layers": ("*",)},
    ]
    return precision.make_plan("stepped", "fp32", rules, num_steps=STEPS)


@pytest.fixture(scope="module")
def graphs(model, stepped, folder, calibrations, exported):
    exported(model, EXPERTS, folder / "graphs" / "source", dynamic=False, **SIZE)
    return precision.export_plan(model, stepped, folder / "graphs", calibrations, progress=False, **SIZE)


@pytest.fixture(scope="module")
def islands(model, folder, graphs, calibrations, exported):
    """Report of a float16 graph whose feed-forward layers, time embedding and convolution are in float32."""
    (source,) = exported(model, "expert_high", dtype="float16", dynamic=False, **SIZE)
    floats = ("blocks.*.ffn.*", "condition_embedder.time_proj", "patch_embedding")
    return precision.quantize(
        source.path,
        folder / "islands" / "expert_high.onnx",
        layers={"blocks.*.attn?.*": "int8", **dict.fromkeys(floats, "fp32")},
        calibration=calibrations["expert_high"],
        progress=False,
    )


def load(path):
    return onnx.load(path, load_external_data=False)


# ---- float islands


def test_islands_compute_between_casts_with_weight_and_bias_in_their_float(islands):
    assert islands.quantized == {"fp32": 14, "int8": 48}
    assert islands.dtype == "float16"
    graph = load(islands.path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for layer in ("blocks.3.ffn.net.2", "condition_embedder.time_proj", "patch_embedding"):
        mine = [node for node in graph.node if node.name.startswith(f"{layer}/")]
        product = next(node for node in mine if node.op_type in ("MatMul", "Gemm", "Conv"))
        held = [name for node in mine for name in node.input if name in kinds]
        assert {kinds[name] for name in held} == {TensorProto.FLOAT}
        assert len(held) == 2  # weight and bias
        into, out = makers[product.input[0]], next(node for node in mine if "output_cast" in node.name)
        assert [into.op_type, out.op_type] == ["Cast", "Cast"]
        assert [into.attribute[0].i, out.attribute[0].i] == [TensorProto.FLOAT, TensorProto.FLOAT16]
    # What stays has no float32 weight but the norms and the timestep's, which the library keeps so.
    wide = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT and name.endswith(".weight.T")}
    assert not wide


def test_layers_that_read_one_tensor_share_its_cast(graphs):
    graph = load(graphs.folder / graphs.bands["expert_low"][0][2]).graph
    casts = [node for node in graph.node if "input_cast" in node.name]
    assert {node.name for node in casts} == {"blocks.0.attn1/input_cast", "proj_out/input_cast"}
    readers = [node.name for node in graph.node if casts[0].output[0] in node.input]
    assert [name.partition("/")[0] for name in readers] == ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k"]


def test_an_island_of_the_graphs_own_float_is_refused_as_nothing_to_do(graphs, folder):
    with pytest.raises(WanlabError, match=r"expert_high\.onnx computes these layers in these floats already"):
        precision.quantize(
            graphs.folder / "source" / "expert_high.onnx",
            folder / "none.onnx",
            layers={"blocks.*.ffn.*": "fp32"},
        )


def test_narrow_convolutions_raise_the_opset(graphs, folder):
    report = precision.quantize(
        graphs.folder / "source" / "expert_high.onnx",
        folder / "narrow.onnx",
        layers={"patch_embedding": "bf16"},
    )
    assert report.quantized == {"bf16": 1}
    assert (report.opset_before, report.opset) == (20, 22)


def test_norms_are_taken_only_by_name():
    layers = ["decoder.conv_in", "decoder.norm_out", "decoder.mid.norm", "decoder.mid.conv1"]
    assert [is_norm(layer) for layer in layers] == [False, True, True, False]
    every = chosen_formats(layers, "*", "int8-weight")
    assert list(every) == ["decoder.conv_in", "decoder.mid.conv1"]
    assert list(chosen_formats(layers, "*norm*", "int8-weight")) == ["decoder.mid.norm", "decoder.norm_out"]
    named = chosen_formats(layers, {"decoder.*": "fp8", "decoder.norm_out": "bf16"}, None)
    assert named["decoder.norm_out"] == "bf16"
    assert "decoder.mid.norm" not in named
    assert list(chosen_formats(layers, "*", "int8-weight", exclude="*norm*")) == list(every)
    with pytest.raises(WanlabError, match="no layer is left"):
        chosen_formats(layers, "decoder.conv_in", "int8", exclude="decoder.c*")


def test_one_table_of_axes():
    from wanlab.engine_report import from_onnx as sizes
    from wanlab.engines.tensorrt import profile
    from wanlab.export import components as inputs

    assert inputs.AXES is profile.AXES is sizes.AXES is AXES


# ---- graphs


def test_every_range_of_steps_has_the_graph_that_the_plan_says(graphs, model, stepped):
    frame = graphs.frame()
    assert list(zip(frame["component"], frame["first_step"], frame["last_step"], strict=True)) == [
        ("expert_high", 0, 0), ("expert_high", 1, 3), ("expert_low", 0, 2), ("expert_low", 3, 3),
    ]  # fmt: skip
    assert frame["graph"][0] == "source/expert_high.onnx"  # left alone: as it was exported
    assignment = precision.assign(stepped, model)
    for row in frame.itertuples():
        asked = assignment.formats(row.component, row.first_step)
        assert graphs.formats[row.graph] == asked
        written = precision.read_quantized_report(graphs.folder / row.graph)
        counts = Counter(name for name in asked.values() if name != "fp32")
        assert (written.quantized if written and row.graph[:6] != "source" else {}) == dict(counts)
    assert frame["size_bytes"][1] < 0.4 * frame["size_bytes"][0]


def test_graphs_of_one_expert_share_a_file_of_weights(graphs):
    first, second = (graphs.folder / graph for graph in graphs.graphs_of("expert_low"))
    weights = graphs.folder / "expert_low.weights"
    assert weights.name in graphs.files
    # The attention's codes are held once; only the feed-forward's are there twice.
    apart = file_bytes(first) + file_bytes(second)
    assert weights.stat().st_size < 0.65 * apart
    assert json.loads((graphs.folder / "plan.json").read_text())["facts"]["plan"] == graphs.plan.hash


def test_true_graphs_are_reused_and_stale_ones_made_anew_with_the_reason(
    model, stepped, graphs, calibrations, folder
):
    def again(plan, ranges=calibrations, **changes):
        return precision.export_plan(model, plan, folder / "again", ranges, progress=False, **SIZE | changes)

    shutil.copytree(graphs.folder / "source", folder / "again" / "source")
    plan = precision.make_plan("first", "fp32", [{"format": "int8", "layers": ("blocks.*.ffn.*",)}])
    made = again(plan)
    assert (made.reused, made.reason) == (False, "")
    assert made.frame()["graph"].tolist() == ["expert_high.onnx", "expert_low.onnx"]
    kept = again(plan)
    assert kept.reused
    assert kept.files == made.files
    other = precision.make_plan("second", "fp32", [{"format": "int8", "layers": ("blocks.*.attn1.*",)}])
    changed = again(other)
    assert (changed.reused, changed.reason) == (False, f"plan was {plan.hash[:12]}, is {other.hash[:12]}")
    wider = {name: one.with_method("max") for name, one in calibrations.items()}
    assert again(other, wider).reason.startswith("calibrations: expert_high was ")
    (folder / "again" / "expert_low.onnx").write_bytes(b"x")
    with pytest.raises(
        WanlabError, match=r"expert_low\.onnx has 1 bytes, it was written with .*; make it with"
    ):
        precision.load_plan_engines(folder / "again", "cpu")
    assert again(other, wider).reason.startswith("expert_low.onnx has 1 bytes")
    assert precision.read_plan_graphs(folder / "again").plan.hash == other.hash


def test_ranges_of_inputs_are_asked_for_before_anything_is_exported(model, stepped, calibrations, folder):
    with pytest.raises(WanlabError, match=r"blocks\..* of expert_high is int8, which needs the range"):
        precision.export_plan(model, stepped, folder / "none", {}, **SIZE)
    with pytest.raises(
        WanlabError, match=r"a calibration is given for 'expert_hihg' .did you mean 'expert_high'"
    ):
        precision.export_plan(
            model, stepped, folder / "none", calibrations | {"expert_hihg": calibrations["expert_high"]}
        )
    with pytest.raises(WanlabError, match=r"no graphs of a plan in .*; make it with wanlab\.precision"):
        precision.load_plan_engines(folder / "none")
    assert not (folder / "none").exists()


def test_models_that_no_registry_knows_are_planned_too(folder):
    plan = precision.make_plan("tiny", "fp32", [{"format": "int8-weight", "layers": ("blocks.*.ffn.*",)}])
    small = tiny.bare(tiny.pipeline(), height=64, width=64, frames=5)
    made = precision.export_plan(small, plan, folder / "tiny", progress=False)
    assert [sorted(found.split(", ")) for found in made.frame()["formats"]] == [
        ["15 fp32", "2 int8-weight"]
    ] * 2


# ---- engines


def test_engines_change_with_the_step_of_a_generation(model, graphs, stepped, calibrations):
    opened = precision.load_plan_engines(graphs.folder, "cpu", resident=False)
    ran = []
    for name, engine in opened.items():
        engine._opener = telling(engine._opener, name, engine, ran)
        engine._open.clear()
    changed = engines.use(model, opened)
    assert changed.engines["expert_high"] == "onnxruntime-cpu"
    example = precision.nano_examples(1)[0]
    made = {
        who: it.generate(example.image, example.prompt, steps=STEPS, output="latent", **SIZE).video
        for who, it in {
            "onnxruntime": changed,
            "pytorch": precision.apply_plan(model, stepped, calibrations).model,
            "unquantised": model,
        }.items()
    }
    # Both branches of guidance, in every step.
    assert ran == [
        (name, step, graph)
        for name, step, graph in (
            ("expert_high", 0, "expert_high.onnx"),
            ("expert_high", 1, "expert_high.1-3.onnx"),
            ("expert_low", 2, "expert_low.0-2.onnx"),
            ("expert_low", 3, "expert_low.3-3.onnx"),
        )
        for _ in range(2)
    ]
    planned, run = (abs(made[who] - made["unquantised"]).mean() for who in ("pytorch", "onnxruntime"))
    assert 0.5 < run / planned < 2
    # The scheduler of the original tells nothing.
    assert not hasattr(model.pipeline.scheduler, "wanlab_clocks")
    with pytest.raises(WanlabError, match=r"plan stepped is for 4 steps, this generation has 3"):
        changed.generate(example.image, example.prompt, steps=3, output="latent", **SIZE)


def telling(opener, name, engine, ran):
    """An opener whose engines write down when they run."""

    def opened(path):
        made = opener(path)
        run = made.run

        def told(feeds):
            ran.append((name, engine.clock.step, path.name))
            return run(feeds)

        made.run = told
        return made

    return opened


def test_stepped_engines_say_what_is_wrong(model, graphs, recording):
    opened = precision.load_plan_engines(graphs.folder, "cpu")
    engine = opened["expert_low"]
    assert engine.size_bytes < sum(
        map(file_bytes, map(graphs.folder.joinpath, graphs.graphs_of("expert_low")))
    )
    feeds = recording.inputs(recording.of("expert_low")[0])
    with pytest.raises(WanlabError, match="no generation is running"):
        engine.run(feeds)
    with engine.at(3):
        late = engine.run(feeds)["velocity"]
    with engine.at(2):
        assert not torch.equal(engine.run(feeds)["velocity"], late)
    with pytest.raises(WanlabError, match="plan stepped has steps 0 to 3, not 4"), engine.at(4):
        pass
    with pytest.raises(WanlabError, match=r"bind engine\.band\(step\)"):
        engine.bind({}, {})
    with pytest.raises(WanlabError, match="it cannot run expert_high"):
        engines.use(model, {"expert_high": engine})
    with pytest.raises(WanlabError, match="unknown provider 'gpu'"):
        precision.load_plan_engines(graphs.folder, "gpu")
    with pytest.raises(WanlabError, match="no graph of 'expert_hi'"):
        precision.load_plan_engines(graphs.folder, "cpu", components=("expert_hi",))
    other = precision.load_plan_engines(graphs.folder, "cpu", components=("expert_high",))
    with pytest.raises(WanlabError, match="counted for plan stepped already"):
        engines.use(engines.use(model, {"expert_low": engine}), other)


# ---- agreement


@pytest.fixture(scope="module")
def table(model, stepped, graphs, recording, calibrations):
    return agreement(
        model, stepped, graphs.folder, recording, calibrations,
        calls=2, nudges=2, provider="cpu", targets=None, progress=False,
    )  # fmt: skip


def test_the_applications_agree_layer_by_layer_and_in_their_error(table, graphs):
    assert table.groupby("component").size().tolist() == [4, 4]
    ran = table[table["application"] == "onnxruntime-cpu"]
    assert ran["agrees"].all()
    assert (ran["layers"] == 67).all()
    assert (ran["layers_as_asked"] == 67).all()
    planned = ran[ran["format_error"] > 0]
    assert len(planned) == 3
    assert (planned["layer_share_percent"] < 0.1).all()  # of a layer's own error: the same arithmetic
    assert planned["format_error"].between(0.01, 0.06).all()
    assert ((planned["relative_l2"] / planned["format_error"] - 1).abs() < AGREES_BELOW).all()
    # What is left alone differs by the rounding of float32.
    assert ran[ran["format_error"] == 0]["relative_l2"].item() < 1e-5
    one = table[table["application"] == "pytorch"]
    assert one["agrees"].isna().all()
    assert (one["to_pytorch"] == 0).all()
    assert one["note"].str.contains("simulated on the CPU").all()


def test_a_graph_of_another_plan_is_found_out_layer_by_layer(model, graphs, recording, calibrations):
    """The graph has one layer in int8 where PyTorch has it in fp8, which is far less than what rounding drifts by."""
    graph = graphs.bands["expert_low"][0][2]
    rules = [
        {"format": "int8", "layers": ("blocks.*",)},
        {"format": "fp16", "layers": ("proj_out", "blocks.0.attn1.to_[qk]")},
        {"format": "fp8", "blocks": "5", "layers": ("ffn.net.2",)},
    ]
    applied = precision.apply_plan(model, precision.make_plan("other", "fp32", rules), calibrations)
    found = layer_distances(
        graphs.folder / graph,
        applied.model.pipeline.transformer_2,
        model.pipeline.transformer_2,
        recording.inputs(recording.of("expert_low")[0]),
        graphs.formats[graph],
        "cpu",
    )
    off = found[found["to_pytorch"] > found["allowed"]]
    assert off["layer"].tolist() == ["blocks.5.ffn.net.2"]
    assert not list(graphs.folder.glob(".*.layers.onnx"))


def test_an_agreement_needs_recordings_of_the_plans_steps(model, stepped, graphs, recording, calibrations):
    few = recording.only(step=[0, 1, 2])
    with pytest.raises(WanlabError, match="no call of expert_low at steps 3 to 3 is recorded"):
        agreement(model, stepped, graphs.folder, few, calibrations, targets=None, progress=False)


# ---- TensorRT


@needs_tensorrt
def test_mixed_graphs_build_and_the_builder_does_what_was_asked(islands, folder):
    wanted = {layer.layer: layer.format for layer in islands.layers}
    made = engines.build_tensorrt(islands.path, compute_capabilities=["8.9", "12.0"], level=0, progress=False)
    assert made.numbers == "float16, 48 x int8, 14 x fp32"
    found = precision.built_formats(made.path, islands.path, wanted).set_index("layer")
    # TensorRT for RTX takes the casts around the convolution away, and computes it in the float of its input.
    off = found[~found["as_asked"]]
    assert set(off.index) <= {"patch_embedding"}
    assert set(found.loc[found["asked"] == "int8", "built"]) == {"int8"}
    assert "fp32" in found.loc["blocks.2.ffn.net.2", "built"]


@needs_tensorrt
def test_an_engine_of_another_precision_is_found_out(graphs):
    """The fault of an engine that computes in float32 what was asked in 8 bits."""
    quantised = graphs.folder / graphs.bands["expert_high"][1][2]
    plain = graphs.folder / "source" / "expert_high.onnx"
    engine = engines.build_tensorrt(plain, compute_capabilities=["8.9"], level=0, progress=False).path
    found = precision.built_formats(engine, plain, graphs.formats[quantised.name])
    asked = found[found["asked"] == "int8"]
    assert len(asked) == 58
    assert not asked["as_asked"].any()
    assert set(asked["built"]) == {"fp32"}
    said = r"computes in fp32 in the engine, .* int8: FP32 fallback \(57 more like it\); build it again"
    with pytest.raises(WanlabError, match=said):
        precision.engine_effect_check(graphs, quantised.name, engine)
    # In the place of the plan's own engine it is refused before anything is computed with it.
    planted = [
        shutil.copy(file(engine), file(quantised.with_suffix(".engine"))) for file in (Path, layers_path)
    ]
    alone = structs.replace(graphs, bands={"expert_high": graphs.bands["expert_high"][1:2]})
    with pytest.raises(WanlabError, match=said):
        precision.load_plan_engines(alone, "tensorrt")
    for path in planted:
        Path(path).unlink()


@needs_tensorrt
def test_what_is_built_or_refused_is_a_row_of_its_range_of_steps(graphs):
    last = structs.replace(graphs, bands={"expert_low": graphs.bands["expert_low"][1:]})
    built = precision.build_plan(last, ("7.5", "8.9"), level=0, progress=False).set_index("capability")
    assert (built["component"] == "expert_low").all()
    assert built[["first_step", "last_step"]].stack().unique().tolist() == [3]
    assert built["built"].to_dict() == {"8.9": True, "7.5": False}
    assert built.loc["8.9", "numbers"].startswith("float32, ")
    assert built.loc["8.9", ["layers", "layers_as_asked", "differing"]].tolist() == [67, 67, ""]
    assert precision.engine_effect_check(last, built.loc["8.9", "graph"])["as_asked"].all()
    assert (graphs.folder / built.loc["8.9", "engine"]).is_file()
    assert "model contains HW-specific datatypes: fp8" in built.loc["7.5", "reason"]
    assert built.loc["7.5", "engine"] == ""
    assert built.equals(precision.read_plan_builds(graphs.folder).set_index("capability"))


@needs_tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_is_not_executed_says_so_and_compares_nothing(graphs):
    last = structs.replace(graphs, bands={"expert_low": graphs.bands["expert_low"][1:]})
    (row,) = _tensorrt(last, ("8.9",), 0, False, None)
    assert row["executed"] is False
    assert "agrees" not in row
    assert "relative_l2" not in row
    assert (row["layers"], row["layers_as_asked"]) == (67, 67)
    assert row["note"] == "built for SM 8.9, not executed"
