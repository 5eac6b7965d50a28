"""Triage: the tree is sound, the walk always ends and says why, runs of two models are never mixed."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import diagnose, plots
from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import CATEGORIES
from wanlab.diagnose.triage import DEFAULT
from wanlab.evaluate.loss import QualityLoss
from wanlab.measure.memory import PeakMemory
from wanlab.runs.parameters import read_schema
from wanlab.runs.triage import SETTINGS, run_measurements

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TREE = diagnose.read_tree()
RAW = json.loads(Path(DEFAULT).read_text())
SHARES = {
    "self_attention": 21.0, "cross_attention": 1.5, "linear": 20.0, "norm_modulation_rotary": 8.0, "vae_encoder": 3.0,
    "vae_decoder": 15.0, "text_encoder": 1.0, "host_device_transfer": 4.0, "expert_switching": 0.5,
    "memory_allocation": 1.0, "launch_and_idle": 19.0, "communication": 0.0, "other": 6.0,
}  # fmt: skip


def measured(**more) -> dict[str, float]:
    """All that notebooks 10, 11, 14 and 40 record, of an untroubled model on a GPU."""
    return {
        "baseline.time_per_video_ms": 612e3,
        "baseline.peak_memory_gib": 40.0,
        "10_baseline.device_memory_gib": 80.0,
        "runs.out_of_memory": 0,
        "breakdown.gpu_busy_percent": 70.0,
        "breakdown.host_busy_percent": 90.0,
        **{f"breakdown.{name}_percent": share for name, share in SHARES.items()},
        "memory.peak_gib": 40.0,
        "memory.weights_gib": 28.0,
        "memory.activations_gib": 10.0,
        "quality_loss.low_percent": -0.5,
        "quality_loss.high_percent": 0.5,
    } | {name.replace("__", "."): value for name, value in more.items()}


def way(walk, root: str = "Slow?") -> list[str]:
    """Nodes visited below a root, questions first."""
    return [
        *walk.frame.loc[walk.frame["root"] == root, "node"],
        *walk.advice.loc[walk.advice["root"] == root, "node"],
    ]


# The tree that comes with wanlab


def test_names_only_notebooks_that_there_are():
    named = {q.notebook for q in TREE.measurements.values()} | {
        a.notebook for a in TREE.advice.values() if a.notebook
    }
    assert named <= {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


def test_commands_give_only_parameters_that_the_notebooks_have():
    for notebook in {q.notebook for q in TREE.measurements.values()}:
        path = NOTEBOOKS / f"{notebook}.ipynb"
        if path.is_file():
            assert set(SETTINGS) <= set(read_schema(path).names), notebook


def test_thresholds_are_the_notebooks_parameters():
    schema = read_schema(NOTEBOOKS / "15_triage.ipynb")
    given_ = {name: value for name, value in schema.defaults.items() if isinstance(value, float)}
    assert given_ == {name: threshold.value for name, threshold in TREE.thresholds.items()}
    assert all(threshold.unit and threshold.what for threshold in TREE.thresholds.values())


def test_names_are_those_that_are_recorded():
    def names(record: str) -> set[str]:
        return {
            name.removeprefix(f"{record}.")
            for name, quantity in TREE.measurements.items()
            if name.startswith(f"{record}.") and not quantity.parts
        }

    gpu = {"gpu_busy_percent", "host_busy_percent", "launch_gap_median_us"}
    assert names("breakdown") - gpu == {f"{name}_percent" for name in CATEGORIES}
    assert names("quality_loss") <= set(QualityLoss.unknown().row())
    baseline = {"time_per_video_ms", "noise_percent", "peak_memory_gib"} | set(PeakMemory().row())
    assert names("baseline") <= baseline


def test_every_advice_says_hazard_mitigation_and_help():
    for advice in TREE.advice.values():
        assert all((advice.advice, advice.hazard, advice.mitigation, advice.help))


# The walk


@pytest.mark.parametrize(
    ("busy", "copies", "expected"),
    [
        (85.0, 4.0, ["video_time", "gpu_busy", "largest", "fuse", "attention"]),
        (80.0, 4.0, ["video_time", "gpu_busy", "largest", "graphs", "attention"]),
        (65.0, 4.0, ["video_time", "gpu_busy", "largest", "graphs", "attention"]),
        (40.0, 4.0, ["video_time", "gpu_busy", "transfers", "largest", "attention"]),
        (40.0, 30.0, ["video_time", "gpu_busy", "transfers", "largest", "overlap", "copies"]),
    ],
)
def test_gpu_utilisation_decides(busy, copies, expected):
    changed = {"breakdown__gpu_busy_percent": busy, "breakdown__host_device_transfer_percent": copies}
    assert way(diagnose.triage(measured(**changed))) == expected


@pytest.mark.parametrize(
    ("category", "node"),
    [
        ("linear", "linear"), ("norm_modulation_rotary", "pointwise"), ("vae_decoder", "vae"), ("text_encoder", "text"),
        ("expert_switching", "switching"), ("memory_allocation", "allocation"), ("launch_and_idle", "launch"),
        ("communication", "communication"), ("other", "spread"),
    ],
)  # fmt: skip
def test_the_largest_category_is_followed(category, node):
    walk = diagnose.triage(measured(**{f"breakdown__{category}_percent": 60.0}))
    assert walk.advice.loc[walk.advice["root"] == "Slow?", "node"].iloc[-1] == node


def test_bounds_are_amdahls():
    walk = diagnose.triage(measured(breakdown__cross_attention_percent=0.25))
    advice = walk.advice.set_index("node")
    assert advice.loc["attention", "bound"] == "at most 1.27x"  # 1 / (1 - 0.2125)
    assert advice.loc["attention", "bound_ratio"] == pytest.approx(1 / (1 - 0.2125))
    half = diagnose.triage(measured(breakdown__linear_percent=50.0)).advice.set_index("node")
    assert half.loc["linear", "bound_ratio"] == pytest.approx(1 / 0.75)  # twice the rate: half of it goes


@given(share=st.floats(0, 100), removes=st.floats(0.01, 1))
def test_a_bound_is_at_least_one_and_grows_with_the_share(share, removes):
    bound, half = diagnose.amdahl(share, removes), diagnose.amdahl(share / 2, removes)
    assert bound is None or 1 <= half <= bound


@pytest.mark.parametrize("share", [None, -1.0, 100.0, 101.0, math.inf])
def test_no_share_no_bound(share):
    assert diagnose.amdahl(share) is None


def test_without_a_gpu_the_host_is_asked():
    numbers = measured(breakdown__vae_decoder_percent=60.0)
    del numbers["breakdown.gpu_busy_percent"]
    walk = diagnose.triage(numbers)
    assert way(walk) == ["video_time", "gpu_busy", "host_busy", "largest_on_host", "host_vae"]
    asked = walk.frame.set_index("node")
    assert asked.loc["gpu_busy", "state"] == "not applicable"
    assert asked.loc["gpu_busy", "reads"] == "no GPU in the trace"
    assert walk.commands == []


def test_nothing_measured_says_what_to_measure_first():
    walk = diagnose.triage({})
    assert set(walk.frame["root"]) == set(TREE.roots)
    assert set(walk.frame["state"]) == {"unknown"}
    assert walk.advice.empty
    assert [command.split("/")[1] for command in walk.commands] == [
        "10_baseline.ipynb", "11_flame_graph.ipynb", "40_quality.ipynb",
    ]  # fmt: skip
    found = walk.answer()
    assert found.headline.startswith("Nothing is measured yet")
    assert found.next.notebook == "10_baseline"
    assert found.details[-1].startswith("Then run 11_flame_graph and 40_quality, and this notebook again")
    assert walk.ranking.empty


def test_a_missing_measurement_stops_its_own_root_only():
    numbers = {name: value for name, value in measured().items() if not name.startswith("breakdown.")}
    walk = diagnose.triage(numbers)
    assert way(walk) == ["video_time", "gpu_busy"]
    assert way(walk, "Memory?") == ["out_of_memory", "peak_used", "memory_fine"]
    assert way(walk, "Quality?") == ["quality_lost", "quality_open", "quality_kept"]
    assert walk.commands == ["wanlab run notebooks/11_flame_graph.ipynb"]
    found = walk.answer()
    assert found.headline.startswith("What to change for speed is not known yet")
    assert "Slow? unknown until 11_flame_graph is run" in found.details[0]
    assert walk.ranking.empty


def test_the_answer_is_the_change_with_the_largest_share_and_its_bound():
    numbers = measured()
    numbers |= dict.fromkeys((name for name in numbers if name.startswith("breakdown.")), 1.0)
    numbers |= {"breakdown.gpu_busy_percent": 30.0, "breakdown.vae_decoder_percent": 39.0}
    walk = diagnose.triage(numbers)
    ranking = walk.ranking
    assert ranking["share_percent"].is_monotonic_decreasing
    top = ranking.iloc[0]
    assert (top["what"], top["advice"], top["share_percent"], top["reached"]) == (
        "the VAE",
        "A faster VAE",
        40.0,
        True,
    )
    assert top["bound_ratio"] == pytest.approx(1 / 0.6)
    found = walk.answer("It is a caveat.")
    assert found.headline == (
        "Change first: A faster VAE. 40 % of the time goes to the VAE, so a video becomes at most 1.67 times as fast."
        " That is clear: the second largest share is 2 %."
    )
    assert found.next.notebook == "21_onnxruntime"
    assert found.next.parameters["components"] == ["vae_encoder", "vae_decoder"]
    assert found.details[0] == "It is a caveat."
    assert [tile[:2] for tile in found.tiles[:2]] == [("largest gain", "≤ 1.67×"), ("share", "40 %")]
    assert len(found.tiles) == 4
    assert "≤ 1.67×" in plots.share_ranking(ranking).to_json().encode().decode("unicode_escape")


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({"baseline__peak_memory_gib": 70.0}, "weights"),
        ({"runs__out_of_memory": 1}, "weights"),
        ({"baseline__peak_memory_gib": 70.0, "memory__activations_gib": 30.0}, "activations"),
        ({"baseline__peak_memory_gib": 64.0}, "memory_fine"),  # 80 % is not over 80 %
    ],
)
def test_memory(changed, end):
    assert way(diagnose.triage(measured(**changed)), "Memory?")[-1] == end


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (3.2, 6.0, ["quality_lost", "key_layers", "calibration"]),
        (1.0, 6.0, ["quality_lost", "quality_open", "more_cases"]),
        (1.0, 3.0, ["quality_lost", "quality_open", "quality_kept"]),
    ],
)
def test_quality(low, high, expected):
    walk = diagnose.triage(measured(quality_loss__low_percent=low, quality_loss__high_percent=high))
    assert way(walk, "Quality?") == expected


@pytest.mark.parametrize(("times", "end"), [(0.4, "same_video"), (math.inf, "find_truth")])
def test_without_a_truth_the_divergence_is_held_against_its_floor(times, end):
    numbers = measured(divergence__lpips_ratio_to_noise_floor=times)
    del numbers["quality_loss.low_percent"], numbers["quality_loss.high_percent"]
    assert way(diagnose.triage(numbers), "Quality?") == ["quality_lost", "divergence", end]


def test_close_calls_and_bounds_within_the_noise_are_said():
    walk = diagnose.triage(measured(baseline__noise_percent=12.0, breakdown__gpu_busy_percent=82.0))
    assert "close call" in walk.frame.set_index("node").loc["gpu_busy", "branch"]
    assert "within the baseline's noise" in walk.advice.set_index("node").loc["fuse", "evidence"]
    calm = diagnose.triage(measured(baseline__noise_percent=1.0, breakdown__gpu_busy_percent=85.0))
    assert not calm.frame["branch"].str.contains("close call").any()
    assert not calm.advice["evidence"].str.contains("noise").any()


WILD = st.one_of(st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3), st.floats(0, 100))


@settings(max_examples=150, deadline=None)
@given(numbers=st.dictionaries(st.sampled_from([*TREE.measurements, "no.such_name"]), WILD))
def test_whatever_was_measured_the_walk_ends_and_explains_itself(numbers):
    walk = diagnose.triage(numbers)
    nodes = [*walk.frame["node"], *walk.advice["node"]]
    assert len(nodes) == len(set(nodes))
    assert set(walk.frame["root"]) == set(TREE.roots)
    for row in walk.frame.to_dict(orient="records"):
        assert all((row["reads"], row["threshold"], row["branch"]))
        assert (row["state"] == "measured") == pd.notna(row["value"])
        assert row["to"] or row["state"] != "measured"
    for root, asked in walk.frame.groupby("root"):
        ended = root in set(walk.advice["root"])
        assert ended or asked["state"].iloc[-1] != "measured"
    assert all(bound != bound or bound >= 1 for bound in walk.advice["bound_ratio"].astype(float))
    assert str(walk)


# Thresholds and trees of one's own


def test_thresholds_move_the_branch():
    numbers = measured(breakdown__gpu_busy_percent=70.0)
    assert "fuse" in way(diagnose.triage(numbers, TREE.having({"gpu_busy_high_percent": 60.0})))
    assert way(diagnose.triage(numbers, TREE.having({"target_video_ms": 1e6})))[-1] == "fast_enough"


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"gpu_busy_hihg_percent": 1.0}, "did you mean 'gpu_busy_high_percent'"),
        ({"memory_high_percent": math.nan}, "wants a number in %"),
        ({"memory_high_percent": "80"}, "wants a number in %"),
        ({"gpu_busy_low_percent": 90.0}, "'gpu_busy'.*overlap"),
    ],
)
def test_wrong_thresholds_are_refused(thresholds, message):
    with pytest.raises(WanlabError, match=message):
        TREE.having(thresholds)


def changed(*path, to) -> dict:
    raw = copy.deepcopy(RAW)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            changed("questions", "gpu_busy", "otherwise", to="grphs"),
            "'gpu_busy': unknown node 'grphs'.*'graphs'",
        ),
        (changed("advice", "attention", "to", to="gpu_busy"), "leads back to itself"),
        (
            changed("questions", "transfers", "measurement", to="breakdown.wait"),
            "'transfers': unknown measurement",
        ),
        (
            changed("questions", "transfers", "branches", 0, "over", to="transfer"),
            "'transfers': unknown threshold",
        ),
        (changed("thresholds", "transfer_percent", to={"value": 1, "what": "x"}), "'transfer_percent'.*unit"),
        (changed("thresholds", "transfer_percent", "unit", to="ms"), "'transfers': compares different units"),
        (changed("questions", "largest", "threshold", to=None), "'largest': wants one threshold"),
        (changed("questions", "largest", "measurment", to="x"), "'largest'.*measurment"),
        (changed("questions", "peak_used", "otherwise", to="holder"), "'memory_fine': no root leads here"),
        (
            changed("questions", "video_time", "branches", to=[]),
            "'video_time': wants a measurement with branches",
        ),
        (changed("advice", "linear", "share", to="breakdown.lin"), "'linear': unknown measurement"),
        (changed("advice", "linear", "removes", to=0), "'linear': wants a share"),
        (changed("advice", "linear", "hazard", to=None), "'linear'"),
        (changed("advice", "largest", to=RAW["advice"]["linear"]), "'largest': is a question and an advice"),
        (
            changed("measurements", "peak_used_percent", "first", to=["peak_used_percent"]),
            "leads back to itself",
        ),
        (changed("roots", "Slow?", to="video"), "unknown node 'video'"),
        (changed("trees", to={}), "trees"),
    ],
)
def test_an_unsound_tree_is_refused_by_the_name_of_its_node(tmp_path, raw, message):
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    with pytest.raises(WanlabError, match=message) as caught:
        diagnose.read_tree(str(tmp_path / "mine.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"roots": 1}', "\xff"])
def test_a_file_that_is_no_tree_is_refused(tmp_path, text):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WanlabError, match=r"mine\.json"):
        diagnose.read_tree(str(path))


def test_a_tree_of_ones_own_is_walked(tmp_path):
    mine = {
        "roots": {"Busy?": "host"},
        "thresholds": {"most": {"value": 50, "unit": "%", "what": "most"}},
        "measurements": {"mine.host_percent": {"unit": "%", "notebook": "mine", "what": "host"}},
        "questions": {
            "host": {
                "question": "How busy?", "measurement": "mine.host_percent", "otherwise": "fine",
                "branches": [{"over": "most", "to": "less"}],
            }
        },
        "advice": {
            name: {"advice": name, "hazard": "h", "mitigation": "m", "help": "h"} for name in ("less", "fine")
        },
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    tree = diagnose.read_tree(str(tmp_path / "mine.json"))
    assert way(diagnose.triage({"mine.host_percent": 51}, tree), "Busy?") == ["host", "less"]
    assert diagnose.triage({}, tree).commands == ["wanlab run notebooks/mine.ipynb"]


# Saved runs


def row(notebook="11_flame_graph", run_id="a", state="finished", folder="none", **more) -> dict:
    return {
        "name": notebook, "run_id": run_id, "notebook": f"notebooks/{notebook}.ipynb", "state": state,
        "started": pd.Timestamp("2026-11-23", tz="UTC"), "reason": None, "gpu": "NVIDIA H200", "cpu": "AMD EPYC",
        "folder": str(folder), "p.model": "wan2.2-i2v-a14b",
    } | {key.replace("__", "."): value for key, value in more.items()}  # fmt: skip


BUSY = "m__breakdown__gpu_busy_percent"


def test_the_newest_finished_run_counts():
    rows = [
        row(run_id="a", **{BUSY: 1.0}),
        row(run_id="b", **{BUSY: 2.0}),
        row(run_id="c", state="died", **{BUSY: 3.0}),
    ]
    for runs in (rows, pd.DataFrame(rows)):
        saved = run_measurements(runs)
        assert saved.measured["breakdown.gpu_busy_percent"].value == 2.0
        assert saved.used["run"].tolist() == ["11_flame_graph/b"]
        assert saved.refused["why"].tolist() == ["an older run", "died"]


def test_models_and_machines_are_not_mixed():
    rows = [
        row("10_baseline", "a", m__baseline__time_per_video_ms=5.0),
        row("10_baseline", "b", m__baseline__time_per_video_ms=6.0, p__model="wan-nano"),
        row("10_baseline", "c", m__baseline__time_per_video_ms=7.0, gpu=None),
        row("10_baseline", "d", m__baseline__time_per_video_ms=8.0, p__device="cpu"),
        row("11_flame_graph", "e", **{BUSY: 90.0}),
    ]
    saved = run_measurements(rows)
    assert saved.used["run"].tolist() == ["10_baseline/a", "11_flame_graph/e"]
    assert saved.refused["why"].tolist() == ["another model", "another machine", "another machine"]
    assert saved.options == " -p model=wan2.2-i2v-a14b"
    host = run_measurements(rows, hardware="cpu")
    assert host.used["run"].tolist() == ["10_baseline/d"]
    small = run_measurements(rows, model="wan-nano")
    assert small.measured["baseline.time_per_video_ms"].value == 6.0
    none = run_measurements(rows, model="wan2.2-ti2v-5b", folder="some where")
    assert none.measured == {}
    assert none.options == " --output 'some where' -p model=wan2.2-ti2v-5b"


def test_a_record_is_taken_whole_from_one_run():
    rows = [
        row(
            "10_baseline",
            m__baseline__time_per_video_ms=5.0,
            m__breakdown__linear_percent=10.0,
            **{BUSY: 50.0},
        ),
        row("11_flame_graph", m__breakdown__linear_percent=30.0),
    ]
    found = run_measurements(rows).measured
    assert found["breakdown.linear_percent"].value == 30.0
    assert "breakdown.gpu_busy_percent" not in found  # of another trace
    assert found["baseline.time_per_video_ms"].value == 5.0


def test_runs_that_ended_for_want_of_memory_count_until_one_finishes():
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    failed = row("10_baseline", "a", state="failed", reason=reason)
    assert run_measurements([failed]).measured["runs.out_of_memory"].value == 1
    assert way(diagnose.triage(run_measurements([failed])), "Memory?") == [
        "out_of_memory",
        "holder",
    ]
    later = row("10_baseline", "b", m__baseline__time_per_video_ms=5.0)
    assert run_measurements([failed, later]).measured["runs.out_of_memory"].value == 0


def test_what_lies_beside_a_run_is_read(tmp_path):
    for name in ("base", "quality"):
        (tmp_path / name / "artifacts").mkdir(parents=True)
    environment = {"ram_gib": 100.0, "gpu": {"name": "NVIDIA H200", "memory_gib": 139.8}}
    (tmp_path / "base" / "run.json").write_text(json.dumps({"environment": environment}))
    with (tmp_path / "quality" / "artifacts" / "divergence.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerows([["metric", "mean", "ratio_to_noise_floor"], ["psnr", 40, 2], ["lpips", 0.1, "inf"]])
    rows = [
        row("10_baseline", folder=tmp_path / "base", m__baseline__peak_memory_gib=139.8 / 2),
        row(
            "40_quality",
            folder=tmp_path / "quality",
            m__quality_loss__low_percent=None,
            p__technique="bfloat16",
        ),
    ]
    walk = diagnose.triage(run_measurements(rows))
    asked = walk.frame.set_index("node")
    assert asked.loc["peak_used", "value"] == pytest.approx(50.0)
    assert asked.loc["quality_lost", "state"] == "not applicable"
    assert asked.loc["divergence", "source"] == "40_quality/a (bfloat16)"
    assert way(walk, "Quality?")[-1] == "find_truth"


def test_a_run_that_looked_at_a_given_trace_counts_for_the_traces_model(tmp_path):
    (tmp_path / "artifacts").mkdir()
    here = {
        "p__model": "wan-nano",
        "p__device": "cpu",
        "gpu": None,
    }  # where it was read, not where it was taken
    given_trace = row(p__trace="a.json.gz", folder=tmp_path, **here, **{BUSY: 60.0})
    refused = run_measurements([given_trace]).refused
    assert "not recorded" in refused["why"].iloc[0]
    facts = "fact,value\nmodel,wan2.2-i2v-a14b\nGPU,NVIDIA H200\n"
    (tmp_path / "artifacts" / "trace.csv").write_text(facts)
    saved = run_measurements([row("10_baseline", m__baseline__time_per_video_ms=5.0), given_trace])
    assert saved.used["run"].tolist() == ["10_baseline/a", "11_flame_graph/a"]
    assert "runs.out_of_memory" not in run_measurements([given_trace]).measured  # it ran no model


def test_empty_cells_and_odd_rows_do_no_harm():
    table = pd.DataFrame(
        [
            row(m__breakdown__linear_percent=float("nan"), p__height=64.0, **{BUSY: 60.0}),
            row(
                "10_baseline",
                m__baseline__variant="eager",
                m__baseline__time_per_video_ms=5.0,
                p__height=480.0,
            ),
            {"name": "odd", "state": "unreadable"},
            {"name": "10_baseline", "state": "unreadable", "reason": "not JSON"},
        ]
    )
    saved = run_measurements(table)
    assert "breakdown.linear_percent" not in saved.measured
    assert saved.options == " -p model=wan2.2-i2v-a14b -p height=480"
    assert saved.notes[1] == "height is not the same everywhere: 64 in 11_flame_graph, 480 in 10_baseline"
    assert saved.refused["why"].tolist() == ["unreadable: not JSON"]
    assert run_measurements([]).measured == {}


# The figure


@settings(max_examples=15, deadline=None)
@given(numbers=st.dictionaries(st.sampled_from(list(TREE.measurements)), st.floats(0, 100)))
def test_boxes_do_not_overlap_and_the_way_is_thick(numbers):
    walk = diagnose.triage(numbers)
    shapes = plots.decision_tree(walk).layout.shapes
    boxes = sorted((s.x0, s.y0, s.x1, s.y1) for s in shapes if s.type == "rect")
    assert len(boxes) == len(TREE.nodes)
    assert min(b[0] for b in boxes) >= 0
    assert max(b[2] for b in boxes) <= 880
    for i, (left, top, _, bottom) in enumerate(boxes):
        for other_left, other_top, _, other_bottom in boxes[i + 1 :]:
            assert left != other_left or bottom < other_top or other_bottom < top
    steps = sum(bool(to) for to in walk.frame["to"]) + sum(
        bool(TREE.advice[n].to) for n in walk.advice["node"]
    )
    assert sum(s.type == "path" and s.line.width > 1 for s in shapes) == steps
    assert sum(s.type == "path" for s in shapes) == sum(len(TREE.edges(node)) for node in TREE.nodes)


def test_a_trace_beside_a_notebooks_own_measurement_does_not_change_whose_it_is():
    mine = row("13_attention", p__trace="a.json.gz", m__attention__bound_ratio=1.2)
    assert run_measurements([mine]).measured["attention.bound_ratio"].value == 1.2
    # A map that was saved elsewhere does.
    saved = row("13_attention", p__saved="map.csv.gz", m__attention__bound_ratio=1.2)
    assert "not recorded" in run_measurements([saved]).refused["why"].iloc[0]
