"""What a report says to do next, and its command."""

from __future__ import annotations

import pytest

from wanlab.core.answer import step
from wanlab.runs.next_step import next_html, next_step, run_command

RECORD = {
    "notebook": "41_configuration",
    "schema": [
        {"name": "engine", "value": "onnxruntime", "default": "eager"},
        {"name": "steps", "value": 2, "default": 4},
        {"name": "cases", "value": 2, "default": 2},
    ],
}


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (step("ranks what to change", "15_triage"), "wanlab run 15_triage"),
        (
            step("measures it on other cases", "41_configuration", plan="my plan.yaml", case_set="final"),
            "wanlab run 41_configuration -p 'plan=my plan.yaml' -p case_set=final",
        ),
        # The same notebook keeps what this run was asked for; None is its own default again.
        (step("gives an interval", cases=8), "wanlab run 41_configuration -p engine=onnxruntime -p steps=2 -p cases=8"),
        (step("measures the original", engine=None), "wanlab run 41_configuration -p steps=2"),
        (step("look at the table below"), ""),
    ],
)  # fmt: skip
def test_a_step_has_a_command_that_runs_as_it_stands(given, command):
    found = next_step(given, RECORD)
    assert found["command"] == command
    assert found["why"][0].isupper()
    assert found["why"].endswith(".")


def test_the_command_of_another_notebook_keeps_the_model_where_it_takes_one():
    rows = [
        {"name": "model", "value": "my/model", "default": "wan-nano"},
        {"name": "steps", "value": 2, "default": 4},
    ]
    record = {"notebook": "notebooks/10_baseline.ipynb", "schema": rows}
    found = [
        next_step(each, record)["command"]
        for each in (step("a", "15_triage"), step("b", "60_sweep"), step("c", iterations=9))
    ]
    assert found[0] == "wanlab run 15_triage -p model=my/model"
    assert found[1] == "wanlab run 60_sweep"
    assert found[2] == "wanlab run 10_baseline -p model=my/model -p steps=2 -p iterations=9"


def test_a_step_is_shown_with_its_command_and_without_markup_of_its_own():
    shown = next_html(next_step(step("is <b>bold</b>", "15_triage", model="a'<i>b"), RECORD))
    assert "<i>" not in shown
    assert "&lt;b&gt;" in shown
    assert "<code>wanlab run 15_triage" in shown


def test_a_file_of_this_folder_has_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"configuration": str(tmp_path / "a b.yaml"), "folder": "/else/where"}
    said = run_command("41_configuration", files)
    assert said == "wanlab run 41_configuration -p 'configuration=a b.yaml' -p folder=/else/where"
