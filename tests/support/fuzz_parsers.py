"""The parsers of wanlab that read files of anyone, each with small files of its kind to mutate; see `support.fuzz`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save

from support import fuzz_traces
from support.fuzz import Parser
from wanlab.configuration.configuration import parse_configuration
from wanlab.core.manifest import Manifest
from wanlab.core.text import read_text
from wanlab.diagnose.experts.switching import SwitchCost
from wanlab.engine_report.report import read_layers
from wanlab.evaluate.video import read_video
from wanlab.launch.grid import expand, load_grid
from wanlab.models import registry
from wanlab.models.inputs import first_frame
from wanlab.models.weights import open_checkpoint
from wanlab.pages.report import page_of
from wanlab.pages.sweep_page import render_index
from wanlab.precision.plan import parse_plan
from wanlab.runs.folder import RunFolder
from wanlab.runs.parameters import Schema, parse_cell, read_notebook, read_schema
from wanlab.runs.results import frame_of, load_results, read_metrics, read_results, read_run, read_sweep

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ROOT / "data" / "sweeps" / "wan-nano-precision"
NOTEBOOK = ROOT / "tests" / "fixtures" / "notebooks" / "ok.ipynb"
LIMITS = "runs=10,axis_values=100"
"""Of a grid: each of its runs is checked, which takes a millisecond, and a mutated grid may have thousands."""


def files(*paths: Path | str) -> tuple[bytes, ...]:
    return tuple((ROOT / path).read_bytes() for path in paths)


def packed(value: Any) -> bytes:
    return json.dumps(value).encode()


def run_folder() -> Path:
    return next(path.parent for path in sorted(SWEEP.glob("*/results.jsonl")))


def grids() -> tuple[bytes, ...]:
    texts = (
        "name: g\nnotebook: ok.ipynb\nparameters: {prompt: a dog, scale: 2}\naxes:\n  steps: {from: 2, to: 6, by: 2}\n"
        "  mode: [fast, exact]\nexclude:\n  - {steps: [2, 4], mode: exact}\nbaseline: {steps: 2}\nrepeats: 2\n",
        "name: g\ntitle: Two\nnotebooks:\n  - notebook: ok.ipynb\n    axes: {scale: [1e-3, {from: 0.1, to: 0.3, by: 0.1}]}\n"
        "    machine: alone\n    limit_s: 60\n  - {notebook: ok.ipynb, axes: &a {steps: [1]}}\nshow: [time_ms]\n",
    )
    return (*(text.encode() for text in texts), *files("recipes/sweeps/wan-nano-precision.yaml"))


def read_grid(path: Path) -> object:
    os.environ["WANLAB_LIMITS"] = LIMITS
    beside = path.with_name("ok.ipynb")
    if not beside.exists():
        shutil.copy(NOTEBOOK, beside)
    os.chdir(path.parent)
    return expand(load_grid(path), output=path.parent / "outputs")


CELLS = (
    b"from typing import Literal\n\nsteps: int = 10  # number\nscale: float = 2  # off at 1\nmode: Literal['a', 3] = 'a'",
    b"limit: 'float | None' = None  # GiB\nsizes: list[int] = [1]\nshape: tuple[int, ...] = (3,)\nmsg = None\nx = {'a': 1}",
)


def read_cell(path: Path) -> object:
    return parse_cell(read_text(path))


def read_assignments(path: Path) -> object:
    schema = Schema(tuple(each for cell in CELLS for each in parse_cell(cell.decode())), "the notebook")
    return schema.parse(read_text(path).split("\n"))


def read_page(path: Path) -> object:
    notebook = read_notebook(path)
    read_schema(notebook)
    return page_of(notebook, {}, {"state": "failed"}, None, "name")


def notebooks() -> tuple[bytes, ...]:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["a\x1b[31mred\x1b[0m\n"]},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["t"]},
        {"output_type": "display_data", "data": {"text/html": "<b>x</b>", "text/plain": "x"}, "metadata": {}},
    ]
    code = {
        "cell_type": "code",
        "execution_count": 1,
        "outputs": outputs,
        "metadata": {"tags": ["parameters"]},
        "source": ["x: int = 1"],
    }
    text = {"cell_type": "markdown", "metadata": {}, "source": "# Title\n*words*"}
    metadata = {
        "kernelspec": {"name": "python3", "language": "python", "display_name": "Python"},
        "language_info": {"name": "python"},
    }
    new = {"cells": [text, code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    old_cell = {
        "cell_type": "code",
        "input": ["x = 1"],
        "outputs": [],
        "language": "python",
        "metadata": {},
        "collapsed": False,
    }
    old = {
        "metadata": {"name": ""},
        "nbformat": 3,
        "nbformat_minor": 0,
        "worksheets": [{"cells": [old_cell], "metadata": {}}],
    }
    return (packed(new), packed(old), NOTEBOOK.read_bytes())


def read_results_file(path: Path) -> object:
    return read_results(RunFolder(path.parent))


def read_record(path: Path) -> object:
    """A run folder whose file `path` is mutated, as a row of the table of runs."""
    for name in ("run.json", "status.json"):
        if not (path.parent / name).exists():
            shutil.copy(run_folder() / name, path.parent / name)
    frame = frame_of([read_run(path.parent)])
    return frame.to_csv()


def read_sweep_folder(path: Path) -> object:
    for source in sorted(SWEEP.glob("*/results.jsonl"))[:2]:
        target = path.parent / source.parent.name
        if not target.exists():
            target.mkdir()
            for name in ("run.json", "status.json", "results.jsonl"):
                shutil.copy(source.with_name(name), target / name)
    read_sweep(path.parent)
    return render_index(path.parent)


def graphs() -> tuple[bytes, ...]:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], np.arange(12, dtype=np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/blocks.0/to_q/MatMul"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.metadata_props.add(key="shape", value='{"frames": 5, "height": 64, "width": 64}')
    onnx.checker.check_model(model)
    return (model.SerializeToString(),)


def videos() -> tuple[bytes, ...]:
    made = []
    for form, codec, pixels in (("mp4", "libx264", "yuv420p"), ("matroska", "ffv1", "yuv420p")):
        file = io.BytesIO()
        with av.open(file, "w", format=form) as container:
            stream = container.add_stream(codec, Fraction(8))
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for shade in (0, 90, 180):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        made.append(file.getvalue())
    return tuple(made)


def images() -> tuple[bytes, ...]:
    made = []
    for form, mode in (
        ("PNG", "RGBA"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("BMP", "RGB"),
    ):
        file = io.BytesIO()
        Image.new(mode, (24, 16), 77 if mode in ("I;16", "P") else None).save(file, form)
        made.append(file.getvalue())
    return tuple(made)


class Made(Manifest, frozen=True, kw_only=True):
    sizes: tuple[int, ...] = ()
    by_step: dict[int, str] | None = None
    ratio: float | None = None


def manifests() -> tuple[bytes, ...]:
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"wanlab-seed-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    written = Made(
        path=str(folder / "input"),
        facts={"steps": 3, "shape": [1, 2]},
        sizes=(1, 2),
        by_step={1: "a"},
        ratio=0.5,
    ).write()
    data = written.read_bytes()
    shutil.rmtree(folder)
    return (data,)


def read_manifest(path: Path) -> object:
    """Read as written, and with its digest set right, so that mutations reach the fields."""
    from wanlab.core import manifest

    Made.find(path.with_suffix(""))
    data = None
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(path.read_bytes())
    if isinstance(data, dict):
        data.pop("sha256", None)
        form = data.pop("format", None)
        path.write_text(json.dumps({"format": form, "sha256": manifest._digest(data), **data}))
    return Made.read(path.with_suffix(""))


def weights() -> tuple[bytes, ...]:
    tensors = {
        "blocks.0.to_q.weight": torch.ones(3, 4),
        "blocks.0.to_q.bias": torch.zeros(3, dtype=torch.float16),
    }
    return (save(tensors, {"format": "pt"}),)


def read_weights(path: Path) -> object:
    return open_checkpoint(path.parent).shapes


def read_weight_index(path: Path) -> object:
    for name in ("a", "b"):
        (path.parent / f"{name}.safetensors").write_bytes(save({f"{name}.weight": torch.ones(2)}))
    return open_checkpoint(path.parent).shapes


def read_model(path: Path) -> object:
    source = ROOT / "data" / "wan-nano"
    for part in sorted(source.rglob("*.json")):
        name = part.relative_to(source)
        if "tokenizer" in name.parts:
            continue
        target = path.parent / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(part, target)
    target = path.parent / "transformer" / "config.json"
    shutil.copy(path, target)
    return registry.get(str(path.parent))


def of_text(read: Callable[[str, str], object]) -> Callable[[Path], object]:
    return lambda path: read(read_text(path), "input.yaml")


OF_TRACES = {
    name: Parser(each.seeds, each.read, f"input{each.suffix}", "json")
    for name, each in fuzz_traces.PARSERS.items()
}
PARSERS: dict[str, Parser] = OF_TRACES | {
    "grid": Parser(grids(), read_grid, "grid.yaml"),
    "configuration": Parser(
        files(
            *(
                f"recipes/configurations/{name}.yaml"
                for name in ("compiled-fp8", "streamed-vae", "wan-nano-3-percent")
            )
        ),
        of_text(parse_configuration),
        "input.yaml",
    ),
    "plan": Parser(
        files("recipes/hand-picked-fp8.yaml", "recipes/wan-nano-3-percent.yaml"),
        of_text(parse_plan),
        "input.yaml",
    ),
    "parameters cell": Parser(CELLS, read_cell, "cell.py"),
    "command line": Parser(
        (
            b"steps=4\nscale=1e-3\nmode=3\nlimit=none\nsizes=1,2\nshape=(1, 2)\nmsg=[1, a]",
            b"msg=hello\nlimit=.inf\nsizes=",
        ),
        read_assignments,
    ),
    "notebook": Parser(notebooks(), read_page, "input.ipynb", "json"),
    "results.jsonl": Parser(
        files(run_folder() / "results.jsonl"), read_results_file, "results.jsonl", "lines"
    ),
    "metrics.jsonl": Parser(
        (b'{"time": "2026-01-01", "name": "a", "value": 1}\n{"name": "b", "value": {"x": [1, "inf"]}}\n',),
        read_metrics,
        "metrics.jsonl",
        "lines",
    ),
    "run.json": Parser(files(run_folder() / "run.json"), read_record, "run.json", "json"),
    "status.json": Parser(files(run_folder() / "status.json"), read_record, "status.json", "json"),
    "sweep.json": Parser(files(SWEEP / "sweep.json"), read_sweep_folder, "sweep.json", "json"),
    "results of a bench": Parser(
        files("data/results/bench_5b_h200.json", "data/results/tensorrt_builds_cpu.json"),
        load_results,
        "input.json",
        "json",
    ),
    "switch cost": Parser(
        files("data/results/expert_switch_h200.json"), SwitchCost.read, "input.json", "json"
    ),
    "ONNX graph": Parser(graphs(), read_layers, "input.onnx", "bytes"),
    "video": Parser(videos(), read_video, "input.mp4", "bytes"),
    "image": Parser(images(), lambda path: first_frame(path, 32, 32), "input.png", "bytes"),
    "manifest": Parser(manifests(), read_manifest, "input.json", "json"),
    "safetensors": Parser(weights(), read_weights, "model.safetensors", "bytes"),
    "index of weights": Parser(
        (packed({"metadata": {}, "weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}}),),
        read_weight_index,
        "model.safetensors.index.json",
        "json",
    ),
    "model folder": Parser(
        files("data/wan-nano/transformer/config.json"), read_model, "mutated.json", "json"
    ),
}
