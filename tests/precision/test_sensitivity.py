"""Sensitivity: the way back through networks and sampler, against direct measurements and real generations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from support import models_tiny
from support.answers import faults

from wanlab import models, plots, precision
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.precision.sensitivity.agreement import (
    Choice,
    draw_choices,
    ranges_of,
    rank_correlation,
    rounded_in_steps,
    spell_steps,
)
from wanlab.precision.sensitivity.forward import CheckpointedForward, WeightErrors, frozen, project
from wanlab.precision.sensitivity.measure import free_latents
from wanlab.precision.sensitivity.result import make_bands
from wanlab.precision.sensitivity.work import spread

pytestmark = pytest.mark.slow

STEPS = 4
SIZE = dict(height=64, width=64, frames=5, steps=STEPS)
LAYERS = (
    "blocks.[03].ffn.net.*",
    "blocks.[14].attn1.to_[qkv]",
    "blocks.2.attn2.to_?",
    "blocks.5.attn1.to_out.0",
)
COUNT = 14
"""Layers of an expert that these are."""
FORMATS = ("int8", "int8-weight", "int4-weight")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def recording(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    return precision.record_inputs(model, precision.nano_examples(2), folder, progress=False, **SIZE)


@pytest.fixture(scope="module")
def ranges(model, recording):
    return {
        name: precision.calibrate(model, name, recording, progress=False) for name in recording.components
    }


@pytest.fixture(scope="module")
def measured(model, recording, ranges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    found = measure(model, recording, ranges, probes=8, folder=folder)
    return found, folder


def measure(model, recording, ranges, **settings):
    chosen = {"layers": LAYERS, "formats": FORMATS, "progress": False}
    return precision.sensitivity(model, recording, ranges, **chosen | settings)


def passage_of(model, recording, component="expert_low"):
    call = recording.of(component)[-1]
    tensors = recording.inputs(call)
    inputs = [tensors[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    network = model.component(component)
    with frozen(network):
        return network, inputs, CheckpointedForward(network, inputs)


# ---- the sampler


@pytest.mark.parametrize("kind", ["own", "euler"])
def test_final_latents_are_the_weighted_velocities(model, kind, tmp_path):
    before = model.pipeline.scheduler
    if kind == "euler":
        model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    try:
        example = precision.nano_examples(1)
        recording = precision.record_inputs(model, example, tmp_path, progress=False, **SIZE)
        weights = precision.sampler_weights(model, STEPS)
        made = model.generate(
            example[0].image, example[0].prompt, seed=example[0].seed, output="latent", **SIZE
        )
    finally:
        model.pipeline.scheduler = before
    first = recording.inputs(recording.calls[0])["hidden_states"][:, :16].double()
    latents = weights.start[-1] * first
    scale = recording.settings["guidance_scale"]
    for call in recording.calls:
        tensors = recording.inputs(call)
        with torch.no_grad():
            velocity = model.component(call.component)(
                *(tensors[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")),
                return_dict=False,
            )[0]
        latents = latents + weights.final[call.step] * velocity * (
            scale if call.branch == "cond" else 1 - scale
        )
    wanted = torch.from_numpy(made.video).double()
    assert (latents[0] - wanted).norm() / wanted.norm() < 1e-5
    assert weights.final.sum() == pytest.approx(-1, abs=1e-3)  # from sigma 1 to 0


# ---- one call, there and back


def test_a_passage_is_the_network_and_its_gradient(model, recording):
    network, inputs, passage = passage_of(model, recording)
    blocks, wanted_grad = network.blocks, [p.requires_grad for p in network.parameters()]
    with torch.no_grad():
        assert torch.equal(network(*inputs, return_dict=False)[0], passage.velocity)
    assert torch.equal(passage.resume(2), passage.velocity)
    layers = ("blocks.0.attn2.to_k", "blocks.3.ffn.net.2", "blocks.5.attn1.to_q")
    seeds = [torch.randn_like(passage.velocity) for _ in range(2)]
    slopes = {}
    with frozen(network):
        grads = passage.backward(seeds, layers, lambda name, given, found: slopes.setdefault(name, found))
    assert network.blocks is blocks
    assert [p.requires_grad for p in network.parameters()] == wanted_grad

    source, outputs = inputs[0].clone().requires_grad_(), {}

    def note(name):
        def hook(module, args, out):
            outputs[name] = out if out.requires_grad else out.requires_grad_()

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    velocity = network(source, *inputs[1:], return_dict=False)[0]
    for handle in handles:
        handle.remove()
    for place, seed in enumerate(seeds):
        want = torch.autograd.grad(
            velocity, [source, *(outputs[name] for name in layers)], seed, retain_graph=True
        )
        got = [grads[place], *(slopes[name][place] for name in layers)]
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    outliers=st.floats(1, 100),
    clip=st.floats(0.05, 2),
    name=st.sampled_from(["int8", "fp8", "fp8-channel", "int8-weight", "int4-weight-32"]),
)
def test_an_error_is_that_of_the_rounded_layer(rows, outliers, clip, name):
    generator = torch.Generator().manual_seed(rows)
    module = torch.nn.Linear(64, 48)
    given_ = torch.randn(1, rows, 64, generator=generator)
    given_[..., 3] *= outliers
    amax = clip * float(given_.abs().max())
    slope = torch.randn(1, rows, 48, generator=generator)
    with torch.no_grad():
        plain = module(given_)
        wrapped = torch.nn.ModuleDict({"layer": module})
        with precision.fake_quantized(wrapped, {"layer": name}, {"layer": amax}):
            error = module(given_) - plain
    found = project(module, given_, [slope], [precision.get_format(name)], amax, WeightErrors())[0]
    size = float((error**2).sum() / (plain**2).sum())
    assert found.relative_sq == pytest.approx(size, rel=1e-3, abs=1e-9)
    assert float(found.dots[0]) == pytest.approx(float((slope * error).sum()), rel=1e-2, abs=1e-3)


def test_a_given_first_frame_is_not_free():
    velocity = torch.ones(1, 4, 3, 2, 2)
    timestep = torch.tensor([[0.0, 0.0, 500.0, 500.0, 500.0, 500.0]])
    assert free_latents([velocity, timestep], velocity).flatten().tolist() == [0, 1, 1]
    assert free_latents([velocity, timestep[0, 2:3]], velocity).flatten().tolist() == [1, 1, 1]


# ---- probes against the direct measurement


def test_probes_agree_with_rounding_one_layer_at_a_time(model, recording, ranges):
    few = recording.only(example=0)
    direct = measure(model, few, ranges, calls=1, method="direct")
    probed = measure(model, few, ranges, calls=1, probes=32)
    keys = ["component", "layer", "format", "first_step"]
    both = direct.with_bands(1).frame.merge(probed.with_bands(1).frame, on=keys, suffixes=("", "_probed"))
    assert len(both) == 2 * COUNT * len(FORMATS)
    for column, least in (("velocity_error", 0.97), ("effect", 0.95)):
        assert rank_correlation(both[column], both[f"{column}_probed"]).value > least
    ratio = both["velocity_error_probed"] / both["velocity_error"]
    assert 0.8 < ratio.median() < 1.25
    np.testing.assert_allclose(both["local_error"], both["local_error_probed"], rtol=1e-6)
    # A layer counts from its block on: less than a forward each.
    assert 2 * COUNT < direct.forwards < direct.brute_force
    assert probed.forwards == 2 * probed.calls


def test_effects_are_those_of_generations(model, recording, ranges, measured):
    """One layer early and one late: the same scale, though the early one is mended by the steps after it."""
    found = measured[0].with_bands(1)
    example = precision.nano_examples(2)
    settings = dict(output="latent", **SIZE)
    plain = [model.generate(e.image, e.prompt, seed=e.seed, **settings).video for e in example]
    for component, layer in (
        ("expert_high", "blocks.0.ffn.net.2"),
        ("expert_low", "blocks.3.ffn.net.0.proj"),
    ):
        steps = tuple(found.bands[component])
        choice = Choice("layer", component, (layer,), "int4-weight", steps, 0.0)
        moved = []
        for e, before in zip(example, plain, strict=True):
            with rounded_in_steps(model, choice, {}, STEPS):
                after = model.generate(e.image, e.prompt, seed=e.seed, **settings).video
            moved.append(((after - before) ** 2).sum() / (before**2).sum())
        rows = found.frame.query("component == @component and layer == @layer and format == 'int4-weight'")
        assert 0.3 < rows["effect"].iloc[0] / np.mean(moved) < 3


def test_timesteps_per_token_and_a_given_first_frame(tmp_path):
    """The layout of TI2V-5B: one expert, the first frame given at timestep 0."""
    sizes = models_tiny.EXPERT | {"in_channels": 4, "out_channels": 4}
    torch.manual_seed(0)
    expert = WanTransformer3DModel(**sizes)
    folder = models_tiny.save(
        tmp_path / "model", transformer=expert, transformer_2=None, boundary_ratio=None, expand_timesteps=True
    )
    single = models.load(folder, device="cpu")
    examples = precision.nano_examples(2)
    small = dict(height=32, width=32, frames=9, steps=3, progress=False)
    recording = precision.record_inputs(single, examples, tmp_path / "recording", **small)
    found = measure(
        single, recording, None, formats=["int4-weight-32"], layers="blocks.*.ffn.net.2", probes=64
    )
    truth = precision.end_to_end_agreement(single, found, examples, samples=5, progress=False)
    assert (truth.frame["predicted"] / truth.frame["true"]).between(0.7, 1.4).all()


def test_agreement_with_generations(model, measured):
    cases = heldout.load_cases("selection", 1)
    found = precision.end_to_end_agreement(model, measured[0], cases, samples=12, progress=False)
    assert len(found.frame) == 12
    assert found.generations == 14
    assert found.floor < found.frame["true"].min()
    whole = found.correlation()
    assert whole.low <= whole.value <= whole.high
    assert whole.value > 0.7
    assert 0.05 < found.scale < 20
    assert found.between_cases().value is None
    assert plots.agreement_scatter(found).data
    with pytest.raises(WanlabError, match="lpips=True"):
        found.correlation("lpips")
    with pytest.raises(WanlabError, match="at least 3"):
        precision.end_to_end_agreement(model, measured[0], cases, samples=2)
    with pytest.raises(WanlabError, match="as many"):
        precision.end_to_end_agreement(model, measured[0], cases, steps=STEPS + 1)
    with pytest.raises(WanlabError, match="final set"):
        precision.end_to_end_agreement(model, measured[0], heldout.load_cases("final", 1))


def test_rounding_holds_in_its_steps_only(model, measured):
    example = precision.nano_examples(1)[0]
    found = measured[0]

    def latents():
        made = model.generate(example.image, example.prompt, seed=example.seed, output="latent", **SIZE)
        return made.video

    plain = latents()
    low = model.component("expert_low")
    weight = low.get_submodule("blocks.0.ffn.net.2").weight.data.clone()
    (last, _), *_ = found.bands["expert_high"]
    other = Choice("layer", "expert_low", ("blocks.0.ffn.net.2",), "int4-weight", ((last, last),), 0.0)
    with rounded_in_steps(model, other, {}, STEPS):
        assert np.array_equal(latents(), plain)  # a step that the other expert runs
    own = replace(other, steps=tuple(found.bands["expert_low"]))
    moved = []

    def broken_off():
        with rounded_in_steps(model, own, {}, STEPS):
            moved.append(latents())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert not np.array_equal(moved[0], plain)
    assert torch.equal(low.get_submodule("blocks.0.ffn.net.2").weight.data, weight)
    assert np.array_equal(latents(), plain)


def test_choices_are_of_wide_range_and_add_up(measured):
    found = measured[0]
    choices = draw_choices(found, 30, seed=1)
    assert len(set(choices)) == 30
    assert {choice.kind for choice in choices} == {"layer", "block", "projection", "several", "expert"}
    assert draw_choices(found, 30, seed=1) == choices
    singles = [choice for choice in choices if choice.kind == "layer"]
    assert max(c.predicted for c in singles) > 100 * min(c.predicted for c in singles)
    whole = next(c for c in choices if c.kind == "expert" and len(c.steps) == len(found.bands[c.component]))
    rows = found.with_bands(1).frame.query("component == @whole.component and format == @whole.format")
    assert whole.predicted == pytest.approx(rows["effect"].sum())
    assert set(ranges_of(found, whole.component)) == set(whole.layers)
    assert spell_steps(((3, 4), (5, 5), (0, 1))) == "0-1, 3-5"


# ---- the table


def test_the_table(measured):
    found = measured[0]
    frame = found.frame
    bands = sum(len(ranges) for ranges in found.bands.values())
    assert len(frame) == bands * COUNT * len(FORMATS)
    assert (frame["low"] <= frame["velocity_error"]).all()
    assert (frame["velocity_error"] <= frame["high"]).all()
    assert (frame["effect_low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["effect_high"]).all()
    assert (frame[["local_error", "velocity_error", "effect"]] > 0).all(axis=None)
    means = frame.groupby("format")["effect"].sum()
    assert means["int8-weight"] < means["int8"] < means["int4-weight"]
    assert frame.loc[0, "block"] == int(frame.loc[0, "layer"].split(".")[1])
    top = found.ranked(5)
    assert top["effect"].is_monotonic_decreasing
    assert top["effect"].iloc[0] == frame["effect"].max()
    with pytest.raises(WanlabError, match="rank by"):
        found.ranked(by="layer")
    cost = found.costs().iloc[0]
    assert cost["calls"] == found.calls == 2 * STEPS * 2
    assert cost["forwards"] == 2 * cost["calls"]
    assert cost["backwards"] == (8 + 4) * cost["calls"]
    assert cost["brute_force"] == cost["calls"] * (1 + COUNT * len(FORMATS))


def test_bands_are_cut_without_measuring(measured):
    found = measured[0]
    whole = found.with_bands(1)
    assert len(whole.frame) == 2 * COUNT * len(FORMATS)
    picked = found.with_bands([(0, 0), (1, STEPS - 1)])
    assert picked.bands["expert_high"][0] == (0, 0)
    # Squares of one call each are what a range of steps averages.
    one = found.with_bands(STEPS).frame.query("component == 'expert_low' and format == 'int8'")
    mean = (one["velocity_error"] ** 2).groupby(one["layer"]).mean() ** 0.5
    rows = whole.frame.query("component == 'expert_low' and format == 'int8'").set_index("layer")
    assert mean.to_dict() == pytest.approx(rows["velocity_error"].to_dict())


@settings(max_examples=60, deadline=None)
@given(high=st.integers(0, 12), low=st.integers(1, 12), count=st.integers(1, 15))
def test_bands_cover_every_step_once(high, low, count):
    schedule = ["expert_high"] * high + ["expert_low"] * low
    made = make_bands(schedule, count)
    for component, ranges in made.items():
        steps = [step for first, last in ranges for step in range(first, last + 1)]
        assert steps == [step for step, name in enumerate(schedule) if name == component]
        assert len(ranges) == min(count, len(steps))
    for wrong in (0, [(3, 2)], [(0, len(schedule))]):
        with pytest.raises(WanlabError):
            make_bands(schedule, wrong)


@given(steps=st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True), count=st.integers(1, 40))
def test_sampled_steps_are_spread(steps, count):
    steps = sorted(steps)
    found = spread(steps, count)
    assert found == sorted(set(found))
    assert len(found) == min(count, len(steps))
    assert set(found) <= set(steps)


# ---- experts


def test_the_expert_with_coarser_codes_tolerates_less(model, recording, ranges, measured):
    found = precision.expert_tolerance(measured[0])
    assert len(found.frame) == 2 * len(FORMATS)
    assert (found.ratios["low"] <= found.ratios["ratio"]).all()
    assert (found.ratios["ratio"] <= found.ratios["high"]).all()
    assert plots.tolerance_bars(found).data
    for coarse, other in (("expert_high", "expert_low"), ("expert_low", "expert_high")):
        wrong = {coarse: {k: 40 * v for k, v in ranges[coarse].amax.items()}, other: ranges[other]}
        few = measure(
            model, recording.only(example=0), wrong, formats=["int8"], layers="blocks.[14].ffn*", probes=2
        )
        answer = precision.expert_tolerance(few)
        assert answer.less_tolerant("int8", "velocity_error") == coarse
        if answer.less_tolerant("int8") == coarse:
            words = {"expert_high": "the high-noise expert", "expert_low": "the low-noise expert"}[coarse]
            said = precision.sensitivity_answer(few, answer, None, "int8")
            assert said.headline.startswith(f"In int8 {words} tolerates less: ")
    with pytest.raises(WanlabError, match="fp8"):
        found.less_tolerant("fp8")


def test_one_expert_is_compared_with_nothing(measured):
    found = measured[0]
    alone = replace(found, parts=tuple(p for p in found.parts if p.component == "expert_low"))
    answer = precision.expert_tolerance(alone)
    assert answer.less_tolerant("int8") is None
    said = precision.sensitivity_answer(alone, answer, None, "int8")
    assert faults(said) == []
    assert said.headline.startswith("One expert was measured: ")
    whole = precision.sensitivity_answer(found, precision.expert_tolerance(found), None, "int8")
    assert faults(whole) == []
    assert "neither expert clearly" in whole.headline or "tolerates less" in whole.headline


# ---- what was finished is kept


def test_finished_parts_are_not_measured_again(model, recording, ranges, measured):
    found, folder = measured
    again = measure(model, recording, ranges, probes=8, folder=folder)
    assert again.reused == 2
    assert again.frame.equals(found.frame)
    read = precision.read_sensitivity(folder)
    assert read.frame.equals(found.frame)
    assert read.complete
    next(iter(folder.glob("*-e1-*.npz"))).unlink()  # as if it had been cut off there
    third = measure(model, recording, ranges, probes=8, folder=folder)
    assert third.reused == 1
    assert third.frame.equals(found.frame)


def test_shards_make_the_whole(model, recording, ranges, measured, tmp_path):
    found = measured[0]
    shards = [measure(model, recording, ranges, probes=8, shard=(i, 2), folder=tmp_path) for i in range(2)]
    assert [len(shard.parts) for shard in shards] == [2, 2]
    assert not shards[0].complete
    for merged in (precision.merge_sensitivity(shards), precision.read_sensitivity(tmp_path)):
        assert merged.complete
        assert merged.frame.equals(found.frame)
    by_component = [
        measure(model, recording, ranges, probes=8, components=name) for name in ("expert_high", "expert_low")
    ]
    merged = precision.merge_sensitivity(by_component)
    np.testing.assert_allclose(merged.frame["effect"], found.frame["effect"], rtol=1e-5)
    # The low-noise expert alone needs its own steps only.
    assert by_component[1].forwards < by_component[0].forwards
    other = measure(model, recording, ranges, probes=8, seed=1, shard=(1, 2))
    with pytest.raises(WanlabError, match="differ in seed"):
        precision.merge_sensitivity([shards[0], other])
    fewer = measure(model, recording, ranges, probes=8, layers=LAYERS[0], shard=(1, 2))
    with pytest.raises(WanlabError, match="layers or recordings"):
        precision.merge_sensitivity([shards[0], fewer])
    with pytest.raises(WanlabError, match="no shard"):
        precision.merge_sensitivity([])
    assert precision.read_sensitivity(precision.save_sensitivity(found, tmp_path / "copy")).frame.equals(
        found.frame
    )


def test_inputs_are_kept_for_what_they_depend_on(model, tmp_path):
    small = dict(height=32, width=32, frames=5, steps=2, progress=False)
    example = precision.nano_examples(1)
    made = precision.keep_inputs(model, example, tmp_path, components=["expert_high"], **small)
    assert not made.reused
    assert made.recording.components == ("expert_high", "expert_low")
    assert list(made.ranges) == ["expert_high"]
    again = precision.keep_inputs(model, example, tmp_path, guidance_scale=None, **small)
    assert again.reused
    assert again.ranges["expert_high"].cached
    assert (again.folder, again.recording.calls) == (made.folder, made.recording.calls)
    # One expert alone: its errors are followed through the steps of the other.
    found = measure(model, again.recording, made.ranges, components="expert_high", layers=LAYERS[0], probes=1)
    assert found.components == ("expert_high",)
    other = [replace(example[0], prompt="another")]
    assert precision.keep_inputs(model, other, tmp_path, **small).folder != made.folder
    (again.folder / "recording" / "recording.json").unlink()  # as if it had been cut off
    assert not precision.keep_inputs(model, example, tmp_path, **small).reused
    with pytest.raises(WanlabError, match="did you mean 'expert_high'"):
        precision.keep_inputs(model, example, tmp_path, components=["expert_hihg"], **small)


def test_a_folder_that_cannot_be_read_is_refused(measured, tmp_path):
    found = measured[0]
    with pytest.raises(WanlabError, match="no sensitivity"):
        precision.read_sensitivity(tmp_path)
    precision.save_sensitivity(found, tmp_path)
    part = next(iter(tmp_path.glob("*.npz")))
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(WanlabError, match="missing or broken"):
        precision.read_sensitivity(tmp_path)
    precision.save_sensitivity(replace(found, settings=found.settings | {"seed": 9}), tmp_path)
    with pytest.raises(WanlabError, match="give key="):
        precision.read_sensitivity(tmp_path)
    manifest = next(iter(tmp_path.glob("*.sensitivity.json")))
    manifest.write_text(json.dumps({"settings": {}}))
    with pytest.raises(WanlabError, match="cannot be read"):
        precision.read_sensitivity(tmp_path, key=manifest.name.split(".")[0])


def test_what_cannot_be_measured_is_refused(model, recording, ranges):
    wrong = [
        ("no range for the input of", dict(calibrations={})),
        ("calibrate expert_low", dict(calibrations=ranges | {"expert_low": ranges["expert_high"]})),
        ("did you mean 'expert_high'", dict(components=["expert_hihg"])),
        ("did you mean 'int8'", dict(formats=["imt8"])),
        ("outside the blocks", dict(layers="proj_out", formats=["int8-weight"])),
        ("give calls=", dict(method="direct")),
        ("no method", dict(method="brute")),
        ("shard is", dict(shard=(2, 2))),
        ("probes", dict(probes=0)),
        ("calls must be", dict(calls=0)),
        (
            r"step 1 of example 0, which expert_high runs, .* record all steps, or give calls=",
            dict(recording=recording.only(step=[0, 2, 3])),
        ),
        (
            r"which expert_low runs, .* record it too \(components=None\), or give calls=",
            dict(
                recording=recording.only(component="expert_high"),
                calibrations={"expert_high": ranges["expert_high"]},
            ),
        ),
        ("nothing is left for shard 2 of 3: there are 2 units", dict(shard=(2, 3))),
        ("record its own inputs", dict(recording=structs.replace(recording, model="another"))),
        ("do not fill", dict(formats=["int4-weight-128"], layers="blocks.0.attn1.to_q")),
    ]
    for message, changed in wrong:
        given_ = {"recording": recording, "calibrations": ranges} | changed
        with pytest.raises(WanlabError, match=message):
            measure(model, given_.pop("recording"), given_.pop("calibrations"), **given_)


# ---- statistics and figures


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=20))
def test_rank_correlation_is_spearmans(pairs):
    from scipy.stats import spearmanr

    a, b = np.array(pairs, dtype=float).T
    found = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found.value is None
        return
    assert found.value == pytest.approx(spearmanr(a, b)[0])
    assert found.low <= found.value <= found.high
    assert rank_correlation(np.exp(a), b**3).value == pytest.approx(found.value)


def test_figures(measured):
    found = measured[0]
    for value in ("effect", "velocity_error", "local_error"):
        figure = plots.sensitivity_map(found.frame, "expert_high", value)
        assert len(figure.data) == len(FORMATS)
        assert len(plots.sensitivity_bars(found.frame, 5, value).data) >= 1
    first = found.bands["expert_low"][0][0]
    assert plots.sensitivity_map(found.frame, "expert_low", first_step=first).data
    with pytest.raises(WanlabError, match="no rows of expert_hihg"):
        plots.sensitivity_map(found.frame, "expert_hihg")
    with pytest.raises(WanlabError, match="needs the columns"):
        plots.sensitivity_bars(found.frame.drop(columns="effect"))
