"""The one table of the README: what was done, what it bought, what it cost, where it ran."""

from __future__ import annotations

import math

from table_text import markdown, read

from wanlab.measure.timing import Samples, ratio_of_medians


def results() -> str:
    """Speed-ups against eager PyTorch of the same weights, from records that the other tables show in full."""
    rows = [_whole_video(), _engine("engines_dit_h200", "compiled", "TI2V-5B expert: blocks compiled")]
    rows += [_plan("precision_ti2v_h200", "uniform-fp8", "TI2V-5B expert: FP8 linear layers, compiled")]
    rows += [_engine("engines_dit_h200", "onnxruntime", "TI2V-5B expert: ONNX Runtime")]
    rows += [_engine("engines_vae_h200", "compiled", "TI2V-5B VAE decoder: compiled")]
    rows += [_engine("engines_vae_h200", "onnxruntime", "TI2V-5B VAE decoder: ONNX Runtime, chunk by chunk")]
    rows += [_plan("precision_a14b_h200", "as-loaded", "I2V-A14B expert: blocks compiled")]
    rows += [_plan("precision_a14b_h200", "uniform-fp8", "I2V-A14B expert: FP8 linear layers, compiled")]
    rows += [_selected()]
    header = ["what was done", "times faster (95 % interval)", "difference in the output", "where it ran"]
    return markdown(header, rows) + (
        "\n\nAgainst eager PyTorch with the same weights: wan-nano in FP32 on 2 CPU threads; TI2V-5B at 704x1280x121 and "
        "I2V-A14B at 720x1280x81 in BF16 with random weights, one forward of one network."
    )


def _whole_video() -> list[str]:
    record = read("onnxruntime_cpu")
    gain = record["comparison"]
    return [
        "wan-nano, whole video: ONNX Runtime",
        _ratio(gain["speedup"], gain["low"], gain["high"]),
        f"PSNR {record['psnr_db']:.0f} dB between the videos",
        _machine(record),
    ]


def _engine(name: str, engine: str, what: str) -> list[str]:
    record = read(name)
    row = record["engines"][engine]
    return [what, _against(record["engines"]["eager"], row), _distance(row), _machine(record)]


def _plan(name: str, plan: str, what: str) -> list[str]:
    record = read(name)
    row = record["variants"][f"{plan}:compiled"]
    return [what, _against(record["variants"]["as-loaded:eager"], row), _distance(row), _machine(record)]


def _selected() -> list[str]:
    record = read("plan_choice_h200")
    row = next(row for row in record["final"] if row["plan"] == "selected")
    loss = f"{row['loss_percent']:+.2f} % ({row['loss_low_percent']:+.2f} to {row['loss_high_percent']:+.2f})"
    return [
        f"wan-nano: mixed precision chosen by measurement, {row['bits_per_weight']:.1f} bits a weight",
        "memory only",
        f"quality loss {loss}",
        _machine(record),
    ]


def _against(baseline: dict, candidate: dict) -> str:
    first, second = (
        Samples(side["samples"]["label"], tuple(side["samples"]["values_ms"]), side["samples"]["device"],
                side["samples"]["clock"])
        for side in (baseline, candidate)
    )  # fmt: skip
    return _ratio(*ratio_of_medians(first, second))


def _ratio(ratio: float, low: float, high: float) -> str:
    if math.isnan(low):  # too few samples for one
        return f"{ratio:.2f} (interval unknown)"
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _distance(row: dict) -> str:
    return f"relative L2 {row['distance']['relative_l2']:.3f}"


def _machine(record: dict) -> str:
    gpu = record["environment"].get("gpu")
    return gpu["name"] if gpu else str(record["environment"]["cpu"])


TABLES = {"results": results}
