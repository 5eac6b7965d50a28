"""An installed wheel works with no checkout: in an empty folder, with its own notebooks, model, data and recipes.

The wheel is built from a copy of the project and installed into an environment of its own, which sees this environment's
other packages through a .pth file: nothing is downloaded, and this environment's editable install is not imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
LIMIT_BYTES = 40 * 2**20
BUILT_FROM = ("wanlab", "data", "notebooks", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*command: object, cwd: Path, timeout: float = 300) -> str:
    """Standard output of a command that must succeed and may not see this checkout."""
    hidden = ("PYTHONPATH", "WANLAB_NANO", "VIRTUAL_ENV")
    env = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A copy of what a build reads: a build leaves files in its folder, and may find old ones there."""
    copy = tmp_path_factory.mktemp("project")
    for name in BUILT_FROM:
        if (root / name).is_dir():
            shutil.copytree(
                root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        else:
            shutil.copy2(root / name, copy / name)
    return copy


def pip(*arguments: object, cwd: Path) -> str:
    """pip of this environment, which asks no index for anything."""
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments, cwd=cwd)


def new_environment(place: Path, install: Path, *options: str) -> Path:
    """The `bin` folder of an environment in `place`: `install`, and this environment's packages behind it."""
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    # The .pth files in folders that a .pth file names are not read: no editable install comes along.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(packages) / "other-packages.pth").write_text("\n".join(others) + "\n")
    new = ("--no-deps", "--no-index", "--ignore-installed")  # the other environment stays as it is
    pip("--python", python, "install", *new, *options, install, cwd=place)
    return place / "bin"


@pytest.fixture(scope="module")
def wheel(project, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", place, project, cwd=place)
    (built,) = place.glob("wanlab-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return new_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def report(printed: str, folder: Path) -> str:
    """The report of the run whose path is the last line that was printed."""
    path = folder / printed.splitlines()[-1]
    record = json.loads((path.parent / "run.json").read_text())
    status = json.loads((path.parent / "status.json").read_text())
    assert status["state"] == "finished"
    assert record["verdict"]
    return path.read_text()


def test_the_wheel_holds_what_the_checkout_holds(root, wheel):
    def files(folder: str, inside: str) -> set[str]:
        below = (p for p in (root / folder).rglob("*") if p.is_file())
        kept = (p for p in below if "__pycache__" not in p.parts and p.suffix != ".pyc")
        return {f"{inside}/{p.relative_to(root / folder).as_posix()}" for p in kept}

    expected = files("wanlab", "wanlab") | files("data", "wanlab/_data") | files("recipes", "wanlab/_recipes")
    expected |= {f"wanlab/_notebooks/{p.name}" for p in (root / "notebooks").glob("*.ipynb")}
    assert expected == {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert wheel.stat().st_size < LIMIT_BYTES


def test_the_wheel_is_what_is_imported_and_has_the_digest_of_the_checkout(root, installed, empty):
    from wanlab.runs.prepare import package_digest

    code = (
        "import json, wanlab; from wanlab.core import paths; from wanlab.runs.prepare import package_digest;"
        "print(json.dumps([wanlab.__file__, str(paths.CHECKOUT), package_digest(), str(paths.data())]))"
    )
    file, checkout, digest, data = json.loads(run(installed / "python", "-c", code, cwd=empty))
    assert Path(file).is_relative_to(installed.parent)
    assert not Path(file).is_relative_to(root)
    assert checkout == "None"
    assert digest == package_digest()
    assert Path(data).is_relative_to(installed.parent)
    assert (Path(data) / "wan-nano" / "model_index.json").is_file()


def test_an_editable_install_finds_everything_in_its_checkout(project, empty, tmp_path):
    (tmp_path / "environment").mkdir()
    place = new_environment(tmp_path / "environment", project, "--no-build-isolation", "--editable")
    code = (
        "from wanlab.core import paths; from wanlab.models.registry import nano_folder;"
        "print(paths.CHECKOUT, paths.find_notebook('00_quickstart'), nano_folder(), sep='\\n')"
    )
    said = run(place / "python", "-c", code, cwd=empty).split()
    notebook = project / "notebooks" / "00_quickstart.ipynb"
    assert [Path(path) for path in said] == [project, notebook, project / "data" / "wan-nano"]


def test_commands_know_notebooks_models_and_plans_in_an_empty_folder(root, installed, empty):
    wanlab = installed / "wanlab"
    printed = run(wanlab, "notebooks", "--to", "x", cwd=empty)
    names = {path.name for path in (root / "notebooks").glob("*.ipynb")}
    assert {path.name for path in (empty / "x").iterdir()} == names
    assert f"{len(names)} notebooks" in printed
    for name in names:
        assert (empty / "x" / name).read_bytes() == (root / "notebooks" / name).read_bytes()
    assert "wan-nano" in run(wanlab, "models", cwd=empty)
    assert "limit_s" in run(wanlab, "params", "00_quickstart", cwd=empty)
    assert "weights" in run(wanlab, "plan", "show", "recipes/wan-nano-3-percent.yaml", cwd=empty)
    grid = "recipes/sweeps/wan-nano-precision.yaml"
    assert "recipes/hand-picked-fp8.yaml" in run(wanlab, "sweep", grid, "--dry-run", cwd=empty)


def test_a_notebook_runs_by_its_name_on_a_recorded_sweep(installed, empty):
    printed = run(installed / "wanlab", "run", "60_sweep", cwd=empty)
    assert "uniform-int8" in report(printed, empty)
    assert [path.name for path in empty.iterdir()] == ["outputs"]


def test_a_notebook_of_ones_own_wins_over_the_one_in_the_wheel(installed, empty, fixture_notebooks):
    (empty / "notebooks").mkdir()
    shutil.copy2(fixture_notebooks / "ok.ipynb", empty / "notebooks" / "60_sweep.ipynb")
    assert "denoising steps" in run(installed / "wanlab", "params", "60_sweep", cwd=empty)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("00_quickstart", ("steps=2", "frames=5", "limit_s=5", "cases=2")),
        ("11_flame_graph", ("trace=data/traces/wan2.2-ti2v-5b.pt.trace.json.gz",)),
    ],
)
def test_the_quickstart_and_a_recorded_trace_run_to_a_report(installed, empty, name, parameters):
    given = [word for parameter in parameters for word in ("-p", parameter)]
    printed = run(installed / "wanlab", "run", name, *given, cwd=empty, timeout=1500)
    assert len(report(printed, empty)) > 10_000
