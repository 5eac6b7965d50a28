"""Rules of the code that the linter does not know."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LATER = 40  # imports inside functions: optional packages, and what would make `wanlab --help` slow


def modules(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "wanlab").rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text("utf-8")


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_files_are_replaced_in_one_place(root):
    """Atomic writes are `core/files.write_bytes`, `write_text`, `write_json` and `atomic_path`."""
    places = [name for name, text in modules(root) if "os.replace" in text]
    assert places == ["wanlab/core/files.py"]


def test_few_imports_stand_inside_functions(root):
    inside = {
        f"{name}:{node.lineno}"
        for name, text in modules(root)
        for function in functions(ast.parse(text))
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(inside) <= LATER, sorted(inside)


RUNTIME_BASES = {
    "wanlab/engines/tensorrt/network.py: Monitor",
    "wanlab/engines/tensorrt/runtime.py: Logger",
    "wanlab/models/clocks.py: TellingScheduler",
    "wanlab/techniques/db_cache.py: Counted",
    "wanlab/techniques/half_size_start.py: BothSizesPipeline",
    "wanlab/techniques/half_size_start.py: GrowingScheduler",
    "wanlab/techniques/solver.py: FewerSteps",
}


def test_no_class_is_made_inside_a_function(root):
    """Except where the base class is known at run time alone: of an optional package, or of a given object."""
    inside = {
        f"{name}: {node.name}"
        for name, text in modules(root)
        for function in functions(ast.parse(text))
        for node in ast.walk(function)
        if isinstance(node, ast.ClassDef)
    }
    assert inside <= RUNTIME_BASES, sorted(inside - RUNTIME_BASES)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_and_help_load_neither_torch_nor_pandas():
    code = (
        "import contextlib, json, sys, wanlab\n"
        "imported = sorted(sys.modules)\n"
        "from wanlab.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None): main.main(['--help'])\n"
        "print(json.dumps([imported, sorted(sys.modules)]))"
    )
    imported, after_help = json.loads(run(code))
    assert "wanlab" in imported
    assert "wanlab.cli.main" in after_help
    assert not {"torch", "pandas"} & {*imported, *after_help}


def test_commands_that_run_and_compare_notebooks_load_no_model_library():
    """They start for every run and every worker; torch and diffusers would take several seconds each time."""
    modules = (
        "cli.run",
        "cli.runs",
        "cli.sweep",
        "cli.pages",
        "launch.worker",
        "runs.compare",
        "pages.sweep_page",
    )
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module('wanlab.' + name)\n"
    loaded = json.loads(run(code + "print(json.dumps(sorted(sys.modules)))"))
    assert "wanlab.launch.sweep" in loaded
    assert not {"torch", "diffusers", "transformers"} & set(loaded)


def test_importing_takes_a_tenth_of_a_second():
    """Processor time of the import, the best of five: other work on the machine does not count."""
    code = "import time; begin = time.process_time(); import wanlab; print(time.process_time() - begin)"
    seconds = [float(run(code)) for _ in range(5)]
    assert min(seconds) <= 0.1, f"{statistics.median(seconds):.3f} s, {min(seconds):.3f} s at best"
