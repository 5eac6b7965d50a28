"""What flows between the parts, and the cost of a switch: weights come back byte for byte, samples become a table."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models_tiny import save

from wanlab import diagnose, models, plots
from wanlab.core.errors import WanlabError
from wanlab.diagnose.experts.switching import SwitchCost, expert_inputs
from wanlab.measure import Samples
from wanlab.models.weights import ALIGNMENT_BYTES, CHUNK_BYTES, _places, check_host_room, host_weights

TINY = dict(height=16, width=32, frames=5)
PHOTO = np.full((40, 50, 3), 0.5, dtype=np.float32)
module = sys.modules[SwitchCost.__module__]
SERIES = (
    "pageable", "pageable again", "pinned", "pinned again", "after switch", "later", "later again",
    "alone", "alone again", "beside transfer", "beside transfer, both", "transfer beside forward",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.load(str(save(tmp_path_factory.mktemp("tiny"))), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("single"), transformer_2=None, boundary_ratio=None)
    return models.load(str(folder), device="cpu", dtype="float32")


def cost_of(size_bytes=28_600_000_000, **series) -> SwitchCost:
    samples = {name: Samples(name, tuple(values)) for name, values in series.items()}
    return SwitchCost(samples, size_bytes, 5_000.0, 600.0, "NVIDIA H200", {"model": "wan2.2-i2v-a14b"})


def measured(**more) -> SwitchCost:
    """A transfer of 520 ms beside a forward of 12 s that it slows by 1 %, and half of it hidden behind nothing else."""
    series = {
        "pageable": [1400, 1420], "pageable again": [1410, 1430], "pinned": [520, 521], "pinned again": [522, 519],
        "after switch": [12_003, 11_999], "later": [12_000, 12_004], "later again": [12_002, 12_001],
        "alone": [12_000, 12_010], "alone again": [12_004, 12_006], "beside transfer": [12_122, 12_128],
        "beside transfer, both": [12_132, 12_138], "transfer beside forward": [560, 562],
    }  # fmt: skip
    return cost_of(**series | more)


def test_table_from_samples():
    frame = measured().frame.set_index("way")
    assert frame.index.tolist() == ["resident", "pageable", "pinned", "prefetched"]
    assert frame.loc["pageable", "time_ms"] == pytest.approx(1415)
    assert frame.loc["pinned", "gb_per_s"] == pytest.approx(28.6 / 0.5205, rel=1e-3)
    assert frame.loc["resident", "time_ms"] == pytest.approx((2 - 3.5) / 2)
    assert abs(frame.loc["resident", "time_ms"]) < frame.loc["resident", "noise_ms"]
    assert frame.loc["resident", "transfer_ms"] is None or np.isnan(frame.loc["resident", "transfer_ms"])
    assert frame.loc["prefetched", "time_ms"] == pytest.approx(130)
    assert frame.loc["prefetched", "hidden_percent"] == pytest.approx(100 * (1 - 130 / 520.5))
    assert frame.loc["prefetched", "slowdown_percent"] == pytest.approx(1, abs=0.01)
    assert frame.loc["prefetched", "transfer_ms"] == 561
    assert frame["experts_on_gpu"].tolist() == [2, 1, 1, 2]
    row = measured().row()
    assert row["switch_pinned_ms"] == pytest.approx(520.5)
    assert row["switch_device"] == "NVIDIA H200"
    assert "hides 75 %" in str(measured())


@given(data=st.data(), rounds=st.integers(1, 5))
def test_any_samples_give_a_sound_table(data, rounds):
    number = st.floats(0.001, 1e6)
    series = {name: data.draw(st.lists(number, min_size=rounds, max_size=rounds)) for name in SERIES}
    frame = cost_of(**series).frame.set_index("way")
    assert len(frame) == 4
    assert frame["hidden_percent"].dropna().between(0, 100).all()
    assert (frame["noise_ms"] >= 0).all()
    assert frame["time_ms"].notna().all()
    pairs = zip(series["pinned"], series["pinned again"], strict=True)
    assert frame.loc["pinned", "noise_ms"] == pytest.approx(max(abs(a - b) for a, b in pairs))


def test_a_part_of_the_ways_is_a_part_of_the_table():
    cost = cost_of(pinned=[3.0], **{"pinned again": [3.1]})
    assert cost.frame["way"].tolist() == ["pinned"]
    assert "switch_prefetched_ms" not in cost.row()
    assert cost_of().frame.empty
    assert cost_of().row() == {}
    with pytest.raises(WanlabError, match="no switch to draw"):
        plots.switch_bars(cost_of())


def test_saved_and_read_back(tmp_path):
    path = tmp_path / "deep" / "switch.json"
    measured().save(path, environment={"gpu": "H200"})
    assert json.loads(path.read_text())["environment"] == {"gpu": "H200"}
    read = SwitchCost.read(path)
    assert read.frame.equals(measured().frame)
    assert read.source == "recorded in switch.json"
    assert read.sentence == (
        "On another machine (NVIDIA H200) a switch of wan2.2-i2v-a14b costs nothing that can be told from noise with both"
        " experts in GPU memory (noise 3 ms) and 1.42 s from ordinary host memory (noise 10 ms)"
    )
    assert str(read).startswith("on another machine ")
    assert "measured here" in measured().sentence
    text = plots.switch_bars(read).to_json()
    assert "75 % hidden" in text
    assert "within noise" in text
    assert "another machine" in text
    assert "both in GPU memory" in read.shown["way"].tolist()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"samples": {"a": 3}}', '{"samples": {"a": {}}}'])
def test_a_broken_record_is_refused(tmp_path, tiny, content):
    path = tmp_path / "switch.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(WanlabError, match=r"switch\.json holds no measured switch"):
        diagnose.switching(tiny, str(path))


def test_without_a_gpu_it_is_recorded_or_said_to_be_missing(tiny, tmp_path, monkeypatch):
    with pytest.raises(WanlabError, match="device='cuda'"):
        diagnose.switch_cost(tiny)
    monkeypatch.setattr(module, "RECORDED", tmp_path / "h200.json")
    assert diagnose.switching(tiny).frame.empty
    assert "takes a GPU" in str(diagnose.switching(tiny))
    measured().save(tmp_path / "h200.json")
    assert "recorded in h200.json" in str(diagnose.switching(tiny))


def test_the_record_that_comes_with_the_project_holds():
    if not module.RECORDED.is_file():
        pytest.skip("no recorded measurement in this copy")
    cost = SwitchCost.read(module.RECORDED)
    assert cost.frame["way"].tolist() == list(module.WAYS)
    assert all(s.n >= 2 for s in cost.samples.values())


def test_one_expert_has_nothing_to_switch(single):
    assert "one expert" in diagnose.switching(single).note
    with pytest.raises(WanlabError, match="one expert"):
        diagnose.switch_cost(single)


def test_an_engine_keeps_its_weights(tiny):
    import copy
    import dataclasses

    pipeline = copy.copy(tiny.pipeline)
    pipeline.transformer_2 = torch.nn.Identity()
    with pytest.raises(WanlabError, match="load it eager"):
        diagnose.switch_cost(dataclasses.replace(tiny, pipeline=pipeline))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_byte_for_byte(tiny, dtype, fails):
    model = models.load(tiny.spec.source, device="cpu", dtype=dtype, components=("expert_low",))
    network = model.component("expert_low")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    addresses = [p.data_ptr() for p in network.parameters()]
    try:
        with host_weights(network, pinned=False) as host:
            assert len(host.pairs) == len(before)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(7.0)
            host.refill()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert [p.data_ptr() for p in network.parameters()] == addresses
    assert host.pairs == []  # the copy is let go


@given(sizes=st.lists(st.integers(0, 3 * CHUNK_BYTES // 2), min_size=1, max_size=60))
def test_places_are_apart_aligned_and_inside(sizes):
    places, chunks = _places(sizes)
    ends = [(chunk, start, start + size) for (chunk, start), size in zip(places, sizes, strict=True)]
    for (chunk, _, end), (after, start, _) in itertools.pairwise(ends):
        assert (after, start) >= (chunk, end) or after > chunk
    assert all(start % ALIGNMENT_BYTES == 0 and end <= chunks[chunk] for chunk, start, end in ends)
    most = max(CHUNK_BYTES, max(sizes) + ALIGNMENT_BYTES)
    assert max(chunks) <= most
    assert sum(chunks) <= sum(sizes) + len(sizes) * ALIGNMENT_BYTES


def test_too_little_host_memory_is_said_with_both_figures():
    with pytest.raises(WanlabError, match=r"needs 93132\d\.\d GiB .* GiB are free"):
        check_host_room("model", 10**15)
    check_host_room("model", 1)


def test_a_network_without_weights_has_none_on_the_host():
    with pytest.raises(WanlabError, match="no weights"), host_weights(torch.nn.Identity(), pinned=False):
        pass


def test_inputs_are_those_of_the_pipeline(tiny):
    seen = {}
    network = tiny.component("expert_high")
    handle = network.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    tiny.generate(PHOTO, "a", steps=1, guidance_scale=1.0, output="latent", **TINY)
    handle.remove()
    ours = expert_inputs(tiny, **TINY)
    for name in ("hidden_states", "timestep"):
        assert ours[name].shape == seen[name].shape
        assert ours[name].dtype == seen[name].dtype
    assert ours["encoder_hidden_states"].shape[::2] == seen["encoder_hidden_states"].shape[::2]
    with torch.no_grad():
        assert network(**ours)[0].shape[1] == 4
    assert torch.equal(expert_inputs(tiny, **TINY)["hidden_states"], ours["hidden_states"])


def test_flow_has_the_shapes_of_a_real_call(tiny):
    flow = diagnose.data_flow(tiny, PHOTO, "a", steps=10, **TINY)
    edges = {(e.source, e.target): e.shape for e in flow.edges.itertuples()}
    assert edges["image", "vae_encoder"] == "1x3x5x16x32"
    assert edges["boundary", "expert_low"] == "1x12x2x4x8"
    assert edges["expert_high", "scheduler"] == edges["noise", "boundary"] == "1x4x2x4x8"
    assert edges["scheduler", "boundary"] == edges["scheduler", "vae_decoder"] == "1x4x2x4x8"
    assert edges["vae_decoder", "video"] == "1x3x5x16x32"
    assert edges["text_encoder", "boundary"] == "1x24x16"
    nodes = flow.nodes.set_index("node")
    low = tiny.component("expert_low")
    assert nodes.loc["expert_low", "class_name"] == "WanTransformer3DModel"
    assert nodes.loc["expert_low", "parameters"] == sum(p.numel() for p in low.parameters())
    assert nodes.loc["expert_low", "size_bytes"] == 4 * nodes.loc["expert_low", "parameters"]
    halves = nodes.loc[["vae_encoder", "vae_decoder"], "parameters"].sum()
    assert halves == sum(p.numel() for p in tiny.pipeline.vae.parameters())
    assert nodes.loc["boundary", "kind"] == "decision"
    assert nodes.loc[["expert_high", "expert_low"], "steps"].sum() == 10
    assert not isinstance(vars(tiny.pipeline)["vae"], type(None))
    assert type(vars(tiny.pipeline)["vae"]).__name__ == "AutoencoderKLWan"  # no stand-in is left
    text = plots.expert_diagram(flow).to_json()
    for word in ("high-noise expert", "WanTransformer3DModel", "900", "yes: ", "no: "):
        assert text.count(word) >= 2  # in the picture of a screen, and in the upright one of a phone


def test_flow_of_one_expert_has_no_decision(single):
    flow = diagnose.data_flow(single, PHOTO, "a", steps=3, **TINY)
    assert "decision" not in set(flow.nodes["kind"])
    assert ("scheduler", "expert") in set(zip(flow.edges["source"], flow.edges["target"], strict=True))
    assert "3 of 3 steps" in plots.expert_diagram(flow).to_json()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_switch_on_a_gpu_leaves_the_model_as_it_was():
    model = models.load("wan-nano", device="cuda")
    before = [p.detach().clone() for p in model.component("expert_low").parameters()]
    cost = diagnose.switch_cost(model, samples=2, progress=False)
    assert cost.frame["way"].tolist() == list(module.WAYS)
    assert all(samples.n == 2 for samples in cost.samples.values())
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.component("expert_low").parameters(), strict=True)
    )
