"""Recording real inputs, calibrating on them, and a cache that knows what it is true for."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec import structs
from PIL import Image

from wanlab import models, precision
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.models.facts import wan_expert_flop
from wanlab.precision.calibration import (
    BINS,
    Calibration,
    CalibrationCache,
    Histogram,
    Identity,
    Method,
    Observer,
    histogram_of,
    write,
)
from wanlab.precision.recording import as_examples

SIZE = dict(height=64, width=64, frames=5, steps=4, progress=False)
FEW = ("blocks.0.attn1.to_[qkv]", "blocks.2.ffn.net.*")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def recording(model, tmp_path_factory):
    return precision.record_inputs(model, precision.nano_examples(2), tmp_path_factory.mktemp("rec"), **SIZE)


@pytest.fixture(scope="module")
def calibration(model, recording):
    return precision.calibrate(model, "expert_high", recording, progress=False)


# ---- layers


def test_default_layers_are_the_projections_of_the_blocks(model):
    network = model.component("expert_high")
    chosen = precision.choose_layers(network)
    assert len(chosen) == 6 * 10
    assert chosen[0].startswith("blocks.0.")
    for outside in ("embed", "proj_out", "time_proj"):
        assert not [layer for layer in chosen if outside in layer]
    names = [f"blocks.{i}.ffn.net.2" for i in (10, 9, 2)]
    assert precision.choose_layers(names, "*") == tuple(reversed(names))


def test_operations_of_the_layers_are_those_of_the_formula(model):
    network = model.component("expert_high")
    table = precision.quantizable_layers(network, tokens=96, text_tokens=24)
    want = wan_expert_flop(dict(network.config), 96, 24)
    assert table["flop"].sum() == want["linear"] + want["other"]
    assert table["share_percent"].sum() == pytest.approx(100)
    assert table["parameters"].sum() < sum(p.numel() for p in network.parameters())
    row = table.set_index("layer").loc["blocks.3.attn1.to_out.0"]
    assert (row["kind"], row["block"], row["projection"]) == ("Linear", 3, "attn1.to_out.0")
    assert table.set_index("layer").loc["patch_embedding", "kind"] == "Conv3d"


def test_patterns(model):
    network = model.component("expert_high")
    assert precision.choose_layers(network, "proj_out") == ("proj_out",)
    assert precision.choose_layers(network, r"re:blocks\.\d\.ffn\.net\.2") == tuple(
        f"blocks.{i}.ffn.net.2" for i in range(6)
    )
    assert len(precision.choose_layers(network, exclude="blocks.[05].*")) == 40
    with pytest.raises(WanlabError, match=r"blocks\.0\.attn1\.to_g.*did you mean 'blocks\.0\.attn1\.to_"):
        precision.choose_layers(network, "blocks.0.attn1.to_g")
    with pytest.raises(WanlabError, match="no layer matches"):
        precision.choose_layers(network, exclude="blocks.9.*")
    with pytest.raises(WanlabError, match="no regular expression"):
        precision.choose_layers(network, "re:(")
    with pytest.raises(WanlabError, match="no layer is left"):
        precision.choose_layers(network, "proj_out", "proj_*")


# ---- recording


def test_every_call_is_recorded_with_its_place(model, recording):
    frame = recording.frame()
    schedule = model.schedule(4)
    assert len(frame) == 2 * 4 * 2
    assert frame["branch"].tolist() == ["cond", "uncond"] * 8
    for _, row in frame.iterrows():
        planned = schedule.iloc[row["step"]]
        assert (row["component"], row["timestep"]) == (planned["component"], planned["timestep"])
        assert row["sigma"] == pytest.approx(planned["sigma"])
    assert set(recording.components) == {"expert_high", "expert_low"}
    cond, uncond = recording.calls[:2]
    assert cond.tensors["hidden_states"] == uncond.tensors["hidden_states"]
    assert cond.tensors["encoder_hidden_states"] != uncond.tensors["encoder_hidden_states"]


def test_recorded_inputs_are_what_the_expert_gets(model, recording):
    seen = []
    handle = model.component("expert_low").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    try:
        example = precision.nano_examples(2)[0]
        model.generate(example.image, example.prompt, seed=example.seed, output="latent", **SIZE)
    finally:
        handle.remove()
    calls = [call for call in recording.of("expert_low") if call.example == 0]
    assert len(seen) == len(calls) > 0
    for want, call in zip(seen, calls, strict=True):
        for name, tensor in recording.inputs(call).items():
            assert torch.equal(tensor, want[name])
            assert tensor.dtype == want[name].dtype


def test_a_recording_is_read_back_whole(recording):
    again = precision.read_recording(recording.folder)
    assert again == recording
    assert (
        again.inputs_key("expert_low")
        == recording.inputs_key("expert_low")
        != recording.inputs_key("expert_high")
    )
    files = list(recording.folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == recording.size_bytes
    few = recording.only(branch="cond", step=[0, 1])
    assert len(few.calls) == 4
    assert few.inputs_key("expert_high") != recording.inputs_key("expert_high")
    with pytest.raises(WanlabError, match=r"no 'steps'.*did you mean 'step'"):
        recording.only(steps=3)
    with pytest.raises(WanlabError, match="did you mean 'expert_high'"):
        recording.of("expert_hihg")


def test_other_components_are_recorded_too(model, tmp_path):
    made = precision.record_inputs(
        model,
        precision.nano_examples(1),
        tmp_path,
        components=("text_encoder", "vae_encoder", "vae_decoder"),
        **SIZE | dict(steps=1),
    )
    assert made.components == ("text_encoder", "vae_encoder", "vae_decoder")
    decoded = recorded_input(made, "vae_decoder", "latents")
    assert decoded.shape[1] == 16
    assert recorded_input(made, "vae_encoder", "video").shape[1] == 3
    found = precision.calibrate(model, "text_encoder", made, layers="*.wi_?", progress=False)
    assert min(found.amax.values()) > 0


def recorded_input(recording, component, name):
    return recording.inputs(recording.of(component)[0])[name]


def test_what_must_not_be_recorded_is_refused(model, tmp_path):
    with pytest.raises(WanlabError, match="held out"):
        precision.record_inputs(model, heldout.draw_cases(1), tmp_path / "a", **SIZE)
    with pytest.raises(WanlabError, match="no example"):
        precision.record_inputs(model, [], tmp_path / "a", **SIZE)
    with pytest.raises(WanlabError, match="give Example"):
        precision.record_inputs(model, ["a prompt"], tmp_path / "a", **SIZE)
    with pytest.raises(WanlabError, match="did you mean 'expert_low'"):
        precision.record_inputs(
            model, precision.nano_examples(1), tmp_path / "a", components="expert_lo", **SIZE
        )
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WanlabError, match="other files"):
        precision.record_inputs(model, precision.nano_examples(1), tmp_path, **SIZE)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_examples_are_read_from_a_folder_of_images_with_prompts(tmp_path):
    for message in ("no folder at", "holds no image"):
        with pytest.raises(WanlabError, match=message):
            precision.load_examples(tmp_path / "own")
        (tmp_path / "own").mkdir(exist_ok=True)
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / "own" / name)
    (tmp_path / "own" / "a.txt").write_text("the camera\n  pans right\n")
    with pytest.raises(WanlabError, match=r"b\.png has no prompt that can be read; write it into .*b\.txt"):
        precision.load_examples(tmp_path / "own")
    (tmp_path / "own" / "b.txt").write_text("a boat")
    examples = as_examples(tmp_path / "own")
    prompts = [("a", "the camera pans right", 0), ("b", "a boat", 1)]
    assert [(example.name, example.prompt, example.seed) for example in examples] == prompts
    assert [example.image.name for example in examples] == ["a.JPG", "b.png"]


def test_pictures_of_examples_are_read_before_the_work(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a boat")
    (tmp_path / "._a.png").write_bytes(b"of a Mac")
    assert [example.name for example in precision.load_examples(tmp_path)] == ["a"]
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-30])
    with pytest.raises(WanlabError, match=r"b\.png cannot be read as an image"):
        precision.load_examples(tmp_path)
    with pytest.raises(WanlabError, match=r"b\.png cannot be read as an image"):
        as_examples([(tmp_path / "a.png", "a boat"), (tmp_path / "b.png", "a boat")])
    (tmp_path / "b.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(WanlabError, match=r"a\.jpg and .*a\.png would share the prompt a\.txt; rename one"):
        precision.load_examples(tmp_path)


def test_a_broken_recording_is_refused(recording, tmp_path):
    shutil.copytree(recording.folder, tmp_path / "rec")
    copy = precision.read_recording(tmp_path / "rec")
    call = copy.calls[0]
    one, other = (
        tmp_path / "rec" / f"{call.tensors[name][:32]}.safetensors" for name in ("timestep", "hidden_states")
    )
    one.write_bytes(other.read_bytes())
    with pytest.raises(WanlabError, match="content was changed"):
        copy.inputs(call)
    one.unlink()
    with pytest.raises(WanlabError, match="missing or broken"):
        copy.inputs(call)
    (tmp_path / "rec" / "recording.json").write_text("{")
    with pytest.raises(WanlabError, match="cannot be read"):
        precision.read_recording(tmp_path / "rec")
    with pytest.raises(WanlabError, match="no recording"):
        precision.read_recording(tmp_path)


# ---- observers and methods

arrays = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32))


@given(st.lists(arrays, min_size=1, max_size=4), st.randoms())
@settings(max_examples=50)
def test_histograms_do_not_depend_on_the_order(pieces, random):
    def total(order):
        histogram = Histogram.empty()
        for piece in order:
            histogram.add(histogram_of(torch.from_numpy(piece)))
        return histogram

    one = total(pieces)
    shuffled = list(pieces)
    random.shuffle(shuffled)
    other = total(shuffled)
    whole = histogram_of(torch.from_numpy(np.concatenate(pieces)))
    for found in (other, whole):
        assert torch.equal(found.counts, one.counts)
        assert (found.exponent, found.amax) == (one.exponent, one.amax)
    magnitudes = np.abs(np.concatenate(pieces))
    assert int(one.counts.sum()) == len(magnitudes)
    assert one.amax == magnitudes.max()
    assert one.amax < 2.0**one.exponent
    if one.amax > 2.0**-100:
        assert one.amax >= 2.0 ** (one.exponent - 1)


@given(arrays, st.floats(50, 100))
def test_percentiles_are_those_of_the_values(x, percentile):
    histogram = histogram_of(torch.from_numpy(x))
    found = Method("percentile", percentile=percentile).amax(histogram)
    magnitudes = np.sort(np.abs(x))
    share = len(x) * percentile / 100
    index = max(math.ceil(share - 1e-9 * len(x)) - 1, 0)
    width = histogram.bin_width * (1 + 1e-6)
    assert magnitudes[index] - width <= found <= magnitudes[min(index + 1, len(x) - 1)] + width
    assert found <= histogram.amax


DRAWS = {
    "normal": lambda x, generator: x.normal_(generator=generator),
    "uniform": lambda x, generator: x.uniform_(generator=generator),
    "exponential": lambda x, generator: x.exponential_(generator=generator),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_entropy_finds_what_onnxruntime_finds(draw):
    """ONNX Runtime's calibrator is an implementation of the same method by other hands."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    fine = histogram_of(DRAWS[draw](torch.empty(2_000_000), torch.Generator().manual_seed(1))).counts
    last = int(fine.nonzero()[-1]) // 4 * 4
    counts = fine[:last].view(-1, 4).sum(dim=1)  # fewer, as its loops are in Python
    bins = len(counts)
    both, edges = torch.cat([counts.flip(0), counts]).numpy(), np.arange(-bins, bins + 1, dtype=float)
    collector = calibrate.HistogramCollector("entropy", True, len(both), 256, 99.99, None)
    theirs = float(collector.get_entropy_threshold((both, edges, -bins, bins, bins), 256)[1])
    halves = counts[:, None].expand(-1, 2).flatten()
    padded = torch.cat([halves, torch.zeros(BINS - 2 * bins, dtype=torch.int64)])
    ours = Method("entropy").amax(Histogram(padded, int(math.log2(BINS / 2)), float(bins)))
    assert ours == pytest.approx(theirs, rel=0.15)
    if draw != "uniform":
        assert ours < bins


