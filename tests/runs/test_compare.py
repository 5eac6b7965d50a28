"""Runs side by side: what is compared, what is refused, and what is told about noise."""

from __future__ import annotations

import html
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers import faults
from support.comparison_runs import CPU, techniques, write_run, write_sweep

from wanlab import plots
from wanlab.cli import main as cli
from wanlab.core.errors import WanlabError
from wanlab.pages import render_index
from wanlab.runs import (
    Machine,
    Result,
    Work,
    better,
    choose,
    compare,
    configurations,
    efficient,
    engine_table,
    frontier_frame,
    gains_text,
    load_runs,
    pareto,
    readable,
    technique_matrix,
    technique_verdict,
)

GPU = {"device": "cuda", "gpu": {"name": "G", "sm_clock_max_mhz": 1980.0, "power_limit_w": 700.0}, "cpu": "C"}


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", techniques(), baseline={"engine": "eager", "plan": "default"})


def by_label(frame):
    return frame.set_index("configuration")


def test_one_row_per_configuration_with_ratio_interval_and_verdict(sweep):
    found = compare(sweep)
    assert found.by == "time_per_video_ms"
    assert list(found.frame["configuration"]) == [
        "engine=eager, plan=default",
        "engine=onnxruntime, plan=default",
        "engine=eager, plan=uniform-int8",
        "engine=onnxruntime, plan=uniform-int8",
    ]
    row = by_label(found.frame).loc["engine=onnxruntime, plan=default"]
    assert row["low"] <= row["ratio"] <= row["high"]
    assert row["ratio"] == pytest.approx(2.0, rel=0.03)
    assert row["verdict"] == "faster"
    assert row["noise_percent"] == 3.0  # the threshold, above an A/A noise of 1 %
    assert found.frame["verdict"][0] == "baseline"
    assert row["load_ms_ratio"] == 1.0
    assert (
        by_label(found.frame).loc["engine=eager, plan=uniform-int8", "quality_loss_percent_difference"] == 2.0
    )
    assert found.refused.empty


@pytest.mark.parametrize(
    ("ms", "noise", "threshold"), [(98.0, 1.0, 3.0), (90.0, 15.0, 3.0), (90.0, 1.0, 15.0)]
)
def test_an_effect_inside_the_threshold_or_the_noise_of_either_side_is_none(tmp_path, ms, noise, threshold):
    rows = [
        {"ms": 100.0, "cv": 1e-4},
        {"ms": ms, "cv": 1e-4, "parameters": {"plan": "x"}, "summary": {"noise_percent": noise}},
    ]
    found = compare(write_sweep(tmp_path / "s", rows), threshold_percent=threshold)
    assert found.frame["verdict"][1] == "not distinguishable"
    assert found.frame["low"][1] > 1  # the interval alone would have called it an effect


def test_repeats_are_pooled_and_their_distance_is_noise(tmp_path):
    rows = [
        {"ms": 100.0, "repeat": 1},
        {"ms": 120.0, "repeat": 2, "summary": {"peak_memory_gib": 3.0}},
        {"ms": 85.0, "parameters": {"plan": "x"}, "repeat": 1},
    ]
    found = configurations(write_sweep(tmp_path / "s", rows))
    assert [row.repeats for row in found.rows] == [2, 1]
    assert found.rows[0].samples.n == 24
    assert found.rows[0].results["peak_memory_gib"] == 2.0
    assert found.rows[0].results["time_per_video_ms"] == found.rows[0].samples.median
    assert found.rows[0].noise_percent == pytest.approx(20, abs=3)
    assert compare(found).frame["noise_percent"][1] == found.rows[0].noise_percent


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"work": {"steps": 8}}, "steps"),
        ({"work": {"height": 128}}, "height"),
        ({"work": {"frames": 9}}, "frames"),
        ({"work": {"seed": 1}}, "seed"),
        ({"work": {"model": "other"}}, "model"),
        ({"work": {"weights": "random"}}, "weights"),
        ({"work": {"guided": False}}, "guided"),
        ({"environment": CPU | {"threads": 2}}, "threads"),
        ({"environment": CPU | {"cpu": "Other"}}, "cpu"),
        ({"environment": GPU}, "gpu"),
    ],
)
def test_other_work_or_another_machine_is_refused_with_both_values_unless_allowed(tmp_path, change, field):
    rows = [{"ms": 100.0}, {"ms": 50.0, "parameters": {"plan": "x"}, **change}]
    path = write_sweep(tmp_path / "s", rows)
    found = compare(path)
    assert len(found.frame) == 1
    assert list(found.refused["field"]) == [field]
    row = found.refused.iloc[0]
    assert row["value"] != row["baseline"]
    assert row["reason"] == f"{field} is {row['value']}, the baseline's {row['baseline']}"
    assert len(compare(path, allow=[field]).frame) == 2


