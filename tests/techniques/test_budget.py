"""The search for the fastest stack within a limit: on costs and qualities that are known, so that its best stack is too."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from wanlab import heldout, models, plots, techniques
from wanlab.configuration import Configuration, load_configuration, save_configuration
from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss
from wanlab.measure.timing import Comparison, verdict_of
from wanlab.techniques import budget as module
from wanlab.techniques.budget import CANNOT, KEPT, LOSES, NO_GAIN, NO_MORE, NOTHING
from wanlab.techniques.technique import Proof

CACHE, STRONG = {"threshold": 0.05}, {"threshold": 0.2}
GIVEN = {
    "text_keys": [{}],
    "easy_cache": [CACHE, STRONG],
    "guidance_gate": [{"after_percent": 80}],
    "guidance_interval": [{"low": 0.3}],
    "solver": [{}],
}
ALONE = {  # title of a candidate -> times as fast, quality loss in percent
    "text keys": (1.05, 0.0),
    "easy cache 0.05": (1.4, 0.8),
    "easy cache threshold 0.05 first percent 20": (1.4, 0.8),
    "easy cache 0.2": (2.0, 5.0),
    "guidance gate 80": (1.2, 0.8),
    "guidance interval 0.3": (1.3, 1.0),
    "solver": (1.6, 1.5),
}


@dataclass
class Known:
    """A bench whose figures are known: gains multiply and losses add up, but for the stacks of `own`.

    Attributes:
        own: label of a stack -> its own times as fast and loss. wide: half of the width of the interval of a loss.
        idle: techniques that do nothing. absent: those that this machine lacks. broken: stacks that cannot generate.
    """

    own: dict[str, tuple[float, float]] = field(default_factory=dict)
    wide: float = 0.2
    idle: set[str] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    without_truth: bool = False
    seen: list[str] = field(default_factory=list)

    def figures(self, stack):
        if stack.label in self.own:
            return self.own[stack.label]
        parts = [ALONE[each.title] for each in stack.candidates]
        return math.prod(part[0] for part in parts), sum(part[1] for part in parts)

    def lacks(self, candidate):
        return self.absent.get(candidate.technique, "")

    def quality(self, stack):
        self.seen.append(stack.label)
        if stack.label in self.broken:
            raise WanlabError("these two need the same place")
        loss = self.figures(stack)[1]
        proofs = {
            name: Proof(name not in self.idle, f"{name} {'skipped none' if name in self.idle else 'worked'}.")
            for name in stack.names
        }
        if self.without_truth:
            return QualityLoss.unknown(), proofs
        return QualityLoss(loss, loss - self.wide, loss + self.wide, 8), proofs

    def time(self, stacks):
        return [gain(self.figures(stack)[0], stack.label) for stack in stacks]


def gain(speedup, label="stack", noise=2.0, width=0.02):
    low, high = speedup * (1 - width), speedup * (1 + width)
    return Comparison("original", label, speedup, low, high, verdict_of(speedup, low, high, noise), noise)


def searched(bench, given=GIVEN, limit=3.0, **more):
    return techniques.search(techniques.Combined(techniques.make_candidates(given)), bench, limit, **more)


def found_with(bench, final=None, given=GIVEN, most=3, **more):
    return techniques.verify(searched(bench, given, **more), final or replace(bench, seen=[]), most=most)


def fates(found):
    return {each.stack.label: each.fate for each in found.judged}


def fastest_of_all(bench, limit=3.0):
    """The fastest of all stacks that hold the limit at the upper end: every one is looked at."""
    candidates, stacks = techniques.make_candidates(GIVEN), {}
    for count in range(1, len(candidates) + 1):
        for group in itertools.combinations(candidates, count):
            names = [each.technique for each in group]
            if len(set(names)) == count and not techniques.conflicts(names):
                stack = techniques.Stack.of(group)
                speed, loss = bench.figures(stack)
                stacks[stack.label] = speed if loss + bench.wide <= limit else 0.0
    return max(stacks, key=stacks.__getitem__)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_what_looking_at_every_stack_finds(seed, monkeypatch):
    figures = np.random.default_rng(seed)
    known = {title: (1 + figures.uniform(0.03, 1), figures.uniform(0, 3)) for title in ALONE}
    monkeypatch.setitem(globals(), "ALONE", known)
    best = fastest_of_all(Known(wide=0.0))
    assert found_with(Known(wide=0.0)).winner.stack.label == best


def test_the_fastest_stack_within_the_limit_is_found():
    budget = found_with(Known())
    assert fastest_of_all(Known()) == "text keys + solver + easy cache 0.05"
    assert budget.winner.stack.label == "text keys + solver + easy cache 0.05"
    assert budget.winner.speedup == pytest.approx(1.05 * 1.6 * 1.4)
    assert budget.techniques == {"text_keys": {}, "solver": {}, "easy_cache": CACHE}
    assert budget.search.left == ()
    assert fates(budget.search)["easy cache 0.2"] == LOSES


def test_a_stack_whose_gains_do_not_multiply_is_not_chosen_for_its_parts():
    # A cache finds little to skip beside the solver: by the parts this would be the best, and it is slower than the solver.
    own = {
        "solver + easy cache 0.05": (1.55, 2.3),
        "text keys + solver + easy cache 0.05": (1.58, 2.3),
    }
    budget = found_with(Known(own))
    assert fates(budget.search)["solver + easy cache 0.05"] == NO_MORE
    assert budget.winner.stack.label == "text keys + solver + guidance interval 0.3"
    rows = budget.search.frame().set_index("stack")
    assert rows.loc["solver + easy cache 0.05", "product"] == pytest.approx(1.6 * 1.4)
    assert rows.loc["solver + easy cache 0.05", "speedup"] == 1.55


def test_a_stack_that_loses_less_than_its_parts_is_found_where_time_is_left():
    # Losses add up to 3.3 % and the stack loses 2: predictions decide the order alone.
    label = "solver + easy cache 0.05 + guidance interval 0.3"
    own = {label: (2.9, 2.0), f"text keys + {label}": (3.0, 2.0)}
    assert found_with(Known(own)).winner.stack.label == f"text keys + {label}"


def test_two_that_cannot_go_together_are_in_no_stack():
    bench = Known()
    searched(bench)
    assert not [label for label in bench.seen if "gate" in label and "interval" in label]
    assert not [label for label in bench.seen if label.count("easy cache") > 1]


def test_the_winner_of_the_selection_that_fails_on_the_final_cases_does_not_win():
    best = "text keys + solver + easy cache 0.05"
    budget = found_with(Known(), Known({best: (2.35, 2.9)}))  # within the limit, its upper end is not
    assert [each.stack.label for each in budget.verified] == [
        best,
        "solver + easy cache 0.05",
    ]
    assert budget.winner is budget.verified[1]
    assert budget.verified[0].gain is None  # it lost too much, so its time says nothing
    assert list(budget.verified_frame()["held"]) == [False, True]
    said = techniques.budget_answer(
        budget, model="wan-nano", baseline="eager float32", cases=8, final_cases=8
    )
    assert said.headline.startswith(
        "Fastest within 3 % quality loss: with solver and easy cache 0.05 the video is 2.24 times"
    )
    assert (
        f"Faster ones failed there: {best} (quality loss +2.90 % (95 % interval +2.70 to +3.10))."
        in said.details[1]
    )
    assert "the more a pass owes to luck" in said.details[1]


def test_a_stack_that_is_no_faster_on_the_final_cases_does_not_win():
    best = "text keys + solver + easy cache 0.05"
    budget = found_with(Known(), Known({best: (1.01, 2.3)}))  # 1 % is within the noise of 2 %
    assert budget.verified[0].gain.verdict == "not distinguishable"
    assert budget.winner is budget.verified[1]
    said = techniques.budget_answer(budget, model="m", baseline="eager float32", cases=8, final_cases=8)
    assert "no gain that can be told from noise" in said.details[1]
    one = techniques.verify(budget.search, Known({best: (1.01, 2.3)}), most=1)
    said = techniques.budget_answer(one, model="m", baseline="eager float32", cases=8, final_cases=8)
    assert "failed on others" in said.headline
    assert said.next.parameters == {"verify_s": 120.0}


def test_nothing_that_fails_on_the_final_cases_wins():
    budget = found_with(Known(), Known(wide=5.0), most=2)
    assert (len(budget.verified), budget.winner, budget.techniques) == (2, None, {})
    assert budget.more > 0
    said = techniques.budget_answer(
        budget, model="wan-nano", baseline="eager float32", cases=8, final_cases=8
    )
    assert said.headline.startswith("Each of the 2 fastest stacks that kept within 3 % quality loss")
    assert said.next.parameters == {"cases": 16, "final_cases": 16}
    assert budget.about.startswith("the original: no stack")


def test_a_stack_whose_technique_did_nothing_cannot_win():
    budget = found_with(Known(idle={"solver"}))
    assert fates(budget.search)["solver"] == NOTHING
    assert "solver" not in " ".join(budget.winner.stack.names)
    # One that worked when it was chosen, and did nothing in the verification, does not win either.
    budget = found_with(Known(), Known(idle={"solver"}))
    assert budget.winner is None
    assert not budget.verified_frame()["did_what_it_says"].any()
    table = budget.proofs()
    assert set(table[~table["did_what_it_says"]]["what_it_did"]) == {"solver skipped none."}


def test_what_does_not_pay_or_cannot_run_is_left_out_with_the_reason():
    slow = Known({"text keys": (0.98, 0.0)}, absent={"solver": "it needs a GPU"}, broken={"guidance gate 80"})
    found = searched(slow)
    table = found.candidates_frame().set_index("candidate")
    assert table.loc["text keys", "fate"] == NO_GAIN
    assert "0.98 times as fast" in table.loc["text keys", "reason"]
    assert (table.loc["solver", "fate"], table.loc["solver", "reason"]) == ("not measured", "it needs a GPU")
    assert (table.loc["guidance gate 80", "fate"], table.loc["guidance gate 80", "reason"]) == (
        CANNOT,
        "these two need the same place",
    )
    assert table.loc["easy cache 0.2", "fate"] == LOSES
    assert not [label for label in slow.seen if " + " in label and ("text" in label or "gate" in label)]


def test_the_search_ends_at_its_time_limit_with_the_most_promising_measured(monkeypatch):
    bench, clock = Known(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    slow = bench.quality

    def quality(stack):
        clock[0] += 10
        return slow(stack)

    bench.quality = quality
    found = searched(bench, limit_s=80, at_once=1)  # six alone, and two more
    assert [each.stack.label for each in found.judged][6:] == [
        "solver + easy cache 0.05",
        "text keys + solver + easy cache 0.05",
    ]
    assert found.left
    assert found.seconds == 80
    said = techniques.budget_answer(
        techniques.verify(found, Known()), model="wan-nano", baseline="eager float32", cases=8, final_cases=8
    )
    assert f"The time limit of 80 s came before {len(found.left)} stacks more." in said.details[2]
    few = searched(bench, limit_s=25, at_once=1)
    assert len(few.judged) == 2
    assert "time limit of 25 s" in few.candidates_frame().set_index("candidate").loc["solver", "reason"]


def test_without_a_true_video_nothing_wins_and_stacks_are_timed():
    budget = found_with(Known(without_truth=True))
    assert budget.winner is None
    assert not budget.verified
    said = techniques.budget_answer(budget, model="tiny", baseline="eager bfloat16", cases=1, final_cases=1)
    assert said.headline.startswith("Which techniques stay within the limit is unknown")
    assert "times as fast as eager bfloat16" in said.headline
    assert len(budget.search.judged) > 6


def test_the_frontier_has_what_none_beats_in_both_and_draws_it():
    budget = found_with(Known())
    rows = budget.search.frame().set_index("stack")
    assert rows.loc["text keys + solver + easy cache 0.05", "efficient"]
    assert not rows.loc[
        "guidance gate 80", "efficient"
    ]  # text keys and the cache are faster and lose no more, or less
    figure = plots.budget_frontier(budget.search.frame(), budget.verified_frame(), 3.0)
    assert [trace.name for trace in figure.data if trace.marker.symbol == "star"] == ["verified"]
    plots.budget_frontier(
        budget.search.frame(), found_with(Known(), Known(wide=9)).verified_frame().head(0), 3.0
    )


COSTS = [
    {"techniques": {"solver": {}}, "speedup": 1.5, "low": 1.4, "high": 1.6},
    {"techniques": {"easy_cache": {"threshold": 0.05}}, "times_faster": 1.9},
    {"techniques": {"solver": {}, "easy_cache": CACHE | {"first_percent": 20}}, "speedup": 2.5},
    {"techniques": {"text_keys": {}, "guidance_gate": {"after_percent": 80}}, "speedup": 1.1},
    {"techniques": {}, "speedup": 1.0},
    {"techniques": {"text_keys": {}}, "speedup": 3.0, "did_what_it_says": False},
]


def written(tmp_path, rows, name="costs.json"):
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


class Priced(Known):
    """Times of a table, as a bench with costs has them."""

    costs = None

    def time(self, stacks):
        return [self.costs.of(stack.chosen) for stack in stacks]


def test_the_times_may_be_those_of_another_run(tmp_path):
    facts = {"baseline": "eager bfloat16", "model": "wan2.2-i2v-a14b", "device": "NVIDIA H200", "rows": COSTS}
    costs = techniques.read_costs(written(tmp_path, facts))
    assert (costs.baseline, costs.model) == ("eager bfloat16", "wan2.2-i2v-a14b on NVIDIA H200")
    assert costs.of({"solver": {"steps_percent": 60}}).speedup == 1.5  # its default, written out
    assert costs.of({"text_keys": {}}) is None
    bench = Priced()
    bench.costs = costs
    found = techniques.search(techniques.space_of(None, costs), bench, 3.0)
    # Only stacks of the table; one whose parts are not in it is measured from the start.
    assert sorted(bench.seen) == [
        "easy cache 0.05",
        "solver",
        "solver + easy cache threshold 0.05 first percent 20",
        "text keys + guidance gate 80",
    ]
    budget = techniques.verify(found, bench)
    assert budget.winner.speedup == 2.5
    said = techniques.budget_answer(
        budget, model="wan-nano", baseline=costs.baseline, cases=8, final_cases=8, costs=costs
    )
    assert "2.50 times as fast as eager bfloat16" in said.headline
    assert "on wan-nano quality loss" in said.headline
    assert said.details[0].startswith(
        "Times are those of wan2.2-i2v-a14b on NVIDIA H200, read from costs.json."
    )
    assert "not of the model that was timed" in said.details[0]
    narrow = techniques.space_of(techniques.make_candidates({"solver": [{}]}), costs)
    assert [stack.label for stack in narrow.stacks] == ["solver"]


def test_a_table_of_43_ladder_takes_its_settings_from_the_configuration(tmp_path):
    text = (
        'variant,techniques,speedup,low,high,did_what_it_says\na,"text_keys, easy_cache",1.4,1.3,1.5,True\n'
    )
    path = written(tmp_path, text, "variants.csv")
    stacked = load_configuration("stacked").techniques
    costs = techniques.read_costs(path, stacked)
    assert costs.of({"text_keys": {}, "easy_cache": {"threshold": 0.05}}).low == 1.3
    with pytest.raises(WanlabError, match="row 1 names text_keys without its settings"):
        techniques.read_costs(path)


def test_the_stacks_of_a_search_are_a_table_of_costs(tmp_path):
    found = searched(Known(idle={"solver"}))
    path = tmp_path / "stacks.csv"
    found.frame().assign(model="wan-nano", baseline="eager float32", device="cpu").to_csv(path, index=False)
    costs = techniques.read_costs(path)
    assert costs.of({"easy_cache": CACHE, "text_keys": {}}).speedup == pytest.approx(1.4 * 1.05)
    assert costs.of({"solver": {}}) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"speedup": 2}], "row 1: no techniques"),
        ([{"techniques": {"solver": {}}}], "row 1: no speedup above 0"),
        ([{"techniques": {"solver": {}}, "speedup": "fast"}], "row 1: speedup is 'fast'; give a number"),
        ([{"techniques": {"solvr": {}}, "speedup": 2}], "row 1: no technique 'solvr'"),
        ([{"techniques": {"solver": {"step": 1}}, "speedup": 2}], "solver has no setting 'step'"),
        ([{"techniques": {"solver": 60}, "speedup": 2}], "settings of solver are"),
        ([COSTS[0], COSTS[0]], "row 2: these techniques with these settings have a row already"),
        ([3], "row 1: a row has the fields"),
        ({"rows": 3}, "is a list of rows"),
        ([], "has no row of a stack"),
        ([COSTS[0] | {"model": "a"}, COSTS[1] | {"model": "b"}], r"more than one model \(a, b\)"),
        (
            [{"techniques": {"guidance_gate": {}, "guidance_interval": {}}, "speedup": 2}],
            "guidance_gate and guidance_interval cannot go together",
        ),
    ],
)
def test_a_table_of_costs_with_a_mistake_is_refused(tmp_path, rows, message):
    with pytest.raises(WanlabError, match=message) as error:
        techniques.read_costs(written(tmp_path, rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{easy_cash: [{}]}", "no technique 'easy_cash' .did you mean 'easy_cache'"),
        ("{easy_cache: [{treshold: 1}]}", "no setting 'treshold'"),
        ("{easy_cache: [{threshold: -1}]}", "easy_cache: Expected `float` > 0.0"),
        ("{easy_cache: {threshold: 1}}", "needs a list of settings"),
        ("{easy_cache: []}", "needs a list of settings"),
        ("{easy_cache: [3]}", "settings of easy_cache are"),
        ("{}", "there are no candidates"),
        ("easy_cache", "candidates are {technique"),
        ("none.yaml", "cannot read none.yaml"),
    ],
)
def test_candidates_with_a_mistake_are_refused(text, message):
    with pytest.raises(WanlabError, match=message) as error:
        techniques.read_candidates(text)
    assert "\n" not in str(error.value)


def test_equal_candidates_are_one_and_the_file_may_be_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("easy_cache:\n- {threshold: 0.05}\n- {}\ntext_keys: [{}]\n")
    assert [each.title for each in techniques.read_candidates(path)] == ["easy cache 0.05", "text keys"]
    assert techniques.read_candidates(None) is None
    path.write_text("text_keys: [{}]\neasy_cache:\n- {}\n- {thresold: 1}\n")
    with pytest.raises(WanlabError, match=r"mine.yaml, line 4, easy_cache\[1\]: easy_cache has no setting"):
        techniques.read_candidates(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"limit": 0}, "limit_percent is 0"),
        ({"limit_s": -1}, "limit_s is -1"),
        ({"at_once": 0}, "at_once is 0"),
    ],
)
def test_a_search_without_sense_is_refused(more, message):
    with pytest.raises(WanlabError, match=message):
        searched(Known(), **more)


def test_a_machine_that_lacks_everything_is_told_what():
    lacks = dict.fromkeys(GIVEN, "it needs a GPU")
    with pytest.raises(
        WanlabError, match=r"none of the candidates can be measured here \(text keys: it needs a GPU"
    ):
        searched(Known(absent=lacks))


@pytest.fixture(scope="module")
def nano():
    return models.load("wan-nano", device="cpu")


def bench_of(model, name="selection", **more):
    asked, truths = heldout.ask(model, heldout.load_cases(name, 3), height=64, width=64, frames=5, steps=8)
    return techniques.ModelBench(model, asked, truths, rounds=1, progress=False, **more)


def test_a_model_is_searched_and_what_did_nothing_is_left_out(nano, tmp_path):
    given = {"easy_cache": [{"threshold": 1e-9}], "guidance_gate": [{"after_percent": 75}]}
    bench = bench_of(nano)
    found = searched(bench, given, limit=100.0)  # a limit that quality cannot miss
    table = found.candidates_frame().set_index("candidate")
    assert table.loc["easy cache 1e-09", "fate"] == NOTHING
    assert "skipped none" in table.loc["easy cache 1e-09", "reason"]
    assert table.loc["guidance gate 75", "fate"] in (KEPT, NO_GAIN)  # a busy machine may hide what it saves
    assert {each.stack.label for each in found.judged} == set(table.index)
    gate = found.judged[1]
    assert gate.passed
    assert gate.loss.cases == 3
    assert bench.facts["model"] == "wan-nano at 64x64x5, 8 steps"
    assert set(bench.clips([gate.stack])) == {"original", "guidance gate 75"}
    path = save_configuration(
        Configuration(name="mine", techniques=gate.stack.chosen), tmp_path / "mine.yaml"
    )
    assert load_configuration(path).techniques == {"guidance_gate": {"after_percent": 75}}


def test_what_this_machine_cannot_run_or_only_simulate_is_said(nano):
    given = techniques.make_candidates(
        {"two_timesteps": [{}], "fp8_attention": [{"rules": [{"format": "fp8"}]}]}
    )
    here = bench_of(nano)
    assert "it needs a model with a timestep for every token" in here.lacks(given[0])
    assert "it is simulated here, which saves no time" in here.lacks(given[1])
    costs = techniques.Costs({}, (), "costs.json")
    assert bench_of(nano, costs=costs).lacks(given[1]) == ""  # its quality can be measured
