"""report.html, index.html and a published folder, as Chromium shows them. All pages are made from real run folders."""

from __future__ import annotations

import csv
import functools
import http.server
import io
import json
import re
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image
from support.comparison_runs import result_line
from support.pages import faults

from wanlab.core.files import append_json, now, write_json
from wanlab.evaluate import write_video
from wanlab.pages import publish, render, render_index
from wanlab.pages.report import PLOTLY
from wanlab.plots import theme
from wanlab.runs.folder import RunFolder
from wanlab.runs.tables import table_html

pytestmark = pytest.mark.browser

FPS = 8
HOSTILE = '</script><img src=x onerror="window.hit=1"><a href="javascript:hit=2">x</a>{{7*7}}'
READY = "document.documentElement.dataset.ready === 'yes'"
VIDEOS = "[...document.querySelectorAll('video')]"


def until(page, expression: str, seconds: float = 60.0) -> None:
    """Wait for JavaScript to be true. Playwright's own waiting evaluates inside the page, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
        page.wait_for_timeout(20)


def clip(path: Path, shade: int) -> Path:
    y, x = np.mgrid[:48, :64]
    frames = [np.stack([(x * 3 + 9 * t) % 256, (y * 5) % 256, np.full_like(x, shade)], -1) for t in range(12)]
    return write_video(path, np.stack(frames).astype(np.uint8), FPS)


def run(
    root: Path, name: str, parameters: dict, summary: dict | None = None, state="finished", mp4=None, **status
) -> dict:
    """A run folder as `wanlab run` leaves it, and its line of sweep.json."""
    if state == "pending":
        return {"label": name, "run_id": "never", "parameters": parameters, "repeat": 1, "state": state}
    run_id = re.sub(r"\W", "", name)[:60] or "x"
    folder = RunFolder.of(root.parent, root.name, run_id).open()
    record = {
        "run_id": run_id,
        "name": root.name,
        "parameters": parameters,
        "created": now(),
        "wanlab": "0.1.0",
    }
    write_json(
        folder.run_json, record | {"environment": {"cpu": "a CPU"}, "verdict": status.pop("verdict", "Done.")}
    )
    write_json(folder.status_json, {"state": state, "started": now(), "seconds": 60.0, **status})
    if summary:
        append_json(folder.results, result_line(summary, {}))
    if mp4:
        (folder.artifacts / "video.mp4").write_bytes(mp4)
    figure = go.Figure(go.Bar(x=[3.5, 1.25], y=["=expert", "VAE"], orientation="h", name="share"))
    figure.update_layout(xaxis_title="time (ms)")
    output = nbformat.v4.new_output("display_data", data={PLOTLY: json.loads(figure.to_json())})
    cells = [
        nbformat.v4.new_markdown_cell(f"# Run {name}"),
        nbformat.v4.new_code_cell("draw()", outputs=[output]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder.notebook)
    render(folder.path)
    return {"label": name, "run_id": run_id, "parameters": parameters, "repeat": 1, "state": state}


def sweep(root: Path, runs: list[dict], **fields) -> Path:
    write_json(
        root / "sweep.json",
        {
            "name": root.name,
            "title": "Which engine?",
            "state": "finished",
            "seconds": 90,
            **fields,
            "runs": runs,
        },
    )
    return render_index(root)


@pytest.fixture(scope="module")
def mp4s(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [clip(folder / f"{shade}.mp4", shade).read_bytes() for shade in (20, 130, 240)]


@pytest.fixture(scope="module")
def index(tmp_path_factory, mp4s) -> Path:
    """Two engines by three plans: one failed, one never started; three are on the frontier of time and quality."""
    root = tmp_path_factory.mktemp("outputs") / "60_sweep"
    plans = {"default": (100.0, 0.0), "int8": (80.0, 1.5), "fp8": (90.0, 2.5)}
    runs = []
    for engine, speed in (("eager", 1.0), ("onnxruntime", 0.5)):
        for k, (plan, (time_ms, loss)) in enumerate(plans.items()):
            summary = {
                "time_per_video_ms": time_ms * speed,
                "quality_loss_percent": loss,
                "peak_memory_gib": 2.0 - speed,
            }
            how = {"mp4": mp4s[k]}
            if (engine, plan) == ("eager", "fp8"):
                how, summary = {"state": "memory", "reason": "8 of 8 GiB", "title": "Time it"}, None
            if (engine, plan) == ("onnxruntime", "fp8"):
                how, summary = {"state": "pending"}, None
            runs.append(
                run(root, f"engine={engine} plan={plan}", {"engine": engine, "plan": plan}, summary, **how)
            )
    return sweep(root, runs, axes=["engine", "plan"], baseline={"engine": "eager", "plan": "default"})


def colours(place) -> int:
    """Different colours of an element on the screen; a blank one has a handful."""
    picture = Image.open(io.BytesIO(place.screenshot())).convert("RGB")
    return len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0))


def titles(page) -> list[str]:
    return page.locator(".runs tbody tr:not([hidden]) .name").all_inner_texts()


def saved(page, control) -> list[list[str]]:
    with page.expect_download() as download:
        control.click()
    return list(csv.reader(Path(download.value.path()).read_text("utf-8-sig").splitlines()))


def playing(page) -> list[float]:
    until(page, f"{VIDEOS}.every(v => v.currentTime > 0.1)")
    return page.evaluate(f"{VIDEOS}.map(v => v.currentTime)")


def test_index_says_what_happened_draws_it_and_plays_it(index, open_page):
    page = open_page(index)
    until(page, READY)
    assert page.locator(".verdict").inner_text() == (
        "4 of 6 runs finished in 1 min 30 s on a CPU; 1 ran out of memory, 1 not started."
    )
    failure = page.locator(".failure").inner_text()
    assert "eager · fp8" in failure
    assert "Time it" in failure
    assert "8 of 8 GiB" in failure
    page.wait_for_selector("#frontier .scatterlayer .point")
    assert page.locator("#frontier .scatterlayer .point").count() >= 4
    assert colours(page.locator("#frontier")) > 60
    assert page.locator("#lines .bundle path").count() == 4
    assert colours(page.locator("#lines")) > 60
    row = page.locator("tr", has_text="onnxruntime · int8")
    assert "2.50×" in row.inner_text()

    assert page.locator("#clips figcaption span").all_inner_texts() == [
        "eager · default",
        "onnxruntime · default",
        "onnxruntime · int8",
    ]
    times = playing(page)
    assert max(times) - min(times) < 1 / FPS
    # Under load a shot may come between two frames.
    assert max(colours(page.locator("#clips video").first) for _ in range(4)) > 200
    page.get_by_label("speed ½×").click()
    assert page.evaluate(f"{VIDEOS}.map(v => v.playbackRate)") == [0.5] * 3
    page.locator(".wl-clips").click()
    assert page.evaluate(f"{VIDEOS}.every(v => v.paused)")


def test_filter_search_sort_and_choice_act_on_all_parts(index, open_page):
    page = open_page(index)
    page.wait_for_selector("#frontier .scatterlayer .point")
    page.get_by_label("plan", exact=True).select_option(label="int8")
    assert titles(page) == ["eager · int8", "onnxruntime · int8"]
    assert page.locator(".count").inner_text() == "2 of 6 runs"
    assert page.locator("#lines .bundle path").count() == 2
    assert page.locator("#clips video").count() == 1  # one of the two is chosen
    until(page, "document.getElementById('frontier').data.flatMap(t => t.customdata || []).length === 2")
    page.get_by_label("search runs").fill("EAGER 8 of 8")
    assert titles(page) == []
    page.get_by_text("clear", exact=True).click()
    page.get_by_label("search runs").fill("8 of 8")
    assert titles(page) == ["eager · fp8"]
    page.get_by_label("search runs").fill("")

    head = page.get_by_role("button", name="time per video")
    column = page.get_by_role("columnheader", name="time per video")
    head.press("Enter")
    assert column.get_attribute("aria-sort") == "ascending"
    assert titles(page)[:4] == [
        "onnxruntime · int8",
        "onnxruntime · default",
        "eager · int8",
        "eager · default",
    ]
    head.click()
    assert column.get_attribute("aria-sort") == "descending"
    assert titles(page)[0] == "eager · default"
    assert titles(page)[4:] == ["eager · fp8", "onnxruntime · fp8"]  # no value: last either way

    page.evaluate("window.scrollTo(0, 0)")
    point = page.evaluate(
        """() => { const p = document.getElementById("frontier"), a = p._fullLayout;
        const box = p.getBoundingClientRect();
        return [box.left + a._size.l + a.xaxis.d2p(80), box.top + a._size.t + a.yaxis.d2p(1.5)]; }"""
    )
    page.locator("#frontier").scroll_into_view_if_needed()
    moved = page.evaluate("window.scrollY")
    page.mouse.click(point[0], point[1] - moved)
    box = page.get_by_label("show eager · int8")
    until(page, "document.querySelectorAll('#clips video').length === 4")
    assert box.is_checked()
    box.uncheck()
    assert page.locator("#clips video").count() == 3
    page.get_by_label("up").select_option(label="time per video")  # the two axes change places
    assert page.get_by_label("across").input_value().endswith("quality_loss_percent")


def test_links_lead_to_reports_and_tables_download(index, open_page):
    page = open_page(index, allowed=(index.parent.as_uri(),))
    until(page, READY)
    rows = saved(page, page.get_by_text("download CSV"))
    head = rows[0]
    assert len(rows) == 7
    assert {"label", "p.engine", "m.time_per_video_ms", "reason"} <= set(head)
    assert {row[head.index("label")]: row[head.index("m.time_per_video_ms")] for row in rows[1:]}[
        "engine=eager plan=int8"
    ] == "80"
    front = saved(page, page.locator("#frontier + .under button"))
    assert [row[-1] for row in front[1:]] == ["false", "false", "true", "true"]

    page.locator("tr", has_text="onnxruntime · int8").get_by_role("link", name="report").click()
    assert page.locator("h1").inner_text() == "Run engine=onnxruntime plan=int8"
    page.wait_for_selector(".figure .barlayer .point")
    assert saved(page, page.get_by_role("button", name="data")) == [
        ["trace", "time (ms)", "y"],
        ["share", "3.5", "'=expert"],  # a spreadsheet does not take it for a formula
        ["share", "1.25", "VAE"],
    ]


@pytest.mark.parametrize(("name", "dark"), [("index", True), ("report", False)])
def test_a_phone_shows_it_without_scrolling_sideways(index, open_page, name, dark):
    target = index if name == "index" else next(index.parent.glob("*/report.html"))
    page = open_page(target, width=390, height=844, dark=dark)
    page.wait_for_selector(".scatterlayer .point, .barlayer .point")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (red < 60) == dark
    ink = page.locator(".xaxislayer-above text, .xaxislayer-below text").first
    until(page, "document.querySelector('.xtick text')")
    assert (
        sum(map(int, re.findall(r"\d+", ink.evaluate("t => getComputedStyle(t).fill"))[:3])) > 380
    ) == dark


def test_hostile_text_is_text_everywhere(tmp_path, open_page, mp4s):
    root = tmp_path / "s"
    runs = []
    for k in (1, 2):
        parameters = {"plan": f"{k}{HOSTILE}", HOSTILE: str(k)}
        summary = {"time_per_video_ms": 10.0 - k, "psnr_db": 9.0 - k, HOSTILE: 1.0}
        runs.append(run(root, f"{k} {HOSTILE}", parameters, summary, mp4=mp4s[0], verdict=HOSTILE))
    runs.append(run(root, "bad", {"plan": HOSTILE}, state="failed", reason=HOSTILE, title=HOSTILE))
    runs.append(
        {
            "label": HOSTILE,
            "run_id": "../../etc",
            "parameters": {"plan": HOSTILE},
            "state": HOSTILE,
            "machine": HOSTILE,
        }
    )
    address = sweep(
        root,
        runs,
        title=HOSTILE,
        axes=["plan", HOSTILE],
        baseline={"plan": f"1{HOSTILE}"},
        executor={"kind": HOSTILE},
        grid_file=HOSTILE,
    )
    page = open_page(address)
    page.wait_for_selector("#frontier .scatterlayer .point")
    assert page.locator("h1").inner_text() == HOSTILE
    page.locator("#lines .hits path").first.hover(force=True)
    page.locator("#frontier").hover()
    page.get_by_label("search runs").fill("onerror")
    assert len(titles(page)) == 4
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    links = page.evaluate("[...document.querySelectorAll('a, svg a')].map(a => a.getAttribute('href'))")
    assert links
    assert all(re.fullmatch(r"\./[\w.%-]+/(report\.html|executed\.ipynb)", link) for link in links), links


def test_a_hundred_runs_fit_and_what_does_not_is_played_from_its_file(tmp_path, open_page, mp4s):
    root = tmp_path / "many"
    rng = np.random.default_rng(0)
    runs = []
    for k in range(100):
        # A clip of the size that real ones have: an MP4 may end in a box that players skip.
        extra = rng.bytes(110_000)
        mp4 = mp4s[k % 3] + (len(extra) + 8).to_bytes(4) + b"free" + extra
        folder = RunFolder.of(tmp_path, "many", f"run{k}").open()
        write_json(folder.run_json, {"run_id": f"run{k}", "name": "many", "parameters": {"k": k}})
        write_json(folder.status_json, {"state": "finished", "started": now(), "seconds": 1.0})
        append_json(
            folder.results, result_line({"time_per_video_ms": 100.0 + k, "psnr_db": 20.0 + k % 9}, {})
        )
        (folder.artifacts / "video.mp4").write_bytes(mp4)
        runs.append({"label": f"k={k}", "run_id": f"run{k}", "parameters": {"k": k}, "state": "finished"})
    address = sweep(root, runs, axes=["k"])
    assert 8 * 2**20 < address.stat().st_size <= 15 * 2**20
    page = open_page(address, allowed=(root.as_uri(),))
    until(page, READY)
    inside = page.locator("script[id^=clip-]").count()
    assert 40 < inside < 80
    page.get_by_label("show k=99").check()
    until(page, f"{VIDEOS}.some(v => v.src.endsWith('run99/artifacts/video.mp4') && v.currentTime > 0.1)")
    playing(page)


@pytest.fixture
def serve():
    """Serve a folder on this machine alone; gives its address."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        handler.log_message = lambda *args: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_published_folder_works_from_a_plain_server(index, tmp_path, open_page, serve):
    site = tmp_path / "site"
    publish(index.parent, site)
    address = serve(site)
    page = open_page(address + "index.html", allowed=(address,))
    page.wait_for_selector("#frontier .scatterlayer .point")
    times = playing(page)
    assert max(times) - min(times) < 1 / FPS
    assert page.get_by_role("link", name="notebook").count() == 0
    page.get_by_role("link", name="report").last.click()
    page.wait_for_selector(".figure .barlayer .point")
    assert colours(page.locator(".figure")) > 20
    assert (site / "plotly.min.js").stat().st_size > 10 * next(site.glob("*/report.html")).stat().st_size


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A report with a table of many columns, its file, a term of the glossary, messages and code."""
    frame = pd.DataFrame(
        {"component": ["expert_low", "vae_decoder"]} | {f"n{i}_ms": [1.5 * i, i] for i in range(30)}
    )
    folder = RunFolder.of(tmp_path_factory.mktemp("outputs"), "10_wide", "r1").open()
    record = {
        "run_id": "r1",
        "name": "10_wide",
        "verdict": "The noise floor is 0.01.",
        "details": ["In short."],
    }
    write_json(folder.run_json, record | {"tiles": [{"title": "LPIPS", "value": "0.01", "change": ""}]})
    write_json(folder.status_json, {"state": "finished", "started": now(), "seconds": 60.0})
    (folder.artifacts / "calls.csv").write_text(frame.to_csv(index=False))
    v4 = nbformat.v4
    figure = go.Figure(go.Bar(x=[70_000.0, 1.25], y=["expert", "VAE"], orientation="h"), {"height": 700})
    figure.update_layout(template=theme(), xaxis_title="time (ms)")
    main = v4.new_code_cell(
        "draw()", outputs=[v4.new_output("display_data", data={PLOTLY: json.loads(figure.to_json())})]
    )
    main.metadata["tags"] = ["main"]
    table = v4.new_output("display_data", data={"text/html": table_html(frame)})
    messages = v4.new_output("stream", name="stderr", text="a message")
    cells = [
        v4.new_markdown_cell("# How wide is a table?"),
        main,
        v4.new_code_cell('run.save_table("calls", frame)', outputs=[table, messages]),
    ]
    nbformat.write(v4.new_notebook(cells=cells), folder.notebook)
    return render(folder.path)


def test_the_first_screen_holds_title_answer_figures_and_the_main_figure(wide, open_page):
    page = open_page(wide, width=1400, height=900)
    until(page, "document.querySelector('.figure').dataset.drawn === 'yes'")
    tops = page.evaluate(
        "['h1', '.verdict', '.tiles', '.main .figure'].map(s => document.querySelector(s).getBoundingClientRect().bottom)"
    )
    assert tops == sorted(tops)
    assert tops[-1] <= 900
    assert "70,000" in page.locator(".xtick text").all_text_contents()


@pytest.mark.parametrize("width", [1400, 390])
def test_a_wide_table_fades_where_there_is_more_and_keeps_its_first_column(wide, open_page, width, browser):
    assert faults(browser, wide) == []
    page = open_page(wide, width=width)
    box = page.locator(".rich:has(table)")
    until(page, "document.querySelector('.rich:has(table)').classList.contains('right')")
    first = page.get_by_role("cell", name="low-noise expert")
    left = first.bounding_box()["x"]
    box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    until(page, "document.querySelector('.rich:has(table)').matches('.left:not(.right)')")
    assert first.bounding_box()["x"] == pytest.approx(left, abs=1)
    page.get_by_text("choose among 31 columns").click()
    for number in range(3, 30):
        page.get_by_label(f"n{number}, ms", exact=True).uncheck()
    assert page.locator("thead th:visible").count() == 4
    assert width < 640 or page.evaluate(
        "!document.querySelector('.rich:has(table)').matches('.left, .right')"
    )


def test_the_table_that_was_saved_is_downloaded_from_the_page(wide, open_page):
    page = open_page(wide)
    rows = saved(page, page.get_by_text("calls.csv"))
    assert rows[1][:3] == ["expert_low", "0.0", "1.5"]


def test_a_term_is_explained_where_it_stands_first(wide, open_page):
    page = open_page(wide, width=390, height=844)
    assert page.locator("abbr.term").all_inner_texts() == ["noise floor", "LPIPS"]
    page.locator("abbr.term").first.click()
    told = page.locator("#means")
    assert "unchanged model" in told.inner_text()
    box = told.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.keyboard.press("Escape")
    assert not told.is_visible()


def test_a_printed_page_opens_what_is_folded_but_code_and_messages_and_cuts_nothing(wide, open_page):
    page = open_page(wide, width=1400)
    until(page, "document.querySelector('.figure').dataset.drawn === 'yes'")
    folded = page.locator("details[open]").count()
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 1000})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.columns[open]").count() == 1
    assert page.locator("details:is(.source, .messages)[open]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.rich:has(table)')).overflowX") == "visible"
    )
    assert page.locator(".figure").bounding_box()["width"] <= 691
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == folded
