"""TensorRT without a network of the model: profiles, build information, refusals, on graphs of a few nodes, really built."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.tensorrt_tiny import attention_graph, patch_graph

from wanlab import engines, models, plots
from wanlab.core.errors import WanlabError
from wanlab.engines import PixelProfile, build_tensorrt, buildable
from wanlab.engines.tensorrt import network
from wanlab.engines.tensorrt import runtime as runtimes
from wanlab.engines.tensorrt.build import BuildInfo, layers_from_log, layers_path, parse_line
from wanlab.engines.tensorrt.engine import deserialize
from wanlab.engines.tensorrt.profile import clip_range, network_shapes, read_source, traced_range
from wanlab.export.components import AXES

ARTICLE = PixelProfile(min=(480, 854), opt=(720, 1280), max=(1080, 1920))
TARGETS = ("8.6", "8.9", "12.0")
pytestmark = pytest.mark.skipif(
    not runtimes.installed("tensorrt-rtx"), reason='needs pip install "wanlab[rtx]", which Linux on x86 has'
)


@pytest.fixture
def graph(tmp_path):
    return patch_graph(tmp_path / "expert_high.onnx")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine of the small graph at the article's sizes."""
    graph = patch_graph(tmp_path_factory.mktemp("built") / "expert_high.onnx")
    return build_tensorrt(graph, profile=ARTICLE, level=0, progress=False)


# The article's profile, and any other


def test_the_articles_sizes_become_latents_of_the_real_model(graph):
    shapes = network_shapes(read_source(graph), ARTICLE)
    assert shapes.inputs["hidden_states"] == (
        (1, 36, 11, 60, 106),
        (1, 36, 21, 90, 160),
        (2, 36, 21, 136, 240),
    )
    assert shapes.free
    assert shapes.notes == (
        "min 480x854 is built as 480x848 pixels: 854 is no multiple of 16",
        "max 1080x1920 is built as 1088x1920 pixels: 1080 is no multiple of 16",
    )


