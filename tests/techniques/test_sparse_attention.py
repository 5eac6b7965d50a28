"""Sparse attention: its blocks, its kernels on the same lists, and faults that the proof has to see."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from wanlab import configuration, techniques
from wanlab.core.errors import WanlabError
from wanlab.techniques import Pattern, measured_patterns, sparse_attention
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


# A pattern for each head.


GRID = (5, 4, 6)


def chosen_for(query, key, value, *, grid=GRID, block=4, **asked):
    """What is chosen for heads of which a call is known."""
    tried = measured_patterns.tried_patterns(grid, block)
    tables = [table for _, table in tried]
    losses = measured_patterns.pattern_losses(query, key, value, tables, torch.arange(query.shape[1]))
    names, densities = (
        tuple(pattern for pattern, _ in tried),
        tuple(table.density for table in tables),
    )
    found = measured_patterns.PatternMeasurement(
        "mine", grid, block, names, densities, {("expert_low", 0): losses}
    )
    return found, found.choose(**asked).of("expert_low", 0)


def heads_of_known_kinds():
    """Four heads: each token looks at its own block of four tokens, at the same place in all frames, at its own frame and
    the two beside it, and at everything alike."""
    frames, height, width = GRID
    token = torch.arange(frames * height * width)
    frame, place = token // (height * width), token % (height * width)

    def one_hot(classes):
        return torch.nn.functional.one_hot(classes, 120).float()

    heads = [
        (one_hot(token // 4), one_hot(token // 4)),
        (one_hot(place // 4), one_hot(place // 4)),
        (
            one_hot(frame),
            sum(one_hot((frame + step).clamp(0, frames - 1)) for step in (-1, 0, 1)).clamp_max(1),
        ),
        (torch.zeros(len(token), 120), torch.zeros(len(token), 120)),
    ]
    query, key = (torch.stack([pair[side] for pair in heads], 1)[None] for side in (0, 1))
    value = torch.randn(1, len(token), 4, 120, generator=torch.Generator().manual_seed(0))
    return query * 200, key, value


def test_the_kind_of_a_head_is_found():
    query, key, value = heads_of_known_kinds()
    _, (own, temporal, frames, everywhere) = chosen_for(query, key, value, kept_percent=99.9)
    assert own.pattern.kind == "window"
    assert own.pattern.size == (0, 0)
    assert own.density < 0.1
    assert temporal.pattern.kind == "same_place"
    assert not temporal.pattern.picture
    assert frames.pattern.kind in ("window", "radial")
    assert frames.pattern.size[0] <= 1
    assert frames.density < 0.65
    assert everywhere.pattern == Pattern("dense")
    assert (everywhere.density, everywhere.kept, everywhere.error) == (
        1,
        pytest.approx(1),
        pytest.approx(0, abs=1e-5),
    )


def test_what_is_kept_and_its_error_are_those_of_the_kernel():
    query, key, value = drawn(120, heads=3)
    found, _ = chosen_for(3 * query, key, value, kept_percent=50)
    losses = found.losses["expert_low", 0]
    every = torch.arange(120)
    dense = exact_attention(3 * query, key, value, every)
    weights = torch.einsum("bqhd,bkhd->bhqk", 3 * query, key).div(4).softmax(-1)[0]
    tables = [table for _, table in measured_patterns.tried_patterns(GRID, 4)]
    for index in (0, len(tables) // 2, len(tables) - 1):
        table = tables[index]
        for added, errors in ((False, losses.error), (True, losses.error_added)):
            output = sparse.masked(
                3 * query, key, value, blocks.HeadTable((table,) * 3, (added,) * 3)
            ).double()
            apart = (output - dense).square().sum((0, 1, 3)).sqrt() / dense.square().sum((0, 1, 3)).sqrt()
            assert errors[0, index] == pytest.approx(apart.numpy(), abs=2e-6)
        kept = (weights * table.of_tokens()).sum(-1).mean(-1)
        assert losses.kept[0, index] == pytest.approx(kept.numpy(), abs=1e-5)


def test_means_of_what_is_left_out_are_added_as_the_formula_says():
    query, key, value = drawn(30, heads=2, size=8)
    table = blocks.window_table(
        (5, 2, 3), 4, 0, 0, picture=False
    )  # 8 blocks, of which the last has two tokens
    output = sparse.masked(query, key, value, blocks.HeadTable((table, table), (True, False)))
    for token in (0, 13, 29):
        for head, added in enumerate((True, False)):
            above, below = torch.zeros(8), 0.0
            for number in range(8):
                own = range(4 * number, min(4 * number + 4, 30))
                if table.kept[token // 4, number]:
                    for other in own:
                        weight = (query[0, token, head] @ key[0, other, head] / 8**0.5).exp()
                        above, below = above + weight * value[0, other, head], below + weight
                elif added:
                    mean_key, mean_value = (each[0, list(own), head].mean(0) for each in (key, value))
                    weight = len(own) * (query[0, token, head] @ mean_key / 8**0.5).exp()
                    above, below = above + weight * mean_value, below + weight
            assert torch.allclose(output[0, token, head], above / below, atol=1e-5)


def test_adding_means_lowers_the_error_where_blocks_are_alike_and_is_not_chosen_where_it_does_not():
    draw = torch.Generator().manual_seed(0)
    tokens, size = 120, 16
    own = torch.randn(30, size, generator=draw).repeat_interleave(4, 0)  # the keys of a block are the same
    alike = torch.stack([own, own], 1)[None]
    query = torch.randn(1, tokens, 2, size, generator=draw)
    value = torch.randn(1, tokens, 2, size, generator=draw)
    found, heads = chosen_for(query, alike, value, kept_percent=40)
    losses = found.losses["expert_low", 0]
    assert (losses.error[0, 0] > 0.3).all()
    assert losses.error_added[0, 0] == pytest.approx(0, abs=1e-5)  # the means are exact
    assert all(head.added and head.error < 1e-5 for head in heads)
    assert not any(head.added for head in found.choose(40, add_means=False).heads)
    # Keys of a block that cancel in their mean, while one of them has all the mass.
    signs = torch.tensor([1.0, -1.0] * 60)[None, :, None, None]
    _, heads = chosen_for(
        10 * query, 10 * signs * torch.randn(1, tokens, 2, size, generator=draw), value, kept_percent=40
    )
    assert not any(head.added for head in heads)


def test_means_are_added_to_the_output_of_a_kernel_from_its_sums():
    query, key, value = drawn(50, heads=3)
    tables = tuple(blocks.window_table((5, 2, 5), 8, reach, 0, picture=False) for reach in (0, 1, 2))
    assert tables[2].density < 1
    whole = blocks.HeadTable(tables, (True, False, True))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    sums = scores.masked_fill(~whole.of_tokens()[None], float("-inf")).logsumexp(-1)
    plain = sparse.masked(query, key, value, blocks.HeadTable(tables, (False,) * 3))
    output = sparse.add_means(plain, sums, query, key, value, whole)
    assert torch.allclose(output, sparse.masked(query, key, value, whole), atol=1e-5)
    assert torch.equal(output[:, :, 1], plain[:, :, 1])
    exact = sparse.exact_sparse(query, key, value, torch.arange(50), whole)
    assert torch.allclose(output.double(), exact, atol=1e-5)


def test_lists_of_blocks_of_heads_are_those_of_their_tables(monkeypatch):
    tables = tuple(blocks.window_table((9, 6, 40), 128, reach, 1) for reach in (0, 2, 99))
    whole = blocks.HeadTable(tables, (False,) * 3)
    mask = sparse._block_mask(whole, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0].bool(), torch.stack([table.kept for table in tables]))
    numbers = torch.arange(0, whole.tokens, 37)
    for head in range(3):
        inside = mask.mask_mod(0, torch.tensor(head), numbers[:, None], numbers[None])
        assert torch.equal(inside, whole.of_tokens(numbers)[head][:, numbers])
    counts, orders = sparse._lists(whole, torch.device("cpu"))
    assert (counts.dtype, orders.dtype) == (torch.int32, torch.int32)
    assert counts.shape == orders.shape[:3] == (1, 3, 17)
    for head, table in enumerate(tables):
        assert torch.equal(counts[0, head], table.kept.sum(1).int())


@pytest.fixture(scope="module")
def measured(bench):
    size = {"height": 64, "width": 96, "frames": 17, "steps": 4}
    return techniques.measure_patterns(
        bench.model, block=4, examples=1, calls=1, queries=8, progress=False, **size
    )


LONG = {"frames": 17}
"""A video of 120 tokens, 30 blocks of 4."""


def test_patterns_of_heads_go_to_a_file_and_back(measured, tmp_path):
    chosen = measured.choose(None, 0.2)
    assert len(chosen.heads) == 2 * 6 * 4
    assert 0.1 < chosen.density < 0.9
    assert len({row.pattern for row in chosen.heads}) > 3
    assert techniques.HeadPatterns.load(chosen.save(tmp_path / "patterns.json")) == chosen
    assert (tmp_path / "patterns.json").stat().st_size < 20_000
    frame = chosen.frame()
    assert (frame["relative_error"] <= 0.2).all()


def test_more_is_computed_where_more_is_asked(measured):
    by_error = [measured.choose(None, error).density for error in (0.05, 0.1, 0.4)]
    by_mass = [measured.choose(percent).density for percent in (99, 90, 50)]
    for densities in (by_error, by_mass):
        assert densities == sorted(densities, reverse=True)
        assert len(set(densities)) == 3
    assert (measured.choose(80).frame()["kept_percent"] >= 80 - 1e-3).all()
    assert measured.choose(None, 0.1).density < measured.choose(None, 0.1, add_means=False).density
    assert measured.choose(None, 0.0).density == 1


def test_each_head_has_its_pattern_in_a_generation(bench, measured, tmp_path):
    chosen = measured.choose(None, 0.2)
    path = chosen.save(tmp_path / "patterns.json")
    settings = {"patterns": str(path), "dense_percent": 25, "dense_blocks": 1}
    dense = bench.generate(bench.model, **LONG)
    switched, video = bench.switched_on({"sparse_attention": settings}, **LONG)
    assert 1e-4 < np.linalg.norm(video - dense) / np.linalg.norm(dense) < 0.5
    proof = switched.proofs()["sparse_attention"]
    assert proof.passed
    (technique,) = switched.techniques
    layer = technique.layer
    assert layer.patterns == chosen
    for (component, block), counts in layer.heads.items():
        assert block >= 1
        for row, (kept, every) in zip(chosen.of(component, block), counts, strict=True):
            assert kept / every == pytest.approx(row.density)
    assert len(layer.heads) == len(layer.checks) == 10
    sparse_rows = [row for row in chosen.heads if row.block >= 1]
    density = sum(row.density for row in sparse_rows) / len(sparse_rows)
    assert "a pattern for each head, by patterns.json" in proof.sentence
    assert f"{sum(row.added for row in chosen.heads)} of 48 heads add means" in proof.sentence
    kept, every = layer.kept.total(), layer.blocks.total()
    assert kept / every == pytest.approx(density, abs=0.1)
    expert = f"{layer.kept['expert_low']:,} of {layer.blocks['expert_low']:,} blocks"
    assert expert in proof.sentence
    left_out = sum(calls - own for own, calls in ((10, 24), (20, 24)))
    assert technique.computed() == pytest.approx(
        (left_out + 10 * (layer.kept["expert_high"] / layer.blocks["expert_high"] + chosen.means)
         + 20 * (layer.kept["expert_low"] / layer.blocks["expert_low"] + chosen.means)) / 48
    )  # fmt: skip


def test_losses_of_heads_on_other_calls_are_like_those_they_were_chosen_by(bench, measured):
    chosen = measured.choose(None, 0.2)
    request = {
        "image": bench.image,
        "prompt": bench.prompt,
        "height": 64,
        "width": 96,
        "frames": 17,
        "steps": 4,
    }
    losses = techniques.head_losses(bench.model, chosen, [request], calls=1, queries=8)
    assert len(losses) == len(chosen.heads)
    assert (losses["density_percent"] == chosen.frame()["density_percent"]).all()
    assert 0.01 < losses["relative_error"].median() < 0.25
    added = chosen.frame()["means_added"]
    assert 0.1 < added.mean() < 0.9
    assert (losses["relative_error_without_means"] > losses["relative_error"])[added].all()
    assert (losses["relative_error_without_means"] == losses["relative_error"])[~added].all()


def test_the_bound_is_that_of_the_patterns(measured, tmp_path):
    shares = techniques.Shares("operations", 0.8, 0.2, 0.5, 0, 1, 10)
    chosen = measured.choose(None, 0.2)
    settings = sparse_attention.SparseSettings(
        patterns=str(chosen.save(tmp_path / "p.json")), dense_percent=0
    )
    bound = sparse_attention.SparseAttention(settings).bound(shares)
    assert bound.saved == pytest.approx(0.8 * 0.5 * (1 - chosen.density - chosen.means))
    assert chosen.means == pytest.approx(sum(row.added for row in chosen.heads) / 48 / 4)


def test_time_is_measured_at_several_densities(bench, measured):
    times = techniques.time_by_density(
        bench.model,
        GRID,
        block=4,
        patterns=measured.choose(None, 0.2),
        rounds=1,
        progress=False,
    )
    frame = times.frame()
    assert list(frame["density_percent"][:2]) == [100, 100]
    swept = frame["density_percent"][1:-1]
    assert (swept.diff().dropna() < 0).all()
    assert swept.min() < 20
    assert frame["attention"].iloc[-1] == "a pattern for each head"
    assert not times.saves
    assert "no time is saved" in times.sentence()
    assert (frame["first_call_ms"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "wan2.2-i2v-a14b"},
            "holds patterns of wan2.2-i2v-a14b, and this is wan-nano: measure them for this model",
        ),
        (
            {"heads": slice(0, 20)},
            "holds 20 patterns for the high-noise expert, which has 6 blocks of 4 heads",
        ),
    ],
)
def test_patterns_of_another_model_are_one_line(bench, measured, tmp_path, change, message):
    chosen = measured.choose(None, 0.2)
    if isinstance(change.get("heads"), slice):
        change = {"heads": chosen.heads[change["heads"]]}
    path = msgspec.structs.replace(chosen, **change).save(tmp_path / "patterns.json")
    with pytest.raises(WanlabError, match=message) as raised:
        techniques.switch_on(bench.model, {"sparse_attention": {"patterns": str(path)}})
    assert "\n" not in str(raised.value)


def test_patterns_for_another_size_are_one_line(bench, measured, tmp_path):
    path = measured.choose(None, 0.2).save(tmp_path / "patterns.json")
    settings = {"patterns": str(path), "dense_percent": 0}
    switched = techniques.switch_on(bench.model, {"sparse_attention": settings})
    message = r"for videos of 5x4x6 tokens \(frames, height, width\), and this one has 2x4x6: measure them at this size"
    with pytest.raises(WanlabError, match=message):
        bench.generate(switched.model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no patterns of heads"),
        ('{"model": 3}', "holds no patterns of heads"),
        (
            '{"model": "m", "grid": [1, 2, 3], "block": 4, "least_kept": null, "most_error": 0.1, "heads": [{"component":'
            ' "expert", "block": 0, "head": 0, "pattern": {"kind": "window", "size": [1]}, "added": false, "density": 1,'
            ' "kept": 1, "error": 0}]}',
            "a window pattern has 2 sizes of 0 or more",
        ),
    ],
)
def test_a_file_that_holds_no_patterns_is_one_line(bench, tmp_path, text, message):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(WanlabError, match=message):
        techniques.switch_on(bench.model, {"sparse_attention": {"patterns": str(tmp_path / "other.json")}})
    with pytest.raises(WanlabError, match=r"cannot read .*none\.json"):
        techniques.switch_on(bench.model, {"sparse_attention": {"patterns": str(tmp_path / "none.json")}})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kept_percent": None}, "give kept_percent or most_error"),
        ({"kept_percent": 0}, "kept_percent is 0"),
        ({"kept_percent": None, "most_error": -1}, "most_error is -1"),
    ],
)
def test_a_choice_that_asks_for_nothing_is_one_line(measured, asked, message):
    with pytest.raises(WanlabError, match=message):
        measured.choose(**asked)


def test_a_video_of_one_block_has_no_patterns(bench):
    with pytest.raises(WanlabError, match="48 tokens has no blocks of 128 to leave out"):
        techniques.measure_patterns(
            bench.model, examples=1, height=64, width=96, frames=5, steps=4, progress=False
        )


# Planted faults.


def test_heads_that_are_all_dense_are_seen(bench, measured, tmp_path):
    path = measured.choose(None, 0.0).save(tmp_path / "patterns.json")
    switched, _ = bench.switched_on({"sparse_attention": {"patterns": str(path), "dense_percent": 0}}, **LONG)
    proof = switched.proofs()["sparse_attention"]
    assert not proof.passed
    assert "its mask is dense. Choose patterns that keep less" in proof.sentence


def test_a_head_whose_mask_is_dense_is_seen(bench, measured, tmp_path, monkeypatch):
    chosen = measured.choose(None, 0.2)
    path = chosen.save(tmp_path / "patterns.json")
    made = blocks.head_tables

    def faulty(patterns):
        tables = made(patterns)
        own = tables["expert_low", 3]
        dense = blocks.pattern_table(Pattern("dense"), patterns.grid, patterns.block)
        tables["expert_low", 3] = blocks.HeadTable((*own.tables[:2], dense, own.tables[3]), own.added)
        return tables

    monkeypatch.setattr(blocks, "head_tables", faulty)
    settings = {"patterns": str(path), "dense_percent": 0}
    switched, _ = bench.switched_on({"sparse_attention": settings}, **LONG)
    proof = switched.proofs()["sparse_attention"]
    assert not proof.passed
    assert (
        "in the low-noise expert: head 2 of block 3 had 100 % of its blocks, and its pattern"
        in proof.sentence
    )


def test_a_kernel_that_ignores_the_mask_of_one_head_is_seen(bench, measured, tmp_path, monkeypatch):
    path = measured.choose(None, 0.4).save(tmp_path / "patterns.json")
    masked = sparse.masked

    def ignoring(query, key, value, table):
        output = masked(query, key, value, table)
        output[:, :, 1] = KERNELS["sdpa-flash"].run(query, key, value)[:, :, 1]
        return output

    monkeypatch.setitem(sparse.SPARSE, "masked", ignoring)
    settings = {"patterns": str(path), "dense_percent": 0}
    switched, _ = bench.switched_on({"sparse_attention": settings}, **LONG)
    proof = switched.proofs()["sparse_attention"]
    assert not proof.passed
    assert "did not follow its mask in the high-noise expert" in proof.sentence


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