@pytest.mark.parametrize("field", ["sm_clock_max_mhz", "power_limit_w"])
def test_a_gpu_at_other_clocks_is_refused(tmp_path, field):
    other = GPU | {"gpu": GPU["gpu"] | {field: 500.0}}
    rows = [{"environment": GPU}, {"parameters": {"plan": "x"}, "environment": other}]
    path = write_sweep(tmp_path / "s", rows)
    assert list(compare(path).refused["field"]) == [field]
    assert compare(path, allow=["clocks"]).refused.empty


def test_resolved_work_wins_over_parameters(tmp_path):
    """steps=None is 4 steps of this model, so a row that asks for 4 did the same work, and one of 8 did not."""
    rows = [
        {"parameters": {"steps": None}, "work": {"steps": 4}},
        {"parameters": {"steps": 4}, "work": {"steps": 4}},
        {"parameters": {"steps": 8}, "work": {"steps": 8}},
    ]
    found = compare(write_sweep(tmp_path / "s", rows, axes=["steps"]))
    assert list(found.frame["configuration"]) == ["steps=None", "steps=4"]
    assert found.refused[["configuration", "value", "baseline"]].to_numpy().tolist() == [
        ["steps=8", "8", "4"]
    ]


def test_runs_without_a_work_record_are_held_by_parameters_and_the_models_defaults(tmp_path):
    for index, steps in enumerate((None, 8, 3)):
        folder = write_run(
            tmp_path / "s" / f"{index}",
            parameters={"model": "wan-nano", "steps": steps},
            started=f"2026-01-0{index + 1}T00:00:00+00:00",
        )
        (folder / "results.jsonl").unlink()
        (folder / "metrics.jsonl").write_text(
            json.dumps({"name": "time_per_video_ms", "value": 100.0}) + "\n"
        )
    from wanlab import models

    default = models.get("wan-nano").defaults.steps
    found = compare(tmp_path / "s")
    refused = set(found.refused["value"])
    assert refused == {"8", "3"} - {str(default)}
    assert set(found.refused["baseline"]) == {str(default)}


def test_numbers_of_any_notebook_are_compared_without_intervals(tmp_path):
    for index, value in enumerate((2.0, 1.0)):
        folder = tmp_path / "10_x" / f"r{index}"
        write_run(
            folder, parameters={"plan": f"p{index}"}, name="10_x", started=f"2026-01-0{index + 1}T00:00:00Z"
        )
        (folder / "results.jsonl").unlink()
        line = json.dumps({"name": "gain", "value": {"size_bytes": value, "psnr_db": 10 * value}})
        (folder / "metrics.jsonl").write_text(line + "\n")
    found = compare(tmp_path, by="size_bytes", show=["psnr_db"])
    row = found.frame.iloc[1]
    assert (row["ratio"], row["verdict"], row["gain.psnr_db_difference"]) == (2.0, "better", -10.0)
    assert math.isnan(row["low"])
    assert [better(name) for name in ("time_ms", "psnr_db", "throughput_frames_per_s", "lpips")] == [
        "min", "max", "max", "min",
    ]  # fmt: skip


def test_failures_and_runs_that_never_started_are_listed(tmp_path):
    rows = [
        {"ms": 100.0},
        {"state": "memory", "reason": "ran out of memory", "parameters": {"plan": "x"}},
    ]
    path = write_sweep(tmp_path / "s", rows, pending=[{"plan": "y"}])
    (path / "stray").mkdir()  # of an earlier sweep, with other code
    write_run(path / "stray" / "0123456789ab", parameters={"plan": "z"})
    found = compare(path)
    assert found.failures[["configuration", "state", "reason"]].to_numpy().tolist() == [
        ["engine=eager, plan=x", "memory", "ran out of memory"],
        ["engine=eager, plan=y", "pending", "has not started"],
    ]
    assert len(found.frame) == 1


