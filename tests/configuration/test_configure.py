"""A model opened in a configuration: applied, and proven to be; the whole measurement is 41_configuration's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wanlab import configuration, models, precision
from wanlab.configuration.configure import _suited
from wanlab.core.errors import WanlabError
from wanlab.core.plugins import run_files
from wanlab.engines import registry

SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


def test_the_default_is_the_model_itself(model, tmp_path):
    used = configuration.configure(model, "eager", tmp_path, **SIZE)
    assert used.model is model
    assert (used.effect, used.plan, used.label) == ("baseline", "default", "eager")
    assert used.weight_bytes == sum(part.memory_bytes for part in model.load.parts)


def test_one_engine_for_all_leaves_out_what_cannot_be_converted():
    hunyuan = models.load("tiny-hunyuan-t2v", weights="random", device="cpu")
    chosen = configuration.load_configuration(engine="onnxruntime")
    suited, stays = _suited(chosen, hunyuan)
    assert suited.engines == dict.fromkeys(["vae_encoder", "expert", "vae_decoder"], "onnxruntime")
    assert [reason.partition(",")[0] for reason in stays] == [
        "text_encoder is a LlamaModel",
        "text_encoder_2 is a CLIPTextModel",
    ]
    assert (suited.engine, suited.label) == (chosen.engine, chosen.label)
    compiled = configuration.load_configuration(engine="compiled")
    assert _suited(compiled, hunyuan) == (compiled, [])


def test_a_plan_is_proven_and_holds_fewer_bytes(model, tmp_path):
    chosen = configuration.load_configuration(plan="ffn-int8")
    used = configuration.configure(model, chosen, tmp_path, **SIZE, progress=False)
    assert (used.effect, used.label) == ("applied", "eager ffn-int8")
    assert "layers of expert_high in int8" in used.proof
    assert "simulated on the CPU" in used.kernels
    before = sum(part.memory_bytes for part in model.load.parts)
    saved = used.frame["weight_before_bytes"].sum() - used.frame["weight_bytes"].sum()
    assert used.weight_bytes == pytest.approx(before - saved, rel=0.001)
    assert set(used.files["calibrations"]) == {
        "expert_high",
        "expert_low",
    }  # one scale per layer on every engine
    again = configuration.configure(model, chosen, tmp_path, **SIZE, progress=False)
    assert again.files == used.files
    assert len(list(tmp_path.glob("*/*/*/recording"))) == 1


def test_a_plan_is_calibrated_on_ones_own_images_and_prompts(model, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (80, 80), "teal").save(own / "sea.png")
    (own / "sea.txt").write_text("the camera pans right")
    chosen = configuration.load_configuration(plan="ffn-int8")
    options = SIZE | {"examples": own, "progress": False}
    used = configuration.configure(model, chosen, tmp_path / "files", **options)
    (folder,) = (tmp_path / "files").glob("*/*/*/recording")
    examples = precision.read_recording(folder).settings["examples"]
    assert [tuple(example) for example in examples] == [("sea", "the camera pans right", 0)]
    assert used.effect == "applied"


def test_what_changes_nothing_is_not_applied(model, tmp_path):
    used = configuration.configure(model, configuration.load_configuration(plan="all-fp32"), tmp_path, **SIZE)
    assert used.effect == "not applied"
    assert "changed nothing" in used.proof


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"examples": "no-such-folder"}, "no folder at no-such-folder"),
        ({"engine": "onnxruntim"}, "did you mean 'onnxruntime'"),
        ({"plan": "uniform-int9"}, "did you mean 'uniform-int8'"),
        ({"plan": "defalt"}, "did you mean 'default'"),
    ],
)
def test_unknown_names_are_told_before_anything_is_made(model, tmp_path, given, said):
    with pytest.raises(WanlabError, match=said):
        configuration.configure(model, configuration.check_configuration(**given), tmp_path)
    assert not list(tmp_path.iterdir())


TOY = Path(__file__).parents[1] / "support" / "toy_engine.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of converted networks, shared by the tests below."""
    return tmp_path_factory.mktemp("configured")


@pytest.fixture(scope="module")
def request_of_a_video():
    example = precision.nano_examples(1)[0]
    return {"image": np.asarray(example.image), "prompt": example.prompt, "seed": 3} | SIZE


def difference(model, used, video) -> float:
    """Largest difference of a pixel in [0, 1] between the videos of two models."""
    return float(np.abs(model.generate(**video).video - used.model.generate(**video).video).max())


