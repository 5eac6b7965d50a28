"""Runs one measurement in a fresh Python process, because peaks of memory in one process cannot be separated."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from wanlab.core.errors import WanlabError


def in_own_process(module: str, order: dict[str, Any], what: str) -> dict[str, Any]:
    """Run `python -m module` with `order` as JSON on its standard input; its last line of output is the result as JSON.

    Args:
        what: name of the measurement, for the error message.

    Raises:
        WanlabError: the process failed; the message ends with its last line of output.
    """
    process = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(order), capture_output=True, text=True, check=False
    )
    if process.returncode:
        last = (process.stderr.strip() or "no message").splitlines()[-1]
        raise WanlabError(f"measuring {what} in a process of its own failed: {last}")
    return json.loads(process.stdout.splitlines()[-1])
