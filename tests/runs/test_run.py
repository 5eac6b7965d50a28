from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import wanlab
from wanlab.core import files
from wanlab.core.answer import answer, step
from wanlab.core.errors import WanlabError
from wanlab.measure import load
from wanlab.runs import folder, run
from wanlab.runs import prepare as identity


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with one notebook, as JupyterLab sees it: working folder, no runner."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (tmp_path / "outputs").mkdir()
    cell = nbformat.v4.new_code_cell(
        "steps: int = 3  # steps\nimage: str = 'photo.png'  # input", metadata={"tags": ["parameters"]}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebooks / "10_x.ipynb")
    monkeypatch.chdir(notebooks)
    monkeypatch.delenv(run.FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setattr(run, "_environment", lambda: {"cpu": "test", "gpu": None})
    monkeypatch.setattr(run, "_current", None)
    yield tmp_path
    if run._current is not None:
        run._current._abandon("test over")


def started(**changes):
    return run.start("10_x", {"steps": 3, "image": "photo.png", **changes})


def status(of: run.Run) -> dict:
    return json.loads((of.folder / "status.json").read_text())


def test_start_outside_the_runner_makes_its_own_folder(project):
    one = started()
    assert one.folder == project / "outputs" / "10_x" / one.id
    assert status(one)["state"] == "running"
    record = json.loads((one.folder / "run.json").read_text())
    assert record["parameters"] == {"steps": 3, "image": "photo.png"}
    assert record["environment"]["cpu"] == "test"
    one.finish()
    assert status(one)["state"] == "finished"
    assert status(one)["ended"]


def test_by_hand_paths_are_the_projects_and_the_verdict_is_shown(project, capsys):
    assert Path.cwd() == project / "notebooks"
    (project / "photo.png").write_bytes(b"1")
    one = started()
    assert Path.cwd() == project
    assert set(json.loads((one.folder / "run.json").read_text())["inputs"]) == {"image"}
    one.verdict("3 ms")
    one.finish()
    assert capsys.readouterr().out.splitlines()[1:] == ["3 ms", f"run kept in {one.folder}"]


def test_an_answer_brings_its_details_and_key_figures(project):
    one = started()
    one.tile("time per video", "3 s")
    shown = one.verdict(answer("Yes.", "Because.", tiles=(("share", "40 %", "of the time"),)), "Next: more.")
    assert shown.html.count("<p") >= 3
    record = json.loads((one.folder / "run.json").read_text())
    assert record["verdict"] == "Yes."
    assert record["details"][:2] == ["Because.", "Next: more."]
    assert [tile["title"] for tile in record["tiles"]] == ["time per video", "share"]
    assert record["tiles"][1] == {"title": "share", "value": "40 %", "change": "of the time"}


def test_details_and_key_figures_are_kept_beside_the_verdict(project, capsys):
    (project / "photo.png").write_bytes(b"1")
    one = started()
    one.tile("time of a call", "3 ms", "noise 1 %")
    one.verdict("It takes 3 ms", "Because.", " ")
    one.finish()
    record = json.loads((one.folder / "run.json").read_text())
    assert (record["verdict"], record["details"]) == ("It takes 3 ms", ["Because."])
    assert record["tiles"] == [{"title": "time of a call", "value": "3 ms", "change": "noise 1 %"}]
    assert capsys.readouterr().out.splitlines()[1:3] == ["It takes 3 ms", "Because."]


def test_work_beside_a_timing_is_said_where_lists_show_it(project, monkeypatch):
    (project / "photo.png").write_bytes(b"1")
    busy = load.Load(others_percent=55.0)
    monkeypatch.setattr(load, "taken", lambda: busy)
    one = started()
    record = {}
    for next_step, words in (
        (None, ": run it again on an idle machine."),
        (step("gives an interval", cases=8), ": repeat it with nothing else running, as below."),
        (step("ranks every change", "15_triage"), ", so the times may be too long."),
    ):
        one.verdict(answer("It takes 3 ms", next=next_step), "Because.")
        record = json.loads((one.folder / "run.json").read_text())
        assert record["verdict"] == f"It takes 3 ms. Timed while {busy.text}{words}"
    assert record["details"] == ["Because."]


def test_start_takes_the_callers_variables(project):
    scope = {"__name__": "notebook", "start": run.start, "steps": 5, "image": "b.png"}
    exec("run = start('10_x')", scope)
    assert scope["run"].parameters == {"steps": 5, "image": "b.png"}


def test_what_was_typed_wins_over_the_saved_file(project):
    history = ["", "steps: int = 1  # steps\nmode: str = 'a'  # new", "run = start('10_x')"]
    scope = {"start": run.start, "steps": 1, "mode": "a", "In": history}
    exec("run = start('10_x')", scope)
    assert scope["run"].parameters == {"steps": 1, "mode": "a"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"steps": "3"}, "wants int"), ({"stepz": 3}, "did you mean 'steps'")],
)
def test_parameters_are_checked(project, changes, said):
    with pytest.raises(WanlabError, match=said):
        started(**changes)
    assert not list((project / "outputs").iterdir())