def test_a_default_profile_lies_around_the_models_own_clip():
    for name in ("wan-nano", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"):
        spec = models.get(name)
        clips, notes = clip_range(spec, PixelProfile())
        assert (clips["opt"].height, clips["opt"].width) == (spec.defaults.height, spec.defaults.width)
        assert clips["opt"].frames == clips["max"].frames == spec.defaults.frames
        assert clips["min"].height < clips["opt"].height < clips["max"].height
        assert (clips["min"].batch, clips["max"].batch) == (1, 2)
        assert not notes  # nothing was asked for, so nothing was moved


def ranges(low, high):
    return st.lists(st.integers(low, high), min_size=3, max_size=3).map(sorted)


@given(
    st.sampled_from(["wan-nano", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"]),
    ranges(1, 3000),
    ranges(1, 3000),
    ranges(1, 257),
)
def test_any_profile_holds_what_was_asked_for_and_only_legal_sizes(name, heights, widths, frames):
    spec = models.get(name)
    ends = dict(zip(("min", "opt", "max"), zip(heights, widths, strict=True), strict=True))
    clips, notes = clip_range(spec, PixelProfile(**ends, frames=tuple(frames)))
    step = 32 if name == "wan2.2-ti2v-5b" else 16
    for clip in clips.values():
        assert clip.height % step == clip.width % step == 0
        assert clip.frames % 4 == 1
    for size, asked in (("height", heights), ("width", widths), ("frames", frames)):
        low, best, high = (getattr(clips[end], size) for end in ("min", "opt", "max"))
        assert low <= best <= high
        assert low <= max(asked[0], step)
        assert high >= asked[2]
    moved = [clips[end] for end in clips if (clips[end].height, clips[end].width) != ends[end]]
    assert len([note for note in notes if "pixels" in note]) == len(moved)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"min": (480, 832)}, "needs min, opt and max"),
        ({"min": (720, 832), "opt": (480, 832), "max": (960, 832)}, "height of the profile is 720, 480, 960"),
        ({"frames": (1, 5)}, "frames of the profile is 1, 5"),
        ({"batch": (0, 1, 2)}, "batch of the profile is 0, 1, 2"),
        ({"text_tokens": (1.5, 2, 3)}, "text_tokens"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(profile, says):
    with pytest.raises(WanlabError, match=says):
        PixelProfile(**profile)


def test_a_default_profile_ends_where_position_embeddings_end():
    spec = dataclasses.replace(models.get("wan2.2-i2v-a14b"), max_positions=80)
    clips, _ = clip_range(spec, PixelProfile())
    assert (clips["max"].height, clips["max"].width) == (1088, 1280)


def test_a_default_profile_has_the_text_length_of_the_export(graph):
    source = read_source(graph)
    clip = {"batch": 2, "height": 720, "width": 1280, "frames": 81, "text_tokens": 77}
    source = dataclasses.replace(
        source,
        inputs={"encoder_hidden_states": ("float32", ("batch", "text_tokens", 32))},
        metadata=source.metadata | {"shape": json.dumps(clip)},
    )
    assert network_shapes(source, None).inputs["encoder_hidden_states"] == (
        (1, 77, 32),
        (1, 77, 32),
        (2, 77, 32),
    )


def test_a_fixed_axis_is_refused_by_its_name_and_left_alone_without_a_wish(tmp_path):
    fixed = read_source(patch_graph(tmp_path / "fixed.onnx", free=False))
    shapes = network_shapes(fixed, None)
    assert not shapes.free
    assert shapes.inputs["hidden_states"] == ((1, 36, 21, 90, 160),) * 3
    with pytest.raises(
        WanlabError, match=r"axis latent_height of hidden_states is fixed at 90 .* asks for 60"
    ):
        network_shapes(fixed, ARTICLE)
    with pytest.raises(WanlabError, match="axis batch of hidden_states is fixed at 1"):
        network_shapes(fixed, PixelProfile(batch=(1, 1, 4)))
    same = PixelProfile(min=(720, 1280), opt=(720, 1280), max=(720, 1280), batch=(1, 1, 1))
    assert network_shapes(fixed, same).inputs == shapes.inputs


def test_sizes_that_a_graph_was_not_traced_for_are_refused(graph):
    source = dataclasses.replace(read_source(graph), traced={"latent_frames": (13, 256)})
    with pytest.raises(WanlabError, match=r"latent_frames of hidden_states is 11 .* traced for 13 to 256"):
        network_shapes(source, dataclasses.replace(ARTICLE, frames=(41, 81, 81)))
    # Frames that nobody stated are those that it was traced for.
    shapes = network_shapes(source, ARTICLE).inputs["hidden_states"]
    assert [shape[2] for shape in shapes] == [13, 21, 21]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("batch = 1 to 64", (1, 64)),
        ("2*token_rows, token_rows = 2 to 1024", (4, 2048)),
        ("4*later_latents + 1, later_latents = 1 to 256", (5, 1025)),
        ("whatever torch says", None),
    ],
)
def test_ranges_of_a_report(text, found):
    assert traced_range(text) == found


def test_every_axis_that_a_component_leaves_free_is_known_here():
    model = models.load("wan-nano", device="cpu")
    from wanlab.export.components import component_spec, components_of

    for component in components_of(model):
        for name, axes in component_spec(model, component).inputs.items():
            assert axes.items() <= AXES[name].items(), (component, name)


def test_a_graph_of_nobody_needs_whole_shapes(tmp_path):
    path = patch_graph(tmp_path / "foreign.onnx", model=None)
    with pytest.raises(WanlabError, match="does not name its model"):
        build_tensorrt(path)
    with pytest.raises(WanlabError, match="has no shapes for hidden_states"):
        build_tensorrt(path, profile={"x": ((1,), (1,), (1,))})
    with pytest.raises(WanlabError, match=r"takes \[batch, 36, latent_frames"):
        build_tensorrt(path, profile={"hidden_states": ((1, 16, 1, 4, 4),) * 3})
    with pytest.raises(WanlabError, match="do not grow"):
        build_tensorrt(
            path, profile={"hidden_states": ((1, 36, 2, 8, 8), (1, 36, 1, 8, 8), (1, 36, 2, 8, 8))}
        )
    shapes = ((1, 36, 1, 4, 4), (1, 36, 1, 4, 8), (1, 36, 2, 8, 8))
    made = build_tensorrt(path, profile={"hidden_states": shapes}, level=0, progress=False)
    assert made.shapes == {"hidden_states": shapes}


# What is built, and what is kept


