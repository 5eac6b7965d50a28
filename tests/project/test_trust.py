"""Planted lies: each is told by a real part of wanlab, in the words of the table in docs/trust.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from support import convert_tiny as tiny
from support.comparison_runs import CPU, WORK, techniques, write_run, write_sweep
from support.diagnose_traces import event, trace_of

from wanlab import diagnose, models, precision
from wanlab.configuration import load_configuration
from wanlab.configuration.component import Candidate, Files, check_effect, open_candidate
from wanlab.core.errors import WanlabError
from wanlab.engines.onnxruntime import load_engines
from wanlab.measure.bench import check_bound
from wanlab.measure.timing import Samples
from wanlab.pages.report import render
from wanlab.precision.calibration import Calibration, Identity, Method, histogram_of
from wanlab.precision.calibration import write as write_calibration
from wanlab.runs import choose, compare, prepare, run, technique_matrix, technique_verdict
from wanlab.runs.folder import RunFolder
from wanlab.runs.results import read_run
from wanlab.runs.seal import seal

TABLE = Path(__file__).parents[2] / "docs" / "trust.md"
ROWS = [{"ms": 100.0}, {"ms": 33.0, "parameters": {"engine": "onnxruntime"}}]


def table():
    """What was done -> what wanlab says, from the docs."""
    lines = [
        line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")
    ]
    return {done: says.strip("`") for done, says in lines[1:]}


def edited(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def sealed(tmp_path):
    folder = write_run(tmp_path / "run", clips=True)
    edited(folder / "run.json", "{", '{"sealed": true, ')
    (folder / "artifacts" / "frontier.plotly.json").write_text('{"data": [1]}')
    seal(RunFolder(folder))
    return folder


def said_of_run(change):
    def lie(tmp_path):
        folder = sealed(tmp_path)
        assert read_run(folder).state == "finished"
        change(folder)
        return read_run(folder).row["reason"]

    return lie


def said_of_pair(record=({}, {}), result=({}, {})):
    """What a comparison says of two runs whose records differ."""

    def lie(tmp_path):
        folder = write_sweep(tmp_path / "sweep", ROWS)
        for number in (0, 1):
            for name, fields in (("run.json", record[number]), ("results.jsonl", result[number])):
                file = folder / f"{number:012x}" / name
                file.write_text(json.dumps(json.loads(file.read_text()) | fields) + "\n")
        found = compare(folder)
        return "; ".join([*found.refused["reason"], *found.failures["reason"], *found.cautions])

    return lie


def raised(call, *arguments, **named):
    with pytest.raises(WanlabError) as error:
        call(*arguments, **named)
    return str(error.value)


def report_edited(folder):
    render(folder)
    edited(folder / "report.html", "</html>", "9.99 times as fast</html>")


def statistics_edited(tmp_path):
    folder = write_run(tmp_path / "run")
    timing = Samples("x", (1.0, 2.0, 4.0)).to_dict() | {"p90_ms": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps({"name": "x", "value": timing}) + "\n")
    return read_run(folder).row["reason"]


def results_cut(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [*ROWS, {"ms": 9.0, "repeat": 2}])
    (folder / f"{2:012x}" / "results.jsonl").write_text("")
    return compare(folder).failures["reason"][0]


def record_emptied(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text("{}")
    return read_run(folder).row["reason"]


def shared(tmp_path):
    folder = write_sweep(tmp_path / "sweep", ROWS, executor={"slots": 2})
    file = folder / "sweep.json"
    file.write_text(file.read_text().replace('"repeat"', '"machine": "shared", "repeat"'))
    return compare(folder).place


def chosen_by_point(tmp_path):
    unknown = {"quality_loss_low_percent": None, "quality_loss_high_percent": None}
    rows = [*ROWS, {"ms": 32.0, "parameters": {"engine": "onnxruntime", "plan": "ffn-int8"}}]
    for row, loss in zip(rows, (0.0, 0.1, -0.3), strict=True):
        row["summary"] = unknown | {"quality_loss_percent": loss}
    found = choose(compare(write_sweep(tmp_path / "sweep", rows)))
    return "; ".join((found.text, *found.notes))


def notebook(tmp_path, *cells):
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), tmp_path / "10_x.ipynb")
    return tmp_path / "10_x.ipynb"


def changed_input(parameter, file):
    """A finished run, and a second start after a file that it names has changed."""

    def lie(tmp_path):
        path = notebook(
            tmp_path, f"{parameter}: str = {str(tmp_path / file.split('/')[0])!r}  # a file or folder"
        )
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("name: p\nrules: [{format: int8}]\n")
        first = prepare.prepare(path, output=tmp_path / "out")
        write_run(first.folder.path)
        assert prepare.prepare(path, output=tmp_path / "out").finished()
        (tmp_path / file).write_text("name: p\nrules: [{format: fp8}]\n")
        again = prepare.prepare(path, output=tmp_path / "out")
        assert not again.finished()
        return f"runs again as {again.run_id}" if again.run_id != first.run_id else "finished earlier"

    return lie


def weights_swapped_during_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(run.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(run, "_current", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"1")
    notebook(tmp_path, "model: str = 'model'  # model")
    one = run.start("10_x", {"model": str(tmp_path / "model")}, output=tmp_path / "out")
    (tmp_path / "model" / "a.safetensors").write_bytes(b"2")
    text = raised(one.finish)
    one._abandon("test over")
    return text.replace(str(tmp_path / "model"), "m")


LAB = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in sys.argv[1:]:
    assert shell.run_cell(cell, store_history=True).success
"""


