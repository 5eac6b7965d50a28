"""What may be compared is one rule: other weights, software, code, cases and machines are refused, load is said."""

from __future__ import annotations

import json

import pytest
from support.comparison_runs import CPU, WORK, write_sweep

from wanlab.cli.main import main
from wanlab.pages.sweep_page import render_index
from wanlab.runs import choose, compare, technique_matrix

ROWS = [{"ms": 100.0}, {"ms": 33.0, "parameters": {"engine": "onnxruntime"}}]


def change(folder, record=None, result=None, run=1):
    """Change fields of run.json and of the result of one run."""
    for name, fields in (("run.json", record), ("results.jsonl", result)):
        file = folder / f"{run:012x}" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | (fields or {})) + "\n")


def environment(**values):
    return {"environment": CPU | values}


@pytest.mark.parametrize(
    ("field", "records", "results"),
    [
        ("weights_files", [{"weights": "aa"}, {"weights": "bb"}], [{}, {}]),
        ("lora", [{}, {}], [{"work": WORK}, {"work": WORK | {"lora": "3f2a9c1b04de@expert_high:1"}}]),
        ("lora", [{}, {}], [{"work": WORK | {"lora": f"3f2a9c1b04de:{strength}"}} for strength in (1, 0.8)]),
        ("torch", [{}, {}], [{"software": {"torch": "2.10"}}, {"software": {"torch": "2.11"}}]),
        ("wanlab", [{"wanlab_source": "aa"}, {"wanlab_source": "bb"}], [{}, {}]),
        (
            "cases",
            [{"parameters": {"cases": 4, "case_set": name}} for name in ("final", "selection")],
            [{}, {}],
        ),
        ("cores", [environment(cores=8), environment(cores=64)], [{}, {}]),
        ("memory_gib", [environment(ram_gib=31.2), environment(ram_gib=62.7)], [{}, {}]),
        (
            "engine_version",
            [{}, {}],
            [
                {"engine": "onnxruntime", "software": {"onnxruntime-gpu": version}}
                for version in ("1.30", "1.31")
            ],
        ),
    ],
)
def test_what_the_figures_depend_on_is_compared(tmp_path, field, records, results):
    folder = write_sweep(tmp_path / "s", ROWS)
    for run, (record, result) in enumerate(zip(records, results, strict=True)):
        change(folder, record, result, run)
    found = compare(folder)
    assert found.refused["field"].tolist() == [field]
    assert not len(compare(folder, allow=[field]).refused)


def test_what_only_one_side_knows_and_versions_of_other_engines_are_no_difference(tmp_path):
    folder = write_sweep(tmp_path / "s", ROWS)
    change(
        folder,
        {"weights": "aa"},
        {"engine": "onnxruntime", "software": {"torch": "2", "onnxruntime": "1.30"}},
    )
    assert not len(compare(folder).refused)


def test_repeats_with_other_software_are_not_pooled(tmp_path):
    folder = write_sweep(tmp_path / "s", [{"ms": 100.0, "repeat": 1}, {"ms": 100.0, "repeat": 2}])
    assert compare(folder).baseline.repeats == 2
    for run, version in enumerate(("2.10", "2.11")):
        change(folder, None, {"software": {"torch": version}}, run)
    found = compare(folder)
    assert found.baseline.repeats == 1
    assert found.refused["field"].tolist() == ["torch"]


def test_a_gain_that_was_measured_on_a_busy_machine_names_the_load(tmp_path, capsys):
    folder = write_sweep(tmp_path / "s", ROWS, baseline={"engine": "eager"})
    change(folder, None, {"load": {"others_percent": 55.0}})
    busy = "engine=onnxruntime, plan=default was timed while other processes used 55 % of the processors"
    found = compare(folder)
    assert found.place == f"Measured on Test CPU, 1 thread; {busy}."
    assert choose(found).text.endswith(found.place)
    assert busy in render_index(folder).read_text().replace("Engine", "engine")
    main(["compare", str(folder)])
    assert busy in capsys.readouterr().out
    change(folder, None, {"load": {"others_percent": 65.0}}, 0)
    both = "2 of 2 configurations were timed beside other work: at most other processes used 65 % of the processors"
    assert compare(folder).cautions == (both,)
    change(folder, None, {"load": {"others_percent": 5.0}})
    change(folder, None, {"load": {"others_percent": 5.0}}, 0)
    assert compare(folder).cautions == ()
    assert len(technique_matrix(found)) == 1


def test_runs_that_were_timed_while_they_shared_the_machine_are_said(tmp_path):
    folder = write_sweep(tmp_path / "s", ROWS, executor={"kind": "local", "slots": 2})
    sweep = json.loads((folder / "sweep.json").read_text())
    for run in sweep["runs"]:
        run["machine"] = "shared"
    (folder / "sweep.json").write_text(json.dumps(sweep))
    assert compare(folder).cautions[0].startswith("2 of 2 configurations shared the machine with other runs")
