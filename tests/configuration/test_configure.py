"""A model opened in a configuration, proven or said to have had no effect; the whole measurement is 41_configuration's."""

from __future__ import annotations

import pytest

from wanlab import configuration, models
from wanlab.core.errors import WanlabError

SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


def test_the_default_is_the_model_itself(model, tmp_path):
    used = configuration.configure(model, "eager", tmp_path, **SIZE)
    assert used.model is model
    assert (used.effect, used.plan, used.label) == ("nothing asked", "default", "eager")
    assert used.weight_bytes == sum(part.memory_bytes for part in model.load.parts)


def test_a_plan_is_proven_and_holds_fewer_bytes(model, tmp_path):
    chosen = configuration.load_configuration(plan="ffn-int8")
    used = configuration.configure(model, chosen, tmp_path, **SIZE, progress=False)
    assert (used.effect, used.label) == ("as asked", "eager ffn-int8")
    assert "layers of expert_high in int8" in used.proof
    assert "simulated on the CPU" in used.kernels
    before = sum(part.memory_bytes for part in model.load.parts)
    saved = used.frame["weight_before_bytes"].sum() - used.frame["weight_bytes"].sum()
    assert used.weight_bytes == pytest.approx(before - saved, rel=0.001)
    assert set(used.files["calibrations"]) == {
        "expert_high",
        "expert_low",
    }  # one scale per layer on every engine
    again = configuration.configure(model, chosen, tmp_path, **SIZE, progress=False)
    assert again.files == used.files
    assert len(list(tmp_path.glob("*/*/*/recording"))) == 1


def test_what_changes_nothing_had_no_effect(model, tmp_path):
    used = configuration.configure(model, configuration.load_configuration(plan="all-fp32"), tmp_path, **SIZE)
    assert used.effect == "no effect"
    assert "changed nothing" in used.proof


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "onnxruntim"}, "did you mean 'onnxruntime'"),
        ({"plan": "uniform-int9"}, "did you mean 'uniform-int8'"),
        ({"plan": "defalt"}, "did you mean 'default'"),
    ],
)
def test_unknown_names_are_told_before_anything_is_made(model, tmp_path, given, said):
    with pytest.raises(WanlabError, match=said):
        configuration.configure(model, configuration.check_configuration(**given), tmp_path)
    assert not list(tmp_path.iterdir())