def test_a_table_of_runs_and_several_folders_can_be_compared(sweep, tmp_path):
    whole = compare(load_runs(sweep), baseline="engine=eager,plan=default")
    assert whole.frame["ratio"].tolist() == compare(sweep).frame["ratio"].tolist()
    other = write_sweep(tmp_path / "other", [{"ms": 25.0, "parameters": {"plan": "new"}}])
    both = compare([sweep, other, sweep])
    assert len(both.frame) == 5
    assert both.frame["ratio"].iloc[-1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"baseline": "plan=uniform-int9"}, "did you mean 'uniform-int8'"),
        ({"baseline": "plam=default"}, "did you mean 'plan'"),
        ({"baseline": "default"}, "is not NAME=VALUE"),
        (
            {"baseline": "plan=default"},
            "fits 2 configurations, name one: engine=eager, plan=default; engine=onnx",
        ),
        ({"by": "time_per_vide_ms"}, "did you mean 'time_per_video_ms'"),
        ({"allow": ["stepz"]}, "did you mean 'steps'"),
        ({"threshold_percent": -1}, "0 or more"),
    ],
)
def test_mistakes_are_told(sweep, arguments, said):
    with pytest.raises(WanlabError, match=said):
        compare(sweep, **arguments)


def test_nothing_to_compare_is_told(tmp_path):
    with pytest.raises(WanlabError, match="no folder of runs"):
        compare(tmp_path / "nowhere")
    with pytest.raises(WanlabError, match="no runs in"):
        compare(tmp_path)
    path = write_sweep(tmp_path / "s", [{"state": "failed", "reason": "x"}])
    with pytest.raises(WanlabError, match=r"no finished run in .*: 1 did not finish"):
        compare(path)


def test_a_baseline_that_does_not_count_is_told_with_its_reason(tmp_path):
    rows = [
        {"parameters": {"engine": "eager"}},
        {"parameters": {"engine": "tvm"}, "state": "died", "reason": "kernel died"},
        {"parameters": {"engine": "compiled"}},
    ]
    path = write_sweep(tmp_path / "s", rows, axes=["engine"])
    with pytest.raises(WanlabError, match=r"that run did not finish: died \(kernel died\)"):
        compare(path, baseline="engine=tvm")
    (path / f"{2:012x}" / "status.json").unlink()
    with pytest.raises(WanlabError, match=r"that run is unreadable \(status.json is missing\)"):
        compare(path, baseline="engine=compiled")


def test_techniques_alone_and_combined_with_the_product(sweep):
    matrix = technique_matrix(compare(sweep)).set_index("techniques")
    assert list(matrix["moved"]) == [1, 1, 2]
    row = matrix.loc["engine=onnxruntime + plan=uniform-int8"]
    assert row["speedup"] == pytest.approx(1.6, rel=0.03)
    assert row["product"] == pytest.approx(2.5, rel=0.05)
    assert row["of_product"] == pytest.approx(row["speedup"] / row["product"])
    assert row["of_low"] < row["of_product"] < row["of_high"] < 1
    assert row["verdict"].startswith("gains do not multiply: 3")
    assert technique_verdict(technique_matrix(compare(sweep))).startswith(
        "Best alone: engine=onnxruntime, 1.99 times as fast as the baseline (95 % interval 1.98 to"
    )
    assert (matrix["low"] <= matrix["speedup"]).all()
    assert (matrix["speedup"] <= matrix["high"]).all()


def test_gains_that_multiply_are_said_to(tmp_path):
    rows = techniques()
    rows[3]["ms"] = 40.0
    matrix = technique_matrix(compare(write_sweep(tmp_path / "s", rows)))
    assert matrix["verdict"].iloc[-1].startswith("gains multiply: ")
    assert matrix["verdict"].iloc[0] == ""


