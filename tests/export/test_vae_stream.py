"""The VAE chunk by chunk must be the VAE of diffusers, in PyTorch and in an engine, in the memory of one chunk."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support import convert_tiny as tiny

from wanlab import engines, export
from wanlab.core.errors import WanlabError
from wanlab.export import vae_streamed as vae_export
from wanlab.export.vae_streamed import decode_chunk, decode_in_chunks, encode_in_chunks, exportable

pytestmark = pytest.mark.slow

FORMS = {
    "residual": tiny.RESIDUAL_VAE,
    "wider decoder": tiny.RESIDUAL_VAE | dict(decoder_base_dim=12),
    "four levels": tiny.RESIDUAL_VAE | dict(dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]),
    "plain": tiny.PLAIN_VAE,
}
# Wan2.1's form with one resampler, which is quicker to trace.
SMALL_PLAIN = tiny.PLAIN_VAE | dict(dim_mult=[1, 2], temperal_downsample=[True], scale_factor_spatial=2)


def relative(a, b) -> float:
    return ((a - b).norm() / a.norm()).item()


def draw(*size, seed: int = 0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    residual = tiny.bare(tiny.pipeline())
    plain = tiny.bare(tiny.pipeline())
    plain.pipeline.vae = tiny.vae(**SMALL_PLAIN)
    plain.spec = replace(plain.spec, spatial_factor=2)
    return {"residual": residual, "plain": plain}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture(scope="module")
def reports(models, folder):
    return {
        kind: export.export_streamed(model, folder / kind, height=32, width=48)
        for kind, model in models.items()
    }


@pytest.fixture(scope="module")
def decoders(reports, folder):
    return {kind: engines.open_streamed_decoder(folder / kind, provider="cpu") for kind in reports}


@pytest.fixture(scope="module")
def encoder(models, folder):
    export.export_streamed(
        models["residual"], folder / "fixed", "vae_encoder", dynamic=False, height=32, width=48
    )
    return engines.open_streamed_encoder(folder / "fixed", provider="cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@torch.no_grad()
def test_chunks_are_the_original(form, frames):
    vae = tiny.vae(**FORMS[form])
    video = draw(2, 3, frames, 32, 48).clamp(-1, 1)
    moments = vae.encode(video).latent_dist.parameters
    decoded = vae.decode(moments[:, :16]).sample
    # The pointwise convolution outside of the loop sees the whole clip in the original, which may round otherwise.
    exact = form != "four levels"
    for expected, made in (
        (moments, encode_in_chunks(vae, video)),
        (decoded, decode_in_chunks(vae, moments[:, :16])),
    ):
        assert torch.equal(expected, made) if exact else relative(expected, made) < 1e-6
    with exportable(vae):
        assert relative(moments, encode_in_chunks(vae, video)) < 1e-5
        assert relative(decoded, decode_in_chunks(vae, moments[:, :16])) < 1e-5
    assert not [module for module in vae.modules() if "forward" in vars(module)]


@torch.no_grad()
def test_a_step_changes_nothing_it_was_given():
    vae = tiny.vae(**tiny.RESIDUAL_VAE)
    first, later = draw(1, 16, 1, 4, 4), draw(1, 16, 1, 4, 4, seed=1)
    _, past = decode_chunk(vae, first, None)
    before = {name: cache.clone() for name, cache in past.items()}
    once, present = decode_chunk(vae, later, past)
    assert all(torch.equal(before[name], cache) for name, cache in past.items())
    assert torch.equal(once, decode_chunk(vae, later, past)[0])
    assert list(present) == list(past)
    assert {name: cache.shape for name, cache in past.items()} == {n: c.shape for n, c in present.items()}
    assert {cache.shape[2] for cache in past.values()} == {2}
    modules = dict(vae.named_modules())
    assert all(type(modules[name]).__name__ == "WanCausalConv3d" for name in past)


def test_the_vae_is_left_as_it_was_when_a_step_fails():
    vae = tiny.vae(**tiny.PLAIN_VAE)
    with pytest.raises(RuntimeError):
        decode_chunk(vae, draw(1, 3, 1, 4, 4), None)
    with pytest.raises(KeyError):
        decode_chunk(vae, draw(1, 16, 1, 4, 4), {})
    assert not [module for module in vae.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("kind", ["residual", "plain"])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_engine_decodes_as_the_original(models, decoders, kind, frames):
    vae, engine = models[kind].pipeline.vae, decoders[kind]
    for batch, height, width in ((2, 4, 6), (1, 3, 7), (3, 8, 2)):
        latents = draw(batch, 16, frames, height, width, seed=frames)
        with torch.no_grad():
            expected = vae.decode(latents).sample
        made = engine.run({"latents": latents})["video"]
        assert made.shape == expected.shape
        assert relative(expected, made) < 1e-5
        assert made.abs().max() <= 1


def test_the_engine_encodes_as_the_original(models, encoder):
    for frames in (1, 5, 13):
        video = draw(1, 3, frames, 32, 48).clamp(-1, 1)
        with torch.no_grad():
            expected = models["residual"].pipeline.vae.encode(video).latent_dist.parameters
        assert relative(expected, encoder.run({"video": video})["moments"]) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_bound_memory_gives_the_same(decoders, frames):
    engine = decoders["residual"]
    latents = draw(1, 16, frames, 4, 6)
    expected = engine.run({"latents": latents})["video"]
    video = torch.full_like(expected, torch.nan)
    call = engine.bind({"latents": latents}, {"video": video})
    for seed in (0, 1):  # again, with other values in the same memory
        latents.copy_(draw(1, 16, frames, 4, 6, seed=seed))
        call()
        assert torch.equal(video, engine.run({"latents": latents})["video"])


def test_memory_does_not_grow_with_the_clip(decoders):
    """Bytes of engine outputs that are alive after a step, watched from around the engines."""

    class Watched:
        def __init__(self, engine, alive, peaks):
            self.__dict__.update(vars(engine), engine=engine, alive=alive, peaks=peaks, device=engine.device)

        def run(self, feeds):
            made = self.engine.run(feeds)
            self.alive.extend(weakref.ref(tensor) for tensor in made.values())
            self.peaks.append(sum(tensor.nbytes for ref in self.alive if (tensor := ref()) is not None))
            return made

    whole = decoders["residual"]
    peaks = {}
    for frames in (3, 9):
        alive, seen = [], []
        watched = engines.StreamedDecoder(Watched(whole.first, alive, seen), Watched(whole.next, alive, seen))
        watched.run({"latents": draw(1, 16, frames, 4, 4)})
        assert len(seen) == frames
        peaks[frames] = max(seen)
    assert peaks[3] == peaks[9]


def test_reports_say_what_was_made(models, reports, folder):
    for kind, (first, later) in reports.items():
        for report, step in ((first, "first"), (later, "next")):
            assert report.component == f"vae_decoder.{step}"
            assert report.path == str(folder / kind / f"vae_decoder.{step}.onnx")
            assert report.dynamic_axes == {"latents": {0: "batch", 3: "latent_height", 4: "latent_width"}}
            assert not report.fixed_axes
            assert not report.notes
            assert "ScatterND" not in report.operators
        graph = onnx.load(later.path).graph
        past = [value.name.removeprefix("past.") for value in graph.input][1:]
        assert past == [value.name.removeprefix("present.") for value in graph.output][1:]
        assert set(past) < {name for name, _ in models[kind].pipeline.vae.named_modules()}
    again = export.export_streamed(models["plain"], folder / "plain", height=32, width=48)
    assert [report.cached for report in again] == [True, True]
    assert [report.row()["nodes_after"] for report in again] == [r.nodes_after for r in reports["plain"]]


def test_bfloat16_graphs_have_no_operator_without_a_kernel(models, tmp_path):
    made = export.export_streamed(
        models["plain"], tmp_path, dtype="bfloat16", dynamic=False, height=16, width=16, external_data=True
    )
    narrow = onnx.TensorProto.BFLOAT16
    for report in made:
        assert report.opset == 22
        graph = onnx.shape_inference.infer_shapes(onnx.load(report.path, load_external_data=False)).graph
        values = (*graph.value_info, *graph.input, *graph.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        used = {node.op_type for node in graph.node if kinds.get(node.input[0]) == narrow}
        assert not used & {"Resize", "Pad", "Clip"}
        assert "Conv" in used
    assert made[0].weights_file == made[1].weights_file
    assert (
        made[1].weights_written_bytes < made[0].weights_written_bytes / 2
    )  # the second shares what is there


def test_a_pipeline_with_a_streamed_decoder(models, decoders, encoder):
    model = models["residual"]
    opened = {"vae_decoder": decoders["residual"], "vae_encoder": encoder}
    fast = engines.use(model, opened)
    assert fast.engines == {name: "onnxruntime-cpu-streamed" for name in opened}
    video = draw(1, 3, 9, 32, 48).clamp(-1, 1)
    with torch.no_grad():
        expected = model.pipeline.vae.decode(model.pipeline.vae.encode(video).latent_dist.mode()).sample
    made = fast.pipeline.vae.decode(fast.pipeline.vae.encode(video).latent_dist.mode()).sample
    assert relative(expected, made) < 1e-5
    with pytest.raises(WanlabError, match="cannot run vae_encoder"):
        engines.use(model, {"vae_encoder": decoders["residual"]})


def test_errors_are_one_line(models, decoders, encoder, folder, tmp_path):
    engine = decoders["residual"]
    latents = draw(1, 16, 2, 4, 6)

    def mixed():
        return engines.StreamedDecoder(engine.first, decoders["plain"].next)

    cases = {
        "is vae_decoder.next, not vae_decoder.first": lambda: engines.StreamedDecoder(
            engine.next, engine.first
        ),
        "different networks": mixed,
        "not vae_encoder.first": lambda: engines.StreamedEncoder(engine.first, engine.next),
        "no vae_decoder.first.onnx in": lambda: engines.open_streamed_decoder(tmp_path),
        "takes 'latents'; video was given": lambda: engine.run({"video": latents}),
        "with 1 or more frames": lambda: engine.run({"latents": latents[:, :, :0]}),
        "give .B, C, T, H, W.": lambda: engine.run({"latents": latents[0]}),
        "with 4k . 1 frames": lambda: encoder.run({"video": draw(1, 3, 4, 32, 48)}),
        "the graph takes": lambda: engine.run({"latents": draw(1, 12, 2, 4, 6)}),
        "export again for yours": lambda: encoder.run({"video": draw(1, 3, 5, 32, 32)}),
        "has memory for 3 frames, this clip gives 5": lambda: engine.bind(
            {"latents": latents}, {"video": torch.empty(1, 3, 3, 32, 48)}
        ),
        "leave cuda_graph out": lambda: engine.bind({"latents": latents}, {}, cuda_graph=True),
        "did you mean 'vae_decoder'": lambda: export.export_streamed(models["plain"], tmp_path, "vae_decodr"),
        "no convolution in bfloat16": lambda: export.export_streamed(
            models["plain"], tmp_path, dtype="bfloat16", opset=20
        ),
        "height": lambda: export.export_streamed(models["plain"], tmp_path, height=33),
    }
    for pattern, call in cases.items():
        with pytest.raises(WanlabError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value), pattern
    assert not list(tmp_path.iterdir())


def test_a_stream_of_one_frame_is_a_picture(models, decoders):
    latents = draw(1, 16, 1, 4, 4)
    with torch.no_grad():
        picture = models["residual"].pipeline.vae.decode(latents).sample
    assert np.allclose(decoders["residual"].run({"latents": latents})["video"], picture, atol=1e-5)
    assert list(vae_export.HALVES) == ["vae_decoder", "vae_encoder"]