def test_parameters_cell_must_have_run(project):
    with pytest.raises(WanlabError, match="run the parameters cell"):
        exec("start('10_x')", {"start": run.start, "steps": 3})


def test_starting_again_keeps_the_earlier_attempt(project):
    one = started()
    one.record("x", 1)
    two = started()
    assert two.folder == one.folder
    earlier = two.folder / "attempts" / "1"
    assert json.loads((earlier / "status.json").read_text())["state"] == "aborted"
    assert (earlier / "metrics.jsonl").read_text().count("\n") == 1
    assert not (two.folder / "metrics.jsonl").exists()
    two.finish()
    three = started()
    assert json.loads((three.folder / "attempts/2/status.json").read_text())["state"] == "finished"


def test_a_living_writer_is_not_disturbed(project):
    one = started()
    one._heartbeat.end("running", writer=folder.process_id(os.getppid()))
    with pytest.raises(WanlabError, match=f"being written by process {os.getppid()}"):
        folder.RunFolder(one.folder).open()


def test_record_takes_numbers_tables_and_odd_values(project):
    one = started()
    one.record("a", np.float32(0.5))
    one.record("b", {"psnr_db": float("inf"), "n": np.int64(3), "bad": float("nan")})
    one.record("c", pd.DataFrame({"x": [1, 2]}))
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [
        0.5,
        {"psnr_db": "inf", "n": 3, "bad": "nan"},
        [{"x": 1}, {"x": 2}],
    ]


def test_artifacts(project):
    one = started()
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    assert one.save_video("clip", frames, 8).stat().st_size > 0
    table = pd.DataFrame({"engine": ["eager"], "time_ms": [1.5]})
    assert one.save_table("t", table) is table
    assert (one.folder / "artifacts" / "t.csv").read_text() == "engine,time_ms\neager,1.5\n"
    figure = wanlab.plots.breakdown_bar(pd.DataFrame({"component": ["expert"], "time_ms": [2.0]}))
    assert one.save_figure("f", figure) is figure
    assert json.loads((one.folder / "artifacts" / "f.plotly.json").read_text())["data"]
    shown = one.show_videos(
        {"<b>photo</b>": frames[0], "clip": one.folder / "artifacts" / "clip.mp4", "again": frames}, fps=8
    )
    page = shown._repr_html_()
    assert page.count("data:video/mp4;base64,") == 2
    assert page.count("data:image/png;base64,") == 1
    assert "<b>photo" not in page


