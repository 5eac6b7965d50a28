"""`make lab` as people use it: a real JupyterLab in a real browser, and a notebook run by hand from top to bottom."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

pytestmark = pytest.mark.browser

QUICK = {  # the quickstart in the shortest form that still does all that it does
    "steps: int | None = None": "steps: int | None = 2",
    "frames: int = 9": "frames: int = 5",
    "limit_s: float = 40.0": "limit_s: float = 2.0",
    "cases: int = 3": "cases: int = 1",
}
REPORT = """<!doctype html><p>empty</p><script>
let said = "drawn, and free"; try { document.cookie } catch { said = "drawn, and shut in" }
document.querySelector("p").textContent = said;
</script>"""
LIMIT_MS = 400_000  # two test processes share the cores


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A project folder of its own: the index, and a shortened copy of the quickstart."""
    folder = tmp_path_factory.mktemp("lab") / "project"
    (folder / "notebooks").mkdir(parents=True)
    earlier = folder / "outputs" / "10_earlier" / "abc"
    earlier.mkdir(parents=True)
    (earlier / "run.json").write_text('{"run_id": "abc", "name": "10_earlier"}')
    (earlier / "status.json").write_text(
        '{"state": "failed", "started": "2020-01-01T00:00:00+00:00", "reason": "x"}'
    )
    (earlier / "report.html").write_text(REPORT)
    shutil.copy(root / "notebooks" / "index.ipynb", folder / "notebooks")
    text = (root / "notebooks" / "00_quickstart.ipynb").read_text()
    changes = {json.dumps(old)[1:-1]: json.dumps(new)[1:-1] for old, new in QUICK.items()}
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "notebooks" / "00_quickstart.ipynb").write_text(text)
    trace = root / "tests" / "fixtures" / "traces" / "cuda_graph.pt.trace.json.gz"
    code = f"from wanlab import diagnose, plots\nview = diagnose.explore(diagnose.read_trace({str(trace)!r}))"
    cells = [nbformat.v4.new_code_cell(source) for source in (code, "plots.explorer(view)", "view.selection")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, folder / "notebooks" / "explore.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(root, project):
    """`make lab`, with this interpreter, on a free port and with a home of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = project.parent / "home"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
    places = {"HOME": home, "JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython"}
    flags = f"--no-browser --allow-root --ServerApp.port={port} --ServerApp.port_retries=0"
    stamp = "STAMP=.installed"  # taken for made: this interpreter is what is tested
    made = [
        "make",
        "-s",
        "-f",
        root / "Makefile",
        "-o",
        ".installed",
        stamp,
        f"BIN={Path(sys.executable).parent}",
    ]
    log = project.parent / "lab.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*made, f"LAB={flags}", "lab"],
            cwd=project,
            env=kept | {name: str(path) for name, path in places.items()} | {"PYTHONPATH": str(root)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (said := re.search(rf"http://(\S+):{port}/lab\S*\?token=(\w+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        base = f"http://{said[1]}:{port}/"
        yield SimpleNamespace(base=base, port=port, token=said[2], pid=process.pid, log=log)
    finally:
        ours = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        psutil.wait_procs(ours, timeout=20)
        for left in ours:
            if left.is_running():
                left.kill()
        process.wait(20)


def test_only_this_machine_and_only_with_the_token(lab):
    listening = {
        connection.laddr.ip
        for process in psutil.Process(lab.pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == lab.port
    }
    assert listening == {"127.0.0.1"}
    assert len(lab.token) >= 32
    asked = f"{lab.base}api/contents"
    for wrong in ("", "?token=", f"?token={'0' * len(lab.token)}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked + wrong, timeout=30)
        assert refused.value.code == 403
    with urllib.request.urlopen(f"{asked}?token={lab.token}", timeout=30) as answer:
        assert {item["name"] for item in json.load(answer)["content"]} == {"notebooks", "outputs"}


@pytest.fixture(scope="module")
def opened(lab, browser):
    """Open a notebook in JupyterLab and run all of its cells; gives the page. All it asks for is the server's."""
    contexts, elsewhere = [], []

    def go(name: str):
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        own = (lab.base, lab.base.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or elsewhere.append(request.url))
        page.set_default_timeout(LIMIT_MS)
        page.goto(f"{lab.base}lab/tree/notebooks/{name}.ipynb?token={lab.token}&reset")
        page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells")).click()
        return page

    yield go
    for context in contexts:
        context.close()
    assert not elsewhere, elsewhere


def finished(page, cells: int) -> None:
    """Wait until so many code cells have run."""
    page.wait_for_function(
        """cells => {
            const said = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(e => e.textContent);
            return said.filter(text => /^\\[\\d+\\]:?$/.test(text)).length == cells
                || document.querySelector("[data-mime-type='application/vnd.jupyter.error']");
        }""",
        arg=cells,
        timeout=LIMIT_MS,
    )
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()


def code_cells(path: Path) -> int:
    return sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])


