"""Plans: rules read, refused, merged, hashed, and held against models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from support.models_tiny import EXPERT

from wanlab import models, precision
from wanlab.core.errors import WanlabError
from wanlab.precision.assignment import made_for, weight_bits, weight_bytes
from wanlab.precision.plan import check_steps

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("fp32", "bf16", "int8", "fp8", "int8-weight", "default")


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano")


def rules(steps: int):
    ranges = st.tuples(st.integers(0, steps - 1), st.integers(0, steps - 1)).map(sorted)
    said = ranges.map(lambda pair: f"{pair[0]}-{pair[1]}")
    return st.builds(
        precision.Rule,
        format=st.sampled_from(FORMATS),
        component=st.sampled_from(("*", "expert_high", "expert_*", "expert_low")),
        blocks=st.sampled_from((None, "0-2", "5", "first 2", "last 1, 3")),
        layers=st.lists(
            st.sampled_from(("*", "attn?.to_q", "ffn.net.*", "blocks.*.attn2.*")), min_size=1, max_size=2
        ).map(tuple),
        steps=st.one_of(st.none(), said),
        note=st.sampled_from(("", "why: 'so'\n# no comment")),
    )


plans = st.builds(
    lambda made: precision.make_plan("drawn", "fp32", made, num_steps=6),
    st.lists(rules(6), max_size=5),
)


@settings(max_examples=60)
@given(plan=plans)
def test_a_plan_survives_its_file(tmp_path_factory, plan):
    path = precision.save_plan(plan, tmp_path_factory.mktemp("plan") / "deep" / "plan.yaml")
    again = precision.load_plan(path)
    assert again == plan
    assert again.hash == plan.hash


@settings(max_examples=20)
@given(plan=plans)
def test_the_last_rule_that_fits_counts_at_every_step(nano, plan):
    """Against the definition, layer by layer and step by step."""
    import fnmatch

    found = precision.assign(_only_fitting(plan), nano)
    for component in found.components:
        for step in range(6):
            formats = found.formats(component, step)
            for row in (
                found.frame[found.frame["component"] == component].drop_duplicates("layer").itertuples()
            ):
                expected = "fp32"
                for rule in found.plan.rules:
                    numbers, steps = rule.block_numbers(6), rule.step_numbers()
                    if (
                        fnmatch.fnmatchcase(component, rule.component)
                        and (numbers is None or row.block in numbers)
                        and (steps is None or step in steps)
                        and any(
                            fnmatch.fnmatchcase(name, glob)
                            for glob in rule.layers
                            for name in (row.layer, row.projection)
                        )
                    ):
                        expected = "fp32" if rule.format == "default" else rule.format
                assert formats[row.layer] == expected
        bands = found.bands(component)
        if bands != [(None, None)]:
            assert [i for first, last in bands for i in range(first, last + 1)] == list(range(6))


def _only_fitting(plan):
    """A pattern of blocks and one of layers may have nothing in common; such rules are refused, by another test."""
    fitting = [
        r for r in plan.rules if r.blocks is None or "blocks.*.attn2.*" not in r.layers or len(r.layers) > 1
    ]
    return precision.make_plan("drawn", plan.default, fitting, num_steps=plan.num_steps)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: a\nrules:\n  - formt: int8\n", 3, "no field 'formt' (did you mean 'format'?)"),
        ("name: a\nrules:\n  - format: int9\n", 3, "no format 'int9' (did you mean 'int8'?)"),
        ("name: a\nrules:\n  - format: int8\n    blocks: 3-1\n", 4, "'3-1' is no choice of blocks"),
        (
            "name: a\nrules:\n  - format: int8\n    steps: 0-9999999999\n",
            4,
            "'0-9999999999' is no choice of steps",
        ),
        ("name: a\nrules:\n  - format: int8\n    blocks: [1]\n", 4, "Expected `str | null`"),
        ("name: a\nname: b\n", 2, "'name' is given twice"),
        ("name: a\nrules: 3\n", 2, "Expected `array`"),
        ("name: a\nrules:\n  - layers: ffn.*\n", 3, "missing required field `format`"),
        ("name: a\nrules:\n  - format: int8\n    steps: 3\n", 4, "give the plan num_steps"),
        ("name: a\nnum_steps: 3\nrules:\n  - format: int8\n    steps: 2-3\n", 5, "step 3 of 3"),
        ("name: a/b\n", 1, "no name for a file"),
        ("default: fp32\n", 1, "missing required field `name`"),
        ("name: a\ndefault: int8\n", 2, "no dtype of a network"),
        ("name: a\nrules: [\n", 3, "expected node content"),
        ("- a\n", 1, "a plan is a mapping"),
        ("", 1, "a plan is a mapping"),
    ],
)
def test_mistakes_are_told_with_their_line(text, line, message):
    with pytest.raises(WanlabError) as caught:
        precision.parse_plan(text, "p.yaml")
    assert str(caught.value).startswith(f"p.yaml, line {line}")
    assert message in str(caught.value)


@settings(max_examples=150)
@given(text=st.text(max_size=80))
def test_any_text_is_a_plan_or_a_one_line_error(text):
    try:
        precision.parse_plan(text)
    except WanlabError as error:
        said = str(error)
    else:
        return
    assert said.startswith(("the plan, line", "the plan:"))


def test_files_and_presets_by_name(tmp_path):
    assert precision.load_plan("uniform-int8") is precision.PRESETS["uniform-int8"]
    with pytest.raises(WanlabError, match=r"no plan 'uniform-int9' \(did you mean 'uniform-int8'\?\)"):
        precision.load_plan("uniform-int9")
    with pytest.raises(WanlabError, match="no plan at"):
        precision.load_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_plans_of_wan_nano(nano, path):
    plan = precision.load_plan(path)
    assert len(precision.assign(plan, nano).frame)


@pytest.mark.parametrize("model", ["ti2v", "a14b"])
@pytest.mark.parametrize("label", ["fastest", "half-effect"])
def test_the_recipe_that_was_timed_is_the_one_that_is_kept(model, label):
    record = json.loads((ROOT / "data" / "results" / f"precision_selected_{model}.json").read_text())
    plan = precision.load_plan(ROOT / "recipes" / f"{model}-{label}.yaml")
    assert plan.hash == record["variants"][f"{plan.name}:compiled"]["plan_hash"]


def test_numbers_and_single_patterns_need_no_quotes():
    plan = precision.parse_plan(
        "name: a\nnum_steps: 9\nrules:\n- {format: fp8, blocks: 3, steps: 2, layers: ffn.*}\n"
    )
    assert plan.rules == (precision.Rule(format="fp8", blocks="3", steps="2", layers=("ffn.*",)),)


def test_what_a_plan_does_is_hashed_and_not_what_it_is_called():
    rule = {"format": "int8", "layers": ("ffn.*",)}
    first = precision.make_plan("a", "bf16", [rule])
    assert first.hash == precision.make_plan("b", "bf16", [rule | {"note": "why"}], note="where").hash
    assert first.hash != precision.make_plan("a", "bf16", [rule | {"format": "fp8"}]).hash
    assert first.hash != precision.make_plan("a", "fp16", [rule]).hash


def test_merged_plans_let_the_later_one_win(nano):
    both = precision.merge_plans(precision.PRESETS["uniform-int8"], precision.PRESETS["ffn-fp8"])
    assert both.name == "uniform-int8+ffn-fp8"
    formats = precision.assign(both, nano).formats("expert_low")
    assert formats["blocks.3.ffn.net.2"] == "fp8"
    assert formats["blocks.3.attn1.to_q"] == "int8"
    stepped = [
        precision.make_plan(f"s{n}", rules=[{"format": "int8", "steps": "0"}], num_steps=n) for n in (4, 8)
    ]
    with pytest.raises(WanlabError, match="count 4 and 8 steps"):
        precision.merge_plans(*stepped)
    with pytest.raises(WanlabError, match="networks in bf16 and fp16"):
        precision.merge_plans(precision.PRESETS["all-bf16"], precision.PRESETS["all-fp16"])


def test_plans_explain_themselves(nano):
    plan = precision.make_plan(
        "a",
        rules=[
            {"format": "int8", "layers": ("ffn.*",)},
            {"format": "bf16", "blocks": "first 1", "component": "expert_low", "note": "it is read first"},
        ],
    )
    found = precision.assign(plan, nano)
    assert found.explain("expert_low", "blocks.0.ffn.net.2") == (
        "blocks.0.ffn.net.2 of expert_low is bf16 because of rule 1"
        " (expert_low: * in blocks first 1 -> bf16): it is read first"
    )
    assert "is fp32 because no rule names it" in found.explain("expert_high", "proj_out")
    with pytest.raises(WanlabError, match=r"no layer 'proj_ou' \(did you mean 'proj_out'"):
        found.explain("expert_high", "proj_ou")
    with pytest.raises(WanlabError, match="covers no 'expert'"):
        found.formats("expert")


def test_rules_that_fit_nothing_are_refused(nano):
    for rule, message in (
        ({"layers": ("ffn.net.4",)}, r"rule 0 .* fits no layer \(did you mean 'ffn.net.2'"),
        ({"component": "expert_lo"}, r"for no component of this model \(did you mean 'expert_low'"),
        ({"blocks": "6-9"}, "fits no layer"),
    ):
        with pytest.raises(WanlabError, match=message):
            precision.assign(precision.make_plan("a", rules=[{"format": "int8"} | rule]), nano)
    with pytest.raises(WanlabError, match="blocks of 64 do not fill"):
        precision.assign(
            precision.make_plan("a", rules=[{"format": "int4-weight", "layers": ("*text*1",)}]),
            nano,
        )


def test_rules_of_an_expert_that_is_not_loaded_wait_for_it():
    import torch

    high = models.load("wan-nano", components=["expert_high"], dtype="bfloat16")
    # What diffusers keeps in float32 does not make the network anything but bfloat16.
    assert any(p.dtype == torch.float32 for p in high.component("expert_high").parameters())
    plan = precision.make_plan(
        "a", rules=[{"format": "int8", "component": "expert_low", "layers": ("ffn.*",)}]
    )
    found = precision.assign(plan, high)
    assert (found.components, found.default) == (("expert_high",), "bf16")
    wrong = precision.make_plan("a", rules=[{"format": "int8", "layers": ("fn.*",)}])
    with pytest.raises(WanlabError, match="fits no layer"):
        precision.assign(wrong, high)


def test_bytes_and_operations_by_format(nano):
    found = precision.assign(precision.PRESETS["uniform-int8"], nano)
    table = found.cost(480, 24).set_index(["component", "format"])
    network = nano.pipeline.transformer
    linear = {n: m for n, m in network.named_modules() if type(m).__name__ == "Linear"}
    weights = sum(module.weight.numel() for module in linear.values())
    row = table.loc[("expert_high", "int8")]
    assert row["layers"] == len(linear)
    assert row["weights"] == weights
    assert row["size_bytes"] == weights + 2 * sum(module.out_features for module in linear.values())
    assert table.loc["expert_high", "weights_percent"].sum() == pytest.approx(100)
    assert table.loc["expert_high", "flop_percent"].sum() == pytest.approx(100)
    layers = precision.quantizable_layers(network, tokens=480, text_tokens=24)
    assert table.loc["expert_high", "flop"].sum() == layers["flop"].sum()
    assert found.share(8) == 1
    assert found.share(4) == 0


def test_a_format_of_half_the_steps_has_half_the_operations(nano):
    plan = precision.make_plan(
        "a", rules=[{"format": "int8", "layers": ("ffn.*",), "steps": "0-1"}], num_steps=4
    )
    found = precision.assign(plan, nano)
    assert found.bands("expert_high") == [(0, 1), (2, 3)]
    assert found.formats("expert_high", 1)["blocks.0.ffn.net.2"] == "int8"
    assert found.formats("expert_high", 2)["blocks.0.ffn.net.2"] == "fp32"
    table = found.cost(480).set_index(["component", "format"])
    ffn = precision.quantizable_layers(nano.pipeline.transformer, tokens=480)
    ffn = ffn[ffn["projection"].str.startswith("ffn")]["flop"].sum()
    assert table.loc[("expert_high", "int8"), "flop"] == pytest.approx(ffn / 2)
    assert found.share(8) == 0  # at other steps the weights are needed whole
    with pytest.raises(WanlabError, match="change with the step"):
        found.formats("expert_high")
    with pytest.raises(WanlabError, match="steps 0 to 3, not 4"):
        found.formats("expert_high", 4)
    check_steps(plan, 4)
    with pytest.raises(WanlabError, match="plan a is for 4 steps, this generation has 20"):
        check_steps(plan, 20)


def test_sizes_of_formats():
    assert [weight_bits(name) for name in ("fp32", "bf16", "fp8", "int8-weight", "int4-weight")] == [
        32,
        16,
        8,
        8,
        4,
    ]
    assert weight_bytes((64, 128), "int4-weight") == 64 * 128 // 2 + 2 * 64 * 2
    assert weight_bytes((64, 128), "fp8") == 64 * 128 + 2
    assert weight_bytes((64, 128), "bf16") == 2 * 64 * 128


def test_presets_keep_what_they_say(nano):
    for plan in precision.PRESETS.values():
        precision.assign(plan, nano)
    kept = precision.assign(precision.inner_blocks("int8", 1), nano).formats("expert_high")
    assert {kept[f"blocks.{i}.attn1.to_q"] for i in (0, 5)} == {"fp32"}
    assert {kept[f"blocks.{i}.attn1.to_q"] for i in (1, 2, 3, 4)} == {"int8"}
    assert kept["proj_out"] == "fp32"


def test_the_command_shows_a_plan_without_weights(capsys):
    from wanlab.cli.main import main

    assert main(["plan", "show", "uniform-fp8", "--model", "wan2.2-i2v-a14b"]) == 0
    said = capsys.readouterr().out
    assert "100.0 % of linear weights at 8 bits or fewer; 720x1280x81 pixels, 75,600 tokens" in said
    assert "networks in bf16" in said
    assert main(["plan", "explain", "inner-int8", "blocks.1.ffn.net.2", "--component", "expert_low"]) == 0
    assert "because of rule 1 (* in blocks first 3, last 3 -> default)" in capsys.readouterr().out
    assert main(["plan", "list"]) == 0
    assert "uniform-int8" in capsys.readouterr().out
    assert main(["plan", "show", "uniform-int9"]) == 2
    assert "did you mean 'uniform-int8'" in capsys.readouterr().err


def two_experts():
    import diffusers
    import torch

    with torch.device("meta"):
        return {name: diffusers.WanTransformer3DModel(**EXPERT) for name in ("expert_high", "expert_low")}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (  # a later rule decides all of the first one's layers
            [dict(layers=["attn1.*"], format="int8"), dict(layers=["*"], format="fp8")],
            ["Rule 0 (attn1.* -> int8) has no effect: 16 a later rule overrides"],
        ),
        (  # a later rule decides some of them
            [dict(layers=["attn1.*"], format="int8"), dict(layers=["attn1.to_q"], format="default")],
            ["Rule 0 (attn1.* -> int8) has no effect on 4 of 16 layers: 4 a later rule overrides"],
        ),
        (  # the format is there already, by the network or by an earlier rule
            [dict(layers=["attn1.*"], format="bf16")],
            ["Rule 0 (attn1.* -> bf16) has no effect: 16 have this format without it"],
        ),
        (
            [dict(layers=["*"], format="int8"), dict(layers=["attn1.to_q"], format="int8")],
            ["Rule 1 (attn1.to_q -> int8) has no effect: 4 have this format without it"],
        ),
        ([dict(layers=["attn1.*"], format="int8"), dict(layers=["ffn.*"], format="fp8")], []),
        (  # in other steps than the later rule it counts
            [dict(layers=["attn1.*"], format="int8"), dict(layers=["attn1.*"], steps="0-1", format="fp8")],
            [],
        ),
    ],
)
def test_a_rule_has_no_effect_where_another_overrides_it_or_its_format_is_there_already(rules, says):
    plan = precision.make_plan("p", "bf16", rules, num_steps=4)
    assert precision.assign(plan, two_experts()).without_effect() == says
    one = precision.assign(plan, two_experts()).without_effect(["expert_high"])
    assert [line.split(" has")[0] for line in one] == [line.split(" has")[0] for line in says]


def test_a_plan_that_asks_for_the_dtype_that_is_there_takes_no_effect():
    model = models.load("wan-nano", device="cpu", dtype="bfloat16", components=["expert_high", "expert_low"])
    same = [dict(layers=["attn1.*"], format="bf16")]
    with pytest.raises(WanlabError, match="changed nothing"):
        precision.effect_check(model, precision.apply_plan(model, precision.make_plan("p", rules=same)))
    mixed = [dict(layers=["attn1.*"], format="bf16"), dict(layers=["attn2.to_q"], format="int8-weight")]
    effect = precision.effect_check(
        model, precision.apply_plan(model, precision.make_plan("p", rules=mixed)), components=["expert_low"]
    )
    assert "6 of 6 layers of expert_low in int8-weight" in effect.verdict
    assert "in bf16" not in effect.verdict
    assert "expert_high" not in effect.verdict
    assert "Rule 0 (attn1.* -> bf16) has no effect: 24 have this format without it." in effect.verdict


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (dict(blocks="0-39", format="fp8"), "names block 39, and expert_high has 2 blocks"),
        (dict(blocks="0, 2", format="fp8"), "names block 2, "),
        (dict(layers=["attn1.*", "blocks.7.ffn.net.2"], format="fp8"), "names blocks.7.ffn.net.2, "),
    ],
)
def test_a_plan_of_another_model_is_noticed_by_its_blocks_and_layers(rule, says):
    plan = precision.make_plan("p", "bf16", [rule])
    with pytest.raises(WanlabError, match=f"{says}.*the plan is of another model"):
        precision.assign(plan, two_experts())
    fitting = precision.make_plan(
        "p", "bf16", [dict(blocks="0, last 30", layers=["ffn.net.2"], format="fp8")]
    )
    precision.assign(fitting, two_experts())


def test_a_plan_of_another_model_is_noticed_by_the_width_it_was_selected_for():
    experts = two_experts()
    here = made_for(experts)
    assert re.fullmatch(r"2 blocks of width \d+", here)
    plan = structs.replace(precision.make_plan("p", "bf16", [dict(format="fp8")]), made_for=here)
    precision.assign(plan, experts)
    assert plan.hash == precision.make_plan("q", "bf16", [dict(format="fp8")]).hash
    other = structs.replace(plan, made_for="2 blocks of width 5120")
    with pytest.raises(
        WanlabError, match="selected for 2 blocks of width 5120, and expert_high has 2 blocks"
    ):
        precision.assign(other, experts)
