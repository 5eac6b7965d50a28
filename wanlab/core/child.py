"""A measurement in a fresh Python process, which holds nothing else: peaks in one process cannot be told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from wanlab.core.errors import WanlabError


def in_own_process(module: str, order: dict[str, Any], what: str) -> dict[str, float]:
    """Run `python -m module` with `order` as JSON on its standard input; its last line is the answer as JSON.

    Args:
        what: is measured, for the message.

    Raises:
        WanlabError: the process failed; its last line is the reason.
    """
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(order), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise WanlabError(f"measuring {what} in a process of its own failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])
