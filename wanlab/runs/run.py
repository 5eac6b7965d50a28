"""`run = wanlab.start("10_baseline")`: opens the run folder of a notebook, and writes its results into it."""

from __future__ import annotations

import atexit
import functools
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from IPython import get_ipython
from IPython.display import display

from wanlab import heldout, models
from wanlab.core.answer import Answer, Step
from wanlab.core.errors import WanlabError, clean
from wanlab.core.files import append_json, checked_name, file_name, now, plain, read_json, write_text
from wanlab.core.paths import default_outputs
from wanlab.core.pictures import read_picture
from wanlab.core.words import number_text
from wanlab.evaluate.video import write_video
from wanlab.measure import load
from wanlab.measure.environment import environment
from wanlab.runs import clips, prepare
from wanlab.runs.folder import Heartbeat, RunFolder
from wanlab.runs.next_step import next_html, next_step
from wanlab.runs.parameters import Schema, checked, is_tagged, parse_cell, read_notebook, read_schema
from wanlab.runs.prepare import describe, header
from wanlab.runs.result import HERE, Result, checked_result, completed
from wanlab.runs.seal import seal
from wanlab.runs.tables import table_html

FOLDER_VARIABLE = "WANLAB_RUN_FOLDER"  # set by `wanlab run` for the kernel it starts
LOADING = ("device", "dtype", "weights", "seed")
"""Standard parameters of a notebook for loading its model; `seed` is the seed of random weights."""
GENERATION = ("height", "width", "frames", "steps", "guidance_scale")
"""Standard parameters of a notebook for generating videos."""

_current: Run | None = None