@pytest.mark.notebook
def test_quickstart_runs_by_hand(opened, project):
    path = project / "notebooks" / "00_quickstart.ipynb"
    page = opened(path.stem)
    bar = page.locator(".jupyter-widgets.widget-hprogress, .jupyter-widgets .progress").first
    bar.wait_for()  # a bar of tqdm, drawn as a widget while it runs
    finished(page, code_cells(path))

    figures = page.locator(".js-plotly-plot")
    assert figures.count() == 4
    for figure in figures.all():
        assert figure.locator("svg.main-svg").first.locator("path, text").count() > 10
    clips = page.locator(".wl-clips video")
    assert clips.count() == 3
    assert clips.evaluate_all("all => all.every(clip => clip.videoWidth == 192 && clip.duration > 0)")
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    wide = "shown => shown.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    assert page.locator(".jp-OutputArea-output").evaluate_all(wide) == []

    said = page.locator(".wl-verdict").inner_text()
    assert said.startswith(
        ("ONNX Runtime", "No difference in time between ONNX Runtime and")
    )  # beside other work
    assert "too few to say how sure that is" in said
    # Paths of parameters are the project's, whatever folder the kernel was started in.
    assert len(list((project / "outputs" / "onnx-fixed").glob("wan-nano-*/*/graphs/text_encoder.onnx"))) == 1
    assert sorted(path.name for path in (project / "notebooks").iterdir() if path.name[0] != ".") == [
        "00_quickstart.ipynb",
        "explore.ipynb",
        "index.ipynb",
    ]

    (folder,) = (project / "outputs" / path.stem).iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert json.loads((folder / "run.json").read_text())["verdict"] == said

    # The index then shows it, and leads to it.
    index = opened("index")
    finished(index, code_cells(project / "notebooks" / "index.ipynb"))
    questions, last = index.locator(".wl-table").all()
    assert "can this video be made faster" in questions.inner_text()
    row = last.locator("tbody tr").first.inner_text()
    assert "finished" in row
    assert said in row
    with index.context.expect_page() as tab:
        last.locator("a", has_text="10_earlier").click()
    tab.value.get_by_text("drawn, and shut in").wait_for()
    questions.locator("a", has_text="00_quickstart").click()
    index.locator(".jp-Notebook:visible h1", has_text="Quickstart").wait_for()


def test_what_is_brushed_in_the_explorer_is_a_table_in_the_next_cell(opened, project):
    page = opened("explore")
    finished(page, 3)
    page.locator(".wlx[data-drawn=yes]").wait_for()
    box = page.locator(".wlx-lanes canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 60
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 90, y, steps=5)
    page.mouse.up()
    page.locator(".wlx-table tbody tr").first.click()
    events = int(page.locator(".wlx-said").inner_text().split()[0].replace(",", ""))
    name = page.locator(".wlx-table tr.on").get_attribute("title")
    assert events > 0
    cell = page.locator(".jp-CodeCell").last
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("sorted(set(view.selection['name'])), len(view.selection)")
    page.keyboard.press("Control+Enter")
    said = cell.locator(".jp-OutputArea-output", has_text=re.compile(rf"{events}\)"))
    said.wait_for()
    assert name[:30] in said.inner_text()
