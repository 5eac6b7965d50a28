"""The attention map: equal to a full computation, honest about its sampling, and without a trace in the model."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import diagnose, measure, models, plots
from wanlab.core.answer import LONGEST
from wanlab.core.errors import WanlabError
from wanlab.diagnose.attention import backends, calls, statistics
from wanlab.diagnose.attention import backends as windows
from wanlab.diagnose.attention.statistics import (
    keys_needed,
    near_window,
    sample_queries,
    self_statistics,
    summarise,
)
from wanlab.heldout import cases as heldout

pytestmark = pytest.mark.slow

FAST = dict(height=64, width=96, frames=9, steps=3)
GRID = (3, 4, 6)
TOKENS = math.prod(GRID)
ALL = 10**6


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano")


@pytest.fixture(scope="module")
def case():
    found = heldout.example_case()
    return found.truth()[0], found.caption


@pytest.fixture(scope="module")
def full(nano, case):
    return diagnose.attention_map(nano, *case, queries=ALL, progress=False, **FAST)


@pytest.fixture(scope="module")
def times(nano, case):
    return diagnose.attention_times(nano, *case, repeats=2, **FAST)


def independent(attention, hidden, text, rotary) -> np.ndarray:
    """Attention `[heads, queries, keys]` in float64 from the weights and the input of a module, by another way."""
    heads = attention.heads

    def projected(linear, norm, x):
        x = x.double() @ linear.weight.double().t() + linear.bias.double()
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        return x[0].unflatten(-1, (heads, -1))

    q = projected(attention.to_q, attention.norm_q, hidden)
    k = projected(attention.to_k, attention.norm_k, hidden if text is None else text)
    if rotary is not None:
        cos, sin = (part[0].double() for part in rotary)
        turn = torch.complex(cos[..., 0::2], sin[..., 0::2])
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for x in (q, k)
        )
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, -1).numpy()


def places() -> tuple[np.ndarray, ...]:
    frame, y, x = np.meshgrid(*(np.arange(n) for n in GRID), indexing="ij")
    return frame.ravel(), y.ravel(), x.ravel()


def expected_self(p: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of full attention `[heads, tokens, tokens]`, each `[heads]`, straight from their definitions."""
    frame, y, x = places()
    same_frame = frame[:, None] == frame
    same_place = (y[:, None] == y) & (x[:, None] == x)
    high, wide = near_window(GRID)
    near = (abs(y[:, None] - y) <= high // 2) & (abs(x[:, None] - x) <= wide // 2)
    ordered = -np.sort(-p, axis=-1)

    def density(level, ordered):
        return (np.argmax(np.cumsum(ordered, -1) >= level - 1e-9, axis=-1) + 1) / ordered.shape[-1]

    blocks = np.add.reduceat(p, np.arange(0, TOKENS, 64), axis=-1)
    found = {
        "entropy_nats": -(p * np.log(p)).sum(-1).mean(-1),
        "own_frame_percent": 100 * (p * same_frame).sum(-1).mean(-1),
        "other_frames_percent": 100 * (p * ~same_frame).sum(-1).mean(-1),
        "first_frame_percent": 100 * (p * (frame == 0)).sum(-1)[:, frame > 0].mean(-1),
        "same_position_percent": 100 * (p * (same_place & ~same_frame)).sum(-1).mean(-1),
        "near_position_percent": 100 * (p * near).sum(-1).mean(-1),
        **{
            f"within{n}_frames_percent": 100 * (p * (abs(frame[:, None] - frame) <= n)).sum(-1).mean(-1)
            for n in (1, 2, 4)
        },
        "block_density95_percent": 100 * density(0.95, -np.sort(-blocks, axis=-1)).mean(-1),
    }
    return found | {f"density{n}_percent": 100 * density(n / 100, ordered).mean(-1) for n in (90, 95, 99)}


def test_all_queries_equal_a_full_independent_computation(nano, case, full):
    inputs, handles = {}, []
    for component in ("expert_high", "expert_low"):
        for layer, block in enumerate(nano.component(component).blocks):
            for kind, module in (("self", block.attn1), ("cross", block.attn2)):

                def keep(module, args, where=(component, kind, layer)):
                    hidden, text, _, rotary = args
                    inputs.setdefault(where, []).append((module, hidden.clone(), text, rotary))

                handles.append(module.register_forward_pre_hook(keep))
    nano.generate(*case, output="latent", **FAST)
    for handle in handles:
        handle.remove()
    order = full.frame.drop_duplicates(["component", "step", "branch"])[["component", "step", "branch"]]
    compared = 0
    for component, recorded in order.groupby("component", sort=False):
        for number, branch in enumerate(recorded["branch"]):
            here = full.frame.merge(recorded.iloc[[number]]).sort_values("head")
            for layer in range(6):
                rows = here[here["layer"] == layer]
                p = independent(*inputs[component, "self", layer][number])
                for name, wanted in expected_self(p).items():
                    found = rows.loc[rows["kind"] == "self", name].to_numpy()
                    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3), name
                    compared += len(wanted)
                p = independent(*inputs[component, "cross", layer][number])
                prompt = 100 * p[..., : full.facts["prompt_tokens"][branch]].sum(-1).mean(-1)
                text = rows[rows["kind"] == "cross"]
                assert text["prompt_percent"].to_numpy() == pytest.approx(prompt, rel=1e-3, abs=1e-3)
                assert text["padding_percent"].to_numpy() == pytest.approx(100 - prompt, rel=1e-3, abs=1e-3)
                entropy = -(p * np.log(p)).sum(-1).mean(-1)
                assert text["entropy_nats"].to_numpy() == pytest.approx(entropy, rel=1e-3)
    assert compared == 13 * 3 * 2 * 6 * 4
    # Nothing was sampled, so nothing is uncertain.
    assert full.of("self")["density95_se_percent"].max() == 0
    assert full.facts["prompt_tokens"] == {"cond": 5, "uncond": 1}
    assert set(full.frame["component"]) == {"expert_high", "expert_low"}


