from __future__ import annotations

import shutil

import numpy as np
import pytest

from wanlab import evaluate, models, plots
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout

pytestmark = pytest.mark.slow

SMALL = {"height": 64, "width": 64, "frames": 5, "steps": 3}
QUICK = ("lpips", "psnr")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def asked():
    cases = heldout.load_cases("selection", 3)  # of fewer there is no interval
    return [{"image": c.truth(1)[0], "prompt": c.caption, "seed": c.seed} | SMALL for c in cases]


@pytest.fixture(scope="module")
def originals(model, asked):
    return [model.generate(**each) for each in asked]


@pytest.fixture(scope="module")
def floors(model, asked, originals):
    return evaluate.floors(model, asked, originals=originals, metrics=QUICK, progress=False)


def test_the_same_model_twice_and_another_kernel(floors):
    frame = floors.frame.set_index(["floor", "metric"])
    assert list(floors.scores) == ["run again", "other attention kernel"]
    again, other = frame.loc[("run again", "lpips")], frame.loc[("other attention kernel", "psnr")]
    assert (again["mean"], again["identical_cases"], again["cases"]) == (0, 3, 3)
    # The other kernel must have run: the videos differ, by less than an 8-bit step can show.
    assert other["identical_cases"] == 0
    assert 60 < other["low"] <= other["mean"] <= other["high"] < 200
    assert "math" in floors.notes["other attention kernel"]
    assert floors.notes["compiled"] == "not measured: left out on a CPU unless named in kinds"
    assert floors.explained["floor"].tolist() == ["run again", "other attention kernel", "compiled"]


def test_a_divergence_is_read_against_them(floors, originals):
    noisy = [
        np.clip(each.video + 0.05 * np.random.default_rng(0).standard_normal(each.video.shape), 0, 1)
        for each in originals
    ]
    plain = [each.video for each in originals]
    apart = evaluate.divergence(plain, noisy, floors, metrics=QUICK, progress=False)
    assert set(apart.frame["floor_name"]) == {"other attention kernel"}
    assert set(apart.frame["verdict"]) == {"above floor"}
    assert "over 1,000 times the floor" in str(apart)
    assert apart.worst_case() in (0, 1, 2)
    figure = plots.floor_intervals(apart, "noise")
    rows = {trace.y[0] for trace in figure.data}
    assert rows == {"noise", "run again", "other attention kernel"}
    assert any("identical" in trace.text for trace in figure.data)
    with pytest.raises(WanlabError, match="with a floor"):
        plots.floor_intervals(evaluate.divergence(plain, noisy, metrics=QUICK, progress=False))


def test_without_originals_they_are_made(model, asked, floors):
    alone = evaluate.floors(model, asked[:1], kinds=["run again"], metrics="psnr", progress=False)
    assert alone.frame["identical_cases"].tolist() == [1]
    assert np.isnan(alone.frame["low"]).all()  # one case has no interval


def test_blocks_are_compiled_in_a_twin_that_shares_every_weight(model, asked, originals):
    from wanlab import models

    twin = models.compile_blocks(model)
    one, other = (each.components["expert_high"] for each in (model, twin))
    assert other.blocks[0]._compiled_call_impl is not None
    assert one.blocks[0]._compiled_call_impl is None
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (model.generate(**asked[0]).video == originals[0].video).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles for the CPU")
def test_compiled_blocks_only_round_differently(model, asked, originals):
    found = evaluate.floors(
        model, asked[:1], originals=originals[:1], kinds=["compiled"], metrics="psnr", progress=False
    )
    (row,) = found.frame.itertuples()
    assert (row.floor, row.identical_cases) == ("compiled", 0)  # what was compiled did run
    assert 60 < row.mean < 200
    assert found.notes["compiled"] == "blocks of the experts by torch.compile"


def test_without_a_compiler_that_floor_is_refused_before_anything_is_generated(model, asked):
    import torch._inductor.config as inductor

    # Its own way to change it for a while: monkeypatch would delete the setting at the end.
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(WanlabError, match="needs a C\\+\\+ compiler on a CPU"),
    ):
        evaluate.floors(model, asked, kinds=["compiled"], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["other atention kernel"]}, "did you mean 'other attention kernel'"),
        ({"kinds": []}, "no kind of floor"),
        ({"originals": []}, "3 cases and 0 originals"),
    ],
)
def test_wrong_options_are_refused(model, asked, options, message):
    with pytest.raises(WanlabError, match=message):
        evaluate.floors(model, asked, progress=False, **options)
    with pytest.raises(WanlabError, match="no case"):
        evaluate.floors(model, [])