def test_a_combination_that_is_worse_than_the_best_alone_is_not_called_best(tmp_path):
    matrix = technique_matrix(compare(write_sweep(tmp_path / "s", techniques())))
    both = matrix.set_index("techniques").loc["engine=onnxruntime + plan=uniform-int8"]
    assert (both["best_alone"], both["of_best"]) == ("engine=onnxruntime", pytest.approx(0.8, rel=0.02))
    text = technique_verdict(matrix)
    assert "Best combined" not in text
    assert (
        "No combination is faster than engine=onnxruntime alone: engine=onnxruntime + plan=uniform-int8"
        in text
    )
    rows = techniques()
    rows[3]["ms"] = 40.0
    text = technique_verdict(technique_matrix(compare(write_sweep(tmp_path / "t", rows))))
    assert "Best combined: engine=onnxruntime + plan=uniform-int8, 2.5" in text


def test_a_product_that_was_missed_within_noise_is_not_called_met(tmp_path):
    """0.78 of the product with a wide interval: unknown, not "gains multiply"."""
    rows = techniques(cv=0.25)
    rows[3]["ms"] = 40.0 / 0.78
    for row in rows:
        row["summary"] = row["summary"] | {"noise_percent": 40.0}
    verdict = technique_matrix(compare(write_sweep(tmp_path / "s", rows)))["verdict"].iloc[-1]
    assert verdict.startswith("not distinguishable from their product: 0.")


def test_a_technique_without_effect_is_no_technique(tmp_path):
    rows = techniques()
    rows[2]["summary"] = {"effect": "not applied"}
    matrix = technique_matrix(compare(write_sweep(tmp_path / "s", rows)))
    assert "plan=uniform-int8" not in set(matrix["techniques"])
    assert math.isnan(matrix["product"].iloc[-1])


def test_engines_before_and_after_with_those_that_were_only_built(sweep):
    built = [
        Result(
            work=Work(model="wan-nano", component="expert_high"), engine="tensorrt", dtype="fp16", state="built only",
            machine=Machine(gpu=f"GPU of compute capability {sm}"), build_ms=9e3, source="a",
        )
        for sm in ("8.9", "12.0")
    ]  # fmt: skip
    table = engine_table(compare(sweep), built)
    assert list(table["engine"]) == ["PyTorch, eager", "ONNX Runtime", "TensorRT"]
    assert list(table["state"]) == ["measured", "measured", "built, not executed"]
    assert table["time_per_video_ms_ratio"][1] == pytest.approx(2, rel=0.03)
    assert math.isnan(table["time_per_video_ms"][2])
    assert "8.9" in table["note"][2]
    assert "9 s" in table["note"][2]
    low, high = map(float, table["interval"][1].split(" to "))
    assert low < 1.99 < high
    assert table["interval"][0] == table["interval"][2] == ""
    gain = f"(95 % interval {table['interval'][1]})"
    assert gains_text(table).startswith(
        f"ONNX Runtime 1.99 times as fast as the original {gain}; TensorRT built"
    )


def test_what_runs_said_of_their_weights_is_said_of_the_comparison(tmp_path):
    rows = techniques()
    for row in rows:
        more = ["fp8 codes"] if row["parameters"]["engine"] == "onnxruntime" else []
        row["summary"]["notes"] = ["its end is cut", *more]
    found = compare(write_sweep(tmp_path / "sweep", rows))
    faster = "engine=onnxruntime, plan=default, engine=onnxruntime, plan=uniform-int8"
    assert found.notes == ("its end is cut", f"{faster}: fp8 codes")


