"""`wanlab run`: a notebook through Papermill into a run folder, with a true status however it ends."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs import identity
from wanlab.runs.files import default_outputs, plain, read_json
from wanlab.runs.folder import Heartbeat, RunFolder, process_id
from wanlab.runs.parameters import Schema, is_tagged, read_notebook, read_schema
from wanlab.runs.progress import Progress
from wanlab.runs.run import FOLDER_VARIABLE, describe, header

EXIT_CODES = {"finished": 0, "failed": 1, "died": 3, "timeout": 4, "aborted": 130}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `reused` is true when an earlier finished run already held the answer."""

    state: str  # finished, failed, died, timeout or aborted
    folder: Path
    report: Path
    run_id: str
    seconds: float
    error: str | None = None
    reused: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def execute(
    notebook: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike | None = None,
    name: str | None = None,
    force: bool = False,
    timeout_s: float | None = None,
    progress: bool = True,
) -> Outcome:
    """Run a notebook headless, in this interpreter and working folder, and render its report.

    Args:
        parameters: overrides of the `parameters` cell, already typed.
        output: folder of all runs, by default the project's `outputs/`.
        name: folder of this notebook's runs, by default the notebook's file name.
        force: run again even where a finished run with the same id exists; that one is kept in `attempts/`. A notebook
            with `{"wanlab": {"always": true}}` in its metadata is always run again.
        timeout_s: limit for the whole notebook.

    Raises:
        WanlabError: unknown parameter, wrong type, unreadable notebook, or a run that is being written by
            another process. Nothing was started then. A notebook that fails raises nothing: its end is in
            `Outcome.state`.
    """
    path = Path(notebook)
    nb = read_notebook(path)
    schema = Schema(read_schema(nb).parameters, str(path))
    values = schema.resolve(parameters or {})
    inputs, weights = identity.input_digests(values), identity.weights_id(values.get("model"))
    run_id = identity.run_id(identity.notebook_source(nb), values, weights=weights, inputs=inputs)
    folder = RunFolder.of(Path(output) if output else default_outputs(), name or path.stem, run_id)

    earlier = {} if force or _looks_around(nb) else _finished(folder)
    if earlier:
        if not folder.report.is_file():
            _render(folder)
        return Outcome(
            "finished", folder.path, folder.report, run_id, earlier.get("seconds", 0.0), reused=True
        )

    folder.open()
    described = describe(schema, values)
    folder.update(**header(run_id, folder.path.parent.name, path, values, described, None, weights, inputs))
    _inject(nb, {key: values[key] for key in parameters or {}})
    return _supervised(nb, folder, run_id, timeout_s, progress)


def _looks_around(nb: Any) -> bool:
    """Whether a notebook says in its metadata that it reads what its parameters do not name, such as other runs."""
    return bool(nb.metadata.get("wanlab", {}).get("always"))


def _finished(folder: RunFolder) -> dict[str, Any]:
    try:
        status = folder.status()
    except WanlabError:
        return {}
    return status if status.get("state") == "finished" else {}


def _supervised(nb: Any, folder: RunFolder, run_id: str, timeout_s: float | None, progress: bool) -> Outcome:
    from wanlab.runs.supervise import titles

    nb = _upgraded(nb)
    about = titles(nb)
    runs = [cell.cell_type == "code" and bool(cell.source.strip()) for cell in nb.cells]
    shown = Progress(folder.path.parent.name, about, runs, progress)
    heart = Heartbeat(
        folder, kernel=None, progress={"cell": 0, "of": len(nb.cells), "title": about[0] if about else ""}
    )

    def on_cell(index: int, cell: Any) -> None:
        shown.step(index, cell)
        if runs[index]:
            heart.write(progress={"cell": index + 1, "of": len(nb.cells), "title": about[index]})

    state, failure = "aborted", {"reason": "interrupted"}
    try:
        state, failure = _papermill(
            nb, folder, timeout_s, on_cell, lambda pid: heart.write(kernel=process_id(pid))
        )
    finally:
        shown.close(state == "finished")
        at = heart.fields["progress"]
        if state != "finished" and state != "aborted":
            failure = {"cell": at["cell"], "title": at["title"], **failure}
        seconds = heart.end(state, exit=EXIT_CODES[state], **failure)
        _render(folder)
    return Outcome(state, folder.path, folder.report, run_id, seconds, failure.get("reason"))