def test_methods_agree_where_nothing_lies_outside():
    x = torch.linspace(-1, 1, 100_001)
    histogram = histogram_of(x)
    assert Method("max").amax(histogram) == 1.0
    assert Method("percentile", percentile=50).amax(histogram) == pytest.approx(0.5, abs=1e-3)
    outlier = histogram_of(torch.cat([x, torch.tensor([100.0])]))
    assert Method("max").amax(outlier) == 100.0
    assert Method("percentile", percentile=99.9).amax(outlier) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(WanlabError, match="did you mean 'entropy'"):
        Method("entropie")
    with pytest.raises(WanlabError, match="percentile"):
        Method("percentile", percentile=0)


def test_sampling_keeps_the_largest_and_the_shape():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x[17, 3] = 50.0
    whole, part = histogram_of(x), histogram_of(x, 1000)
    assert part.amax == whole.amax == 50.0
    assert 500 < int(part.counts.sum()) <= 1000 < int(whole.counts.sum()) == x.numel()
    channels = torch.arange(96.0).repeat(64, 1)
    assert (histogram_of(channels, 700).counts > 0).sum() > 90


def test_what_is_not_finite_is_named():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    network[0].bias.data[2] = math.nan
    with (
        pytest.raises(WanlabError, match="input of 1 is not finite"),
        Observer(network, ("0", "1")).watching(),
    ):
        network(torch.ones(1, 4))