def test_the_fastest_within_the_quality_limit_is_chosen(sweep, tmp_path):
    found = choose(compare(sweep))
    assert found.label == "engine=onnxruntime, plan=default"
    assert found.text.startswith(
        "Use engine=onnxruntime, plan=default: 1.99 times as fast as engine=eager, plan="
    )
    assert "(95 % interval 1.98 to 2.00, noise 3.0 %), quality loss +0.00 % (-0.50 to +0.50)" in found.text
    assert found.text.endswith("quality loss +0.00 % (-0.50 to +0.50). Measured on Test CPU, 1 thread.")
    assert faults(found.answer) == []
    assert found.answer.headline == (
        "Use ONNX Runtime: 1.99 times as fast as eager PyTorch (95 % interval 1.98 to 2.00), quality loss"
        " < 0.01 % (95 % interval -0.50 to +0.50)."
    )
    assert [tile.title for tile in found.answer.tiles][:3] == ["speed-up", "time per video", "quality loss"]
    assert found.notes == (
        "4 of 4 configurations within 3 % of quality loss",
        "the baseline was run once, so drift between runs is not known",
    )
    rows = techniques()
    rows[1]["summary"] = {"quality_loss_percent": 2.9, "quality_loss_high_percent": 3.2}
    assert choose(compare(write_sweep(tmp_path / "a", rows))).label == "engine=onnxruntime, plan=uniform-int8"
    rows[3]["summary"] |= {"effect": "not applied"}
    assert choose(compare(write_sweep(tmp_path / "b", rows))).label == "engine=eager, plan=uniform-int8"
    slow = choose(
        compare(write_sweep(tmp_path / "c", [{"ms": 100.0}, {"ms": 99.0, "parameters": {"plan": "x"}}]))
    )
    assert slow.text.startswith("Keep engine=eager, plan=default: nothing within the limit is better")
    assert slow.answer.headline.startswith("Keep eager PyTorch: of 2 configurations, none within the limit")


def test_a_sweep_over_the_parameter_configuration_is_compared_chosen_and_drawn(tmp_path):
    rows = [
        {"ms": ms, "parameters": {"configuration": name}} for name, ms in (("eager", 100.0), ("mine", 50.0))
    ]
    folder = write_sweep(
        tmp_path / "sweep", rows, axes=["configuration"], baseline={"configuration": "eager"}
    )
    compared = compare(folder)
    labels = [row.label for row in compared.rows]
    assert list(compared.frame["configuration"]) == labels
    found = choose(compared)
    assert found.row["ratio"] == pytest.approx(2.0, rel=0.05)
    apart = readable(compared, apart=True)
    assert list(apart["configuration"]) == ["eager", "mine"]
    assert list(apart["95 % interval"] != "") == [False, True]
    flat = frontier_frame(compared, {compared.by: "min", "quality_loss_percent": "min"})
    plots.run_frontier(flat, compared.by, "quality_loss_percent", baseline=labels[0])
    assert found.answer.headline in html.unescape(render_index(folder).read_text())


def test_a_quality_loss_near_zero_is_not_shown_as_zero(tmp_path):
    rows = techniques()
    rows[1]["summary"] = {f"quality_loss_{end}percent": 1e-5 for end in ("", "low_", "high_")}
    text = choose(compare(write_sweep(tmp_path / "s", rows))).text
    assert text.startswith("Use engine=onnxruntime, plan=default: 1.99 times as fast")
    assert "quality loss below 0.01 %. Measured on Test CPU" in text


def test_a_loss_without_an_interval_does_not_choose(tmp_path):
    """A point estimate of -0.3 % does not win against a lossless configuration that is as fast."""
    rows = [
        {"ms": 100.0, "summary": {"plan": "default"}},
        {"ms": 37.3, "parameters": {"engine": "onnxruntime"}},
        {"ms": 37.0, "parameters": {"engine": "onnxruntime", "plan": "ffn-int8"}},
    ]
    unknown = {"quality_loss_low_percent": None, "quality_loss_high_percent": None}
    for row, loss in zip(rows, (0.0, 0.1, -0.3), strict=True):
        row["summary"] = unknown | {"quality_loss_percent": loss}
    found = choose(compare(write_sweep(tmp_path / "a", rows)))
    assert found.label == "engine=onnxruntime, plan=default"
    assert "1 of unknown loss: without an interval (three cases or more) it is not chosen" in found.notes
    rows[2]["summary"] |= {"quality_loss_low_percent": -0.9, "quality_loss_high_percent": 0.4}
    found = choose(compare(write_sweep(tmp_path / "b", rows)))
    assert found.label == "engine=onnxruntime, plan=default"
    assert "2 configurations are equally good within the noise; this one loses no quality" in found.notes
    rows[1]["summary"] |= {"psnr_db": 20.0, "divergence_lpips": 0.3}  # no plan, and yet another video
    assert choose(compare(write_sweep(tmp_path / "c", rows))).label == "engine=onnxruntime, plan=ffn-int8"


