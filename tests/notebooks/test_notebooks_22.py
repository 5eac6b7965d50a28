"""22_tensorrt on a machine without a GPU: engines are built, nothing is executed, and it says both."""

from __future__ import annotations

import json

import pytest
import torch

from wanlab import runs
from wanlab.engines.tensorrt.runtime import installed

pytestmark = [
    pytest.mark.notebook,
    pytest.mark.skipif(not installed("tensorrt-rtx"), reason='needs pip install "wanlab[rtx]"'),
]


@pytest.fixture(scope="module")
def done(run_notebook):
    return run_notebook("22_tensorrt")


def test_every_graph_becomes_an_engine(done, outputs):
    engines = {(row["component"], row["numbers"]): row for row in done.values["engines"]}
    assert set(engines) == {
        ("expert_high", "float16"),
        ("vae_decoder", "float16"),
        ("expert_high", "float16, 60 x int8"),
        ("expert_high", "float16, 60 x fp8"),
    }
    for (_, numbers), row in engines.items():
        assert row["compute_capabilities"] == ("8.9, 12.0" if "fp8" in numbers else "8.6, 8.9, 12.0")
        assert row["build_ms"] > 0
        assert row["layers"] > 50
        assert not row["cached"]
    assert " Int8" in engines["expert_high", "float16, 60 x int8"]["datatypes"]
    assert " FP8" in engines["expert_high", "float16, 60 x fp8"]["datatypes"]
    folder = outputs / "tensorrt" / "wan-nano"
    info = json.loads((folder / "expert_high.engine.json").read_text())
    assert info["shapes"]["hidden_states"][1] == [1, 36, 5, 16, 24]
    assert (folder / "expert_high.engine.layers.json").is_file()


def test_the_platforms_notebook_reads_what_was_built(done, outputs):
    folder = next(path.parent for path in outputs.glob("22_tensorrt/*/run.json"))
    assert str(outputs) not in json.dumps(done.values["builds"])
    built, _ = runs.load_results(folder)
    assert {record.state for record in built} == {"built only"}
    found = {(record.work.component, record.dtype, record.machine.name[-4:].strip()) for record in built}
    expected = {
        (row["component"], row["numbers"], target)
        for row in done.values["engines"]
        for target in row["compute_capabilities"].split(", ")
    }
    assert found == expected
    assert len(built) == len(expected) == 11
    sizes = {(row["component"], row["numbers"]): row["size_mib"] for row in done.values["engines"]}
    for record in built:
        assert record.size_bytes / 2**20 == pytest.approx(sizes[record.work.component, record.dtype])
        assert record.work.model == "wan-nano"
        assert done.record["created"] <= record.taken <= done.record["finished"]


def test_what_is_refused_is_named(done):
    refused = done.values["refused"]
    assert {row["capability"] for row in refused} == {"7.5", "8.6"}
    named = [row for row in refused if row["node"]]
    assert {row["component"] for row in named} == {"expert_high", "vae_decoder"}
    assert all("for Turing (SM75)" in row["reason"] for row in named)
    assert {row["capability"] for row in refused if "fp8" in row["numbers"]} == {"7.5", "8.6"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_was_not_executed(done):
    assert all(not row["executed"] for row in done.values["tried"])
    assert all("no GPU is seen here" in row["reason"] for row in done.values["tried"])
    verdict = done.record["verdict"]
    assert verdict.startswith("4 of 4 graphs became engines of TensorRT for RTX")
    assert "none of them could run on this machine" in verdict
    assert "0 of 4 engines were executed here." in done.page.get_text()
    assert len(done.page.select("div.figure[data-figure]")) == 1


def test_a_profile_in_pixels_goes_through_and_engines_are_kept(run_notebook, done):
    sizes = '["96x160", "128x192", "144x250"]'
    more = [
        "-p",
        f"sizes={sizes}",
        "-p",
        "formats=[]",
        "-p",
        'components=["expert_high"]',
        "-p",
        'capabilities=["8.9"]',
    ]
    again = run_notebook("22_tensorrt", *more)
    (engine,) = again.values["engines"]
    assert engine["compute_capabilities"] == "8.9"
    assert "max 144x250 is built as 144x256 pixels: 250 is no multiple of 16" in again.page.get_text()
    kept = run_notebook("22_tensorrt", *more).values["engines"][0]
    assert kept["cached"]
    assert kept["build_ms"] == engine["build_ms"]