def test_layers_that_read_one_tensor_share_its_count():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            out = self.a(x) + self.b(x)
            x.mul_(10)
            return out + self.c(x)

    network = Two()
    observer = Observer(network, ("a", "b", "c"))
    with torch.no_grad(), observer.watching():
        network(torch.ones(1, 4))
        observer.end_call()
        network(torch.full((1, 4), 0.5))
        observer.end_call()
    assert observer.call_amax == {"a": [1.0, 0.5], "b": [1.0, 0.5], "c": [10.0, 5.0]}
    assert {name: int(h.counts.sum()) for name, h in observer.histograms.items()} == {"a": 8, "b": 8, "c": 8}
    assert not network.a._forward_pre_hooks


# ---- calibration


def test_ranges_are_those_of_all_calls(model, recording, calibration):
    network, seen = model.component("expert_high"), {}

    def note(name):
        def hook(module, args):
            seen.setdefault(name, []).append(float(args[0].abs().max()))

        return hook

    names = ("blocks.0.attn1.to_q", "blocks.5.ffn.net.2", "blocks.3.attn2.to_v")
    handles = [network.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        for call in recording.of("expert_high"):
            network(**recording.inputs(call), return_dict=False)
    for handle in handles:
        handle.remove()
    largest = calibration.with_method("max")
    for name in names:
        assert largest.amax[name] == max(seen[name])
        assert calibration.call_amax[name] == tuple(seen[name])
        assert 0.5 * max(seen[name]) < calibration.amax[name] <= max(seen[name])
    assert calibration.amax["blocks.0.attn1.to_q"] == calibration.amax["blocks.0.attn1.to_k"]
    drift = calibration.drift()
    assert len(drift) == len(calibration.layers) * len(recording.of("expert_high"))
    assert set(drift["branch"]) == {"cond", "uncond"}
    table = calibration.frame().set_index("layer")
    assert (table["clipped_percent"] < 0.1).all()
    assert (table["amax"] == table["percentile"]).all()
    assert (table["max"] >= table[["percentile", "entropy"]].max(axis=1)).all()


def test_every_expert_has_ranges_of_its_own(model, recording, calibration):
    low = precision.calibrate(model, "expert_low", recording, layers=FEW, progress=False)
    assert low.key != calibration.key
    assert all(low.amax[layer] != calibration.amax[layer] for layer in low.layers)


def test_another_models_recording_is_refused(model, recording):

    other = structs.replace(recording, model="wan2.2-ti2v-5b")
    with pytest.raises(WanlabError, match="recorded with wan2"):
        precision.calibrate(model, "expert_high", other, progress=False)


# ---- cache


@pytest.fixture
def cached(model, recording, tmp_path):
    """Calls of `calibrate` with one cache, and how often the expert ran."""
    runs = []
    network = model.component("expert_high")
    handle = network.register_forward_pre_hook(lambda *_: runs.append(1))

    def call(recording=recording, layers=FEW, **more):
        return precision.calibrate(
            model,
            "expert_high",
            recording,
            layers=layers,
            cache=tmp_path / "a.json",
            progress=False,
            **more,
        )

    call.runs, call.path = runs, tmp_path / "a.json"
    call()
    runs.clear()
    yield call
    handle.remove()


def test_a_cache_that_fits_is_reused(cached):
    again = cached()
    assert again.cached
    assert not cached.runs
    fresh = cached(force=True)
    assert cached.runs
    assert not fresh.cached
    assert (again.amax, again.calls, again.call_amax) == (fresh.amax, fresh.calls, fresh.call_amax)
    assert again.key == fresh.key
    for layer, histogram in again.histograms.items():
        assert torch.equal(histogram.counts, fresh.histograms[layer].counts)
    read = precision.read_calibration(cached.path)
    assert read.with_method("max").amax == fresh.with_method("max").amax


REFUSED = {
    "layers": (
        dict(layers="blocks.0.attn1.to_[qk]"),
        r"layer set \(3 fewer, e.g. without blocks.0.attn1.to_v",
    ),
    "method": (dict(method="entropy"), r"another method \(percentile, 99.99 there, entropy, 128 here\)"),
    "percentile": (dict(percentile=99.9), r"percentile, 99.99 there, percentile, 99.9 here"),
    "elements": (dict(elements=1000), "number of counted values"),
}


@pytest.mark.parametrize("changed", REFUSED)
def test_a_cache_for_something_else_is_refused_with_the_reason(cached, changed):
    arguments, reason = REFUSED[changed]
    before = cached.path.read_bytes()
    with pytest.raises(WanlabError, match=reason) as refusal:
        cached(**arguments)
    assert "delete it, give another path, or calibrate with force=True" in str(refusal.value)
    assert not cached.runs
    assert cached.path.read_bytes() == before
    assert not cached(force=True, **arguments).cached
    assert cached(**arguments).cached


def test_a_cache_of_other_data_is_refused(cached, recording):
    with pytest.raises(WanlabError, match="other data"):
        cached(recording=recording.only(branch="cond"))


def test_a_cache_of_other_weights_is_refused(cached, model):
    bias = model.component("expert_high").proj_out.bias
    before = bias.data.clone()
    try:
        bias.data[0] += 1e-3
        with pytest.raises(WanlabError, match="other weights"):
            cached()
    finally:
        bias.data.copy_(before)
    assert cached().cached


def test_a_cache_of_another_version_is_refused(cached, monkeypatch):
    monkeypatch.setattr("wanlab.__version__", "9.9")
    with pytest.raises(WanlabError, match=r"wanlab version \(.* there, 9.9 here\)"):
        cached()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edited(path):
    data = json.loads(path.read_text())
    data["layers"][0]["amax"] *= 2
    path.write_text(json.dumps(data))


DAMAGES = {
    "json cut": lambda path: _cut(path),
    "json edited": _edited,
    "json of something else": lambda path: path.write_text("[]"),
    "tensors cut": lambda path: _cut(path.with_suffix(".safetensors")),
    "tensors gone": lambda path: path.with_suffix(".safetensors").unlink(),
    "another format": lambda path: path.write_text('{"format": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_cache_is_refused(cached, damage):
    DAMAGES[damage](cached.path)
    with pytest.raises(WanlabError, match="force=True"):
        cached()
    assert not cached.runs
    assert not cached(force=True).cached
    assert cached().cached


@pytest.mark.parametrize("method", ["percentile", "max"])
def test_a_range_that_its_histogram_does_not_give_is_refused_also_under_a_new_seal(tmp_path, method):
    histogram = histogram_of(torch.linspace(-3, 3, 1000))
    identity = Identity("m", "expert_high", "w", "d", "l", Method(method).to_dict(), 100, "1")
    ranges = {"blocks.0": Method(method).amax(histogram)}
    calibration = Calibration(identity, ranges, {"blocks.0": histogram}, (), {"blocks.0": ()})
    path = tmp_path / "c.json"
    write(path, calibration)
    assert precision.read_calibration(path).amax == ranges
    cache = CalibrationCache.read(path)
    layers = (structs.replace(cache.layers[0], amax=1.5),)
    structs.replace(cache, layers=layers).write()
    with pytest.raises(
        WanlabError, match=r"the range of blocks.0 is 1.5, its histogram gives .*; it was changed"
    ):
        precision.read_calibration(path)
    assert replace(calibration, amax={"blocks.0": 1.5}).key != calibration.key


def test_a_cache_has_its_own_ending(cached, model, recording, tmp_path):
    with pytest.raises(WanlabError, match=r"end in .json"):
        precision.calibrate(
            model, "expert_high", recording, layers="proj_out", cache=tmp_path / "b.bin", progress=False
        )
    with pytest.raises(WanlabError, match="no calibration cache"):
        precision.read_calibration(tmp_path / "c.json")


def test_examples_leave_flat_photographs_out():
    names = [example.name.split()[0] for example in precision.nano_examples(12)]
    assert len(set(names)) >= 9
    assert not {"cell.png", "moon.png", "retina.jpg"} & set(names)
    with pytest.raises(WanlabError, match=r"cell.png is too flat"):
        heldout.draw_cases(1, photographs=["cell.png"])