def cell_edited(tmp_path):
    start = "import wanlab\nrun = wanlab.start('10_x', output='out')"
    cells = ["a: int = 1  # a number", start, "run.record('ms', 30.0)", "run.finish()"]
    path = notebook(tmp_path, *cells)
    environment = os.environ | {"IPYTHONDIR": str(tmp_path)}
    cells[2] = "run.record('ms', 3.0)"
    subprocess.run([sys.executable, "-c", LAB, *cells], cwd=tmp_path, env=environment, check=True)
    ready = prepare.prepare(path, output=tmp_path / "out")
    assert not ready.finished()
    return "; ".join(ready.folder.record()["notes"])


def trace_of_another(tmp_path):
    blocks = [event("expert_high", 0, 80, "user_annotation")]
    for i in range(8):
        blocks += [event(f"expert_high.blocks.{i}.attn1.to_q", 10 * i, 9, "user_annotation")]
        blocks += [event("aten::linear", 10 * i, 4, **{"Input Dims": [[7, 256], [256, 256], [256]]})]
    named = {"model": "wan-nano", "device": "cpu"}
    return diagnose.trace_caveat(trace_of(tmp_path, *blocks, wanlab=named), "wan-nano")


def calibration_edited(tmp_path):
    method = Method("max")
    histogram = histogram_of(torch.linspace(-3, 3, 1000))
    identity = Identity("m", "expert_high", "w", "d", "l", method.to_dict(), 100, "1")
    ranges = {"blocks.0": method.amax(histogram)}
    path = tmp_path / "c.json"
    write_calibration(path, Calibration(identity, ranges, {"blocks.0": histogram}, (), {"blocks.0": ()}))
    data = json.loads(path.read_text())
    data["layers"][0]["amax"] *= 2
    path.write_text(json.dumps(data))
    return raised(precision.read_calibration, path)


EXPERTS = ("expert_high", "expert_low")
SETTINGS = dict(dynamic=False, height=64, width=96, frames=9, external_data=True)


def graphs(tmp_path, exported):
    model = tiny.bare(tiny.pipeline())
    made = Path(exported(model, EXPERTS, **SETTINGS)[0].path).parent
    return shutil.copytree(made, tmp_path / "graphs")