def test_a_table_is_recorded_saved_and_shown(project):
    one = started()
    table = pd.DataFrame({"engine": ["eager", "tvm"], "time_ms": [1.5, 2.5], "note": ["", ""]})
    assert one.table("t", table) is table
    (line,) = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert (line["name"], len(line["value"])) == ("t", 2)
    shown = one.save_table("u", table, columns=["engine"], rows=1)
    assert shown.to_dict("list") == {"engine": ["eager"]}
    assert pd.read_csv(one.folder / "artifacts" / "u.csv").shape == (2, 3)  # all of it is saved
    with pytest.raises(KeyError):
        one.save_table("v", table, columns=["engine", "speed"])


def test_what_there_is_not_is_a_sentence_and_no_file(project):
    one = started()
    why = "Give a <trace> as trace=."
    for shown in (
        one.save_table("t", None, otherwise=why),
        one.save_table("t", pd.DataFrame(), otherwise=why),
        one.figure("f", None, otherwise=why),
        one.figure("f", wanlab.plots.breakdown_bar, None, otherwise=why),
        one.figure("f", wanlab.plots.breakdown_bar, pd.DataFrame(), otherwise=why),
    ):
        assert repr(shown) == why
        assert "&lt;trace&gt;" in shown._repr_html_()
    assert one.save_table("t", None) is None
    assert one.figure("f", wanlab.plots.breakdown_bar, None) is None
    one.save_flame("flame", None)
    assert not list((one.folder / "artifacts").iterdir())
    one.table("none", None, otherwise=why)
    assert json.loads((one.folder / "metrics.jsonl").read_text())["value"] == []
    drawn = one.figure(
        "f", wanlab.plots.breakdown_bar, pd.DataFrame({"component": ["expert"], "time_ms": [2.0]})
    )
    assert len(drawn.data) == 1
    assert (one.folder / "artifacts" / "f.plotly.json").is_file()


def opened(project, source: str, **values):
    """A run of a notebook with these parameters."""
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project / "notebooks" / "20_y.ipynb")
    return run.start("20_y", values)


def test_what_is_asked_of_a_model_is_read_from_the_parameters(project, monkeypatch):
    lines = ["model: str = 'a'  # m", "dtype: str = 'auto'  # d", "steps: int | None = None  # s"]
    lines += ["seed: int = 7  # s", "frames: int = 5  # f", "components: list[str] | None = None  # c"]
    calls = []
    monkeypatch.setattr(
        run.models, "load", lambda name, **settings: calls.append((name, settings)) or "model"
    )
    values = {"model": "a", "dtype": "float32", "steps": None, "seed": 7, "frames": 5, "components": ["x"]}
    loaded, ask = opened(project, "\n".join(lines), **values).load()
    assert (loaded, ask) == (
        "model",
        {"frames": 5, "steps": None},
    )  # the seed is of no video where there is no prompt
    assert calls.pop() == ("a", {"dtype": "float32", "seed": 7})
    run._current.load(components=["x"], dtype="auto")
    assert calls.pop() == ("a", {"dtype": "auto", "seed": 7, "components": ["x"]})

    lines += ["prompt: str = ''  # p", "image: str | None = None  # i"]
    one = opened(project, "\n".join(lines), **values, prompt="pans", image="/tmp/photo.png")
    assert one.ask == {"frames": 5, "steps": None, "image": "/tmp/photo.png", "prompt": "pans", "seed": 7}
    held_out = opened(project, "\n".join(lines), **values, prompt="pans", image=None).ask["image"]
    np.testing.assert_array_equal(held_out, wanlab.heldout.example_case().truth()[0])
    assert one.outputs == project / "outputs"


def test_a_notebook_without_a_model_has_nothing_to_load(project):
    with pytest.raises(WanlabError, match="needs a parameter `model`"):
        started().load()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\\b", ".hidden", "/etc/x", "x" * 200, "a\0b"])
def test_names_cannot_leave_the_folder(project, name):
    one = started()
    with pytest.raises(WanlabError, match="cannot be a file name"):
        one.save_table(name, pd.DataFrame())
    with pytest.raises(WanlabError, match="cannot be a file name"):
        folder.RunFolder.of(project, name, "abc")


