from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from wanlab.runs.tables import table_html


def shown(table: pd.DataFrame) -> list[list[str]]:
    rows = BeautifulSoup(table_html(table), "html.parser").select("tr")
    return [[cell.text.replace("\u00a0", " ") for cell in row.select("th, td")] for row in rows]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "component": ["expert_low", "vae_decoder"],
            "time_ms": [70123.4, 12.0],
            "size_bytes": [10**9, 5 * 10**6],
            "loss_percent": [2.25231e-06, np.nan],
            "fused": [True, False],
            "steps": [3.0, np.nan],
            "where": [{"gpu": 1.0}, None],
            "layer": ["blocks.0.attn1.to_q", "<b>"],
            "error": [None, ""],
        },
        index=[4, 7],
    )


def test_a_table_is_in_words_and_in_units_that_are_read(table):
    head, first, second = shown(table)
    assert head == [
        "component", "time, s", "size, MiB", "loss, %", "fused", "steps", "where", "layer",
    ]  # fmt: skip
    assert first == ["low-noise expert", "70.1", "954", "< 0.001", "yes", "3", "GPU 1", "blocks.0.attn1.to_q"]
    assert second == ["VAE decoder", "0.012", "4.77", "–", "no", "–", "", "<b>"]


def test_names_from_code_are_code_and_figures_stand_right(table):
    soup = BeautifulSoup(table_html(table), "html.parser")
    assert [code.text for code in soup.select("code")] == ["blocks.0.attn1.to_q", "<b>"]
    right = [head.text for head in soup.select("thead th") if not head.get("class")]
    assert right == ["time, s", "size, MiB", "loss, %", "steps"]


def test_a_turned_table_has_the_unit_of_each_row(table):
    turned = table[["time_ms", "size_bytes", "loss_percent", "steps"]].T.rename_axis("what")
    turned.columns = ["before", "after"]
    assert shown(turned) == [
        ["what", "before", "after"],
        ["time, ms", "70,123", "12"],
        ["size", "954 MiB", "4.77 MiB"],
        ["loss, %", "< 0.001", ""],
        ["steps", "3", ""],
    ]


def test_a_warning_of_a_wide_table_stands_behind_the_names_of_the_row():
    wide = pd.DataFrame(
        {"engine": ["a", "b"], **{f"n{i}": [i, i] for i in range(9)}, "warning": ["", "noisy"]}
    )
    assert shown(wide)[0][:3] == ["engine", "warning", "n0"]


def test_long_tables_lose_their_middle_and_say_how_long_they_are():
    html = table_html(pd.DataFrame({"n": range(500)}))
    assert "500 rows" in html
    assert html.count("<tr>") == 1 + pd.get_option("display.max_rows") + 1


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame(),
        pd.DataFrame({"a": []}),
        pd.DataFrame({("a", "x"): [1.5], ("a", "y"): [2]}),
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame({"a": [1, 2]}, index=pd.MultiIndex.from_tuples([("x", 1), ("y", 2)])),
        pd.DataFrame({1: [np.float32(1.5), np.nan], "t": [pd.NaT, pd.Timestamp(0)]}),
        pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": pd.Categorical(["x", None])}),
    ],
)
def test_any_table_is_drawn(table):
    text = table_html(table)
    assert "nan" not in text.lower()
    assert "NaT" not in text
    BeautifulSoup(text, "html.parser")


@pytest.mark.parametrize(
    "name",
    [
        "void <128, 4, <(at::TensorIteratorBase&)::{lambda()#3}::operator()() const>>",
        "blocks.0.attn1.to_q",
        "condition_embedder.time_embedder.linear_1 (Gemm)",
        "blocks.*.attn1.to_q, blocks.*.attn1.to_k",
    ],
)
def test_no_name_of_code_is_left_among_the_words(name):
    page = BeautifulSoup(table_html(pd.DataFrame({"layer": [name], "time_ms": [1.5]})), "html.parser")
    cell = page.select_one("td, tbody th")
    for code in cell.select("code"):
        code.extract()
    assert not re.search(r"\w_\w|::|[{}]", cell.get_text())
