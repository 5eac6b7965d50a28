"""The live view of a trace in Chromium: as a report with its data inside, offline, and how fast it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.browser import drawn
from benchmarks.explorer_speed import (
    FRAME_MS,
    MOVE,
    OPEN_MS,
    REPORT_MB,
    SELECT_MS,
    SMALL,
    VIEW,
    figures,
    write_report,
)
from benchmarks.trace_reading import write_trace
from wanlab import diagnose, plots
from wanlab.pages import render

pytestmark = pytest.mark.browser

BUSY = 4  # times as long: other tests run beside this one


def opened(open_page, page_file, fragment="", **look):
    address = page_file.resolve().as_uri()
    page = open_page(f"{address}{fragment}", allowed=(address,), **look)
    end = time.monotonic() + 120
    while not page.evaluate("!!document.querySelector('[data-explorer]')?.dataset.drawn && !!" + VIEW):
        assert time.monotonic() < end, "not drawn within two minutes"
        page.wait_for_timeout(30)
    return page


@pytest.fixture(scope="module")
def page_file(root, tmp_path_factory) -> Path:
    traces = root / "data" / "traces"
    return write_report(
        tmp_path_factory.mktemp("explorer"),
        traces / "wan2.2-ti2v-5b.pt.trace.json.gz",
        traces / "wan2.2-ti2v-5b-compiled.pt.trace.json.gz",
    )


def test_a_brush_selects_and_everything_follows(open_page, page_file, root):
    page = opened(open_page, page_file, width=1400)
    before = page.locator(".wlx-said").inner_text()
    box = page.locator(".wlx-lanes canvas").bounding_box()
    x, y = box["x"], box["y"] + 60
    page.mouse.move(x + 300, y)
    page.mouse.down()
    page.mouse.move(x + 420, y, steps=5)
    page.mouse.up()
    between = page.evaluate(f"{VIEW}.state.between")
    assert between[0] < between[1]
    assert page.locator(".wlx-said").inner_text() != before
    # What the browser counts is what Python counts.
    trace = diagnose.read_trace(root / "data" / "traces" / "wan2.2-ti2v-5b.pt.trace.json.gz")
    selected = diagnose.explore(trace).select(side="gpu", between=between)
    assert page.evaluate(f"{VIEW}.sums.chosen") == pytest.approx(selected["inside_us"].sum(), rel=1e-6)
    assert page.evaluate(f"{VIEW}.sums.chosenCalls") == len(selected)
    assert page.evaluate(f"{VIEW}.wall.whole") == pytest.approx(between[1] - between[0], abs=0.1)
    assert page.evaluate(f"{VIEW}.sums.nodes[0]") == pytest.approx(selected["inside_us"].sum(), rel=1e-6)

    # A click on a kernel of the table: its calls, shapes and modules.
    page.locator(".wlx-table tbody tr").first.click()
    name = page.evaluate(f"{VIEW}.state.name")
    calls = page.locator(".wlx-calls").inner_text()
    assert name[:40] in calls
    assert f"{len(selected[selected['name'] == name]):,} calls: median" in calls
    assert "launched by" in calls
    # A click on a bar is a category; a chip takes it back.
    page.locator(".wlx-bars button", has_text="linear layers").click()
    assert page.evaluate(f"{VIEW}.state.category") == "linear"
    page.locator(".wlx-chips button", has_text="linear layers").click()
    assert page.evaluate(f"{VIEW}.state.category") is None

    # The address reopens it.
    fragment = page.evaluate("location.hash")
    again = opened(open_page, page_file, fragment)
    assert again.evaluate(f"{VIEW}.state.between") == between
    assert again.evaluate(f"{VIEW}.state.name") == name
    assert again.locator(".wlx-said").inner_text() == page.locator(".wlx-said").inner_text()
    page.locator(".wlx-lanes canvas").focus()
    page.keyboard.press("Escape")
    assert page.locator(".wlx-said").inner_text() == before


def test_keys_zoom_to_a_microsecond_and_move(open_page, page_file):
    page = opened(open_page, page_file)
    canvas = page.locator(".wlx-lanes canvas")
    canvas.focus()
    for _ in range(60):
        page.keyboard.press("w")
    low, high = page.evaluate(f"{VIEW}.view")
    assert high - low == pytest.approx(1.0)
    page.keyboard.press("d")
    assert page.evaluate(f"{VIEW}.view")[0] > low
    page.keyboard.press("0")
    low, high = page.evaluate(f"{VIEW}.view")
    canvas.hover(position={"x": 600, "y": 60})
    page.mouse.wheel(0, -500)
    page.wait_for_timeout(100)
    inner = page.evaluate(f"{VIEW}.view")
    assert low < inner[0] < inner[1] < high


def test_a_click_on_a_module_selects_it_in_all_layers(open_page, page_file):
    page = opened(open_page, page_file)
    place = f"{VIEW}.rows.findIndex(row => row.module)"
    row = page.evaluate(place)
    page.evaluate(
        f"(() => {{ const v = {VIEW}, r = v.rows[{row}], i = 900; v.move(r.start[i], r.end[i]); }})()"
    )
    page.locator(".wlx-lanes canvas").click(position={"x": 700, "y": 20 + 17 * row + 7})
    module = page.evaluate(f"{VIEW}.state.module")
    assert module
    assert page.locator(".wlx-chips button").count() == 1
    inside = page.evaluate(f"{VIEW}.trace.parts[{VIEW}.trace.module[{VIEW}.rows[{row}].ids[900]]]")
    assert inside == module


def test_a_search_is_marked_everywhere(open_page, page_file):
    page = opened(open_page, page_file)
    page.locator(".wlx-bar input").fill("SDPA")
    page.wait_for_timeout(100)
    assert "; found " in page.locator(".wlx-said").inner_text()
    assert page.locator(".wlx-table tr.hit").count() >= 1
    assert page.evaluate(f"{VIEW}.lit.some(x => x) && !{VIEW}.lit.every(x => x)")
    again = opened(open_page, page_file, page.evaluate("location.hash"))
    assert again.locator(".wlx-bar input").input_value() == "SDPA"
    page.locator(".wlx-bar input").fill("no such thing")
    assert "found 0," in page.locator(".wlx-said").inner_text()


def test_what_changed_is_shown_with_a_second_trace(open_page, page_file, root):
    page = opened(open_page, page_file)
    text = page.locator(".wlx-grew").inner_text()
    assert "before (wan2.2-ti2v-5b)" in text
    assert page.locator(".wlx-grew tbody tr").count() > 3


def test_lanes_of_the_second_trace_begin_at_the_same_place_of_the_model(open_page, page_file):
    page = opened(open_page, page_file, width=1400)
    keys = page.evaluate(f"{VIEW}.rows.map(row => [row.key, !!row.second])")
    for name in ("step", "component", "wall clock", "module", "stream 7"):
        assert keys.index([name, True]) == keys.index([name, False]) + 1
    # A module of the decoder is selected: the second trace shows the same module where the selection begins.
    begins = page.evaluate(
        f"""(() => {{
            const view = {VIEW}, name = "vae_decoder.up_blocks.0.resnets.0.conv1", found = [];
            for (const trace of [view.trace, view.other]) {{
                const module = trace.words.module.indexOf(name);
                found.push(Math.min(...trace.start.filter((_, i) => i >= trace.hosts && trace.module[i] === module)));
            }}
            view.set({{ between: [found[0], found[0] + 20000] }});
            return [...found, found[0] + view.shift(), view.aligned.from.length];
        }})()"""
    )
    assert begins[2] == pytest.approx(begins[1])
    assert begins[3] > 50
    assert "the same in the second trace" in page.locator(".wlx-said").inner_text()
    rising = f"{VIEW}.aligned.to.every((moment, i, all) => !i || moment > all[i - 1])"
    assert page.evaluate(rising)
    # A click on a row of the second trace selects by name in both.
    row = keys.index(["stream 7", True])
    hit = page.evaluate(
        f"""(() => {{
            const view = {VIEW}, row = view.rows[{row}], i = 900;
            view.set({{ between: undefined }});
            view.move(row.start[i] - 50, row.end[i] + 50);
            view.click({{ row, i, id: row.ids[i] }});
            return [view.state.name, view.other.words.name[view.other.name[row.ids[i]]]];
        }})()"""
    )
    assert hit[0] == hit[1]


def test_a_bar_of_a_figure_selects_its_work_in_the_view(open_page, root, tmp_path):
    path = root / "data" / "traces" / "wan2.2-ti2v-5b.pt.trace.json.gz"
    trace = diagnose.read_trace(path)
    shares = diagnose.breakdown(trace)
    page = opened(open_page, write_report(tmp_path, path, figures=(plots.category_bars(shares),)), width=1400)
    assert drawn(page)
    longest = page.evaluate(
        """[...document.querySelectorAll(".barlayer .point path")].map(p => p.getBoundingClientRect())
        .sort((a, b) => b.width - a.width).map(({x, y, width, height}) => [x + width / 2, y + height / 2])[0]"""
    )
    page.mouse.click(*longest)
    page.wait_for_function(f"{VIEW}.state.category")
    row = shares.parts.sort_values("time_ms", ascending=False).iloc[0]
    state = page.evaluate(f"{VIEW}.state")
    assert (state["component"], state["category"]) == (row["component"], row["category"])
    assert "explore=" in page.evaluate("location.hash")
    assert page.locator(".wlx-bar").is_visible()
    # The bar is wall clock, which is that of the view's own bars for the same selection.
    place = f"{VIEW}.trace.categories.findIndex(([name]) => name === {VIEW}.state.category)"
    assert page.evaluate(f"{VIEW}.wall.sums[{place}]") / 1e3 == pytest.approx(row["time_ms"], rel=1e-6)


def test_on_a_phone_and_dark_nothing_stands_out(open_page, page_file):
    page = opened(open_page, page_file, width=390, height=844, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ground = page.evaluate(f"{VIEW}.ground & 0xff")
    assert ground < 60


def test_damaged_or_missing_data_leaves_the_text(tmp_path, root, open_page):
    made = write_report(tmp_path, root / "tests" / "fixtures" / "traces" / "cuda_graph.pt.trace.json.gz")
    assert "data-explorer=" in made.read_text()
    (tmp_path / "artifacts" / "explore.explorer.gz").unlink()
    text = render(tmp_path / "explore.ipynb").read_text()
    assert "data-explorer=" not in text


def synthetic(folder: Path, events: int) -> Path:
    write_trace(path := folder / "t.pt.trace.json.gz", events)
    return path


def test_a_report_with_200_000_events_is_small(tmp_path):
    assert write_report(tmp_path, synthetic(tmp_path, SMALL)).stat().st_size <= REPORT_MB * 1e6


@pytest.mark.slow
def test_a_million_events_open_and_move_quickly(tmp_path, open_page):
    page = opened(open_page, write_report(tmp_path, synthetic(tmp_path, 1_000_000)), width=1400)
    found = figures([page.evaluate(MOVE)])
    print(found)
    assert found["open_ms"] <= BUSY * OPEN_MS
    assert found["draw_p95_ms"] <= BUSY * FRAME_MS
    assert found["select_ms"] <= BUSY * SELECT_MS