@given(st.text())
def test_checked_names_stay_below_any_folder(name):
    try:
        files.checked_name(name)
    except WanlabError:
        return
    assert (Path("/base") / name).resolve().parent == Path("/base")


def test_show_videos_says_what_is_wrong(project):
    one = started()
    with pytest.raises(WanlabError, match="at least one"):
        one.show_videos({})
    with pytest.raises(WanlabError, match="an array has no frame rate"):
        one.show_videos({"a": np.zeros((2, 8, 8, 3), np.uint8)})
    with pytest.raises(WanlabError, match=r"none\.mp4 is not"):
        one.show_videos({"a": "none.mp4"})


@pytest.mark.parametrize("name", ["a.tif", "a.bmp", "a.webp", "a.gif", "a.JPEG"])
def test_a_picture_that_a_model_reads_is_shown(project, name):
    Image.fromarray(np.full((6, 8, 3), 80, np.uint8)).save(project / name)
    kind = "jpeg" if name.endswith("JPEG") else "png"
    assert f'<img src="data:image/{kind};base64,' in started().show_videos({"input": project / name}).html


def test_a_picture_that_cannot_be_read_is_refused_before_the_model_is_loaded(project, monkeypatch):
    monkeypatch.setattr(run.models, "load", lambda *given, **options: pytest.fail("the model was loaded"))
    (project / "a.png").write_bytes(b"")
    cell = 'model: str = "wan-nano"\nprompt: str = ""\nimage: str | None = "a.png"'
    with pytest.raises(WanlabError, match=r"a\.png is empty and cannot be read"):
        opened(project, cell, model="wan-nano", prompt="", image="a.png").load()


def test_run_id_changes_with_everything_that_can_change_the_result():
    base = {"source": "s", "parameters": {"a": 1}, "plan": None, "weights": "w", "inputs": {"i": "1"}}
    ids = {identity.run_id(**base)}
    for change in (
        {"source": "t"},
        {"parameters": {"a": 2}},
        {"parameters": {"a": "1"}},
        {"plan": "p"},
        {"weights": "v"},
        {"inputs": {"i": "2"}},
    ):
        ids.add(identity.run_id(**{**base, **change}))
    assert len(ids) == 7
    assert identity.run_id(**base) in ids


def test_run_id_ignores_outputs_and_counts():
    a = nbformat.v4.new_code_cell("x = 1")
    b = nbformat.v4.new_code_cell(
        "x = 1", execution_count=7, outputs=[nbformat.v4.new_output("stream", text="hi")]
    )
    assert identity.notebook_source(nbformat.v4.new_notebook(cells=[a])) == identity.notebook_source(
        nbformat.v4.new_notebook(cells=[b])
    )


def test_input_files_and_weights_are_told_apart_by_content(tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"1")
    first = identity.input_digests({"image": str(photo), "steps": 3, "prompt": "a cat"})
    photo.write_bytes(b"2")
    assert set(first) == {"image"}
    assert identity.input_digests({"image": str(photo)}) != first
    model = tmp_path / "model"
    model.mkdir()
    (model / "x.safetensors").write_bytes(b"1")
    before = identity.weights_id(str(model))
    (model / "x.safetensors").write_bytes(b"2")
    assert before
    assert identity.weights_id(str(model)) != before
    assert identity.weights_id("someone/else") is None


def test_writing_never_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
)
def test_plain_is_strict_json(value):
    json.dumps(files.plain(value), allow_nan=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_interrupt_is_raised_again(number):
    from wanlab.launch.execute import _stoppable

    before = signal.getsignal(number)
    swallowed = []
    said = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"

    def swallow():
        with _stoppable(0.1):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                swallowed.append(number)
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt, match=said):
        swallow()
    assert swallowed == [number]
    assert signal.getsignal(number) is before
