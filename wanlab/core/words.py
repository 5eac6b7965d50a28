"""Words and figures for readers: names of parts, columns with their unit, numbers in three significant digits.

One source for figures, tables and pages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from wanlab.core.stats import interval_text

NAMES = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
    "image_encoder": "image encoder",
    "vae_encoder": "VAE encoder",
    "expert": "expert",
    "expert_high": "high-noise expert",
    "expert_low": "low-noise expert",
    "vae_decoder": "VAE decoder",
    "other": "other",
}
UNITS = {
    "ms": "ms",
    "s": "s",
    "gib": "GiB",
    "mib": "MiB",
    "bytes": "bytes",
    "percent": "%",
    "db": "dB",
    "us": "µs",
    "ns": "ns",
    "kib": "KiB",
    "TFLOP": "TFLOP",
    "fps": "frames/s",
    "w": "W",
}
RATES = {"gb": "GB/s", "TFLOP": "TFLOP/s", "frames": "frames/s"}
ACRONYMS = {
    name.lower(): name
    for name in (
        "A/A",
        "Amdahl",
        "CPU",
        "CUDA",
        "CV",
        "FLOP",
        "GPU",
        "ID",
        "L2",
        "LPIPS",
        "LoRA",
        "MFU",
        "ONNX",
        "PSNR",
        "SM",
        "SNR",
        "SSIM",
        "TFLOP",
        "TensorRT",
        "VAE",
    )
}
PLAINER = {
    "cond": "with prompt",
    "uncond": "without prompt",
    "std": "standard deviation",
    "se": "standard error",
}
HEADS = {
    "lpips_more": "LPIPS beyond the first plan's",
    "lpips_more_low": "LPIPS beyond the first plan's, low",
    "lpips_more_high": "LPIPS beyond the first plan's, high",
    "loss_percent_more": "loss beyond the first plan's (%)",
    "loss_percent_more_low": "loss beyond the first plan's, low (%)",
    "loss_percent_more_high": "loss beyond the first plan's, high (%)",
    "share_8bit_percent": "weights in 8 bits or fewer (%)",
    "work_gflop": "work (GFLOP)",
    "raised": "formats raised",
    "floor": "rounding alone",
    "floor_name": "rounding alone is that of",
    "ratio_to_noise_floor": "times rounding alone",
    "upper_percent": "loss, upper end (%)",
    "predicted_upper_percent": "predicted loss, upper end (%)",
}
"""Columns whose name does not say enough -> words with their unit."""
SAID = {
    "within floor": "no more than rounding",
    "above floor": "more than rounding",
    "no floor": "rounding not measured",
}
"""Verdict on a difference, as it is recorded -> in words."""
UNKNOWN = "–"  # what stands where a number is not known
SMALLEST_PERCENT = 0.01  # a smaller share is not shown as 0.00
SMALLEST = 1e-4  # a smaller figure of a sentence is "< 0.0001": nobody reads a power of ten on a phone
NO_BREAK = "\u00a0"  # a space at which no line ends


def label(column: str) -> str:
    """A column name as words with its unit: "peak_memory_gib" -> "peak memory (GiB)"."""
    if column in HEADS:
        return HEADS[column]
    words = [ACRONYMS.get(word, PLAINER.get(word, word)) for word in str(column).split("_")]
    if len(words) == 3 and words[1:] == ["per", "s"] and words[0] in RATES:
        return RATES[words[0]]
    if len(words) > 3 and words[-2:] == ["per", "s"]:
        return f"{' '.join(words[:-3])} ({RATES.get(words[-3], f'{words[-3]}/s')})"
    if len(words) > 1 and words[-1] in UNITS:
        return f"{' '.join(words[:-1])} ({UNITS[words[-1]]})"
    return " ".join(words)


def heading(column: Any) -> str:
    """A column name as the head of a table: "peak_memory_gib" and "peak memory (GiB)" are "peak memory, GiB"."""
    words = NAMES.get(str(column), label(str(column)) if NAME.fullmatch(str(column)) else str(column))
    return IN_BRACKETS.sub(lambda found: f", {found[1]}", words)


def number_text(value: float) -> str:
    """A number in three significant digits, with no exponent of a computer: 0.0123, 70,100, 14.3 G, 2.25 × 10⁻⁶."""
    if value != value:
        return UNKNOWN
    size = abs(value)
    if size == math.inf:
        return "infinite" if value > 0 else "minus infinite"
    if size >= 1e15 or 0 < size < 1e-4:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}{NO_BREAK}×{NO_BREAK}10{str(int(power)).translate(RAISED)}"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= 0.9995 * factor:
            return f"{value / factor:{'.3g' if size < 999.5 * factor else ',.0f'}}{NO_BREAK}{letter}"
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def scaled_unit(unit: str, largest: float) -> tuple[float, str]:
    """The factor and unit in which figures up to `largest` are read easily: 70,000 ms as 70 s, bytes as MiB."""
    if unit == "bytes":
        sizes = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
        return next(((1 / size, name) for size, name in sizes if largest >= size), (1.0, "bytes"))
    if unit == "ms" and largest >= 1e4:
        return 1e-3, "s"
    if unit == "ms" and 0 < largest < 0.1:
        return 1e3, "µs"
    if unit == "TFLOP" and 0 < largest < 0.1:
        return (1e3, "GFLOP") if largest >= 1e-4 else (1e6, "MFLOP")
    if unit == "s" and 0 < largest < 0.1:
        return 1e3, "ms"
    if unit == "GiB" and 0 < largest < 0.1:
        return 1024.0, "MiB"
    return 1.0, unit


def words_of(value: Any) -> str:
    """A value of a table as words: yes and no, lists and dictionaries without their signs, names of parts, short numbers."""
    if value is None:
        return ""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}" if abs(value) < 1e15 else str(value)
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{words_of(name)} {words_of(each)}" for name, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(words_of, value))
    text = str(value).removeprefix("torch.")
    if text in SAID:
        return SAID[text]
    if text in ("nan", "None", "NaT", "<NA>"):
        return ""
    if inside := LISTED.fullmatch(text):
        text = inside[1].replace("'", "").replace('"', "")
    if NAME.fullmatch(text):
        return heading(text)
    return text_words(text)


def text_words(text: str) -> str:
    """A sentence with names of parts as words and its numbers short."""
    text = PART.sub(lambda found: NAMES[found[0]], text)
    text = WHOLE.sub(r"\1", text)
    text = RAW_NUMBER.sub(lambda found: number_text(float(found[0])), text)
    return IN_BRACKETS.sub(lambda found: f", {found[1]}", text) if IN_BRACKETS.search(text) else text


def component_text(name: str) -> str:
    """A component's name for readers: "expert_high" as "high-noise expert"."""
    return NAMES.get(name, str(name).replace("_", " "))


