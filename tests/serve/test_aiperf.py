"""AIPerf, a load generator that knows nothing of wanlab, drives the service over its endpoint type `video_generation`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.services import MODEL, data_url, picture, settings

from wanlab.core.paths import data
from wanlab.serve.running import served

AIPERF = Path(sys.prefix) / "aiperf" / "bin" / "aiperf"
REQUESTS = 6


@pytest.mark.skipif(not AIPERF.exists(), reason=f"no AIPerf in an environment of its own: make {AIPERF}")
def test_aiperf_drives_the_service(tmp_path):
    given = {"input_reference": data_url(picture(0, 16, 16)), "size": "64x64", "num_inference_steps": 2}
    with served(settings(tmp_path / "service"), ray=False) as service:
        command = [
            AIPERF, "profile", "-m", MODEL, "--endpoint-type", "video_generation", "-u", service.url,
            "--api-key", service.token, "--concurrency", 2, "--request-count", REQUESTS,
            "--extra-inputs", json.dumps(given), "--tokenizer", data("wan-nano", "tokenizer"),
            "--artifact-dir", tmp_path / "figures", "--ui", "none",
        ]  # fmt: skip
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 0, done.stdout[-3000:]
    figures = json.loads((tmp_path / "figures" / "profile_export_aiperf.json").read_text())
    assert figures["request_count"]["avg"] == REQUESTS
    assert figures["request_latency"]["avg"] > 0
    lines = (tmp_path / "figures" / "profile_export.jsonl").read_text().splitlines()
    assert len(lines) == REQUESTS
    assert all(json.loads(line).get("error") is None for line in lines)
