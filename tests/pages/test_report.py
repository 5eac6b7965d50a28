from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab.core.errors import WanlabError, clean
from wanlab.pages import report
from wanlab.pages.report import page_of, render
from wanlab.pages.templates import glossary, glossary_markdown, json_script
from wanlab.runs.result import Quality, Result, Work

HOSTILE = (
    '</script><script>alert(1)</script><img src=x onerror="alert(2)"><a href="javascript:alert(3)">x</a>'
)
v4 = nbformat.v4


def notebook(*cells):
    return v4.new_notebook(cells=[c if not isinstance(c, str) else v4.new_markdown_cell(c) for c in cells])


def code(source="x", **data):
    outputs = [
        v4.new_output("display_data", data={kind: value}) for kind, value in data.get("data", {}).items()
    ]
    return v4.new_code_cell(source, outputs=outputs + data.get("outputs", []))


def page(nb, record=None, status=None, root=None):
    return page_of(nb, record or {}, status or {}, root, "name")


def assert_closed(text: str) -> BeautifulSoup:
    """Nothing in the page is fetched, and the only scripts are ours."""
    soup = BeautifulSoup(text, "html.parser")
    for tag in soup.find_all(True):
        for name in ("src", "poster", "data", "srcset", "action"):
            if tag.has_attr(name):
                assert tag[name].startswith("data:") or tag[name] == "", (tag.name, tag[name][:80])
        assert not [name for name in tag.attrs if name.startswith("on")]
        if tag.has_attr("href"):
            assert re.match(r"(https?:|mailto:|#|data:text/csv;)", tag["href"]), tag["href"]
    assert not soup.find_all(["link", "iframe", "object", "embed", "base"])
    assert len(soup.find_all("script")) in (3, 4)
    for style in soup.find_all("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text
    return soup


def test_title_lead_verdict_and_parameters_come_first():
    record = {
        "verdict": "2.8x faster.",
        "notebook": "notebooks/a b.ipynb",
        "schema": [
            {"name": "steps", "type": "int", "help": "denoising steps", "default": 10, "value": 4},
            {"name": "prompt", "type": "str", "help": "", "default": "it's", "value": "it's"},
        ],
    }
    soup = assert_closed(
        page(notebook("# Why?\n\nBecause.", "## More"), record, {"state": "finished", "seconds": 75})
    )
    assert soup.h1.text == "Why?"
    assert soup.title.text == "Why?"
    assert soup.select_one(".verdict").text == "2.8x faster."
    assert soup.select_one(".lead").text.strip() == "Because."
    assert "default 10" in soup.select_one("tr.changed").text
    assert len(soup.select("tr.changed")) == 1
    assert soup.select_one(".command").text == "wanlab run 'notebooks/a b.ipynb' -p steps=4"
    assert "1 min 15 s" in soup.select_one(".facts").text
    assert not soup.select(".failure")


def test_failure_stands_before_everything_else():
    failed = code(
        "boom()", outputs=[v4.new_output("error", ename="E", evalue="v", traceback=["\x1b[31mE\x1b[0m: v"])]
    )
    failed.metadata["papermill"] = {"status": "failed"}
    status = {"state": "failed", "title": "Step", "reason": "E: v", "traceback": "\x1b[31mE\x1b[0m: v"}
    text = page(notebook("# Q?", failed), {"verdict": "none"}, status)
    soup = assert_closed(text)
    assert soup.select_one(".failure .reason").text == "E: v"
    assert "\x1b" not in text
    assert text.index('class="failure"') < text.index('class="verdict"')
    assert soup.select_one("#failed-cell details.source").has_attr("open")


def test_a_failure_in_a_hidden_cell_is_not_linked():
    failed = code("steps = 1 / 0")
    failed.metadata["papermill"] = {"status": "failed"}
    status = {"state": "failed", "reason": "E: v"}
    assert "#failed-cell" in page(notebook("# Q?", failed), {}, status)
    failed.metadata["tags"] = ["injected-parameters"]
    assert "#failed-cell" not in page(notebook("# Q?", failed), {}, status)


def test_environment_is_folded_and_summed_up():
    environment = {
        "gpu": {"name": "A GPU", "memory_gib": 80.0, "clocks": None},
        "cpu": "A CPU",
        "packages": {"torch": "2.11"},
        "backends": ["eager", "onnxruntime"],
        "threads": 0,
    }
    soup = assert_closed(page(notebook("# Q?"), {"environment": environment}))
    panel = soup.select_one("details.panel")
    assert not panel.has_attr("open")
    assert panel.select_one(".aside").text == "A GPU · A CPU · torch 2.11"
    rows = {row.th.text: row.td.text for row in panel.select("tr")}
    assert rows == {
        "gpu name": "A GPU",
        "gpu memory gib": "80.0",
        "cpu": "A CPU",
        "packages torch": "2.11",
        "backends": "eager, onnxruntime",
        "threads": "0",
    }


def test_cells_say_how_long_they_took_and_hidden_ones_are_left_out():
    slow, waiting, hidden = code("slow()"), code("waiting()"), code("hidden()")
    slow.metadata["papermill"] = {"status": "completed", "duration": 12.34}
    waiting.metadata["papermill"] = {"status": "pending"}
    hidden.metadata["tags"] = ["hide"]
    soup = assert_closed(page(notebook("text", "# Later", slow, waiting, hidden, v4.new_raw_cell("raw"))))
    labels = [summary.text for summary in soup.select(".source summary")]
    assert labels == ["code · 12.3 s", "code · not run"]
    assert soup.h1.text == "name"  # the first text is no heading
    assert len(soup.select(".prose")) == 2


def test_pieces_of_one_stream_are_one_text():
    pieces = [("stdout", "a"), ("stdout", "b\n"), ("stderr", "warned"), ("stdout", "c")]
    outputs = [v4.new_output("stream", name=name, text=text) for name, text in pieces]
    soup = assert_closed(page(notebook("# Q?", code(outputs=outputs))))
    assert [pre.text for pre in soup.select("pre.text")] == ["ab", "warned", "c"]
    assert soup.select_one("details:not(.source) summary").text == "messages, 1 line"


def test_outputs_of_odd_fields_are_no_error():
    fields = [
        {},
        {"output_type": "stream", "name": "stdout"},
        {"output_type": "error", "traceback": [["a"], "b"]},
    ]
    outputs = [nbformat.NotebookNode(each) for each in fields]
    shown = notebook("# Q?", code())
    shown.cells[1].outputs = outputs  # nbformat refuses to make such, and reads such
    assert_closed(page(shown))


def test_hostile_strings_are_text_everywhere():
    record = {
        "verdict": HOSTILE,
        "notebook": HOSTILE,
        "run_id": HOSTILE,
        "schema": [
            {"name": HOSTILE, "type": HOSTILE, "help": HOSTILE, "default": HOSTILE, "value": HOSTILE + "2"}
        ],
        "environment": {HOSTILE: HOSTILE, "git": {HOSTILE: [HOSTILE]}},
    }
    status = {
        "state": "failed",
        "title": HOSTILE,
        "reason": HOSTILE,
        "traceback": HOSTILE,
        "started": HOSTILE,
    }
    figure = {"data": [{"type": "bar", "name": HOSTILE}], "layout": {"title": {"text": HOSTILE}}}
    nb = notebook(
        f"# {HOSTILE}\n\n{HOSTILE}",
        HOSTILE,
        code(HOSTILE, data={"text/html": HOSTILE, "text/plain": HOSTILE}),
        code(HOSTILE, data={report.PLOTLY: figure}),
        code(HOSTILE, data={"text/markdown": HOSTILE}),
        code(HOSTILE, data={"image/svg+xml": f"<svg onload='x'>{HOSTILE}</svg>"}),
        code(HOSTILE, outputs=[v4.new_output("stream", name="stdout", text=HOSTILE)]),
    )
    text = page(nb, record, status)
    soup = assert_closed(text)
    assert soup.select_one(".verdict").text == HOSTILE
    assert HOSTILE not in text
    payload = json.loads(soup.select_one("#figures").string)
    assert payload[0]["data"][0]["name"] == HOSTILE
    assert "<script>alert" not in text.replace(soup.select_one("#plotly").string, "")


@pytest.mark.parametrize(
    ("state", "words"),
    [("memory", "Ran out of memory"), ("flooded", "Too much output"), ("died", "Kernel died")],
)
def test_ends_are_said_in_words(state, words):
    soup = assert_closed(page(notebook("# Q?"), {}, {"state": state, "reason": "why", "title": "Step"}))
    assert soup.select_one(".failure .what").text.strip() == f"{words} in “Step”"
    assert soup.select_one(f".state.{state}").text == words.lower()


def test_widgets_show_nothing():
    bar = {report.WIDGET: {"model_id": "x"}, "text/plain": "0%|          | 0/10"}
    soup = assert_closed(
        page(
            notebook(
                "# Q?",
                code(data=bar),
                v4.new_code_cell("y", outputs=[v4.new_output("display_data", data=bar)]),
            )
        )
    )
    assert "0/10" not in soup.select("section.cell")[-1].text


def test_plotly_is_inside_once_and_only_when_needed():
    from plotly.offline import get_plotlyjs

    figure = {"data": [], "layout": {"height": 300}}
    with_figures = page(notebook("# Q?", *[code(data={report.PLOTLY: figure}) for _ in range(3)]))
    soup = assert_closed(with_figures)
    assert len(soup.select("[data-figure]")) == 3
    assert with_figures.count(get_plotlyjs()[:200]) == 1
    without = page(notebook("# Q?"))
    assert len(without) < 80_000
    assert_closed(without)


def test_clips_and_pictures_stay_inside_and_others_do_not(tmp_path):
    clip = "data:video/mp4;base64," + base64.b64encode(b"clip").decode()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "in.png").write_bytes(b"png")
    (folder / "notes.txt").write_bytes(b"secret")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    fragment = (
        f'<div class="wl-clips"><figure><video src="{clip}" autoplay loop muted></video>'
        "<figcaption>A</figcaption></figure>"
        '<img src="https://example.com/a.png"><img src="//example.com/a.png"><img src="../secret.png">'
        '<img src="link.png"><img src="notes.txt"><img src="file:///etc/passwd">'
        f'<img src="{tmp_path}/secret.png"><video src="http://example.com/a.mp4"></video>'
        '<video poster="https://example.com/a.png"></video><img srcset="https://example.com/a.png 2x">'
        '<img src="data:text/html;base64,AAAA"><script src="https://example.com/x.js">never()</script>'
        "<style>never {}</style></div>"
    )
    text = page(notebook("# Q?", "![local](in.png)", code(data={"text/html": fragment})), root=folder)
    soup = assert_closed(text)
    assert soup.video["src"] == clip
    assert soup.video.has_attr("muted")
    assert soup.find("img", alt="local")["src"] == "data:image/png;base64,cG5n"
    assert len(soup.select("img[src], video[src]")) == 2
    assert "video:not([src]) { display: none; }" in soup.style.text
    assert "example.com" not in text
    assert "never" not in text


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "source", ["a\0.png", "x" * 5000 + ".png", "http://[::1.png", "\ud800.png", ".", "%00.png"]
)
def test_a_picture_whose_name_is_no_file_is_left_out(source, tmp_path):
    # What is raised inside nh3 is printed and lost, so nothing may be.
    assert report.sanitise(f'<img src="{source}" alt="a">', report.Page(tmp_path)) == '<img alt="a">'


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        # attributes: those that look or act are taken off, and ids, by which the page finds its own parts
        ('<p style="position:fixed;background:url(//a)" class="c">x</p>', '<p class="c">x</p>'),
        ('<p id="figures" name="n" data-figure="0" contenteditable hidden>x</p>', "<p>x</p>"),
        ('<p onclick="a()" ONMOUSEOVER=a() on\nload=a()>x</p>', "<p>x</p>"),
        ('<p title="&quot;><script>a()</script>">x</p>', None),
        ('<a href="https://a" target="_blank" ping="https://b" download>x</a>', '<a href="https://a">x</a>'),
        ('<td colspan="2">x', "x"),
        (
            '<table><tr><td colspan="2" bgcolor="red">x',
            '<table><tbody><tr><td colspan="2">x</td></tr></tbody></table>',
        ),
        # links
        *[
            (f'<a href="{link}">x</a>', f'<a href="{link}">x</a>')
            for link in ("https://a/?b=c#d", "mailto:a@b.c", "#a")
        ],
        ('<a href="HTTP://a">x</a>', '<a href="HTTP://a">x</a>'),
        *[
            (f'<a href="{link}">x</a>', "<a>x</a>")
            for link in (
                "javascript:a()",
                "JaVaScRiPt:a()",
                "java\nscript:a()",
                "&#106;avascript:a()",
                " javascript:a()",
                "\x01javascript:a()",
                "vbscript:a()",
                "file:///etc/passwd",
                "blob:https://a/b",
                "wanlab:a",
                "data:text/html;base64,AAAA",
                "data:image/png;base64,AAAA",
                "//example.com",
                "other.html",
            )
        ],
        # data URLs of media
        ('<img src="data:image/png;base64,AAAA">', '<img src="data:image/png;base64,AAAA">'),
        ('<img src="data:image/svg+xml;base64,AAAA">', '<img src="data:image/svg+xml;base64,AAAA">'),
        ('<img src="data:image/svg+xml,<svg onload=a()>">', "<img>"),
        ('<img src="data:image/png;base64,AA AA;x">', "<img>"),
        ('<img src="data:,x" alt="a">', '<img alt="a">'),
        # tags: some go with what they hold, of unknown ones the text stays
        ("<svg><circle/><text>x</text><script>a()</script></svg>y", "y"),
        ('<math><mi xlink:href="javascript:a()">x</mi></math>y', "y"),
        ("<script>a()</script><style>p {}</style><template><p>x</p></template>y", "y"),
        ('<iframe srcdoc="<p>x</p>">x</iframe><object data="a">x</object><embed src="a">y', "y"),
        ('<link rel="stylesheet" href="a"><meta http-equiv="refresh" content="0"><base href="//a">y', "y"),
        ('<form action="//a"><input name="a"><button formaction="//a">x</button></form>', "x"),
        ("<x-y onclick=a()>x</x-y><!-- <p>z</p> -->", "x"),
        # pieces that a browser would repair stay within their own output
        ("</div></section></main></details><b>x", "<b>x</b>"),
        ("<scr<script>ipt>a()</script>x", None),
        ('<noscript><p title="</noscript><img src=x onerror=a()>">', None),
        (
            '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=a()&gt;">',
            None,
        ),
        ('<svg></p><style><a id="</style><img src=1 onerror=a()>">', None),
        ("<textarea><img src=x onerror=a()></textarea><xmp><img src=x onerror=a()></xmp>", None),
        ("a\ud800b", "a\N{REPLACEMENT CHARACTER}b"),
    ],
)
def test_html_of_a_notebook_keeps_what_is_allowed(given, kept):
    clean = report.sanitise(given, report.Page())
    assert kept is None or clean == kept
    soup = BeautifulSoup(clean, "html.parser")
    assert {tag.name for tag in soup.find_all(True)} <= report.TAGS
    assert {name for tag in soup.find_all(True) for name in tag.attrs} <= {
        "class",
        "title",
        "colspan",
        "href",
        "src",
        "alt",
    }
    assert report.sanitise(clean, report.Page()) == clean


