"""The traces of large models on a real GPU that come with the project."""

from __future__ import annotations

import shutil

import pytest

from wanlab import diagnose, measure
from wanlab.core.errors import WanlabError

NAMES = ("wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "wan2.2-ti2v-5b-compiled")


@pytest.fixture(scope="module")
def recorded(root):
    return {
        name: diagnose.read_trace(root / "data" / "traces" / f"{name}.pt.trace.json.gz") for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_closes_on_the_wall_clock(recorded, name):
    trace = recorded[name]
    assert trace.path.stat().st_size <= 3e6
    found = diagnose.breakdown(trace)
    assert abs(found.residual_percent) < 1
    assert found.gpu["busy_percent"] > 80
    flame = diagnose.gpu_flame(trace)
    assert flame.total_us == pytest.approx(trace.kernels["time_us"].sum(), rel=1e-6)


def test_attention_of_a14b_beside_its_arithmetic(recorded):
    """72 % of the operations at 720p are attention's; the time is measured."""
    experts = diagnose.breakdown(recorded["wan2.2-i2v-a14b"]).experts().set_index(["component", "category"])
    for component in ("expert_high", "expert_low"):
        row = experts.loc[(component, "self_attention")]
        assert row["flop_percent"] == pytest.approx(72, abs=0.5)
        assert 60 < row["share_percent"] < 75


def test_no_row_beats_the_ceilings(recorded):
    for name in NAMES:
        trace = recorded[name]
        table = diagnose.bounds(diagnose.breakdown(trace), measure.recorded_ceilings(trace.device_name))
        shares = table.set_index("category")["of_roofline_percent"]
        # Products run at what a large product reaches, give or take the clock of the day.
        assert 90 < shares["linear"] < 105
        assert (shares.drop("linear").dropna() < 105).all()


def test_compiled_blocks_save_what_stands_between_the_products(recorded):
    before, after = (diagnose.breakdown(recorded[name]) for name in NAMES[1:])
    changed = diagnose.difference(before, after)
    assert changed.frame["path"].iloc[0] == ("norm_modulation_rotary",)
    assert changed.frame["change_us"].sum() == pytest.approx(changed.change_us)
    by_name = diagnose.difference(*(diagnose.gpu_flame(recorded[name]) for name in NAMES[1:]), by="name")
    assert by_name.change_us == pytest.approx(changed.change_us)
    assert len(by_name.of("new")) > 3


def test_a_replayed_cuda_graph_is_told_by_its_kernels(root):
    """Three replays of a wan-nano forward on an H200: no operator says what a kernel is."""
    trace = diagnose.read_trace(root / "tests" / "fixtures" / "traces" / "cuda_graph.pt.trace.json.gz")
    assert any("CUDA graphs" in note for note in trace.notes)
    found = diagnose.breakdown(trace)
    assert found.frame["time_ms"].sum() == pytest.approx(trace.wall_us / 1e3)
    calls = found.frame.set_index("category")["calls"]
    # Six blocks with two attentions each, three times; PyTorch names no module inside a graph.
    assert calls["self_attention"] == 3 * 6 * 2
    assert calls["linear"] > 100
    assert diagnose.gpu_flame(trace).paths()[1] == ("expert_low",)


def test_one_trace_per_rank_is_read_as_the_lowest_rank(root, tmp_path):
    """wan-nano on two H200s, which average their predictions through NCCL."""
    folder = root / "tests" / "fixtures" / "traces" / "ranks"
    trace = diagnose.read_trace(folder)
    assert (trace.rank, trace.path.name) == (0, "rank0.pt.trace.json.gz")
    assert any("rank 0 of 2" in note and "rank 1 " in note for note in trace.notes)
    found = diagnose.breakdown(trace)
    assert abs(found.residual_percent) < 1
    assert found.share_percent("communication") > 10
    one = diagnose.read_trace(folder / "rank1.pt.trace.json.gz")
    assert any("one rank of 2" in note for note in one.notes)
    for name in ("a.json.gz", "b.json.gz"):
        shutil.copy(one.path, tmp_path / name)
    with pytest.raises(WanlabError, match="not one per rank"):
        diagnose.read_trace(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanlabError, match="no traces"):
        diagnose.read_trace(tmp_path / "empty")
