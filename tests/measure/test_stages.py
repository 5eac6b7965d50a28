from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import measure
from wanlab.core.errors import WanlabError
from wanlab.measure.stages import StageCall


class Clockwork:
    """A pipeline of plain Python objects, as when engines run the components."""

    class Component:
        def __init__(self, seconds=0.0):
            self.seconds, self.config = seconds, {"width": 3}

        def __call__(self, x, timestep=None):
            time.sleep(self.seconds)
            return x + 1

        def encode(self, x):
            return x * 2

        def decode(self, x):
            if x is None:
                raise RuntimeError("no latents")
            time.sleep(self.seconds)
            return x / 2

    class Scheduler:
        def set_timesteps(self, timesteps):
            self.timesteps = timesteps

        def step(self, x):
            return x

    def __init__(self, *, scheduler=True, second=True, seconds=0.0):
        self.text_encoder, self.vae = self.Component(), self.Component(seconds)
        self.transformer = self.Component(seconds)
        self.transformer_2 = self.Component(seconds) if second else None
        self.scheduler = self.Scheduler() if scheduler else None

    def __call__(self, x=1.0, timesteps=(999, 999, 500), guided=True):
        x = self.vae.encode(self.text_encoder(x))
        if self.scheduler is not None:
            self.scheduler.set_timesteps(timesteps)
        for t in timesteps:
            expert = self.transformer if t >= 900 or self.transformer_2 is None else self.transformer_2
            for _ in range(2 if guided else 1):
                x = expert(x, timestep=torch.tensor([float(t)]))
            if self.scheduler is not None:
                x = self.scheduler.step(x)
        return self.vae.decode(x)


def model_of(pipeline):
    return SimpleNamespace(pipeline=pipeline, device=torch.device("cpu"), generate=pipeline)


@pytest.fixture(scope="module")
def wan():
    """A real WanImageToVideoPipeline with random weights, and a function that runs it."""
    from PIL import Image

    from training import architecture

    torch.manual_seed(0)
    pipeline = architecture.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))

    def generate(steps=2, guidance_scale=2.0):
        return pipeline(
            image=image,
            prompt="the camera pans left",
            negative_prompt="",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=24,
            output_type="np",
        ).frames

    return SimpleNamespace(pipeline=pipeline, device=torch.device("cpu"), generate=generate)


def test_every_call_of_a_real_pipeline_is_recorded(wan):
    undisturbed = wan.generate()
    before = dict(vars(wan.pipeline))
    config = dict(wan.pipeline.config)
    begin = time.perf_counter()
    with measure.stages(wan) as recorder:
        assert isinstance(wan.pipeline.transformer, torch.nn.Module)  # stand-ins pass for the original
        assert wan.pipeline.device == torch.device("cpu")
        recorded = wan.generate()
    wall_ms = (time.perf_counter() - begin) * 1000
    np.testing.assert_array_equal(recorded, undisturbed)
    assert {name: id(value) for name, value in vars(wan.pipeline).items()} == {
        name: id(value) for name, value in before.items()
    }
    assert dict(wan.pipeline.config) == config

    frame = recorder.frame()
    experts = frame[frame["component"].str.startswith("expert")]
    assert list(zip(experts["component"], experts["step"], experts["branch"], strict=True)) == [
        ("expert_high", 0, "cond"),
        ("expert_high", 0, "uncond"),
        ("expert_low", 1, "cond"),
        ("expert_low", 1, "uncond"),
    ]
    boundary = 1000 * wan.pipeline.config.boundary_ratio
    assert (experts["timestep"][:2] >= boundary).all()
    assert (experts["timestep"][2:] < boundary).all()
    assert frame["component"].value_counts().to_dict() == {
        "text_encoder": 2,
        "vae_encoder": 1,
        "expert_high": 2,
        "expert_low": 2,
        "vae_decoder": 1,
    }
    assert frame.loc[frame["component"] == "vae_decoder", ["step", "timestep"]].isna().all(axis=None)
    assert frame["start_ms"].is_monotonic_increasing
    assert (frame["time_ms"] > 0).all()

    table = recorder.breakdown(wall_ms)
    assert list(table["component"]) == [
        "text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder", "other",
    ]  # fmt: skip
    assert table["time_ms"].sum() == pytest.approx(wall_ms, rel=1e-12)
    assert table["share_percent"].sum() == pytest.approx(100, rel=1e-12)
    assert table["time_ms"].iloc[-1] > 0
    assert recorder.wall_ms <= wall_ms


def test_without_guidance_only_the_cond_branch_runs(wan):
    with measure.stages(wan, memory=True) as recorder:
        wan.generate(steps=1, guidance_scale=1.0)
    frame = recorder.frame()
    assert list(frame["branch"].dropna()) == ["cond"]
    assert (frame["peak_gib"] > 0.05).all()
    assert (frame["increase_gib"] >= 0).all()
    table = recorder.breakdown().set_index("component")
    assert table.loc["vae_decoder", "peak_gib"] == frame["peak_gib"].iloc[-1]
    assert np.isnan(table.loc["other", "peak_gib"])


