from __future__ import annotations

import itertools
import json
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanlab.cli.sweep import imports, table
from wanlab.core.errors import WanlabError
from wanlab.launch.grid import Task, expand, fits, label, load_grid
from wanlab.launch.ray_slots import short_folder
from wanlab.launch.sweep import View, refuse_second_driver
from wanlab.launch.worker import MISTAKE, last_line, run
from wanlab.runs.folder import host_id, process_id
from wanlab.runs.prepare import prepare


@pytest.fixture
def project(tmp_path, monkeypatch, fixture_notebooks):
    """An empty folder with the notebook that finishes, and a function that reads a grid written there."""
    (tmp_path / "ok.ipynb").write_text((fixture_notebooks / "ok.ipynb").read_text())
    monkeypatch.chdir(tmp_path)

    def grid(text: str, **options):
        (tmp_path / "grid.yaml").write_text(text)
        return expand(load_grid("grid.yaml"), output=tmp_path / "outputs", **options)

    grid.folder = tmp_path
    return grid


def test_every_combination_in_the_order_of_the_axes(project):
    tasks = project("""
name: g
notebook: ok.ipynb
parameters: {prompt: a dog, scale: 2}
axes: {steps: {from: 2, to: 6, by: 2}, mode: [fast, exact]}
exclude: [{steps: [2, 4], mode: exact}]
""")
    assert [t.label for t in tasks] == [
        "steps=2 mode=fast",
        "steps=4 mode=fast",
        "steps=6 mode=fast",
        "steps=6 mode=exact",
    ]
    assert tasks[0].overrides == {"prompt": "a dog", "scale": 2.0, "steps": 2, "mode": "fast"}
    assert tasks[0].axes == {"steps": 2, "mode": "fast"}
    assert len({t.run_id for t in tasks}) == 4
    assert tasks[0].folder.path == project.folder.resolve() / "outputs" / "g" / tasks[0].run_id


def test_a_run_of_a_grid_is_the_run_of_the_command_line(project):
    (task,) = project("name: g\nnotebook: ok.ipynb\nparameters: {steps: 4}\n")
    assert task.label == "ok"
    alone = prepare("ok.ipynb", {"steps": 4}, output=project.folder / "outputs", name="g")
    assert (task.run_id, task.folder.path) == (alone.run_id, alone.folder.path)


def test_notebooks_repeats_and_the_machine(project):
    (project.folder / "other.ipynb").write_text((project.folder / "ok.ipynb").read_text())
    tasks = project("""
name: g
axes: {mode: [fast, exact]}
repeats: 2
limit_s: 60
notebooks:
  - {notebook: ok.ipynb, machine: alone, limit_s: 600, gpus: 2}
  - {notebook: other.ipynb, parameters: {steps: 5}, repeats: 1, only: [{mode: fast}]}
""")
    assert [t.label for t in tasks] == [
        "ok mode=fast #1",
        "ok mode=fast #2",
        "ok mode=exact #1",
        "ok mode=exact #2",
        "other mode=fast",
    ]
    assert [(t.machine, t.limit_s, t.repeat) for t in tasks[-2:]] == [("alone", 600, 2), ("shared", 60, 1)]
    assert tasks[0].gpus == 2
    assert len({t.run_id for t in tasks}) == 5
    assert all(Task.from_json(t.to_json()) == t for t in tasks)


def test_numbers_of_a_grid_are_those_of_yaml_1_2(project):
    tasks = project("{name: g, notebook: ok.ipynb, axes: {scale: [1e-3, 2E5, 010, .5]}}")
    assert [t.axes["scale"] for t in tasks] == [0.001, 2e5, 10.0, 0.5]
    tasks = project(
        "{name: g, notebook: ok.ipynb, parameters: {steps: 1_0, prompt: no}, axes: {scale: [.nan, -.inf]}}"
    )
    assert [str(t.overrides["scale"]) for t in tasks] == ["nan", "-inf"]
    assert (tasks[0].overrides["steps"], tasks[0].overrides["prompt"]) == (10, "no")


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("{from: 0.1, to: 0.7, by: 0.1}", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ("{from: 1, to: 2, by: 0.25}", [1.0, 1.25, 1.5, 1.75, 2.0]),
        ("{from: 1e-3, to: 3e-3, by: 1e-3}", [0.001, 0.002, 0.003]),
        ("{from: 0.1, to: 0.35, by: 0.1}", [0.1, 0.2, 0.3]),
    ],
)
def test_steps_of_a_range_are_exact(project, axis, values):
    assert [
        t.axes["scale"] for t in project(f"{{name: g, notebook: ok.ipynb, axes: {{scale: {axis}}}}}")
    ] == values


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("{from: 0, to: .inf}", "from 0 to inf by 1 is no range of numbers"),
        ("{from: .nan, to: 1}", "is no range of numbers"),
        ("{from: 0, to: 1, by: 0}", "by above 0"),
        (
            "{from: 0, to: 1e300, by: 1e-300}",
            "number of values: 1,000,000,000,000,000 is over the limit of 10,000",
        ),
        ("{from: 0, to: true}", "is no range of numbers"),
        ("{from: 0, to: 20000}", "WANLAB_LIMITS='axis_values=20001' raises it"),
    ],
)
def test_a_range_without_an_end_is_refused_at_once(project, axis, said):
    with pytest.raises(WanlabError, match=r"grid.yaml, line 1, axes.scale: ") as error:
        project(f"{{name: g, notebook: ok.ipynb, axes: {{scale: {axis}}}}}")
    assert said in str(error.value)


