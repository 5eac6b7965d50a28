"""The record of a finished run is what the run wrote: anything else is said, everywhere that shows runs."""

from __future__ import annotations

import json

import nbformat
import pytest
from support.comparison_runs import write_run, write_sweep

from wanlab.cli.main import main
from wanlab.core.errors import WanlabError
from wanlab.launch import execute
from wanlab.measure.timing import Samples
from wanlab.pages.report import render
from wanlab.pages.sweep_page import render_index
from wanlab.runs import Result, Work, compare, load_results, load_runs, prepare
from wanlab.runs.folder import RunFolder
from wanlab.runs.result import parse_result
from wanlab.runs.results import read_run
from wanlab.runs.seal import seal


def sealed(folder, **values):
    """A finished run with its seal, as `run.finish` leaves it."""
    write_run(folder, **values)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"sealed": True}))
    (folder / "artifacts").mkdir(exist_ok=True)
    (folder / "artifacts" / "table.csv").write_text("a,b\n1,2\n")
    (folder / "traces").mkdir()
    (folder / "traces" / "a.json").write_text("{}")
    seal(RunFolder(folder))
    return folder


def edit(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


CHANGES = {
    "results.jsonl was changed": lambda run: edit(
        run / "results.jsonl", '"samples_ms": [', '"samples_ms": [1.0, '
    ),
    "results.jsonl was removed": lambda run: (run / "results.jsonl").unlink(),
    "run.json was changed": lambda run: edit(run / "run.json", '"eager"', '"onnxruntime"'),
    "metrics.jsonl was added": lambda run: (run / "metrics.jsonl").write_text('{"name": "x", "value": 1}\n'),
    "artifacts/table.csv was changed": lambda run: edit(run / "artifacts" / "table.csv", "1", "9"),
    "traces/a.json was changed": lambda run: (run / "traces" / "a.json").write_text("[]"),
    "seal.json was removed": lambda run: (run / "seal.json").unlink(),
    "seal.json was changed": lambda run: edit(run / "seal.json", "files", "fils"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_record_that_was_changed_after_the_run_ended_is_marked(tmp_path, words):
    run = sealed(tmp_path / "a")
    assert read_run(run).state == "finished"
    CHANGES[words](run)
    row = read_run(run).row
    assert (row["state"], row["reason"]) == ("changed", f"{words} after the run ended; run it again")


def test_a_changed_run_is_named_by_compare_the_page_the_list_and_the_platforms(tmp_path, capsys):
    rows = [{"ms": 100.0}, {"ms": 50.0, "parameters": {"engine": "onnxruntime"}}]
    folder = write_sweep(tmp_path / "s", rows, baseline={"engine": "eager"})
    second = folder / f"{1:012x}"
    seal(RunFolder(second))
    CHANGES["results.jsonl was changed"](second)
    failures = compare(folder).failures
    assert failures["state"].tolist() == ["changed"]
    assert "results.jsonl was changed" in failures["reason"][0]
    assert "results.jsonl was changed after the run ended" in render_index(folder).read_text()
    main(["runs", str(folder)])
    assert "results.jsonl was changed after the run ended" in capsys.readouterr().out
    assert "results.jsonl was changed" in load_results([second])[1]["reason"][0]
    assert "results.jsonl was changed" in render(second).read_text()
    main(["runs", str(folder)])  # rendering the report does not seal what was changed
    assert "results.jsonl was changed after the run ended" in capsys.readouterr().out


def test_a_report_that_was_edited_is_marked_until_it_is_rendered_again(tmp_path):
    run = sealed(tmp_path / "a")
    render(run)
    assert read_run(run).state == "finished"
    edit(run / "report.html", "</html>", "9.99 times as fast</html>")
    assert "report.html was changed after the run ended; `wanlab report`" in read_run(run).row["reason"]
    render(run)
    assert read_run(run).state == "finished"


def test_runs_of_an_older_wanlab_have_no_seal_and_stay_readable(tmp_path):
    assert read_run(write_run(tmp_path / "a")).state == "finished"


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (lambda file: file.unlink(), "results.jsonl is missing or empty"),
        (lambda file: file.write_text(""), "results.jsonl is missing or empty"),
        (lambda file: file.write_text(file.read_text()[:-40]), "cannot"),
        (lambda file: file.with_name("run.json").write_text("{}"), "run.json has no run_id"),
    ],
)
def test_a_finished_run_without_its_record_does_not_drop_out_of_a_comparison(tmp_path, lose, words):
    rows = [{"ms": 100.0}, {"ms": 50.0, "repeat": 1}, {"ms": 20.0, "repeat": 2}]
    folder = write_sweep(tmp_path / "s", rows)
    lose(folder / f"{2:012x}" / "results.jsonl")
    failures = compare(folder).failures
    assert failures["state"].tolist() == ["unreadable"]
    assert words in failures["reason"][0] or "line 1" in failures["reason"][0]


def test_figures_that_contradict_their_samples_are_refused():
    row = Result(work=Work(), engine="eager", samples_ms=(1.0, 2.0, 3.0)).to_dict()
    assert parse_result(row | {"median_ms": 2.0, "sample_count": 3}, "x").time_ms == 2.0
    for lie in ({"median_ms": 1.0}, {"sample_count": 9}, {"figures": {"time_per_video_ms": 1.0}}):
        with pytest.raises(WanlabError, match="one of them was edited"):
            parse_result(row | lie, "x")
    lie = {"quality_loss_percent": 0.1, "quality_loss_low_percent": 2.0, "quality_loss_high_percent": 4.0}
    with pytest.raises(WanlabError, match="outside its interval 2 to 4"):
        parse_result(row | {"quality": lie}, "x")


def test_statistics_that_are_not_those_of_their_samples_are_refused(tmp_path):
    run = write_run(tmp_path / "a")
    timing = Samples("x", (1.0, 2.0, 4.0)).to_dict()
    (run / "metrics.jsonl").write_text(json.dumps({"name": "x", "value": timing}) + "\n")
    assert read_run(run).state == "finished"
    (run / "metrics.jsonl").write_text(json.dumps({"name": "x", "value": timing | {"p90_ms": 2.0}}) + "\n")
    assert "p90_ms is 2, that of its 3 samples is 3.6" in read_run(run).row["reason"]


def test_a_run_is_sealed_when_it_finishes_and_finished_earlier_only_while_it_is_intact(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("a: int = 1  # a number", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import wanlab\nrun = wanlab.start('10_x')\nrun.record('n', a)\nrun.finish()"
        ),
    ]
    notebook = tmp_path / "10_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    done = execute(notebook, output=tmp_path / "out", progress=False)
    assert done.state == "finished"
    assert load_runs(tmp_path / "out")["state"].tolist() == ["finished"]
    ready = prepare.prepare(notebook, output=tmp_path / "out")
    assert ready.finished()
    edit(done.folder / "metrics.jsonl", '"value": 1', '"value": 2')
    assert not ready.finished()