def test_tables_of_pandas_survive():
    import pandas as pd

    frame = pd.DataFrame({"name": ["<b>x</b>", "y"], "time_ms": [1.5, 2.5]})
    soup = assert_closed(page(notebook("# Q?", code(data={"text/html": frame._repr_html_()}))))
    assert len(soup.select("table.dataframe tbody tr")) == 2
    assert "<b>x</b>" in soup.select_one("table.dataframe").text


def test_long_output_is_folded_and_floods_are_cut():
    short = report.text_html("a\nb")
    assert "<details>" not in short
    assert report.text_html("\n".join(["x"] * 40)).startswith("<details>")
    flood = report.text_html("\n".join(f"line {i}" for i in range(100_000)))
    assert len(flood) < 2 * report.MOST_CHARS
    assert "line 0" in flood
    assert "line 99999" in flood
    assert "99600 lines left out" in flood
    assert len(report.text_html("x" * 10**7)) < 2 * report.MOST_CHARS


@pytest.mark.parametrize(
    "bar",
    [
        "bench:  93%|█████████▎| 37/40 [00:37<00:03,  1.01s/s]",
        "held-out cases: 100%|██████████| 3/3 [00:12<00:00,  4.1s/case]",
        "reading: 17it [00:01, 12.3it/s]",
        "Downloading:   3%|▎         | 1.2k/40.1k [00:00<00:03, 10.1kB/s]",
    ],
)
def test_messages_that_are_a_progress_bar_are_not_shown(bar):
    assert report.text_html(f"{bar}\n", quiet=True) == ""
    assert "a warning" in report.text_html(f"\r{bar}\na warning\n", quiet=True)
    assert "messages, 1 line" in report.text_html(f"{bar}\na warning\n", quiet=True)


