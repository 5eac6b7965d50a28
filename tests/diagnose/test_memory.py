"""Memory: rows that add up to the peak, blocks with their owners, options that leave the model as it was."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diagnose_traces import event, trace_of

from wanlab import diagnose, models, plots
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout

TINY = dict(height=64, width=64, frames=5, steps=2, seed=0)
MIB = 1 << 20


def ranged(name, start, time):
    return event(name, start, time, "user_annotation")


class Allocator:
    """Writes the events of an allocator on a GPU that held something before."""

    def __init__(self, before: int, reserved: int) -> None:
        self.total, self.reserved, self.sizes, self.events = before, reserved, {}, []

    def take(self, at: float, address: int, size: int) -> None:
        self.sizes[address] = size
        self._note(at, address, size)

    def give(self, at: float, address: int) -> None:
        self._note(at, address, -self.sizes.pop(address))

    def _note(self, at: float, address: int, size: int) -> None:
        self.total += size
        args = {
            "Bytes": size, "Total Allocated": self.total, "Total Reserved": self.reserved, "Device Type": 1,
            "Device Id": 0, "Addr": address,
        }  # fmt: skip
        self.events.append(
            {
                "ph": "i",
                "cat": "cpu_instant_event",
                "name": "[memory]",
                "pid": 1,
                "tid": 1,
                "ts": at,
                "args": args,
            }
        )


def test_a_peak_is_told_apart_and_adds_up(tmp_path):
    memory = Allocator(before=110 * MIB, reserved=200 * MIB)
    memory.take(5, 1, 3 * MIB)  # the text embedding, kept
    memory.take(6, 2, 7 * MIB)  # the encoder's own, given back
    memory.give(9, 2)
    memory.take(31, 3, 20 * MIB)  # an activation
    memory.take(41, 4, 30 * MIB)  # a workspace of the product from 40 to 50
    memory.give(49, 4)
    memory.give(80, 3)
    memory.give(95, 1)
    trace = trace_of(
        tmp_path,
        ranged("text_encoder", 0, 10),
        ranged("expert_low", 30, 40),
        event("aten::silu", 30, 5),
        event("aten::linear", 40, 10),
        event("aten::addmm", 40, 10),
        event("aten::empty", 40.5, 2),
        event("aten::cat", 90, 10),
        *memory.events,
        wanlab={"weights_bytes": {"transformer": 60 * MIB, "transformer_2": 40 * MIB}},
    )
    account = diagnose.memory_account(trace)
    parts = {(r.part, r.component): r.size_bytes // MIB for r in account.frame.itertuples()}
    assert parts == {
        ("weights", "expert_high"): 60,
        ("weights", "expert_low"): 40,
        ("workspace", "expert_low"): 30,
        ("activations", "expert_low"): 20,
        ("text_embedding", "text_encoder"): 3,
        ("other", "outside"): 10,
        ("fragmentation", "outside"): 200 - 163,
    }
    assert account.peak_bytes == 200 * MIB
    top = account.blocks.iloc[0]
    assert (top["size_mib"], top["range"], top["operator"]) == (30, "expert_low", "aten::addmm")
    assert account.row()["weights_gib"] == pytest.approx(100 / 1024)
    assert account.churn["allocations"].sum() == 4


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_allocated_adds_up(tmp_path_factory, data):
    memory = Allocator(before=data.draw(st.integers(0, 50)) * MIB, reserved=10_000 * MIB)
    alive, most = [], 0
    for at in range(data.draw(st.integers(1, 30))):
        if alive and data.draw(st.booleans()):
            memory.give(at, alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        else:
            alive.append(at + 1)
            memory.take(at, at + 1, data.draw(st.integers(1, 100)) * MIB)
        most = max(most, memory.total)
    trace = trace_of(tmp_path_factory.mktemp("t"), ranged("expert", 0, 40), *memory.events)
    account = diagnose.memory_account(trace)
    assert account.frame["size_bytes"].sum() == account.peak_bytes == 10_000 * MIB
    assert account.size_bytes("fragmentation") == 10_000 * MIB - most
    held = account.timeline.drop(columns="time_ms").sum(axis="columns")
    assert held.max() == pytest.approx(most)


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano")


@pytest.fixture(scope="module")
def captured(nano, tmp_path_factory):
    case = heldout.example_case()
    folder = tmp_path_factory.mktemp("t")
    return diagnose.read_trace(
        diagnose.capture(nano, case.truth()[0], case.caption, folder, memory=True, **TINY)
    )


def test_a_real_generation_is_explained(captured):
    account = diagnose.memory_account(captured)
    assert account.frame["size_bytes"].sum() == account.peak_bytes
    assert account.size_bytes("weights") == sum(captured.generation["weights_bytes"].values())
    # The convolution of the VAE's decoder unfolds its input.
    assert account.blocks.iloc[0]["component"] == "vae_decoder"
    assert account.blocks.iloc[0]["operator"] == "aten::slow_conv3d_forward"
    assert 0 < account.size_bytes("text_embedding") < MIB
    held = account.timeline.drop(columns="time_ms").sum(axis="columns")
    assert held.max() == pytest.approx(account.peak_bytes)
    assert len(account.timeline) <= 2000
    assert any("fragmentation" in note for note in account.notes)
    assert "sum" in plots.memory_bars(account).layout.xaxis.title.text
    assert len(plots.memory_timeline(account).data) >= 5


def test_recorded_peaks_of_large_models(root):
    account = diagnose.memory_account(
        diagnose.read_trace(root / "data/traces/wan2.2-i2v-a14b.pt.trace.json.gz")
    )
    assert account.device == "cuda:0"
    assert account.frame["size_bytes"].sum() == account.peak_bytes
    row = account.row()
    assert 84 < row["peak_gib"] < 86
    assert 64 < row["weights_gib"] < 65
    assert abs(row["other_gib"]) < 0.6
    assert account.blocks["component"].value_counts().idxmax() == "vae_decoder"


def test_a_trace_without_allocations_says_how_to_get_them(tmp_path):
    with pytest.raises(WanlabError, match="memory=True"):
        diagnose.memory_account(trace_of(tmp_path, event("aten::mm", 0, 5)))


@pytest.mark.slow
def unknown_totals(tmp_path, which=slice(None), **content):
    """10 MiB are taken, 4 released that were there before the trace, 20 taken; some totals are -1."""
    memory = Allocator(before=110 * MIB, reserved=200 * MIB)
    memory.sizes[9] = 4 * MIB
    memory.take(5, 1, 10 * MIB)
    memory.give(10, 9)
    memory.take(20, 2, 20 * MIB)
    for item in memory.events[which]:
        item["args"] |= {"Total Allocated": -1, "Total Reserved": -1}
    return trace_of(tmp_path, event("aten::mm", 0, 100), *memory.events, **content)


def test_totals_that_were_not_recorded_are_summed_from_the_bytes(tmp_path):
    account = diagnose.memory_account(unknown_totals(tmp_path))
    assert account.lower_bound
    assert account.peak_bytes == 26 * MIB
    assert account.size_bytes("fragmentation") == 0
    assert account.frame["size_bytes"].sum() == account.peak_bytes
    assert account.headline.startswith(
        "The peak is at least 26 MiB on the GPU, without what was there before the trace, and "
    )
    assert account.tiles[0] == ("peak memory", "26 MiB", "allocated in one generation")
    # A part of the peak says nothing about how full the device is.
    assert not any(
        name.startswith("memory.") for name in diagnose.traced_measurements(unknown_totals(tmp_path))
    )
    noted = diagnose.memory_account(
        unknown_totals(tmp_path, wanlab={"weights_bytes": {"transformer": 96 * MIB}})
    )
    assert (noted.lower_bound, noted.peak_bytes) == (False, (96 + 26) * MIB)
    assert noted.size_bytes("weights") == 96 * MIB


def test_single_missing_totals_go_on_from_the_last_known(tmp_path):
    account = diagnose.memory_account(unknown_totals(tmp_path, slice(1, None)))
    assert not account.lower_bound
    assert account.peak_bytes == (110 + 26) * MIB
    assert "reserved memory was not recorded: fragmentation is unknown" in account.notes


def test_accelerators_of_other_makers_have_memory_too(tmp_path):
    memory = Allocator(before=0, reserved=64 * MIB)
    memory.take(5, 1, 10 * MIB)
    memory.events[0]["args"]["Device Type"] = 12
    assert diagnose.memory_account(trace_of(tmp_path, event("a", 0, 9), *memory.events)).device == "xpu:0"


def test_options_are_measured_and_let_go(nano):
    case = heldout.example_case()
    vae, attention = nano.pipeline.vae, torch.nn.functional.scaled_dot_product_attention
    before = {name: value for name, value in vars(vae).items() if "til" in name}
    weights = {name: tensor.clone() for name, tensor in nano.component("expert_low").state_dict().items()}
    table = diagnose.memory_options(nano, case.truth()[0], case.caption, progress=False, **TINY).set_index(
        "option"
    )
    assert {name: value for name, value in vars(vae).items() if "til" in name} == before
    assert torch.nn.functional.scaled_dot_product_attention is attention
    for name, tensor in nano.component("expert_low").state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert table.loc["untouched again", "psnr_db"] == math.inf
    assert table.loc["VAE tiling", "saves"]
    assert table.loc["VAE tiling", "psnr_db"] < 60
    half = table.loc["bfloat16 weights"]
    assert half["saved_gib"] > 0.4 * table.loc["untouched", "peak_gib"]
    assert not table.loc["attention in query slices", "psnr_db"] < 80
    assert "GPU" in table.loc["expert offload", "reason"]
    assert np.isnan(table.loc["expert offload", "saved_gib"])
    assert len(plots.memory_option_bars(table.reset_index()).data[0].x) == 3
    with pytest.raises(WanlabError, match="no option"):
        plots.memory_option_bars(table.reset_index().head(2))


def option(name: str, saved_gib: float, psnr_db: float = 40.0) -> dict:
    """A row of `memory_options` that saves more than the noise, or does not."""
    return {"option": name, "saved_gib": saved_gib, "noise_gib": 0.002, "saves": saved_gib > 0.002} | {
        "time_ratio": 1.5, "noise_percent": 3.0, "psnr_db": psnr_db,
    }  # fmt: skip


def test_the_answer_names_the_option_that_saves_most_and_what_it_costs(tmp_path):
    account = diagnose.memory_account(unknown_totals(tmp_path))
    table = pd.DataFrame([option("tiles", 0.25, float("inf")), option("slices", 0.1)])
    found = diagnose.memory_answer(account, table, "A caveat.")
    assert found.headline.endswith(
        "Tiles would lower it most, by 256 MiB; two equal runs differ by 2.05 MiB."
    )
    assert found.details == (
        "A caveat.",
        "With tiles a video takes 1.50 times as long (equal runs differ by 3 %). It gives the same video, bit by bit.",
    )
    assert found.tiles[1] == ("saved by tiles", "256 MiB", "two equal runs differ by 2.05 MiB")
    assert found.next.notebook == "15_triage"


def test_options_within_the_noise_are_not_recommended(tmp_path):
    account = diagnose.memory_account(unknown_totals(tmp_path))
    found = diagnose.memory_answer(account, pd.DataFrame([option("tiles", 0.001)]))
    assert found.headline.endswith("No option that was tried lowers it: two equal runs differ by 2.05 MiB.")
    assert diagnose.memory_answer(account).next.notebook == "14_memory"