def test_an_engine_comes_with_all_that_is_known_of_it(built):
    assert built.kind == "tensorrt-rtx"
    assert built.compute_capabilities == TARGETS
    assert built.gpu == ""
    assert (built.model, built.component, built.numbers) == ("wan2.2-i2v-a14b", "expert_high", "float32")
    assert built.inputs["hidden_states"][1] == (
        "batch",
        36,
        "latent_frames",
        "latent_height",
        "latent_width",
    )
    assert built.time_ms > 0
    assert built.size_bytes > 1000
    assert len(built.notes) == 2
    assert BuildInfo.read(built.path) == replace(built, cached=False)
    assert not [severity for severity, _ in built.log if severity in ("VERBOSE", "ERROR")]
    assert engines.builds_frame([built])["layers"][0] >= 1


def test_layers_are_known_without_a_gpu_and_by_wanlabs_names(built):
    layers = json.loads(layers_path(built.path).read_text())
    names = " ".join(layer.get("Metadata", "") + layer["Name"] for layer in layers["Layers"])
    assert "patch_embedding/node_conv3d" in names
    assert "blocks.7.attn1.to_q/node_x" in names
    assert layers["Source"] == "builder log"
    video = next(tensor for tensor in layers["I/O Tensors"] if tensor["Name"] == "hidden_states")
    assert video["ProfileInfo"][0]["MaxShape"] == [2, 36, 21, 136, 240]
    assert sum(built.datatypes.values()) <= sum(built.layers.values())


def test_the_same_again_is_kept_and_anything_else_is_built(graph, tmp_path):
    how = {"profile": ARTICLE, "level": 0, "progress": False}
    first = build_tensorrt(graph, **how)
    assert not first.cached
    again = build_tensorrt(graph, **how)
    assert again == replace(first, cached=True)
    changed = [
        how | {"level": 1},
        how | {"workspace_gib": 1.5},
        how | {"tf32": False},
        how | {"compute_capabilities": ["8.6"]},
        how | {"profile": PixelProfile()},
        how | {"reuse": False},
    ]
    for other in changed:
        assert not build_tensorrt(graph, **other).cached
        build_tensorrt(graph, **how)
    engine = tmp_path / "expert_high.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    assert not build_tensorrt(graph, **how).cached
    patch_graph(graph, scale=3.0)
    assert not build_tensorrt(graph, **how).cached
    assert not list(tmp_path.glob(".*"))


def test_weights_outside_the_graph_are_found_and_hashed(tmp_path):
    inline = patch_graph(tmp_path / "inline.onnx")
    model = onnx.load(inline)
    outside = tmp_path / "outside.onnx"
    onnx.save(model, outside, save_as_external_data=True, location="w.weights", size_threshold=100)
    assert read_source(outside).graph_sha256 != read_source(inline).graph_sha256
    how = {"profile": ARTICLE, "level": 0, "progress": False}
    first = build_tensorrt(outside, **how)
    assert first.weights_bytes == build_tensorrt(inline, **how).weights_bytes
    weights = tmp_path / "w.weights"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    assert not build_tensorrt(outside, **how).cached


# What is refused


def test_the_parser_is_quoted_with_the_layers_own_name(tmp_path):
    path = patch_graph(tmp_path / "odd.onnx", operator="Det")
    with pytest.raises(WanlabError) as refused:
        build_tensorrt(path, profile=ARTICLE, progress=False)
    text = str(refused.value)
    assert "odd.onnx: blocks.7.attn1.to_q/node_x (Det):" in text
    assert "\n" not in text
    assert not list(tmp_path.glob("*.engine*"))


def test_attention_without_a_kernel_of_its_own_is_built_in_pieces(tmp_path, monkeypatch):
    path = attention_graph(tmp_path / "attention.onnx")
    how = {"compute_capabilities": ["8.9"], "level": 0, "progress": False}
    made = build_tensorrt(path, **how)
    assert made.layers["gemm"] == 2  # QK and PV
    assert "blocks.3.attn1/node_attention" in layers_path(made.path).read_text()
    # A TensorRT that cannot take it apart names no layer.
    monkeypatch.setattr(network, "allow_decomposition", lambda *_: None)
    with pytest.raises(WanlabError) as refused:
        build_tensorrt(path, **how, reuse=False)
    assert str(refused.value).endswith(
        "for compute capability 8.9: blocks.3.attn1/node_attention (Attention): Attention operation was not supported"
        " by a dedicated kernel; export with opset=20, which expresses it in plain operators"
    )


