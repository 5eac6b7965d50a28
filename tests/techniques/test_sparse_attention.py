"""Sparse attention: its blocks, its kernels on the same lists, and faults that the proof has to see."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from wanlab import configuration, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques.attention import blocks, sparse
from wanlab.techniques.attention.errors import exact_attention
from wanlab.techniques.attention.kernels import KERNELS

CHOSEN = {"pattern": "window", "block": 4, "density": 0.6, "dense_percent": 25, "dense_blocks": 1}
"""Of a video of 48 tokens: blocks of 128 would be one."""


def drawn(tokens, heads=2, size=16):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, heads, size, generator=draw) for _ in range(3)]


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))


@hypothesis_settings(deadline=None, max_examples=60)
@given(GRIDS, st.sampled_from([4, 16, 128]), st.integers(0, 9), st.integers(0, 9))
def test_a_window_keeps_every_near_token_and_the_picture(grid, block, frames, rows):
    table = blocks.window_table(grid, block, frames, rows)
    kept = table.of_tokens()
    token = torch.arange(grid[0] * grid[1] * grid[2])
    frame, row = token // (grid[1] * grid[2]), token // grid[2] % grid[1]
    near = (frame[:, None] - frame[None]).abs() <= frames
    near &= (row[:, None] - row[None]).abs() <= rows
    assert kept[near].all()
    assert kept[:, frame == 0].all()
    assert kept.diagonal().all()
    assert 0 < table.density <= 1


@hypothesis_settings(deadline=None, max_examples=40)
@given(GRIDS, st.sampled_from([4, 16, 128]), st.floats(0.05, 3))
def test_a_radial_mask_keeps_neighbours_and_the_picture(grid, block, decay):
    table = blocks.radial_table(grid, block, decay)
    frame = torch.arange(grid[0] * grid[1] * grid[2]) // (grid[1] * grid[2])
    kept = table.of_tokens()
    assert kept[(frame[:, None] - frame[None]).abs() <= 1].all()
    assert kept[:, frame == 0].all()


@pytest.mark.parametrize("pattern", blocks.PATTERNS)
def test_a_pattern_is_as_large_as_a_density_allows(pattern):
    grid = (21, 45, 80)  # A14B at 720x1280x81
    densities = [blocks.table_of_density(pattern, grid, 128, density).density for density in (0.2, 0.3, 0.5)]
    assert densities == sorted(densities)
    for found, wanted in zip(densities, (0.2, 0.3, 0.5), strict=True):
        assert 0.8 * wanted < found <= wanted
    assert blocks.table_of_density(pattern, grid, 128, 1.0).density == 1


def test_farther_frames_see_less_in_a_radial_mask():
    table = blocks.radial_table((17, 16, 16), 64, 1.0)
    kept, per_frame = table.kept.float(), 4
    by_distance = [
        float(kept[8 * per_frame : 9 * per_frame, (8 + d) * per_frame : (9 + d) * per_frame].mean())
        for d in (1, 2, 4, 8)
    ]
    assert by_distance[0] == 1
    assert by_distance == sorted(by_distance, reverse=True)
    assert by_distance[-1] < 0.7


def test_what_is_kept_is_exact():
    table = blocks.window_table((5, 6, 7), 16, 1, 1)
    query, key, value = drawn(table.tokens)
    every = torch.arange(table.tokens)
    expected = exact_attention(query, key, value, every, table.of_tokens())
    output = sparse.masked(query, key, value, table)
    assert torch.allclose(output.double(), expected, atol=1e-5)
    assert not torch.allclose(output.double(), exact_attention(query, key, value, every), atol=1e-2)


def test_lists_of_blocks_for_flex_are_those_of_the_table():
    table = blocks.window_table((9, 6, 40), 128, 1, 1)
    assert table.tokens % 128
    mask = sparse._block_mask(table, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0, 0].bool(), table.kept)
    assert (
        mask.kv_num_blocks.sum() == table.kept[-1].sum() + table.kept[:-1, -1].sum()
    )  # those that end behind the tokens
    numbers = torch.arange(table.tokens)
    assert torch.equal(mask.mask_mod(0, 0, numbers[:, None], numbers[None]), table.of_tokens())


def test_flash_attention_4_is_called_with_whole_blocks_in_rising_order(monkeypatch):
    asked = {}

    def flash_attn_func(query, key, value, block_sparse_tensors=None):
        lists = block_sparse_tensors
        asked["dtypes"] = {each.dtype for each in vars(lists).values() if isinstance(each, torch.Tensor)}
        assert lists.block_size == (128, 128)
        assert int(lists.mask_block_cnt.sum()) == 0
        allowed = torch.zeros(query.shape[1], key.shape[1], dtype=torch.bool)
        for row, count in enumerate(lists.full_block_cnt[0, 0]):
            columns = lists.full_block_idx[0, 0, row, :count]
            assert (columns.diff() > 0).all()
            for column in columns:
                allowed[128 * row : 128 * row + 128, 128 * column : 128 * column + 128] = True
        every = torch.arange(query.shape[1])
        return exact_attention(query, key, value, every, allowed).to(query.dtype), None

    package, cute, lists = (
        ModuleType("flash_attn"),
        ModuleType("flash_attn.cute"),
        ModuleType("block_sparsity"),
    )
    cute.flash_attn_func = flash_attn_func
    lists.BlockSparseTensorsTorch = SimpleNamespace
    for name, module in (("", package), (".cute", cute), (".cute.block_sparsity", lists)):
        monkeypatch.setitem(sys.modules, f"flash_attn{name}", module)
    table = blocks.window_table((9, 6, 40), 128, 1, 1)
    tensors = drawn(table.tokens)
    assert torch.allclose(
        sparse.flash_attention_4(*tensors, table), sparse.masked(*tensors, table), atol=1e-5
    )
    assert asked["dtypes"] == {torch.int32}


def test_the_kernel_is_chosen_by_gpu_and_block(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert sparse.kernel_here(cpu, 128) == "masked"
    monkeypatch.setattr("wanlab.techniques.attention.kernels.importable", lambda module: True)
    chosen = {}
    for capability in ((9, 0), (10, 0), (8, 9), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, has=capability: has)
        chosen[capability] = sparse.kernel_here(gpu, 128, torch.bfloat16, 128)
    assert chosen == {(9, 0): "flash-attention-4", (10, 0): "flex", (8, 9): "flex", (7, 5): "masked"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert sparse.kernel_here(gpu, 16, torch.bfloat16, 128) == "masked"
    reason = sparse.lacks_kernel("flex", gpu, 16, torch.bfloat16, 128)
    assert reason == "blocks of 128 tokens for flex; the setting `block` is 16"


def test_a_generation_counts_its_blocks(bench):
    switched, video = bench.switched_on({"sparse_attention": CHOSEN})
    assert 1e-4 < bench.far(video) < 0.5
    proof = switched.proofs()["sparse_attention"]
    assert proof.passed
    kept, every = int(blocks.table_of_density("window", (2, 4, 6), 4, 0.6).kept.sum()), 12 * 12
    # Of four steps the first is dense, and of six blocks the first: one step of the high-noise expert, two of the other.
    assert f"{10 * kept:,} of {10 * every:,} blocks" in proof.sentence
    assert "in 10 of 24 of the high-noise expert" in proof.sentence
    assert f"{20 * kept:,} of {20 * every:,} blocks" in proof.sentence
    assert "in 20 of 24 of the low-noise expert" in proof.sentence
    assert "by a mask over all scores, which saves nothing" in proof.sentence


def test_a_radial_mask_on_more_frames(bench):
    chosen = {"block": 8, "density": 0.75, "dense_percent": 0, "dense_blocks": 0}
    switched, _ = bench.switched_on({"sparse_attention": chosen}, frames=33)
    proof = switched.proofs()["sparse_attention"]
    assert proof.passed
    (table,) = switched.techniques[0].layer.tables.values()
    assert table.tokens == 9 * 4 * 6
    assert table.density < 0.9


def test_dense_steps_and_blocks_are_left_to_the_kernel_below(bench, tmp_path):
    text = (
        f"name: mine\ntechniques:\n  attention_kernel: {{kernel: sdpa-flash}}\n  sparse_attention: {CHOSEN}\n"
    )
    chosen = configuration.parse_configuration(text.replace("'", ""))
    assert configuration.parse_configuration(chosen.to_yaml()) == chosen
    size = {"height": 64, "width": 96, "frames": 5}
    used = configuration.configure(bench.model, chosen, tmp_path, **size, steps=4, progress=False)
    assert used.effect == "applied"
    assert "14 of 24 of the high-noise expert (sdpa-flash 14)" in used.proof


def test_an_expert_whose_steps_are_all_dense_is_said(bench):
    switched, _ = bench.switched_on({"sparse_attention": CHOSEN | {"dense_percent": 50}})
    proof = switched.proofs()["sparse_attention"]
    assert proof.passed
    assert "none of the high-noise expert, whose steps are dense" in proof.sentence


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"window": [1, 1]}, "window is given and the pattern is radial"),
        ({"pattern": "window", "window": [1, -1]}, r"window is \[1, -1\]; give frames and rows"),
        ({"density": 0}, "Expected `float` > 0"),
        ({"block": 100}, "Invalid enum value 100"),
        ({"kernel": "flex"}, "it needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_is_one_line(bench, chosen, message):
    with pytest.raises(WanlabError, match=message):
        techniques.switch_on(bench.model, {"sparse_attention": chosen})


# Planted faults.


def test_a_mask_that_is_dense_is_seen(bench, monkeypatch):
    switched, video = bench.switched_on({"sparse_attention": CHOSEN | {"block": 128}})
    assert bench.far(video) < 1e-5
    proof = switched.proofs()["sparse_attention"]
    assert (proof.passed, proof.sentence) == (
        False,
        "sparse_attention computed all 10 blocks of the high-noise expert: its mask is dense. Lower the density, or take"
        " smaller blocks than 128 tokens.",
    )
    monkeypatch.setattr(
        blocks,
        "table_of_density",
        lambda pattern, grid, block, density: blocks.window_table(grid, block, 99, 99),
    )
    switched, _ = bench.switched_on({"sparse_attention": CHOSEN})
    assert "its mask is dense" in switched.proofs()["sparse_attention"].sentence


def test_a_kernel_that_ignores_its_mask_is_seen(bench, monkeypatch):
    def ignoring(query, key, value, table):
        return KERNELS["sdpa-flash"].run(query, key, value)

    monkeypatch.setitem(sparse.SPARSE, "masked", ignoring)
    switched, video = bench.switched_on({"sparse_attention": CHOSEN})
    assert (video == bench.video).all()
    proof = switched.proofs()["sparse_attention"]
    assert not proof.passed
    assert "did not follow its mask in the high-noise expert" in proof.sentence


def test_one_expert_only_is_seen(bench):
    switched = techniques.switch_on(bench.model, {"sparse_attention": CHOSEN})
    for site in switched.techniques[0].sites["expert_low"]:
        site.layers.clear()
    bench.generate(switched.model)
    proof = switched.proofs()["sparse_attention"]
    assert (proof.passed, proof.sentence) == (
        False,
        "sparse_attention left 20 attentions of the low-noise expert dense that should be sparse.",
    )


def test_steps_that_are_all_dense_are_no_effect(bench):
    switched, _ = bench.switched_on({"sparse_attention": CHOSEN | {"dense_percent": 100}})
    assert not switched.proofs()["sparse_attention"].passed