def test_a_sample_agrees_within_its_standard_error(nano, case):
    names = (
        "entropy_nats",
        "density95_percent",
        "own_frame_percent",
        "first_frame_percent",
        "near_position_percent",
    )
    apart, errors = ({name: [] for name in names} for _ in range(2))

    def look(call, run, query=None, key=None):
        if call.kind == "self" and call.layer in (0, 4):
            whole = self_statistics(query[0], key[0], GRID, sample_queries(GRID, ALL, 0))
            for seed in range(12):
                found = self_statistics(query[0], key[0], GRID, sample_queries(GRID, 6, seed))
                for name in names:
                    mean, error = summarise(found[name], 24)
                    apart[name] += (mean - summarise(whole[name], 24)[0]).tolist()
                    errors[name] += error.tolist()
        return run()

    with calls.attention_calls(nano, look):
        nano.generate(*case, output="latent", **FAST)
    for name in names:
        distance, error = np.array(apart[name]), np.array(errors[name])
        assert len(distance) == 3 * 2 * 2 * 4 * 12
        # The squared error is the variance in the mean, whatever the distribution of the queries.
        assert 0.75 < np.sum(distance**2) / np.sum(error**2) < 1.33, name
        # Six of 24 positions may miss the few queries that differ: not normal, but seldom far off.
        assert np.mean(np.abs(distance) <= 3 * error + 1e-3) > 0.93, name


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 24))
def test_standard_error_is_that_of_a_stratified_sample(seed, n):
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, n)))
    mean, error = summarise(values, 24)
    assert mean.numpy() == pytest.approx(values.mean((1, 2)).numpy())
    if n == 24:
        assert (error == 0).all()
    elif n > 1:
        by_frame = values.var(2) / n * (1 - n / 24)
        assert error.numpy() == pytest.approx((by_frame.sum(1).sqrt() / 3).numpy())
    else:
        assert (error > 0).all()