def test_values_that_no_file_can_be_named_are_values(project):
    (task,) = project(f"{{name: g, notebook: ok.ipynb, axes: {{prompt: [A dog. {'It runs. ' * 200}]}}}}")
    assert task.label.startswith("prompt=A dog. It runs")
    with pytest.raises(WanlabError, match="no notebook at nnn"):
        project(f"{{name: g, notebook: {'n' * 5000}}}")


def test_files_as_an_axis(project):
    (project.folder / "plans").mkdir()
    for name in ("b", "a"):
        (project.folder / "plans" / f"{name}.yaml").write_text(name)
    axis = "{name: g, notebook: ok.ipynb, axes: {prompt: [none, {files: 'plans/*.yaml'}]}}"
    tasks = project(axis)
    assert [t.axes["prompt"] for t in tasks] == ["none", "plans/a.yaml", "plans/b.yaml"]
    assert [t.label for t in tasks] == ["prompt=none", "prompt=a", "prompt=b"]
    before = [t.run_id for t in tasks]
    (project.folder / "plans" / "a.yaml").write_text("changed")
    after = [t.run_id for t in project(axis)]
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, False, True]


def test_what_a_run_is_made_of_decides_whether_it_is_run_again(project, monkeypatch):
    text = "name: g\nnotebook: ok.ipynb\naxes: {steps: [1, 2]}\n"
    first = [t.run_id for t in project(text)]
    assert [t.run_id for t in project(text.replace("[1, 2]", "[2, 1]"))] == first[::-1]
    notebook = project.folder / "ok.ipynb"
    notebook.write_text(notebook.read_text().replace("## Numbers", "## Figures"))
    assert not set(first) & {t.run_id for t in project(text)}