def test_turing_refuses_a_convolution_by_its_name(graph, tmp_path):
    frame = buildable(graph, ["7.5", "8.6"], profile=ARTICLE, progress=False).set_index("capability")
    assert frame["built"].tolist() == [False, True]
    assert frame.loc["7.5", "node"] == "patch_embedding/node_conv3d"
    assert frame.loc["7.5", "operator"] == "Conv"
    assert "FP32 3D convolution is not supported" in frame.loc["7.5", "reason"]
    assert frame.loc["8.6", "size_bytes"] > 1000
    with pytest.raises(
        WanlabError, match=r"compute capability 7.5: patch_embedding/node_conv3d \(Conv\): Cannot"
    ):
        build_tensorrt(graph, profile=ARTICLE, compute_capabilities=["7.5"], progress=False)
    assert not list(tmp_path.glob("*.engine*"))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"compute_capabilities": ["9.0"]}, "no compute capability '9.0'.* it knows 7.5, 8.0, 8.6"),
        ({"compute_capabilities": []}, "no compute capability to build for"),
        ({"level": 6}, "level is 6"),
        ({"workspace_gib": 0}, "workspace_gib is 0"),
        ({"timing_cache": "x.cache"}, "does not time kernels at the build"),
        ({"engine_path": "x.bin"}, "does not end in .engine"),
        ({"kind": "tensorrt_rtx"}, "did you mean 'tensorrt-rtx'"),
    ],
)
def test_settings_that_make_no_sense(graph, wish, says):
    with pytest.raises(WanlabError, match=says):
        build_tensorrt(graph, **wish)


def test_no_graph(tmp_path):
    with pytest.raises(WanlabError, match="no ONNX file"):
        build_tensorrt(tmp_path / "no.onnx")
    (tmp_path / "no.onnx").write_text("text")
    with pytest.raises(WanlabError, match="is no ONNX file"):
        build_tensorrt(tmp_path / "no.onnx")


def test_several_graphs_are_built_for_the_gpus_that_take_them(tmp_path, built):
    graphs = [patch_graph(tmp_path / f"{name}.onnx", scale=scale) for name, scale in (("a", 2.0), ("b", 3.0))]
    how = {"profile": ARTICLE, "level": 0, "progress": False}
    builds = engines.build_engines(graphs, compute_capabilities=["7.5", "8.6", "12.0"], **how)
    assert [info.compute_capabilities for info in builds.built] == [("8.6", "12.0")] * 2
    assert builds.refused["capability"].tolist() == ["7.5", "7.5"]
    assert set(builds.refused["node"]) == {"patch_embedding/node_conv3d"}
    shown = builds.refusals()
    assert shown["layer"].tolist() == ["patch_embedding (Conv)"]
    assert shown["reason"].tolist() == [
        "Cannot compile for Turing (SM75): FP32 3D convolution is not supported"
    ]
    assert len(builds.notes) == 2
    assert builds.bindings()["max"].tolist() == ["2x36x21x136x240"] * 2
    assert builds.warnings().columns.tolist() == ["warning", "engines"]
    again = engines.build_engines(graphs, compute_capabilities=["7.5", "8.6", "12.0"], **how)
    assert again.frame()["cached"].all()
    none = engines.build_engines(graphs[:1], compute_capabilities=["7.5"], **how)
    assert none.built == ()
    assert none.frame().columns.tolist() == list(built.row())
    assert plots.build_bars(none.frame()).data
    figure = plots.build_bars(builds.frame())
    assert list(figure.data[0].x) == pytest.approx((builds.frame()["build_ms"] / 1e3).tolist())
    assert list(figure.data[1].x) == pytest.approx(builds.frame()["size_mib"].tolist())


def test_a_graph_of_one_clip_is_built_for_it_beside_graphs_of_many_sizes(tmp_path):
    graphs = [patch_graph(tmp_path / "a.onnx"), patch_graph(tmp_path / "b.onnx", free=False)]
    how = {"profile": ARTICLE, "level": 0, "progress": False}
    builds = engines.build_engines(graphs, compute_capabilities=["8.6"], **how)
    free, fixed = (info.shapes["hidden_states"] for info in builds.built)
    assert free[0] != free[2]
    assert fixed == ((1, 36, 21, 90, 160),) * 3


