from __future__ import annotations

import base64
import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab.core.errors import WanlabError
from wanlab.pages import markup
from wanlab.pages.report import page_of, render
from wanlab.pages.templates import json_script

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
            assert re.match(r"(https?:|mailto:|#)", tag["href"]), tag["href"]
    assert not soup.find_all(["link", "iframe", "object", "embed", "base"])
    assert len(soup.find_all("script")) in (2, 3)
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
        code(HOSTILE, data={markup.PLOTLY: figure}),
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
    bar = {markup.WIDGET: {"model_id": "x"}, "text/plain": "0%|          | 0/10"}
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
    with_figures = page(notebook("# Q?", *[code(data={markup.PLOTLY: figure}) for _ in range(3)]))
    soup = assert_closed(with_figures)
    assert len(soup.select("[data-figure]")) == 3
    assert with_figures.count(get_plotlyjs()[:200]) == 1
    without = page(notebook("# Q?"))
    assert len(without) < 60_000
    assert_closed(without)


def test_clips_and_pictures_stay_inside_and_others_do_not(tmp_path):
    clip = "data:video/mp4;base64," + base64.b64encode(b"clip").decode()
    (tmp_path / "in.png").write_bytes(b"png")
    fragment = (
        f'<div class="wl-clips"><figure><video src="{clip}" autoplay loop muted></video>'
        "<figcaption>A</figcaption></figure>"
        '<img src="https://example.com/a.png"><img src="../../secret.png"><video src="http://example.com/a.mp4"></video>'
        '<img src="data:text/html;base64,AAAA"><script src="https://example.com/x.js">never()</script>'
        "<style>never {}</style></div>"
    )
    text = page(notebook("# Q?", "![local](in.png)", code(data={"text/html": fragment})), root=tmp_path)
    soup = assert_closed(text)
    assert soup.video["src"] == clip
    assert soup.video.has_attr("muted")
    assert soup.find("img", alt="local")["src"].startswith("data:image/png;base64,")
    assert "example.com" not in text
    assert "never" not in text


def test_tables_of_pandas_survive():
    import pandas as pd

    frame = pd.DataFrame({"name": ["<b>x</b>", "y"], "time_ms": [1.5, 2.5]})
    soup = assert_closed(page(notebook("# Q?", code(data={"text/html": frame._repr_html_()}))))
    assert len(soup.select("table.dataframe tbody tr")) == 2
    assert "<b>x</b>" in soup.select_one("table.dataframe").text


def test_long_output_is_folded_and_floods_are_cut():
    short = markup.text("a\nb")
    assert "<details>" not in short
    assert markup.text("\n".join(["x"] * 40)).startswith("<details>")
    flood = markup.text("\n".join(f"line {i}" for i in range(100_000)))
    assert len(flood) < 2 * markup.KEPT_CHARS
    assert "line 0" in flood
    assert "line 99999" in flood
    assert "99600 lines left out" in flood
    assert len(markup.text("x" * 10**7)) < 2 * markup.KEPT_CHARS


def test_progress_bars_show_their_last_state():
    assert "100%" in markup.text("\r 10%|#\r 50%|##\r100%|###\n", quiet=True)
    assert "10%|#" not in markup.text("\r 10%|#\r 50%|##\r100%|###\n").replace("100%|###", "")
    assert markup.text(" \n\n") == ""


@given(st.text())
@settings(max_examples=60)
def test_any_text_is_safe_as_html_markdown_and_json(text):
    for fragment in (markup.sanitise(text, markup.Page()), markup.markdown(text, markup.Page())):
        soup = BeautifulSoup(fragment, "html.parser")
        assert not soup.find_all(["script", "style", "iframe", "link"])
    packed = json_script({"x": text})
    assert "<" not in packed
    assert json.loads(packed) == {"x": text}


def test_a_broken_run_folder_still_gets_a_page(tmp_path):
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "executed.ipynb").write_text("nothing")
    text = render(tmp_path).read_text()
    assert "not JSON" in text
    assert_closed(text)
    with pytest.raises(WanlabError, match="not a run folder"):
        render(tmp_path / "none")


def test_a_saved_notebook_becomes_a_page(tmp_path):
    path = tmp_path / "mine.ipynb"
    nbformat.write(notebook("# Mine?", code("1 + 1", data={"text/plain": "2"})), path)
    assert render(path) == tmp_path / "mine.html"
    assert assert_closed((tmp_path / "mine.html").read_text()).h1.text == "Mine?"