def test_progress_bars_show_their_last_state():
    assert "100%" in report.text_html("\r 10%|#\r 50%|##\r100%|###\n", quiet=True)
    assert "10%|#" not in report.text_html("\r 10%|#\r 50%|##\r100%|###\n").replace("100%|###", "")
    assert report.text_html(" \n\n") == ""


@pytest.mark.parametrize("kind", [*report.IMAGES, "image/svg+xml"])
def test_a_picture_is_base64_and_nothing_more(kind):
    text = '"onerror="alert(1)"><p>' if kind in report.IMAGES else '<svg onload="alert(1)"/>'
    soup = assert_closed(page(notebook("# Q?", code(data={kind: text}))))
    assert "onerror" not in str(soup.select_one("section.cell img"))
    wrapped = code(data={kind: "AA\nAA\n"})  # as Jupyter writes it
    assert assert_closed(page(notebook("# Q?", wrapped))).img["src"].startswith(f"data:{kind};base64,")


@given(st.text())
@settings(max_examples=60)
def test_any_text_is_safe_as_html_markdown_and_json(text):
    beside = report.Page(Path(__file__).parent)
    picture = f'<img src="{html.escape(text)}">'
    for fragment in (
        report.sanitise(text, report.Page()),
        report.markdown_html(text, report.Page()),
        report.sanitise(picture, beside),
    ):
        soup = BeautifulSoup(fragment, "html.parser")
        assert not soup.find_all(["script", "style", "iframe", "link"])
    packed = json_script({"x": text})
    assert "<" not in packed
    assert json.loads(packed) == {"x": clean(text)}


