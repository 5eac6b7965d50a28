"""Timing, memory, stages and environment: numbers with all their samples and where they were taken.

>>> from wanlab import measure
>>> samples = measure.time_ms(lambda: model(x), iterations=20)
>>> with measure.stages(model) as recorder:
...     generation = model.generate(image, prompt)
>>> recorder.breakdown(generation.wall_ms)
"""

from __future__ import annotations

from wanlab.measure.baseline import Baseline, baseline, before_after
from wanlab.measure.ceilings import Ceilings, ceilings, recorded_ceilings
from wanlab.measure.environment import environment
from wanlab.measure.memory import PeakMemory, peak_memory
from wanlab.measure.platform_files import read_platform, read_platforms
from wanlab.measure.platforms import (
    PlatformRecord,
    Work,
    comparable,
    forward_records,
    platform_table,
    platform_verdict,
)
from wanlab.measure.samples import CV_LIMIT_PERCENT, AAControl, Comparison, Samples, compare
from wanlab.measure.side_by_side import SideBySide, side_by_side
from wanlab.measure.stages import COMPONENTS, OTHER, StageCall, StageRecorder, stages
from wanlab.measure.timing import aa_control, in_turn, time_ms

__all__ = [
    "COMPONENTS",
    "CV_LIMIT_PERCENT",
    "OTHER",
    "AAControl",
    "Baseline",
    "Ceilings",
    "Comparison",
    "PeakMemory",
    "PlatformRecord",
    "Samples",
    "SideBySide",
    "StageCall",
    "StageRecorder",
    "Work",
    "aa_control",
    "baseline",
    "before_after",
    "ceilings",
    "comparable",
    "compare",
    "environment",
    "forward_records",
    "in_turn",
    "peak_memory",
    "platform_table",
    "platform_verdict",
    "read_platform",
    "read_platforms",
    "recorded_ceilings",
    "side_by_side",
    "stages",
    "time_ms",
]