def test_an_axis_that_only_some_families_have_is_known_by_its_name(graph):
    inputs = {"encoder_attention_mask": ("float32", ("batch", 128))}
    shapes = network_shapes(dataclasses.replace(read_source(graph), inputs=inputs), None)
    assert shapes.inputs["encoder_attention_mask"] == ((1, 128), (1, 128), (2, 128))


def test_trying_engines_without_a_gpu_says_why_not(built):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (row,) = engines.try_engines(None, [built]).to_dict(orient="records")
    assert row["executed"] is False
    assert row["reason"] == "no GPU is seen here; it runs on compute capability 8.6, 8.9, 12.0"
    assert str(built.clip()) == "1x81x720x1280, 512 text tokens"


def test_sizes_as_text():
    assert PixelProfile.of("480x854", "720x1280", "1080x1920") == ARTICLE
    assert PixelProfile.of() == PixelProfile()
    with pytest.raises(WanlabError, match="'480p' is no size"):
        PixelProfile.of("480p", "720x1280", "1080x1920")
    with pytest.raises(WanlabError, match="three sizes, min, opt and max; 1 were given"):
        PixelProfile.of("720x1280")


FITS = {"kind": "tensorrt-rtx", "capability": "8.9", "gpu": "NVIDIA L40S"}


def test_a_stale_or_foreign_engine_is_refused_with_the_reason(graph, tmp_path):
    made = build_tensorrt(graph, profile=ARTICLE, level=0, progress=False)
    fits = FITS | {"version": made.version}
    made.check(**fits)
    with pytest.raises(
        WanlabError, match=r"built for compute capability 8.6, 8.9, 12.0, NVIDIA H200 has 9.0"
    ) as no:
        made.check(**fits | {"capability": "9.0", "gpu": "NVIDIA H200"})
    assert "build_tensorrt('expert_high.onnx', 'expert_high.engine'" in str(no.value)
    with pytest.raises(WanlabError, match=r"built by tensorrt-rtx .*, here is tensorrt-rtx 1.5.0"):
        made.check(**fits | {"version": "1.5.0"})
    with pytest.raises(WanlabError, match="here is tensorrt 11"):
        made.check(**fits | {"kind": "tensorrt", "version": "11.4.0.106"})
    kept = BuildInfo.file(made.path)
    text = kept.read_text()
    kept.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(WanlabError, match="of another wanlab"):
        BuildInfo.read(made.path)
    kept.write_text(text)
    patch_graph(graph, scale=5.0)
    with pytest.raises(WanlabError, match=r"expert_high.onnx was changed after expert_high.engine was built"):
        made.check(**fits)
    graph.unlink()  # an engine may travel without its graph
    made.check(**fits)
    engine = tmp_path / "expert_high.engine"
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(WanlabError, match="is not the file that its build information was written for"):
        made.check(**fits)


def test_an_engine_without_build_information_is_refused(built, tmp_path):
    foreign = tmp_path / "foreign.engine"
    foreign.write_bytes(b"ptrt")
    with pytest.raises(
        WanlabError, match=r"no build information foreign.engine.json .* wanlab.engines.build_tensorrt"
    ):
        BuildInfo.read(foreign)
    for text in ("{", "[]", '{"inputs": {}}'):
        BuildInfo.file(foreign).write_text(text)
        with pytest.raises(WanlabError, match=r"cannot be read .*; build the engine again"):
            BuildInfo.read(foreign)
    with pytest.raises(WanlabError, match="no engine at"):
        engines.TensorRTEngine(tmp_path / "none.engine")


def test_opening_without_a_gpu_says_so(built):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(WanlabError, match=r"compute capability 8.6, 8.9, 12.0 and PyTorch sees no GPU"):
        engines.open_engine(built.path)
    from pathlib import Path

    with pytest.raises(WanlabError, match=r"TensorRT for RTX .* cannot (open|run) .*(CUDA|GPU)"):
        deserialize(runtimes.open_runtime("tensorrt-rtx"), Path(built.path))


# Which TensorRT