MISTAKES = {
    "name: a/b\nnotebook: ok.ipynb": "line 1, name: 'a/b' cannot be a folder's name",
    "name: ..\nnotebook: ok.ipynb": "line 1, name:",
    "name: g": "give either `notebook: PATH` or a list `notebooks:`",
    "name: g\nnotebook: okk.ipynb": "no notebook at okk.ipynb (did you mean 'ok.ipynb'?)",
    "name: g\nnotebok: ok.ipynb": "line 2, notebok: no field 'notebok' (did you mean 'notebook'?)",
    "name: g\nnotebook: ok.ipynb\naxes:\n  stps: [1]": "line 4, axes.stps: unknown parameter 'stps'",
    "name: g\nnotebook: ok.ipynb\naxes:\n  steps: [1, x]": "line 4, axes.steps: parameter 'steps' wants int, got 'x'",
    "name: g\nnotebook: ok.ipynb\naxes:\n  steps: 3": "line 4, axes.steps: an axis is a list of values, here 3",
    "name: g\nnotebook: ok.ipynb\naxes:\n  steps: []": "line 4, axes.steps: no values",
    "name: g\nnotebook: ok.ipynb\naxes:\n  steps: [1, 1]": "line 4, axes.steps: 1 is given twice",
    "name: g\nnotebook: ok.ipynb\naxes:\n  steps: {from: 3, to: 1}": "from 3 to 1 by 1 is no range",
    "name: g\nnotebook: ok.ipynb\naxes:\n  prompt: [{files: '*.txt'}]": "line 4, axes.prompt[0].files: no file fits '*.txt'",
    "name: g\nnotebook: ok.ipynb\nparameters: {steps: 2}\naxes: {steps: [1]}": "'steps' is fixed under",
    "name: g\nnotebook: ok.ipynb\naxes: {steps: [1]}\nexclude:\n- {mode: fast}": "line 5, exclude[0].mode:",
    "name: g\nnotebook: ok.ipynb\naxes: {steps: [1]}\nonly: [{steps: 2}]": "line 4, only[0].steps: no run has steps=2",
    "name: g\nnotebook: ok.ipynb\naxes: {mode: [fast]}\nexclude: [{mode: fats}]": "'fats'",
    "name: g\nnotebook: ok.ipynb\naxes: {steps: [1]}\nexclude: [{steps: 1}]": "no run is left",
    "name: g\nnotebook: ok.ipynb\naxes:\n  scale: [1, 1.0]": "line 4, axes.scale: 1.0 is given twice",
    "name: g\nnotebook: ok.ipynb\naxes: {steps: [1]}\nbaseline: {steps: 2}": "line 4, baseline: no run has steps=2",
    "name: g\nnotebook: ok.ipynb\nrepeats: 0": "line 3, repeats: Expected `int` >= 1",
    "name: g\nnotebook: ok.ipynb\nmachine: both": "line 3, machine:",
    "name: g\nnotebooks:\n- {notebook: ok.ipynb, repeat: 2}": "line 3, notebooks[0].repeat: no field 'repeat'",
    "name: g\nnotebooks: [{notebook: ok.ipynb}, {notebook: ok.ipynb}]": "are the same run",
    f"name: g\nnotebook: ok.ipynb\nlimit_s: 1{'0' * 400}": "line 3, limit_s: Expected `float`",
    f"name: g\nnotebook: ok.ipynb\nparameters: {{scale: 1{'0' * 400}}}": "parameter 'scale' wants",
    "name: [g": "grid.yaml, line 1",
    "- g": "a grid is a mapping",
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.items())
def test_a_mistake_is_told_with_its_line_before_anything_starts(project, text, said):
    with pytest.raises(WanlabError) as error:
        project(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (project.folder / "outputs").exists()


def test_a_grid_that_is_not_there(project):
    (project.folder / "grid.yaml").write_text("")
    with pytest.raises(WanlabError, match=r"no grid at gird.yaml \(did you mean 'grid.yaml'\?\)"):
        load_grid("gird.yaml")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    modes=st.sampled_from([["fast"], ["exact", "fast"]]),
    out=st.dictionaries(
        st.sampled_from(["steps", "mode"]), st.integers(1, 9) | st.sampled_from(["fast", "exact"]), max_size=2
    ),
    repeats=st.integers(1, 3),
)
def test_runs_are_the_product_less_what_is_excluded(project, steps, modes, out, repeats):
    data = {"name": "g", "notebook": "ok.ipynb", "axes": {"steps": steps, "mode": modes}, "repeats": repeats}
    wanted = [
        {"steps": s, "mode": m}
        for s, m in itertools.product(steps, modes)
        if not out or not all({"steps": s, "mode": m}[name] == value for name, value in out.items())
    ]
    if out:
        data["exclude"] = [out]
    if not all(value in data["axes"][name] for name, value in out.items()):
        with pytest.raises(WanlabError, match="line 1, exclude"):
            project(json.dumps(data))
        return
    if not wanted:
        with pytest.raises(WanlabError, match="no run is left"):
            project(json.dumps(data))
        return
    tasks = project(json.dumps(data))
    assert [t.axes for t in tasks] == [point for point in wanted for _ in range(repeats)]
    assert len({t.run_id for t in tasks}) == len(tasks)


def test_conditions_are_read_as_the_values_of_their_axes_are(project):
    (project.folder / "n.ipynb").write_text(
        (project.folder / "ok.ipynb").read_text().replace("steps: int = 3", "guided: bool = True")
    )
    axes = "name: g\nnotebook: n.ipynb\naxes: {guided: [true, false], scale: [1e-3, 2]}\n"
    made = project(axes + "exclude: [{guided: yes}]\nonly: [{scale: 1_0e-4}, {scale: 2}]\n")
    assert [task.axes["guided"] for task in made] == [False, False]
    assert len(project(axes + "baseline: {guided: no}\n")) == 4


def test_a_condition_on_an_axis_of_lists_is_a_list_or_several(project):
    axes = "name: g\nnotebook: ok.ipynb\naxes: {sizes: [[1, 2], [3]]}\n"
    assert [t.axes["sizes"] for t in project(axes + "only: [{sizes: [1, 2]}]\n")] == [[1, 2]]
    assert len(project(axes + "only: [{sizes: [[1, 2], [3]]}]\n")) == 2


