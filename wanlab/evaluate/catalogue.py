"""Every metric as data: what a perfect copy scores, which way is worse, what it reacts to, where it is from."""

from __future__ import annotations

from dataclasses import dataclass

NUMERIC_PSNR_DB = 40.0
"""From this PSNR on, a difference is one of rounding: a root mean square error of 2.55 of 255 levels."""


@dataclass(frozen=True)
class Metric:
    """A metric with one score per frame.

    Attributes:
        name: name in tables and on the command line.
        title: title in figures, with its unit.
        perfect: score of a perfect copy.
        better: `"lower"`, `"higher"`, or `"near"`: values on both sides of `perfect` are worse.
        first_frame: 1 for a score of a frame and the one before it, so that frame 0 has none.
        reacts_to: changes that the metric detects.
        source: publication or formula.
    """

    name: str
    title: str
    perfect: float
    better: str
    first_frame: int
    reacts_to: str
    source: str

    def error(self, value: float) -> float:
        """A score as an error that is 0 for a perfect copy and grows with the difference."""
        if self.name == "psnr":
            return 10 ** (-value / 10)  # the mean squared error again
        if self.better == "near":
            return abs(value - self.perfect)
        return value - self.perfect if self.better == "lower" else self.perfect - value

    def text(self, value: float) -> str:
        return f"{value:.2f} dB" if self.name == "psnr" else f"{value:.5f}"


CATALOGUE = {
    metric.name: metric
    for metric in (
        Metric(
            "lpips", "LPIPS", 0.0, "lower", 0, "what the eye would notice in a frame", "Zhang et al. 2018"
        ),
        Metric("psnr", "PSNR (dB)", float("inf"), "higher", 0, "any change of a pixel", "10 log10(1 / MSE)"),
        Metric("ssim", "SSIM", 1.0, "higher", 0, "noise, blur, contrast at one scale", "Wang et al. 2004"),
        Metric("ms_ssim", "MS-SSIM", 1.0, "higher", 0, "structure at several scales", "Wang et al. 2003"),
        Metric(
            "flicker",
            "flicker (intensity)",
            0.0,
            "lower",
            1,
            "an error that changes from frame to frame: flicker, repeated and dropped frames",
            "mean |(Q[t] - Q[t-1]) - (O[t] - O[t-1])|",
        ),
        Metric(
            "motion_ratio",
            "motion ratio",
            1.0,
            "near",
            1,
            "a video that freezes, slows down (under 1) or trembles (over 1)",
            "mean |Q[t] - Q[t-1]| over mean |O[t] - O[t-1]|",
        ),
        Metric(
            "warp_error",
            "warp error (intensity)",
            0.0,
            "near",
            1,
            "things that do not keep their look while they move (over 0); blur is under 0",
            "Lai et al. 2018, less that of the original",
        ),
    )
}
METRICS = ("lpips", "psnr", "ssim")
"""Metrics that are measured by default."""

TEMPORAL = tuple(name for name, metric in CATALOGUE.items() if metric.first_frame)
"""Metrics of motion; they need two frames."""

ALL_METRICS = tuple(CATALOGUE)
