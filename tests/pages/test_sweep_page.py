from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from support.comparison_runs import result_line

from wanlab.cli import main as cli
from wanlab.core.errors import WanlabError
from wanlab.pages import publish, render_index
from wanlab.pages import sweep_table as columns
from wanlab.pages.sweep_table import ClipEmbedder, beside_baselines, gather, href, ratios, verdict
from wanlab.runs.results import RunRecord, configurations, varied_parameters

WORK = {
    "model": "m",
    "weights": "w",
    "height": 8,
    "width": 8,
    "frames": 5,
    "steps": 4,
    "guided": True,
    "seed": 0,
}
STAMP = "2026-01-01T00:00:00+00:00"


def make(
    root,
    run_id,
    parameters=None,
    metrics=None,
    state="finished",
    name=None,
    figures=None,
    work=WORK,
    **status,
):
    folder = root / run_id
    (folder / "artifacts").mkdir(parents=True)
    record = {
        "run_id": run_id,
        "name": name or root.name,
        "parameters": parameters or {},
        "environment": {"cpu": "C"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "status.json").write_text(
        json.dumps({"state": state, "started": STAMP, "seconds": 30.0, **status})
    )
    lines = [json.dumps({"name": key, "value": value}) + "\n" for key, value in (metrics or {}).items()]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if figures is not None:
        (folder / "results.jsonl").write_text(json.dumps(result_line(figures, work)) + "\n")
    return folder


def listed(run_id, parameters, **fields):
    label = " ".join(f"{k}={v}" for k, v in parameters.items())
    return {
        "label": label,
        "run_id": run_id,
        "parameters": parameters,
        "state": "finished",
        "repeat": 1,
    } | fields


def sweep(root, runs, **fields):
    (root / "sweep.json").write_text(
        json.dumps({"name": root.name, "state": "finished", "runs": runs, **fields})
    )
    return root


def payload(page):
    soup = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    return soup, json.loads(soup.select_one("#board").string)


@pytest.fixture
def grid(tmp_path):
    """Engines e and f, plans a and b; one row each."""
    root = tmp_path / "outputs" / "s"
    times = {"ea": 100.0, "eb": 50.0, "fa": 40.0, "fb": 10.0}
    for run_id, time_ms in times.items():
        engine, plan = run_id
        figures = {"time_per_video_ms": time_ms, "psnr_db": "inf" if plan == "a" else 30.0 + (engine == "f")}
        make(root, run_id, {"engine": engine, "plan": plan}, figures=figures)
    return root


def test_rows_stand_in_the_order_of_the_sweep_with_those_that_never_ran(grid):
    make(grid, "other", {"engine": "x"})
    runs = [listed(i, {"engine": i[0], "plan": i[1]}) for i in ("fb", "ea", "eb", "fa")]
    runs.append(listed("none", {"engine": "f", "plan": "c"}, state="pending"))
    board = gather(sweep(grid, runs, axes=["engine", "plan"], seconds=3723))
    assert [entry.title for entry in board.entries] == ["f · b", "e · a", "e · b", "f · a", "f · c"]
    assert board.entries[-1].state == "pending"
    assert board.frame["p.plan"].tolist() == ["b", "a", "b", "a", "c"]
    assert board.problems == ["1 more run lies in this folder, not part of the sweep"]
    assert verdict(board) == "4 of 5 runs finished in 1 h 2 min on C; 1 not started."


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ({"engine": "e", "plan": "a"}, [None, None, None, None]),
        ({"plan": "a"}, [None, 2.0, None, 4.0]),
        ({"engine": "e"}, [None, None, 2.5, 5.0]),
    ],
)
def test_a_run_is_beside_baselines_the_baseline_that_agrees_with_it_on_the_other_axes(
    grid, baseline, expected
):
    runs = [listed(i, {"engine": i[0], "plan": i[1]}) for i in ("ea", "eb", "fa", "fb")]
    board = gather(sweep(grid, runs, axes=["engine", "plan"], baseline=baseline))
    found = ratios(board, beside_baselines(board))
    got = found["m.time_per_video_ms"]
    if len(baseline) == 2:  # one for all
        expected = [None, 2.0, 2.5, 10.0]
    assert got == expected
    assert "m.psnr_db" not in found  # decibels are not divided