class Run:
    """An open run, from `start`. Every method writes into `folder` at once.

    Attributes:
        folder: `outputs/<name>/<run_id>/`.
        parameters: name -> resolved value.
        results: rows that `result` recorded, in order.
        id: 12 hex digits, equal for equal notebook, parameters, package and weights.
    """

    def __init__(
        self, folder: RunFolder, parameters: Mapping[str, Any], run_id: str, heartbeat: Heartbeat | None
    ):
        self._files = folder
        self._heartbeat = heartbeat  # None under `wanlab run`, which writes status.json itself
        self.folder = folder.path
        self.parameters = dict(parameters)
        self.results: tuple[Result, ...] = ()
        self.id = run_id
        self.finished = False
        self._models: list[models.Model] = []
        self._remarks: dict[str, None] = {}
        self._cells: list[str] = []  # code cells of the notebook's file at the start, in JupyterLab
        self._before = 0  # cells that were executed before the one of `start`
        self._answer: clips.Html | None = None
        self._tiles: list[dict[str, str]] = []
        self._meter = load.LoadMeter()

    def __repr__(self) -> str:
        return f"Run({self.folder.parent.name}/{self.id}, {'finished' if self.finished else 'open'})"

    def record(self, name: str, value: Any) -> Any:
        """Append a number, dict, DataFrame or timing to metrics.jsonl, and return it."""
        append_json(self._files.metrics, {"time": now(), "name": str(name), "value": plain(value)})
        return value

    def result(self, result: Result, *beside: Result) -> Result:
        """Append typed rows of what the run measured to results.jsonl.

        Args:
            result: the row that the run is about; comparisons, sweep pages and exports show its figures.
            beside: other rows, such as those of the original or of single calls.

        Returns:
            `result` with its machine and software filled in.

        Raises:
            WanlabError: a field is of another type.
        """
        environment = read_json(self._files.run_json).get("environment") or {}
        rows = [
            completed(checked_result(each), environment, taken=now(), notes=self.notes)
            for each in (result, *beside)
        ]
        for row in rows:
            append_json(self._files.results, row.to_dict())
        self.results = (*self.results, *(msgspec.structs.replace(row, source=HERE) for row in rows))
        return self.results[-len(rows)]

    def note(self, *remarks: str) -> None:
        """Keep remarks that the figures depend on: they go into the report, and into the rows of `result` after this."""
        self._remarks |= dict.fromkeys(remarks)

    def save_video(self, name: str, frames: Any, fps: float) -> Path:
        """Write frames [T, H, W, 3] to `artifacts/<name>.mp4`, which browsers play."""
        path = self._artifact(name, ".mp4")
        write_video(path, frames, fps)
        return path

    def figure(self, name: str, figure: Any, *data: Any, otherwise: str = "") -> Any:
        """Save a figure and return it for display.

        Args:
            name: name of the file `artifacts/<name>.plotly.json`.
            figure: a plotly figure, or a function of `wanlab.plots` that draws `data`.
            data: arguments of that function; where one of them is None or empty, nothing is drawn.
            otherwise: sentence that is shown where nothing is drawn.
        """
        if figure is None or any(map(_is_nothing, data)):
            return clips.sentence(otherwise) if otherwise else None
        return self.save_figure(name, figure(*data) if callable(figure) else figure)

    def table(
        self,
        name: str,
        table: Any,
        *,
        columns: Sequence[str] | None = None,
        rows: int | None = None,
        otherwise: str = "",
    ) -> Any:
        """`record` and `save_table` of a DataFrame."""
        self.record(name, pd.DataFrame() if table is None else table)
        return self.save_table(name, table, columns=columns, rows=rows, otherwise=otherwise)

    def load(self, **instead: Any) -> tuple[models.Model, dict[str, Any]]:
        """Load the model of the notebook's standard parameters.

        Args:
            instead: arguments of `models.load` that replace parameters, e.g. `components=[...]`.

        Returns:
            The model of the parameters `model`, `device`, `dtype`, `weights` and `seed`, and `ask`.

        Raises:
            WanlabError: the notebook has no parameter `model`, an error of `models.load`, or of the file that its parameter
                `image` names.
        """
        if "model" not in self.parameters:
            raise WanlabError("run.load() needs a parameter `model`; add it to the parameters cell")
        if isinstance(picture := self.ask.get("image"), str):
            read_picture(picture)  # refused before the model is loaded
        settings = {name: self.parameters[name] for name in LOADING if name in self.parameters}
        model = models.load(self.parameters["model"], **settings | instead)
        self._models.append(model)
        if "prompt" in self.parameters:
            self._fit_inputs(model)
        return model, self.ask

    def _fit_inputs(self, model: models.Model) -> None:
        """Give `ask` the inputs that this model needs: no picture to a text-to-video model, a held-out clip where it needs
        more than a picture."""
        given = heldout.inputs(model.conditions, self.ask.get("frames") or model.spec.defaults.frames)
        if self.parameters.get("image") is not None:
            del given["image"]  # that of the parameters, which a model that takes none refuses
        self.ask.update(given)
        if more := given.get("conditions"):
            self.note(
                f"{', '.join(more)}: frames of a held-out clip, which have no meaning for the model's task"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of `note`; of the models that `load` loaded: what was read from their files, and what was said of
        generations; and on cells that were executed otherwise than the notebook's file has them."""
        unsaved = len(self._as_executed().get("unsaved_cells", ()))
        words = f"{unsaved} executed cell(s) are not in the notebook's file as it was at the start"
        of_models = [note for model in self._models for note in model.notes]
        return tuple(dict.fromkeys([*self._remarks, *of_models, *([words] if unsaved else [])]))

    @functools.cached_property
    def ask(self) -> dict[str, Any]:
        """Arguments of `Model.generate` that the notebook has as parameters.

        `height`, `width`, `frames`, `steps` and `guidance_scale`; with a `prompt` also `image` (a held-out photograph where
        it is None), `prompt` and `seed`.
        """
        values = self.parameters
        ask = {name: values[name] for name in GENERATION if name in values}
        if "prompt" in values:
            picture = values.get("image") or heldout.example_case().truth()[0]
            ask |= {"image": picture, "prompt": values["prompt"], "seed": values.get("seed", 0)}
        return ask

    @property
    def outputs(self) -> Path:
        """The folder of all runs. Runs also share slow work here, such as exported networks."""
        return self.folder.parents[1]

    def save_figure(self, name: str, figure: Any) -> Any:
        """Write a plotly figure to `artifacts/<name>.plotly.json`, and return it for display.

        A live view (`plots.explorer`) writes its own data, `artifacts/<name>.explorer.gz`.
        """
        if hasattr(figure, "save"):
            figure.save(self._artifact(name, ".explorer.gz"))
            return figure
        write_text(self._artifact(name, ".plotly.json"), figure.to_json())
        return figure

    def save_table(
        self,
        name: str,
        table: Any,
        *,
        columns: Sequence[str] | None = None,
        rows: int | None = None,
        otherwise: str = "",
    ) -> Any:
        """Write a DataFrame to `artifacts/<name>.csv`, and return it for display.

        Args:
            name: name of the file.
            table: the DataFrame; all of it is saved.
            columns, rows: columns and number of first rows that are returned; all if None.
            otherwise: sentence that is shown where the table is None or has no rows; then nothing is saved.
        """
        if table is None or (otherwise and table.empty):
            return clips.sentence(otherwise) if otherwise else None
        write_text(self._artifact(name, ".csv"), table.to_csv(index=table.index.name is not None))
        shown = table if columns is None else table[list(columns)]
        return shown if rows is None else shown.head(rows)

    def save_flame(self, name: str, flame: Any) -> None:
        """Write a flame graph for other viewers, as `<name>.folded` and `<name>.speedscope.json`; None writes nothing."""
        if flame is None:
            return
        write_text(self._artifact(name, ".folded"), flame.folded())
        write_text(self._artifact(name, ".speedscope.json"), json.dumps(flame.speedscope(name)))

    def show_videos(self, items: Mapping[str, Any], *, fps: float | None = None) -> clips.Html:
        """Clips and pictures side by side, playing in step, without those that are None; see `clips.side_by_side`."""
        items = {name: item for name, item in items.items() if item is not None}
        return clips.side_by_side(items, self._files.artifacts, fps)

    def tile(self, title: str, value: str, beside: str = "") -> None:
        """Show a key figure below the verdict; those of `result` follow, five at most in all.

        Args:
            title: what it is, in a few words.
            value: the figure with its unit, in three significant digits.
            beside: its change, its interval or what it is read against.
        """
        self._tiles.append({"title": clean(title), "value": clean(value), "change": clean(beside)})
        self._files.update(tiles=self._tiles)

    def verdict(self, text: str | Answer, *details: str) -> clips.Html:
        """Record the answer of the notebook; the report begins with it.

        Where other work disturbed what this notebook timed, a sentence after the answer says so: lists of runs show no more.
        It asks for nothing where another step stands below it.

        Args:
            text: the answer in a sentence or two with its figure and how sure it is; a reader needs no more. An `Answer`
                brings its own details and key figures, which are shown as those of `tile`.
            details: sentences that explain or limit it, which stand below it in smaller letters; empty ones are left out.
        """
        given = text if isinstance(text, Answer) else Answer(text)
        for tile in given.tiles:
            self.tile(*tile)
        headline, busy = clean(given.headline), load.taken()
        if busy.text and busy.text not in headline:
            headline = f"{headline.removesuffix('.')}. Timed while {busy.text}{_after_load(given.next)}."
        shown = [clean(detail) for detail in (*given.details, *details) if detail.strip()]
        self._files.update(verdict=headline, details=shown, load=msgspec.to_builtins(busy))
        answer, lines = f'<p class="wl-verdict" style="font-size:130%">{escape(headline)}</p>', [headline]
        if given.next is not None:
            following = next_step(given.next, read_json(self._files.run_json))
            self._files.update(next=following)
            answer += next_html(following)
            lines.append(str(given.next))
        answer += "".join(f"<p>{escape(detail)}</p>" for detail in shown)
        self._answer = clips.Html(answer, "\n".join([*lines, *shown]))
        return self._answer

    def finish(self) -> None:
        """Mark the run as finished, with the load of the machine since its start. In JupyterLab also show its verdict.

        Raises:
            WanlabError: the model's files, or files that parameters name, changed during the run, so that its figures belong
                to no one input.
        """
        cells = self._as_executed()
        words = f"{cells.get('skipped_cells')} cell(s) of the notebook's file were not executed"
        notes = [*self.notes, *([words] if cells.get("skipped_cells") else [])]
        whole = msgspec.to_builtins(self._meter.load(timing=False))
        self._files.update(notes=notes, load_of_run=whole, **cells)
        self._check_weights()
        self._check_inputs()
        self._files.update(finished=now())
        self.finished = True
        if self._heartbeat is not None:
            seal(self._files)
        if self._heartbeat is not None and not self._heartbeat.ended:
            self._heartbeat.end("finished")
            if self._answer is not None:  # the last cell ends with `finish`, so its verdict is not displayed
                display(self._answer)
            print(f"run kept in {self.folder}")

    def _as_executed(self) -> dict[str, Any]:
        """Cells that were executed in JupyterLab and are not in the notebook's file, and how many of it were not."""
        executed = [cell.strip() for cell in _history({})]
        if not self._cells or not executed:
            return {}
        saved = [cell.strip() for cell in self._cells if cell.strip()]
        unsaved = [cell for cell in executed[self._before :] if cell and cell not in saved]
        skipped = sum(cell not in executed for cell in saved)
        return {"unsaved_cells": unsaved, "skipped_cells": skipped}

    def _check_inputs(self) -> None:
        before = read_json(self._files.run_json).get("inputs") or {}
        now_ = prepare.input_digests(self.parameters)
        changed = next((name for name in before if now_.get(name) != before[name]), None)
        if changed is not None:
            raise WanlabError(
                f"what parameter {changed} names changed during the run, so its figures belong to no one input; run it again"
            )

    def _check_weights(self) -> None:
        before = read_json(self._files.run_json).get("weights")
        if before and prepare.weights_id(self.parameters["model"], self.parameters.get("weights")) != before:
            raise WanlabError(
                f"the files of model {self.parameters['model']} changed during the run, so its figures belong to no one"
                " model; run it again"
            )

    def _artifact(self, name: str, suffix: str) -> Path:
        return self._files.artifacts / (checked_name(name.removesuffix(suffix), "artifact name") + suffix)

    def _abandon(self, reason: str) -> None:
        if self._heartbeat is not None and not self._heartbeat.ended and self.folder.is_dir():
            self._heartbeat.end("aborted", reason=reason)


def start(
    name: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike | None = None,
    plan: str | None = None,
) -> Run:
    """Open the run of the calling notebook.

    Under `wanlab run` the folder is open already, and the runner has set `name` and `output`. In JupyterLab this makes the
    folder, named by `name`, which is the notebook's file name without `.ipynb`.

    Args:
        name: name of the notebook, e.g. `"10_baseline"`; its `parameters` cell is found by it.
        parameters: values to check with the `parameters` cell; by default the caller's variables.
        output: folder of all runs; by default `outputs/` of the project.
        plan: hash of a precision plan, part of the run's identity.

    Raises:
        WanlabError: a parameter is missing, unknown or of the wrong type, or was changed after its cell.
    """
    global _current
    load.forget()
    _before_plotly()
    _before_tables()
    scope = inspect.currentframe().f_back.f_globals if parameters is None else parameters
    strict = parameters is not None
    folder = os.environ.pop(FOLDER_VARIABLE, None)  # popped: a child process is not this run
    if folder is not None:
        _current = _under_runner(RunFolder(Path(folder)), scope, strict)
    elif _current is None or _current._heartbeat is not None:
        _current = _alone(name, scope, strict, output, plan)
    return _current


def _under_runner(folder: RunFolder, scope: Mapping[str, Any], strict: bool) -> Run:
    record = read_json(folder.run_json)
    # The runner has just written the notebook there, parameters cell and all.
    schema = Schema(read_schema(folder.notebook).parameters, str(record["notebook"]))
    values = _values(schema, scope, strict)
    for key, value in values.items():
        if plain(value) != record["parameters"].get(key):
            before = record["parameters"].get(key)
            raise WanlabError(
                f"parameter {key!r} was changed after the parameters cell, from {before!r} to {value!r}; "
                f"give it with -p {key}=..., so that the run is filed under the value it used"
            )
    folder.update(environment=_environment())
    return Run(folder, values, record["run_id"], heartbeat=None)


def _alone(name: str | None, scope: Mapping[str, Any], strict: bool, output: Any, plan: str | None) -> Run:
    path, schema, source = _find_notebook(name, scope)
    if path is not None and path.resolve().parent == Path.cwd() != default_outputs().parent:
        # JupyterLab starts a kernel in notebooks/; relative paths are to mean the same as under `wanlab run`.
        os.chdir(default_outputs().parent)
    values = _values(schema, scope, strict) if schema else (dict(scope) if strict else {})
    inputs = prepare.input_digests(values)
    weights = prepare.weights_id(values.get("model"), values.get("weights"))
    run_id = prepare.run_id(source, values, plan=plan, weights=weights, inputs=inputs)
    if _current is not None:
        _current._abandon("started again in the same kernel")
    stem = file_name(name or (path.stem if path else "notebook"))
    folder = RunFolder.of(Path(output) if output else default_outputs(), stem, run_id).open()
    heartbeat = Heartbeat(folder, kernel=None)
    described = describe(schema, values) if schema else []
    folder.update(
        **header(run_id, stem, path, values, described, plan, weights, inputs), environment=_environment()
    )
    run = Run(folder, values, run_id, heartbeat)
    run._cells = prepare.code_cells(read_notebook(path)) if path else []
    run._before = max(len(_history(scope)) - 1, 0)
    atexit.register(run._abandon, "the kernel ended before run.finish()")
    print(f"run {stem}/{run_id}")
    return run


def _values(schema: Schema, scope: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    if strict:
        for key in scope:
            schema[key]  # raises for an unknown name
    missing = [name for name in schema.names if name not in scope]
    if missing:
        raise WanlabError(
            f"parameter {missing[0]!r} is not set: run the parameters cell of {schema.where} first"
        )
    return {p.name: checked(p, scope[p.name], schema.where) for p in schema.parameters}


def _find_notebook(name: str | None, scope: Mapping[str, Any]) -> tuple[Path | None, Schema | None, str]:
    """The notebook of this kernel: path, parameters, source. Executed cells come before the file, which may not be saved."""
    path = next((p for p in _candidates(name) if p.is_file()), None)
    notebook = read_notebook(path) if path else None
    history = _history(scope)
    source = prepare.notebook_source(notebook) if notebook else "\n".join(history)
    if notebook is None and not history:
        return None, None, source
    where = path.name if path else "this notebook"
    tagged = [cell.source for cell in notebook.cells if is_tagged(cell, "parameters")] if notebook else []
    names = {p.name for p in parse_cell(tagged[0], where)} if tagged else set()
    for cell in reversed(history):
        try:
            parsed = parse_cell(cell, where)
        except WanlabError:
            continue
        if parsed and all(p.annotated for p in parsed) and (not names or names & {p.name for p in parsed}):
            return path, Schema(parsed, where), source
    return path, Schema(parse_cell(tagged[0], where), where) if tagged else None, source


def _history(scope: Mapping[str, Any]) -> list[str]:
    """The cells that were executed, as they were written; the first is empty."""
    shell = get_ipython()
    cells = shell.history_manager.input_hist_raw if shell is not None else scope.get("In", [])
    return [str(cell) for cell in cells] if isinstance(cells, list) else []


def _candidates(name: str | None) -> Iterator[Path]:
    session = os.environ.get("JPY_SESSION_NAME", "")
    if session.endswith(".ipynb"):
        yield Path(session)
    if name:
        if name != Path(name).name:
            raise WanlabError(
                f"run name {name!r} cannot be a file name; give the notebook's without its folder"
            )
        for folder in (Path.cwd(), *Path.cwd().parents):
            yield folder / f"{name}.ipynb"
            yield folder / "notebooks" / f"{name}.ipynb"


def _is_nothing(data: Any) -> bool:
    """None, or a table or result without rows."""
    return data is None or getattr(data, "empty", False) is True


def _environment() -> dict[str, Any]:
    return plain(environment())


def _before_plotly() -> None:
    """Set one renderer, so that a figure is stored as data and not as five megabytes of JavaScript."""
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    if "plotly.io" in sys.modules:
        sys.modules["plotly.io"].renderers.default = os.environ["PLOTLY_RENDERER"]


def _before_tables() -> None:
    """Show tables in words and three significant digits; printed ones at least in whole texts."""
    pd.set_option("display.float_format", number_text, "display.max_colwidth", None)
    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)


def _after_load(following: Step | None) -> str:
    """What a reader makes of times that other work disturbed; a report asks for one thing only."""
    if following is None:
        return ": run it again on an idle machine"
    again = not following.notebook and following.parameters
    return ": repeat it with nothing else running, as below" if again else ", so the times may be too long"