def test_a_broken_run_folder_still_gets_a_page(tmp_path):
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "executed.ipynb").write_text("nothing")
    text = render(tmp_path).read_text()
    assert "not JSON" in text
    assert_closed(text)
    with pytest.raises(WanlabError, match="not a run folder"):
        render(tmp_path / "none")


def test_a_page_that_cannot_be_drawn_says_how_the_run_ended(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"schema": [{}]}))
    (tmp_path / "status.json").write_text(json.dumps({"state": "died"}))
    text = render(tmp_path).read_text()
    assert "<h1>Run died</h1>" in text
    assert "KeyError" in text


def test_a_saved_notebook_becomes_a_page(tmp_path):
    path = tmp_path / "mine.ipynb"
    nbformat.write(notebook("# Mine?", code("1 + 1", data={"text/plain": "2"})), path)
    assert render(path) == tmp_path / "mine.html"
    assert assert_closed((tmp_path / "mine.html").read_text()).h1.text == "Mine?"


def test_details_and_a_runs_own_key_figures_stand_below_the_verdict_five_at_most():
    tiles = [{"title": f"figure {n}", "value": f"{n} ms", "change": ""} for n in range(7)]
    record = {"verdict": "Yes.", "details": ["Because of <b>."], "tiles": tiles}
    soup = assert_closed(page(notebook("# Q?", "## Part"), record, {"state": "finished"}))
    assert [each.text for each in soup.select(".verdict, .detail")] == ["Yes.", "Because of <b>."]
    assert [each.text for each in soup.select(".tiles dt")] == [f"figure {n}" for n in range(5)]