def test_numbers_that_are_not_finite_reach_the_notebook(project):
    (task,) = project("name: g\nnotebook: ok.ipynb\naxes: {scale: [.inf]}\n")
    given = Task.from_json(task.to_json()).overrides
    assert given == {"scale": math.inf}
    assert prepare(task.notebook, given, output=task.output, name="g").run_id == task.run_id


def test_fits_and_label():
    assert fits({"a": 1, "b": "x"}, {"a": [1, 2]})
    assert fits({"a": 1}, {})
    assert not fits({"a": 1}, {"b": 1})
    assert not fits({"a": 1, "b": "x"}, {"a": 1, "b": "y"})
    assert label({"a": 1.5, "b": None}, "nb", 2) == "nb a=1.5 b=None #2"


def test_dry_run_says_what_is_there_already(project):
    text = "name: g\nnotebook: ok.ipynb\naxes: {steps: [1, 2]}\n"
    tasks = project(text)
    folder = tasks[1].folder.path
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    assert "\n2 runs, 2 to run\n" in table(tasks)  # without its record it is no finished run
    (folder / "run.json").write_text(json.dumps({"run_id": folder.name, "parameters": {"steps": 2}}))
    shown = table(tasks).splitlines()
    assert shown[1].endswith("to run           not known: no run of it on this machine yet")
    assert shown[2].endswith("finished before")
    assert shown[-2:] == [
        "2 runs, 1 to run",
        "expected here: how long is not known: no run of it on this machine yet",
    ]
    assert "\n2 runs, 2 to run\n" in table(tasks, force=True)


def test_what_the_warm_start_imports(project):
    tasks = project("name: g\nnotebook: ok.ipynb\naxes: {steps: [1, 2]}\n")
    assert {"wanlab", "pandas", "typing.Literal"} <= set(imports(tasks))


def test_a_notebook_changed_under_a_sweep_is_not_filed_under_another_name(project, capsys):
    (task,) = project("name: g\nnotebook: ok.ipynb\n")
    notebook = project.folder / "ok.ipynb"
    notebook.write_text(notebook.read_text().replace("## Numbers", "## Figures"))
    assert run(task) == MISTAKE
    assert "was changed while the sweep ran" in capsys.readouterr().err


def test_the_last_word_of_a_worker(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("one\n\ntwo\n\n")
    assert last_line(log) == "two"


def test_only_a_living_driver_refuses_a_second(tmp_path):
    path = tmp_path / "sweep.json"
    refuse_second_driver(path)
    for writer, refused in ((process_id(os.getppid()), True), ({"pid": os.getppid(), "started": 1.0}, False)):
        path.write_text(json.dumps({"state": "running", "host": host_id(), "writer": writer}))
        if refused:
            with pytest.raises(WanlabError, match=f"run by process {os.getppid()}"):
                refuse_second_driver(path)
        else:
            refuse_second_driver(path)
    path.write_text("{broken")
    refuse_second_driver(path)


def test_the_estimate_counts_slots_and_what_runs_alone(project):
    tasks = project("""
name: g
notebooks:
  - {notebook: ok.ipynb, axes: {steps: [1, 2, 3, 4]}}
  - {notebook: ok.ipynb, machine: alone, axes: {steps: [11, 12]}}
""")
    view = View("g", tasks, tasks, 2, enabled=False)
    assert view.rest() == ""
    view.ended(tasks[0], {"state": "finished", "seconds": 10.0})
    # Three shared in two slots, and two alone, which are taken to be as long while none has ended.
    assert view.rest() == "about 35 s left"
    view.ended(tasks[4], {"state": "finished", "seconds": 100.0})
    assert view.rest() == "about 2 min left"


def test_sockets_of_ray_have_a_short_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert short_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    folder = short_folder()
    assert len(folder) <= 40
    os.rmdir(folder)


def test_a_seed_beyond_64_bits_starts_nothing(project):
    notebook = json.loads((project.folder / "ok.ipynb").read_text())
    cell = next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    cell["source"] = "seed: int = 0  # of the noise"
    (project.folder / "seeded.ipynb").write_text(json.dumps(notebook))
    (task,) = project(f"{{name: g, notebook: seeded.ipynb, parameters: {{seed: {2**64 - 1}}}}}")
    assert task.overrides == {"seed": 2**64 - 1}
    with pytest.raises(WanlabError, match=f"seed {2**64} is beyond 64 bits"):
        project(f"{{name: g, notebook: seeded.ipynb, parameters: {{seed: {2**64}}}}}")
