"""Plans, their effect check and sensitivity on a tiny model of every family."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from wanlab import heldout, models, precision
from wanlab.core.errors import WanlabError
from wanlab.export.components import component_spec
from wanlab.models.blocks import blocks_of, linears, numbered_path
from wanlab.models.families import family_of
from wanlab.models.families.base import OTHER, OUTSIDE, Family
from wanlab.models.inputs import prepared
from wanlab.models.networks import skeleton
from wanlab.precision.assignment import assign_architecture, choose_layers, layer_roles
from wanlab.precision.denoiser import drawn_arguments, output_of, put_together, small_forward, taken_apart
from wanlab.precision.formats import decode_weight, encode_weight, get_format
from wanlab.precision.selection.select import Layer, compress

NAMES = (
    "tiny-ltx-i2v",
    "tiny-cogvideox-i2v",
    "tiny-hunyuan-t2v",
    "tiny-mochi",
    "tiny-wan2.1-i2v",
    "tiny-wan2.2-t2v",
    "tiny-skyreels-i2v",
    "tiny-animate",
    "tiny-vace",
)
_LOADED: dict = {}


def tiny(name: str):
    if name not in _LOADED:
        _LOADED[name] = models.load(name, weights="random", device="cpu")
    return _LOADED[name]


def experts(model) -> list[str]:
    return [name for name in model.components if name.startswith("expert")]


def planned(effect) -> set[tuple[str, str]]:
    rows = effect.layers[effect.layers["changed"]]
    return set(zip(rows["component"], rows["layer"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_int8_of_the_blocks_changes_their_linear_layers_and_no_others(name):
    model = tiny(name)
    applied = precision.apply_plan(model, "blocks-int8")
    effect = precision.effect_check(model, applied)
    inside = {(c, layer) for c in experts(model) for layer in linears(model.component(c), inside=True)}
    assert planned(effect) == inside
    for component in experts(model):
        before, after = model.component(component), applied.model.component(component)
        held = {path for path, module in after.named_modules() if hasattr(module, "codes")}
        assert held == {layer for c, layer in inside if c == component}
        for path in set(linears(before)) - held:
            assert torch.equal(after.get_submodule(path).weight, before.get_submodule(path).weight), path


@pytest.mark.parametrize("name", NAMES)
def test_uniform_int8_changes_every_linear_layer_of_a_denoiser(name):
    model = tiny(name)
    effect = precision.effect_check(model, precision.apply_plan(model, "uniform-int8"))
    assert planned(effect) == {(c, layer) for c in experts(model) for layer in linears(model.component(c))}
    assert str(effect).startswith("Plan uniform-int8 took effect")


@pytest.mark.parametrize("name", NAMES)
def test_ffn_int8_changes_the_layers_of_that_role(name):
    model = tiny(name)
    effect = precision.effect_check(model, precision.apply_plan(model, "ffn-int8"))
    roles = {c: layer_roles(model.component(c)) for c in experts(model)}
    assert planned(effect) == {
        (c, row.layer) for c, each in roles.items() for row in each.itertuples() if row.role == "FFN"
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_layer_without_effect_is_caught(name):
    model = tiny(name)
    applied = precision.apply_plan(model, "blocks-int8")
    component = experts(model)[-1]
    layer = list(linears(model.component(component), inside=True))[-1]
    parent, _, leaf = layer.rpartition(".")
    setattr(
        applied.model.component(component).get_submodule(parent),
        leaf,
        model.component(component).get_submodule(layer),
    )
    with pytest.raises(
        WanlabError, match=rf"plan blocks-int8: {layer} of {component} is held in float32 with the original"
    ):
        precision.effect_check(model, applied)


KNOWN = [name for name in models.tiny_names() if family_of(models.get(name).pipeline_class).title]


@pytest.mark.parametrize("name", KNOWN)
def test_every_linear_layer_of_a_known_family_has_a_role(name):
    spec = models.get(name)
    for component in (each for each in spec.components if each.startswith("expert")):
        part = spec.part(spec.part_of(component))
        network = skeleton(part)
        roles = layer_roles(network)
        assert OTHER not in set(roles["role"]), roles[roles["role"] == OTHER]
        assert ((roles["role"] == OUTSIDE) == roles["block"].isna()).all()
        assert {"FFN"} < set(roles["role"])


def test_blocks_are_numbered_over_all_lists_in_order_of_use():
    hunyuan = tiny("tiny-hunyuan-t2v").component("expert")
    paths = [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]
    assert [(block.number, block.path) for block in blocks_of(hunyuan)] == list(enumerate(paths))
    assert numbered_path("single_transformer_blocks.1.proj_mlp", blocks_of(hunyuan)) == "blocks.3.proj_mlp"
    vace = tiny("tiny-vace").component("expert")
    assert [block.path for block in blocks_of(vace)] == ["blocks.0", "blocks.1", "vace_blocks.0"]
    assert numbered_path("vace_blocks.0.proj_in", blocks_of(vace)) == "vace_blocks.0.proj_in"


def test_first_and_last_blocks_are_those_of_the_whole_denoiser():
    model = tiny("tiny-hunyuan-t2v")
    rules = [{"format": "int8", "layers": ["blocks.*"]}, {"format": "default", "blocks": "first 1, last 1"}]
    formats = precision.assign(precision.make_plan("inner", rules=rules), model).formats("expert")
    kept = {layer.rsplit(".", 1)[0] for layer, format in formats.items() if format != "int8"}
    changed = {".".join(layer.split(".")[:2]) for layer, format in formats.items() if format == "int8"}
    assert changed == {"transformer_blocks.1", "single_transformer_blocks.0"}
    assert any(path.startswith("transformer_blocks.0") for path in kept)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("role:FFN", 12),
        ("role:*attention", 22),
        ("ROLE:FFN", 0),
        ("role:ffn", 12),
        ("transformer_blocks.1.ff.net.2", 1),
        ("blocks.2.proj_mlp", 1),
        ("proj_mlp", 2),
        ("role:outside the blocks", 27),
    ],
)
def test_a_rule_names_layers_by_path_by_number_or_by_role(pattern, count):
    plan = precision.make_plan("some", rules=[{"format": "int8", "layers": [pattern]}])
    model = tiny("tiny-hunyuan-t2v")
    if not count:
        with pytest.raises(WanlabError, match="fits no layer"):
            precision.assign(plan, model)
        return
    assert (
        sum(format == "int8" for format in precision.assign(plan, model).formats("expert").values()) == count
    )


def test_a_role_that_a_model_lacks_is_refused_with_the_nearest():
    plan = precision.make_plan("some", rules=[{"format": "int8", "layers": ["role:cross-atention"]}])
    with pytest.raises(
        WanlabError, match=r"fits no layer \(did you mean 'role:cross-attention'\?\); roles of this model are"
    ):
        precision.assign(plan, tiny("tiny-ltx-i2v"))
    with pytest.raises(WanlabError, match=r"no layer has the role 'role:cross-attention' .*; there is role:"):
        choose_layers(tiny("tiny-mochi").component("expert"), "role:cross-attention")


def test_a_plan_of_another_family_is_refused_by_the_block_that_is_missing():
    rules = [{"format": "int8", "layers": ["transformer_blocks.*", "transformer_blocks.9.ff.net.2"]}]
    with pytest.raises(
        WanlabError, match=r"names transformer_blocks\.9\.ff\.net\.2, and expert has 2 blocks"
    ):
        assign_architecture(precision.make_plan("other", rules=rules), "tiny-ltx-t2v")


@pytest.mark.parametrize("name", ["tiny-ltx-i2v", "tiny-cogvideox-i2v", "tiny-hunyuan-t2v"])
def test_arguments_of_a_call_survive_their_recording(name):
    model = tiny(name)
    network = model.component("expert")
    arguments = drawn_arguments(model, "expert")
    tensors, values = taken_apart(arguments)
    again = put_together(network, tensors, values)
    assert set(tensors) == set(
        component_spec(model, "expert").inputs
    )  # so that a graph takes what was recorded
    with torch.no_grad():
        assert torch.equal(output_of(network, arguments), output_of(network, again))


@pytest.mark.parametrize("name", ["tiny-ltx-i2v", "tiny-mochi", "tiny-animate"])
def test_examples_give_a_model_the_inputs_that_it_takes(name):
    model = tiny(name)
    example = precision.nano_examples(1)[0]
    given = example.inputs(model, 9)
    values, _ = prepared(
        name, model.conditions, {"image": given["image"]} | given.get("conditions", {}), (9, 64, 64)
    )
    assert set(values) == set(model.conditions)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    found = {}

    def measure(name: str):
        if name not in found:
            folder, model = tmp_path_factory.mktemp(name), tiny(name)
            kept = precision.keep_inputs(model, precision.nano_examples(1), folder, steps=2, progress=False)
            options = {"formats": ["int8", "int8-weight"], "bands": 1, "progress": False}
            found[name] = kept, precision.sensitivity(model, kept.recording, kept.ranges, **options)
        return found[name]

    return measure


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tiny-ltx-i2v", "plain"),
        ("tiny-cogvideox-i2v", "plain"),
        ("tiny-hunyuan-t2v", "plain"),
        ("tiny-mochi", "plain"),
        ("tiny-vace", "plain"),
        ("tiny-wan2.1-i2v", "probes"),
        ("tiny-wan2.2-t2v", "probes"),
        ("tiny-skyreels-i2v", "probes"),
    ],
)
def test_sensitivity_covers_the_linear_layers_of_the_blocks_and_says_how(name, method, measured):
    model = tiny(name)
    _, found = measured(name)
    assert found.settings["method"] == method
    assert ("the plain way" in found.way) == (method == "plain")
    for component in found.components:
        rows = found.frame[found.frame["component"] == component]
        assert set(rows["layer"]) == set(linears(model.component(component), inside=True))
        assert rows["block"].nunique() == len(blocks_of(model.component(component)))
        assert np.isfinite(rows[["local_error", "velocity_error", "effect"]]).all(axis=None)
    by_role = found.by_role(model.family)
    assert by_role["int8"].sum() == pytest.approx(found.frame.query("format == 'int8'")["effect"].sum())
    assert by_role["layers"].sum() == found.frame.drop_duplicates(["component", "layer"]).shape[0]


@pytest.mark.parametrize("name", ["tiny-ltx-i2v", "tiny-hunyuan-t2v", "tiny-mochi"])
def test_the_plain_way_is_a_rounding_of_that_layer_by_hand(name, measured):
    kept, found = measured(name)
    network = copy.deepcopy(tiny(name).component("expert"))
    layer = list(linears(network, inside=True))[3]
    weight = network.get_submodule(layer).weight
    numbers = get_format("int8-weight").weight
    rounded = decode_weight(*encode_weight(weight.data, numbers, weight.dtype), numbers, weight.dtype)
    errors = []
    for call in kept.recording.of("expert"):
        arguments = kept.recording.arguments(call, network)
        original = weight.data.clone()
        with torch.no_grad():
            before = output_of(network, arguments)
            weight.data = rounded
            after = output_of(network, arguments)
            weight.data = original
        errors.append(float((after - before).square().sum() / before.square().sum()))
    row = found.frame.query("layer == @layer and format == 'int8-weight'").iloc[0]
    assert row["velocity_error"] == pytest.approx(np.sqrt(np.mean(errors)), rel=1e-4)
    assert row["velocity_error"] > 0


def test_the_plain_way_agrees_with_the_direct_one_where_both_can_measure(measured):
    model = tiny("tiny-wan2.2-t2v")
    kept, _ = measured("tiny-wan2.2-t2v")
    options = {"formats": ["int8"], "calls": 1, "bands": 1, "progress": False}
    frames = [
        precision.sensitivity(model, kept.recording, kept.ranges, method=method, **options).frame
        for method in ("plain", "direct")
    ]
    assert frames[0]["layer"].tolist() == frames[1]["layer"].tolist()
    np.testing.assert_allclose(frames[0]["velocity_error"], frames[1]["velocity_error"], rtol=1e-3)
    np.testing.assert_allclose(frames[0]["local_error"], frames[1]["local_error"], rtol=1e-5)


def test_a_method_that_needs_one_stream_is_refused_for_several(measured):
    kept, _ = measured("tiny-mochi")
    with pytest.raises(WanlabError, match=r"the blocks of expert cannot be run one by one.*method='plain'"):
        precision.sensitivity(
            tiny("tiny-mochi"), kept.recording, kept.ranges, method="probes", progress=False
        )


def test_layers_outside_the_blocks_are_measured_the_plain_way(measured):
    kept, _ = measured("tiny-ltx-i2v")
    options = {"formats": ["int8-weight"], "layers": "role:outside*", "bands": 1, "progress": False}
    found = precision.sensitivity(tiny("tiny-ltx-i2v"), kept.recording, **options)
    assert found.frame["block"].isna().all()
    assert "proj_out" in set(found.frame["layer"])


def test_a_family_that_is_not_known_works_by_what_is_seen(monkeypatch):
    model = models.load("tiny-ltx-t2v", weights="random", device="cpu")
    monkeypatch.setattr("wanlab.models.pipeline.family_of", lambda _: Family())
    assert drawn_arguments(model, "expert") == {}
    assert small_forward(model, "expert") is not None
    effect = precision.effect_check(model, precision.apply_plan(model, "blocks-int8"))
    assert planned(effect) == {("expert", layer) for layer in linears(model.component("expert"), inside=True)}
    assert effect.layers["product"].astype(bool).any()


def test_truths_are_known_of_pictures_and_not_of_texts():
    truths = [np.zeros((5, 8, 8, 3), np.float32)]
    assert heldout.known_truths(truths, {"image": "picture"}) == truths
    assert heldout.known_truths(truths, {"image": "picture", "last_image": "picture"}) == truths
    assert heldout.known_truths(truths, {}) == []
    assert heldout.known_truths(truths, {"image": "picture", "pose_video": "clip"}) == []


def test_a_plan_is_judged_by_divergence_where_no_truth_is_known():
    model = tiny("tiny-mochi")
    cases = heldout.load_cases("selection", 1)
    originals = precision.make_originals(model, cases, steps=2, progress=False)
    assert originals.truths == ()
    proof = precision.verify_plan(model, "uniform-int8", originals, progress=False)
    assert not proof.quality.known
    assert proof.judged.startswith("divergence")
    assert proof.upper_percent == 100 * proof.divergence.frame.set_index("metric").loc["lpips", "worst"]
    assert not proof.holds(100.0)  # one case gives no interval


@pytest.mark.parametrize("name", ["tiny-wan2.2-i2v", "tiny-mochi"])
def test_truths_of_cases_have_the_size_that_is_asked(name):
    model = tiny(name)
    cases = heldout.load_cases("selection", 1)
    asked, truths = heldout.ask(model, cases, height=32, width=48, frames=None, steps=2)
    if name == "tiny-mochi":
        assert (asked[0]["image"], truths) == (None, [])
        return
    assert truths[0].shape == (model.spec.defaults.frames, 32, 48, 3)
    np.testing.assert_array_equal(asked[0]["image"], truths[0][0])


@pytest.mark.parametrize("name", ["tiny-hunyuan-t2v", "tiny-ltx-i2v"])
def test_a_chosen_plan_is_few_rules_that_leave_layers_of_the_same_name_outside_alone(name):
    model = tiny(name)
    roles = layer_roles(model.component("expert")).dropna(subset=["block"])
    chosen = {
        row.layer: "int8" if row.projection.split(".")[0] in ("proj_out", "ff") else "int8-weight"
        for row in roles.itertuples()
    }
    layers = [
        Layer("expert", row.layer, int(row.block), row.projection, ((None, None, chosen[row.layer]),))
        for row in roles.itertuples()
    ]
    plan = compress(layers, name="few")
    assert len(plan.rules) <= 3
    formats = precision.assign(plan, model).formats("expert")
    assert {layer: format for layer, format in formats.items() if format in ("int8", "int8-weight")} == chosen


@pytest.mark.parametrize("inside", ["int8", "default"])
def test_a_layer_outside_the_blocks_may_have_the_name_of_a_projection(inside):
    model = tiny("tiny-hunyuan-t2v")
    roles = layer_roles(model.component("expert"))
    layers = [
        Layer(
            "expert",
            row.layer,
            None if pd.isna(row.block) else int(row.block),
            row.projection,
            ((None, None, "int8-weight" if pd.isna(row.block) else inside),),
        )
        for row in roles.itertuples()
    ]
    assert {"proj_out"} & {each.layer for each in layers if each.block is None}
    assert {"proj_out"} & {each.projection for each in layers if each.block is not None}
    formats = precision.assign(compress(layers, name="rest"), model).formats("expert")
    for each in layers:
        wanted = each.formats[0][2]
        assert formats[each.layer] == wanted or wanted == "default", each
        assert wanted != "default" or formats[each.layer] not in ("int8", "int8-weight"), each


def test_a_schedule_that_is_not_known_has_no_weights():
    with pytest.raises(WanlabError, match=r"the schedule of tiny-easyanimate is not known: .* for 2 steps"):
        precision.sampler_weights(tiny("tiny-easyanimate"), 2)