def test_key_figures_and_the_main_output_stand_below_the_verdict():
    work = Work(model="wan-nano", height=64, width=64, frames=5, steps=4)
    eager = Result(
        work=work, engine="eager", samples_ms=(100.0, 101.0, 99.0), noise_percent=1.0, peak_memory_gib=2.0
    )
    quality = Quality(
        quality_loss_percent=0.5,
        quality_loss_low_percent=-0.25,
        quality_loss_high_percent=1.0,
        psnr_db=float("inf"),
    )
    fast = Result(
        work=work,
        engine="onnxruntime",
        samples_ms=(50.0, 51.0, 49.0),
        noise_percent=1.0,
        peak_memory_gib=2.5,
        quality=quality,
    )
    cell = code("plot()", data={"text/plain": "the main output"})
    cell.metadata["tags"] = ["main"]
    text = page_of(
        notebook("# Q?", "## Part", cell), {"verdict": "Yes."}, {}, None, "n", results=(fast, eager)
    )
    soup = assert_closed(text)
    tiles = [[part.text for part in tile.find_all(["dt", "dd"])] for tile in soup.select(".tiles > div")]
    assert tiles == [
        ["time per video", "50 ms", "2.00× faster than eager's 100 ms"],
        ["peak memory", "2.5 GiB", "1.25× more than eager's 2 GiB"],
        ["quality loss", "+0.50 %", "95 % interval -0.25 to +1.00"],
        ["PSNR to the original", "identical"],
        ["time per frame", "10 ms", "2.00× faster than eager's 20 ms"],
    ]
    assert text.index('class="verdict"') < text.index('class="tiles"') < text.index("the main output")
    assert text.index("the main output") < text.index("Part")
    assert text.count("the main output") == 1
    alone = page_of(notebook("# Q?"), {}, {}, None, "n", results=(eager,))
    assert "noise 1.0 %" in alone


