from __future__ import annotations

import json
import math

import pandas as pd
import pytest

import wanlab
from wanlab.cli import main as cli
from wanlab.runs import catalogue

MINUTE = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00")


def make(root, name, run_id, state="finished", parameters=None, metrics=None, started=MINUTE[0], **record):
    """A run folder as `wanlab run` leaves it."""
    folder = root / name / run_id
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"cpu": "C", "gpu": {"name": "G"}}
    record = {"environment": environment, "notebook": f"notebooks/{name}.ipynb", **record}
    (folder / "run.json").write_text(
        json.dumps({"run_id": run_id, "name": name, "parameters": parameters or {}, **record})
    )
    (folder / "status.json").write_text(
        json.dumps({"state": state, "started": started, "ended": MINUTE[1], "seconds": 60.0, "reason": None})
    )
    lines = [json.dumps({"name": key, "value": value}) for key, value in (metrics or {}).items()]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "report.html").write_text("<h1>report</h1>")
    return folder


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Three runs whose parameters do not agree on their types, in `outputs/` of the working folder."""
    root = tmp_path / "outputs"
    make(
        root,
        "10_x",
        "aaa",
        parameters={"steps": 3, "sizes": [1, 2], "prompt": "=1+1, größer"},
        metrics={"time_ms": 3.5, "q": {"psnr_db": "inf", "n": 3}, "effect": "applied", "same": True},
        verdict="3.5 ms [x](javascript:alert(1))",
    )
    make(root, "10_x", "bbb", state="failed", parameters={"steps": "auto", "sizes": None, "loud": True})
    make(root, "20_y", "ccc", parameters={"steps": 4, "a%": 0.25, "big": 2**70}, metrics={"time_ms": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


def export(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_tables_hold_what_load_runs_gives(outputs, capsys):
    runs = wanlab.load_runs(outputs)
    assert export("--to", "runs.csv") == 0
    assert export(outputs, "--to", "runs.parquet") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"3 runs, {len(runs.columns)} columns: runs.csv",
        f"3 runs, {len(runs.columns)} columns: runs.parquet",
    ]
    typed, text = pd.read_parquet("runs.parquet"), pd.read_csv("runs.csv", dtype={"p.big": str})
    for read in (typed, text):
        assert list(read) == list(runs)
        assert read["run_id"].tolist() == runs["run_id"].tolist()
        assert read["m.time_ms"].tolist()[::2] == [3.5, 2.0]
        assert read["m.q.psnr_db"][0] == math.inf
        assert read["p.prompt"][0] == "=1+1, größer"
        # One parameter of several types, or of none that a column holds, is JSON.
        assert [json.loads(value) for value in read["p.steps"]] == [3, "auto", 4]
        assert json.loads(read["p.sizes"][0]) == [1, 2]
        assert json.loads(read["p.big"][2]) == 2**70
    assert typed["started"].tolist() == runs["started"].tolist()
    assert typed["p.loud"].tolist()[1] is True
    assert typed["m.time_ms"].isna().tolist() == [False, True, False]


@pytest.mark.slow
def test_mlflow_holds_each_run_once(outputs, capsys):
    import mlflow

    where = ("--to", "mlflow", "--uri", "sqlite:///mlflow.db", "--experiment", "bench")
    assert export(*where, "--artifacts") == 0
    assert "2 new, 0 run again since, 0 there already; left out, not finished: 1" in capsys.readouterr().out
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("bench").experiment_id

    def logged():
        return {run.data.tags["wanlab.run_id"]: run for run in client.search_runs([experiment])}

    one = logged()["aaa"]
    assert one.data.params == {"steps": "3", "sizes": "[1, 2]", "prompt": "=1+1, größer"}
    assert one.data.metrics == {"time_ms": 3.5, "q.n": 3.0, "same": 1.0, "seconds": 60.0}
    assert one.data.tags["metric.q.psnr_db"] == "inf"
    assert one.data.tags["metric.effect"] == "applied"
    tags = {name: one.data.tags[f"wanlab.{name}"] for name in ("state", "notebook", "gpu")}
    assert tags == {"state": "finished", "notebook": "notebooks/10_x.ipynb", "gpu": "G"}
    assert "[x](" not in one.data.tags["mlflow.note.content"]
    assert (one.info.status, one.info.end_time - one.info.start_time) == ("FINISHED", 60_000)
    assert [file.path for file in client.list_artifacts(one.info.run_id)] == ["report.html"]
    assert logged()["ccc"].data.params["a_"] == "0.25"
    assert sorted(p.name for p in outputs.parent.iterdir()) == ["mlflow-artifacts", "mlflow.db", "outputs"]

    # Again: nothing new. Run again with --force: brought up to date in place. Unfinished only when asked for.
    make(
        outputs,
        "20_y",
        "ccc",
        parameters={"steps": 4},
        metrics={"time_ms": 1},
        started="2026-01-02T00:00:00+00:00",
    )
    assert export(*where, "--unfinished") == 0
    assert "1 new, 1 run again since, 1 there already\n" in capsys.readouterr().out
    again = logged()
    assert sorted(again) == ["aaa", "bbb", "ccc"]
    assert len(client.search_runs([experiment])) == 3
    assert again["ccc"].data.metrics["time_ms"] == 1.0
    assert again["bbb"].info.status == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "mlflow", "--uri", "./mlruns"], "no longer keeps runs in a folder"),
        (["--to", "mlflow", "--uri", "file:///tmp/mlruns"], "sqlite:///mlflow.db"),
        (["--to", "mlflow", "--uri", "sqlite:///outputs/10_x/aaa/run.json"], "file is not a database"),
        (["--to", "runs.xlsx"], "ends in .csv or .parquet, or mlflow"),
        (["--to", "runs.csv", "--experiment", "x"], "go with --to mlflow"),
        (["nowhere", "--to", "runs.csv"], "no folder of runs"),
    ],
)
def test_mistakes_are_one_line(outputs, capsys, arguments, said):
    before = sorted(outputs.parent.rglob("*"))
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert sorted(outputs.parent.rglob("*")) == before


def test_missing_package_is_one_line(outputs, capsys, monkeypatch):
    import sys

    for module, target in (("mlflow", "mlflow"), ("pyarrow", "runs.parquet")):
        monkeypatch.setitem(sys.modules, module, None)  # as Python itself marks what cannot be imported
        assert export("--to", target) == 2
        assert f'add it with: pip install "wanlab[{target.removeprefix("runs.")}]"' in capsys.readouterr().err


def test_catalogue_asks_what_the_titles_ask(root, outputs):
    from wanlab.measure.environment import cpu_model

    for number, seconds_ago in enumerate(MINUTE):
        environment = {"cpu": cpu_model(), "gpu": None}
        make(outputs, "14_memory", f"r{number}", environment=environment, started=seconds_ago)
    make(outputs, "14_memory", "slower-machine")
    table = catalogue.catalogue(root / "notebooks", wanlab.load_runs(outputs)).set_index("notebook")
    assert set(table.index) == {p.stem for p in (root / "notebooks").glob("[0-9]*.ipynb")}
    assert table["question"].str.contains(r"\?").all()
    assert table.loc["14_memory", ["group", "minutes_here"]].tolist() == ["diagnose", 1.0]
    assert table.loc["14_memory", "question"].startswith("what is the peak made of")
    assert table["minutes_here"].notna().sum() == 1


def test_last_runs_link_to_their_reports_and_run_nothing(outputs):
    make(
        outputs, "<img src=x onerror=alert(1)>", "zzz", started=MINUTE[1], verdict="<script>alert(2)</script>"
    )
    (make(outputs, "a b", "yyy", "died", started="2026-01-03T00:00:00+00:00") / "report.html").unlink()
    last = catalogue.last_runs(outputs, 2)
    assert last["state"].tolist() == ["died", "finished"]
    assert last["path"].isna().tolist() == [True, False]
    page = catalogue.linked(last, outputs)._repr_html_()
    assert page.count("<script") == 1
    assert "<img" not in page
    assert 'href="%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/zzz/report.html"' in page
    assert "none yet" in catalogue.linked(catalogue.last_runs(outputs, 0))._repr_html_()