def test_other_work_has_no_ratio_and_is_said(grid):
    make(
        grid,
        "eq",
        {"engine": "e", "plan": "q"},
        figures={"time_per_video_ms": 1.0},
        work=WORK | {"steps": 1},
    )
    runs = [listed(i, {"engine": i[0], "plan": i[1]}) for i in ("ea", "eb", "eq")]
    page = render_index(sweep(grid, runs, axes=["engine", "plan"], baseline={"plan": "a"}))
    soup, data = payload(page)
    assert data["ratios"]["m.time_per_video_ms"] == [None, 2.0, None]
    assert data["runs"][2]["apart"] == "steps"
    assert "differ in steps" in soup.select(".note")[-1].text


def test_the_frontier_of_every_pair_is_in_the_page(grid):
    runs = [listed(i, {"engine": i[0], "plan": i[1]}) for i in ("ea", "eb", "fa", "fb")]
    _, data = payload(
        render_index(sweep(grid, runs, axes=["engine", "plan"], baseline={"engine": "e", "plan": "a"}))
    )
    assert data["axes"] == ["m.time_per_video_ms", "m.psnr_db", "m.time_per_frame_ms"]
    assert data["table"]["m.psnr_db"] == ["inf", 30.0, "inf", 31.0]
    assert data["pairs"] == {"0,1": [3], "0,2": [3], "1,2": [3]}  # infinity is no place on an axis
    assert data["selected"] == [0, 3]
    assert data["runs"][0]["baseline"]
    assert [c["key"] for c in data["columns"]][:2] == ["p.engine", "p.plan"]


def test_failures_come_first_with_where_and_why(tmp_path):
    make(tmp_path / "a", "1", {"k": 1})
    for k, state in enumerate(
        ("memory", "flooded", "died", "failed", "timeout", "aborted", "failed", "failed")
    ):
        make(
            tmp_path / "a", f"x{k}", {"k": k + 2}, state=state, reason=f"because {k}", title="The <b>step</b>"
        )
    (tmp_path / "a" / "1" / "report.html").write_text("x")
    soup, data = payload(render_index(tmp_path))
    assert soup.select_one(".verdict").text == (
        "1 of 9 runs finished on C, 4 min 30 s in all; 3 failed, 1 kernel died, 1 timed out, 1 ran out of memory, "
        "1 too much output, 1 aborted."
    )
    shown = soup.select(".failure")
    assert len(shown) == 8
    assert "ran out of memory in “The <b>step</b>”" in shown[0].text
    assert "because 0" in shown[0].text
    assert soup.select_one(".failures details summary").text == "2 more that did not finish"
    assert [run["report"] for run in data["runs"]] == ["./a/1/report.html", *[None] * 8]
    assert not soup.select("#frontier, #clips, #plotly")


def test_a_folder_of_several_notebooks_names_them_and_links_its_sweeps(tmp_path):
    make(tmp_path / "10_x", "r", {"steps": 4}, {"time_ms": 5.0})
    make(tmp_path / "11_y", "q", {"steps": 8}, {"rate_per_s": 2.0})
    sweep(tmp_path / "11_y", [listed("q", {"steps": 8})], title="<i>Sweep</i>")
    render_index(tmp_path / "11_y")
    soup, data = payload(render_index(tmp_path))
    assert [run["title"] for run in data["runs"]] == ["10_x · steps=4", "11_y · steps=8"]
    assert data["columns"][0]["few"] == ["10_x", "11_y"]
    assert soup.select_one(".sweeps a")["href"] == "./11_y/index.html"
    assert soup.select_one(".sweeps a").text == "<i>Sweep</i>"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("baseline", 5, "baseline: Expected `object"),
        ("axes", "x", "axes: Expected `array"),
        ("runs", {}, "runs: Expected `array"),
    ],
)
def test_a_field_of_another_type_in_sweep_json_is_one_line(tmp_path, field, value, said):
    make(tmp_path, "r")
    (tmp_path / "sweep.json").write_text(json.dumps({field: value}))
    soup, _ = payload(render_index(tmp_path))
    assert said in soup.select_one(".note").text
    with pytest.raises(WanlabError, match=said):
        configurations(tmp_path)


