"""Typed rows: what a run writes is read again, wrong rows are refused, and one rule says what is the same work."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.comparison_runs import write_run, write_sweep

import wanlab
from wanlab import models, runs
from wanlab.core.errors import WanlabError
from wanlab.core.files import plain
from wanlab.runs import Machine, Quality, Result, Work, compare, differences, same_work
from wanlab.runs.result import parse_result
from wanlab.runs.results import read_run
from wanlab.runs.same_work import FACTS

VIDEO = Work(
    model="wan-nano", weights="pretrained", height=64, width=64, frames=5, steps=4, guided=True, seed=0
)
H200 = Machine(gpu="NVIDIA H200", memory_gib=139.8, sm_clock_max_mhz=1980.0, power_limit_w=700.0)
ROW = Result(work=VIDEO, engine="eager", dtype="bfloat16", samples_ms=(3.0, 1.0, 2.0), machine=H200)
replace = msgspec.structs.replace


@pytest.fixture
def run(tmp_path):
    """A run that is open, as a notebook has it."""
    return wanlab.start("41_x", {}, output=tmp_path / "outputs")


def test_what_a_run_records_is_read_again_with_its_machine_and_software(run):
    row = replace(ROW, machine=None, device="cpu", quality=Quality(psnr_db=math.inf, divergence_lpips=0.0))
    written = run.result(row, replace(row, engine="onnxruntime"))
    assert written.machine.threads >= 1
    assert written.software["torch"]
    assert [each.engine for each in run.results] == ["eager", "onnxruntime"]
    read = read_run(run.folder)
    assert read.result == replace(written, source=f"41_x/{run.id}")
    assert read.results[1].engine == "onnxruntime"
    assert read.row["m.psnr_db"] == math.inf
    assert (read.row["m.time_per_video_ms"], read.row["m.time_per_frame_ms"]) == (2.0, 0.4)


def test_a_row_that_is_recorded_again_replaces_the_first(run):
    run.result(ROW, replace(ROW, engine="compiled"))
    run.result(replace(ROW, samples_ms=(9.0,)))
    rows = read_run(run.folder).results
    assert [(row.engine, row.time_ms) for row in rows] == [("eager", 9.0), ("compiled", 2.0)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"engine": "eager"}, "takes a wanlab.runs.Result, not dict"),
        (replace(ROW, engine=None), "Expected `str`, got `null` - at `\\$.engine`"),
        (replace(ROW, samples_ms=("fast",)), "at `\\$.samples_ms"),
        (replace(ROW, state="nearly"), "nearly"),
        (replace(ROW, work="a video"), "at `\\$.work`"),
    ],
)
def test_a_row_of_the_wrong_types_is_refused_before_it_is_written(run, wrong, words):
    with pytest.raises(WanlabError, match=words):
        run.result(wrong)
    assert not (run.folder / "results.jsonl").exists()


def test_a_run_whose_results_cannot_be_read_says_which_line(tmp_path):
    folder = write_run(tmp_path / "r")
    file = folder / "results.jsonl"
    good = file.read_text()
    file.write_text(good + '{"work": {}, "engine": 3.5}\n')
    row = wanlab.load_runs(tmp_path).iloc[0]
    assert row["state"] == "unreadable"
    assert "results.jsonl, line 2: Expected `str`" in row["reason"]
    file.write_text(good + '{"work": {"mo')  # cut after the run ended
    assert wanlab.load_runs(tmp_path).iloc[0]["state"] == "unreadable"
    (folder / "status.json").write_text('{"state": "died"}')  # torn by a kernel that died
    assert wanlab.load_runs(tmp_path).iloc[0]["state"] == "died"


ON_GPU = [name for name in FACTS if name not in ("cpu", "threads", "cores")]


@given(st.sampled_from(ON_GPU), st.sampled_from(ON_GPU))
def test_only_a_field_that_is_allowed_may_differ(field, allowed):
    other = changed(ROW, field)
    assert [name for name, *_ in differences(other, ROW)] == [field]
    assert not same_work(ROW, other)
    assert same_work(other, ROW, allow=[allowed]) == (field == allowed)
    with pytest.raises(WanlabError, match="did you mean"):
        differences(ROW, other, allow=[f"{field}x"])


def changed(row, field):
    """The row with another value of one field that must be equal."""
    values = {"guided": False, "gpu": "Tesla T4", "dtype": "float32"}
    part = "machine" if field in Machine.__struct_fields__ else "work"
    if field == "dtype":
        return replace(row, dtype=values["dtype"])
    if field == "component":
        return replace(row, work=replace(row.work, component="expert_high"))
    before = getattr(getattr(row, part), field)
    value = values.get(field, f"other {before}" if isinstance(before, str) else (before or 0) + 1)
    return replace(row, **{part: replace(getattr(row, part), **{field: value})})


def test_threads_are_of_the_cpu_only():
    on_cpu = replace(ROW, machine=Machine(cpu="C", threads=1))
    more = replace(ROW, machine=Machine(cpu="C", threads=2))
    assert differences(more, on_cpu) == [("threads", 2, 1)]
    assert differences(ROW, on_cpu) == [("gpu", "NVIDIA H200", None)]  # what else differs says nothing more
    assert same_work(replace(ROW, machine=replace(H200, cpu="C", threads=8)), ROW)


def test_weights_and_dtype_count_only_where_both_are_known():
    for field, bare in (
        ("weights", replace(ROW, work=replace(VIDEO, weights=None))),
        ("dtype", replace(ROW, dtype=None)),
    ):
        assert same_work(bare, ROW)
        assert [name for name, *_ in differences(changed(ROW, field), ROW)] == [field]


def test_models_of_another_dtype_are_compared_only_where_the_runs_vary_it(tmp_path):
    for varied in (False, True):
        folder = tmp_path / str(varied)
        rows = [
            {
                "parameters": {"plan": f"p{i}"} | ({"dtype": dtype} if varied else {}),
                "summary": {"dtype": dtype},
            }
            for i, dtype in enumerate(("float32", "bfloat16"))
        ]
        found = compare(write_sweep(folder, rows))
        assert list(found.refused["field"]) == ([] if varied else ["dtype"])


def test_a_single_call_has_figures_of_a_call():
    call = replace(ROW, work=replace(VIDEO, component="expert_high", steps=None, seed=None, guided=None))
    row = call.row()
    assert row["time_per_call_ms"] == 2.0
    assert not {"time_per_video_ms", "time_per_frame_ms"} & set(row)
    assert [name for name, *_ in differences(call, ROW)] == [
        "component"
    ]  # a call has no steps, seed or guidance
    assert str(call.work) == "wan-nano expert_high forward, 5x64x64"


def test_rows_survive_json_whole():
    row = replace(
        ROW,
        plan="uniform-int8",
        techniques=("a", "b"),
        figures={"gain_db": math.inf, "words": "x", "yes": True},
    )
    assert parse_result(json.loads(json.dumps(plain(row.to_dict()))), "a file") == row


def test_a_run_without_a_result_did_what_its_parameters_say(tmp_path):
    folder = write_run(tmp_path / "r", parameters={"model": "wan-nano", "steps": None, "guidance_scale": 1.0})
    (folder / "results.jsonl").unlink()
    defaults = models.get("wan-nano").defaults
    work = read_run(folder).work
    assert (work.steps, work.height, work.guided) == (defaults.steps, defaults.height, False)
    assert runs.read_run(folder).result is None
