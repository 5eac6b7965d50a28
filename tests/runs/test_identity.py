"""A run's identity holds its model's files whole; what was said of the model stands in the result and the report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.models_tiny import save

from wanlab.core import contents
from wanlab.core.errors import WanlabError
from wanlab.pages import report
from wanlab.runs import Result, Work, call_work, prepare, run, video_work
from wanlab.runs.results import read_run


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, written some time ago."""
    monkeypatch.setattr(contents, "KEPT_FROM_BYTES", 1000)
    monkeypatch.setenv("WANLAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model" / "x.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"a" * 3000)
    monkeypatch.setattr(contents, "SETTLED_S", -1.0)  # as if written long ago
    return path


def test_a_large_file_is_hashed_once(large, monkeypatch):
    first = contents.content_digest(large)
    monkeypatch.setattr(contents, "file_digest", lambda path: pytest.fail("hashed again"))
    assert contents.content_digest(large) == first


def test_a_large_file_of_the_same_size_and_time_with_other_bytes_is_another(large):
    stat = large.stat()
    before = prepare.weights_id(str(large.parent))
    with open(large, "r+b") as file:
        file.seek(2500)
        file.write(b"b")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert large.stat().st_mtime_ns == stat.st_mtime_ns
    assert prepare.weights_id(str(large.parent)) != before


def test_a_file_that_was_just_written_is_hashed_each_time(large, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_S", 60.0)
    contents.content_digest(large)
    assert not (large.parents[1] / "cache" / "digests").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer/spiece.model", "tokenizer/vocab.txt", "text_encoder/config.json"]
)
def test_tokenizers_and_configurations_are_part_of_a_models_identity(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"1")
    before = prepare.weights_id(str(tmp_path)), prepare.weights_id(str(tmp_path), "random")
    (tmp_path / name).write_bytes(b"2")
    after = prepare.weights_id(str(tmp_path)), prepare.weights_id(str(tmp_path), "random")
    assert before[0] != after[0]
    assert before[1] != after[1]
    (tmp_path / "README.md").write_text("not the model")
    assert prepare.weights_id(str(tmp_path)) == after[0]


def test_a_model_of_the_hub_that_was_downloaded_has_an_identity(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    monkeypatch.setattr(prepare, "try_to_load_from_cache", lambda *names: str(tmp_path / "model_index.json"))
    assert prepare.weights_id("someone/model") == prepare.weights_id(str(tmp_path))


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A run of a notebook whose model is a small one of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    source = "model: str = 'm'  # model\ndevice: str = 'cpu'  # device"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "10_x.ipynb")
    monkeypatch.delenv(run.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(run, "_current", None)
    one = run.start("10_x", {"model": str(save(tmp_path / "tiny", boundary_ratio=1.5)), "device": "cpu"})
    yield one
    one._abandon("test over")


def test_what_was_said_of_a_model_stands_in_the_result_and_the_report(started):
    model, _ = started.load()
    model.generate(
        np.zeros((16, 32, 3)), "word " * 600, height=16, width=32, frames=5, steps=2, guidance_scale=1.0
    )
    result = started.result(Result(work=Work(), engine="eager"))
    assert any("expert_high runs in none of 2 steps" in note for note in result.notes)
    assert any("its end is cut" in note for note in result.notes)
    started.note("the trace lacks kernels")
    started.finish()
    record = json.loads((started.folder / "run.json").read_text())
    assert record["notes"] == ["the trace lacks kernels", *result.notes]
    page = report.page_of(None, record, {"state": "finished"}, None, "x")
    assert "the text encoder takes" in page
    assert "boundary_ratio is 1.5" in page


def test_weights_that_change_during_a_run_are_noticed_at_its_end(started):
    started.load()
    file = next(iter(sorted((started.folder.parents[2] / "tiny" / "vae").glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WanlabError, match=r"the files of model .* changed during the run"):
        started.finish()
    assert not started.finished


def test_files_in_lists_and_folders_and_plans_with_what_they_name_are_part_of_the_identity(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.txt").write_text("a cat")
    (tmp_path / "x.json").write_text("1")
    (tmp_path / "p.yaml").write_text("name: p\nrules: [{format: int8}]\n")
    (tmp_path / "c.yaml").write_text("name: c\nplan: p.yaml\n")
    named = {
        "examples": "examples",
        "beside": ["x.json", "y"],
        "configurations": ["c.yaml"],
        "plans": ["p.yaml"],
    }
    before = prepare.input_digests(named)
    assert list(before) == ["examples", "beside[0]", "configurations[0]", "plans[0]"]
    (tmp_path / "examples" / "a.txt").write_text("a dog")
    (tmp_path / "x.json").write_text("2")
    (tmp_path / "p.yaml").write_text("name: p\nrules: [{format: fp8}]\n")
    after = prepare.input_digests(named)
    assert [name for name in after if after[name] != before[name]] == list(before)
    assert (
        prepare.input_digests({"plan": "ffn-int8"})["plan"]
        != prepare.input_digests({"plan": "ffn-fp8"})["plan"]
    )
    kept = {"engines": "examples", "plan": "default", "prompt": "a cat", "runs": str(tmp_path)}
    assert prepare.input_digests(kept) == {}  # folders that runs write into


@pytest.fixture
def lora(tmp_path):
    """A LoRA for one layer of the model of `models_tiny`."""
    generator = torch.Generator().manual_seed(0)
    layer = "transformer.blocks.0.attn1.to_q"
    shapes = {f"{layer}.lora_A.weight": (2, 24), f"{layer}.lora_B.weight": (24, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "fast.safetensors"
    save_file(tensors, path)
    return path


def identity_of(model, weights="pretrained"):
    weights_id = prepare.weights_id(model, weights)
    return prepare.run_id("source", {"model": model, "weights": weights}, weights=weights_id)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("name", ["wan2.2-i2v-a14b", "tiny"])
def test_a_lora_is_part_of_a_runs_identity_by_content_component_and_strength(
    tmp_path, lora, name, weights, monkeypatch
):
    monkeypatch.setattr(prepare, "try_to_load_from_cache", lambda *_: None)
    base = name if name != "tiny" else str(save(tmp_path / "tiny"))
    other = lora.with_name("the same+one.safetensors")
    shutil.copy(lora, other)
    before = identity_of(f"{base}+{lora}@expert_high", weights)
    assert identity_of(base, weights) != before
    for same in (f"{base}+{other}@expert_high", f"{base} + {lora}@expert_high:1.0"):
        assert identity_of(same, weights) == before
    for changed in (f"{base}+{lora}@expert_low", f"{base}+{lora}@expert_high:0.9"):
        assert identity_of(changed, weights) != before
    both, crosswise = (
        "+".join([base, *(f"{lora}@{component}" for component in components)])
        for components in (("expert_high", "expert_low"), ("expert_low", "expert_high"))
    )
    assert identity_of(both, weights) == identity_of(crosswise, weights)
    data = bytearray(lora.read_bytes())
    data[-1] ^= 1
    lora.write_bytes(data)
    assert identity_of(f"{base}+{lora}@expert_high", weights) != before


def test_peft_settings_beside_a_lora_are_part_of_it(tmp_path, lora):
    file = lora.rename(tmp_path / "adapter_model.safetensors")
    found = []
    for alpha in (None, 1, 2):
        if alpha:
            file.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.append(identity_of(f"wan-nano+{file}@expert_high"))
    assert len(set(found)) == 3


def test_a_missing_lora_is_refused_before_a_run_starts(tmp_path):
    cell = nbformat.v4.new_code_cell("model: str = 'm'  # model", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    with pytest.raises(WanlabError, match=r"gone\.safetensors is missing"):
        prepare.prepare(
            tmp_path / "x.ipynb", {"model": "wan-nano+gone.safetensors@expert_high"}, output=tmp_path
        )


def test_a_lora_stands_in_the_record_the_results_and_the_report(tmp_path, lora, started):
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()[:12]
    tiny = started.parameters["model"]
    one = run.start("10_x", {"model": f"{tiny}+{lora}@expert_high:0.8", "device": "cpu"})
    model, _ = one.load()
    made = model.generate(
        np.zeros((16, 32, 3)), "pan", height=16, width=32, frames=5, steps=2, guidance_scale=1.0
    )
    result = one.result(Result(work=video_work(model, made), engine="eager"))
    assert result.work.lora == f"{digest}@expert_high:0.8"
    assert result.work.model == "tiny"
    assert f"with LoRA {digest}@expert_high:0.8" in str(result.work)
    assert call_work(model, "expert_high").lora == result.work.lora
    assert call_work(model, "vae_decoder").lora is None
    (said,) = (note for note in result.notes if "fused into" in note)
    assert said == (
        f"expert_high: LoRA fast.safetensors ({digest}), strength 0.8, rank 2, fused into 1 tensor"
    )
    record = json.loads((one.folder / "run.json").read_text())
    assert record["weights"] != prepare.weights_id(tiny)
    assert read_run(one.folder).work.lora == result.work.lora
    one.finish()
    record = json.loads((one.folder / "run.json").read_text())
    assert digest in report.page_of(None, record, {"state": "finished"}, None, "x")


def test_a_lora_that_changes_during_a_run_is_noticed_at_its_end(lora, started):
    one = run.start("10_x", {"model": f"{started.parameters['model']}+{lora}@expert_low", "device": "cpu"})
    lora.write_bytes(lora.read_bytes() + b" ")
    with pytest.raises(WanlabError, match=r"the files of model .*fast.safetensors.* changed during the run"):
        one.finish()


def test_an_input_that_changes_during_a_run_is_noticed_at_its_end(tmp_path, started):
    record = json.loads((started.folder / "run.json").read_text())
    (started.folder / "run.json").write_text(json.dumps(record | {"inputs": {"device": "another digest"}}))
    with pytest.raises(WanlabError, match="what parameter device names changed during the run"):
        started.finish()


LAB = """
import os, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in sys.argv[1:]:
    assert shell.run_cell(cell, store_history=True).success
"""


@pytest.mark.parametrize(
    ("edited", "unsaved", "skipped"),
    [({}, 0, 0), ({2: "run.record('n', 2)  # edited"}, 1, 1), ({2: ""}, 0, 1)],
)
def test_cells_that_were_edited_in_lab_and_not_saved_are_noticed(tmp_path, edited, unsaved, skipped):
    cells = [
        "a: int = 1  # a number",
        "import wanlab\nrun = wanlab.start('10_x', output='out')",
        "run.record('n', a)",
        "run.finish()",
    ]
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), tmp_path / "10_x.ipynb")
    executed = [edited.get(place, cell) for place, cell in enumerate(cells)]
    environment = {name: value for name, value in os.environ.items() if name != run.FOLDER_VARIABLE}
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    subprocess.run([sys.executable, "-c", LAB, *executed], cwd=tmp_path, env=environment, check=True)
    ready = prepare.prepare(tmp_path / "10_x.ipynb", output=tmp_path / "out")
    record = json.loads((ready.folder.path / "run.json").read_text())
    assert (len(record["unsaved_cells"]), record["skipped_cells"]) == (unsaved, skipped)
    assert bool(record["notes"]) == bool(unsaved + skipped)
    assert bool(ready.finished()) == (not unsaved and not skipped)