def _papermill(
    nb: Any, folder: RunFolder, timeout_s: float | None, on_cell: Any, on_kernel: Any
) -> tuple[str, dict]:
    """State and, unless finished, what went wrong."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    from wanlab.runs import supervise

    environment = {**os.environ, FOLDER_VARIABLE: str(folder.path), "PLOTLY_RENDERER": "plotly_mimetype"}
    try:
        with _quiet(), _stoppable():
            done = papermill.execute_notebook(
                nb,
                None,  # the engine writes executed.ipynb itself, atomically
                engine_name=supervise.register(),
                kernel_name=supervise.ENGINE,
                progress_bar=False,
                path=folder.notebook,
                on_cell=on_cell,
                on_kernel=on_kernel,
                environment=environment,
                deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            )
    except papermill.PapermillExecutionError as error:
        return "failed", {
            "reason": _one_line(f"{error.ename}: {error.evalue}"),
            "cell": error.cell_index + 1,
            "traceback": "\n".join(error.traceback),
        }
    except TimeoutError:
        return "timeout", {
            "reason": f"not done after {timeout_s:g} s" if timeout_s else "a cell gave no answer"
        }
    except DeadKernelError as error:
        return "died", {"reason": _one_line(str(error)), **_last_words(folder.path / supervise.KERNEL_LOG)}
    except KeyboardInterrupt as error:
        return "aborted", {"reason": _one_line(str(error)) or "interrupted by Ctrl-C"}
    except RuntimeError as error:  # the kernel could not start
        return "died", {"reason": _one_line(f"the kernel did not start: {error}")}
    return _judge(done, folder)


def _judge(done: Any, folder: RunFolder) -> tuple[str, dict]:
    """Papermill raised nothing; believe it only if all cells completed and `run.finish()` was reached."""
    for index, cell in enumerate(done.cells):
        if cell.metadata.get("papermill", {}).get("status") != "completed":
            return "failed", {"reason": "the notebook stopped early (SystemExit)", "cell": index + 1}
    record = read_json(folder.run_json)
    if "environment" in record and "finished" not in record:
        return "failed", {"reason": "the notebook ended without run.finish()"}
    return "finished", {}


def _last_words(log: Path, lines: int = 60) -> dict[str, str]:
    """What a dying kernel wrote, such as the Python stack of a segmentation fault."""
    text = log.read_text("utf-8", "replace").strip() if log.is_file() else ""
    return {"traceback": "\n".join(text.splitlines()[-lines:])} if text else {}


def _render(folder: RunFolder) -> None:
    from wanlab.runs.report import render

    render(folder.path)


def _upgraded(nb: Any) -> Any:
    """Current notebook format, where every cell has an id."""
    import nbformat

    nb = nbformat.v4.upgrade(nb)
    nb.metadata.setdefault("papermill", {})
    for cell in nb.cells:
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
        cell.metadata.setdefault("papermill", {})
    return nb


def _inject(nb: Any, values: Mapping[str, Any]) -> None:
    """Put overrides into a cell below the defaults, as Papermill does, with exact literals for every type."""
    import nbformat

    nb.cells = [cell for cell in nb.cells if not is_tagged(cell, "injected-parameters")]
    if not values:
        return
    lines = ["# Parameters", *(f"{name} = {_literal(value)}" for name, value in values.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    at = next(index for index, cell in enumerate(nb.cells) if is_tagged(cell, "parameters"))
    nb.cells.insert(at + 1, cell)
    nb.metadata.setdefault("papermill", {})["parameters"] = plain(dict(values))


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


@contextmanager
def _stoppable(insist_s: float = 10.0) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run alike, so that the kernel goes and the status is written.

    Where a library swallows the exception, as Python itself does in finalisers, it is raised again every `insist_s`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, reasons = threading.Event(), []

    def insist(number: int) -> None:
        while not left.wait(insist_s):
            signal.pthread_kill(threading.main_thread().ident, number)

    def stop(number: int, frame: Any) -> None:
        if not reasons:
            reasons.append("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C")
            threading.Thread(target=insist, args=(number,), daemon=True).start()
        raise KeyboardInterrupt(reasons[0])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Papermill logs what the status and the report say better."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(text: str, limit: int = 300) -> str:
    from papermill.exceptions import strip_color

    lines = strip_color(text).strip().splitlines()
    return lines[0][:limit] if lines else ""