def shown(value: float | None, unit: str = "") -> str:
    """A figure with its unit in three significant digits, never as a power of ten; "unknown" for None and NaN.

    Args:
        unit: "ms" becomes seconds from 1,000 on and µs below 0.1, "bytes" becomes KiB, MiB or GiB.
    """
    if value is None or math.isnan(value):
        return "unknown"
    if unit == "ms" and abs(value) >= 999.5:
        value, unit = value / 1e3, "s"
    if unit == "ms" and 0 < abs(value) < 0.1:
        value, unit = value * 1e3, "µs"
    if unit == "bytes":
        size = next((size for size in (30, 20) if abs(value) >= 2**size), 10)
        value, unit = value / 2**size, {30: "GiB", 20: "MiB", 10: "KiB"}[size]
    if 0 < abs(value) < SMALLEST:
        text = f"< {SMALLEST:.4f}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.4f}"
    return f"{text} {unit}".rstrip()


def time_text(time_ms: float) -> str:
    """A time with its unit, in three digits: `"1,234 s"`, `"56.8 s"`, `"0.12 ms"`."""
    return shown(time_ms, "ms")


def size_text(size_bytes: float) -> str:
    """A size with its unit, in three digits: `"1.25 GiB"`, `"310 MiB"`."""
    return shown(size_bytes, "bytes")


def percent_text(percent: float, smallest: float = SMALLEST_PERCENT) -> str:
    """A share in three digits; one that is smaller than `smallest` is said to be so, and is no row of zeros."""
    return shown(percent, "%") if not 0 < abs(percent) < smallest else f"less than {smallest:g} %"


def between_text(low: float | None, high: float | None) -> str:
    """A 95 % interval as `shown` writes figures: "95 % interval 72.4 to 347", or "95 % interval unknown"."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return interval_text(None, None)
    return f"95 % interval {shown(low)} to {shown(high)}"


def apart_text(relative: float) -> str:
    """A relative distance in percent: 0.0047 as "0.47 %"."""
    return shown(float(f"{100 * relative:.2g}"), "%")


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop; "" stays empty."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1:] in '.!?' else '.'}" if text else ""


def capital(text: str) -> str:
    """A clause with a capital letter at its beginning; names of products keep theirs."""
    return f"{text[:1].upper()}{text[1:]}"


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(number: int, word: str) -> str:
    """A number with its noun: "1 case", "2 cases"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9]*(?:_[a-zA-Z0-9]+)*")
LISTED = re.compile(r"[\[(]([^\[\](){}]*)[\])]")
PART = re.compile(
    r"(?<![\w./=-])(?:"
    + "|".join(sorted((n for n in NAMES if "_" in n), key=len, reverse=True))
    + r")(?![\w./=-])"
)
IN_BRACKETS = re.compile(r" \((" + "|".join(map(re.escape, {*UNITS.values(), *RATES.values()})) + r")\)\Z")
RAW_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d{4,}(?:[eE][-+]?\d+)?|(?:\.\d+)?[eE][-+]\d+)(?![\w.])")
WHOLE = re.compile(r"(?<==)(-?\d+)\.0(?![\d.])")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def typed_value(value: Any) -> str:
    """A parameter's value as it is typed on a command line."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