def test_noise_does_not_choose(tmp_path):
    losses = {"a": 2.0, "b": 0.5, "c": 0.1}
    rows = [{"ms": 100.0}] + [
        {
            "ms": ms,
            "parameters": {"plan": name},
            "summary": {"quality_loss_percent": losses[name], "quality_loss_high_percent": losses[name]},
        }
        for name, ms in (("a", 50.0), ("b", 50.5), ("c", 60.0))
    ]
    found = choose(compare(write_sweep(tmp_path, rows)))
    assert found.row["plan"] == "b"  # as fast as a, and loses less; c loses least and is slower
    assert len(found.alike) == 2
    assert "2 configurations are equally good within the noise; this one loses least" in found.notes


VALUES = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=24), st.sampled_from(["min", "max"]))
def test_pareto_is_what_nobody_dominates(rows, sense):
    frame = pd.DataFrame(rows, columns=["a", "b", "c"], index=[10 * i for i in range(len(rows))])
    goals = {"a": "min", "b": sense, "c": "max"}
    signs = [1 if s == "min" else -1 for s in goals.values()]
    costs = [tuple(s * v for s, v in zip(signs, row, strict=True)) for row in rows]

    def dominates(one, two):
        return all(x <= y for x, y in zip(one, two, strict=True)) and any(
            x < y for x, y in zip(one, two, strict=True)
        )

    expected = [
        not any(map(math.isnan, cost)) and not any(dominates(other, cost) for other in costs)
        for cost in costs
    ]
    found = pareto(frame, goals)
    assert found.tolist() == expected
    assert found.index.equals(frame.index)
    assert found.dtype == bool


def test_what_had_no_effect_is_not_efficient():
    frame = pd.DataFrame(
        {"time_ms": [2.0, 1.0, 3.0], "effect": ["applied", "not applied", "applied"]}, index=[5, 6, 7]
    )
    assert efficient(frame, {"time_ms": "min"}).to_dict() == {5: True, 6: False, 7: False}
    assert efficient(frame[["time_ms"]], {"time_ms": "min"}).tolist() == [False, True, False]


def test_pareto_of_unknown_columns_is_told():
    frame = pd.DataFrame({"time_ms": [1.0, None], "words": ["x", "y"]})
    assert pareto(frame, {"time_ms": "min"}).tolist() == [True, False]
    assert not pareto(frame, {"words": "min"}).any()
    with pytest.raises(WanlabError, match="did you mean 'time_ms'"):
        pareto(frame, {"time": "min"})
    with pytest.raises(WanlabError, match='"min" or "max"'):
        pareto(frame, {"time_ms": "least"})


HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J"