def masses():
    """Probabilities of very different shapes: peaked, flat, with ties and zeros."""
    return st.builds(
        lambda seed, keys, heat, ties: _softmax(seed, keys, heat, ties),
        st.integers(0, 10**6),
        st.integers(1, 300),
        st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]),
        st.booleans(),
    )


def _softmax(seed, keys, heat, ties):
    scores = np.random.default_rng(seed).normal(size=(3, keys)) * heat
    return torch.softmax(torch.from_numpy(np.round(scores) if ties else scores).float(), -1)


@settings(max_examples=150)
@given(p=masses(), share=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_keys_needed_are_those_of_a_sort(p, share):
    found = keys_needed(p, share).numpy()
    held = np.cumsum(-np.sort(-p.double().numpy(), axis=-1), axis=-1)
    held = np.concatenate([np.zeros((3, 1)), held], -1)
    total = held[:, -1]
    for row, count in enumerate(found.astype(int)):
        # As many hold the share, one fewer do not, but for rounding.
        assert held[row, count] >= (share - 1e-4) * total[row]
        assert held[row, count - 1] <= (share + 1e-4) * total[row]


@settings(max_examples=25)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    per_frame=st.integers(1, 30),
    seed=st.integers(0, 99),
    most=st.sampled_from([1, 2000, 1 << 30]),
)
def test_statistics_hold_together_whatever_the_chunks(grid, per_frame, seed, most):
    tokens = math.prod(grid)
    draw = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(tokens, 3, 8, generator=draw) for _ in range(2))
    sampled = sample_queries(grid, per_frame, seed)
    assert sampled.shape == (grid[0], min(per_frame, grid[1] * grid[2]))
    assert len(sampled.unique()) == sampled.numel()
    assert (sampled // (grid[1] * grid[2]) == torch.arange(grid[0])[:, None]).all()
    found = self_statistics(q, k, grid, sampled, most_bytes=most)
    whole = self_statistics(q, k, grid, sampled)
    for name, values in found.items():
        assert values.shape == (3, *sampled.shape)
        assert torch.allclose(values, whole[name], atol=1e-3, equal_nan=True)
    assert torch.allclose(
        found["own_frame_percent"] + found["other_frames_percent"], torch.tensor(100.0), atol=1e-2
    )
    assert (found["near_position_percent"] >= found["same_position_percent"] - 1e-3).all()
    assert found["first_frame_percent"][:, 0].isnan().all()
    assert (found["density90_percent"] <= found["density99_percent"]).all()


def test_uniform_attention_has_the_figures_that_the_map_names(full):
    q = torch.zeros(TOKENS, 1, 8)
    found = self_statistics(q, q, GRID, sample_queries(GRID, ALL, 0))
    named = full.uniform()
    for name, values in found.items():
        assert float(summarise(values, 24)[0]) == pytest.approx(named[name], rel=1e-4), name
    table = full.summary("cross").set_index("statistic")
    assert table.loc["prompt_percent", "uniform"] == pytest.approx(100 * 5 / 24)
    assert set(full.summary().columns) == {
        "statistic",
        "high cond",
        "high uncond",
        "low cond",
        "low uncond",
        "uniform",
        "se",
    }


def test_heads_made_to_look_somewhere_get_that_type(nano, case, full):
    frame, y, x = (torch.from_numpy(n) for n in places())
    one_hot = torch.nn.functional.one_hot
    by_frame, by_place = one_hot(frame, 24).float(), one_hot(y * GRID[2] + x, 24).float()
    keys = torch.stack([by_frame, by_place, torch.zeros(TOKENS, 24)], 1) * 8
    found = self_statistics(keys, keys, GRID, sample_queries(GRID, 4, 0))
    spatial, temporal, uniform = range(3)
    own, near = (found[f"{name}_percent"].mean((1, 2)) for name in ("own_frame", "near_position"))
    assert own[spatial] > 95 > 50 > own[temporal]
    assert near[temporal] > 95 > 50 > near[uniform]
    same = found["same_position_percent"].mean((1, 2))
    assert same[temporal] == pytest.approx(100 * 2 / 3, abs=1)
    table = full.of("self")
    best = table[["own_frame_percent", "near_position_percent"]].max(axis=1)
    assert ((table["type"] == "global") == (best < 50)).all()
    assert (
        full.types()[["spatial_percent", "temporal_percent", "global_percent"]].sum(axis=1).round(6) == 100
    ).all()


def test_what_is_heard_is_what_the_kernel_gets_and_the_generation_is_unchanged(nano, case):
    from diffusers.models.transformers import transformer_wan

    before = transformer_wan.dispatch_attention_fn
    plain = nano.generate(*case, output="latent", **FAST).video
    seen = []

    def look(call, run, query=None, key=None):
        made = run()
        if call.kind == "self":
            seen.append((call.component, call.step, call.branch, call.layer))
            value = run.args[2]
            p = torch.softmax(torch.einsum("qhd,khd->hqk", query[0], key[0]) * query.shape[-1] ** -0.5, -1)
            assert torch.allclose(made[0], torch.einsum("hqk,khd->qhd", p, value[0]), atol=1e-4)
        return made

    with calls.attention_calls(nano, look):
        heard = nano.generate(*case, output="latent", **FAST).video
        with pytest.raises(WanlabError, match="already being recorded"):
            diagnose.attention_map(nano, *case, progress=False, **FAST)
    assert np.array_equal(plain, heard)
    plan = nano.schedule(3)["component"]
    assert seen == [(plan[s], s, b, n) for s in range(3) for b in ("cond", "uncond") for n in range(6)]
    diagnose.attention_map(nano, *case, at_steps=[0], progress=False, **FAST)
    assert transformer_wan.dispatch_attention_fn is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in nano.component("expert_high").modules())
    assert isinstance(vars(nano.pipeline)["scheduler"], type(nano.pipeline.scheduler))
    assert np.array_equal(plain, nano.generate(*case, output="latent", **FAST).video)


