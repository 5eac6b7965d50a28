from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wanlab.measure import environment

module = sys.modules["wanlab.measure.environment"]  # as an attribute, the function shadows its module


@pytest.fixture(scope="module")
def found():
    return environment()


def test_is_json_and_says_where(found):
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores_available"] >= 1
    assert found["ram_gib"] > 0.5
    assert found["cpu"]
    assert (found["gpu"] is not None) == torch.cuda.is_available()
    assert environment("cpu")["gpu"] is None


def test_is_an_allow_list(monkeypatch):
    monkeypatch.setenv("WANLAB_TEST_SECRET", "s3cr3t-value")
    found = environment()
    assert "s3cr3t-value" not in json.dumps(found)
    assert str(Path(__file__).parents[2]) not in json.dumps(found)
    assert set(found) == {
        "device",
        "gpu",
        "gpu_count",
        "cpu",
        "cores",
        "cores_available",
        "threads",
        "ram_gib",
        "platform",
        "python",
        "cuda",
        "packages",
        "git",
    }


def test_git_state_of_a_source_tree(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    source = root / "wanlab" / "measure" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    monkeypatch.setattr(module, "CHECKOUT", root)
    assert environment("cpu")["git"] is None

    def git(*command):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(root), *identity, *command], check=True, capture_output=True)

    git("init", "-q")
    assert environment("cpu")["git"] == {"commit": None, "dirty": True}
    git("add", "-A")
    git("commit", "-q", "-m", "first", "--no-verify")
    clean = environment("cpu")["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    source.write_text("x = 2\n")
    assert environment("cpu")["git"] == {"commit": clean["commit"], "dirty": True}


def test_driver_figures_are_read_by_gpu_id(monkeypatch):
    asked = []

    def answer(command):
        asked.append(command)
        return "580.65, 1980, [N/A], 2619, 700.00, 31, Enabled"

    monkeypatch.setattr(module, "_output", answer)
    assert module._nvidia_smi("abc") == {
        "driver": "580.65",
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "power_limit_w": 700,
        "temperature_c": 31,
        "persistence_mode": "Enabled",
    }
    assert asked[0][-1] == "GPU-abc"
    monkeypatch.setattr(module, "_output", lambda command: None)
    assert module._nvidia_smi("abc") == {}