def test_broken_sweeps_and_empty_folders(tmp_path):
    with pytest.raises(WanlabError, match="no runs in"):
        render_index(tmp_path)
    with pytest.raises(WanlabError, match="no folder of runs"):
        render_index(tmp_path / "none")
    make(tmp_path, "r")
    (tmp_path / "sweep.json").write_text("{")
    soup, _ = payload(render_index(tmp_path))
    assert "sweep.json" in soup.select_one(".note").text
    assert str(tmp_path) not in soup.select_one(".note").text
    (tmp_path / "r" / "status.json").write_text("nothing")
    soup, data = payload(render_index(tmp_path))
    assert data["runs"][0]["state"] == "unreadable"


def test_addresses_stay_inside(tmp_path):
    root = tmp_path / "runs"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "javascript:x.html").write_text("x")
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    assert href(root / "a b" / "javascript:x.html", root) == "./a%20b/javascript%3Ax.html"
    assert href(root / "link", root) is None
    assert href(root / ".." / "secret", root) is None
    assert href(root / "none", root) is None


def test_clips_are_kept_once_and_within_the_budget(tmp_path):
    for name, data in (("a", b"1" * 300), ("b", b"1" * 300), ("c", b"2" * 300), ("d", b"3" * 30)):
        (tmp_path / f"{name}.mp4").write_bytes(data)
    shelf = ClipEmbedder(tmp_path, budget_chars=850)
    kept = [shelf.put(tmp_path / f"{name}.mp4") for name in "abcd"]
    assert kept[0] == kept[1]
    assert kept[2] != kept[0]
    assert kept[3] == {"href": "./d.mp4"} or "clip" in kept[3]
    assert sum(map(len, shelf.inside.values())) <= 850
    (tmp_path / "e.mp4").write_bytes(b"4" * 300)
    assert shelf.put(tmp_path / "e.mp4") == {"href": "./e.mp4"}
    assert [path.name for path in shelf.outside] == ["e.mp4"]


@pytest.mark.parametrize(
    ("name", "title", "unit", "better", "ratio"),
    [
        ("m.time_per_video_ms", "time per video", "ms", "min", True),
        ("m.after.peak_memory_gib", "after: peak memory", "GiB", "min", True),
        ("m.frames_per_s", "frames", "frames/s", "max", True),
        ("m.quality_loss_percent", "quality loss", "%", "min", False),
        ("m.ssim", "ssim", "", "max", False),
        ("m.layers", "layers", "", None, False),
        ("p.budget_percent", "budget", "%", None, False),
    ],
)
def test_columns_know_their_unit_and_direction(name, title, unit, better, ratio):
    found = columns.describe(name)
    assert (found.title, found.unit, found.better, found.ratio) == (title, unit, better, ratio)