def test_only_what_was_asked_for_is_looked_at_and_the_rest_is_not_run(nano, case, full):
    with measure.stages(nano) as recorder:
        found = diagnose.attention_map(
            nano,
            *case,
            queries=ALL,
            at_steps=(1,),
            layers=(2, 5),
            branches=("uncond",),
            progress=False,
            **FAST,
        )
    assert {call.step for call in recorder.calls if call.step is not None} == {0, 1}
    assert set(found.frame["step"]) == {1}
    assert set(found.frame["layer"]) == {2, 5}
    assert set(found.frame["branch"]) == {"uncond"}
    place = ["component", "step", "branch", "kind", "layer", "head"]
    both = found.frame.merge(full.frame, on=place, suffixes=("", "_full"))
    assert len(both) == len(found.frame) == 2 * 2 * 4
    assert both["density95_percent"].to_numpy() == pytest.approx(
        both["density95_percent_full"].to_numpy(), nan_ok=True
    )
    for wrong, words in (
        ({"at_steps": [3]}, "at_steps has 3; give whole numbers from 0 to 2"),
        ({"layers": [6]}, "layers has 6"),
        ({"layers": []}, "empty"),
        ({"queries": 0}, "at least 1"),
        ({"branches": ["third"]}, "no attention was seen"),
        ({"steps": 0}, "steps must be"),
    ):
        with pytest.raises(WanlabError, match=words):
            diagnose.attention_map(nano, *case, progress=False, **FAST | wrong)