def graph_changed(tmp_path, exported):
    folder = graphs(tmp_path, exported)
    path = next(folder.glob("expert_low.*.weights"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return raised(load_engines, folder, provider="cpu")


def experts_swapped(tmp_path, exported):
    folder = graphs(tmp_path, exported)
    for ending in (".onnx", ".json"):
        high, low = (folder / f"{name}{ending}" for name in EXPERTS)
        high.rename(folder / "other")
        low.rename(high)
        (folder / "other").rename(low)
    return raised(load_engines, folder, provider="cpu")


def rule_overridden(tmp_path):
    rules = [dict(layers=["attn1.*"], format="int8"), dict(layers=["*"], format="fp8")]
    model = models.load("wan-nano", components=["expert_high"], device="cpu")
    experts = {"expert_high": model.component("expert_high")}
    return "; ".join(precision.assign(precision.make_plan("p", "bf16", rules), experts).without_effect())


def not_compiled(tmp_path):
    model = models.load("wan-nano", components=["expert_high"], device="cpu")
    candidate = Candidate("compiled", load_configuration(engine="compiled"))
    files = Files(networks={"compiled": None})
    (opened,) = open_candidate(model, "expert_high", candidate, files, torch.device("cpu"))
    return ": ".join(check_effect(opened, compiled_graphs=0))


def bound_computes_nothing(tmp_path):
    return raised(check_bound, "my engine", {"output": torch.ones(4)}, {"output": torch.zeros(4)})


def best_combined(tmp_path):
    return technique_verdict(technique_matrix(compare(write_sweep(tmp_path / "sweep", techniques()))))


LIES = {
    "a sample of a finished run is edited": said_of_run(
        lambda folder: edited(folder / "results.jsonl", '"samples_ms": [', '"samples_ms": [1.0, ')
    ),
    "a parameter of a finished run is edited": said_of_run(
        lambda folder: edited(folder / "run.json", '"eager"', '"tensorrt"')
    ),
    "the results of a finished run are removed": said_of_run(
        lambda folder: (folder / "results.jsonl").unlink()
    ),
    "the seal is removed to hide a change": said_of_run(lambda folder: (folder / "seal.json").unlink()),
    "the video of a finished run is swapped": said_of_run(
        lambda folder: (folder / "artifacts" / "video.mp4").write_bytes(b"another video")
    ),
    "a figure of a finished run is edited": said_of_run(
        lambda folder: edited(folder / "artifacts" / "frontier.plotly.json", "1", "9")
    ),
    "a number is written into the report": said_of_run(report_edited),
    "the median beside the samples is edited": said_of_pair(result=({}, {"median_ms": 5.0})),
    "a statistic beside the samples of a timing is edited": statistics_edited,
    "the results of one repeat are cut": results_cut,
    "run.json is emptied": record_emptied,
    "two runs have other weights": said_of_pair(({"weights": "aa"}, {"weights": "bb"})),
    "two runs have other LoRAs": said_of_pair(
        result=tuple({"work": WORK | {"lora": f"{name}@expert_high:1"}} for name in ("aa", "bb"))
    ),
    "the weights are swapped during the run": weights_swapped_during_run,
    "a plan is edited and the notebook run again": changed_input("plan", "p.yaml"),
    "an example in a folder is edited and the notebook run again": changed_input(
        "examples", "examples/a.txt"
    ),
    "a cell is edited in JupyterLab and not saved": cell_edited,
    "two runs have another wanlab code": said_of_pair(({"wanlab_source": "aa"}, {"wanlab_source": "bb"})),
    "two runs have another PyTorch": said_of_pair(
        result=({"software": {"torch": "2.10"}}, {"software": {"torch": "2.11"}})
    ),
    "two runs were scored on other cases": said_of_pair(
        tuple({"parameters": {"cases": 4, "case_set": name}} for name in ("selection", "final"))
    ),
    "two machines have one processor's name": said_of_pair(
        ({"environment": CPU | {"ram_gib": 31.2}}, {"environment": CPU | {"ram_gib": 62.7}})
    ),
    "a run was timed beside other programs": said_of_pair(result=({}, {"load": {"others_percent": 55.0}})),
    "runs of a sweep were timed at the same time": shared,
    "a lossy plan wins by a point estimate": chosen_by_point,
    "a combination is called best that is slower than one technique": best_combined,
    "a trace of another model is given under this one's name": trace_of_another,
    "a range of a calibration is edited": calibration_edited,
    "one bit of an ONNX file's weights is changed": graph_changed,
    "the graphs of the two experts are exchanged": experts_swapped,
    "a rule of a plan is overridden by a later one": rule_overridden,
    "an engine `compiled` does not compile": not_compiled,
    "a call over fixed memory computes nothing": bound_computes_nothing,
}


def test_the_table_of_lies_is_the_list_that_is_tried():
    assert list(table()) == list(LIES)
    assert len(LIES) >= 20


@pytest.mark.parametrize("done", LIES)
def test_a_planted_lie_is_told(done, tmp_path, request):
    lie = LIES[done]
    names = lie.__code__.co_varnames[1 : lie.__code__.co_argcount]
    assert table()[done] in lie(tmp_path, *map(request.getfixturevalue, names))
