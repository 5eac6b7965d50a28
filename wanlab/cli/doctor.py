"""`wanlab doctor`: what this machine can do, and the command that adds what is missing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata, util

import av
import psutil
import torch

from wanlab import models
from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError, first_line
from wanlab.engines.registry import ENGINES
from wanlab.evaluate.lpips import available_backbones
from wanlab.measure.environment import environment

HELP = """Show what this machine can do, and the command that adds each thing that it lacks. The exit status is 1 when
something that wanlab always needs is missing."""
OK, MISSING, OPTIONAL = "ok", "missing", "optional"
GIB = 2**30
DISK_GIB = 20
VIDEO_ENCODERS = {"libx264": "mp4", "ffv1": "lossless mkv"}


@dataclass(frozen=True)
class Row:
    """One thing that this machine has or lacks.

    Attributes:
        what: its name.
        state: `"ok"`, `"missing"`, or `"optional"`: missing, and not needed on a CPU.
        found: version or reason.
        add: command that adds it.
    """

    what: str
    state: str
    found: str
    add: str = ""


def diagnose() -> list[Row]:
    """Rows of all probes. A probe that raises becomes a row of its own."""
    rows: list[Row] = []
    for probe in PROBES:
        try:
            rows += probe()
        except Exception as error:
            name = probe.__name__.strip("_").replace("_", " ")
            reason = f"cannot be asked: {first_line(error, 160)}"
            rows.append(Row(name, MISSING, reason, "pip install --force-reinstall wanlab"))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Print the table; returns 1 when something that wanlab always needs is missing, else 0."""
    rows = diagnose()
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        width = max(len(row.what) for row in rows)
        marks = {OK: "ok", MISSING: "MISSING", OPTIONAL: "optional"}
        for row in rows:
            show(f"{marks[row.state]:8}  {row.what:{width}}  {row.found}")
            if row.add:
                show(f"{'':8}  {'':{width}}  add: {row.add}")
    return int(any(row.state == MISSING for row in rows))


def _python() -> list[Row]:
    version = ".".join(map(str, sys.version_info[:3]))
    state = OK if sys.version_info >= (3, 11) else MISSING
    return [Row("Python", state, version, "" if state == OK else "conda env create -f environment.yml")]


def _processor_and_memory() -> list[Row]:
    facts = environment("cpu")
    memory = psutil.virtual_memory()
    return [
        Row("CPU", OK, f"{facts['cpu']}, {facts['cores_available']} cores available"),
        Row("memory", OK, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"),
    ]


def _disk() -> list[Row]:
    free = shutil.disk_usage(".").free / GIB
    if free >= DISK_GIB:
        return [Row("disk", OK, f"{free:.0f} GiB free here")]
    return [Row("disk", OPTIONAL, f"{free:.1f} GiB free here", f"free {DISK_GIB} GiB for the real models")]


def _gpu() -> list[Row]:
    if torch.cuda.is_available():
        gpu = environment("cuda")["gpu"]
        driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
        return [Row("GPU", OK, f"{gpu['name']}, {gpu['memory_gib']} GiB, CUDA {torch.version.cuda}{driver}")]
    if torch.version.cuda is None:
        add = "pip install --force-reinstall torch torchvision" if sys.platform == "linux" else ""
        return [Row("GPU", OPTIONAL, "this torch is built for the CPU", add)]
    add = "install the NVIDIA driver, if this machine has a GPU"
    return [Row("GPU", OPTIONAL, f"no GPU is seen (torch is built for CUDA {torch.version.cuda})", add)]


def _torch() -> list[Row]:
    return [
        _package("torch", "torch"),
        _package("diffusers", "diffusers"),
        _package("transformers", "transformers"),
    ]


def _onnx() -> list[Row]:
    return [_package("onnx", "onnx"), _package("onnxsim", "onnxsim")]


def _engines() -> list[Row]:
    rows: dict[str, Row] = {}
    for kind in ENGINES.values():
        if kind.missing():
            lines = "; ".join(need.install for need in kind.needs if not need.here())
            state = MISSING if kind.required else OPTIONAL
            rows[kind.title] = Row(kind.title, state, "not installed", lines)
        elif kind.describe is not None:
            rows |= {title: Row(title, OK, text) for title, text in kind.describe().items()}
        else:
            versions = [f"{need.name} {_version(need.package)}".strip() for need in kind.needs]
            rows[kind.title] = Row(kind.title, OK, ", ".join(versions) or "nothing has to be installed")
    return list(rows.values())


def _pycuda() -> list[Row]:
    return [_optional("PyCUDA", "pycuda", "pip install pycuda")]


def _sharing() -> list[Row]:
    return [
        _optional("Ray", "ray", 'pip install "wanlab[ray]"'),
        _optional("service (FastAPI)", "fastapi", 'pip install "wanlab[serve]"'),
        _optional("MLflow", "mlflow-skinny", 'pip install "wanlab[mlflow]"'),
        _optional("Parquet (pyarrow)", "pyarrow", 'pip install "wanlab[parquet]"'),
    ]


def _lpips() -> list[Row]:
    rows = []
    for backbone in available_backbones():
        default = backbone.name == "stlpips-alex"
        state = OK if backbone.available else MISSING if default else OPTIONAL
        text, add = (backbone.note, "") if backbone.available else ("not here", backbone.note)
        rows.append(Row(f"LPIPS {backbone.name}", state, text, add))
    return rows


def _ffmpeg() -> list[Row]:
    here = [name for name in VIDEO_ENCODERS if name in av.codecs_available]
    lacks = [f"{name} ({VIDEO_ENCODERS[name]})" for name in VIDEO_ENCODERS if name not in here]
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    if lacks:
        add = "pip install --force-reinstall --only-binary av av"
        return [Row("FFmpeg (PyAV)", MISSING, f"libavcodec {version} without {', '.join(lacks)}", add)]
    return [Row("FFmpeg (PyAV)", OK, f"PyAV {av.__version__}, libavcodec {version}, {', '.join(here)}")]


def _notebooks() -> list[Row]:
    return [
        _package("JupyterLab", "jupyterlab"),
        _package("Papermill", "papermill"),
        _package("ipywidgets", "ipywidgets"),
        _package("plotly", "plotly"),
    ]


def _models() -> list[Row]:
    try:
        return [Row("wan-nano", OK, models.get("wan-nano").source)]
    except WanlabError as error:
        return [Row("wan-nano", MISSING, str(error), "pip install --force-reinstall wanlab")]


def _package(name: str, package: str) -> Row:
    version = _version(package)
    return (
        Row(name, OK, version) if version else Row(name, MISSING, "not installed", f"pip install {package}")
    )


def _optional(name: str, package: str, add: str) -> Row:
    version = _version(package)
    return Row(name, OK, version) if version else Row(name, OPTIONAL, "not installed", add)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed" if util.find_spec(package.replace("-", "_")) else ""


PROBES: tuple[Callable[[], list[Row]], ...] = (
    _python,
    _processor_and_memory,
    _disk,
    _gpu,
    _torch,
    _onnx,
    _engines,
    _pycuda,
    _lpips,
    _ffmpeg,
    _notebooks,
    _sharing,
    _models,
)


COMMANDS = {"doctor": Command(HELP, add_arguments, main)}
