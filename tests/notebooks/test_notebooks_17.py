"""The explorer's notebook: a fresh capture, and two recorded traces of a large model side by side."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook

SMALL = ("-p", "height=64", "-p", "width=64", "-p", "steps=2")
TABLES = ("longest_gaps", "largest_copies", "far_from_roofline", "steps_differ", "not_fused")


def test_a_fresh_capture_is_explored(shared_run):
    done = shared_run("17_explore", *SMALL)
    assert done.record["verdict"].startswith("Most time is lost in ")
    assert done.page.select_one("header .main [data-explorer]") is not None
    assert {path.stem for path in (done.folder / "artifacts").glob("*.csv")} >= set(TABLES)
    assert (done.folder / "report.html").stat().st_size < 4e6
    assert done.page.select_one("#plotly") is None
    # The data lie beside the notebook, not in it.
    assert (done.folder / "executed.ipynb").stat().st_size < 500_000


def test_two_recorded_traces_side_by_side(run_notebook, root):
    traces = root / "data" / "traces"
    done = run_notebook(
        "17_explore",
        "-p", f"trace={traces / 'wan2.2-ti2v-5b.pt.trace.json.gz'}",
        "-p", f"compare={traces / 'wan2.2-ti2v-5b-compiled.pt.trace.json.gz'}",
    )  # fmt: skip
    assert done.record["verdict"].startswith("Most time is lost in ")
    assert done.record["details"][0].startswith("The trace is of wan2.2-ti2v-5b")
    assert (
        (done.folder / "artifacts" / "changes.csv")
        .read_text()
        .startswith("step,part,before_ms,after_ms,change_ms")
    )
    assert (done.folder / "report.html").stat().st_size < 12e6