def test_columns_that_a_sweep_asks_for_and_those_that_it_does_not():
    frame = pd.DataFrame(
        {
            "m.rows": [1, 1],
            "m.load_ms": [1.0, 2.0],
            "m.quality_loss_percent": [1.0, 2.0],
            "m.quality_loss_low_percent": [0.5, 1.0],
            "m.quality_loss_high_percent": [1.5, 3.0],
            "m.time_per_video_ms": [5.0, math.nan],
            "m.effect": ["applied", "not applied"],
        }
    )
    found = columns.metrics(frame, results=[name[2:] for name in frame if name != "m.rows"])
    assert [c.name.split(".")[-1] for c in found] == ["time_per_video_ms", "load_ms", "quality_loss_percent"]
    assert found[-1].low == "m.quality_loss_low_percent"
    assert [c.name for c in columns.axes(frame, found)] == [
        "m.load_ms",
        "m.quality_loss_percent",
    ]
    assert [c.title for c in columns.metrics(frame, ["load_ms", "none", "m.load_ms"])] == ["load time"]
    given = [{"a": 1, "b": 1, "c": [1]}, {"a": 1, "b": True, "c": [2]}]
    assert varied_parameters([RunRecord({}, {"parameters": each}) for each in given]) == ["b", "c"]


def test_publish_writes_what_is_shown_and_cleans_up_after_itself(grid, tmp_path, capsys):
    make(grid, "bad", {"engine": "=1+1"}, state="failed", reason="=HYPERLINK()")
    (grid / "ea" / "artifacts" / "video.mp4").write_bytes(b"clip")
    (grid / "ea" / "artifacts" / "figure.plotly.json").write_text("{}")
    (grid / "ea" / "artifacts" / "weights.bin").write_text("large")
    (grid / "ea" / "executed.ipynb").write_text(
        '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}'
    )
    (tmp_path / "secret.csv").write_text("secret")
    (grid / "ea" / "artifacts" / "leak.csv").symlink_to(tmp_path / "secret.csv")
    (grid / "eb" / "report.html").symlink_to(tmp_path / "secret.csv")
    site = tmp_path / "site"
    page = publish(grid, site, notebooks=True)
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {
        "index.html",
        "runs.csv",
        "ea/report.html",
        "ea/executed.ipynb",
        "ea/artifacts/figure.plotly.json",
    } <= files
    assert "ea/artifacts/video.mp4" in files
    assert not {"ea/artifacts/leak.csv", "ea/artifacts/weights.bin", "eb/report.html", "ea/run.json"} & files
    table = pd.read_csv(site / "runs.csv")
    assert table.set_index("run_id").loc["bad", ["reason", "p.engine"]].tolist() == ["'=HYPERLINK()", "'=1+1"]
    assert str(tmp_path) not in (site / "index.html").read_text().replace(str(site), "")
    assert page == site / "index.html"

    (site / "mine.txt").write_text("kept")
    assert cli.main(["publish", str(grid), "--to", str(site)]) == 0
    assert "files" in capsys.readouterr().out
    assert not (site / "ea" / "executed.ipynb").exists()
    assert (site / "mine.txt").read_text() == "kept"


def test_publish_refuses_what_it_did_not_make_and_never_leaves_its_folder(grid, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for target, words in (
        (other, "did not write"),
        (grid / "site", "overlap"),
        (grid.parent, "overlap"),
        (other / "thesis.tex", "is a file"),
    ):
        with pytest.raises(WanlabError, match=words):
            publish(grid, target)
    site = tmp_path / "site"
    publish(grid, site)
    mark = site / ".wanlab-published.json"
    record = json.loads(mark.read_text())
    record["files"] += ["../other/thesis.tex", "/etc/hostname", "out/thesis.tex"]
    mark.write_text(json.dumps(record))
    (site / "out").symlink_to(other)
    publish(grid, site)
    assert (other / "thesis.tex").read_text() == "x"
    report = site / "ea"
    for path in sorted(report.rglob("*"), reverse=True):
        path.unlink()
    report.rmdir()
    report.symlink_to(other)
    with pytest.raises(WanlabError, match="leads out"):
        publish(grid, site)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_index_from_the_command_line(grid, capsys):
    assert cli.main(["index", str(grid)]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert cli.main(["index", str(grid / "none")]) == 2
