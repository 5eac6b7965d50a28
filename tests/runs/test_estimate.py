"""What a run will take: from runs of this machine, scaled as far as is certain, and never made up."""

from __future__ import annotations

import json

import pytest

from wanlab.cli.main import main
from wanlab.core.errors import WanlabError
from wanlab.launch.execute import execute
from wanlab.launch.grid import expand, load_grid
from wanlab.measure.environment import environment, hardware
from wanlab.runs import estimate as estimates
from wanlab.runs.estimate import EarlierRuns, Estimate, bounds, total, video_tflop
from wanlab.runs.prepare import prepare
from wanlab.runs.result import Machine, Result, Work
from wanlab.runs.rules import faults


@pytest.fixture
def lab(tmp_path, monkeypatch, root):
    """An empty project; `lab.ran` leaves a finished run in it, `lab.asked` is the estimate of another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimates, "default_outputs", lambda: tmp_path / "outputs")

    class Lab:
        notebook = "10_baseline"
        machine = hardware()

        def prepared(self, **parameters):
            return prepare(self.notebook, parameters, output=tmp_path / "outputs")

        def ran(self, seconds, peak_gib=1.5, result=None, run_id="", status=None, **parameters):
            ready = self.prepared(**parameters)
            folder = ready.folder.path.with_name(run_id or ready.run_id)
            folder.mkdir(parents=True)
            record = ready.header() | {"environment": self.machine, "sealed": False}
            (folder / "run.json").write_text(json.dumps(record))
            end = {"state": "finished", "exit": 0, "seconds": seconds, "peak_memory_gib": peak_gib}
            end |= {"started": f"2026-01-{len(list(folder.parent.iterdir())):02}"}
            (folder / "status.json").write_text(json.dumps(end | (status or {})))
            if result is not None:
                (folder / "results.jsonl").write_text(json.dumps(result.to_dict()) + "\n")

        def asked(self, **parameters) -> Estimate:
            return EarlierRuns().estimate(self.prepared(**parameters), force=True)

    return Lab()


def test_the_hardware_is_that_of_the_environment():
    whole = environment()
    found = hardware()
    assert {name: whole[name] for name in ("cpu", "cores", "cores_available", "ram_gib")} == {
        name: value for name, value in found.items() if name != "gpu"
    }
    assert found["gpu"] == (whole["gpu"] or {}).get("name")


def test_nothing_is_known_without_a_run(lab):
    assert lab.asked().text == "not known: no run of it on this machine yet"
    lab.notebook = "15_triage"
    assert not lab.asked().known


def test_runs_of_the_same_work_are_their_own_estimate(lab):
    lab.ran(60.0, 1.5, seed=3)
    lab.ran(66.0, 1.8, run_id="0" * 12, seed=3)
    lab.ran(300.0, 1.8, run_id="1" * 12, seed=3)
    found = lab.asked(seed=3)
    assert (
        found.text
        == "about 1.1 min and about 1.8 GiB (3 earlier runs of it on this machine with the same parameters)"
    )
    assert not lab.asked(seed=4).known  # not known to be the same work


def test_the_default_of_the_model_is_the_number_that_it_is(lab):
    lab.ran(60.0)
    steps = estimates._resolved({"model": "wan-nano", "steps": None})["steps"]
    assert lab.asked(steps=steps).low_s == 60.0


@pytest.mark.parametrize(
    "other",
    [
        {"status": {"state": "failed", "exit": 1}},
        {"status": {"exit": None}},  # in JupyterLab, where its reader took his time
    ],
)
def test_runs_that_did_not_finish_alone_tell_nothing(lab, other):
    lab.ran(60.0, **other)
    assert not lab.asked().known


@pytest.mark.parametrize("fact", ["cpu", "cores", "cores_available", "gpu", "ram_gib"])
def test_runs_of_another_machine_tell_nothing(lab, fact):
    lab.machine = lab.machine | {fact: "another" if fact in ("cpu", "gpu") else 1000}
    lab.ran(60.0)
    assert not lab.asked().known


def test_one_run_with_another_count_gives_bounds_and_two_a_line(lab):
    lab.ran(60.0, iterations=2)
    more, less = lab.asked(iterations=4), lab.asked(iterations=1)
    assert (more.low_s, more.high_s) == (60.0, 120.0)
    assert (less.low_s, less.high_s) == (30.0, 60.0)
    assert more.text.startswith("1.0 to 2.0 min and about 1.5 GiB (scaled from an earlier run")
    assert more.text.endswith("with iterations=2)")
    lab.ran(100.0, iterations=4)
    found = lab.asked(iterations=8)  # 20 s, and 20 s each
    assert (found.low_s, found.high_s) == (pytest.approx(180), pytest.approx(180))
    assert "with iterations=2, 4" in found.source
    assert not lab.asked(iterations=8, seed=1).known  # two parameters differ


def test_another_size_is_scaled_by_counted_operations(lab):
    small, large = {"height": 64, "width": 64, "frames": 5}, {"height": 64, "width": 64, "frames": 9}
    lab.ran(60.0, 1.5, **small)
    ratio = video_tflop({"model": "wan-nano"} | large) / video_tflop({"model": "wan-nano"} | small)
    found = lab.asked(**large)
    assert ratio > 1.2
    assert (found.low_s, found.high_s) == (60.0, pytest.approx(60.0 * ratio))
    assert (found.low_gib, found.high_gib) == (1.5, None)  # a larger video needs no less
    assert "times the operations of an earlier run" in found.source


def test_a_first_run_takes_at_least_one_video_at_the_best_rate_of_this_machine(lab):
    work = Work(model="wan-nano", height=64, width=64, frames=5, steps=4, guided=True)
    counted = video_tflop(
        {"model": "wan-nano", "height": 64, "width": 64, "frames": 5, "steps": 4, "guidance_scale": 2}
    )
    timed = Result(
        engine="eager", work=work, samples_ms=(2000.0,), machine=Machine(cpu="this"), dtype="float32"
    )
    lab.notebook = "41_configuration"
    lab.ran(60.0, result=timed)
    lab.notebook = "10_baseline"
    small = {"height": 64, "width": 64, "frames": 5, "steps": 8}
    found = lab.asked(device="cpu", **small)
    asked = video_tflop({"model": "wan-nano"} | small)
    assert found.low_s == pytest.approx(2.0 * asked / counted)
    assert found.high_s is None
    assert found.text.startswith("at least ")
    assert "in 41_configuration; no run of this one yet" in found.source
    lab.notebook = "51_platforms"  # calls of one component, and no video
    assert not lab.asked(device="cpu").known


def test_operations_of_a_video_grow_with_its_steps_and_branches():
    small = {"model": "wan-nano", "height": 64, "width": 64, "frames": 5}
    two, four = (video_tflop(small | {"steps": steps, "guidance_scale": 5}) for steps in (2, 4))
    alone = video_tflop(small | {"steps": 4, "guidance_scale": 1})
    assert two < four < 2 * two
    assert four / 2 < alone < four
    assert video_tflop({"model": "no such model"}) is None
    assert video_tflop({"model": "wan-nano", "frames": 6}) is None  # no legal size


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.0, 1.0, "about 1.0 min"),
        (0.031, 0.033, "0.031 to 0.033 min"),
        (123.4, None, "at least 123 min"),
        (None, 3.0, "at most 3.0 min"),
        (None, None, ""),
    ],
)
def test_bounds_in_words(low, high, words):
    assert bounds(low, high, "min") == words


def test_a_sweep_is_the_sum_of_its_runs_on_its_slots():
    minute = Estimate(60.0, 60.0, source="measured")
    assert total([minute] * 4, [False] * 4, 2) == "about 2.0 min for 4 runs (measured)"
    assert total([minute] * 4, [True] * 4, 2) == "about 4.0 min for 4 runs (measured)"
    some = [minute, Estimate(60.0, 120.0, source="scaled"), Estimate()]
    assert total(some, [True] * 3, 1) == (
        "2.0 to 3.0 min for 2 runs (2 kinds of estimate, see each run); 1 more run of which nothing is known"
    )
    assert total([Estimate()], [True], 1) == "how long is not known: no run of it on this machine yet"
    assert total([], [], 1) == "nothing is to run"


def test_the_command_prints_the_estimate_and_runs_nothing(lab, capsys, tmp_path):
    lab.ran(60.0, 1.5)
    out = str(tmp_path / "outputs")
    assert main(["run", "10_baseline", "--estimate", "--output", out]) == 0
    assert "nothing to do: it has finished before" in capsys.readouterr().out
    assert main(["run", "10_baseline", "--estimate", "--force", "--output", out]) == 0
    assert capsys.readouterr().out.startswith(
        "10_baseline: expected to take about 1.0 min and about 1.5 GiB ("
    )
    assert main(["run", "10_baseline", "-p", "seed=9", "--estimate", "--output", out]) == 0
    assert "not known: no run of it" in capsys.readouterr().out
    assert len(list((tmp_path / "outputs" / "10_baseline").iterdir())) == 1


STANDARD = {"model": "wan-nano", "device": "auto", "height": None, "width": None, "frames": None}


@pytest.mark.parametrize(
    ("given", "names", "said"),
    [
        ({"model": "wan-nona"}, ("model",), "did you mean 'wan-nano'"),
        ({"height": 70}, ("height", "width", "frames"), "the nearest is 64x"),
        ({"plan": "uniform-int9"}, ("plan",), "did you mean 'uniform-int8'"),
        ({"plans": ["default", "ffn-fp9"]}, ("plans",), "did you mean 'ffn-fp8'"),
        ({"dtype": "float23"}, ("dtype",), "did you mean 'float32'"),
        ({"device": "gpu"}, ("device",), "not 'gpu'"),
        ({"rounds": 0}, ("rounds",), "give 1 or more"),
        ({"precision": 0.0}, ("precision",), "above 0"),
    ],
)
def test_what_a_notebook_would_refuse_is_refused_before_it_starts(given, names, said):
    ((found, words),) = faults(STANDARD | given)
    assert found == names
    assert said in words


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"plan": "default", "plans": ["default"], "frames": 17, "steps": 0},
        {"model": "someone/a-model-of-the-hub"},
        {"frames": [5, 9, 17]},
    ],
)
def test_what_may_be_right_is_not_refused(given):
    assert list(faults(STANDARD | given)) == []
    assert list(faults({"model": "anything", "rounds": 0})) == []  # a notebook with rules of its own


def test_a_grid_names_the_line_of_what_its_notebook_would_refuse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = tmp_path / "grid.yaml"
    grid.write_text("name: g\nnotebook: 10_baseline\nparameters: {frames: 6}\naxes: {steps: [2, 4]}\n")
    with pytest.raises(WanlabError, match=r"line 3, parameters.frames: steps=2: wan-nano: 6 frames"):
        expand(load_grid(grid))


def test_a_run_says_at_its_start_what_is_expected(tmp_path, capsys, fixture_notebooks, monkeypatch):
    monkeypatch.setattr(estimates, "default_outputs", lambda: tmp_path)
    for steps, said in ((3, "not known: no run of this work"), (6, "(scaled from an earlier run of it")):
        execute(fixture_notebooks / "ok.ipynb", {"steps": steps}, output=tmp_path)
        first = capsys.readouterr().err.splitlines()[0]
        assert first.startswith(("ok: expected to take ", "ok: how long it takes is not known: "))
        assert said in first