def test_an_exception_restores_everything(wan):
    before = {name: id(value) for name, value in vars(wan.pipeline).items()}
    recorder = measure.stages(wan)

    def encode_and_fail():
        with recorder:
            wan.pipeline.text_encoder(torch.zeros(1, 3, dtype=torch.long))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        encode_and_fail()
    assert {name: id(value) for name, value in vars(wan.pipeline).items()} == before
    assert len(recorder.frame()) == 1


def test_a_component_that_fails_leaves_the_pipeline_whole():
    pipeline = Clockwork()
    vae = pipeline.vae
    with pytest.raises(RuntimeError, match="no latents"), measure.stages(model_of(pipeline)) as recorder:
        pipeline.vae.decode(None)
    assert pipeline.vae is vae
    assert recorder.frame().empty
    assert list(recorder.breakdown()["component"]) == ["other"]


def test_engines_are_recorded_like_modules():
    pipeline = Clockwork(seconds=0.003)
    with measure.stages(model_of(pipeline)) as recorder:
        assert pipeline() == Clockwork()()
        pipeline.transformer.config["width"] = 4  # a stand-in hands on what it does not measure
        pipeline.transformer.note = "kept"
    assert pipeline.transformer.config["width"] == 4
    assert pipeline.transformer.note == "kept"
    frame = recorder.frame()
    experts = frame[frame["branch"].notna()]
    # Two steps share a timestep; the scheduler, not the timestep, tells them apart.
    assert list(experts["step"]) == [0, 0, 1, 1, 2, 2]
    assert list(experts["timestep"]) == [999, 999, 999, 999, 500, 500]
    assert (experts["time_ms"] >= 3).all()
    assert list(experts["call"]) == [0, 1, 2, 3, 0, 1]
    assert "peak_gib" not in frame


def test_several_generations_are_told_apart():
    pipeline = Clockwork()
    with measure.stages(model_of(pipeline)) as recorder:
        pipeline()
        pipeline()
    frame = recorder.frame()
    assert frame.groupby("generation").size().to_dict() == {0: 9, 1: 9}
    assert frame.loc[frame["generation"] == 1, "step"].dropna().tolist() == [0, 0, 1, 1, 2, 2]


def test_one_expert_is_called_expert():
    pipeline = Clockwork(second=False)
    with measure.stages(model_of(pipeline)) as recorder:
        pipeline()
    components = set(recorder.frame()["component"])
    assert components == {"text_encoder", "vae_encoder", "expert", "vae_decoder"}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True), st.booleans(), st.booleans())
def test_steps_and_branches_follow_any_schedule(timesteps, guided, scheduler):
    timesteps = sorted(timesteps, reverse=True)
    pipeline = Clockwork(scheduler=scheduler)
    with measure.stages(model_of(pipeline)) as recorder:
        pipeline(timesteps=timesteps, guided=guided)
    experts = recorder.frame().dropna(subset=["step"])
    branches = ["cond", "uncond"] if guided else ["cond"]
    expected = [(step, float(t), branch) for step, t in enumerate(timesteps) for branch in branches]
    assert list(zip(experts["step"], experts["timestep"], experts["branch"], strict=True)) == expected
    assert recorder.breakdown(1e4)["time_ms"].sum() == pytest.approx(1e4, rel=1e-12)


def test_per_token_timesteps_count_as_their_largest():
    pipeline = Clockwork(second=False)
    with measure.stages(model_of(pipeline)) as recorder:
        pipeline.transformer(1.0, torch.tensor([[0.0, 750.0, 750.0]]))
    assert recorder.frame()["timestep"].tolist() == [750.0]


def test_compiled_modules_are_not_compiled_again():
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    layer = torch.nn.Linear(3, 3)
    layer.compile(backend=backend)
    layer(torch.ones(1, 3))
    pipeline = Clockwork()
    pipeline.transformer = layer
    with measure.stages(model_of(pipeline)) as recorder:
        pipeline.transformer(torch.ones(1, 3))
    layer(torch.ones(1, 3))
    assert len(traced) == 1
    assert len(recorder.calls) == 1


def test_wrong_use_is_explained():
    with pytest.raises(WanlabError, match="no pipeline"), measure.stages(SimpleNamespace()):
        pass
    model = model_of(Clockwork())
    with measure.stages(model) as recorder:
        with pytest.raises(WanlabError, match="recorded already"), measure.stages(model):
            pass
        with pytest.raises(WanlabError, match="still open"):
            recorder.breakdown()
    recorder.calls.append(StageCall(0, 0, "expert", 0, 1.0, "cond", 0.0, 50.0))
    with pytest.raises(WanlabError, match=r"10\.000 ms is shorter than the 50\.000 ms"):
        recorder.breakdown(10)