def test_models_whose_attention_cannot_be_seen_are_refused(case):
    model = models.load("wan-nano", components=["expert_high"])
    model.pipeline.transformer.blocks[0].compile(backend="eager")
    with pytest.raises(WanlabError, match="expert_high is compiled"):
        diagnose.attention_map(model, *case)
    vars(model.pipeline)["transformer"] = torch.nn.Linear(2, 2)
    with pytest.raises(WanlabError, match="Linear, which has no blocks with attention"):
        diagnose.attention_times(model, *case, warmup=False)
    vars(model.pipeline)["transformer"] = object()
    with pytest.raises(WanlabError, match="load it eager"):
        diagnose.attention_map(model, *case)
    vars(model.pipeline)["transformer"] = None
    with pytest.raises(WanlabError, match="no expert"):
        diagnose.attention_map(model, *case)


def test_every_layer_is_timed_inside_its_forward(nano, case, times):
    layers = times[times["kind"] != "forward"]
    assert len(layers) == 2 * 3 * 2 * 6 * 2
    assert (layers["time_ms"] > 0).all()
    assert layers["head_ms"].to_numpy() == pytest.approx(layers["time_ms"].to_numpy() / 4)
    where = ["repeat", "component", "step", "branch"]
    inside = layers.groupby(where)["time_ms"].sum()
    whole = times[times["kind"] == "forward"].set_index(where)["time_ms"]
    assert len(whole) == 2 * 3 * 2
    assert (inside < whole.loc[inside.index]).all()
    table = diagnose.layer_times(times)
    assert len(table) == 2 * 2 * 6
    assert ((table["min_ms"] <= table["median_ms"]) & (table["median_ms"] <= table["max_ms"])).all()
    with pytest.raises(WanlabError, match="at least 1 generation"):
        diagnose.attention_times(nano, *case, repeats=0)


def hand_made(densities: dict[str, list[float]], types: list[str], times_ms: dict) -> diagnose.AttentionMap:
    rows = [
        {"component": component, "step": step, "branch": "cond", "kind": "self", "layer": 0, "head": head, "type": kind,
         "density95_percent": density + step, "block_density95_percent": 100.0}
        for component, values in densities.items()
        for step in (0, 1)
        for head, (density, kind) in enumerate(zip(values, types, strict=True))
    ]  # fmt: skip
    return diagnose.AttentionMap(pd.DataFrame(rows), {}, times_ms)


def test_the_bound_is_amdahls(full, times):
    took = {"forwards": 3.0, "forward_ms": 100.0, "self_ms": 60.0, "cross_ms": 5.0}
    two = {"expert_high": took, "expert_low": took | {"forwards": 1.0, "self_ms": 20.0}}
    found = diagnose.skippable(
        hand_made({"expert_high": [9.5, 29.5], "expert_low": [49.5, 49.5]}, ["temporal", "global"], two)
    )
    assert found.table["density_percent"].tolist() == [10, 30, 50, 50]
    assert found.table["type"].tolist()[:2] == ["temporal", "global"]
    shares = found.shares.set_index("component")
    assert shares.loc["expert_high", "bound_ratio"] == pytest.approx(1 / (1 - 0.6 * 0.8))
    assert found.attention_share_percent == pytest.approx((3 * 60 + 20) / 4)
    # What is left: 3 forwards of 100 - 60 x 0.8, one of 100 - 20 x 0.5.
    assert found.bound_ratio == pytest.approx(400 / (3 * 52 + 90))
    assert found.block_bound_ratio == 1
    bare = diagnose.skippable(full)
    assert bare.bound_ratio is None
    assert bare.shares.empty
    assert "is not known: nothing was timed" in bare.answer(full).headline
    assert len(bare.answer(full).tiles) == 3
    real = diagnose.skippable(full, times)
    assert real.block_bound_ratio >= 1 - 1e-9
    assert real.block_bound_ratio <= real.bound_ratio < 1 / (1 - real.attention_share_percent / 100)
    said = real.answer(full, None, "A caveat. ")
    types = real.row()
    looks = said.headline.partition(" Self-attention is")[0]
    assert "of the heads look" in looks
    assert f"{types['global_percent']:.0f} %" in looks
    assert said.headline.endswith(f"makes denoising at most {real.bound_ratio:.2f} times as fast.")
    assert said.next.notebook == "15_triage"
    shown = plots.head_ranking(real)
    assert sum(len(trace.x) for trace in shown.data) == len(real.table)
    half = types["density95_median_percent"]
    assert shown.layout.annotations[0].text == f"half of the heads need at most {half:.0f} %"
    assert len(said.headline) <= LONGEST
    assert said.details[0] == "A caveat."
    assert len(said.tiles) == 5
    assert real.table["density_percent"].is_monotonic_increasing
    assert len(real.table) == 2 * 6 * 4
    assert real.row()["skippable_percent"] == pytest.approx(100 - real.table["density_percent"].mean())