def test_type_stubs_are_no_tensorrt(tmp_path, monkeypatch):
    stub = tmp_path / "stubbed_package"
    stub.mkdir()
    (stub / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not runtimes._has_code("stubbed_package")
    (stub / "__init__.py").write_text("")
    import importlib

    importlib.invalidate_caches()
    assert runtimes._has_code("stubbed_package")


def test_the_doctor_knows_it():
    from wanlab.cli.doctor import _engines

    rows = {row.what: row for row in _engines()}
    assert rows["TensorRT for RTX"].state == "ok"
    assert rows["TensorRT for RTX"].found.startswith(runtimes.open_runtime("tensorrt-rtx").version)
    assert ("TensorRT" in rows) == runtimes.installed("tensorrt")


def test_one_runtime_for_the_whole_process():
    runtime = runtimes.open_runtime("tensorrt-rtx")
    assert runtime is runtimes.open_runtime("tensorrt-rtx")
    if not runtimes.installed("tensorrt"):
        assert runtime is runtimes.open_runtime()
    assert runtime.builds_ahead
    assert runtime.name == f"TensorRT for RTX {runtime.version}"
    if not runtimes.installed("tensorrt"):
        with pytest.raises(
            WanlabError, match=r'TensorRT is not installed; add it with: pip install "wanlab\[gpu\]"'
        ):
            runtimes.open_runtime("tensorrt")


def test_it_loads_in_a_process_that_imported_nothing_else():
    code = (
        "from wanlab.engines.tensorrt.runtime import open_runtime; print(open_runtime('tensorrt-rtx').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("TensorRT for RTX"), done.stderr


def test_what_the_execution_path_calls_is_there():
    """The engine cannot run here, but every call it makes is one that this TensorRT has."""
    module = runtimes.open_runtime("tensorrt-rtx").module
    calls = {
        "Runtime": "deserialize_cuda_engine get_engine_validity",
        "ICudaEngine": "create_execution_context create_runtime_config create_engine_inspector num_io_tensors"
        " get_tensor_name get_tensor_shape get_tensor_mode get_tensor_dtype",
        "IExecutionContext": "set_input_shape infer_shapes get_tensor_shape set_tensor_address execute_async_v3"
        " is_stream_capturable",
        "IRuntimeConfig": "create_runtime_cache set_runtime_cache get_runtime_cache cuda_graph_strategy"
        " dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeCache": "serialize deserialize",
        "EngineInspector": "get_engine_information execution_context",
        "CudaGraphStrategy": "WHOLE_GRAPH_CAPTURE DISABLED",
        "DynamicShapesKernelSpecializationStrategy": "LAZY EAGER NONE",
        "EngineValidity": "INVALID",
    }
    missing = [
        f"{k}.{n}" for k, names in calls.items() for n in names.split() if not hasattr(getattr(module, k), n)
    ]
    assert not missing
    from wanlab.engines.tensorrt.engine import DTYPES

    assert set(DTYPES) <= set(module.DataType.__members__)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:347: check_turing] Cannot compile operation"
            " 'a/b' for Turing (SM75): FP32 3D convolution is not supported. In compileGraph at /_src/o/c.cpp:2012)",
            "Cannot compile operation 'a/b' for Turing (SM75): FP32 3D convolution is not supported",
        ),
        ("nothing special", "nothing special"),
        ("", ""),
    ],
)
def test_messages_lose_the_places_of_tensorrts_own_sources(text, plain):
    assert runtimes.plain(text) == plain


# Layer information


words = st.text("abcXYZ09_./^+-", min_size=1, max_size=12)
tensors = st.fixed_dictionaries(
    {
        "Name": words,
        "Dimensions": st.lists(st.integers(-1, 512), max_size=5),
        "Datatype": words,
        "Format": words,
    }
)


def line_of(value, top=True):
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {line_of(item, False)}" for key, item in value.items())
        return inner if top else f"{{ {inner} }}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"[ {', '.join(line_of(item, False) for item in value)}]"
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


@given(
    st.fixed_dictionaries(
        {
            "Name": words,
            "LayerType": words,
            "Inputs": st.lists(tensors, max_size=3),
            "Outputs": st.lists(tensors, max_size=2),
            "TacticName": words,
            "StreamId": st.integers(0, 9),
            "Metadata": st.lists(words.map("[ONNX Layer: {}]".format)).map("".join),
        }
    )
)
def test_a_layers_line_is_read_back(layer):
    ordered = {key: layer[key] for key in sorted(layer, key="Metadata".__eq__)}  # which comes last
    assert parse_line(line_of(ordered)) == layer


def test_a_log_without_layers_tells_none():
    assert layers_from_log([("INFO", "Layers: many"), ("VERBOSE", "Name: x")]) is None
