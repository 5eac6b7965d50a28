"""What waits for a GPU goes through on the CPU: plans selected by time, as benchmarks/precision_select.py hands them on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import precision_select
import precision_speed

from wanlab import precision


def test_plans_are_selected_by_time_and_within_half_the_effect(tmp_path):
    found = precision_select.select("nano", precision_select.JOBS["nano"], tmp_path, "cpu")
    assert 1 <= len(found["plans"]) <= 2
    effects = {row["plan"]: row["effect"] for row in found["predicted"]}
    for row in found["selected"]:
        plan = precision.load_plan(tmp_path / f"{row['plan']}.yaml")
        assert plan.hash == found["plans"][row["plan"]]["hash"]
        assert "GFLOP (counted)" in plan.note  # nothing is timed on a CPU, and the plan says so
        assert row["saved_percent"] > 0
    assert found["selected"][-1]["effect"] <= effects["uniform-fp8"] / 2
    assert {row["format"] for row in found["costs"]} == {"default", *precision_select.FORMATS}


@pytest.mark.parametrize(("resume", "seed"), [(True, 0), (True, 1), (False, 0)])
def test_a_record_is_gone_on_with_under_the_same_settings_only(tmp_path, resume, seed):
    output = tmp_path / "record.json"
    output.write_text(
        json.dumps({"settings": {"seed": 0, "plan": ["a"]}, "variants": {"as-loaded:eager": {}}})
    )
    arguments = SimpleNamespace(resume=resume, output=output)
    found = precision_speed.earlier(arguments, {"seed": seed, "plan": ["a"]})
    assert (found is not None) == (resume and seed == 0)
