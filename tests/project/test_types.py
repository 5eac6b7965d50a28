"""Types of the whole package; TensorRT's modules against its stubs, as they run on few machines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

WRONG = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import tensorrt as trt

def run(context: trt.IExecutionContext) -> bool:
    context.set_tensor_adress("x", 1)
    return context.execute_async_v3("stream")
"""


needs_stubs = pytest.mark.skipif(
    not list(metadata.distributions(name="tensorrt-stubs")),
    reason="needs pip install --no-deps tensorrt-stubs (what it depends on is all of TensorRT)",
)


def mended(stub):
    """The stubs are generated: five of their lines are no Python, and one hides the type bool."""
    stub = re.sub(r"\bin: list", "inputs: list", stub).replace(
        "channel_axis: int)", "channel_axis: int = ...)"
    )
    return re.sub(r"^bool: DataType.*$", "", stub, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def mypy(root, tmp_path_factory, pytestconfig):
    """Run mypy with the project's settings, and TensorRT's stubs where it finds them.

    The package of stubs puts them where TensorRT itself would be and has no marker that mypy looks for.
    """
    # Kept from run to run: what did not change is not checked again.
    kept = getattr(pytestconfig, "cache", None)
    folder = kept.mkdir("mypy") if kept else tmp_path_factory.mktemp("mypy")
    place = metadata.distribution("tensorrt-stubs").locate_file("")
    for package in ("tensorrt", "tensorrt_bindings"):
        (folder / "stubs" / package).mkdir(parents=True, exist_ok=True)
        for stub in Path(place / package).glob("*.pyi"):
            file, text = folder / "stubs" / package / stub.name, mended(stub.read_text())
            if not file.is_file() or file.read_text() != text:
                file.write_text(text)

    def run(*files):
        settings = ["--config-file", root / "pyproject.toml", "--cache-dir", folder / "cache"]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *settings, *files],
            cwd=root,
            env=os.environ | {"MYPYPATH": str(folder / "stubs")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@needs_stubs
def test_types_hold_in_the_whole_package(mypy):
    done = mypy()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout


@needs_stubs
def test_a_call_that_tensorrt_does_not_have_is_found(mypy, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    done = mypy(tmp_path / "wrong.py")
    assert done.returncode == 1
    assert 'has no attribute "set_tensor_adress"' in done.stdout
    assert 'incompatible type "str"' in done.stdout
