"""Walk the tour of docs/tour.md: every command in an empty folder; what each took is data/results/tour_cpu.json.

The report that no other picture shows, of the configuration, is docs/pictures/tour_configuration.webp.

python benchmarks/tour.py && python benchmarks/tables.py   # the second writes the times into the page
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from browser import chromium, launched
from report_pictures import PICTURES, REPORT_END, picture, short
from table_text import RESULTS, ROOT

from wanlab.core.files import write_json
from wanlab.measure import environment

PAGE = ROOT / "docs" / "tour.md"


def commands(text: str) -> list[str]:
    """The `wanlab` commands of the page, one a fenced block."""
    return re.findall(r"^```\n(wanlab .+)\n```$", text, re.MULTILINE)


def busy_s() -> float:
    """Seconds that the processors of this machine have worked."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def main() -> int:
    steps, begun, busy = [], time.perf_counter(), busy_s()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "outputs").mkdir()
        environ = os.environ | {"WANLAB_CACHE": str(Path(place) / "cache")}
        for command in commands(PAGE.read_text()):
            start = time.perf_counter()
            arguments = [sys.executable, "-m", "wanlab.cli", *shlex.split(command)[1:]]
            done = subprocess.run(arguments, cwd=place, env=environ, check=False)
            seconds = time.perf_counter() - start
            print(f"{command}: exit status {done.returncode}, {seconds:.0f} s", flush=True)
            if done.returncode:
                return 1
            steps.append({"command": command, "seconds": seconds})
        (report,) = Path(place).glob("outputs/41_configuration/*/report.html")
        with launched(chromium()) as browser:
            picture(browser, report, PICTURES / "tour_configuration.webp", REPORT_END)
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    others_s = busy_s() - busy - own.ru_utime - own.ru_stime
    whole_s = (time.perf_counter() - begun) * psutil.cpu_count()
    record = {
        "environment": short(environment()),
        "others_percent": 100 * max(0.0, others_s) / whole_s,
        "steps": steps,
    }
    write_json(RESULTS / "tour_cpu.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