@pytest.mark.slow
def test_every_component_runs_on_its_own_engine(model, folder, request_of_a_video):
    chosen = configuration.Configuration(
        name="mixed",
        engines={"expert_low": "onnxruntime", "vae_*": "streamed_vae"},
        settings={"onnxruntime": {"threads": 1}},
    )
    used = configuration.configure(model, chosen, folder, **SIZE, progress=False)
    assert used.model.engines == {
        "text_encoder": "eager",
        "vae_encoder": "onnxruntime-cpu-streamed",
        "expert_high": "eager",
        "expert_low": "onnxruntime-cpu",
        "vae_decoder": "onnxruntime-cpu-streamed",
    }
    assert (used.effect, used.label, used.engine) == ("applied", "mixed", "onnxruntime + streamed_vae")
    assert "1 of 5 networks run in ONNX Runtime. " in used.proof + " "
    assert "2 of 5 networks run in ONNX Runtime, VAE chunk by chunk." in used.proof
    assert set(used.paths) == {"vae_encoder", "expert_low", "vae_decoder"}
    assert all(path.is_file() for path in used.paths.values())
    assert difference(model, used, request_of_a_video) < 1e-3
    alone = configuration.measure_isolated(used, **request_of_a_video)
    assert all(alone[name] > 0 for name in ("peak_memory_gib", "load_ms", "first_video_ms"))
    exported = {path: path.stat().st_mtime_ns for path in used.paths.values()}
    again = configuration.configure(model, chosen, folder, **SIZE, progress=False)
    assert again.files == used.files
    assert {path: path.stat().st_mtime_ns for path in again.paths.values()} == exported


@pytest.mark.slow
def test_a_plan_is_in_the_graph_of_one_expert_and_in_pytorch_for_the_other(model, folder, request_of_a_video):
    plan = precision.load_plan("uniform-int8-weight")
    chosen = configuration.Configuration(name="halves", engines={"expert_low": "onnxruntime"}, plan=plan)
    used = configuration.configure(model, chosen, folder, **SIZE, progress=False)
    assert used.effect == "applied"
    assert "The graph of the low-noise expert follows plan uniform-int8-weight: 66 of 66 layers" in used.proof
    rows = [
        ("expert_high", "int8-weight"),
        ("expert_high", "as-loaded"),
        ("expert_low", "int8-weight"),
        ("expert_low", "as-loaded"),
    ]
    assert (
        list(zip(used.frame["component"], used.frame["format"], strict=True)) == rows
    )  # all but the patch embedding
    assert used.model.engines["expert_high"] == "eager, plan uniform-int8-weight"
    assert used.weight_bytes < 0.8 * sum(part.memory_bytes for part in model.load.parts)
    everywhere = configuration.configure(model, "onnxruntime-int8-weights", folder, **SIZE, progress=False)
    assert everywhere.effect == "applied"
    assert list(everywhere.frame["component"].unique()) == ["expert_high", "expert_low"]
    # The same weights: a file also holds its graph, and both halves of the VAE are one network in PyTorch.
    assert everywhere.weight_bytes == pytest.approx(used.weight_bytes, rel=0.02)
    assert difference(used.model, everywhere, request_of_a_video) < 0.02  # the same plan by other kernels


@pytest.mark.slow
def test_an_engine_of_ones_own_is_configured_and_measured(model, folder, request_of_a_video, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, str(TOY))  # for the process of its own
    run_files(str(TOY), registry.VARIABLE, "wanlab_engine")
    try:
        used = configuration.configure(
            model, configuration.Configuration(name="toy", engines={"expert*": "negated"}), folder, **SIZE
        )
        assert used.model.engines["expert_high"] == used.model.engines["expert_low"] == "negated"
        assert (used.effect, used.proof) == ("applied", "2 of 5 networks run in Negated twice.")
        assert used.weight_bytes == sum(part.memory_bytes for part in model.load.parts)
        assert difference(model, used, request_of_a_video) == 0
        assert configuration.measure_isolated(used, **request_of_a_video)["load_ms"] > 0
        assert configuration.load_configuration(engine="negated").engine_of("vae_decoder") == "negated"
    finally:
        del registry.ENGINES["negated"]


def test_what_cannot_run_here_is_one_line(model, tmp_path):
    with pytest.raises(WanlabError, match="TensorRT"):
        configuration.configure(model, configuration.load_configuration(engine="tensorrt"), tmp_path, **SIZE)
    assert not list(tmp_path.iterdir())
