"""No figure in the README or the model card is typed by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_tables_are_what_the_recorded_results_say(root):
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