def test_a_map_is_kept_and_read_again(full, times, tmp_path):
    path = full.with_times(times).save(tmp_path / "map.csv.gz")
    read = diagnose.AttentionMap.load(path)
    assert read.facts == full.facts
    assert list(read.frame.columns) == list(full.frame.columns)
    for name in full.frame.columns:
        if full.frame[name].dtype == float:
            tolerance = {"rel": 6e-2} if "_se_" in name else {"rel": 1e-4}
            assert read.frame[name].to_numpy() == pytest.approx(
                full.frame[name].to_numpy(), **tolerance, nan_ok=True
            )
        else:
            assert read.frame[name].tolist() == full.frame[name].tolist()
    again = read.save(tmp_path / "again.csv.gz")
    assert again.read_bytes() == path.read_bytes()
    assert diagnose.skippable(read).bound_ratio == pytest.approx(
        diagnose.skippable(full, times).bound_ratio, rel=1e-4
    )
    with pytest.raises(WanlabError, match="give that ending"):
        full.save(tmp_path / "map.csv")
    (tmp_path / "bad.csv.gz").write_bytes(path.read_bytes()[:-20])
    (tmp_path / "text.csv.gz").write_text("layer,head\n")
    for name in ("bad", "text", "absent"):
        with pytest.raises(WanlabError, match="holds no attention map"):
            diagnose.AttentionMap.load(tmp_path / f"{name}.csv.gz")


