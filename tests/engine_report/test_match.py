"""Layers of two engines laid over one another."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import engine_report
from wanlab.engine_report import EngineLayers, Layer, Tensor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODULES = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn1.to_q", "attn1", "ffn.net.2", "norm1")]
KINDS = {"matmul": "Gemm", "pointwise": "Add", "norm": "LayerNormalization", "cast": "Cast"}
SHAPES = [(1, 480, 192), (480, 192), (1, 4, 480, 48)]


@st.composite
def a_layer(draw):
    kind = draw(st.sampled_from(list(KINDS)))
    modules = tuple(draw(st.lists(st.sampled_from(MODULES), max_size=2, unique=True)))
    # Times in 1/1024 ms add up exactly.
    time_ms = draw(st.integers(0, 4096)) / 1024
    shape = draw(st.sampled_from(SHAPES))
    return Layer(
        0, "", KINDS[kind], kind, modules=modules, outputs=(Tensor("t", "fp32", shape),), time_ms=time_ms
    )


layer_lists = st.lists(a_layer(), max_size=25)


def engine(layers, name="engine"):
    placed = tuple(replace(layer, index=i, name=f"layer {i}") for i, layer in enumerate(layers))
    return EngineLayers(name, "onnxruntime", placed)


def check(a, b):
    """What always holds; the table."""
    rows = engine_report.match_layers(a, b)
    for side, column in ((a, "layers_a"), (b, "layers_b")):
        assert sorted(i for indices in rows[column] for i in indices) == list(range(len(side.layers)))
    if a.timed and b.timed:
        assert rows["time_a_ms"].sum() == a.total_ms
        assert rows["time_b_ms"].sum() == b.total_ms
        assert rows["difference_ms"].sum() == b.total_ms - a.total_ms
        for by in ("role", "site", "kind"):
            assert engine_report.difference_by(rows, by)["difference_ms"].sum() == b.total_ms - a.total_ms
    sizes = [(len(row.layers_a), len(row.layers_b)) for row in rows.itertuples()]
    for (here, there), status in zip(sizes, rows["status"], strict=True):
        assert status == {(True, False): "only in a", (False, True): "only in b"}.get(
            (bool(here), bool(there)), status
        )
        assert (here, there) == (1, 1) or status != "matched"
        assert (here and there) or status.startswith("only")
    return rows


@settings(max_examples=50)
@given(layer_lists, layer_lists)
def test_every_layer_is_in_one_row_and_the_rows_add_up(one, other):
    check(engine(one), engine(other))


@settings(max_examples=50)
@given(layer_lists, layer_lists)
def test_the_other_way_round_is_the_same(one, other):
    a, b = engine(one), engine(other)
    there, back = check(a, b), check(b, a)
    pairs = Counter(zip(there["layers_a"], there["layers_b"], strict=True))
    assert pairs == Counter(zip(back["layers_b"], back["layers_a"], strict=True))


@settings(max_examples=50)
@given(layer_lists)
def test_an_engine_is_itself(layers):
    rows = check(engine(layers), engine(layers))
    assert set(rows["status"]) <= {"matched"}
    assert all(row.layers_a == row.layers_b for row in rows.itertuples())


@given(st.lists(a_layer(), max_size=20), st.randoms(use_true_random=False))
def test_another_order_does_not_matter_where_layers_can_be_told_apart(layers, random):
    distinct = list({(x.modules, x.kind, x.outputs[0].shape): x for x in layers}.values())
    order = random.sample(range(len(distinct)), len(distinct))
    rows = check(engine(distinct), engine([distinct[i] for i in order]))
    assert set(rows["status"]) <= {"matched"}
    for row in rows.itertuples():
        mine, theirs = distinct[row.layers_a[0]], distinct[order[row.layers_b[0]]]
        assert mine.kind == theirs.kind
        assert set(mine.modules) == set(theirs.modules)


@settings(max_examples=50)
@given(layer_lists)
def test_renamed_modules_are_matched_by_what_layers_do(layers):
    renamed = [replace(x, modules=tuple(f"other.{module}" for module in x.modules)) for x in layers]
    rows = check(engine(layers), engine(renamed))
    assert set(rows["status"]) <= {"matched"}
    kinds = [(layers[row.layers_a[0]].kind, layers[row.layers_b[0]].kind) for row in rows.itertuples()]
    assert all(mine == theirs for mine, theirs in kinds)


@given(st.integers(1, 8), st.integers(0, 1024))
def test_a_fused_chain_is_one_row(parts, time):
    site = "blocks.1.attn1.norm_q"
    chain = [
        Layer(
            0,
            "",
            "Mul",
            "pointwise",
            modules=(site,),
            outputs=(Tensor("t", "fp32", (i, 192)),),
            time_ms=time / 1024,
        )
        for i in range(parts)
    ]
    whole = Layer(
        0,
        "",
        "RMSNormalization",
        "norm",
        modules=(site,),
        outputs=(Tensor("t", "fp32", (9, 192)),),
        time_ms=1.0,
    )
    rows = check(engine(chain), engine([whole]))
    assert list(rows["status"]) == ["fused"]
    assert rows["type_b"][0] == "RMSNormalization"
    assert len(rows["layers_a"][0]) == parts


def test_layers_of_several_modules_bind_what_they_share():
    each = [Layer(0, "", "Gemm", "matmul", modules=(f"attn1.to_{x}",), time_ms=1.0) for x in "qkv"]
    merged = Layer(0, "", "gemm", "matmul", modules=("attn1.to_q", "attn1.to_k", "attn1.to_v"), time_ms=2.0)
    lone = Layer(0, "", "Gemm", "matmul", modules=("proj_out",), time_ms=0.5)
    rows = check(engine([*each, lone]), engine([merged, lone]))
    assert Counter(rows["status"]) == {"fused": 1, "matched": 1}
    fused = rows[rows["status"] == "fused"].iloc[0]
    assert (fused["layers_a"], fused["layers_b"], fused["difference_ms"]) == ((0, 1, 2), (0,), -1.0)


def test_engines_without_times_are_matched_all_the_same():
    a = engine_report.read_inspector(FIXTURES / "inspector" / "documented_10x.json")
    b = engine_report.read_layers(FIXTURES / "inspector" / "documented_11x.json")
    rows = check(a, b)
    assert set(rows["status"]) == {"matched"}
    assert rows["difference_ms"].isna().all()
    assert "11 layers" in engine_report.compared(a, b, engine_report.difference_by(rows))


def test_a_real_engine_of_tensorrt_against_onnxruntime():
    """Other tools, other fusions: most of the work still finds its counterpart."""
    a = engine_report.read_layers(FIXTURES / "ort_profile" / "nano_expert_cpu.json.gz")
    b = engine_report.read_layers(FIXTURES / "inspector" / "rtx_expert_high_fixed_size.layers.json.gz")
    rows = check(a, b)
    found = rows[~rows["status"].str.startswith("only")]
    covered = sum(len(indices) for indices in found["layers_b"])
    assert covered > 0.9 * len(b.layers)
    softmax = rows[rows["type_a"] == "Softmax"]
    assert len(softmax) == 12
    assert set(softmax["kind"]) == {"softmax"}


def test_noise_is_what_two_halves_of_one_engine_differ_by():
    def timed(samples):
        return replace(layer, samples_ms=samples, time_ms=float(np.median(samples)))

    layer = Layer(0, "", "Gemm", "matmul", modules=("proj_out",))
    a, b = engine([timed((1.0, 1.0, 1.5, 1.5))]), engine([timed((1.6, 1.6, 1.7, 1.7))])
    rows = engine_report.match_layers(a, b)
    assert rows["noise_ms"][0] == 0.5
    roles = engine_report.difference_by(rows)
    assert (roles["noise_ms"][0], roles["outside_noise"][0]) == (0.5, "no")
    assert "outside the noise" in engine_report.compared(a, b, roles)
    far = engine([timed((3.0, 3.0, 3.1, 3.1))])
    roles = engine_report.difference_by(engine_report.match_layers(a, far))
    assert roles["outside_noise"][0] == "yes"
    assert "+1.80 ms, noise 0.50" in engine_report.compared(a, far, roles)
    # two layers whose halves differ in opposite directions cancel in their sum
    up = replace(timed((1.0, 1.0, 2.0, 2.0)), modules=("proj_out",))
    down = replace(timed((2.0, 2.0, 1.0, 1.0)), modules=("blocks.0.attn1",))
    both = engine([up, replace(down, modules=("patch_embedding",))])
    roles = engine_report.difference_by(engine_report.match_layers(both, both))
    assert roles["noise_ms"][0] == pytest.approx(0)
    assert math.isnan(engine([layer]).layers[0].halves_ms)
