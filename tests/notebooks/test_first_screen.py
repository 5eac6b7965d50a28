"""The first screen of a report of every notebook: the answer, how sure it is, key figures, and what to do next."""

from __future__ import annotations

import pytest
from bs4 import BeautifulSoup
from support.contract import unreadable

SMALL = ("-p", "height=64", "-p", "width=64", "-p", "steps=2")
FIRST_SCREENS: dict[str, tuple[str, ...]] = {
    "00_quickstart": (),
    "10_baseline": (),
    "11_flame_graph": (),
    "12_experts": ("-p", "cases=1", "-p", "boundaries=[1.0]"),
    "13_attention": (),
    "14_memory": SMALL,
    "15_triage": (),
    "17_explore": SMALL,
    "43_ladder": (),
    "44_caches": (),
    "45_sparse": (),
    "46_budget": (),
    "50_before_after": (),
    "70_serving": (),
}
"""Notebook -> parameters that differ from its own, where those take long."""


@pytest.mark.notebook
@pytest.mark.parametrize("name", FIRST_SCREENS)
def test_the_first_screen_has_the_answer_in_plain_words(shared_run, name):
    done = shared_run(name, *FIRST_SCREENS[name])
    assert unreadable(done.record, done.page) == []


TILES = '<dl class="tiles">{}</dl>'.format("<div><dt>time</dt><dd>1 s</dd></div>" * 3)
GOOD = f"<header>{TILES}<div class='main'></div></header>"
NEXT = {"why": "Ranks what to change.", "command": "wanlab run 15_triage"}


@pytest.mark.parametrize(
    ("headline", "page", "details", "said"),
    [
        ("x" * 240 + ".", GOOD, [], "241 characters"),
        ("It is fast", GOOD, [], "no sentence"),
        ("The expert_low takes 3 s.", GOOD, [], "a name of code in the headline: expert_low"),
        ("They differ by 4.7e-05 %.", GOOD, [], "scientific notation in the headline: 4.7e-0"),
        ("Recorded in switch.json.", GOOD, [], "a name of a file"),
        ("A/A noise is 3 %.", GOOD, [], "a word of this project in the headline: A/A"),
        ("It takes nan s.", GOOD, [], "a value that is not known"),
        ("Yes.", GOOD, ["a"] * 4, "4 details, 3 at most"),
        ("Yes.", "<header><div class='main'></div></header>", [], "0 key figures"),
        ("Yes.", GOOD.replace("class='main'", ""), [], "0 main outputs"),
    ],
)
def test_what_a_reader_cannot_use_is_found(headline, page, details, said):
    record = {"verdict": headline, "details": details, "next": NEXT}
    (found,) = unreadable(record, BeautifulSoup(page, "html.parser"))
    assert said in found


def test_a_first_screen_says_what_to_do_next():
    assert unreadable({"verdict": "Yes."}, BeautifulSoup(GOOD, "html.parser")) == [
        "nothing says what to do next"
    ]


def test_a_readable_first_screen_is_not_complained_of():
    load = " Timed while other work took 3 of 2 cores: run it again on an idle machine."
    record = {"verdict": "Yes: 2.00 times as fast." + load * 3, "details": ["a"] * 3, "next": NEXT}
    assert unreadable(record, BeautifulSoup(GOOD, "html.parser")) == []
