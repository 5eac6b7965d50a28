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
    "50_before_after": (),
}
"""Notebook -> parameters that differ from its own, where those take long."""


@pytest.mark.notebook
@pytest.mark.parametrize("name", FIRST_SCREENS)
def test_the_first_screen_has_the_answer_in_plain_words(shared_run, name):
    done = shared_run(name, *FIRST_SCREENS[name])
    assert unreadable(done.record, done.page) == []


TILES = '<dl class="tiles">{}</dl>'.format("<div><dt>time</dt><dd>1 s</dd></div>" * 3)
GOOD = f"<header>{TILES}<div class='main'></div></header>"
DETAILS = ["Next: 15_triage ranks what to change."]


@pytest.mark.parametrize(
    ("headline", "page", "details", "said"),
    [
        ("x" * 240 + ".", GOOD, DETAILS, "241 characters"),
        ("It is fast", GOOD, DETAILS, "no sentence"),
        ("The expert_low takes 3 s.", GOOD, DETAILS, "a name of code in the headline: expert_low"),
        ("They differ by 4.7e-05 %.", GOOD, DETAILS, "scientific notation in the headline: 4.7e-0"),
        ("Recorded in switch.json.", GOOD, DETAILS, "a name of a file"),
        ("A/A noise is 3 %.", GOOD, DETAILS, "a word of this project in the headline: A/A"),
        ("It takes nan s.", GOOD, DETAILS, "a value that is not known"),
        ("Yes.", GOOD, ["a"] * 4 + DETAILS, "5 details, 4 at most"),
        ("Yes.", GOOD, ["Because."], "no detail says what to do next"),
        ("Yes.", "<header><div class='main'></div></header>", DETAILS, "0 key figures"),
        ("Yes.", GOOD.replace("class='main'", ""), DETAILS, "0 main outputs"),
    ],
)
def test_what_a_reader_cannot_use_is_found(headline, page, details, said):
    record = {"verdict": headline, "details": details}
    (found,) = unreadable(record, BeautifulSoup(page, "html.parser"))
    assert said in found


def test_a_readable_first_screen_is_not_complained_of():
    load = " Timed while other work took 3 of 2 cores: an idle machine gives other times."
    record = {"verdict": "Yes: 2.00 times as fast." + load * 3, "details": [*["a"] * 3, *DETAILS]}
    assert unreadable(record, BeautifulSoup(GOOD, "html.parser")) == []
