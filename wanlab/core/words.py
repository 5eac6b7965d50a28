"""Words and figures for readers: names of parts, columns with their unit, numbers in three significant digits.

One source for figures, tables and pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

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
UNKNOWN = "–"  # what stands where a number is not known
SMALLEST_PERCENT = 0.001
NO_BREAK = "\u00a0"  # a space at which no line ends


def label(column: str) -> str:
    """A column name as words with its unit: "peak_memory_gib" -> "peak memory (GiB)"."""
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
        return "∞" if value > 0 else "−∞"
    if size >= 1e15 or 0 < size < 1e-4:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}{NO_BREAK}×{NO_BREAK}10{str(int(power)).translate(RAISED)}"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= 0.9995 * factor:
            return f"{value / factor:{'.3g' if size < 999.5 * factor else ',.0f'}}{NO_BREAK}{letter}"
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def time_text(time_ms: float) -> str:
    """A time in three significant digits with the unit in which it is read easily."""
    factor, unit = scaled_unit("ms", abs(time_ms) if math.isfinite(time_ms) else 0.0)
    return f"{number_text(time_ms * factor)} {unit}"


def percent_text(value: float) -> str:
    """A percentage in three significant digits; one that is too small to matter says so, and is not 0.00."""
    if 0 < abs(value) < SMALLEST_PERCENT:
        return f"< {SMALLEST_PERCENT}" if value > 0 else f"> −{SMALLEST_PERCENT}"
    return number_text(value)


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
