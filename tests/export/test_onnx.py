"""Every component as ONNX: the same function at every size, in plain operators, kept only while true."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import onnx
import pytest
import torch
from support import convert_tiny as tiny

from wanlab import engines, export, models
from wanlab.core.errors import WanlabError
from wanlab.engines.parity import differences
from wanlab.export import (
    components,
    graph,
)
from wanlab.export import friendly as rotary
from wanlab.export.export import ExportReport

pytestmark = pytest.mark.slow

COMPONENTS = ("text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder")
SIZE = dict(height=64, width=96, frames=9)


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline().save_pretrained(folder)
    return models.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def reports(model, folder):
    made = export.export_all(model, folder, progress=False, **SIZE)
    return {report.component: report for report in made}


@pytest.fixture(scope="module")
def opened(reports, folder):
    return engines.load_engines(folder, provider="cpu")


def image():
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def generate(model, **changes):
    return model.generate(
        image(), "the camera pans left", steps=3, guidance_scale=2.0, **SIZE | changes
    ).video


def psnr(a, b) -> float:
    return 10 * np.log10(1 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-30))


def test_every_axis_that_should_vary_does(reports):
    assert tuple(reports) == COMPONENTS
    for report in reports.values():
        assert not report.fixed_axes, report
        assert not report.notes, report.notes
    latents = {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"}
    assert reports["expert_low"].dynamic_axes["hidden_states"] == latents
    assert reports["vae_encoder"].dynamic_axes["video"] == {0: "batch", 2: "frames", 3: "height", 4: "width"}
    assert "4*" in reports["vae_encoder"].ranges["frames"]


def test_graphs_are_plain_and_small(reports):
    for report in reports.values():
        written = onnx.load(report.path)
        onnx.checker.check_model(report.path, full_check=True)
        assert graph.lint(written) == []
        assert 0 < report.nodes_after < report.nodes_before
        assert report.nodes_after == sum(report.operators.values()) == sum(1 for _ in graph.nodes(written))
        assert written.opset_import[0].version == 20
        facts = {entry.key: entry.value for entry in written.metadata_props}
        assert facts.keys() == {"model", "component", "wanlab_version", "shape"}
        assert facts["component"] == report.component
        assert b"site-packages" not in written.SerializeToString()


def test_the_lint_finds_float64_and_complex_numbers_wherever_they_stand():
    from onnx import TensorProto, helper

    made = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node(
            "Constant", [], ["turn"], value=helper.make_tensor("", TensorProto.COMPLEX64, [1], [1j])
        ),
    ]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("wide", TensorProto.DOUBLE, [1]),
        helper.make_tensor_value_info("turn", TensorProto.COMPLEX128, [1]),
    ]
    model = helper.make_model(helper.make_graph(made, "wide", values[:1], values[1:]))
    assert graph.lint(model) == ["2 float64 tensors", "2 complex tensors"]
    model.graph.ClearField("node")
    del model.graph.output[:]
    assert graph.lint(model) == []


def test_nodes_and_weights_keep_their_module_path(model, reports):
    written = onnx.load(reports["expert_high"].path)
    names = [node.name for node in written.graph.node]
    assert any(name.startswith("blocks.0.attn1.to_out.0/") for name in names)
    assert any(name.startswith("blocks.0.ffn.net.0.proj/") for name in names)
    weights = {tensor.name for tensor in written.graph.initializer}
    assert len(weights & set(model.pipeline.transformer.state_dict())) > 20


@pytest.mark.parametrize("component", COMPONENTS)
def test_parity_at_several_sizes(model, opened, component):
    shapes = [
        export.ClipShape(2, 64, 96, 9, 24),
        export.ClipShape(1, 64, 96, 9, 24),
        export.ClipShape(3, 32, 48, 17, 7),
        export.ClipShape(1, 48, 32, 5, 16),
    ]
    table = engines.parity(model, component, opened[component], shapes=shapes)
    assert len(table) == 4
    assert (table["relative_l2"] < 1e-4).all(), table
    assert (table["cosine"] > 0.999999).all(), table
    assert (table["psnr_db"] > 80).all(), table
    # the export's clip, one on its side, and a smaller one
    assert len(engines.parity(model, component, opened[component])) == 3


def test_the_experts_share_a_trace_but_not_their_weights(model, reports, opened):
    assert reports["expert_low"].trace_reused  # and a first trace is none: the next test
    plan = components.component_spec(model, "expert_low")
    inputs = plan.inputs_for(export.ClipShape(1, 32, 32, 5, 8), torch.Generator().manual_seed(0))
    feeds = dict(zip(plan.inputs, inputs, strict=True))
    high, low = (opened[name].run(feeds)["velocity"] for name in ("expert_high", "expert_low"))
    assert differences(high, low)["relative_l2"] > 0.1


def test_a_kept_trace_gives_the_same_graph_and_no_folder_is_needed(model, tmp_path, monkeypatch):
    def exported(name: str) -> tuple[bool, bytes]:
        path = tmp_path / name / "text_encoder.onnx"
        report = export.export(model, "text_encoder", path, opset=19, dynamic=False)
        return report.trace_reused, path.read_bytes()

    cache = tmp_path / "cache"
    monkeypatch.setenv("WANLAB_CACHE", str(cache))
    reused, first = exported("a")
    assert not reused
    assert exported("b") == (True, first)
    (kept,) = cache.glob("traces/*.onnx")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert exported("c") == (False, first)
    assert exported("d") == (True, first)
    other = export.export(model, "text_encoder", tmp_path / "o" / "a.onnx", opset=18, dynamic=False)
    assert not other.trace_reused
    (second,) = {*cache.glob("traces/*.onnx")} - {kept}
    kept.write_bytes(second.read_bytes())  # a trace under another's name
    assert exported("g") == (False, first)
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "file"))  # no folder can be made there
    assert exported("e") == (False, first)
    assert exported("f") == (True, first)


def test_a_graph_with_free_sizes_is_traced_once_for_every_clip(model, tmp_path, monkeypatch):
    """Also for a clip of fewer latent frames than tracing takes."""
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    written = []
    for frames, reused in ((5, False), (9, True)):
        path = tmp_path / str(frames) / "vae_decoder.onnx"
        assert (
            export.export(model, "vae_decoder", path, height=32, width=48, frames=frames).trace_reused
            == reused
        )
        assert engines.parity(model, "vae_decoder", path)["relative_l2"].max() < 1e-4
        graph = onnx.load(path)
        del graph.metadata_props[:]  # names the clip
        written.append(graph.SerializeToString(deterministic=True))
    assert written[0] == written[1]


def test_a_network_with_code_of_its_own_leaves_no_trace_behind(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    norm = model.pipeline.text_encoder.encoder.final_layer_norm
    doubled = types.MethodType(lambda self, hidden: 2 * type(self).forward(self, hidden), norm)
    monkeypatch.setattr(norm, "forward", doubled, raising=False)
    export.export(model, "text_encoder", tmp_path / "doubled.onnx", dynamic=False)
    assert engines.parity(model, "text_encoder", tmp_path / "doubled.onnx")["relative_l2"].max() < 1e-4
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()  # and in this process neither
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    export.export(model, "text_encoder", tmp_path / "plain.onnx", dynamic=False)
    assert engines.parity(model, "text_encoder", tmp_path / "plain.onnx")["relative_l2"].max() < 1e-4


def test_the_network_is_left_as_it_was(model, reports):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for network in (model.pipeline.transformer, model.pipeline.vae, model.pipeline.text_encoder):
        assert not [module for module in network.modules() if "forward" in vars(module)]
    processors = model.pipeline.transformer.attn_processors.values()
    assert all(type(processor) is WanAttnProcessor for processor in processors)
    assert model.pipeline.text_encoder.config._attn_implementation == "sdpa"


def test_rotary_embedding_is_exact():
    network = tiny.expert(2, num_layers=2)
    inputs = (torch.randn(1, 36, 3, 8, 6), torch.tensor([500.0]), torch.randn(1, 5, 96))
    with torch.no_grad():
        before = network(*inputs, return_dict=False)[0]
        with rotary.exportable_attention(network, fused=True):
            assert differences(before, network(*inputs, return_dict=False)[0])["relative_l2"] < 1e-6
        with rotary.exportable_attention(network, fused=False):
            assert differences(before, network(*inputs, return_dict=False)[0])["relative_l2"] < 1e-6
        assert torch.equal(before, network(*inputs, return_dict=False)[0])


def test_exports_are_reused_while_true_and_rebuilt_when_stale(model, reports, folder, tmp_path):
    path = tmp_path / "text.onnx"
    first = export.export(model, "text_encoder", path, dynamic=False)
    assert not first.cached
    kept = export.export(model, "text_encoder", path, dynamic=False)
    assert kept.cached
    assert kept.key == first.key == ExportReport.find(path).key
    assert kept.shape.batch == 1
    assert not export.export(model, "text_encoder", path, dynamic=False, opset=18).cached

    weight = model.pipeline.text_encoder.shared.weight
    before = weight.data.clone()
    weight.data[3] += 1
    try:
        changed = export.export(model, "text_encoder", path, dynamic=False, opset=18)
        assert not changed.cached
        assert engines.parity(model, "text_encoder", path)["relative_l2"].max() < 1e-4
    finally:
        weight.data.copy_(before)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert not export.export(model, "text_encoder", path, dynamic=False, opset=18).cached
    path.with_suffix(".json").write_text("{}")
    assert not export.export(model, "text_encoder", path, dynamic=False, opset=18).cached
    assert {report.cached for report in export.export_all(model, folder, progress=False, **SIZE)} == {True}


def test_external_data_and_fixed_sizes(model, tmp_path):
    path = tmp_path / "expert_low.onnx"
    settings = dict(dynamic=False, simplify=False) | SIZE
    report = export.export(model, "expert_low", path, external_data=True, **settings)
    assert report.external_data
    assert not report.simplified
    assert report.dynamic_axes == {}
    weights = tmp_path / report.weights_file
    assert weights.stat().st_size > path.stat().st_size / 2
    assert report.size_bytes == graph.file_bytes(path) > weights.stat().st_size * 0.9
    assert engines.parity(model, "expert_low", path)["relative_l2"].max() < 1e-4
    assert export.export(model, "expert_low", path, external_data=True, **settings).cached
    again = export.export(model, "expert_low", path, external_data=False, **settings)
    assert not weights.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expert_low.json", "expert_low.onnx"]
    assert (
        json.loads(path.with_suffix(".json").read_text())["size_bytes"]
        == again.size_bytes
        == path.stat().st_size
    )
    with pytest.raises(WanlabError, match=r"input 'hidden_states' .* is \[1, 36, 3, 4, 6\], the graph takes"):
        engines.parity(model, "expert_low", path, shapes=[export.ClipShape(1, 32, 48, 9, 24)])


def test_graphs_of_one_network_share_a_file_of_weights(model, tmp_path):
    settings = dict(external_data=True, stored_dtype="bfloat16", dtype="float32", dynamic=False) | SIZE
    first = export.export(model, "expert_low", tmp_path / "plain.onnx", **settings)
    second = export.export(model, "expert_low", tmp_path / "fused.onnx", opset=23, **settings)
    assert first.weights_file == second.weights_file
    assert first.weights_written_bytes > 0
    assert second.weights_written_bytes == 0
    third = export.export(model, "expert_low", tmp_path / "bf16.onnx", **settings | {"dtype": "bfloat16"})
    assert (third.weights_file, third.weights_written_bytes) == (first.weights_file, 0)
    assert (first.stored_dtype, first.dtype, third.dtype) == ("bfloat16", "float32", "bfloat16")
    # float32 arithmetic on bfloat16 weights: off by their rounding, and by no more
    rounding = engines.parity(model, "expert_low", first.path)["relative_l2"].max()
    assert 1e-4 < rounding < 2e-2
    # one graph less does not take the weights from the others
    export.export(model, "expert_low", tmp_path / "fused.onnx", external_data=False, **SIZE)
    assert (tmp_path / first.weights_file).exists()
    assert engines.parity(model, "expert_low", first.path)["relative_l2"].max() == rounding


def test_a_cut_off_file_of_weights_is_written_again(model, tmp_path):
    settings = dict(external_data=True, dynamic=False) | SIZE
    first = export.export(model, "expert_low", tmp_path / "a.onnx", **settings)
    with open(tmp_path / first.weights_file, "r+b") as file:
        file.truncate(1000)
    again = export.export(model, "expert_low", tmp_path / "a.onnx", **settings)
    assert not again.cached
    assert again.weights_written_bytes == first.weights_written_bytes
    assert engines.parity(model, "expert_low", again.path)["relative_l2"].max() < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_graph_in_another_dtype_is_that_of_the_network_loaded_in_it(model, tmp_path, dtype):
    report = export.export(model, "expert_low", tmp_path / "a.onnx", dtype=dtype, dynamic=False, **SIZE)
    written = onnx.load(report.path)
    kinds = {value.name: value.type.tensor_type.elem_type for value in written.graph.input}
    wanted = getattr(onnx.TensorProto, dtype.upper())
    assert kinds["hidden_states"] == kinds["encoder_hidden_states"] == wanted
    held = {tensor.name: tensor.data_type for tensor in written.graph.initializer}
    assert held["blocks.0.attn1.to_q.weight.T"] == wanted
    assert held["blocks.0.scale_shift_table"] == onnx.TensorProto.FLOAT  # diffusers keeps it so
    if dtype == "float16":  # the CPU has no kernels for bfloat16
        assert engines.parity(model, "expert_low", report.path)["relative_l2"].max() < 2e-2


def test_opset_23_says_attention_and_rotary_embedding_as_operators(model, tmp_path):
    plain, fused, original = (
        export.export(model, "expert_low", tmp_path / f"{name}.onnx", **how, **SIZE)
        for name, how in (
            ("plain", {}),
            ("fused", {"opset": 23}),
            ("original", {"forms": "original"}),
        )
    )
    assert {"Attention", "RotaryEmbedding", "RMSNormalization"} <= set(fused.operators)
    assert not {"Softmax", "ScatterND", "ReduceMean"} & set(fused.operators)
    assert original.operators["ScatterND"] == 4  # one block: two for queries, two for keys
    assert original.notes == (
        "4 ScatterND nodes",
    )  # as they are, experts hold no float64 and no complex numbers
    assert "ScatterND" not in plain.operators
    assert fused.nodes_after < plain.nodes_after < original.nodes_after
    for report in (plain, fused, original):
        assert engines.parity(model, "expert_low", report.path)["relative_l2"].max() < 1e-5


def test_a_model_loaded_with_one_expert_keeps_its_name():
    model = models.load("wan-nano", components=["expert_low"])
    assert components.components_of(model) == ("expert_low",)


def test_the_vae_of_wan21(tmp_path):
    built = tiny.pipeline()
    built.register_modules(vae=tiny.vae(**tiny.PLAIN_VAE))
    model = tiny.bare(built)
    report = export.export(model, "vae_decoder", tmp_path / "vae_decoder.onnx")
    assert not report.fixed_axes
    assert engines.parity(model, "vae_decoder", report.path)["relative_l2"].max() < 1e-4


def test_one_expert_with_a_timestep_per_token(tmp_path):
    built = tiny.pipeline()
    built.register_modules(transformer_2=None)
    built.register_to_config(expand_timesteps=True, boundary_ratio=None)
    model = tiny.bare(built)
    assert components.components_of(model) == ("text_encoder", "vae_encoder", "expert", "vae_decoder")
    report = export.export(model, "expert", tmp_path / "expert.onnx")
    assert report.dynamic_axes["timestep"] == {0: "batch", 1: "tokens"}
    assert engines.parity(model, "expert", report.path)["relative_l2"].max() < 1e-4


def test_the_pipeline_on_engines_makes_the_same_video(model, opened):
    eager = generate(model)
    fast = engines.use(model, opened)
    assert set(fast.engines.values()) == {"onnxruntime-cpu"}
    assert psnr(eager, generate(fast)) > 50
    other = dict(height=32, width=64, frames=5)
    assert psnr(generate(model, **other), generate(fast, **other)) > 50
    # the original is what it was, also after the copy ran
    assert set(model.engines.values()) == {"eager"}
    assert np.array_equal(eager, generate(model))
    assert not isinstance(fast.pipeline.vae, type(model.pipeline.vae))
    assert fast.pipeline.vae.eager is None  # nothing of the original is held on to


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_can_be_swapped_alone(model, opened, component):
    mixed = engines.use(model, {component: opened[component]})
    assert [name for name, engine in mixed.engines.items() if engine != "eager"] == [component]
    calls = []
    engine = opened[component]
    run = engine.run
    engine.run = lambda feeds: calls.append(feeds) or run(feeds)
    try:
        assert psnr(generate(model), generate(mixed)) > 50
    finally:
        del engine.run
    assert calls


def test_engines_can_be_added_one_after_the_other(model, opened):
    mixed = engines.use(model, {"vae_encoder": opened["vae_encoder"]})
    mixed = engines.use(mixed, {"vae_decoder": opened["vae_decoder"]})
    assert mixed.pipeline.vae.encoder is opened["vae_encoder"]
    assert mixed.pipeline.vae.eager is None
    assert psnr(generate(model), generate(mixed)) > 50


def test_what_the_engine_says_of_itself(opened):
    engine = opened["vae_decoder"]
    assert engine.providers_used == ("CPUExecutionProvider",)
    assert engine.threads == torch.get_num_threads()
    assert engine.load_ms > 0
    assert engine.size_bytes == engine.path.stat().st_size
    assert engine.metadata["component"] == "vae_decoder"
    made = engine.run(
        {"latents": np.zeros((1, 16, 2, 4, 4), np.float64)}
    )  # cast, and numpy in means numpy out
    assert isinstance(made["video"], np.ndarray)
    assert made["video"].shape == (1, 3, 5, 32, 32)


def test_bound_tensors_give_the_same_outputs(opened):
    """The path that CUDA takes, on the CPU: addresses in, dlpack out, alive after the binding is gone."""
    engine = opened["expert_high"]
    generator = torch.Generator().manual_seed(0)
    feeds = {
        "hidden_states": torch.randn(1, 36, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 96, generator=generator),
    }
    first = engine._run_bound(feeds)["velocity"]
    assert (
        engine._run_bound({name: value * 2 for name, value in feeds.items()})["velocity"].shape == first.shape
    )
    assert torch.equal(first, engine.run(feeds)["velocity"])


def test_mistakes_are_named(model, opened, folder, tmp_path):
    latents = torch.zeros(1, 16, 2, 4, 4)
    cases = [
        (
            lambda: opened["vae_decoder"].run({"latent": latents}),
            r"no input 'latent' \(did you mean 'latents'\?\)",
        ),
        (
            lambda: opened["text_encoder"].run({"input_ids": torch.zeros(1, 4)}),
            "misses input 'attention_mask'",
        ),
        (
            lambda: opened["vae_decoder"].run({"latents": latents[:, :8]}),
            r"is \[1, 8, 2, 4, 4\], the graph takes",
        ),
        (lambda: engines.OrtEngine(tmp_path / "none.onnx"), "no ONNX file at"),
        (lambda: engines.OrtEngine(opened["expert_low"].path, provider="cpux"), "did you mean 'cpu'"),
        (lambda: engines.OrtEngine(opened["expert_low"].path, threads=0), "threads is 0"),
        (lambda: engines.load_engines(tmp_path), "no converted component"),
        (lambda: engines.load_engines(folder, ["expert_hig"]), "did you mean 'expert_high'"),
        (lambda: engines.use(model, {"vae_decode": opened["vae_decoder"]}), "did you mean 'vae_decoder'"),
        (lambda: engines.use(model, {"expert_low": opened["expert_high"]}), "was exported from expert_high"),
        (lambda: export.export(model, "expert", tmp_path / "a.onnx"), "no component 'expert'"),
        (
            lambda: export.export(model, "expert_low", tmp_path / "a.onnx", opset=12),
            "opset is 12; give 17 to 24",
        ),
        (
            lambda: export.export(model, "expert_low", tmp_path / "a.onnx", dtype="bfloat16", opset=20),
            "opset 20 has no convolution in bfloat16",
        ),
        (
            lambda: export.export(model, "expert_low", tmp_path / "a.onnx", dtype="floaty16"),
            "did you mean 'float16'",
        ),
        (
            lambda: export.export(model, "expert_low", tmp_path / "a.onnx", forms="orginal"),
            "did you mean 'original'",
        ),
        (lambda: export.export(model, "expert_low", tmp_path / "a"), "does not end in .onnx"),
        (
            lambda: export.export(model, "vae_encoder", tmp_path / "a.onnx", frames=8),
            "8 frames are not legal",
        ),
        (
            lambda: export.export(model, "vae_encoder", tmp_path / "a.onnx", height=70),
            r"size 70x\d+ is not legal.*64x",
        ),
        (lambda: export.export_all(model, tmp_path, ["vae"]), "no component 'vae'"),
        (
            lambda: engines.parity(engines.use(model, opened), "expert_low", opened["expert_low"]),
            "before engines replaced",
        ),
    ]
    for mistake, message in cases:
        with pytest.raises(WanlabError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(WanlabError, match=r"cannot load broken\.onnx"):
        engines.OrtEngine(tmp_path / "broken.onnx")


def test_cuda_is_refused_where_there_is_none(opened, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.OrtEngine(opened["expert_low"].path).provider == "cpu"
    with pytest.raises(WanlabError, match=r"cuda|CUDA"):
        engines.OrtEngine(opened["expert_low"].path, provider="cuda")


def test_differences_of_known_tensors():
    a = torch.tensor([0.0, 1.0, 2.0, 2.0])
    found = differences(a, a + torch.tensor([0.0, 0.0, 0.0, 0.3]))
    assert found["max_abs"] == pytest.approx(0.3, rel=1e-5)
    assert found["mean_abs"] == pytest.approx(0.075, rel=1e-5)
    assert found["relative_l2"] == pytest.approx(0.1, rel=1e-5)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(4 / (0.09 / 4)), rel=1e-5)
    assert differences(a, a)["psnr_db"] == np.inf


def test_sizes_that_the_network_ties_down_are_named(tmp_path, monkeypatch):
    """With the height as a plain free size, tracing finds that it must be even and says so."""
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    make = components._expert

    def careless(*arguments):
        plan = make(*arguments)
        free = torch.export.Dim("latent_height", min=2, max=64)
        return dataclasses.replace(plan, dimensions=lambda: plan.dimensions() | {"latent_height": free})

    monkeypatch.setattr(components, "_expert", careless)
    report = export.export(tiny.bare(tiny.pipeline()), "expert_low", tmp_path / "a.onnx", simplify=False)
    assert len(report.notes) == 1
    assert "latent_height" in report.notes[0]
    assert report.dynamic_axes["hidden_states"][3] == "latent_height"  # still free, as tracing found a form


def test_bfloat16_graphs_have_no_operator_without_a_kernel(tmp_path):
    import onnx

    from wanlab.export.graph import WITHOUT_BFLOAT16

    model, narrow = tiny.bare(tiny.pipeline()), onnx.TensorProto.BFLOAT16
    for component, output in (
        ("vae_encoder", "moments"),
        ("vae_decoder", "video"),
        ("expert_high", "velocity"),
    ):
        report = export.export(
            model,
            component,
            tmp_path / f"{component}.onnx",
            dtype="bfloat16",
            dynamic=False,
            height=32,
            width=32,
            frames=5,
        )
        graph = onnx.shape_inference.infer_shapes(onnx.load(report.path)).graph
        values = (*graph.value_info, *graph.input, *graph.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        found = [node.name for node in graph.node if node.op_type in WITHOUT_BFLOAT16]
        assert not [
            node.name
            for node in graph.node
            if node.op_type in WITHOUT_BFLOAT16 and narrow in {kinds.get(value) for value in node.output}
        ]
        assert [value.name for value in graph.output] == [output]
        assert kinds[output] == narrow
        if component == "vae_encoder":
            assert any("avg_shortcut/node_pad" in name for name in found)  # it has one to widen


def test_widening_changes_no_value_that_is_only_moved():
    import ml_dtypes
    import onnx
    import onnx.parser
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    from wanlab.export.graph import widen_bfloat16

    text = """
    <ir_version: 9, opset_import: ["" : 20]>
    moved (bfloat16[1, 3] x) => (bfloat16[1, 5] padded, bfloat16[1, 5] doubled)
    <int64[4] pads = {0, 2, 0, 0}> {
        padded = Pad (x, pads)
        doubled = Add (padded, padded)
    }
    """
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = onnx_ir.from_proto(before)
    assert widen_bfloat16(model) == 1
    after = onnx_ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node] == ["Cast", "Pad", "Cast", "Add"]
    x = np.array([[1.1, -2.3, 3e30]], ml_dtypes.bfloat16)
    wanted = ReferenceEvaluator(before).run(None, {"x": x})
    made = ReferenceEvaluator(after).run(None, {"x": x})
    for one, other in zip(wanted, made, strict=True):
        assert one.shape == (1, 5)
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    assert widen_bfloat16(model) == 0
