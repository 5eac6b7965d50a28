"""The ladder of techniques: every rung and every technique alone and left out, on the same clips."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_a_ladder_has_a_rung_per_technique(shared_run):
    done = shared_run("43_ladder")
    ladder, variants = done.values["ladder"], done.values["variants"]
    assert [row["technique"] for row in ladder] == [
        "text_keys",
        "batched_guidance",
        "easy_cache",
        "guidance_gate",
    ]
    assert [row["tier"] for row in ladder] == ["exact", "numeric", "lossy", "lossy"]
    assert ladder[0]["quality_loss_percent"] == 0
    labels = [row["variant"] for row in variants]
    assert labels[:3] == [
        "text keys",
        "text keys + batched guidance",
        "text keys + batched guidance + easy cache",
    ]
    assert "all but text keys" in labels
    assert (
        len(labels) == len(set(labels)) == 10
    )  # the first rung is the first alone, the last but one the last left out
    assert ladder[-1]["skipped_percent"] > ladder[0]["skipped_percent"] == 0
