"""The table of engines: what each needs, and an engine of one's own in one file, met everywhere that engines are met."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import convert_tiny as tiny

from wanlab import engines, measure, runs
from wanlab.cli import doctor
from wanlab.core.errors import WanlabError
from wanlab.core.plugins import run_files
from wanlab.engines import registry
from wanlab.plots.style import colour
from wanlab.runs.result import completed

SIZE = dict(height=32, width=48, frames=5)
TOY = Path(__file__).parents[1] / "support" / "toy_engine.py"


@pytest.fixture(scope="module")
def model():
    return tiny.bare(tiny.pipeline())


@pytest.fixture
def toy():
    """The toy, in the table for one test."""
    run_files(str(TOY), registry.VARIABLE, "wanlab_engine")
    yield registry.ENGINES["negated"]
    del registry.ENGINES["negated"]


def test_the_command_measures_a_new_engine(toy, tmp_path, capsys):
    main = importlib.import_module("wanlab.cli.main")

    size = ["--height", "64", "--width", "64", "--frames", "5"]
    quick = ["--iterations", "2", "--duration-s", "0", "--warmup-ms", "0"]
    asked = ["bench", "wan-nano", "--component", "expert_low", "--engine", "negated", *size, *quick]
    assert main.main([*asked, "--json", str(tmp_path / "bench.json")]) == 0
    assert "negated: expert_low of wan-nano" in capsys.readouterr().out
    assert measure.read_bench(tmp_path / "bench.json").engine == "negated"
    asked[asked.index("negated")] = "negatd"
    assert main.main(asked) == 2
    assert "did you mean 'negated'" in capsys.readouterr().err


def test_tables_and_plots_know_a_new_engine(toy, model, tmp_path):
    kind = engines.engine_kind("negated")
    assert "negated" in [kind.name for kind in registry.ENGINES.values() if kind.by_default]
    ready = engines.engine_calls(model, "expert_low", tmp_path, engines=["eager", "negated"], **SIZE)
    assert list(ready.calls) == ["eager", "negated"]
    assert ready.facts["negated"]["relative_l2"] == 0
    samples, control = measure.interleaved(ready.calls, rounds=1, device=model.device, progress=False)
    work = runs.Work(model="tiny", weights="random", component="expert_low", **ready.size)
    rows = runs.call_results(work, samples, control, dtype=ready.precision, facts=ready.facts)
    table = runs.platform_table([completed(row, measure.environment()) for row in rows])
    assert table["engine"].tolist() == ["eager", "negated"]
    assert table["ratio_to_eager"].notna().all()
    assert colour("negated") == colour("negated fp8") == colour("Negated twice, step 3") == kind.colour
    assert registry.title_of_label("negated") == "Negated twice"


def test_the_pipeline_generates_with_a_new_engine(toy, model, tmp_path):
    opened = engines.open_component("negated", model, "expert_high", tmp_path, size=SIZE)
    assert engines.use(model, {"expert_high": opened}).engines["expert_high"] == "negated"


def test_doctor_has_a_row_for_each_engine(toy):
    rows = {row.what: row for row in doctor._engines()}
    assert (rows["Negated twice"].state, rows["Negated twice"].found) == ("ok", "nothing has to be installed")
    for kind in registry.ENGINES.values():
        titles = {kind.title, *kind.titles.values()}
        assert titles & rows.keys(), kind.name
        assert bool(kind.missing()) == any(rows[title].add != "" for title in titles & rows.keys())


@pytest.mark.slow
def test_other_processes_read_the_file_that_the_variable_names(tmp_path):
    code = "from wanlab.engines.registry import ENGINES; print(*ENGINES)"
    for path, expected in ((TOY, "negated"), (tmp_path / "none.py", "WANLAB_ENGINES names")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {registry.VARIABLE: str(path)},
        )
        assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", "does not run: line 1: SyntaxError: '(' was never closed"),
        ("\n1 / 0\n", "does not run: line 2: ZeroDivisionError"),
        ("import nopackage\n", "does not run: line 1: ModuleNotFoundError: No module named 'nopackage'"),
        ("raise SystemExit(3)\n", "does not run: line 1: SystemExit: 3"),
        ("x = 1\x00\n", "does not run: "),
    ],
)
def test_a_file_of_an_engine_that_does_not_run_is_one_line(text, message, tmp_path):
    path = tmp_path / "engine.txt"  # whatever its name
    path.write_text(text)
    with pytest.raises(WanlabError) as error:
        run_files(str(path), registry.VARIABLE, "wanlab_engine")
    assert f"WANLAB_ENGINES names {path}, which {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_itself_loads_no_engine():
    code = "import sys, wanlab.engines.registry; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "pandas", "onnx", "onnxruntime", "diffusers"} & set(loaded)


@pytest.mark.parametrize("name", list(registry.ENGINES))
def test_what_is_missing_is_said_in_one_line(name, monkeypatch):
    kind = engines.engine_kind(name)
    assert kind.needs
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda module: None)
    assert "is not installed; add it with: pip install" in kind.missing()
    assert "\n" not in kind.missing()
    with pytest.raises(WanlabError, match="is not installed; add it with: pip install"):
        kind.check()
    assert {row.state for row in doctor._engines()} <= {doctor.MISSING, doctor.OPTIONAL}


@pytest.mark.parametrize("name", list(registry.ENGINES))
def test_what_the_table_names_is_there(name):
    kind = engines.engine_kind(name)
    for work in (kind.open, kind.prepare, kind.build, kind.describe):
        if isinstance(work, registry.Deferred):
            module = registry.importlib.import_module(work.module)
            assert callable(getattr(module, work.name))


def test_labels_of_engines_lead_to_their_kind():
    kinds = {
        "eager": "eager",
        "eager, plan fp8": "eager",
        "onnxruntime": "onnxruntime",
        "onnxruntime-cuda": "onnxruntime",
        "onnxruntime-cpu-streamed": "streamed_vae",
        "tensorrt-rtx": "tensorrt",
        "tvm-llvm (plain)": "tvm",
    }
    assert {label: registry.kind_of_label(label).name for label in kinds} == kinds
    assert registry.kind_of_label("abacus") is None
    on_cpu = ("onnxruntime-cpu", "onnxruntime-cpu-streamed", "tvm-llvm", "tvm-llvm (plain)")
    assert all(map(registry.computes_on_cpu, on_cpu))
    assert not any(map(registry.computes_on_cpu, ("eager", "onnxruntime-cuda", "tensorrt", "abacus")))
    assert registry.title_of_label("tensorrt-rtx") == "TensorRT for RTX"
    assert registry.title_of_label("abacus") == "abacus"
    assert [registry.engine_kind("tvm").label(place) for place in ("cpu", "cuda")] == ["tvm-llvm", "tvm-cuda"]


@pytest.mark.slow
def test_the_streamed_vae_is_an_engine_of_both_halves(model, tmp_path):
    for component in ("vae_decoder", "vae_encoder"):
        chosen = ["eager", "streamed_vae"]
        ready = engines.engine_calls(model, component, tmp_path, engines=chosen, threads=1, **SIZE)
        assert list(ready.calls) == ["eager", "onnxruntime-cpu-streamed"]
        assert ready.facts["onnxruntime-cpu-streamed"]["relative_l2"] < 1e-5
    with pytest.raises(WanlabError, match="streamed_vae runs vae_encoder and vae_decoder, not expert_high"):
        engines.open_component("streamed_vae", model, "expert_high", tmp_path)


@pytest.mark.slow
def test_every_component_may_run_on_an_engine_of_its_own(model, tmp_path):
    chosen = {
        "text_encoder": "eager",
        "expert_high": "onnxruntime",
        "expert_low": "onnxruntime",
        "vae_decoder": "streamed_vae",
    }
    changed = engines.use_engines(
        model, chosen, tmp_path, size=SIZE, settings={"onnxruntime": {"threads": 1}}, progress=False
    )
    on_cpu = {
        "expert_high": "onnxruntime-cpu",
        "expert_low": "onnxruntime-cpu",
        "vae_decoder": "onnxruntime-cpu-streamed",
    }
    assert {name: engine for name, engine in changed.engines.items() if engine != "eager"} == on_cpu
    assert changed.pipeline.transformer.engine.threads == 1
    assert json.loads((tmp_path / "expert_low.json").read_text())["trace_reused"]
    for wrong, said in (
        ({"expert_high": "onnxrutime"}, "did you mean 'onnxruntime'"),
        ({"expert_hig": "compiled"}, "did you mean 'expert_high'"),
        ({"vae_decoder": "streamed_vae", "expert_low": "streamed_vae"}, "not expert_low"),
    ):
        with pytest.raises(WanlabError, match=said):
            engines.use_engines(model, wrong, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_a_compiled_component_is_opened_by_name(model, tmp_path):
    engine = engines.open_component("compiled", model, "expert_high", tmp_path)
    assert engine.name == "compiled"
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(WanlabError, match=r"no setting 'optimisation' \(did you mean 'optimization'\?\)"):
        engines.open_component("onnxruntime", model, "expert_high", tmp_path, optimisation="basic")
    with pytest.raises(WanlabError, match=r"eager has no setting 'threads'; it has none"):
        engines.open_component("eager", model, "expert_high", tmp_path, threads=1)
    with pytest.raises(WanlabError, match=r"unknown engine 'eagr' \(did you mean 'eager'\?\)"):
        engines.open_component("eagr", model, "expert_high", tmp_path)
    with pytest.raises(WanlabError, match="'eager' is part of wanlab; give yours another name"):
        engines.register(engines.EngineKind("eager", "Mine", "#000000", open=torch.nn.Identity))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"batch": 10**9}, "the latents of the example inputs of .* GiB are free"),
        ({"batch": 0}, "batch must be"),
    ],
)
def test_sizes_of_example_inputs_that_would_take_the_machine_are_refused(size, says):
    from types import SimpleNamespace

    from wanlab import models
    from wanlab.export.components import default_shape

    with pytest.raises(WanlabError, match=says):
        default_shape(SimpleNamespace(spec=models.get("wan-nano"), pipeline=None), **size)