def test_what_cannot_be_told_from_noise_is_said_in_its_tile():
    rows = [
        Result(work=Work(model="m"), engine=engine, samples_ms=(ms, ms + 1, ms - 1), noise_percent=9.0)
        for engine, ms in (("compiled", 99.0), ("eager", 100.0))
    ]
    text = page_of(notebook("# Q?"), {}, {}, None, "n", results=rows)
    assert "no difference from eager&#39;s 100 ms can be told from noise" in text


def test_heads_of_tables_are_words_with_units():
    head = "<thead><tr><th>peak_memory_gib</th><th>psnr_db</th></tr></thead>"
    table = f'<table class="dataframe">{head}<tbody><tr><th>expert_high</th></tr></tbody></table>'
    soup = assert_closed(page(notebook("# Q?", code(data={"text/html": table}))))
    assert [head.text for head in soup.select("th")] == [
        "peak memory, GiB",
        "PSNR, dB",
        "high-noise expert",
    ]


def test_the_table_that_a_cell_saved_lies_in_the_page_with_its_own_numbers(tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "calls.csv").write_text("time_ms\n2.25231e-06\n")
    cell = code(
        'run.save_table("calls", calls)\nrun.table("none", nothing)', data={"text/html": "<p>shown</p>"}
    )
    soup = assert_closed(page_of(notebook("# Q?", cell), {}, {}, tmp_path, "n"))
    (link,) = soup.select("a[download]")
    assert link["download"] == "calls.csv"
    assert base64.b64decode(link["href"].partition(",")[2]).decode() == "time_ms\n2.25231e-06\n"


def test_the_glossary_of_pages_is_the_one_of_the_docs(root):
    assert glossary_markdown() in (root / "docs" / "glossary.md").read_text("utf-8")
    terms = [word.lower() for each in glossary() for word in (each["term"], *each["also"])]
    assert len(terms) == len(set(terms))
    assert json.dumps(glossary()[0]["means"]) in page(notebook("# Q?"))
