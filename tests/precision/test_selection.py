"""Plans chosen by measurement: the solver against enumeration, rules against assignments, proof on the real wan-nano."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers import faults

from wanlab import models, plots, precision
from wanlab.core.errors import WanlabError
from wanlab.heldout import cases as heldout
from wanlab.precision.selection import costs as costs_
from wanlab.precision.selection.choose import fit, raise_worst
from wanlab.precision.selection.select import Layer, chosen_plan, compress
from wanlab.precision.selection.solve import Limits, make_problem
from wanlab.precision.selection.verify import Batched

pytestmark = pytest.mark.slow

BITS = {"default": 32, "int8": 8, "int8-weight": 8, "int4-weight": 4}
WEIGHTS = 128 * 128


def tables(effects, *, bands=((0, 2),), components=("expert_high",), rest=0):
    """Invented measurements: effects[layer][format][band], layers two to a block, and their counted costs."""
    rows, costs = [], []
    for number, formats in enumerate(effects):
        component = components[number % len(components)]
        place = number // len(components)
        layer = {
            "component": component,
            "layer": f"blocks.{place // 2}.ffn.net.{place % 2}",
            "block": place // 2,
        }
        layer["projection"] = f"ffn.net.{place % 2}"
        for format, values in formats.items():
            for (first, last), value in zip(bands, values, strict=True):
                rows.append(
                    layer | {"format": format, "first_step": first, "last_step": last, "effect": value}
                )
        costs += [cost(layer, name) for name in ("default", *formats)]
    outside = {"component": components[0], "layer": "proj_out", "block": None, "projection": "proj_out"}
    costs += [cost(outside, name) for name in ("default", "int8-weight")] * rest
    return pd.DataFrame(rows), pd.DataFrame(costs).astype({"block": "Int64"})


def cost(layer, name):
    faster = 2.0 if name == "int8" else 1.0
    return layer | {
        "format": name,
        "bits": BITS[name],
        "weights": WEIGHTS,
        "size_bytes": WEIGHTS * BITS[name] // 8,
        "source": "counted",
        "time_ms": math.nan,
        "work_gflop": 1.0 / faster,
    }


effect = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


@st.composite
def measured(draw, layers=4, bands=1):
    names = draw(
        st.lists(st.sampled_from(["int8", "int8-weight", "int4-weight"]), min_size=1, max_size=3, unique=True)
    )
    return [
        {name: tuple(draw(effect) for _ in range(bands)) for name in names}
        for _ in range(draw(st.integers(1, layers)))
    ]


def enumerate_best(effects, objective, budget, share):
    """Least cost of every combination of formats that keeps the limits; None where none does."""
    best = None
    for combination in itertools.product(*(["default", *formats] for formats in effects)):
        total = sum(
            sum(own[name]) for own, name in zip(effects, combination, strict=True) if name != "default"
        )
        few = sum(BITS[name] <= 8 for name in combination) / len(effects)
        if total > budget or few < share:
            continue
        steps = 3
        costs = {
            "memory": sum(WEIGHTS * BITS[name] / 8 for name in combination),
            "time": sum(steps / (2.0 if name == "int8" else 1.0) for name in combination),
        }
        best = costs[objective] if best is None else min(best, costs[objective])
    return best


class TestSolver:
    @given(
        measured(), st.sampled_from(["memory", "time"]), st.floats(1e-5, 3), st.sampled_from([0.0, 0.5, 1.0])
    )
    @settings(max_examples=40)
    def test_it_finds_what_trying_everything_finds(self, effects, objective, budget, share):
        table, costs = tables(effects)
        best = enumerate_best(effects, objective, budget, share)
        problem = make_problem(table, costs, objective=objective, tie=0.0)
        limits = Limits(effect=budget, min_share_8bit=share)
        if best is None:
            with pytest.raises(WanlabError, match="no plan has"):
                chosen_plan(problem, limits, name="none")
            return
        found = chosen_plan(problem, limits, name="found")
        assert found.cost == pytest.approx(best, rel=2e-4)
        assert found.effect <= budget * (1 + 1e-5)
        assert found.share_8bit >= share - 1e-9

    @given(measured(layers=3, bands=2), st.floats(1e-4, 2))
    @settings(max_examples=20)
    def test_ranges_of_steps_cost_no_more_time_than_one_format_for_all(self, effects, budget):
        table, costs = tables(effects, bands=((0, 1), (2, 4)))
        whole = precision.select_plan(table, costs, objective="time", budget=budget)
        apart = precision.select_plan(table, costs, objective="time", budget=budget, by_steps=True)
        assert apart.cost <= whole.cost * (1 + 2e-4)
        assert apart.effect <= budget * (1 + 1e-5)

    def test_in_memory_a_layer_pays_for_every_format_it_has(self):
        table, costs = tables([{"int8-weight": (0.001, 0.9)}], bands=((0, 1), (2, 4)))
        found = precision.select_plan(table, costs, budget=0.1, by_steps=True)
        assert set(found.frame["format"]) == {"default"}  # both would be held
        faster, costs = tables([{"int8": (0.001, 0.9)}], bands=((0, 1), (2, 4)))
        found = precision.select_plan(faster, costs, objective="time", budget=0.1, by_steps=True)
        assert found.frame["format"].tolist() == ["int8", "default"]
        assert found.plan.num_steps == 5
        assert found.size_bytes == WEIGHTS * 5

    def test_weight_only_formats_save_memory_and_no_time(self):
        table, costs = tables([{"int8-weight": (0.001,)}])
        assert precision.select_plan(table, costs, objective="memory").saved_percent == pytest.approx(75)
        assert precision.select_plan(table, costs, objective="time").saved_percent == 0

    def test_groups_get_one_format(self):
        effects = [{"int8": (0.1 * (i % 2) + 1e-3,), "int4-weight": (0.5,)} for i in range(6)]
        table, costs = tables(effects)
        by_projection = precision.select_plan(table, costs, budget=0.05, group="projection")
        assert set(by_projection.frame.groupby("projection")["format"].nunique()) == {1}
        assert by_projection.frame.set_index("layer").loc["blocks.0.ffn.net.0", "format"] == "int8"
        by_block = precision.select_plan(table, costs, budget=0.05, group="block")
        assert set(by_block.frame["format"]) == {"default"}

    def test_the_rest_counts_in_bits_and_effect(self):
        table, costs = tables([{"int8-weight": (0.01,)}], rest=1)
        alone = precision.select_plan(table, costs)
        assert alone.bits_per_weight == pytest.approx((8 + 32) / 2)
        whole = precision.select_plan(table, costs, rest="int8-weight", rest_effect=0.02, min_share_8bit=1.0)
        assert (whole.bits_per_weight, whole.share_8bit) == (8, 1)
        assert whole.effect == pytest.approx(0.03)
        with pytest.raises(WanlabError, match="leave them as they are"):
            precision.select_plan(table, costs, budget=0.01, rest="int8-weight", rest_effect=0.02)

    def test_what_cannot_be_is_said_with_what_comes_nearest(self):
        table, costs = tables([{"int8": (0.25,)}, {"int8": (0.5,)}])
        with pytest.raises(WanlabError, match=r"the least effect under the other limits is 0\.25"):
            precision.select_plan(table, costs, budget=0.1, min_share_8bit=0.5)
        with pytest.raises(WanlabError, match=r"3\.00 bits"):
            precision.select_plan(table, costs, max_bits=3)

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"objective": "tme"}, "did you mean 'time'"),
            ({"group": "layers"}, "did you mean 'layer'"),
            ({"formats": ["int9"]}, "was not measured"),
            ({"formats": ["bf16"]}, "no format to choose from"),
            ({"rest": "fp8"}, "no costs of fp8"),
        ],
    )
    def test_wrong_words_are_named(self, asked, said):
        with pytest.raises(WanlabError, match=said):
            precision.select_plan(*tables([{"int8": (0.1,)}]), **asked)

    def test_wrong_tables_are_named(self):
        table, costs = tables([{"int8": (0.1,)}])
        with pytest.raises(WanlabError, match=r"no cost of blocks\.0\.ffn\.net\.0"):
            precision.select_plan(table, costs[costs["format"] == "default"])
        with pytest.raises(WanlabError, match="no column 'effect'"):
            precision.select_plan(table.drop(columns="effect"), costs)
        with pytest.raises(WanlabError, match="effects are 0 or more"):
            precision.select_plan(table.assign(effect=math.nan), costs)


class TestFrontier:
    @given(measured(layers=4))
    @settings(max_examples=20)
    def test_tighter_plans_cost_more(self, effects):
        found = precision.frontier(*tables(effects), points=5)
        rows = found.frame
        assert rows["cost"].is_monotonic_increasing
        assert rows["effect"].is_monotonic_decreasing
        assert rows["plan"].is_unique
        assert len({each.plan.hash for each in found.selections}) == len(rows)

    def test_spread_leaves_out_what_changes_nothing(self):
        found = precision.frontier(*tables([{"int8": (0.1,)}, {"int8": (0.01,)}]))
        assert [each.effect > 0 for each in found.spread(3)] == [True] * len(found.spread(3))
        nothing = precision.frontier(*tables([{"int8-weight": (0.1,)}]), objective="time")
        with pytest.raises(WanlabError, match="leaves all layers as they are"):
            nothing.spread(2)


def network(blocks, projections, outside):
    """A network with linear layers of these names."""
    root = torch.nn.Module()
    for name in [*(f"blocks.{b}.{p}" for b in range(blocks) for p in projections), *outside]:
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, torch.nn.Module())
            place = place._modules[part]
        place.add_module(last, torch.nn.Linear(64, 4, bias=False))
    return root


PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2")
OUTSIDE = ("condition_embedder.time_proj", "condition_embedder.linear_1", "proj_out")
FORMATS = ("default", "int8", "fp8", "int4-weight")
STEPS = 6


@st.composite
def assigned(draw):
    """Two experts of some blocks, each layer with a format of its own or of its block, projection or step range."""
    blocks, components = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([("expert",), ("expert_high", "expert_low")])),
    )
    choice = st.sampled_from(FORMATS)
    alike = draw(st.sampled_from(["all", "block", "projection", "none", "steps", "equal experts"]))
    table: dict = {}

    def formats(key):
        if key not in table:
            if alike == "steps" and draw(st.booleans()):
                cut = draw(st.integers(1, STEPS - 1))
                table[key] = ((0, cut - 1, draw(choice)), (cut, STEPS - 1, draw(choice)))
            else:
                table[key] = ((None, None, draw(choice)),)
        return table[key]

    made = []
    for component in components:
        for block in range(blocks):
            for projection in PROJECTIONS:
                key = {
                    "all": component,
                    "block": (component, block),
                    "projection": (component, projection),
                }.get(alike)
                key = (
                    (block, projection) if alike == "equal experts" else key or (component, block, projection)
                )
                made.append(Layer(component, f"blocks.{block}.{projection}", block, projection, formats(key)))
        made += [Layer(component, name, None, name, formats((component, name))) for name in OUTSIDE]
    return blocks, components, made


class TestRules:
    @given(assigned())
    @settings(max_examples=20)
    def test_rules_assign_exactly_the_formats_they_were_made_from(self, drawn):
        blocks, components, layers = drawn
        plan = compress(layers, name="p", num_steps=STEPS)
        networks = {name: network(blocks, PROJECTIONS, OUTSIDE) for name in components}
        found = precision.assign(plan, networks, default="fp32")
        for layer in layers:
            for first, last, wanted in layer.formats:
                for step in range(STEPS) if first is None else range(first, last + 1):
                    given_ = found.formats(layer.component, step)[layer.layer]
                    assert given_ == ("fp32" if wanted == "default" else wanted)

    def test_few_rules_for_what_is_simple(self):
        layers = [
            Layer(c, f"blocks.{b}.{p}", b, p, ((None, None, "default" if b in (0, 3) else "int8"),))
            for c in ("expert_high", "expert_low")
            for b in range(4)
            for p in PROJECTIONS
        ]
        plan = compress(layers, name="p")
        assert [(rule.component, rule.format) for rule in plan.rules] == [("*", "int8")]
        assert plan.rules[0].blocks == "1-2"
        one = [
            *layers[:-1],
            Layer("expert_low", "blocks.3.ffn.net.2", 3, "ffn.net.2", ((None, None, "fp8"),)),
        ]
        assert len(compress(one, name="p").rules) == 2

    def test_nothing_chosen_is_no_rule(self):
        assert (
            compress([Layer("expert", "blocks.0.a", 0, "a", ((None, None, "default"),))], name="p").rules
            == ()
        )

    def test_a_layer_twice_is_refused(self):
        layer = Layer("expert", "blocks.0.a", 0, "a", ((None, None, "int8"),))
        with pytest.raises(WanlabError, match="two formats"):
            compress([layer, layer], name="p")


class TestRelation:
    @given(st.floats(0.1, 100), st.sampled_from([("linear", 1.0), ("square root", 0.5)]))
    def test_the_form_that_made_the_values_is_found(self, scale, form):
        name, exponent = form
        effects = [1e-4, 1e-3, 1e-2]
        found, fitted, residual = fit(effects, [scale * e**exponent for e in effects])
        assert (found, residual) == (name, pytest.approx(0, abs=1e-9 * scale))
        assert fitted == pytest.approx(scale)

    def test_the_budget_is_never_beyond_what_was_tried(self):
        points = pd.DataFrame({"predicted": [1e-3, 1e-2]})
        steep = precision.Relation("linear", 1000.0, 0.0, points)
        assert steep.upper_percent(steep.budget(3.0, margin=1.0)) == pytest.approx(3.0)
        assert precision.Relation("linear", 10.0, 0.0, points).budget(3.0) == 1e-2
        assert precision.Relation("square root", 0.0, 0.0, points).budget(3.0) == 1e-2
        with pytest.raises(WanlabError, match="leaves nothing to choose"):
            steep.budget(0.0)


class TestRaise:
    @given(measured(layers=4), st.floats(0, 0.5))
    @settings(max_examples=20)
    def test_raising_lowers_the_effect_until_nothing_is_left(self, effects, target):
        found = precision.select_plan(*tables(effects))
        while found.effect > target:
            better, raised = raise_worst(found, target, "better")
            assert better is not None
            assert raised
            assert better.effect < found.effect
            found = better
        assert raise_worst(found, -1.0, "better")[0] is not None or found.effect == 0

    def test_the_largest_effect_per_byte_goes_first_and_the_share_is_kept(self):
        table, costs = tables([{"int8": (0.5,)}, {"int8": (0.1,)}, {"int8": (0.2,)}])
        found = precision.select_plan(table, costs, min_share_8bit=0.6)
        better, raised = raise_worst(found, 0.0, "better")
        assert raised == 1
        assert better.frame.set_index("layer")["format"].to_dict()["blocks.0.ffn.net.0"] == "default"
        assert better.share_8bit == pytest.approx(2 / 3)
        assert raise_worst(better, 0.0, "more") == (None, 0)


def test_the_bound_is_amdahls():
    _, costs = tables([{"int8": (0.1,)}, {"int8": (0.1,)}])
    bound = precision.amdahl_bound(costs, 50.0)
    assert bound.infinite == pytest.approx(2.0)
    assert (bound.format, bound.rate) == ("int8", 2.0)
    assert bound.at_format == pytest.approx(1 / 0.75)
    assert bound.counted
    assert "counted and not timed" in str(bound)
    with pytest.raises(WanlabError, match="0 to 100"):
        precision.amdahl_bound(costs, 120)


SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 4}
NAMES = ("int8", "int8-weight", "int4-weight")


@pytest.fixture(scope="module")
def nano():
    from wanlab import models

    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def found(nano, tmp_path_factory):
    """Sensitivity, ranges, costs and originals of two cases, small."""
    recording = precision.record_inputs(
        nano, precision.nano_examples(1), tmp_path_factory.mktemp("recording"), progress=False, **SIZE
    )
    ranges = {c: precision.calibrate(nano, c, recording, progress=False) for c in recording.components}
    measured = precision.sensitivity(nano, recording, ranges, formats=NAMES, probes=2, progress=False)
    costs = precision.layer_costs(nano, NAMES, height=64, width=64, frames=5)
    originals = precision.make_originals(nano, heldout.load_cases("selection", 2), progress=False, **SIZE)
    return recording, ranges, measured, costs, originals


class TestWanNano:
    def test_batched_generations_are_those_of_generate(self, nano, found):
        originals = found[-1]
        for case, truth, made in zip(
            heldout.load_cases("selection", 2), originals.truths, originals.outputs, strict=True
        ):
            alone = nano.generate(truth[0], case.caption, seed=case.seed, **SIZE)
            assert np.abs(made.video - alone.video).max() < 1e-4
        assert originals.floor_effect < 1e-9
        one = copy.copy(originals.batched)
        one._given = None  # as for pipelines that cannot be batched
        for made, single in zip(originals.outputs, one.generate(nano), strict=True):
            assert np.abs(made.video - single.video).max() < 1e-4
            assert np.abs(made.latents - single.latents).max() < 1e-3

    def test_a_plan_with_steps_switches_in_batches_too(self, nano, found):
        rules = [{"format": "int4-weight", "layers": ["blocks.*"], "steps": "0"}]
        plan = precision.make_plan("first", rules=rules, num_steps=4)
        applied = precision.apply_plan(nano, plan)
        batched = found[-1].batched
        made = batched.generate(applied.model, videos=False)
        alone = applied.model.generate(**batched.requests[0], output="latent")
        assert np.abs(made[0].latents - alone.video).max() < 1e-3
        assert np.abs(made[0].latents - found[-1].outputs[0].latents).max() > 1e-3

    def test_costs_cover_every_linear_layer_and_are_called_counted(self, nano, found):
        costs = found[3]
        assert set(costs["source"]) == {"counted"}
        assert costs["time_ms"].isna().all()
        default = costs[costs["format"] == "default"]
        layers = precision.quantizable_layers(nano.component("expert_low"))
        assert len(default) == 2 * (layers["kind"] == "Linear").sum()
        int8 = costs[costs["format"] == "int8"]["work_gflop"].sum()
        assert int8 == pytest.approx(default["work_gflop"].sum() / 2)

    def test_measured_costs_share_the_sample_of_a_shape(self, nano):
        sized = {"height": 64, "width": 64, "frames": 5}
        costs = precision.layer_costs(
            nano, ["int8-weight"], measured=True, iterations=2, progress=False, **sized
        )
        assert (costs["time_ms"] > 0).all()
        assert set(costs["source"]) == {"measured"}
        alike = costs[(costs["projection"] == "attn1.to_q") & (costs["format"] == "int8-weight")]
        assert len(set(alike["time_ms"])) == 1

    def test_compiled_costs_are_of_compiled_layers(self):
        """One shape: the compiler works for seconds."""
        from torch._dynamo.utils import counters

        known = {"int8": precision.get_format("int8")}
        for compiled in (False, True):
            before = counters["stats"]["unique_graphs"]
            row = costs_._time(((64, 32), 48, torch.float32, "int8"), known, torch.device("cpu"), 2, compiled)
            assert row["time_ms"] > 0
            assert (counters["stats"]["unique_graphs"] > before) == compiled

    def test_the_plan_that_comes_out_is_what_was_chosen(self, nano, found):
        _, _, measured, costs, _ = found
        chosen = precision.select_plan(measured, costs, budget=1e-3, min_share_8bit=0.8)
        assignment = precision.assign(chosen.plan, nano)
        assert chosen.share_8bit == pytest.approx(assignment.share(8), abs=1e-3)
        assert chosen.share_8bit >= 0.8
        for component, rows in chosen.frame.groupby("component"):
            formats = assignment.formats(component)
            for row in rows.itertuples():
                assert formats[row.layer] == ("fp32" if row.format == "default" else row.format)
        predicted = precision.predict(nano, [chosen.plan], measured, costs).iloc[0]
        assert predicted["effect"] == pytest.approx(chosen.effect)
        assert predicted["cost"] == pytest.approx(chosen.cost)
        assert predicted["bits_per_weight"] == pytest.approx(chosen.bits_per_weight)
        assert predicted["unknown_layers"] == 0

    def test_by_steps_its_prediction_and_share_hold_too(self, nano, found):
        _, _, measured, costs, _ = found
        settings_ = {"objective": "time", "budget": 1e-3, "formats": ["int8"], "by_steps": True}
        chosen = precision.select_plan(measured, costs, **settings_)
        assert chosen.plan.num_steps == SIZE["steps"]
        assert chosen.share_8bit == pytest.approx(precision.assign(chosen.plan, nano).share(8), abs=1e-3)
        predicted = precision.predict(nano, [chosen.plan], measured, costs, objective="time").iloc[0]
        assert predicted["effect"] == pytest.approx(chosen.effect)
        assert predicted["cost"] == pytest.approx(chosen.cost)

    def test_presets_are_predicted_beside(self, nano, found):
        _, _, measured, costs, _ = found
        rows = precision.predict(
            nano, [precision.PRESETS[n] for n in ("uniform-int8", "ffn-int8")], measured, costs
        )
        uniform, ffn = rows.to_dict("records")
        assert uniform["effect"] > ffn["effect"] > 0
        assert (uniform["unknown_layers"], ffn["unknown_layers"]) == (12, 0)
        assert uniform["share_8bit_percent"] == 100

    def test_a_plan_is_verified_chosen_and_repaired(self, nano, found):
        recording, ranges, measured, costs, originals = found
        chosen = precision.choose_plan(
            nano, measured, costs, originals, limit_percent=2.0, probes=2, points=4, calibrations=ranges,
            min_share_8bit=0.5, rest="int8-weight", progress=False,
        )  # fmt: skip
        assert 0 < chosen.rest_effect < chosen.selection.effect
        assert chosen.verification.took_effect.startswith("Plan ")
        assert not chosen.repaired.holds  # two cases have no interval, so nothing is proven
        assert chosen.verification.upper_percent == max(chosen.verification.quality.per_case_percent)
        assert chosen.predictions()["plan"].iloc[-1] == chosen.plan.name
        assert chosen.generations == 2 * (1 + 2 + len(chosen.repaired.history))
        spent = precision.search_cost(measured, recording, originals, chosen.generations)
        assert spent.brute_force == (120 * 3 + 1) * 2 * 8
        assert spent.forwards == pytest.approx(
            2 * 8 + measured.costs()["forward_equivalents"].iloc[0] + (4 + chosen.generations) * 8
        )
        bound = precision.amdahl_bound(costs, 60.0)
        answer = chosen.answer(bound)
        assert faults(answer) == []
        assert answer.headline.startswith(
            "No plan was found that is proven to keep the quality loss within 2 %: quality loss"
        )
        assert "from 2 cases, too few to say how sure that is" in answer.headline
        row = chosen.verification.row()
        assert row["bits_per_weight"] < 32
        assert row["lpips"] > 0
        assert np.isnan([row["lpips_low"], row["lpips_high"]]).all()  # two cases have no interval

    def test_a_plan_that_loses_too_much_is_raised_until_it_holds(self, nano, found):
        _, ranges, measured, costs, originals = found
        loose = precision.select_plan(measured, costs)
        proof = precision.verify_plan(nano, loose.plan, originals, calibrations=ranges, progress=False)
        limit = max(proof.upper_percent, 0) / 4 + 1e-3
        repaired = precision.repair(
            nano,
            loose,
            originals,
            limit_percent=limit,
            verification=proof,
            calibrations=ranges,
            progress=False,
        )
        history = repaired.history
        assert history["effect"].is_monotonic_decreasing
        assert len(history) > 1
        assert bool(history["holds"].iloc[-1]) == repaired.holds
        assert repaired.selection.effect < loose.effect

    def test_the_final_set_is_refused_for_choosing_and_not_for_verifying(self, nano, found):
        _, ranges, measured, costs, _ = found
        final = precision.make_originals(
            nano, heldout.load_cases("final", 1), floor=False, progress=False, **SIZE
        )
        with pytest.raises(WanlabError, match="final set"):
            precision.choose_plan(nano, measured, costs, final)
        proof = precision.verify_plan(nano, "ffn-int8", final, calibrations=ranges, progress=False)
        assert proof.purpose == "final"
        assert proof.quality.cases == 1
        with pytest.raises(WanlabError, match="the originals have their own"):
            precision.verify_plan(nano, "ffn-int8", final, steps=3)

    def test_figures_take_what_comes_out(self, nano, found):
        _, _, measured, costs, _ = found
        whole = precision.frontier(measured, costs, points=4)
        presets = precision.predict(nano, [precision.PRESETS["uniform-int8"]], measured, costs)
        figure = plots.frontier_plot(whole, presets, selected=whole.selections[0], budget=1e-3)
        assert [trace.name for trace in figure.data] == [
            "cheapest within a budget",
            "picked by hand",
            "chosen",
        ]
        panels = plots.format_map(whole.selections[0])
        assert sum(trace.type == "heatmap" for trace in panels.data) == 2


def test_generating_cases_together_says_what_generating_one_says():
    model = models.load("wan-nano", device="cpu")
    case = heldout.example_case()
    request = {
        "image": case.truth()[0],
        "prompt": "word " * 99,
        "height": 64,
        "width": 64,
        "frames": 5,
        "steps": 2,
    }
    Batched(model, [request, request | {"prompt": case.caption}])
    assert len([note for note in model.notes if "its end is cut" in note]) == 1
