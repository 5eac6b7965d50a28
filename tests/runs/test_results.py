from __future__ import annotations

import json
import math
import os

import pytest

import wanlab
from wanlab.core.errors import WanlabError
from wanlab.core.files import now
from wanlab.runs.folder import host_id, process_id
from wanlab.runs.results import read_runs

DEAD = {"pid": 2**22 + 7, "started": 1.0}  # above the largest process number


def make(root, name, run_id, status=None, record=None, metrics=()):
    folder = root / name / run_id
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "name": name, **(record or {})}))
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def one(root):
    frame = wanlab.load_runs(root)
    assert len(frame) == 1
    return frame.iloc[0]


def test_one_tidy_row_per_run(tmp_path):
    for number, steps in enumerate((4, 8)):
        make(
            tmp_path,
            "10_x",
            f"run{number}",
            {"state": "finished", "started": f"2026-01-0{number + 1}T00:00:00+00:00", "seconds": 1.5},
            {
                "parameters": {"steps": steps},
                "environment": {"cpu": "C", "gpu": {"name": "G"}},
                "verdict": "fine",
            },
            [
                {"name": "time_ms", "value": 9.0},
                {"name": "time_ms", "value": 3.0 + number},
                {"name": "q", "value": {"psnr_db": "inf", "rows": [1]}},
                {"name": "table", "value": [{"a": 1}]},
            ],
        )
    frame = wanlab.load_runs(tmp_path)
    assert frame["p.steps"].tolist() == [4, 8]
    assert frame["m.time_ms"].tolist() == [3.0, 4.0]
    assert frame["m.q.psnr_db"].tolist() == [math.inf, math.inf]
    assert [c for c in frame if c.startswith("m.")] == ["m.time_ms", "m.q.psnr_db"]
    assert frame.loc[0, ["gpu", "cpu", "verdict", "state"]].tolist() == ["G", "C", "fine", "finished"]
    assert str(frame["started"].dtype).startswith("datetime64")


def test_a_run_whose_process_is_gone_is_died(tmp_path):
    status = {"state": "running", "host": host_id(), "writer": DEAD, "heartbeat": now()}
    make(tmp_path, "a", "r", status)
    assert one(tmp_path)["state"] == "died"


def test_a_recycled_process_number_is_not_the_writer(tmp_path):
    writer = {"pid": os.getpid(), "started": process_id(os.getpid())["started"] - 1000}
    make(tmp_path, "a", "r", {"state": "running", "host": host_id(), "writer": writer, "heartbeat": now()})
    assert one(tmp_path)["state"] == "died"


def test_a_living_run_is_running(tmp_path):
    writer = process_id(os.getpid())
    make(tmp_path, "a", "r", {"state": "running", "host": host_id(), "writer": writer, "heartbeat": now()})
    assert one(tmp_path)["state"] == "running"


@pytest.mark.parametrize(
    ("heartbeat", "state"), [("now", "running"), ("2020-01-01T00:00:00+00:00", "died"), ("?", "died")]
)
def test_another_machine_is_judged_by_its_heartbeat(tmp_path, heartbeat, state):
    heartbeat = now() if heartbeat == "now" else heartbeat
    make(
        tmp_path, "a", "r", {"state": "running", "host": "elsewhere", "writer": DEAD, "heartbeat": heartbeat}
    )
    assert one(tmp_path)["state"] == state


@pytest.mark.parametrize(
    ("file", "text"), [("run.json", "{"), ("run.json", "[]"), ("status.json", "nope"), ("status.json", "3")]
)
def test_broken_folders_are_rows(tmp_path, file, text):
    good = {"state": "finished", "started": now(), "seconds": 1}
    make(tmp_path, "a", "good", good)
    (make(tmp_path, "a", "bad", good) / file).write_text(text)
    frame = wanlab.load_runs(tmp_path).set_index("run_id")
    assert frame.loc["bad", "state"] == "unreadable"
    assert file in frame.loc["bad", "reason"]
    assert frame.loc["good", "state"] == "finished"


def test_torn_last_metric_of_a_run_that_died_is_skipped_and_a_torn_middle_is_not(tmp_path):
    folder = make(tmp_path, "a", "r", {"state": "died"}, metrics=[{"name": "x", "value": 1}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"name": "y", "va')
    assert one(tmp_path)["m.x"] == 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"name": "z", "value": 1}\n')
    assert one(tmp_path)["state"] == "unreadable"
    assert "line 2" in one(tmp_path)["reason"]


def test_attempts_are_not_runs_and_missing_folder_is_named(tmp_path):
    folder = make(tmp_path, "a", "r", {"state": "finished"})
    (folder / "attempts" / "1").mkdir(parents=True)
    (folder / "attempts" / "1" / "run.json").write_text("{}")
    assert one(tmp_path)["run_id"] == "r"
    with pytest.raises(WanlabError, match="no folder of runs"):
        wanlab.load_runs(tmp_path / "none")
    assert wanlab.load_runs(folder.parent).shape[0] == 1


def test_a_run_keeps_its_samples_and_tables_beside_its_row(tmp_path):
    metrics = [
        {"name": "samples", "value": {"values_ms": [1.0, 2.0], "label": "x"}},
        {"name": "table", "value": [{"a": 1}]},
        {"name": "samples", "value": {"values_ms": [3.0]}},
    ]
    make(tmp_path, "a", "r", {"state": "finished"}, {"parameters": {"steps": 4}}, metrics)
    (run,) = read_runs(tmp_path)
    assert run.metrics == {"samples": {"values_ms": [3.0]}, "table": [{"a": 1}]}
    assert run.record["parameters"] == {"steps": 4}
    assert run.row["p.steps"] == 4
    assert "m.samples.label" not in run.row  # the last value of a name counts
    assert run.folder == tmp_path / "a" / "r"


def test_columns_of_runs_that_share_few(tmp_path):
    for number in range(3):
        metrics = [{"name": f"only_{number}", "value": number}]
        make(tmp_path, "a", f"r{number}", {"state": "finished"}, {"parameters": {f"x{number}": 1}}, metrics)
    frame = wanlab.load_runs(tmp_path)
    named = [column for column in frame if column[:2] in ("p.", "m.")]
    assert named == ["p.x0", "p.x1", "p.x2", "m.only_0", "m.only_1", "m.only_2"]
    assert frame["m.only_1"].notna().sum() == 1