def test_command_prints_table_refusals_and_failures_and_writes_csv(tmp_path, capsys):
    rows = techniques()
    rows += [{"parameters": {"plan": HOSTILE}}, {"parameters": {"plan": "long"}, "work": {"steps": 9}}]
    rows += [{"state": "died", "reason": "kernel died", "parameters": {"plan": "dead"}}]
    path = write_sweep(tmp_path / "s", rows)
    csv = tmp_path / "out.csv"
    assert cli.main(["compare", str(path), "--baseline", "engine=eager,plan=default", "--csv", str(csv)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["configuration", "verdict", "time_per_video_ms"]
    assert any("engine=onnxruntime, plan=default" in line and "faster" in line for line in lines)
    assert "steps is 9, the baseline's 4" in text
    assert any("dead" in line and "died" in line and "kernel died" in line for line in lines)
    assert len(pd.read_csv(csv)) == 5
    assert cli.main(["compare", str(path), "--allow", "steps", "--by", "peak_memory_gib"]) == 0
    assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{empty}"], "no runs in"),
        (["{empty}/x"], "no folder of runs"),
        (["{sweep}", "--baseline", "plan=none"], "no run has plan=none"),
        (["{sweep}", "--baseline", "plan=default"], "name one"),
        (["{sweep}", "--by", "tim_per_video_ms"], "did you mean 'time_per_video_ms'"),
        (["{sweep}", "--allow", "step"], "did you mean 'steps'"),
        (["{sweep}", "--csv", "/proc/none/x.csv"], "cannot write"),
    ],
)
def test_mistakes_of_the_command_are_one_line_and_status_2(sweep, tmp_path, capsys, arguments, said):
    (tmp_path / "empty").mkdir()
    places = {"sweep": sweep, "empty": tmp_path / "empty"}
    assert cli.main(["compare", *(argument.format(**places) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("wanlab: error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def frame_of(count: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "configuration": [f"plan=p{i}" for i in range(count)],
            "plan": [f"p{i}" for i in range(count)],
            "time_per_video_ms": generator.lognormal(5, 0.3, count),
            "peak_memory_gib": generator.lognormal(1, 0.2, count),
            "quality_loss_percent": [math.nan, *generator.normal(1, 1, count - 1)],
        }
    )


def test_frontier_joins_the_efficient_ones_and_marks_the_baseline():
    frame = frame_of(30)
    goals = {"time_per_video_ms": "min", "quality_loss_percent": "min"}
    frame["efficient"] = pareto(frame, goals)
    figure = plots.run_frontier(frame, *goals, baseline="plan=p3", size="peak_memory_gib")
    made = json.loads(figure.to_json())
    joined = next(trace for trace in made["data"] if trace["name"] == "none is better in both")
    assert joined["x"] == sorted(joined["x"])
    assert len(joined["x"]) == int(frame["efficient"].sum())
    marks = {trace["name"]: len(trace["x"]) for trace in made["data"] if trace["mode"] == "markers"}
    assert marks == {"configurations": 29, "baseline: p3": 1}  # one has no quality


def test_parallel_lines_are_plain_lines_with_every_value():
    frame = frame_of(12)
    columns = {"plan": None, "time_per_video_ms": "min", "quality_loss_percent": "min"}
    figure = plots.parallel_lines(frame, columns, highlighted=["plan=p1"], baseline="plan=p0")
    made = json.loads(figure.to_json())
    assert {trace["type"] for trace in made["data"]} == {"scatter"}
    heights = [y for trace in made["data"] for y in trace["y"] if y is not None]
    assert min(heights) >= 0
    assert max(heights) <= 1
    with pytest.raises(WanlabError, match="needs the columns"):
        plots.parallel_lines(frame, {"nothing": "min", "plan": None})


def test_technique_and_failure_figures(sweep, tmp_path):
    figure = json.loads(plots.technique_bars(technique_matrix(compare(sweep))).to_json())
    assert "product" in " ".join(str(trace["name"]) for trace in figure["data"])
    failures = pd.DataFrame({"state": ["died", "failed", "died"]})
    bars = json.loads(plots.failure_bars(failures, finished=5).to_json())
    assert sum(itertools.chain.from_iterable(trace["x"] for trace in bars["data"])) == 8
    with pytest.raises(WanlabError, match="needs the columns"):
        plots.failure_bars(pd.DataFrame({"x": []}))


def test_names_in_figures_cannot_become_markup(tmp_path):
    path = write_sweep(tmp_path / "s", [{}, {"ms": 50.0, "parameters": {"plan": HOSTILE}}])
    frame = compare(path).frame.assign(efficient=True)
    matrix = technique_matrix(compare(path))
    goals = {"time_per_video_ms": "min", "peak_memory_gib": "min"}
    for figure in (
        plots.run_frontier(frame, *goals),
        plots.parallel_lines(frame, {"plan": None, **goals}),
        plots.technique_bars(matrix),
    ):
        assert "<img" not in figure.to_json().encode().decode("unicode_escape")


def test_a_verdict_says_first_what_holds(tmp_path):
    """A busy machine: what was measured is far from 1, its noise is farther."""
    rows = techniques(cv=1e-4)
    for row in rows:
        row["summary"] = row["summary"] | {"noise_percent": 300.0}
    found = compare(write_sweep(tmp_path / "s", rows, baseline={"engine": "eager", "plan": "default"}))
    assert set(found.frame["verdict"]) == {"baseline", "not distinguishable"}
    assert technique_verdict(technique_matrix(found)).startswith(
        "No difference from the baseline can be told from noise: best alone engine=onnxruntime, ratio 2.00 ("
    )
    assert list(readable(found).columns)[:2] == ["configuration", "verdict"]
    assert choose(found).text.startswith(
        "Keep engine=eager, plan=default: nothing within the limit is better"
    )


def test_a_sweep_whose_executor_is_of_another_type_is_refused_by_the_field(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", techniques(), executor={"kind": "local", "slots": "two"})
    with pytest.raises(WanlabError, match="slots"):
        compare(sweep)
