"""50_before_after and 60_sweep over a sweep of written records; nothing is run in them."""

from __future__ import annotations

import pytest
from support.comparison_runs import techniques, write_sweep

pytestmark = pytest.mark.notebook
HOSTILE = "<img src=x onerror=alert(1)>"
BASELINE = {"engine": "eager", "plan": "default"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    rows = techniques(clips=True)
    rows[2]["summary"]["kernels"] = "simulated on the CPU"
    rows.append({"state": "died", "reason": HOSTILE, "parameters": {"plan": HOSTILE}})
    rows.append({"parameters": {"plan": "long"}, "work": {"steps": 8}})
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "written", rows, baseline=BASELINE)


def test_a_sweep_says_which_configuration_to_use(run_notebook, sweep):
    done = run_notebook("60_sweep", "-p", f"sweep={sweep}")
    assert done.record["verdict"].startswith(
        "Use ONNX Runtime: 1.99 times as fast as eager PyTorch (95 % interval"
    )
    assert "within 3 % of quality loss; 1 refused; 1 not finished; the baseline was run once" in done.answer
    assert done.values["choice"]["configuration"] == "engine=onnxruntime, plan=default"
    rows = {row["configuration"]: row for row in done.values["comparison"]}
    assert len(rows) == 4
    assert rows["engine=onnxruntime, plan=default"]["efficient"]
    assert not rows["engine=eager, plan=uniform-int8"]["efficient"]
    text = done.page.get_text()
    assert "steps is 8, the baseline's 4" in text
    assert text.index("What failed") < text.index("What was refused") < text.index("The frontier")
    assert HOSTILE in text  # as words
    assert not done.page.select("img")
    assert len(done.page.select("div.figure[data-figure]")) == 4
    assert len(done.page.select("video")) == 3  # baseline, the efficient one, truth


def test_steps_are_told_before_and_after_alone_and_combined(run_notebook, sweep):
    done = run_notebook("50_before_after", "-p", f"sweep={sweep}")
    engines = {row["engine"]: row for row in done.values["engines"]}
    assert list(engines) == ["PyTorch, eager", "ONNX Runtime"]
    assert engines["ONNX Runtime"]["time_per_video_ms_ratio"] == pytest.approx(2, rel=0.03)
    matrix = {row["techniques"]: row for row in done.values["techniques"]}
    both = matrix["engine=onnxruntime + plan=uniform-int8"]
    assert both["of_product"] == pytest.approx(both["speedup"] / both["product"])
    assert "do not multiply" in both["verdict"]
    assert "plan=uniform-int8 alone is simulated" in both["verdict"]
    assert "ONNX Runtime 1.99 times as fast as the original (95 % interval 1.9" in done.page.get_text()
    assert done.record["verdict"].startswith(
        "ONNX Runtime alone is 1.99 times as fast as the original (95 % interval"
    )
    assert "Combining gains nothing" in done.record["verdict"]
    assert "Gains do not multiply: 3" in done.record["details"][0]