@settings(max_examples=20)
@given(frames=st.integers(1, 9), per_frame=st.integers(1, 150), window=st.integers(0, 4))
def test_the_window_mask_is_that_of_its_definition(frames, per_frame, window):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    tokens = frames * per_frame
    mask = windows.window_mask(tokens, frames, window)
    frame = torch.arange(tokens) // per_frame
    near = (frame[:, None] - frame).abs() <= window
    assert torch.equal(create_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")[0, 0], near)
    blocks = -(-tokens // windows.BLOCK)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:tokens, :tokens] = near
    tiles = padded.view(blocks, 128, blocks, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    full_blocks = int(mask.full_kv_num_blocks.sum())
    assert full_blocks == int(tiles.all(3).all(1).sum())
    assert windows.pair_share(frames, window) == pytest.approx(float(near.double().mean()))
    q, k, v = torch.randn(3, 1, 1, tokens, 8, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
    assert torch.allclose(flex_attention(q, k, v, block_mask=mask), wanted, atol=1e-5)


def test_kernels_stand_side_by_side(nano):
    top = measure.Ceilings("CPU", {"fp32": 0.2}, 20.0, {})
    settings = dict(height=64, width=96, frames=9, iterations=3, ceilings=top, progress=False)
    # flex_attention as it is: compiling takes longer than all other tests.
    with torch.compiler.set_stance("force_eager"):
        found = diagnose.attention_kernels(nano, flex=True, **settings)
    assert found.facts["tokens"], found.facts["dim"] == (TOKENS, 48)
    table = found.table.set_index("kernel")
    assert found.default_took == "flash"
    assert table.loc["SDPA math", "took"] == "math"
    for name in ("SDPA cuDNN", "SDPA memory-efficient"):
        assert table.loc[name, "reason"] == "needs a GPU"
        assert np.isnan(table.loc[name, "time_ms"])
    ran = table[table["time_ms"].notna()]
    assert set(ran.index) == {"SDPA default", "SDPA flash", "SDPA math", "flex", "flex, window of ±1 frames"}
    assert (ran["relative_error"] < 1e-5).all()
    assert (ran["relative_error"] > 0).any()
    work = 4 * TOKENS**2 * 4 * 48 * ran["density_percent"] / 100
    assert ran["tflop_per_s"].to_numpy() == pytest.approx((work / ran["time_ms"] / 1e9).to_numpy())
    assert ran["of_ceiling_percent"].to_numpy() == pytest.approx((ran["tflop_per_s"] / 0.2 * 100).to_numpy())
    assert table.loc["flex, window of ±1 frames", "density_percent"] == pytest.approx(100 * 7 / 9)
    assert table.loc["SDPA default", "verdict"] == "baseline"
    assert found.fastest()["kernel"] in {"SDPA default", "SDPA flash", "SDPA math", "flex"}
    figure = plots.kernel_bars(found)
    assert "needs a GPU" in [note.text for note in figure.layout.annotations]


def test_kernels_at_a_shape_and_what_cannot_be_run(nano):
    found = diagnose.attention_kernels((60, 2, 16), device="cpu", iterations=1, progress=False)
    table = found.table.set_index("kernel")
    assert "flex=True" in table.loc["flex", "reason"]
    assert table["ceiling_tflop_per_s"].isna().all()
    with torch.compiler.set_stance("force_eager"):
        one = diagnose.attention_kernels((60, 2, 16), device="cpu", iterations=1, flex=True, progress=False)
    assert "holds all 1" in one.table["reason"].iloc[-1]
    # The shape of a real video, held by a view of one number.
    large = torch.zeros(1, 1, 1, 1).expand(1, 40, 75_600, 128)
    call, reason = backends._sdpa_call("MATH", None, large, large, large)
    assert call is None
    assert "1,703 GiB" in reason
    for wrong in ((60, 2), (0, 2, 16), (61, 2, 16)):
        with pytest.raises(WanlabError, match="not possible"):
            diagnose.attention_kernels(wrong, latent_frames=2, device="cpu")


def test_figures_show_every_step_and_expert(full, times, tmp_path):
    for statistic, kind in (("density95_percent", "self"), ("type", "self"), ("prompt_percent", "cross")):
        figure = plots.head_map(full, statistic, kind=kind)
        assert len(figure.data) == 3
        titles = [step.args[1]["title.text"] for step in figure.layout.sliders[0].steps]
        assert ["high-noise" in title for title in titles] == list(full.of().query("branch == 'cond'")
            .drop_duplicates("step")["component"] == "expert_high")  # fmt: skip
        for number, step in enumerate(figure.layout.sliders[0].steps):
            assert [bool(v) for v in step.args[0]["visible"]] == [n == number for n in range(3)]
    first = full.of().query("branch == 'cond' and step == 0 and layer == 2 and head == 1").iloc[0]
    shown = plots.head_map(full, "own_frame_percent").data[0]
    assert shown.z[1][2] == pytest.approx(first["own_frame_percent"])
    with pytest.raises(WanlabError, match="did you mean 'density95_percent'"):
        plots.head_map(full, "density95")
    with pytest.raises(WanlabError, match="branch third"):
        plots.head_map(full, branch="third")
    bars = plots.head_type_bars(full)
    assert np.sum([bar.y for bar in bars.data], axis=0) == pytest.approx([100, 100, 100])
    lines = plots.layer_time_lines(diagnose.layer_times(times))
    assert {line.name for line in lines.data} == {"high-noise expert", "low-noise expert"}
    assert len(lines.data) == 4
    one = diagnose.AttentionMap(full.frame[full.frame["step"] == 1], full.facts)
    assert not plots.head_map(one).layout.sliders


def test_statistic_names_have_units():
    for kind in ("self", "cross", "image"):
        for name in statistics.statistic_names(kind):
            assert name.rpartition("_")[2] in ("percent", "nats")
            assert statistics.error_name(name).endswith(name.rpartition("_")[2])
