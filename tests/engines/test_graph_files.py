"""Graphs are used again and opened only as what they are: their whole content, their own component, its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from support import convert_tiny as tiny

from wanlab import engines, export
from wanlab.core.errors import WanlabError
from wanlab.engines.onnxruntime import load_engines
from wanlab.export.export import ExportReport

pytestmark = pytest.mark.slow
EXPERTS = ("expert_high", "expert_low")
SETTINGS = dict(dynamic=False, height=64, width=96, frames=9, external_data=True)


@pytest.fixture(scope="module")
def model():
    return tiny.bare(tiny.pipeline())


@pytest.fixture(scope="module")
def graphs(exported, model):
    return Path(exported(model, EXPERTS, **SETTINGS)[0].path).parent


@pytest.fixture
def folder(graphs, tmp_path):
    return shutil.copytree(graphs, tmp_path / "graphs")


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def weights_of(folder, component):
    return next(folder.glob(f"{component}.*.weights"))


def test_unchanged_graphs_are_used_again_and_opened(model, folder):
    assert all(r.cached for r in export.export_all(model, folder, EXPERTS, progress=False, **SETTINGS))
    changed = engines.use(model, load_engines(folder, provider="cpu", threads=1))
    assert changed.engines["expert_low"] == "onnxruntime-cpu"


@pytest.mark.parametrize("which", ["graph", "weights"])
def test_a_changed_byte_is_noticed_at_the_same_size(model, folder, which):
    path = folder / "expert_low.onnx" if which == "graph" else weights_of(folder, "expert_low")
    before = path.read_bytes()
    at = before.index(b"wanlab_version") - 8 if which == "graph" else -1
    flip(path, at)
    with pytest.raises(WanlabError, match=r"expert_low.onnx is not what was exported"):
        load_engines(folder, provider="cpu")
    high, low = export.export_all(model, folder, EXPERTS, progress=False, **SETTINGS)
    assert (high.cached, low.cached) == (True, False)
    assert path.read_bytes() == before
    load_engines(folder, provider="cpu", threads=1)


def test_weights_of_the_other_expert_are_noticed(folder):
    high, low = (weights_of(folder, name) for name in EXPERTS)
    data = high.read_bytes()
    high.write_bytes(low.read_bytes())
    low.write_bytes(data)
    with pytest.raises(WanlabError, match=r"expert_high.onnx is not what was exported"):
        load_engines(folder, provider="cpu")


def swap(folder):
    """Exchange the graphs of the experts, with their reports."""
    for ending in (".onnx", ".json"):
        high, low = (folder / f"{name}{ending}" for name in EXPERTS)
        high.rename(folder / "other")
        low.rename(high)
        (folder / "other").rename(low)


def test_exchanged_graphs_of_the_experts_are_noticed(folder):
    swap(folder)
    with pytest.raises(WanlabError, match=r"expert_high.onnx was exported from expert_low"):
        load_engines(folder, provider="cpu")


def test_a_graph_that_claims_to_be_the_other_expert_is_told_by_its_weights(model, folder):
    swap(folder)
    for name in EXPERTS:
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for entry in graph.metadata_props:
            entry.value = name if entry.key == "component" else entry.value
        onnx.save(graph, folder / f"{name}.onnx")
        ExportReport.file(folder / f"{name}.onnx").unlink()
    with pytest.raises(
        WanlabError, match=r"says that it is expert_high, and its weight \S+ is not that of the model"
    ):
        engines.use(model, load_engines(folder, provider="cpu", threads=1))


def test_a_graph_without_a_report_is_opened(model, folder):
    for name in EXPERTS:
        ExportReport.file(folder / f"{name}.onnx").unlink()
    engines.use(model, load_engines(folder, provider="cpu", threads=1))


def test_an_edited_report_is_refused(folder):
    path = ExportReport.file(folder / "expert_high.onnx")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size_bytes": 1}))
    with pytest.raises(WanlabError, match="changed after it was written"):
        load_engines(folder, provider="cpu")
